package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"regexp"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"

	"nlb/balancer"
	"nlb/balancer/ready"
	"nlb/internal/wait"
)

// notified is a stand-in for systemd's end of sd_notify(3).
type notified struct{ conn *net.UnixConn }

func listenAsSystemd(t *testing.T) notified {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	return notified{conn}
}

// expect reads states until one matches, and returns those before it.
func (n notified) expect(t *testing.T, pattern string) (before []string) {
	t.Helper()
	re := regexp.MustCompile(pattern)
	if err := n.conn.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	for {
		var b [1024]byte
		k, err := n.conn.Read(b[:])
		if err != nil {
			t.Fatalf("nothing like %s, but %q: %v", pattern, before, err)
		}
		if re.Match(b[:k]) {
			return before
		}
		before = append(before, string(b[:k]))
	}
}

type noRoutes struct{}

func (noRoutes) Links(context.Context) ([]string, error) { return nil, nil }

func (noRoutes) Routes(context.Context, []netip.Addr, func(netip.Addr) bool) (map[netip.Addr]balancer.Route, error) {
	return nil, nil
}

func TestSystemdIsTold(t *testing.T) {
	systemd := listenAsSystemd(t)
	t.Setenv("WATCHDOG_USEC", "200000")
	log := zaptest.NewLogger(t)
	r := balancer.NewReconciler(balancer.Options{Router: noRoutes{}, Log: log, Spec: &balancer.Spec{}})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 2)
	go func() { done <- r.Run(ctx) }()
	alive := ready.Checks{ready.Loop(r.Turned, ready.AliveWithin)}
	go func() { done <- supervise(ctx, r, alive.Err, log) }()
	systemd.expect(t, `^READY=1\nSTATUS=forwarding$`)
	systemd.expect(t, `^WATCHDOG=1$`)
	tellReloading(log)
	systemd.expect(t, `^RELOADING=1\nMONOTONIC_USEC=\d{4,}$`)
	tellReloaded(log, r)
	systemd.expect(t, `^READY=1$`)
	cancel()
	systemd.expect(t, `^STOPPING=1$`)
	for range 2 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// A daemon that is not ready yet is not for having been told to reload.
func TestReloadDoesNotMakeReady(t *testing.T) {
	systemd := listenAsSystemd(t)
	log := zaptest.NewLogger(t)
	tellReloaded(log, balancer.NewReconciler(balancer.Options{Router: noRoutes{}, Log: log}))
	tell(log, "STATUS=end")
	if said := systemd.expect(t, "^STATUS=end$"); said != nil {
		t.Errorf("said %q", said)
	}
}

// A stuckPart hangs in Plan while it is locked.
type stuckPart struct{ sync.Mutex }

type nothing struct{}

func (nothing) Empty() bool     { return true }
func (nothing) Lines() []string { return nil }

func (*stuckPart) Name() string { return "stuck" }

func (p *stuckPart) Plan(context.Context, *balancer.Desired) (balancer.Plan, error) {
	p.Lock()
	defer p.Unlock()
	return nothing{}, nil
}

func (*stuckPart) Apply(context.Context, balancer.Plan) error { return nil }

// The watchdog is fed while the loop turns, and not while it hangs.
func TestWatchdogStarvesWhenTheLoopHangs(t *testing.T) {
	// A resync is far shorter than what counts as a hang, on a busy host, too.
	const resync, within = 5 * time.Millisecond, 500 * time.Millisecond
	systemd := listenAsSystemd(t)
	log := zaptest.NewLogger(t)
	var part stuckPart
	r := balancer.NewReconciler(balancer.Options{
		Router: noRoutes{}, Log: log, Spec: &balancer.Spec{}, Parts: []balancer.Part{&part}, Resync: resync,
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- r.Run(ctx) }()
	<-r.Converged()
	alive := ready.Checks{ready.Loop(r.Turned, within)}
	w := watchdog{alive: alive.Err, fed: true, log: log}
	lookUntil := func(isAlive bool) {
		t.Helper()
		wait.Until(t, patience, fmt.Sprintf("alive %v", isAlive), func() bool { return (alive.Err() == nil) == isAlive })
		w.look()
	}
	lookUntil(true)
	systemd.expect(t, `^WATCHDOG=1$`)
	part.Lock()
	lookUntil(false)
	systemd.expect(t, `^STATUS=hangs: loop: the reconciler's loop has not turned for \d+s$`)
	for range 3 {
		w.look()
	}
	part.Unlock()
	lookUntil(true)
	if fed := systemd.expect(t, `^STATUS=forwarding$`); fed != nil {
		t.Errorf("systemd was told %q while the loop hung", fed)
	}
	systemd.expect(t, `^WATCHDOG=1$`)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
