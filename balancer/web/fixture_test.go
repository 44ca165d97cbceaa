package web

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"nlb/balancer"
	"nlb/balancer/control"
	"nlb/internal/nstest"
)

// The browser of these tests has a network of its own, which leads nowhere.
func TestMain(m *testing.M) { os.Exit(nstest.Main(m)) }

// A script is a Source that says what it is told to.
type script struct {
	mu    sync.Mutex
	asked int
	err   error
	make  func(now time.Time) *control.Status // a new one each time
}

func (s *script) Status(context.Context) (*control.Status, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked++
	if s.err != nil {
		return nil, s.err
	}
	return s.make(time.Now()), nil
}

// change has the script say something else from now on.
func (s *script) change(f func(*script)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(s)
}

func (s *script) times() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.asked
}

var errNothing = errors.New("the daemon has not finished its first pass")

func count(n uint64) *uint64 { return &n }

// targetAt is a healthy target that was counted n flows of 1,000 bytes.
func targetAt(address string, n uint64) control.Target {
	return control.Target{
		Address: netip.MustParseAddr(address), Port: 8080, Weight: 1, EffectiveWeight: 1,
		State: balancer.Healthy, Since: epoch,
		ActiveFlows: count(n / 10), NewFlowsTotal: count(n), BytesTotal: count(1000 * n),
	}
}

// epoch is when synctest's time begins.
var epoch = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

func groupOf(name string, targets ...control.Target) control.TargetGroup {
	return control.TargetGroup{Name: name, Protocol: balancer.TCP, ClientIP: balancer.HairpinSNAT, Targets: targets}
}

func listenerOf(name string, port uint16, groups ...string) control.Listener {
	l := control.Listener{Name: name, VIP: netip.MustParseAddr("198.51.100.10"), Port: port, Protocol: balancer.TCP}
	for _, g := range groups {
		l.Forward = append(l.Forward, control.Forward{TargetGroup: g, Weight: 1})
	}
	return l
}

func statusOf(listeners []control.Listener, groups ...control.TargetGroup) *control.Status {
	return &control.Status{
		Dataplane: "nftables", Apply: control.Apply{Generation: 1, Held: true, ConvergedAt: epoch}, Reload: control.Reload{Success: true},
		Listeners: listeners, TargetGroups: groups, Totals: map[string]uint64{},
	}
}

// crowd is a status of groups with as many targets each, all of which count.
func crowd(groups, targets int, flows uint64) *control.Status {
	status := statusOf(nil)
	for g := range groups {
		name := fmt.Sprintf("group-%03d", g)
		group := groupOf(name)
		for i := range targets {
			group.Targets = append(group.Targets, targetAt(fmt.Sprintf("10.%d.%d.%d", g, i/250, 1+i%250), flows))
		}
		status.TargetGroups = append(status.TargetGroups, group)
		status.Listeners = append(status.Listeners, listenerOf("l-"+name, uint16(1000+g), name))
	}
	return status
}
