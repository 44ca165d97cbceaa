package lab

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// pair is a client, a balancer that only routes, and one target.
func pair(t *testing.T) (top *Topology, client, target *Node) {
	t.Helper()
	top = made(t, Routed, Options{Targets: 1})
	return top, top.Clients[0], top.Targets[0]
}

func port(n *Node, p uint16) netip.AddrPort { return netip.AddrPortFrom(n.Addr4, p) }

func calls(t *testing.T, n *Node, c Call) []Reply {
	t.Helper()
	replies, err := n.Agent().Call(soon(t), c)
	if err != nil {
		t.Fatal(err)
	}
	return replies
}

func TestCallFailuresHaveNames(t *testing.T) {
	top, client, target := pair(t)
	nft(t, target, "add table inet x; add chain inet x in { type filter hook input priority 0; }; add rule inet x in th dport 81 drop")
	for _, network := range []string{"tcp", "udp"} {
		for _, tt := range []struct {
			caller *Node
			dst    netip.AddrPort
			want   string
		}{
			{client, port(target, 80), Refused},
			{client, port(target, 81), Timeout},
			{top.LB, netip.MustParseAddrPort("10.0.9.9:80"), Unreachable}, // no route
		} {
			c := Call{Network: network, Dst: tt.dst, N: 3, Parallel: 3, Timeout: 10 * time.Second} // on a busy host an answer takes its time
			if tt.want == Timeout {
				c.Timeout = 300 * time.Millisecond
			}
			got := Count(calls(t, tt.caller, c))
			if network == "udp" && tt.want == Refused && got.ByErr[Timeout] > 0 {
				// A kernel may keep an ICMP error back (RFC 1812, section 4.3.2.8).
				got = Count(calls(t, tt.caller, c))
			}
			if got.ByErr[tt.want] != 3 {
				t.Errorf("%s %s: %v, want 3 %s", network, tt.dst, got, tt.want)
			}
		}
	}
}

// Who asks again has an answer where the first question of each socket is lost.
func TestCallAsksAgain(t *testing.T) {
	_, client, target := pair(t)
	target.serve(t, Serve{Ports: []uint16{82}, Networks: []string{"udp"}})
	nft(t, target, "add table inet x; add set inet x seen { type inet_service; size 100; flags dynamic; }; add chain inet x in { type filter hook input priority 0; }"+
		"; add rule inet x in udp dport 82 udp sport != @seen add @seen { udp sport } drop")
	c := Call{Network: "udp", Dst: port(target, 82), N: 3, Parallel: 3, Timeout: 300 * time.Millisecond}
	if got := Count(calls(t, client, c)); got.ByErr[Timeout] != 3 {
		t.Errorf("asked once: %v, want 3 without an answer", got)
	}
	c.Timeout, c.Again = 10*time.Second, 50*time.Millisecond
	if got := Count(calls(t, client, c)); got.OK != 3 {
		t.Errorf("asked again: %v, want 3 answers", got)
	}
}

// nft runs commands of nft(8) on a node.
func nft(t *testing.T, n *Node, commands string) {
	t.Helper()
	cmd := n.Command(soon(t), "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(strings.ReplaceAll(commands, "; add", "\nadd"))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("nft: %v\n%s", err, out)
	}
}

func TestCallFromAFixedPort(t *testing.T) {
	_, client, target := pair(t)
	target.serve(t, Serve{Ports: []uint16{8080}})
	for _, network := range []string{"tcp", "udp"} {
		got := calls(t, client, Call{Network: network, Dst: port(target, 8080), SrcAddr: client.Addr4, SrcPort: 40112, N: 5})
		for _, r := range got {
			if r.Err != "" || r.Port != 40112 || r.Peer != client.Addr4 {
				t.Errorf("%s: %+v", network, r)
			}
		}
	}
}

// Each UDP call of a batch is a flow of its own: none may have the port of one
// that is over, which chance would give to some of 400 among 28,232 ports.
func TestCallsOfABatchHaveTheirOwnPorts(t *testing.T) {
	const n = 400
	_, client, target := pair(t)
	target.serve(t, Serve{Ports: []uint16{8080}})
	replies := calls(t, client, Call{Network: "udp", Dst: port(target, 8080), N: n})
	ports := map[netip.AddrPort]bool{}
	for _, r := range replies {
		ports[r.From] = true
	}
	if tally := Count(replies); tally.OK != n || len(ports) != n {
		t.Errorf("%d ports of %v", len(ports), tally)
	}
}

func TestTargetSpeaksFirst(t *testing.T) {
	_, client, target := pair(t)
	target.serve(t, Serve{Who: "smtp", Networks: []string{"tcp"}, Ports: []uint16{25, 26}, Greet: true})
	for _, silent := range []bool{true, false} {
		if got := Count(calls(t, client, Call{Network: "tcp", Dst: port(target, 26), Silent: silent})); got.ByWho["smtp"] != 1 {
			t.Errorf("silent %v: %v", silent, got)
		}
	}
}

func TestTargetReadsProxyHeaders(t *testing.T) {
	const sig = proxySignature
	for _, tt := range []struct {
		name, raw, client string
		bad               bool
	}{
		{name: "tcp over ipv4", raw: sig + "\x21\x11\x00\x0c\xcb\x00\x71\x09\xc6\x33\x64\x0a\x9c\xb0\x00\x50", client: "203.0.113.9:40112"},
		{name: "with a TLV", raw: sig + "\x21\x11\x00\x0f\xcb\x00\x71\x09\xc6\x33\x64\x0a\x9c\xb0\x00\x50\x04\x00\x00", client: "203.0.113.9:40112"},
		{name: "tcp over ipv6", raw: sig + "\x21\x21\x00\x24\x20\x01\x0d\xb8" + strings.Repeat("\x00", 11) + "\x09" + strings.Repeat("\x00", 16) + "\x9c\xb0\x00\x50", client: "[2001:db8::9]:40112"},
		{name: "local", raw: sig + "\x20\x00\x00\x00", client: "invalid AddrPort"},
		{name: "short addresses", raw: sig + "\x21\x11\x00\x02\xcb\x00", bad: true},
		{name: "cut short", raw: sig + "\x21\x11\x00\x0c\xcb", bad: true},
		{name: "version 1", raw: "PROXY TCP4 203.0.113.9 198.51.100.10 40112 80\r\n", bad: true},
		{name: "unknown command", raw: sig + "\x22\x11\x00\x00", bad: true},
		{name: "empty", raw: "", bad: true},
	} {
		got, err := readProxyHeader(bufio.NewReader(strings.NewReader(tt.raw)))
		if (err != nil) != tt.bad || !tt.bad && got.String() != tt.client {
			t.Errorf("%s: %v, %v, want %s", tt.name, got, err, tt.client)
		}
		seen, ok := Packet{Proto: unix.IPPROTO_TCP, Data: []byte("both headers" + tt.raw)}.ProxySource()
		if named := !tt.bad && got.IsValid(); ok != named || ok && seen != got {
			t.Errorf("%s in a packet: %v, %v, want %v, %v", tt.name, seen, ok, got, named)
		}
	}

	_, client, target := pair(t)
	target.serve(t, Serve{Ports: []uint16{8080}, Networks: []string{"tcp"}, Proxy: true})
	cmd := client.Command(soon(t), "curl", "-sS", "-m", "5", "--haproxy-protocol", "http://"+port(target, 8080).String()+"/")
	if out, err := cmd.Output(); err == nil {
		t.Errorf("a version 1 header was accepted: %q", out)
	}
	var conn net.Conn
	err := client.Do(func() (err error) {
		conn, err = net.DialTimeout("tcp4", port(target, 8080).String(), 5*time.Second)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, sig+"\x21\x11\x00\x0c\xc0\x00\x02\x01\xc6\x33\x64\x0a\x9c\xb0\x00\x50who 1\n"); err != nil {
		t.Fatal(err)
	}
	f := &flow{Conn: conn, lines: bufio.NewReader(conn)}
	if a, err := f.answer(); err != nil || a.Client.String() != "192.0.2.1:40112" || a.Peer != client.Addr4 || a.Got != "who 1" {
		t.Errorf("%+v: %v", a, err)
	}
}

func FuzzReadProxyHeader(f *testing.F) {
	f.Add([]byte(proxySignature + "\x21\x11\x00\x0c\xcb\x00\x71\x09\xc6\x33\x64\x0a\x9c\xb0\x00\x50"))
	f.Fuzz(func(t *testing.T, b []byte) {
		client, err := readProxyHeader(bufio.NewReader(bytes.NewReader(b)))
		if err == nil && !bytes.HasPrefix(b, []byte(proxySignature)) {
			t.Errorf("%x was taken for a header of %v", b, client)
		}
	})
}

func TestTargetAnswersFromTheAddressThatWasAsked(t *testing.T) {
	top, client, target := pair(t)
	second := netip.MustParsePrefix("10.0.1.200/32")
	if err := errors.Join(target.Address("lo", second), top.LB.Route(second, target.Addr4, "t1")); err != nil {
		t.Fatal(err)
	}
	target.serve(t, Serve{Ports: []uint16{8080}})
	// A connected UDP socket takes answers from no other address.
	dst := netip.AddrPortFrom(second.Addr(), 8080)
	if got := calls(t, client, Call{Network: "udp", Dst: dst})[0]; got.Err != "" || got.Local != dst {
		t.Errorf("got %+v", got)
	}
}

func TestTargetSpeaksHTTP(t *testing.T) {
	_, client, target := pair(t)
	l := target.serve(t, Serve{Ports: []uint16{0}, Networks: []string{"tcp"}})
	out, err := client.Command(soon(t), "curl", "-sS", "-m", "5", "http://"+port(target, l.Bound[0].Port()).String()+"/hc").Output()
	if err != nil || !strings.Contains(string(out), `"who":"t1","peer":"203.0.113.9"`) {
		t.Errorf("curl got %q: %v", out, err)
	}
}

func TestListenersClose(t *testing.T) {
	_, client, target := pair(t)
	l := target.serve(t, Serve{Ports: []uint16{8080}})
	if _, err := target.Agent().Serve(soon(t), Serve{Ports: []uint16{8081, 8080}}); err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("a second listener on the port: %v", err)
	}
	for range 2 {
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range []uint16{8080, 8081} {
		if got := Count(calls(t, client, Call{Network: "tcp", Dst: port(target, p)})); got.ByErr[Refused] != 1 {
			t.Errorf("port %d: %v, want it closed", p, got)
		}
	}
}

func TestContextEndsARequest(t *testing.T) {
	_, client, target := pair(t)
	nft(t, target, "add table inet x; add chain inet x in { type filter hook input priority 0; policy drop; }")
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error, 1)
	go func() {
		_, err := client.Agent().Call(ctx, Call{Network: "tcp", Dst: port(target, 1), Timeout: time.Hour})
		result <- err
	}()
	// The agent is at work on both requests once it answers the second.
	if got := Count(calls(t, client, Call{Network: "tcp", Dst: port(target, 2), Timeout: 50 * time.Millisecond})); got.Failed != 1 {
		t.Errorf("got %v", got)
	}
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestUnknownRequests(t *testing.T) {
	_, client, _ := pair(t)
	a := client.Agent()
	if _, err := a.ask(soon(t), "dance", nil, nil); err == nil || err.Error() != `lab: c1: dance: "dance" is not an operation` {
		t.Errorf("got %v", err)
	}
	if _, err := a.ask(soon(t), "check", handle{ID: 99}, nil); err == nil || err.Error() != "lab: c1: check: 99 is not open" {
		t.Errorf("got %v", err)
	}
	if _, err := a.Call(soon(t), Call{Network: "sctp"}); err == nil {
		t.Error("sctp was accepted")
	}
}

func TestHoldFindsBrokenAndMovedFlows(t *testing.T) {
	_, client, target := pair(t)
	first := target.NewAgent()
	serve := func(a *Agent, who string) {
		t.Helper()
		if _, err := a.Serve(soon(t), Serve{Who: who, Ports: []uint16{8080}}); err != nil {
			t.Fatal(err)
		}
	}
	serve(first, "first")
	hold := func(network string) *Flows {
		t.Helper()
		f, err := client.Agent().Hold(soon(t), Call{Network: network, Dst: port(target, 8080), N: 20, Parallel: 4})
		if err != nil {
			t.Fatal(err)
		}
		if got := Count(f.Opened); got.ByWho["first"] != 20 {
			t.Fatalf("opened %v", got)
		}
		return f
	}
	check := func(f *Flows) []Flow {
		t.Helper()
		flows, err := f.Check(soon(t))
		if err != nil {
			t.Fatal(err)
		}
		if len(flows) != 20 {
			t.Fatalf("%d flows, want 20", len(flows))
		}
		return flows
	}
	tcp, udp := hold("tcp"), hold("udp")
	for range 2 {
		if bad := Broken(append(check(tcp), check(udp)...)); len(bad) != 0 {
			t.Errorf("broken without a reason: %+v", bad)
		}
	}
	first.Kill()
	if bad := Broken(check(tcp)); len(bad) != 20 || !bad[0].Broken() {
		t.Errorf("%d TCP flows broke with their target, want 20", len(bad))
	}
	// Refused or timeout: hosts limit the rate of ICMP errors.
	if bad := Broken(check(udp)); len(bad) != 20 {
		t.Errorf("%d UDP flows broke with their target, want 20: %+v", len(bad), bad)
	}
	if _, err := first.Serve(soon(t), Serve{}); !errors.Is(err, ErrAgentEnded) {
		t.Errorf("a killed agent said %v", err)
	}
	serve(target.Agent(), "second")
	for _, f := range check(udp) {
		if f.Broken() || !f.Moved() {
			t.Errorf("%+v: want it answered by the second", f)
		}
	}
	if err := errors.Join(tcp.Close(), udp.Close()); err != nil {
		t.Error(err)
	}
}

// Silence takes no longer than the check gives it, whatever the flows were opened
// with, and they go on after it.
func TestCheckWithin(t *testing.T) {
	_, client, target := pair(t)
	target.serve(t, Serve{Ports: []uint16{8080}})
	firewall := func(script string) {
		t.Helper()
		if out, err := target.Command(t.Context(), "nft", script).CombinedOutput(); err != nil {
			t.Fatalf("nft: %v\n%s", err, out)
		}
	}
	for _, network := range []string{"tcp", "udp"} {
		f, err := client.Agent().Hold(soon(t), Call{Network: network, Dst: port(target, 8080), Timeout: time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		firewall("table inet deaf { chain input { type filter hook input priority 0; policy drop; }; }")
		if flows, err := f.CheckWithin(soon(t), 50*time.Millisecond); err != nil || flows[0].Now.Err != Timeout {
			t.Errorf("%s: %+v, %v; want a timeout", network, flows, err)
		}
		firewall("delete table inet deaf")
		if flows, err := f.Check(soon(t)); err != nil || flows[0].Broken() || flows[0].Moved() {
			t.Errorf("%s: %+v, %v; want an answer", network, flows, err)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestAgentIsReplacedOnceKilled(t *testing.T) {
	_, client, target := pair(t)
	target.serve(t, Serve{Ports: []uint16{8080}})
	target.Agent().Kill()
	target.Agent().Kill() // the next one, which has not begun
	target.serve(t, Serve{Ports: []uint16{8080}})
	if got := Count(calls(t, client, Call{Network: "tcp", Dst: port(target, 8080)})); got.OK != 1 {
		t.Errorf("got %v", got)
	}
}

func TestChurn(t *testing.T) {
	_, client, target := pair(t)
	target.serve(t, Serve{Ports: []uint16{8080}})
	for _, c := range []Churn{
		{Call: Call{Network: "tcp", Dst: port(target, 8080), Parallel: 2}, Interval: time.Millisecond},
		{Call: Call{Network: "udp", Dst: port(target, 8080), SrcPort: 5000, Timeout: 50 * time.Millisecond}, Interval: time.Millisecond, Keep: true},
	} {
		run, err := client.Agent().Churn(soon(t), c)
		if err != nil {
			t.Fatal(err)
		}
		met(t, run, "20 answers", func(l Load) bool { return l.OK >= 20 })
		if l := met(t, run, "no failure", func(Load) bool { return true }); l.Failed != 0 || l.ByWho["t1"] != l.OK || l.Moves != 0 {
			t.Errorf("%s: %v", c.Network, l)
		}
		target.Agent().Kill()
		met(t, run, "failures", func(l Load) bool { return l.Failed > 5 })
		target.serve(t, Serve{Who: "t1b", Ports: []uint16{8080}})
		l := met(t, run, "answers of the new target", func(l Load) bool { return l.ByWho["t1b"] > 5 })
		if l.Moves < 1 || l.Gap <= 0 || l.Gap > l.Elapsed {
			t.Errorf("%s: %v", c.Network, l)
		}
		end, err := run.Stop(soon(t))
		if err != nil || end.OK < l.OK {
			t.Errorf("stopped with %v: %v", end, err)
		}
		if _, err := run.Load(soon(t)); err == nil {
			t.Error("it still counts")
		}
		target.Agent().Kill()
		target.serve(t, Serve{Ports: []uint16{8080}})
	}
	if _, err := client.Agent().Churn(soon(t), Churn{Call: Call{Network: "tcp"}, Keep: true}); err == nil {
		t.Error("Keep was accepted for tcp")
	}
}

func TestScanFindsExactlyTheOpenPorts(t *testing.T) {
	_, client, target := pair(t)
	open := map[string][]uint16{"tcp": {1, 22, 8080, 32768, 65535}, "udp": {53, 5000, 65535}}
	for network, list := range open {
		target.serve(t, Serve{Networks: []string{network}, Ports: list})
	}
	scan := func(network string, dst netip.Addr) *Ports {
		t.Helper()
		found, err := client.Agent().Scan(soon(t), Scan{Network: network, Dst: dst})
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(open[network], found.Open); diff != "" {
			t.Errorf("%s %s: open (-want +got):\n%s", network, dst, diff)
		}
		if sum := len(found.Open) + len(found.Refused) + found.Silent; sum != 65535 || len(found.Unreachable) != 0 {
			t.Errorf("%d ports, %d of them unreachable, want 65535 and none", sum, len(found.Unreachable))
		}
		t.Logf("%s %s: %d refused, %d silent, in %v", network, dst, len(found.Refused), found.Silent, found.Elapsed)
		return found
	}
	if found := scan("tcp", target.Addr4); found.Silent != 0 {
		t.Errorf("%d silent ports without a firewall", found.Silent)
	}
	if found := scan("udp", target.Addr4); len(found.Refused) == 0 || slices.Contains(found.Refused, 53) {
		t.Errorf("refused %v", found.Refused)
	}
	nft(t, target, "add table inet x; add chain inet x in { type filter hook input priority 0; policy drop; }"+
		"; add rule inet x in tcp dport { 1, 22, 8080, 32768, 65535 } accept; add rule inet x in udp dport { 53, 5000, 65535 } accept"+
		"; add rule inet x in meta l4proto icmpv6 accept")
	for network, dst := range map[string]netip.Addr{"tcp": target.Addr4, "udp": target.Addr6} {
		if found := scan(network, dst); len(found.Refused) != 0 {
			t.Errorf("refused %v by a firewall that drops", found.Refused)
		}
	}
}

func TestScanOfARange(t *testing.T) {
	_, client, target := pair(t)
	target.serve(t, Serve{Ports: []uint16{99, 100, 102, 103}})
	for _, network := range []string{"tcp", "udp"} {
		found, err := client.Agent().Scan(soon(t), Scan{Network: network, Dst: target.Addr6, First: 100, Last: 102, Timeout: 300 * time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(&Ports{Open: []uint16{100, 102}, Refused: []uint16{101}, Elapsed: found.Elapsed}, found); diff != "" {
			t.Errorf("%s (-want +got):\n%s", network, diff)
		}
	}
}

func TestCapture(t *testing.T) {
	top, client, target := pair(t)
	target.serve(t, Serve{Ports: []uint16{8080}})
	ctx := soon(t)
	begin := time.Now()
	eth, err := top.LB.Agent().Capture(ctx, "t1")
	if err != nil {
		t.Fatal(err)
	}
	all, err := client.Agent().Capture(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	from := calls(t, client, Call{Network: "tcp", Dst: port(target, 8080)})[0].From
	to6 := netip.AddrPortFrom(target.Addr6, 8080)
	calls(t, client, Call{Network: "udp", Dst: to6})
	calls(t, client, Call{Network: "udp", Dst: port(target, 9)})

	syn, err := eth.Wait(ctx, func(p Packet) bool { return p.Flags == SYN })
	if err != nil {
		t.Fatal(err)
	}
	if syn.Time.Before(begin) || time.Since(syn.Time) < 0 || syn.Length < 40 {
		t.Errorf("time %v, length %d", syn.Time, syn.Length)
	}
	if got, want := syn.String(), "t1 out "+from.String()+" > 10.0.1.11:8080 tcp SYN"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	for _, want := range []string{" > 10.0.1.11:8080 tcp SYN", "eth0 in 10.0.1.11:8080 > " + from.String() + " tcp SYN|ACK", "eth0 in [2001:db8:1::11]:8080 > ", "eth0 in 10.0.1.11 > 203.0.113.9 icmp type 3 code 3"} {
		if _, err := all.Wait(ctx, func(p Packet) bool { return strings.Contains(p.String(), want) }); err != nil {
			t.Errorf("%q: %v", want, err)
		}
	}
	v6, err := eth.Packets(ctx, func(p Packet) bool { return p.To() == to6 })
	if err != nil || len(v6) != 1 {
		t.Errorf("%d packets to %v: %v\n%v", len(v6), to6, err, v6)
	}
	if err := errors.Join(eth.Close(), all.Close()); err != nil {
		t.Error(err)
	}
	if _, err := top.LB.Agent().Capture(ctx, "eth9"); err == nil {
		t.Error("captured on an interface that does not exist")
	}
}

func TestServerEndsWithItsInput(t *testing.T) {
	if err := serveRequests(strings.NewReader(""), io.Discard); err != nil {
		t.Error(err)
	}
	if err := serveRequests(strings.NewReader("{\"id\":1"), io.Discard); err == nil {
		t.Error("half a request was accepted")
	}
}

func TestRelayAnnouncesItsClients(t *testing.T) {
	top := made(t, Routed, Options{Targets: 1})
	client, target := top.Clients[0], top.Targets[0]
	target.serve(t, Serve{Ports: []uint16{8080}, Networks: []string{"tcp"}, Proxy: true, Greet: true})
	listen := netip.AddrPortFrom(top.LB.Addr4, 80)
	relay, err := top.LB.Agent().Relay(soon(t), Relay{Listen: listen, Target: netip.AddrPortFrom(target.Addr4, 8080)})
	if err != nil {
		t.Fatal(err)
	}
	ask := func(c Call) Reply {
		t.Helper()
		c.Network, c.Dst = "tcp", listen
		replies, err := client.Agent().Call(soon(t), c)
		if err != nil {
			t.Fatal(err)
		}
		return replies[0]
	}
	// The greeting comes first, without a question, and is no answer to one.
	if r := ask(Call{Timeout: 5 * time.Second}); r.Err != "" || r.Client.Addr() != client.Addr4 || r.Peer != top.LB.Addr4 {
		t.Errorf("%+v", r)
	}
	if r := ask(Call{Silent: true, Timeout: 300 * time.Millisecond}); r.Err != Timeout {
		t.Errorf("who says nothing got %+v", r)
	}
	if err := relay.Close(); err != nil {
		t.Fatal(err)
	}
	if r := ask(Call{}); r.Err != Refused {
		t.Errorf("a closed relay: %+v", r)
	}
}

func TestRecordKeepsTheBytes(t *testing.T) {
	top := made(t, Routed, Options{Targets: 1})
	client, target := top.Clients[0], top.Targets[0]
	target.serve(t, Serve{Ports: []uint16{8080}})
	c, err := client.Agent().Record(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	call := Call{Network: "udp", Dst: netip.AddrPortFrom(target.Addr4, 8080), Timeout: 5 * time.Second}
	if _, err := client.Agent().Call(soon(t), call); err != nil {
		t.Fatal(err)
	}
	p, err := c.Wait(soon(t), func(p Packet) bool { return !p.Out && p.SrcPort == 8080 })
	if err != nil {
		t.Fatal(err)
	}
	again, ok := decodePacket(p.Data)
	again.Time, again.Iface, again.Out, again.Data = p.Time, p.Iface, p.Out, p.Data
	if diff := cmp.Diff(p, again, equalNetip); !ok || diff != "" || len(p.Data) != min(p.Length, SnapLength) {
		t.Errorf("%d of %d bytes, which decode to another packet:\n%s", len(p.Data), p.Length, diff)
	}
}
