package e2e

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/bench/lab"
	"nlb/internal/wait"
)

// TestMuseum shows defects that load balancers have had, each with the traffic
// that brought it to light. Two more have tests of their own: a UDP flow that was
// opened while the group was empty (TestUDPFollows), and late segments that leak
// un-NATed when a flow is forgotten (TestStraySegments) or cut (TestDrain).
func TestMuseum(t *testing.T) {
	t.Parallel()
	for name, exhibit := range map[string]func(*testing.T){
		"weight 0 left behind by a reload":                   weightLeftBehind,
		"a removed unhealthy target stays installed":         removedUnhealthy,
		"a repaired check does not bring targets back":       repairedCheck,
		"weight 0 becomes 1":                                 weightFromZero,
		"a moment without any target":                        momentWithout,
		"expiring flows revive a drained target":             revivedByExpiry,
		"a reused source port meets a drained target":        reusedPort,
		"a client that was cut off comes back from its port": cutOffReturns,
		"sticky clients of a drained target":                 stickyDrained,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			exhibit(t)
		})
	}
}

// museum is a daemon with one TCP group of the topology's targets, which may be
// changed before it starts.
func museum(t *testing.T, top *lab.Topology, change func(*group)) (*daemon, config) {
	t.Helper()
	g := pool("web", "TCP", "preserve", targetPort, targets(top.Targets...))
	if change != nil {
		change(&g)
	}
	c := config{Sources: sources(top), VIPs: both(), Listeners: listen("web", "TCP", webPort, "web"), Groups: []group{g}}
	return start(t, top, c.String()), c
}

func weightLeftBehind(t *testing.T) {
	top := routed(t, lab.Options{})
	serveTargets(t, top, targetPort)
	client, t1 := top.Clients[0], top.Targets[0]
	weigh := func(w int) func(*group) {
		return func(g *group) {
			for i := range g.Targets {
				if g.Targets[i].Address == t1.Addr4 || g.Targets[i].Address == t1.Addr6 {
					g.Targets[i] = g.Targets[i].weighed(w)
				}
			}
		}
	}
	d, c := museum(t, top, weigh(0))
	d.waitAllHealthy()
	reload := func(of ...target) {
		t.Helper()
		c.Groups[0].Targets = of
		if err := d.reload(c.String()); err != nil {
			t.Fatal(err)
		}
	}
	avoided(t, "weight 0", client, webPort, 40, t1.Name)
	reload(targets(top.Targets...)...)
	reached(t, "weight 1", client, webPort, t1.Name)
	for _, how := range []string{"removed", "removed with weight 0"} {
		if how != "removed" {
			weigh(0)(&c.Groups[0])
			reload(c.Groups[0].Targets...)
		}
		reload(targets(top.Targets[1])...)
		avoided(t, how, client, webPort, 40, t1.Name)
		reload(targets(top.Targets...)...)
		d.waitAllHealthy()
		reached(t, how+" and added again", client, webPort, t1.Name)
	}
	// A target that failed has weight 0 in the kernel.
	top.Targets[0].Agent().Kill()
	d.becomes("web", t1, balancer.Unhealthy, "")
	reload(targets(top.Targets...)...)
	avoided(t, "failed", client, webPort, 40, t1.Name)
	serveOn(t, t1, lab.Serve{Ports: []uint16{targetPort}})
	d.waitAllHealthy()
	reached(t, "failed and repaired", client, webPort, t1.Name)
}

func removedUnhealthy(t *testing.T) {
	top := routed(t, lab.Options{})
	serveTargets(t, top, targetPort)
	client, t1 := top.Clients[0], top.Targets[0]
	d, c := museum(t, top, func(g *group) { g.Deregister = leaving(time.Second, true) })
	d.waitAllHealthy()
	if !d.mentions(t1) {
		t.Fatal("the table does not name a target that takes flows, so this test shows nothing")
	}
	t1.Agent().Kill()
	d.becomes("web", t1, balancer.Unhealthy, "")
	c.Groups[0].Targets = targets(top.Targets[1])
	if err := d.reload(c.String()); err != nil {
		t.Fatal(err)
	}
	d.disappears("web", t1)
	wait.For(t, limit, "nothing of it is left", func() error {
		if d.mentions(t1) {
			return errors.New("the table names it")
		}
		return nil
	})
	avoided(t, "removed", client, webPort, 40, t1.Name)
	wait.For(t, limit, "nothing to change", d.planned)
}

func repairedCheck(t *testing.T) {
	top := routed(t, lab.Options{})
	serveTargets(t, top, targetPort)
	d, c := museum(t, top, func(g *group) { g.HealthCheck["port"] = healthPort })
	for _, n := range top.Targets {
		d.becomes("web", n, balancer.Unhealthy, "")
	}
	for range 2 {
		c.Groups[0].HealthCheck = quick()
		if err := d.reload(c.String()); err != nil {
			t.Fatal(err)
		}
		d.waitAllHealthy()
		for _, n := range top.Targets {
			reached(t, "repaired", top.Clients[0], webPort, n.Name)
		}
		// Broken once more, by something else.
		c.Groups[0].HealthCheck["protocol"], c.Groups[0].HealthCheck["matcher"] = "HTTP", "404"
		if err := d.reload(c.String()); err != nil {
			t.Fatal(err)
		}
		for _, n := range top.Targets {
			d.becomes("web", n, balancer.Unhealthy, balancer.ReasonResponseCodeMismatch)
		}
	}
}

func weightFromZero(t *testing.T) {
	top := routed(t, lab.Options{})
	serveTargets(t, top, targetPort)
	client, t1 := top.Clients[0], top.Targets[0]
	for _, n := range top.Targets[1:] {
		serveOn(t, n, lab.Serve{Ports: []uint16{healthPort}, Networks: []string{"tcp"}})
	}
	probed := serveOn(t, t1, lab.Serve{Ports: []uint16{healthPort}, Networks: []string{"tcp"}})
	d, c := museum(t, top, func(g *group) {
		g.HealthCheck["port"] = healthPort
		for i := range g.Targets {
			if a := g.Targets[i].Address; a == t1.Addr4 || a == t1.Addr6 {
				g.Targets[i] = g.Targets[i].weighed(0)
			}
		}
	})
	d.waitAllHealthy()
	var fresh []*lab.Churning
	for _, f := range families {
		run, err := client.Agent().Churn(soon(t), lab.Churn{Interval: freshInterval,
			Call: lab.Call{Network: "tcp", Dst: f.at(webPort), Parallel: freshWorkers, Timeout: patience}})
		if err != nil {
			t.Fatal(err)
		}
		fresh = append(fresh, run)
	}
	if err := probed.Close(); err != nil {
		t.Fatal(err)
	}
	d.becomes("web", t1, balancer.Unhealthy, "")
	serveOn(t, t1, lab.Serve{Ports: []uint16{healthPort}, Networks: []string{"tcp"}})
	d.becomes("web", t1, balancer.Healthy, "")
	d.life("drain", t1, "web")
	d.life("undrain", t1, "web")
	d.becomes("web", t1, balancer.Healthy, "")
	if err := d.reload(c.String()); err != nil {
		t.Fatal(err)
	}
	d.kill()
	d.start()
	d.waitAllHealthy()
	for _, run := range fresh {
		l, err := run.Stop(soon(t))
		if err != nil {
			t.Fatal(err)
		}
		if l.ByWho[t1.Name] > 0 || l.Failed > 0 || l.OK == 0 {
			t.Errorf("weight 0: %v, want none at %s", l, t1.Name)
		}
	}
	c.Groups[0].Targets = targets(top.Targets...)
	if err := d.reload(c.String()); err != nil {
		t.Fatal(err)
	}
	reached(t, "weight 1", client, webPort, t1.Name)
}

func momentWithout(t *testing.T) {
	top := routed(t, lab.Options{Targets: 4})
	serveTargets(t, top, targetPort)
	d, c := museum(t, top, func(g *group) { g.Targets = targets(top.Targets[:2]...) })
	d.waitAllHealthy()
	var fresh []*lab.Churning
	for _, f := range families {
		run, err := top.Clients[0].Agent().Churn(soon(t), lab.Churn{Interval: freshInterval,
			Call: lab.Call{Network: "tcp", Dst: f.at(webPort), Parallel: 2, Timeout: patience}})
		if err != nil {
			t.Fatal(err)
		}
		fresh = append(fresh, run)
	}
	for n := range 30 {
		half := (n + 1) % 2 * 2
		c.Groups[0].Targets = targets(top.Targets[half : half+2]...)
		if err := d.reload(c.String()); err != nil {
			t.Fatalf("reload %d: %v", n, err)
		}
	}
	for i, run := range fresh {
		l, err := run.Stop(soon(t))
		if err != nil {
			t.Fatal(err)
		}
		if l.Failed > 0 || len(l.ByWho) != len(top.Targets) {
			t.Errorf("IPv%s: %v, want none to fail and every target to be met", families[i].name, l)
		}
	}
}

func revivedByExpiry(t *testing.T) {
	top := routed(t, lab.Options{})
	serveTargets(t, top, targetPort)
	client, t1 := top.Clients[0], top.Targets[0]
	d, _ := museum(t, top, nil)
	d.waitAllHealthy()
	const flows = 40
	open := func(what string) (at int) {
		t.Helper()
		for _, f := range families {
			h, err := client.Agent().Hold(soon(t), lab.Call{Network: "tcp", Dst: f.at(webPort), SrcAddr: f.addr(client), SrcPort: keptPort, N: flows, Parallel: 20, Timeout: patience})
			if err != nil {
				t.Fatal(err)
			}
			got := lab.Count(h.Opened)
			if got.Failed > 0 {
				t.Errorf("%s: %v", what, got)
			}
			at += got.ByWho[t1.Name]
			if err := h.Close(); err != nil {
				t.Fatal(err)
			}
		}
		return at
	}
	if open("at first") == 0 {
		t.Fatal("no flow is at the target, so this test shows nothing")
	}
	held := hold(t, client, webPort)
	d.life("drain", t1, "web")
	for _, h := range held.flows {
		if err := h.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		d.forget("tcp", webPort)
		if n := open("drained"); n > 0 {
			t.Errorf("%d flows came back to the drained target", n)
		}
		avoided(t, "drained", client, webPort, 40, t1.Name)
		if err := d.stands("web", t1, balancer.Draining, ""); err != nil {
			t.Error(err)
		}
	}
}

// reusedPort has clients that take a port again for which conntrack still has an
// entry of a closed connection, to a target that has been drained since.
func reusedPort(t *testing.T) {
	top := routed(t, lab.Options{})
	serveTargets(t, top, targetPort)
	client, t1 := top.Clients[0], top.Targets[0]
	// A client without TIME-WAIT may use the port at once, as one behind another
	// NAT would.
	if err := client.Sysctl("net.ipv4.tcp_max_tw_buckets", "0"); err != nil {
		t.Fatal(err)
	}
	d, _ := museum(t, top, nil)
	d.waitAllHealthy()
	closed := []struct {
		name  string
		first uint16
		close func(*net.TCPConn) error
	}{
		{"by the client", 21000, func(c *net.TCPConn) error {
			if err := c.CloseWrite(); err != nil {
				return err
			}
			_, err := io.Copy(io.Discard, c)
			return errors.Join(err, c.Close())
		}},
		{"by the target", 22000, func(c *net.TCPConn) error {
			if _, err := io.WriteString(c, "GET / HTTP/1.0\r\n\r\n"); err != nil {
				return err
			}
			_, err := io.Copy(io.Discard, c)
			return errors.Join(err, c.Close())
		}},
		{"by a reset", 23000, func(c *net.TCPConn) error { return errors.Join(c.SetLinger(0), c.Close()) }},
	}
	const ports = 12
	// once opens one connection and says who answers.
	once := func(f family, port uint16, end func(*net.TCPConn) error) (string, error) {
		conn, err := dialFrom(t, client, netip.AddrPortFrom(f.addr(client), port), f.at(webPort))
		if err != nil {
			return "", err
		}
		who := ask(t, conn, json.NewDecoder(conn)).Who
		return who, end(conn)
	}
	type flow struct {
		family, how int
		port        uint16
	}
	var old []flow
	for i, f := range families {
		for how, x := range closed {
			for port := x.first; port < x.first+ports; port++ {
				who, err := once(f, port, x.close)
				if err != nil {
					t.Fatalf("at first, IPv%s port %d, closed %s: %v", f.name, port, x.name, err)
				}
				if who == t1.Name {
					old = append(old, flow{i, how, port})
				}
			}
		}
	}
	d.life("drain", t1, "web")
	remembered := map[string]int{}
	for _, f := range families {
		for _, e := range d.entries(f.at(webPort)) {
			remembered[e.state]++
		}
	}
	if remembered["TIME_WAIT"] == 0 {
		t.Errorf("conntrack remembers no closed connection, so this test shows nothing: %v", remembered)
	}
	for _, x := range old {
		f := families[x.family]
		who, err := once(f, x.port, closed[x.how].close)
		if err != nil || who == t1.Name {
			t.Errorf("IPv%s, closed %s: port %d is answered by %q: %v", f.name, closed[x.how].name, x.port, who, err)
		}
	}
}

// cutOffReturns has clients that connect again as soon as they are cut off, and
// from the same ports, as kernels and NATs do. They reach the other target.
func cutOffReturns(t *testing.T) {
	top := routed(t, lab.Options{})
	serveTargets(t, top, targetPort)
	client, t1 := top.Clients[0], top.Targets[0]
	d, _ := museum(t, top, func(g *group) { g.Deregister = leaving(0, true) })
	d.waitAllHealthy()
	const first, ports = 24000, 24
	type flow struct {
		to   netip.AddrPort
		conn *net.TCPConn
	}
	var mine []flow
	for _, f := range families {
		for port := uint16(first); port < first+ports; port++ {
			conn, err := dialFrom(t, client, netip.AddrPortFrom(f.addr(client), port), f.at(webPort))
			if err != nil {
				t.Fatal(err)
			}
			if ask(t, conn, json.NewDecoder(conn)).Who == t1.Name {
				mine = append(mine, flow{f.at(webPort), conn})
			}
		}
	}
	if len(mine) == 0 {
		t.Fatal("no flow is at the target, so this test shows nothing")
	}
	d.life("drain", t1, "web")
	failures := map[string]int{}
	for _, x := range mine {
		if _, err := x.conn.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("a flow to %v ended with %v, want a reset", x.to, err)
		}
		from := x.conn.LocalAddr().(*net.TCPAddr).AddrPort()
		_ = x.conn.Close()
		conn, err := dialFrom(t, client, from, x.to)
		if err != nil {
			failures[errors.Unwrap(err).Error()]++
			continue
		}
		if who := ask(t, conn, json.NewDecoder(conn)).Who; who == t1.Name {
			failures["answered by "+who]++
		}
	}
	if len(failures) > 0 {
		t.Errorf("of %d clients that came back: %v", len(mine), failures)
	}
}

func stickyDrained(t *testing.T) {
	top := routed(t, lab.Options{Targets: 3})
	serveTargets(t, top, targetPort)
	client := top.Clients[0]
	d, _ := museum(t, top, func(g *group) { g.Stickiness = "source_ip" })
	d.waitAllHealthy()
	only := func(what string, f family) string {
		t.Helper()
		got := call(t, client, lab.Call{Network: "tcp", Dst: f.at(webPort), N: 40, Parallel: 20})
		if got.Failed > 0 || len(got.ByWho) != 1 {
			t.Fatalf("%s, IPv%s: %v, want one target", what, f.name, got)
		}
		for who := range got.ByWho {
			return who
		}
		return ""
	}
	for _, f := range families {
		mine := only("at first", f)
		n := node(t, top, mine)
		d.life("drain", n, "web")
		other := only("drained", f)
		if other == mine {
			t.Errorf("IPv%s: a sticky client still meets the drained %s", f.name, mine)
		}
		d.life("undrain", n, "web")
		d.becomes("web", n, balancer.Healthy, "")
		if now := only("registered again", f); now != mine {
			t.Errorf("IPv%s: the client meets %s, and met %s before the drain", f.name, now, mine)
		}
	}
}
