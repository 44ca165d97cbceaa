package main

import (
	"context"
	"net"
	"net/netip"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"

	"nlb/balancer"
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

// expect reads states until one matches.
func (n notified) expect(t *testing.T, pattern string) {
	t.Helper()
	re := regexp.MustCompile(pattern)
	if err := n.conn.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	var said []string
	for {
		var b [1024]byte
		k, err := n.conn.Read(b[:])
		if err != nil {
			t.Fatalf("nothing like %s, but %q: %v", pattern, said, err)
		}
		if said = append(said, string(b[:k])); re.Match(b[:k]) {
			return
		}
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
	go func() { done <- supervise(ctx, r, log) }()
	systemd.expect(t, `^READY=1\nSTATUS=forwarding$`)
	systemd.expect(t, `^WATCHDOG=1$`)
	tellReloading(log)
	systemd.expect(t, `^RELOADING=1\nMONOTONIC_USEC=\d{4,}$`)
	cancel()
	systemd.expect(t, `^STOPPING=1$`)
	for range 2 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}
