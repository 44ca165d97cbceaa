package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"nlb/balancer/control"
	"nlb/bench/lab"
	"nlb/internal/wait"
)

// An expectation is what a command line comes to.
type expectation struct {
	args           string // split at blanks
	code           int
	stdout, stderr string // patterns; "" is nothing at all
}

// expect runs the command lines. SOCKET, FILE, STATE and DIR stand for the
// daemon's own.
func (d *daemon) expect(all ...expectation) {
	d.t.Helper()
	for _, x := range all {
		d.t.Run("nlb "+x.args, func(t *testing.T) {
			words := strings.NewReplacer("SOCKET", d.socket, "FILE", d.config, "STATE", d.state(""), "DIR", d.dir).Replace(x.args)
			got := finish(t, d.node.Command(t.Context(), program, strings.Fields(words)...))
			if got.code != x.code || !matches(x.stdout, got.stdout) || !matches(x.stderr, got.stderr) {
				t.Errorf("exit %d, stdout %.300q, stderr %.300q", got.code, got.stdout, got.stderr)
			}
		})
	}
}

func matches(pattern, text string) bool {
	if pattern == "" {
		return text == ""
	}
	return regexp.MustCompile(pattern).MatchString(text)
}

// finish runs a command to its end.
func finish(t *testing.T, cmd *exec.Cmd) output {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return output{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// Every command tells by its exit code and in one line what came of it.
func TestCommandLine(t *testing.T) {
	const line = `^nlb: [^\n]+\n$`
	top, d := served(t, lab.Options{Targets: 3}, 3)
	good := read(d.config)
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(d.dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("more.yaml", variant(top, 0).String())
	write("bad.yaml", "listeners: 1\n")
	write("file", "")
	long := strings.Repeat("x", 120)
	d.expect([]expectation{
		{"", 2, "", `^nlb: a command is missing\nSee nlb help.\n$`},
		{"fly", 2, "", `^nlb: unknown command "fly"`},
		{"serve --wings", 2, "", `^nlb: unknown flag: --wings`},
		{"status extra", 2, "", `^nlb: unknown command "extra"`},
		{"status -o yaml", 2, "", `must be table or json`},
		{"serve", 2, "", `which file`},
		{"plan", 2, "", `which file`},
		{"validate", 2, "", `which file`},
		{"help", 0, `Exit codes`, ""},
		{"version", 0, `^nlb `, ""},
		{"completion bash", 0, `bash completion`, ""},

		{"validate -c FILE", 0, `is valid`, ""},
		{"validate -c DIR/missing.yaml", 1, "", `^nlb: [^\n]*missing.yaml: no such file or directory\n$`},
		{"validate -c DIR", 1, "", `^nlb: [^\n]*is a directory\n$`},
		{"validate -c DIR/bad.yaml", 1, "", `^[^\n]*bad.yaml:1:12: listeners: `},

		{"plan -c FILE --socket SOCKET --state-dir STATE", 0, "", ""},
		{"plan -c FILE --socket SOCKET --state-dir STATE -o json", 0, `^\[\]\n$`, ""},
		{"plan -c DIR/more.yaml --socket SOCKET --state-dir STATE", 2, `^add `, ""},
		{"plan -c DIR/more.yaml --socket SOCKET --state-dir STATE -o json", 2, `^\[\n`, ""},
		{"plan -c DIR/bad.yaml --socket SOCKET --state-dir STATE", 1, "", `bad.yaml:1:12`},
		{"plan -c DIR/missing.yaml --socket SOCKET", 1, "", line},

		{"status --socket SOCKET", 0, `web4 +198.51.100.10:80 +TCP`, ""},
		{"status --socket SOCKET -o json", 0, `^\{\n  "dataplane": "nftables",`, ""},
		{"status --socket DIR/nobody.sock", 1, "", `^nlb: no daemon answers on [^\n]*nobody.sock: start it with nlb serve[^\n]*\n$`},
		{"status --socket DIR/file", 1, "", `^nlb: no daemon answers on [^\n]*file: `},
		{"reload --socket DIR/nobody.sock", 1, "", `^nlb: no daemon answers`},
		{"reload --socket SOCKET", 0, "", ""},

		{"serve -c FILE --socket SOCKET --state-dir STATE", 1, "", `^nlb: lock: [^\n]*nlb.lock is held by another process \(pid \d+\)\n$`},
		{"serve -c FILE --socket SOCKET --state-dir DIR/other", 1, "", `nlb: socket [^\n]*: is another nlb running\? [^\n]*\(pid \d+\)\n$`},
		{"serve -c DIR/missing.yaml --socket SOCKET", 1, "", line},
		{"serve -c DIR/bad.yaml --socket SOCKET", 1, "", `bad.yaml:1:12`},
		{"serve -c FILE --socket DIR/new.sock --state-dir DIR/file/state", 1, "", `^nlb: [^\n]*file[^\n]*: not a directory\n$`},
		{"serve -c FILE --socket DIR/new.sock --state-dir /proc/nlb", 1, "", `^nlb: [^\n]*/proc/nlb[^\n]*\n$`},
		{"serve -c FILE --socket DIR/file/new.sock --state-dir DIR/new", 1, "", `^nlb: socket [^\n]*not a directory\n$`},
		{"serve -c FILE --socket DIR/" + long + " --state-dir DIR/new", 1, "", `^nlb: socket [^\n]*(long|107|108)[^\n]*\n$`},
		{"status --socket DIR/" + long, 1, "", `^nlb: [^\n]*(long|107|108)[^\n]*\n$`},
		{"clear --socket SOCKET --state-dir STATE", 1, "", `^nlb: a daemon runs and would put everything back: stop it first, or use --force[^\n]*\n$`},
	}...)
	var status control.Status
	if out := d.run("status", "-o", "json"); json.Unmarshal([]byte(out.stdout), &status) != nil || len(status.TargetGroups) != 2 {
		t.Errorf("status: %+v", out)
	}
	// A reload is refused without a write when an interface is missing.
	if err := d.reload(strings.Replace(good, "interface: lo", "interface: none0", 1)); err == nil || !strings.Contains(err.Error(), "none0") {
		t.Errorf("reload with an interface that is missing: %v", err)
	}
	if err := d.reload(good); err != nil {
		t.Error(err)
	}
	works(t, top, "after all that")

	// Without a daemon: what is stale is replaced, what is missing is made.
	d.kill()
	if _, err := os.Stat(d.socket); err != nil {
		t.Fatalf("the crash left no socket: %v", err)
	}
	d.expect([]expectation{
		{"status --socket SOCKET", 1, "", `^nlb: no daemon answers`},
		{"plan -c FILE --socket SOCKET --state-dir STATE", 0, "", ""},
		{"plan -c DIR/more.yaml --socket SOCKET --state-dir STATE", 2, `^add `, ""},
	}...)
	d.start()
	d.stop()
	d.socket = filepath.Join(d.dir, "new", "folder", "nlb.sock")
	d.client = control.NewClient(d.socket)
	d.start()
	d.stop()
	d.expect([]expectation{
		{"clear --socket SOCKET --state-dir STATE -o json", 0, `^\[\n`, ""},
		{"clear --socket SOCKET --state-dir STATE", 0, "", ""},
		{"plan -c FILE --socket SOCKET --state-dir STATE", 2, `^add table inet nlb\n`, ""},
	}...)
}

// nobody is a user without rights, who may run the program and read the file.
const nobody = 65534

// asNobody is the program, run on the balancer by that user.
func (d *daemon) asNobody(args ...string) *exec.Cmd {
	d.t.Helper()
	// The program's own folder may be closed to others.
	copied := filepath.Join(d.dir, "nlb")
	if _, err := os.Stat(copied); err != nil {
		copyProgram(d.t, copied)
		if err := errors.Join(os.Chmod(d.dir, 0o755), os.Chmod(d.config, 0o644)); err != nil {
			d.t.Fatal(err)
		}
	}
	user := []string{fmt.Sprintf("--reuid=%d", nobody), fmt.Sprintf("--regid=%d", nobody), "--clear-groups", "--inh-caps=-all", copied}
	return d.node.Command(d.t.Context(), "setpriv", append(user, args...)...)
}

// Users without rights are told so in one line. Who belongs to the socket's
// group may look, and only root may change something.
func TestUsersWithoutRights(t *testing.T) {
	top, d := served(t, lab.Options{Targets: 2}, 2)
	s := listenForSilence(t, top.LB)
	info, err := os.Stat(d.socket)
	if err != nil {
		t.Fatal(err)
	}
	if got := info.Mode(); got != os.ModeSocket|0o660 {
		t.Errorf("the socket's mode is %v", got)
	}
	check := func(code int, stdout, stderr string, args ...string) {
		t.Helper()
		if got := finish(t, d.asNobody(args...)); got.code != code || !matches(stdout, got.stdout) || !matches(stderr, got.stderr) {
			t.Errorf("nlb %v: exit %d, stdout %.200q, stderr %q", args, got.code, got.stdout, got.stderr)
		}
	}
	const denied = `^nlb: [^\n]*(permission denied|operation not permitted)[^\n]*\n$`
	check(0, `is valid`, "", "validate", "-c", d.config)
	check(1, "", denied, "status", "--socket", d.socket)
	check(1, "", denied, "reload", "--socket", d.socket)
	check(1, "", denied, "serve", "-c", d.config, "--socket", filepath.Join(d.dir, "x.sock"), "--state-dir", d.state(""))
	check(1, "", denied, "serve", "-c", d.config, "--socket", "/tmp/nlb-e2e-nobody.sock", "--state-dir", d.state("x"))
	check(1, "", denied, "clear", "--socket", d.socket, "--state-dir", d.state(""))
	check(1, "", denied, "plan", "-c", d.config, "--socket", d.socket, "--state-dir", d.state(""))
	if err := os.Chmod(d.config, 0o600); err != nil {
		t.Fatal(err)
	}
	check(1, "", denied, "validate", "-c", d.config)

	// An operator lets a group in.
	if err := os.Chown(d.socket, -1, nobody); err != nil {
		t.Fatal(err)
	}
	check(0, `web4`, "", "status", "--socket", d.socket)
	check(1, "", fmt.Sprintf(`^nlb: user %d may look but not change; ask as root[^\n]*\n$`, nobody), "reload", "--socket", d.socket)
	if got := d.status().Apply; got.Generation != 1 {
		t.Errorf("configuration %d", got.Generation)
	}
	if heard := s.heard(); heard != "" {
		t.Errorf("the kernel was written to:\n%s", heard)
	}
}

// notifications are what the daemon told the stand-in for systemd (sd_notify(3)).
type notifications struct {
	mu   sync.Mutex
	said []string // guarded by mu
}

func hearNotifications(t *testing.T) *notifications {
	t.Helper()
	dir, err := os.MkdirTemp("", "nlb-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("NOTIFY_SOCKET", path)
	n, done := &notifications{}, make(chan struct{})
	go func() {
		defer close(done)
		for {
			var b [4096]byte
			k, err := conn.Read(b[:])
			if err != nil {
				return
			}
			n.mu.Lock()
			n.said = append(n.said, string(b[:k]))
			n.mu.Unlock()
		}
	}()
	t.Cleanup(func() {
		_ = conn.Close()
		<-done
		_ = os.RemoveAll(dir)
	})
	return n
}

// next waits for a message that matches, and forgets what came before it.
func (n *notifications) next(t *testing.T, pattern string) {
	t.Helper()
	re := regexp.MustCompile(pattern)
	wait.For(t, limit, "notification "+pattern, func() error {
		n.mu.Lock()
		defer n.mu.Unlock()
		for i, text := range n.said {
			if re.MatchString(text) {
				n.said = n.said[i+1:]
				return nil
			}
		}
		return fmt.Errorf("but %q", n.said)
	})
}

// systemd hears when the daemon forwards, reloads and ends.
func TestSystemdIsTold(t *testing.T) {
	n := hearNotifications(t)
	_, d := served(t, lab.Options{Targets: 2}, 2)
	const ready = `(?m)^READY=1$`
	n.next(t, ready)
	if err := d.reload(read(d.config)); err != nil {
		t.Fatal(err)
	}
	n.next(t, `^RELOADING=1\nMONOTONIC_USEC=\d+`)
	n.next(t, ready)
	d.write("broken")
	d.signal(1) // SIGHUP
	n.next(t, `^RELOADING=1\nMONOTONIC_USEC=\d+`)
	n.next(t, ready)
	d.stop()
	n.next(t, `(?m)^STOPPING=1$`)
}

// A state folder that a crash of the disk left is said to be bad, before
// anything is touched; what forwards goes on forwarding.
func TestDamagedState(t *testing.T) {
	top, d := served(t, lab.Options{Targets: 3}, 3)
	p := press(t, top)
	key, path := read(d.state("hash.key")), d.state("hash.key")
	table := d.tableWords()
	d.kill()
	s := listenForSilence(t, top.LB)
	refused := func(why, want string) {
		t.Helper()
		for _, args := range [][]string{
			{"serve", "-c", d.config, "--state-dir", d.state("")},
			{"plan", "-c", d.config, "--state-dir", d.state("")},
		} {
			if out := d.run(args...); out.code != 1 || !strings.Contains(out.stderr, want) || strings.Count(out.stderr, "\n") != 1 || out.stdout != "" {
				t.Errorf("%s: nlb %s: %+v", why, args[0], out)
			}
		}
	}
	for _, text := range []string{"", "\n", key[:20], key[:31] + "\n", "x" + key[1:], key + key, strings.Repeat("\x00", len(key))} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		refused(fmt.Sprintf("key %q", text), "hash.key is damaged")
		if now := read(path); now != text {
			t.Errorf("the damaged key %q was replaced by %q", text, now)
		}
	}
	if err := errors.Join(os.Remove(path), os.Mkdir(path, 0o700)); err != nil {
		t.Fatal(err)
	}
	refused("the key is a folder", "is a directory")
	if err := errors.Join(os.Remove(path), os.WriteFile(path, []byte(key), 0o600)); err != nil {
		t.Fatal(err)
	}
	// A disk that takes nothing any more. The mount is the child's own.
	readOnly := d.node.Command(context.Background(), "sh", "-ec", `mount --bind "$0" "$0"; mount -o remount,bind,ro "$0"; exec "$@"`,
		d.dir, program, "serve", "-c", d.config, "--state-dir", d.state(""), "--socket", d.socket)
	if out := finish(t, readOnly); out.code != 1 || !matches(`^nlb: [^\n]*read-only file system\n$`, out.stderr) {
		t.Errorf("read-only state folder: %+v", out)
	}
	if heard := s.heard(); heard != "" {
		t.Errorf("the kernel was written to:\n%s", heard)
	}
	p.check("after refused starts")

	// Without the records of sysctls nothing can be restored; the rest works.
	for _, text := range []string{"", "garbage", `{"settings": [{"key": "../../kernel/panic", "previous": "1", "ours": "1"}]}`} {
		if err := os.WriteFile(d.state("sysctls.json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		d.start()
		if !strings.Contains(d.log.String(), "previous values of sysctls cannot be read") {
			t.Errorf("sysctls.json of %q: nothing is said", text)
		}
		works(t, top, "with a damaged sysctls.json")
		d.kill()
	}
	if err := os.Remove(d.state("sysctls.json")); err != nil {
		t.Fatal(err)
	}
	d.start()
	d.waitAllHealthy()
	if err := differ("table", table, d.tableWords()); err != nil {
		t.Error(err)
	}
	p.end()
}
