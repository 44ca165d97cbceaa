package e2e

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"nlb/bench/lab"
)

// isRedirect holds for ICMP redirects (RFC 792; RFC 4861 section 4.5).
func isRedirect(p lab.Packet) bool {
	return p.Proto == unix.IPPROTO_ICMP && p.ICMPType == 5 || p.Proto == unix.IPPROTO_ICMPV6 && p.ICMPType == 137
}

// TestNoRedirects has a balancer on the targets' own segment, whose kernel would
// tell each target that a better router is next to it. A target that believed
// that would answer past the balancer.
func TestNoRedirects(t *testing.T) {
	t.Parallel()
	top := made(t, lab.OneArm, lab.Options{})
	serveTargets(t, top, 8080)
	serveOn(t, top.Clients[0], lab.Serve{Ports: []uint16{7000}})
	for _, key := range []string{"all", "default", "eth0"} {
		if err := top.LB.Sysctl("net.ipv4.conf."+key+".send_redirects", "1"); err != nil {
			t.Fatal(err)
		}
	}
	// A redirect names a router by its link-local address, and there is none if the
	// route does not (RFC 4861 section 8).
	words := strings.Fields(must(t, top.Router, "ip", "-6", "-o", "address", "show", "dev", "eth0", "scope", "link"))
	local := netip.MustParsePrefix(words[slices.Index(words, "inet6")+1]).Addr()
	must(t, top.LB, "ip", "-6", "route", "replace", "default", "via", local.String(), "dev", "eth0")

	// That the kernel does so is shown by another target, before the daemon
	// starts: redirects to one host are limited in their rate.
	witness, subject := top.Targets[1], top.Targets[0]
	seen := capture(t, witness, "eth0")
	for _, f := range families {
		client := netip.AddrPortFrom(f.addr(top.Clients[0]), 7000)
		if got := call(t, witness, lab.Call{Network: "udp", Dst: client, N: 3}); got.Failed > 0 {
			t.Fatalf("to %v: %v", client, got)
		}
		_, err := seen.Wait(soon(t), func(p lab.Packet) bool { return isRedirect(p) && p.Dst == f.addr(witness) })
		if err != nil {
			t.Errorf("IPv%s: no redirect without nlb, so this test shows nothing: %v", f.name, err)
		}
	}

	serving(t, top, config{
		Sources: sources(top), VIPs: both(),
		Listeners: listen("web", "TCP_UDP", 80, "web"),
		Groups:    []group{pool("web", "TCP_UDP", "preserve", 8080, targets(subject))},
	})
	seen = capture(t, subject, "eth0")
	for _, f := range families {
		for _, network := range networks {
			got := call(t, top.Clients[0], lab.Call{Network: network, Dst: f.at(80), N: 20})
			allSeenAs(t, network+f.name, got, f.addr(top.Clients[0]))
		}
	}
	if found := packets(t, seen, isRedirect); len(found) > 0 {
		t.Errorf("%d redirects, such as %v", len(found), found[0])
	}
}
