package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"go.uber.org/zap/zaptest"

	"nlb/balancer"
	"nlb/balancer/events"
	"nlb/balancer/explain"
	"nlb/balancer/ready"
)

// As this user the test binary asks a socket instead of running tests; see
// TestOthersMayLookButNotChange.
const askAs = "NLB_TEST_ASK_SOCKET"

func TestMain(m *testing.M) {
	if socket := os.Getenv(askAs); socket != "" {
		os.Exit(ask(socket))
	}
	goleak.VerifyTestMain(m)
}

// ask prints what a status and a reload come to.
func ask(socket string) int {
	c := NewClient(socket)
	_, err := c.Status(context.Background())
	fmt.Println("status:", err)
	fmt.Println("reload:", c.Reload(context.Background()))
	return 0
}

type fakeDaemon struct {
	status  *Status
	refuse  error
	flows   []Flow
	reloads atomic.Int32
	changes []string // read when the requests are over
}

func (d *fakeDaemon) Status(context.Context) (*Status, error) {
	if d.status == nil {
		return nil, errors.New("no pass was made yet")
	}
	return d.status, nil
}

func (d *fakeDaemon) Explain(_ context.Context, q explain.Question) (*explain.Answer, error) {
	d.changes = append(d.changes, fmt.Sprintf("explain %d %v %v", q.Protocol, q.Client, q.Destination))
	if d.refuse != nil {
		return nil, d.refuse
	}
	return &explain.Answer{Outcome: explain.Outcome{Verdict: explain.Drop, Reason: explain.ReasonHairpin}}, nil
}

func (d *fakeDaemon) Flows(_ context.Context, show func(*Flow) error) error {
	for i := range d.flows {
		if err := show(&d.flows[i]); err != nil {
			return err
		}
	}
	return d.refuse
}

func (d *fakeDaemon) Drain(_ context.Context, t TargetName) error   { return d.asked("drain", t) }
func (d *fakeDaemon) Undrain(_ context.Context, t TargetName) error { return d.asked("undrain", t) }

func (d *fakeDaemon) asked(what string, t TargetName) error {
	d.changes = append(d.changes, fmt.Sprintf("%s %s %s %d", what, t.Group, t.Address, t.Port))
	return d.refuse
}

func (d *fakeDaemon) Events() *events.Ring { return events.NewRing(1, time.Now()) }

func (d *fakeDaemon) Health() http.Handler {
	return ready.Handler(ready.Checks{{Name: "loop", Fault: func() error { return d.refuse }}}, nil)
}

func (d *fakeDaemon) Reload(context.Context) error {
	d.reloads.Add(1)
	return d.refuse
}

// serve answers for d on a socket of its own until the test or stop ends it.
func serve(t *testing.T, d Daemon) (path string, stop func()) {
	t.Helper()
	path = filepath.Join(socketDir(t), "made", "nlb.sock")
	s, err := Listen(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- Serve(ctx, s, d, zaptest.NewLogger(t)) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	}
	t.Cleanup(stop)
	return path, stop
}

// socketDir is short, because a socket's path has 107 bytes at most, and open
// to other users.
func socketDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "nlb-control-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestAskAndAnswer(t *testing.T) {
	d := &fakeDaemon{status: webStatus()}
	path, stop := serve(t, d)
	c := NewClient(path)
	got, err := c.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want, _ := json.Marshal(d.status)
	if text, _ := json.Marshal(got); string(text) != string(want) {
		t.Errorf("status %s, want %s", text, want)
	}
	if err := c.Reload(t.Context()); err != nil || d.reloads.Load() != 1 {
		t.Errorf("reload: %v, %d times", err, d.reloads.Load())
	}
	d.refuse = errors.New("nlb.yaml:3:5: listeners[0].port: 70000 is not a port (1-65535)")
	if err := c.Reload(t.Context()); err == nil || err.Error() != d.refuse.Error() {
		t.Errorf("reload: %v", err)
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != Mode {
		t.Errorf("mode %v", info.Mode())
	}
	for _, p := range []string{ready.LivePath, ready.ReadyPath} {
		resp, err := c.send(t.Context(), http.MethodGet, p, nil)
		if err == nil || err.Error() != "503 Service Unavailable" {
			t.Errorf("%s of one that fails: %v, %v", p, resp, err)
		}
	}
	stop()
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left behind: %v", err)
	}
	if _, err := c.Status(t.Context()); !errors.Is(err, ErrNotRunning) {
		t.Errorf("status of nobody: %v", err)
	}
}

func TestDaemonErrorsComeAcross(t *testing.T) {
	path, _ := serve(t, &fakeDaemon{})
	if _, err := NewClient(path).Status(t.Context()); err == nil || err.Error() != "no pass was made yet" {
		t.Errorf("error %v", err)
	}
}

func TestOthersMayLookButNotChange(t *testing.T) {
	d := &fakeDaemon{status: webStatus()}
	path, _ := serve(t, d)
	if err := os.Chmod(path, 0o666); err != nil { // an operator lets everybody in
		t.Fatal(err)
	}
	self, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(filepath.Dir(path), "ask")
	if err := os.WriteFile(binary, self, 0o755); err != nil {
		t.Fatal(err)
	}
	const nobody = 65534
	cmd := exec.CommandContext(t.Context(), binary)
	cmd.Dir = filepath.Dir(path)
	cmd.Env = []string{askAs + "=" + path}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	want := fmt.Sprintf("status: <nil>\nreload: user %d may look but not change; ask as root or as user %d\n", nobody, os.Geteuid())
	if diff := cmp.Diff(want, string(out)); diff != "" {
		t.Error(diff)
	}
	if d.reloads.Load() != 0 {
		t.Error("it was reloaded")
	}
}

func TestOneDaemonPerSocket(t *testing.T) {
	path, stop := serve(t, &fakeDaemon{})
	_, err := Listen(t.Context(), path)
	if !errors.Is(err, ErrHeld) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), fmt.Sprintf("pid %d", os.Getpid())) {
		t.Errorf("error %v", err)
	}
	stop()
	s, err := Listen(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestStaleSocketIsReplaced(t *testing.T) {
	path := filepath.Join(socketDir(t), "nlb.sock")
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false) // as a crash
	if err := dead.Close(); err != nil {
		t.Fatal(err)
	}
	s, err := Listen(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestWhatIsNotOursStays(t *testing.T) {
	dir := socketDir(t)
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	alien := filepath.Join(dir, "alien")
	l, err := net.Listen("unix", alien)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	for path, want := range map[string]string{file: "is not a socket", alien: "another program listens there"} {
		if _, err := Listen(t.Context(), path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", path, err)
		}
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
		// The lock did not stay behind.
		lock, err := Acquire(SocketLock(path))
		if err != nil {
			t.Error(err)
			continue
		}
		if err := lock.Release(); err != nil {
			t.Error(err)
		}
	}
}

func TestStatusText(t *testing.T) {
	want, err := os.ReadFile("testdata/status.json")
	if err != nil {
		t.Fatal(err)
	}
	got, err := json.MarshalIndent(webStatus(), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)+"\n"); diff != "" {
		t.Error(diff)
	}
}

func TestStatusWithoutCounters(t *testing.T) {
	s := webSnapshot()
	status := NewStatus(s, Counts{}, errors.New("conntrack accounting is off"))
	target := status.TargetGroups[0].Targets[0]
	if target.ActiveFlows != nil || target.NewFlowsTotal != nil || target.BytesTotal != nil {
		t.Error("what nobody counted is not null")
	}
	if status.Apply.CountersError != "conntrack accounting is off" {
		t.Errorf("error %q", status.Apply.CountersError)
	}
}

func TestDrainAndUndrain(t *testing.T) {
	d := &fakeDaemon{}
	path, _ := serve(t, d)
	c := NewClient(path)
	one := TargetName{Group: "web", Address: netip.MustParseAddr("10.0.1.11"), Port: 8080}
	six := TargetName{Group: "web", Address: netip.MustParseAddr("2001:db8::11")}
	if err := errors.Join(c.Drain(t.Context(), one), c.Undrain(t.Context(), six)); err != nil {
		t.Fatal(err)
	}
	d.refuse = errors.New("target group web has no target 10.0.1.11:8080")
	if err := c.Drain(t.Context(), one); err == nil || err.Error() != d.refuse.Error() {
		t.Errorf("error %v", err)
	}
	want := []string{"drain web 10.0.1.11 8080", "undrain web 2001:db8::11 0", "drain web 10.0.1.11 8080"}
	if diff := cmp.Diff(want, d.changes); diff != "" {
		t.Error(diff)
	}
}

func TestSeen(t *testing.T) {
	seen, spec := webStatus().Seen()
	key := func(addr string) balancer.TargetKey {
		return balancer.TargetKey{Group: "web", AddrPort: mustAddrPort(addr)}
	}
	wantHealth := balancer.HealthView{
		key("10.0.1.11:8080"): {State: balancer.Healthy, Since: since},
		key("10.0.1.12:8080"): {State: balancer.Unhealthy, Reason: balancer.ReasonTimeout,
			Description: "no answer within 10s", Since: since},
	}
	if diff := cmp.Diff(wantHealth, seen.Health, cmp.Comparer(func(a, b balancer.TargetKey) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
	if g := spec.Group("web"); g == nil || len(g.Targets) != 3 || !spec.GroupsInUse()["web"] || g.DeregistrationDelay.Timeout != time.Minute {
		t.Errorf("group in force %+v", g)
	}
}

// The flows of a target that failed are ended for longer than since its failure,
// where the daemon began late: who reads the status knows how long.
func TestSeenEndsFlowsForAsLong(t *testing.T) {
	snapshot := webSnapshot()
	snapshot.Spec.TargetGroups[0].Unhealthy.ConnectionTermination = true
	failed, until := &snapshot.Groups[0].Targets[1], since.Add(time.Hour)
	failed.Terminate, failed.TerminateUntil = true, until
	for at, want := range map[time.Time]bool{until.Add(-1): true, until: false} {
		seen, _ := NewStatus(snapshot, Counts{}, nil).Seen()
		seen.Now = at
		pool := balancer.Forward(snapshot.Spec, seen).Table.Pools[0]
		if got := pool.Destinations[1].Terminate; got != want {
			t.Errorf("flows are ended at %v: %v, want %v", at, got, want)
		}
	}
}

var since = time.Date(2026, 1, 2, 15, 4, 5, 0, time.UTC)

func webStatus() *Status {
	return NewStatus(webSnapshot(), Counts{
		Targets: map[balancer.TargetKey]balancer.Counters{
			{Group: "web", AddrPort: mustAddrPort("10.0.1.11:8080")}: {ActiveFlows: 3, NewFlows: 40, Bytes: 5000},
		},
		Totals: map[string]uint64{"hairpins": 7},
	}, nil)
}

// What a plan needs to know of numbers comes across.
func TestNumbersComeAcross(t *testing.T) {
	status := webStatus()
	if got := status.Numbers(); len(got) != 0 {
		t.Errorf("nobody has one: %v", got)
	}
	want := map[balancer.TargetKey]uint16{
		{Group: "web", AddrPort: mustAddrPort("10.0.1.11:8080")}: 3,
		{Group: "web", AddrPort: mustAddrPort("10.0.1.13:8080")}: 65,
	}
	status.SetNumbers(want)
	path, _ := serve(t, &fakeDaemon{status: status})
	got, err := NewClient(path).Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got.Numbers()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
