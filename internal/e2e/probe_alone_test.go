package e2e

import (
	"errors"
	"net"
	"net/netip"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/bench/lab"
)

// TestProbesAreLeftAlone has probes that our rules would rewrite if they took them
// for clients' flows: from a host that is said to be the target's own, of groups
// whose clients are all seen as the balancer, and with marks of a stranger's. The
// targets are another host and the balancer itself.
func TestProbesAreLeftAlone(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Targets: 1})
	serveTargets(t, top, targetPort)
	serveOn(t, top.LB, lab.Serve{Ports: []uint16{targetPort}})
	modes := []string{"preserve", "hairpin_snat", "snat"}
	c := config{Sources: sources(top), VIPs: both()}
	for _, f := range families {
		prober, self := probeOwn[f.name][0], probeOwn[f.name][1]
		for _, own := range []netip.Addr{prober, self} {
			must(t, top.LB, "ip", "address", "add", own.String(), "dev", "lo")
		}
		for i, mode := range modes {
			g := pool(mode[:4]+"-"+f.name, "TCP", mode, targetPort, []target{
				{Address: f.addr(top.Targets[0]), Colocated: []string{prober.String()}},
				{Address: self, Colocated: []string{prober.String()}},
			})
			g.AvoidSelf = mode == "preserve"
			g.HealthCheck["source"] = prober.String()
			// No two ask the same question, so that each group has its own probes.
			g.HealthCheck["healthy_threshold"] = 1 + i
			c.Groups = append(c.Groups, g)
			c.Listeners = append(c.Listeners, listener{Name: g.Name, VIP: f.vip.String(), Protocol: "TCP", Port: uint16(webPort + i), Forward: to(g.Name)})
		}
	}
	atTarget, atLoopback := capture(t, top.Targets[0], "eth0"), capture(t, top.LB, "lo")
	d := serving(t, top, c)

	for _, f := range families {
		prober, self, there := probeOwn[f.name][0], probeOwn[f.name][1], f.addr(top.Targets[0])
		// What is no probe is rewritten.
		for i, mode := range modes {
			for _, r := range replies(t, top.LB, lab.Call{Network: "tcp", Dst: f.at(uint16(webPort + i)), SrcAddr: prober, N: 20}) {
				if want := f.addr(top.LB); mode != "preserve" && r.Who == top.Targets[0].Name && r.Peer != want {
					t.Errorf("%s: a flow from %v is seen as %v, so this test shows nothing: %+v", mode, prober, r.Peer, r)
				}
			}
		}
		// What has the mark of probes is not, though it is for a listener.
		for i := range modes {
			err := probeMarked(top.LB, f.at(uint16(webPort+i)))
			if timeout, ok := errors.AsType[net.Error](err); !ok || !timeout.Timeout() {
				t.Errorf("a connection to %v with the mark of probes: %v, want a timeout", f.at(uint16(webPort+i)), err)
			}
		}
		for host, seen := range map[netip.Addr]*lab.Capture{there: atTarget, self: atLoopback} {
			probeFrom(t, seen, netip.AddrPortFrom(host, targetPort), netip.Addr{})
			found := packets(t, seen, func(p lab.Packet) bool {
				return !p.Out && probeOpens(p) && p.Dst == host && p.Src == prober
			})
			if len(found) < len(modes) {
				t.Errorf("%v got %d probes from %v, want those of %d groups", host, len(found), prober, len(modes))
			}
		}
	}

	// A stranger's marks say of every flow that it wants another source.
	must(t, top.LB, "nft", "table inet other { chain out { type filter hook output priority -150; ct state new ct mark set 0xffffffff; }; }")
	again := map[string]*lab.Capture{}
	for name, n := range map[string]*lab.Node{"eth0": top.Targets[0], "lo": top.LB} {
		again[name] = capture(t, n, name)
	}
	for _, f := range families {
		prober := probeOwn[f.name][0]
		probeFrom(t, again["eth0"], netip.AddrPortFrom(f.addr(top.Targets[0]), targetPort), prober)
		probeFrom(t, again["lo"], netip.AddrPortFrom(probeOwn[f.name][1], targetPort), prober)
	}
	d.waitAllHealthy()
}

// probeMarked connects with the mark of probes.
func probeMarked(n *lab.Node, to netip.AddrPort) error {
	dialer := net.Dialer{Timeout: briefly, Control: func(_, _ string, raw syscall.RawConn) error {
		var opt error
		err := raw.Control(func(fd uintptr) {
			opt = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(balancer.ProbeMark))
		})
		return errors.Join(err, opt)
	}}
	return n.Do(func() error {
		conn, err := dialer.Dial("tcp", to.String())
		if err != nil {
			return err
		}
		return conn.Close()
	})
}
