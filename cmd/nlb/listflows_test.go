package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.uber.org/zap/zaptest"

	"nlb/balancer"
	"nlb/balancer/conntrack"
	"nlb/balancer/control"
	"nlb/balancer/events"
	"nlb/proxyproto/worker"
)

// A listing is a daemon that has nothing but flows.
type listing struct {
	control.Daemon
	flows []control.Flow
}

func (l listing) Flows(_ context.Context, show func(*control.Flow) error) error {
	for _, f := range l.flows {
		if err := show(&f); err != nil {
			return err
		}
	}
	return nil
}

func (l listing) Events() *events.Ring { return nil }

func (l listing) Health() http.Handler { return http.NotFoundHandler() }

// lister is a client of a daemon with those flows.
func lister(t *testing.T, flows []control.Flow) *control.Client {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	socket, err := control.Listen(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- control.Serve(ctx, socket, listing{flows: flows}, zaptest.NewLogger(t)) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return control.NewClient(path)
}

func TestListFlows(t *testing.T) {
	flow := func(client string, bytes *uint64, hairpin bool) control.Flow {
		left := 431999.0
		return control.Flow{
			Protocol: "TCP", Client: netip.MustParseAddrPort(client), VIP: netip.MustParseAddrPort("198.51.100.10:80"), Listener: "web",
			TargetGroup: "web", Target: netip.MustParseAddrPort("10.0.1.11:8080"), ClientIP: "hairpin_snat", Hairpin: hairpin,
			TargetSees: netip.MustParseAddrPort(client), State: "established", Dataplane: "nftables", IdleLeftSeconds: &left, Bytes: bytes,
		}
	}
	n := func(n uint64) *uint64 { return &n }
	client := lister(t, []control.Flow{
		flow("203.0.113.9:3", n(5), false), flow("203.0.113.9:1", nil, true), flow("203.0.113.9:2", n(7), false), flow("203.0.113.9:4", n(6), false),
	})
	const head = "PROTOCOL  CLIENT                 VIP                   TARGET GROUP  TARGET             CLIENT_IP          HAIRPIN  TARGET SEES            STATE        AGE           BYTES\n"
	one := "TCP       203.0.113.9:1          198.51.100.10:80      web           10.0.1.11:8080     hairpin_snat       yes      203.0.113.9:1          established  431999s left  -\n"
	two := "TCP       203.0.113.9:2          198.51.100.10:80      web           10.0.1.11:8080     hairpin_snat       no       203.0.113.9:2          established  431999s left  7\n"
	three := "TCP       203.0.113.9:3          198.51.100.10:80      web           10.0.1.11:8080     hairpin_snat       no       203.0.113.9:3          established  431999s left  5\n"
	four := "TCP       203.0.113.9:4          198.51.100.10:80      web           10.0.1.11:8080     hairpin_snat       no       203.0.113.9:4          established  431999s left  6\n"
	for _, c := range []struct {
		name   string
		filter control.FlowFilter
		list   flowList
		want   string
	}{
		{"as they come", control.FlowFilter{}, flowList{out: table}, head + three + one + two + four},
		{"by client", control.FlowFilter{}, flowList{out: table, order: "client"}, head + one + two + three + four},
		{"the most bytes", control.FlowFilter{}, flowList{out: table, order: "bytes", limit: 2}, head + two + four},
		{"one", control.FlowFilter{}, flowList{out: table, order: "bytes", limit: 1}, head + two},
		{"the first two", control.FlowFilter{}, flowList{out: table, limit: 2}, head + three + one},
		{"nobody's", control.FlowFilter{Group: "other"}, flowList{out: table}, "no flows\n"},
		{"nobody's, as JSON", control.FlowFilter{Group: "other"}, flowList{out: jsonText}, "[]\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var b bytes.Buffer
			if err := listFlows(t.Context(), &b, client, c.filter, c.list); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, b.String()); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
	var b bytes.Buffer
	if err := listFlows(t.Context(), &b, client, control.FlowFilter{}, flowList{out: jsonText}); err != nil {
		t.Fatal(err)
	}
	var list []control.Flow
	if err := json.Unmarshal(b.Bytes(), &list); err != nil || len(list) != 4 {
		t.Errorf("%v: %s", err, &b)
	}
}

// A flow is named by its mark, or by its addresses if nobody knows the mark any more.
func TestNameFlows(t *testing.T) {
	at := netip.MustParseAddrPort
	key := balancer.TargetKey{Group: "web", AddrPort: at("10.0.1.11:8080")}
	names := newFlowNamer(&balancer.Table{
		Services: []balancer.VirtualService{{Name: "l", Address: netip.MustParseAddr("198.51.100.10"), Port: 80, Protocols: []uint8{balancer.ProtoTCP}}},
		Pools: []balancer.Pool{{Name: "web", ClientIP: balancer.Preserve, Destinations: []balancer.Destination{
			{Address: key.AddrPort.Addr(), Port: 8080, ClientIP: balancer.SNAT},
		}}},
	})
	const snatHairpin, dnatSeen = 3<<30 | 1<<14, 1<<5 | 1<<1
	tracked := conntrack.Flow{
		Protocol: conntrack.TCP, Mark: snatHairpin, Timeout: 5 * time.Second, Status: dnatSeen, TCPState: conntrack.Established, Accounted: true,
		Original: conntrack.Direction{Src: at("10.0.1.11:4000"), Dst: at("198.51.100.10:80"), Bytes: 1, Packets: 2},
		Reply:    conntrack.Direction{Src: at("10.0.1.11:8080"), Dst: at("10.0.0.2:4000"), Bytes: 10, Packets: 20},
	}
	five, bytes, packets := 5.0, uint64(11), uint64(22)
	want := control.Flow{
		Protocol: "TCP", Client: at("10.0.1.11:4000"), VIP: at("198.51.100.10:80"), Listener: "l", TargetGroup: "web", Target: key.AddrPort,
		ClientIP: "snat", Hairpin: true, TargetSees: at("10.0.0.2:4000"), State: "established", Dataplane: "nftables",
		IdleLeftSeconds: &five, Bytes: &bytes, Packets: &packets,
	}
	same := cmpopts.EquateComparable(netip.AddrPort{})
	if diff := cmp.Diff(&want, names.tracked(&tracked, key), same); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	// UDP, of IPVS, uncounted, to a target that is gone.
	tracked.Protocol, tracked.TCPState, tracked.Accounted, tracked.Status, tracked.Mark = conntrack.UDP, 0, false, 0, 1<<14
	want = control.Flow{
		Protocol: "UDP", Client: want.Client, VIP: want.VIP, Target: key.AddrPort, TargetSees: want.TargetSees,
		State: "unreplied", Dataplane: "ipvs", IdleLeftSeconds: &five,
	}
	if diff := cmp.Diff(&want, names.tracked(&tracked, balancer.TargetKey{AddrPort: key.AddrPort}), same); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	now := time.Date(2026, 1, 2, 15, 4, 5, 0, time.UTC)
	want = control.Flow{
		Protocol: "TCP", Client: at("203.0.113.9:1"), VIP: at("198.51.100.10:80"), Listener: "l", TargetGroup: "web", Target: key.AddrPort,
		ClientIP: "proxy_protocol_v2", State: "dialing", Dataplane: "relay", AgeSeconds: &five, Bytes: &bytes,
	}
	relayed := worker.Flow{Client: want.Client, VIP: want.VIP, Target: key.AddrPort, To: key, Since: now.Add(-5 * time.Second), Bytes: 11}
	if diff := cmp.Diff(&want, names.relayed(&relayed, now), same); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
