package e2e

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"nlb/balancer"
	"nlb/bench/lab"
	"nlb/internal/wait"
)

// shaking are the cases that everybody notices, or rather should not.
var shaking = []conformity{
	{
		name: "restart", needs: offerLasting, shows: "SIGTERM and a new start: flows go on, new ones work meanwhile, each 5-tuple leads where it did, and nothing is written",
		run: func(x *trial) { x.interrupt((*daemon).stop, "stopped") },
	},
	{
		name: "kill", shows: "SIGKILL and a new start: the same",
		run: func(x *trial) { x.interrupt((*daemon).kill, "killed") },
	},
	{
		name: "dataplane", shows: "a reload changes the dataplane and another takes it back: flows go on, but for UDP flows that IPVS began, for which nftables chooses anew; a kernel without IPVS refuses the change, and all goes on",
		run: changesDataplane,
	},
	{
		name: "clear", shows: "`nlb clear` leaves nothing of ours behind, gives settings back, and leaves strangers' tables and virtual services alone",
		run: clears,
	},
}

// lasting are listeners of all modes, whose flows have to outlive everything.
var lasting = []struct {
	name string
	over []flavour
}{
	{"preserve", flavours}, {"hairpin-snat", flavours}, {"snat", flavours}, {"proxy-protocol", connections},
	{"stickiness", flavours}, {"mixed-groups", connections},
}

// offerLasting offers them, as the cases do that are about them alone, and a hairpin.
func offerLasting(s *site, c *conformFile) {
	for i := range standing {
		needed := standing[i].name == "self-hairpin-snat"
		for _, l := range lasting {
			needed = needed || l.name == standing[i].name
		}
		if needed {
			standing[i].needs(s, c)
		}
	}
}

// keepLasting opens flows of all modes.
func (x *trial) keepLasting() map[string]*kept {
	x.t.Helper()
	all := map[string]*kept{}
	for _, l := range lasting {
		for _, f := range l.over {
			all[l.name+" "+f.String()] = &kept{x, f, held(x.t, x.top.Clients[0], lab.Call{
				Network: f.network, Dst: f.at(x.port(l.name)), N: 4, Parallel: 4, Timeout: f.patience(),
			})}
		}
	}
	return all
}

// lasts is one flavour of what must hold at any time.
func (x *trial) lasts(f flavour, when string, flows map[string]*kept) {
	x.t.Helper()
	for _, l := range lasting {
		if k := flows[l.name+" "+f.String()]; k != nil {
			k.alive(x.t, l.name+", "+when, "")
		}
	}
	client := x.top.Clients[0]
	x.seen(client, f, "preserve", 2, f.addr(client))
	x.seen(x.top.Targets[0], f, "self-hairpin-snat", 2, f.addr(x.top.LB))
	x.seen(client, f, "snat", 2, f.addr(x.top.LB))
	if f.network == "tcp" {
		x.headed(client, f, "proxy-protocol", 2)
	}
}

// chosen are the targets of a fixed set of 5-tuples. The ports are those of
// choices, below the range that the kernel takes others from.
func (x *trial) chosen(f flavour) map[uint16]string {
	x.t.Helper()
	const first, tuples = keptPort + 1000, 20
	client := x.top.Clients[1]
	// Flows of an earlier time would keep their targets. It fails when there are none.
	_, _ = x.d.tool("conntrack", "-D", "-s", f.addr(client).String(), "-p", f.network, "--dport", fmt.Sprint(x.port("preserve")))
	flows := held(x.t, client, lab.Call{
		Network: f.network, Dst: f.at(x.port("preserve")), SrcPort: first, N: tuples, Parallel: 8, Timeout: limit / 2,
	})
	met := make(map[uint16]string)
	for i, r := range flows.Opened {
		met[uint16(first+i)] = r.Who
	}
	done(x.t, flows.Close())
	return met
}

// lent is the site's daemon itself, whose failures are this case's until it is over.
func (x *trial) lent() *daemon {
	d, owner := x.site.d, x.site.d.t
	d.t = x.t
	x.t.Cleanup(func() { d.t = owner })
	return d
}

// interrupt ends the daemon and starts it again.
func (x *trial) interrupt(end func(*daemon), how string) {
	d := x.lent()
	flows := x.keepLasting()
	before := map[string]map[uint16]string{}
	for _, f := range flavours {
		before[f.String()] = x.chosen(f)
	}
	fresh, err := x.top.Clients[0].Agent().Churn(soon(x.t), lab.Churn{Interval: 10 * freshInterval, Call: lab.Call{
		Network: "tcp", Dst: families[0].at(x.port("preserve")), Timeout: limit / 2,
	}})
	done(x.t, err)
	end(d)
	for _, f := range flavours {
		x.lasts(f, how, flows)
	}
	d.start()
	x.waitHealthy(d)
	x.each(func(x *trial, f flavour) {
		x.lasts(f, "started again", flows)
		if diff := cmp.Diff(before[f.String()], x.chosen(f)); diff != "" {
			x.t.Errorf("%s", x.note(f, "5-tuples lead elsewhere (-before +after):\n"+diff))
		}
	})
	load, err := fresh.Stop(soon(x.t))
	done(x.t, err)
	if load.Failed > 0 || load.OK == 0 {
		x.t.Errorf("new connections all the time: %v", load)
	}
	wait.For(x.t, limit, "nothing to change", d.planned)
}

// changesDataplane goes to the other dataplane and back.
func changesDataplane(x *trial) {
	flows := x.keepLasting()
	if !haveIPVS() {
		next := x.written.clone()
		next.Dataplane = balancer.IPVS.String()
		if err := x.d.reload(next.String()); err == nil || !strings.Contains(err.Error(), noIPVS) {
			x.t.Errorf("nlb reload: %v, want %q", err, noIPVS)
		}
		x.d.write(x.written.String())
		x.each(func(x *trial, f flavour) { x.lasts(f, "after a refusal", flows) })
		return
	}
	other := map[balancer.Dataplane]balancer.Dataplane{balancer.NFTables: balancer.IPVS, balancer.IPVS: balancer.NFTables}[x.plane]
	x.change(func(c *conformFile) { c.Dataplane = other.String() })
	if got := x.d.status().Dataplane; got != other.String() {
		x.t.Errorf("nlb status says %s, want %s", got, other)
	}
	later := x.keepLasting()
	for _, f := range flavours {
		x.lasts(f, "begun before", begunBy(x.plane, f, flows))
	}
	x.change(func(c *conformFile) { c.Dataplane = x.plane.String() })
	x.each(func(x *trial, f flavour) {
		x.lasts(f, "begun before, after both changes", begunBy(x.plane, f, flows))
		x.lasts(f, "begun between the changes", begunBy(other, f, later))
	})
}

// begunBy are the flows that have to survive a change from a dataplane. When IPVS
// gives way, the rules that come choose anew for its UDP flows.
func begunBy(d balancer.Dataplane, f flavour, flows map[string]*kept) map[string]*kept {
	if d == balancer.IPVS && f.network == "udp" {
		return nil
	}
	return flows
}

// clears removes everything.
func clears(x *trial) {
	x.lent().stop()
	out := x.d.run("clear", "--state-dir", x.d.state(""))
	if out.code != 0 {
		x.t.Fatalf("nlb clear: %+v", out)
	}
	tables := must(x.t, x.top.LB, "nft", "list", "tables")
	if tables != "table inet stranger\n" {
		x.t.Errorf("tables are left: %q", tables)
	}
	for _, f := range families {
		if addresses := must(x.t, x.top.LB, "ip", "-"+f.name, "address", "show", "dev", "lo"); strings.Contains(addresses, f.vip.String()) {
			x.t.Errorf("%v is still there", f.vip)
		}
	}
	if !haveIPVS() {
		return
	}
	// Our own flows are over, and so nothing lingers.
	if diff := cmp.Diff(strangeService, strings.TrimSpace(must(x.t, x.top.LB, "ipvsadm", "-Sn"))); diff != "" {
		x.t.Errorf("virtual services (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(x.settings, ipvsSettings(x.t, x.top.LB)); diff != "" {
		x.t.Errorf("settings of IPVS (-before +after):\n%s", diff)
	}
}

// strangeService is a virtual service that is not ours, as ipvsadm -Sn prints it.
const strangeService = "-A -t 192.0.2.7:80 -s rr"

// strangers installs what others may have: a table, and a virtual service.
func (s *site) strangers(t *testing.T) {
	t.Helper()
	must(t, s.top.LB, "nft", "table inet stranger { chain forward { type filter hook forward priority 0; }; }")
	if haveIPVS() {
		must(t, s.top.LB, append([]string{"ipvsadm"}, strings.Fields(strangeService)...)...)
	}
}

// ipvsSettings are those that nlb sets while it has virtual services.
func ipvsSettings(t *testing.T, n *lab.Node) map[string]string {
	t.Helper()
	if !haveIPVS() {
		return nil
	}
	values := map[string]string{"timeouts": must(t, n, "ipvsadm", "-L", "--timeout")}
	for _, key := range []string{"conntrack", "expire_nodest_conn", "sloppy_tcp", "conn_reuse_mode"} {
		values[key] = must(t, n, "sysctl", "-n", "net.ipv4.vs."+key)
	}
	return values
}
