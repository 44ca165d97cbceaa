package nstest

import (
	"bufio"
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// act makes the inner process of a nested run do one thing instead of testing.
const act = "NLB_NSTEST_ACT"

func TestMain(m *testing.M) {
	if what := os.Getenv(act); what != "" && os.Getenv(marker) != "" {
		os.Exit(perform(what))
	}
	os.Exit(Main(m))
}

func perform(what string) int {
	switch what {
	case "exit 7":
		return 7
	case "await SIGTERM":
		got := make(chan os.Signal, 1)
		signal.Notify(got, unix.SIGTERM)
		fmt.Println("ready")
		<-got
		return 9
	case "die of SIGKILL":
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		select {}
	default:
		return 64
	}
}

// nested is a run of this binary as a stranger would start it.
func nested(t *testing.T, what string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, marker+"=") {
			cmd.Env = append(cmd.Env, kv)
		}
	}
	cmd.Env = append(cmd.Env, act+"="+what)
	cmd.WaitDelay = 10 * time.Second
	return cmd
}

func TestNamespaceIsNewAndFurnished(t *testing.T) {
	ifs, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	if len(ifs) != 1 || ifs[0].Name != "lo" || ifs[0].Flags&net.FlagUp == 0 {
		t.Errorf("interfaces %v, want only lo, up", ifs)
	}
	sys, err := os.ReadDir("/sys/class/net")
	if err != nil {
		t.Fatal(err)
	}
	if len(sys) != 1 || sys[0].Name() != "lo" {
		t.Errorf("/sys/class/net has %v, want only lo", sys)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(mounts, []byte(" shared:")) {
		t.Errorf("mounts would propagate to the host:\n%s", mounts)
	}
}

func TestEveryThreadIsInside(t *testing.T) {
	threads, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil || len(threads) == 0 {
		t.Fatalf("threads %v: %v", threads, err)
	}
	for _, path := range threads {
		if ns, err := os.Readlink(path); err == nil && ns == os.Getenv(marker) {
			t.Errorf("%s is still %s", path, ns)
		}
	}
}

func TestExitCode(t *testing.T) {
	for what, want := range map[string]int{"exit 7": 7, "die of SIGKILL": 128 + int(unix.SIGKILL)} {
		cmd := nested(t, what)
		out, _ := cmd.CombinedOutput()
		if got := cmd.ProcessState.ExitCode(); got != want {
			t.Errorf("%s: exit code %d, want %d\n%s", what, got, want, out)
		}
	}
}

func TestSignalsReachTheInside(t *testing.T) {
	cmd := nested(t, "await SIGTERM")
	startAndAwaitReady(t, cmd)
	if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if got := cmd.ProcessState.ExitCode(); got != 9 {
		t.Errorf("exit code %d, want the inner process's 9", got)
	}
}

func TestInsideDiesWithTheOutside(t *testing.T) {
	cmd := nested(t, "await SIGTERM")
	out := startAndAwaitReady(t, cmd)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	// The inner process holds the other end of the pipe, until it is dead.
	if rest, err := out.ReadString('\n'); err == nil {
		t.Errorf("the inner process said %q after its parent was killed", rest)
	}
	_ = cmd.Wait()
}

func startAndAwaitReady(t *testing.T, cmd *exec.Cmd) *bufio.Reader {
	t.Helper()
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	out := bufio.NewReader(pipe)
	if line, err := out.ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("the inner process said %q: %v", line, err)
	}
	return out
}

func TestWithoutRootItFails(t *testing.T) {
	cmd := nested(t, "exit 7")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, _ := cmd.CombinedOutput()
	if got := cmd.ProcessState.ExitCode(); got != 1 {
		t.Errorf("exit code %d, want 1", got)
	}
	if got := string(out); strings.Count(got, "\n") != 1 || !strings.Contains(got, "needs root") {
		t.Errorf("said %q, want one line that asks for root", got)
	}
}
