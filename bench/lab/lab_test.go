package lab

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// child makes the test binary build a lab and wait to be killed.
const child = "NLB_LAB_TEST_CHILD"

func TestMain(m *testing.M) {
	MaybeRunAgent()
	if os.Getenv(child) != "" {
		buildAndWait()
	}
	goleak.VerifyTestMain(m)
}

// limit bounds every wait. Nothing in a lab takes that long.
const limit = 30 * time.Second

// soon bounds a test's waiting.
func soon(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	return ctx
}

// made closes a new topology with the test.
func made(t *testing.T, build func(Options) (*Topology, error), o Options) *Topology {
	t.Helper()
	top, err := build(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := top.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return top
}

func (n *Node) serve(t *testing.T, o Serve) *Listeners {
	t.Helper()
	l, err := n.Agent().Serve(soon(t), o)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestTopologies(t *testing.T) {
	for _, tt := range []struct {
		build   func(Options) (*Topology, error)
		targets []string // who, Addr4, Addr6
		callers []string
	}{
		{Routed, []string{"t1 10.0.1.11 2001:db8:1::11", "t2 10.0.1.12 2001:db8:1::12"}, []string{"c1 203.0.113.9 2001:db8:99::9", "c2 203.0.113.10 2001:db8:99::10"}},
		{OneArm, []string{"t1 10.0.1.11 2001:db8:1::11", "t2 10.0.1.12 2001:db8:1::12"}, []string{"c1 203.0.113.9 2001:db8:99::9", "c2 203.0.113.10 2001:db8:99::10", "i1 10.0.1.101 2001:db8:1::101"}},
		{MultiHomed, []string{"t1 10.0.1.11 2001:db8:1::11", "t2 10.0.1.12 2001:db8:1::12"}, []string{"c1 203.0.113.9 2001:db8:99::9", "c2 203.0.113.10 2001:db8:99::10"}},
		{PodNode, []string{
			"p1x1 10.244.1.11 2001:db8:244:1::11", "p1x2 10.244.1.12 2001:db8:244:1::12",
			"p2x1 10.244.2.11 2001:db8:244:2::11", "p2x2 10.244.2.12 2001:db8:244:2::12",
		}, []string{"c1 203.0.113.9 2001:db8:99::9", "c2 203.0.113.10 2001:db8:99::10"}},
		{Egress, []string{"p1x1 10.244.1.11 2001:db8:244:1::11"}, []string{"c1 203.0.113.9 2001:db8:99::9", "c2 203.0.113.10 2001:db8:99::10"}},
	} {
		begin := time.Now()
		top := made(t, tt.build, Options{Clients: 2})
		took := time.Since(begin)
		t.Run(top.Name, func(t *testing.T) {
			t.Logf("%d nodes in %v\n%v", len(top.Nodes()), took, top)
			callers := append(slices.Clone(top.Clients), top.Inside...)
			if diff := cmp.Diff(tt.targets, describe(top.Targets)); diff != "" {
				t.Errorf("targets (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tt.callers, describe(callers)); diff != "" {
				t.Errorf("callers (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff([]string{"lb 10.0.1.1 2001:db8:1::1"}, describe([]*Node{top.LB})); diff != "" {
				t.Errorf("balancer (-want +got):\n%s", diff)
			}
			for _, target := range top.Targets {
				target.serve(t, Serve{Ports: []uint16{8080}})
			}
			for _, c := range append(callers, top.Targets...) {
				for _, target := range top.Targets {
					reach(t, c, target)
				}
			}
		})
	}
}

func describe(nodes []*Node) []string {
	var s []string
	for _, n := range nodes {
		s = append(s, fmt.Sprint(n.Name, " ", n.Addr4, " ", n.Addr6))
	}
	return s
}

// reach calls a target in all ways; it has to see the caller's own address.
func reach(t *testing.T, caller, target *Node) {
	t.Helper()
	for _, network := range []string{"tcp", "udp"} {
		for _, way := range [][2]netip.Addr{{caller.Addr4, target.Addr4}, {caller.Addr6, target.Addr6}} {
			// The source is named since a multi-homed node has a choice.
			c := Call{Network: network, SrcAddr: way[0], Dst: netip.AddrPortFrom(way[1], 8080), Timeout: 5 * time.Second}
			got, err := caller.Agent().Call(soon(t), c)
			if err != nil {
				t.Fatal(err)
			}
			want := []Reply{{
				Answer: Answer{Who: target.Name, Peer: way[0], Port: got[0].From.Port(), Local: c.Dst, Got: "who 1"},
				From:   netip.AddrPortFrom(way[0], got[0].From.Port()),
			}}
			if diff := cmp.Diff(want, got, equalNetip); diff != "" {
				t.Errorf("%s %s to %s (-want +got):\n%s", network, caller.Name, target.Name, diff)
			}
		}
	}
}

var equalNetip = cmp.Options{
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
}

func TestOptionsAreBounded(t *testing.T) {
	for _, o := range []Options{{Clients: -1}, {Targets: maxNodes + 1}} {
		if _, err := Routed(o); err == nil {
			t.Errorf("%+v was accepted", o)
		}
	}
}

func TestLinksComputeTheirChecksums(t *testing.T) {
	for _, offload := range []bool{false, true} {
		top := made(t, Routed, Options{Targets: 1, Offload: offload})
		for _, at := range []struct {
			node  *Node
			iface string
		}{{top.LB, "t1"}, {top.LB, "c1"}, {top.Targets[0], "eth0"}} {
			err := at.node.Do(func() error {
				on, err := txChecksum(at.iface)
				if on != offload {
					t.Errorf("%s %s: TX checksum offload is %v, want %v", at.node.Name, at.iface, on, offload)
				}
				return err
			})
			if err != nil {
				t.Error(err)
			}
		}
	}
}

// TestOwn reaches a target by an address that no interface has.
func TestOwn(t *testing.T) {
	top := made(t, Routed, Options{Targets: 1})
	client, target := top.Clients[0], top.Targets[0]
	prefix, one := netip.MustParsePrefix("10.1.0.0/16"), netip.MustParseAddrPort("10.1.2.3:8080")
	if err := errors.Join(target.Own(prefix), top.LB.Route(prefix, target.Addr4, target.Name)); err != nil {
		t.Fatal(err)
	}
	target.serve(t, Serve{Ports: []uint16{8080}})
	got, err := client.Agent().Call(soon(t), Call{Network: "tcp", Dst: one, Timeout: 5 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 1 || got[0].Who != target.Name || got[0].Local != one {
		t.Errorf("%+v", got)
	}
	if err := target.Own(prefix); err == nil || !strings.Contains(err.Error(), "t1: ip route add local 10.1.0.0/16 dev lo: ") {
		t.Errorf("a second time: %v", err)
	}
}

func TestDrawing(t *testing.T) {
	top := made(t, MultiHomed, Options{Targets: 1})
	got := strings.ReplaceAll(top.String(), top.Prefix, "nlb-1-abc-")
	want := `multi-homed: VIPs 198.51.100.10 2001:db8:77::10
lb  (nlb-1-abc-lb)
|-- t1 10.0.1.1/32 2001:db8:1::1/128 ---- eth0 10.0.1.11/32 2001:db8:1::11/128 t1
|   ` + "`" + `-- eth1 10.0.2.11/24 2001:db8:2::11/64 ---- t1 10.0.2.1/24 2001:db8:2::1/64 rt
|       ` + "`" + `-- c1 203.0.113.1/32 2001:db8:99::1/128 ---- eth0 203.0.113.9/32 2001:db8:99::9/128 c1
` + "`" + `-- rt 10.0.0.2/24 2001:db8::2/64 ---- lb 10.0.0.1/24 2001:db8::1/64 (rt)
`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestCommand(t *testing.T) {
	top := made(t, Routed, Options{Targets: 1})
	run := func(name string, args ...string) (string, int) {
		t.Helper()
		out, err := top.LB.Command(soon(t), name, args...).Output()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		if exit != nil {
			return string(out), exit.ExitCode()
		}
		return string(out), 0
	}
	if out, code := run("ls", "/sys/class/net"); out != "c1\nlo\nt1\n" || code != 0 {
		t.Errorf("the node's interfaces are %q (exit code %d)", out, code)
	}
	byHand := exec.CommandContext(soon(t), "ip", "netns", "exec", top.LB.NS, "ls", "/sys/class/net")
	if out, err := byHand.Output(); string(out) != "c1\nlo\nt1\n" {
		t.Errorf("ip netns exec shows %q: %v", out, err)
	}
	if _, code := run("sh", "-c", "exit 3"); code != 3 {
		t.Errorf("exit code %d, want 3", code)
	}
	if err := top.LB.Command(soon(t), "no-such-program").Run(); !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("got %v, want %v", err, exec.ErrNotFound)
	}
	_ = top.Close()
	if out, code := run("true"); code != 127 {
		t.Errorf("in a closed lab: %q, exit code %d, want 127", out, code)
	}
}

func TestCloseLeavesNothing(t *testing.T) {
	top := made(t, OneArm, Options{})
	stop := top.OnSignal()
	defer stop()
	if _, err := top.Node("lb"); err == nil {
		t.Error("a second node lb was made")
	}
	top.Targets[0].serve(t, Serve{Ports: []uint16{8080}})
	// A daemon that Close has to find by itself. It holds the pipe while it lives.
	daemon := top.LB.Command(soon(t), "setsid", "sh", "-c", "echo; exec sleep 600")
	alive, err := daemon.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := alive.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	// And one that may be on its way into the namespace.
	late := top.LB.Command(soon(t), "sleep", "600")
	if err := late.Start(); err != nil {
		t.Fatal(err)
	}
	agent := top.Targets[0].Agent()
	begin := time.Now()
	if err := top.Close(); err != nil {
		t.Fatal(err)
	}
	t.Logf("closed in %v", time.Since(begin))
	if err := alive.(*os.File).SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := alive.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the daemon is alive: %v", err)
	}
	_ = daemon.Wait()
	if err := late.Wait(); err == nil {
		t.Error("a command outlived the lab")
	}
	noneLeft(t, top.Prefix)
	if _, err := agent.Call(soon(t), Call{Network: "tcp"}); !errors.Is(err, ErrAgentEnded) {
		t.Errorf("a call after the end: %v", err)
	}
	if _, err := top.Node("more"); !errors.Is(err, errClosed) {
		t.Errorf("a node after the end: %v", err)
	}
	// Least of all may these reach the host.
	if err := top.LB.Address("lo", netip.MustParsePrefix("198.51.100.10/32")); !errors.Is(err, errClosed) {
		t.Errorf("an address after the end: %v", err)
	}
	if err := top.LB.Sysctl("net.ipv4.ip_forward", "1"); !errors.Is(err, errClosed) {
		t.Errorf("a sysctl after the end: %v", err)
	}
	if err := top.Close(); err != nil {
		t.Errorf("closed again: %v", err)
	}
}

// noneLeft looks for the lab's names the way a human would, and for processes
// that name it.
func noneLeft(t *testing.T, prefix string) {
	t.Helper()
	out, err := exec.CommandContext(soon(t), "ip", "netns", "list").Output()
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(out, []byte(prefix)) {
		t.Errorf("namespaces are left:\n%s", out)
	}
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || bytes.Contains(mounts, []byte(prefix)) {
		t.Errorf("mounts are left (%v):\n%s", err, mounts)
	}
	// A command that was just starting when its namespace went finds that out
	// and ends, a moment later.
	deadline := time.Now().Add(10 * time.Second)
	left := processesOf(t, prefix)
	for ; len(left) > 0 && time.Now().Before(deadline); left = processesOf(t, prefix) {
		<-time.After(10 * time.Millisecond)
	}
	for _, line := range left {
		t.Errorf("a process is left: %q", line)
	}
}

// processesOf lists the command lines that name the lab.
func processesOf(t *testing.T, prefix string) (found []string) {
	t.Helper()
	paths, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		// One that ended since is unreadable, one that was killed has an empty line.
		if line, err := os.ReadFile(path); err == nil && bytes.Contains(line, []byte(prefix)) {
			found = append(found, string(line))
		}
	}
	return found
}

// buildAndWait is the child of the next tests.
func buildAndWait() {
	top, err := Routed(Options{Targets: 1, Keep: os.Getenv(child) == "keep"})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	top.OnSignal()
	if _, err := top.Targets[0].Agent().Serve(context.Background(), Serve{Ports: []uint16{8080}}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	sleep := top.LB.Command(context.Background(), "sleep", "600")
	if err := sleep.Start(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(top.Prefix)
	_ = sleep.Wait()
	select {}
}

// startChild returns a process with a lab, and the lab's prefix; what "keep" has
// it made so that Sweep spares it.
func startChild(t *testing.T, what string) (*exec.Cmd, string) {
	t.Helper()
	cmd := exec.CommandContext(soon(t), "/proc/self/exe")
	cmd.Env = append(os.Environ(), child+"="+what)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return cmd, strings.TrimSpace(line)
}

func TestSweepRemovesTheLabOfADeadProcess(t *testing.T) {
	cmd, prefix := startChild(t, "close")
	// The living are left alone.
	if swept, err := Sweep(); err != nil || len(swept) != 0 {
		t.Errorf("swept %v: %v", swept, err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	// Also a name whose namespace went with a private mount tree.
	plain := fmt.Sprintf("%s/%s%d-abcdef-x", namesDir, namePrefix, cmd.Process.Pid)
	if err := os.WriteFile(plain, nil, 0o444); err != nil {
		t.Fatal(err)
	}
	swept, err := Sweep()
	if err != nil {
		t.Fatal(err)
	}
	want := []string{filepath.Base(plain), prefix + "c1", prefix + "lb", prefix + "t1"}
	slices.Sort(want)
	if diff := cmp.Diff(want, swept); diff != "" {
		t.Errorf("swept (-want +got):\n%s", diff)
	}
	noneLeft(t, prefix)
}

func TestSweepSparesAKeptLab(t *testing.T) {
	cmd, prefix := startChild(t, "keep")
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if swept, err := Sweep(); err != nil || len(swept) != 0 {
		t.Errorf("swept %v: %v", swept, err)
	}
	swept, err := SweepKept()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{prefix + "c1", prefix + "lb", prefix + "t1"}, swept); diff != "" {
		t.Errorf("swept (-want +got):\n%s", diff)
	}
	noneLeft(t, prefix)
}

func TestSignalClosesTheLab(t *testing.T) {
	cmd, prefix := startChild(t, "close")
	if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if got := cmd.ProcessState.String(); got != "signal: terminated" {
		t.Errorf("it ended with %q", got)
	}
	noneLeft(t, prefix)
}

func TestOwnerOf(t *testing.T) {
	for name, want := range map[string]int{
		"nlb-812-a6f1c0-lb": 812, "nlb-812-lb": 0, "nlb-x-a6f1c0-lb": 0, "nlb--1-a-lb": 0, "other-812-a-lb": 0, "nlb-0-a-lb": 0, "": 0,
	} {
		if pid, ok := ownerOf(name, namePrefix); ok != (want != 0) || ok && pid != want {
			t.Errorf("ownerOf(%q) = %d, %v", name, pid, ok)
		}
	}
}
