package rulesets

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nlb/bench/lab"
)

func TestMain(m *testing.M) {
	lab.MaybeRunAgent()
	os.Exit(m.Run())
}

var (
	vip     = netip.MustParseAddrPort("198.51.100.10:80")
	cluster = Cluster{
		Pods:     netip.MustParsePrefix("203.0.113.0/24"),
		Services: netip.MustParsePrefix("198.51.100.0/24"),
		Node:     netip.MustParseAddr("10.0.1.1"),
	}
)

// to are n targets in 10.0.0.0/8.
func to(n int) Targets {
	t := Targets{Port: 8080}
	for i := range n {
		t.Addresses = append(t.Addresses, netip.AddrFrom4([4]byte{10, 0, byte(1 + i/250), byte(11 + i%250)}))
	}
	return t
}

// both are TCP and UDP of so many ports.
func both(ports int) []Service { return Services(vip, ports, TCP, UDP) }

// kinds are the rulesets, by the name of their golden files.
var kinds = map[string]func([]Service, Targets) string{
	"minimal-dnat": MinimalDNAT,
	"minimal-snat": MinimalSNAT,
	"kube-proxy":   func(s []Service, t Targets) string { return KubeProxy(s, t, cluster) },
}

// TestGolden is the rulesets for two services, each of a port of its own.
func TestGolden(t *testing.T) {
	services := append(Services(vip, 1, TCP), Services(netip.MustParseAddrPort("198.51.100.20:53"), 1, UDP)...)
	for name, render := range kinds {
		t.Run(name, func(t *testing.T) {
			want, err := os.ReadFile(filepath.Join("testdata", name+".nft"))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), render(services, to(2))); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestServices(t *testing.T) {
	want := []Service{
		{TCP, vip}, {UDP, vip},
		{TCP, netip.MustParseAddrPort("198.51.100.10:81")}, {UDP, netip.MustParseAddrPort("198.51.100.10:81")},
	}
	if diff := cmp.Diff(want, both(2), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
}

// TestOneRuleHasManyPorts: a rule for each port would not be the smallest.
func TestOneRuleHasManyPorts(t *testing.T) {
	got := MinimalDNAT(both(3), to(1))
	for _, want := range []string{"tcp dport { 80, 81, 82 } dnat", "udp dport { 80, 81, 82 } dnat"} {
		if strings.Count(got, want) != 1 {
			t.Errorf("%q is not there once:\n%s", want, got)
		}
	}
	if n := strings.Count(got, "dnat to"); n != 2 {
		t.Errorf("%d rules", n)
	}
}

// TestLoads: the kernel takes them all, few or many, and has the chains.
func TestLoads(t *testing.T) {
	for name, render := range kinds {
		for _, size := range []struct{ ports, targets int }{{1, 1}, {50, 3}, {1, 100}} {
			t.Run(fmt.Sprintf("%s/%d-%d", name, size.ports, size.targets), func(t *testing.T) {
				listed := load(t, render(both(size.ports), to(size.targets)))
				if want := size.targets * 2 * size.ports; name == "kube-proxy" && strings.Count(listed, "chain endpoint-") != want {
					t.Errorf("%d chains of endpoints, not %d", strings.Count(listed, "chain endpoint-"), want)
				}
				if !strings.Contains(listed, "hook prerouting") || !strings.Contains(listed, to(size.targets).Addresses[size.targets-1].String()) {
					t.Error(listed)
				}
			})
		}
	}
}

// load gives a ruleset to the kernel and returns what it has then.
func load(t *testing.T, ruleset string) string {
	t.Helper()
	l, err := lab.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	n, err := l.Node("lb")
	if err != nil {
		t.Fatal(err)
	}
	cmd := n.Command(t.Context(), "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(ruleset)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	out, err := n.Command(t.Context(), "nft", "list", "ruleset").Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// TestForwards: a client gets to the targets through each of them, and targets
// see whom they should.
func TestForwards(t *testing.T) {
	for name, render := range kinds {
		t.Run(name, func(t *testing.T) {
			top, err := lab.Routed(lab.Options{Targets: 2})
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := top.Close(); err != nil {
					t.Error(err)
				}
			}()
			targets := Targets{Port: 8080}
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			for _, n := range top.Targets {
				targets.Addresses = append(targets.Addresses, n.Addr4)
				if _, err := n.Agent().Serve(ctx, lab.Serve{Ports: []uint16{8080}}); err != nil {
					t.Fatal(err)
				}
			}
			cmd := top.LB.Command(ctx, "nft", "-f", "-")
			cmd.Stdin = strings.NewReader(render(both(2), targets))
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			want := top.Clients[0].Addr4
			if name == "minimal-snat" {
				want = top.LB.Addr4
			}
			for _, network := range []string{"tcp", "udp"} {
				checkSeen(ctx, t, top, network, want)
			}
		})
	}
}

// checkSeen calls a service that is not the first, so that the target's port is
// another than the service's.
func checkSeen(ctx context.Context, t *testing.T, top *lab.Topology, network string, want netip.Addr) {
	t.Helper()
	replies, err := top.Clients[0].Agent().Call(ctx, lab.Call{Network: network, Dst: netip.AddrPortFrom(lab.VIP4, 81), N: 50})
	if err != nil {
		t.Fatal(err)
	}
	tally := lab.Count(replies)
	if tally.OK != 50 || len(tally.ByWho) != 2 {
		t.Errorf("%s: %+v", network, tally)
	}
	if diff := cmp.Diff(map[string]int{want.String(): 50}, tally.ByPeer); diff != "" {
		t.Errorf("%s: %s", network, diff)
	}
}
