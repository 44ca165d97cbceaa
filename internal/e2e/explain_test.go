package e2e

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nlb/balancer/control"
	"nlb/balancer/explain"
	"nlb/bench/lab"
)

// What nlb explain foretells of a flow is what its target tells, and what nlb flows
// lists of it, in each mode and family, for clients outside, for
// hairpins, and for clients on the balancer itself, who call from the VIP.
func TestExplainAndFlows(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Targets: 3})
	const bare, headed = 8080, 8090
	serveTargets(t, top, bare)
	serveHeaders(t, top.Targets, headed)
	modes := []string{"preserve", "hairpin_snat", "snat", "proxy_protocol_v2"}
	c := config{Sources: sources(top), VIPs: both()}
	for i, mode := range modes {
		port := uint16(bare)
		if mode == "proxy_protocol_v2" {
			port = headed
		}
		name := fmt.Sprint("g", i)
		c.Listeners = append(c.Listeners, listen(name, "TCP", uint16(81+i), name)...)
		c.Groups = append(c.Groups, pool(name, "TCP", mode, port, targets(top.Targets...)))
	}
	d := serving(t, top, c)

	const flows = 6
	nodes := make(map[netip.Addr]string)
	for _, n := range top.Targets {
		nodes[n.Addr4], nodes[n.Addr6] = n.Name, n.Name
	}
	for i, mode := range modes {
		for _, f := range families {
			for _, from := range []*lab.Node{top.Clients[0], top.Targets[0], top.LB} {
				if from == top.Targets[0] && mode == "preserve" {
					continue // a third of these is dropped
				}
				vip := f.at(uint16(81 + i))
				t.Run(fmt.Sprint(mode, "/", from.Name, "/", vip), func(t *testing.T) {
					opened := held(t, from, lab.Call{Network: "tcp", Dst: vip, N: flows}).Opened
					listed := d.flows("--listener", fmt.Sprint("g", i, f.name))
					if len(listed) < flows {
						t.Errorf("%d flows are listed, and %d are there", len(listed), flows)
					}
					for _, r := range opened {
						a, client := d.explain(r.From, vip), r.From
						if mode == "proxy_protocol_v2" {
							// From a VIP of this host, the relay is called by a source.
							client = r.Client
							if a.HeaderClient != client.String() {
								t.Errorf("%v is foretold to be named %s, and was %v", r.From, a.HeaderClient, client)
							}
						}
						got := listed[client]
						told := fate{r.Who, r.Peer, mode, from.Name == r.Who && mode != "proxy_protocol_v2"}
						if a.Target == nil {
							t.Fatalf("%v is foretold %+v", r.From, a)
						}
						sees, _ := netip.ParseAddr(a.TargetSees)
						foretold := fate{nodes[a.Target.Address], sees, a.ClientIP, a.Hairpin}
						if diff := cmp.Diff(told, foretold, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
							t.Errorf("%v (-told by the target +foretold):\n%s", r.From, diff)
						}
						shown := fate{nodes[got.Target.Addr()], got.TargetSees.Addr(), got.ClientIP, got.Hairpin}
						if diff := cmp.Diff(told, shown, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
							t.Errorf("%v (-told by the target +listed):\n%s", r.From, diff)
						}
						if got.TargetSees.Port() != r.Port || got.VIP != vip || got.TargetGroup != fmt.Sprint("g", i) {
							t.Errorf("%v is listed as %+v, and its target saw port %d", r.From, got, r.Port)
						}
					}
				})
			}
		}
	}
}

// A firewall of somebody else on the balancer, which drops what is for one target,
// drops those flows of which that was foretold.
func TestExplainFirewall(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Targets: 2})
	serveTargets(t, top, 8080)
	d := serving(t, top, config{
		Sources: sources(top), VIPs: both(), Listeners: listen("web", "TCP", 80, "web"),
		Groups: []group{pool("web", "TCP", "preserve", 8080, targets(top.Targets...))},
	})
	must(t, top.LB, "nft", "add table inet fw; add chain inet fw c { type filter hook forward priority 0; }; "+
		"add rule inet fw c ct state established,related accept; add rule inet fw c ip daddr "+top.Targets[0].Addr4.String()+" drop")
	const flows = 24
	verdicts := make(map[explain.Verdict]int)
	for i := range flows {
		from, vip := netip.AddrPortFrom(top.Clients[0].Addr4, uint16(30000+i)), families[0].at(80)
		a := d.explain(from, vip)
		verdicts[a.Verdict]++
		got := call(t, top.Clients[0], lab.Call{Network: "tcp", Dst: vip, SrcPort: from.Port(), Timeout: 300 * time.Millisecond})
		if dropped := got.ByErr[lab.Timeout] == 1; dropped != (a.Verdict == explain.Drop) {
			t.Errorf("%v: %v, and %s %q was foretold", from, got, a.Verdict, a.Reason)
		}
		if want := "foreign chain: inet fw c (forward, handle 3)"; a.Verdict == explain.Drop && a.Reason != want {
			t.Errorf("%v is dropped by %q, want %q", from, a.Reason, want)
		}
	}
	if len(verdicts) != 2 {
		t.Errorf("of %d flows, %v", flows, verdicts)
	}
}

// A fate is what became of a flow.
type fate struct {
	Target  string
	Seen    netip.Addr
	Mode    string
	Hairpin bool
}

// explain is what nlb explain says.
func (d *daemon) explain(client, vip netip.AddrPort) (a explain.Answer) {
	d.t.Helper()
	d.json(&a, "explain", client.String(), vip.String(), "-o", "json")
	return a
}

// flows are what nlb flows lists, by their clients.
func (d *daemon) flows(args ...string) map[netip.AddrPort]control.Flow {
	d.t.Helper()
	var list []control.Flow
	d.json(&list, append([]string{"flows", "-o", "json"}, args...)...)
	byClient := make(map[netip.AddrPort]control.Flow)
	for _, f := range list {
		byClient[f.Client] = f
	}
	return byClient
}

// json runs nlb and reads what it prints.
func (d *daemon) json(into any, args ...string) {
	d.t.Helper()
	out := d.run(args...)
	if out.code != 0 || json.Unmarshal([]byte(out.stdout), into) != nil {
		d.t.Fatalf("nlb %s: exit %d\n%s%s", strings.Join(args, " "), out.code, out.stdout, out.stderr)
	}
}
