package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/bench/lab"
	"nlb/internal/wait"
)

// A probeKind is something that a health check can say, to a port of its own.
type probeKind struct {
	name     string
	protocol string
	local    bool // after a PROXY v2 LOCAL header
	port     uint16
}

var probeKinds = []probeKind{
	{"tcp", "TCP", false, 7001}, {"tcp-local", "TCP", true, 7002},
	{"http", "HTTP", false, 7003}, {"http-local", "HTTP", true, 7004},
	{"https", "HTTPS", false, 7005}, {"https-local", "HTTPS", true, 7006},
}

// probeOwn are addresses of the balancer that routes do not choose by themselves.
var probeOwn = map[string][]netip.Addr{
	"4": {netip.MustParseAddr("10.0.0.7"), netip.MustParseAddr("10.0.0.8")},
	"6": {netip.MustParseAddr("2001:db8:0:1::7"), netip.MustParseAddr("2001:db8:0:1::8")},
}

// TestProbeSourceIsNeverAVIP has targets that hold the VIPs themselves, as for
// direct return, and would take a packet from a VIP for their own. The balancer has
// them on the interface that leads to the first target, where it has no other
// address, and in the source of the route to the second, so that the kernel would
// probe both from the VIP.
func TestProbeSourceIsNeverAVIP(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{})
	probeTrap(t, top)
	for _, f := range families {
		for _, own := range probeOwn[f.name] {
			must(t, top.LB, "ip", "address", "add", own.String(), "dev", "lo")
		}
	}
	answered := probeTargets(t, top)
	for _, c := range []struct {
		name           string
		sources, check int // how many there are
	}{
		{"neither", 0, 0}, {"source_addresses", 1, 0}, {"source", 0, 1}, {"both", 1, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := config{VIPs: probeVIPs(top)}
			want := map[string]netip.Addr{} // by family; none: any but a VIP
			for _, f := range families {
				own := probeOwn[f.name]
				for _, s := range own[:c.sources] {
					cfg.Sources = append(cfg.Sources, s)
					want[f.name] = s
				}
				check := ""
				if c.check > 0 {
					want[f.name] = own[1]
					check = own[1].String()
				}
				listeners, groups := probeGroups(f, check, top.Targets...)
				cfg.Listeners = append(cfg.Listeners, listeners...)
				cfg.Groups = append(cfg.Groups, groups...)
			}
			seen := make([]*lab.Capture, len(top.Targets))
			for i, n := range top.Targets {
				seen[i] = capture(t, n, "eth0")
			}
			before := answered.locals.Load()
			d := serving(t, top, cfg)
			for i, n := range top.Targets {
				for _, f := range families {
					for _, k := range probeKinds {
						probeFrom(t, seen[i], netip.AddrPortFrom(f.addr(n), k.port), want[f.name])
					}
				}
			}
			d.waitAllHealthy()
			if text := d.log.String(); strings.Contains(text, "\"to\": \"unhealthy\"") {
				t.Error("a target was unhealthy meanwhile")
			}
			if answered.locals.Load() == before {
				t.Error("no probe began with a LOCAL header")
			}
		})
	}
	if n := answered.strangers.Load(); n > 0 {
		t.Errorf("%d probes did not begin with the LOCAL header that they should", n)
	}
}

// TestProbeSourceAtStart has probes so seldom that the first one of each target has
// to find its source.
func TestProbeSourceAtStart(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{})
	probeTrap(t, top)
	serveTargets(t, top, targetPort)
	web := pool("web", "TCP", "preserve", targetPort, targets(top.Targets...))
	web.HealthCheck["interval"] = "300s"
	d := serving(t, top, config{
		VIPs:      probeVIPs(top),
		Listeners: listen("web", "TCP", webPort, "web"),
		Groups:    []group{web},
	})
	if g := d.group("web"); g.FailOpen {
		t.Errorf("%+v", g)
	}
}

// TestProbeHasNoSource takes every address but the VIPs from the balancer. There is
// nothing to probe from then, and no packet tries.
func TestProbeHasNoSource(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Targets: 1})
	probeTrap(t, top)
	probeTargets(t, top)
	for _, link := range []string{"lo", top.Targets[0].Name, top.Clients[0].Name} {
		for _, f := range families {
			for _, own := range []netip.Addr{f.addr(top.LB), outward[f.name]} {
				_, _ = tool(t, top.LB, "ip", "address", "delete", own.String(), "dev", link) // most links have but some
			}
		}
	}
	text := must(t, top.LB, "ip", "-o", "address", "show", "scope", "global")
	if n := strings.Count(text, "\n"); n != len(families) {
		t.Fatalf("%d addresses are left, want the VIPs alone:\n%s", n, text)
	}
	cfg := config{VIPs: probeVIPs(top)}
	for _, f := range families {
		listeners, groups := probeGroups(f, "", top.Targets...)
		cfg.Listeners = append(cfg.Listeners, listeners...)
		cfg.Groups = append(cfg.Groups, groups...)
	}
	seen := capture(t, top.LB, top.Targets[0].Name)
	d := start(t, top, cfg.String())
	wait.For(t, limit, "unhealthy", func() error {
		for _, g := range d.status().TargetGroups {
			for _, x := range g.Targets {
				if x.State != balancer.Unhealthy {
					return fmt.Errorf("%s: %+v", g.Name, x)
				}
			}
		}
		return nil
	})
	for _, g := range d.status().TargetGroups {
		for _, x := range g.Targets {
			for _, word := range []string{"VIP", "source_addresses", x.Address.String()} {
				if !strings.Contains(x.Description, word) {
					t.Errorf("%s: the description does not say %q: %q", g.Name, word, x.Description)
				}
			}
			if x.Reason != balancer.ReasonFailedHealthChecks {
				t.Errorf("%s: reason %q", g.Name, x.Reason)
			}
		}
	}
	t.Log("description:", d.status().TargetGroups[0].Targets[0].Description)
	if found := packets(t, seen, func(p lab.Packet) bool { return p.Proto == unix.IPPROTO_TCP }); len(found) > 0 {
		t.Errorf("%d packets are on the wire, such as %v", len(found), found[0])
	}
}

// TestProbeSourceRefused spells a VIP in several ways where a source belongs.
func TestProbeSourceRefused(t *testing.T) {
	t.Parallel()
	address := map[string]netip.Addr{"4": netip.MustParseAddr("10.0.1.11"), "6": netip.MustParseAddr("2001:db8:1::11")}
	for _, f := range families {
		spellings := []string{f.vip.String()}
		if f.vip.Is6() {
			spellings = append(spellings, f.vip.StringExpanded(), strings.ToUpper(f.vip.String()))
		}
		for _, spelling := range spellings {
			for _, where := range []string{"source_addresses", "health_check.source"} {
				t.Run(where+" "+spelling, func(t *testing.T) {
					t.Parallel()
					g := pool("web", "TCP", "preserve", targetPort, []target{{Address: address[f.name]}})
					c := config{VIPs: both(), Listeners: []listener{{Name: "web", VIP: f.vip.String(), Protocol: "TCP", Port: 80, Forward: to("web")}}}
					const mark = "10.255.255.255" // where the spelling goes
					place := "source_addresses[0]"
					if where == "source_addresses" {
						c.Sources = []netip.Addr{netip.MustParseAddr(mark)}
					} else {
						g.HealthCheck["source"] = mark
						place = "target_groups[0].health_check.source"
					}
					c.Groups = []group{g}
					probeRefused(t, strings.Replace(c.String(), mark, fmt.Sprintf("%q", spelling), 1), place, f.vip)
				})
			}
		}
	}
}

// probeRefused fails the test unless nlb validate names the place and explains.
func probeRefused(t *testing.T, text, place string, vip netip.Addr) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "nlb.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), program, "validate", "-c", path)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("nlb validate: %v, want exit code 1", err)
	}
	for _, want := range []string{path + ":", place, vip.String() + " is a VIP", "no VIP"} {
		if !strings.Contains(stderr.String(), want) {
			t.Errorf("it does not say %q: %s", want, &stderr)
		}
	}
}

// probeTrap makes the kernel choose the VIPs for what goes to the targets, whose
// own address they are as well.
func probeTrap(t *testing.T, top *lab.Topology) {
	t.Helper()
	link := top.Targets[0].Name
	for _, f := range families {
		gateway := f.addr(top.LB).String()
		must(t, top.LB, "ip", "address", "add", f.vip.String(), "dev", link)
		must(t, top.LB, "ip", "address", "delete", gateway, "dev", link)
		for i, n := range top.Targets {
			must(t, n, "ip", "address", "add", f.vip.String(), "dev", "lo")
			if i > 0 {
				must(t, top.LB, "ip", "-"+f.name, "route", "replace", f.addr(n).String(), "dev", n.Name, "src", f.vip.String())
			}
			if text := must(t, top.LB, "ip", "route", "get", f.addr(n).String()); !strings.Contains(text, "src "+f.vip.String()+" ") {
				t.Fatalf("the kernel would not take the VIP, so this test shows nothing: %s", text)
			}
		}
		// Nobody answers for the gateway that the first target has its default route by.
		mac := strings.TrimSpace(must(t, top.LB, "cat", "/sys/class/net/"+link+"/address"))
		must(t, top.Targets[0], "ip", "neighbour", "replace", gateway, "lladdr", mac, "dev", "eth0", "nud", "permanent")
	}
}

// probeVIPs are the VIPs on the first target's link.
func probeVIPs(top *lab.Topology) []vip {
	return []vip{{lab.VIP4, top.Targets[0].Name}, {lab.VIP6, top.Targets[0].Name}}
}

// probeGroups are a listener and a group for every kind of probe.
func probeGroups(f family, source string, nodes ...*lab.Node) (listeners []listener, groups []group) {
	var of []target
	for _, n := range nodes {
		of = append(of, target{Address: f.addr(n)})
	}
	for _, k := range probeKinds {
		g := pool(k.name+"-"+f.name, "TCP", "preserve", k.port, of)
		g.HealthCheck["protocol"] = k.protocol
		if k.local {
			g.HealthCheck["proxy_protocol"] = "local"
		}
		if source != "" {
			g.HealthCheck["source"] = source
		}
		groups = append(groups, g)
		listeners = append(listeners, listener{Name: g.Name, VIP: f.vip.String(), Protocol: "TCP", Port: k.port, Forward: to(g.Name)})
	}
	return listeners, groups
}

// probeFrom waits for three probes of a port, of which each comes from want, if
// there is one, and none from a VIP.
func probeFrom(t *testing.T, seen *lab.Capture, target netip.AddrPort, want netip.Addr) {
	t.Helper()
	const enough = 3
	mine := func(p lab.Packet) bool {
		return p.To() == target && p.Flags&(lab.SYN|lab.ACK) == lab.SYN
	}
	n := 0
	if _, err := seen.Wait(soon(t), func(p lab.Packet) bool {
		if mine(p) {
			n++
		}
		return n == enough
	}); err != nil {
		t.Errorf("%v got %d probes: %v", target, n, err)
	}
	all := packets(t, seen, mine)
	sources := map[netip.Addr]int{}
	for _, p := range all {
		sources[p.Src]++
	}
	t.Logf("%v: %d probes, by source %v", target, len(all), sources)
	for _, p := range all {
		switch {
		case p.Src == lab.VIP4 || p.Src == lab.VIP6:
			t.Errorf("a probe comes from the VIP: %v", p)
		case want.IsValid() && p.Src != want:
			t.Errorf("a probe does not come from %v: %v", want, p)
		}
	}
}

// probeTally counts what probes began with.
type probeTally struct{ locals, strangers atomic.Int64 }

// probeTargets serves every kind of probe on every target.
func probeTargets(t *testing.T, top *lab.Topology) *probeTally {
	t.Helper()
	tally := new(probeTally)
	for _, n := range top.Targets {
		for _, k := range probeKinds {
			var l net.Listener
			err := n.Do(func() (err error) {
				l, err = net.Listen("tcp", fmt.Sprint(":", k.port))
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			if k.local {
				l = &probeListener{l, tally}
			}
			s := &httptest.Server{Listener: l, Config: &http.Server{
				Handler:  http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}),
				ErrorLog: log.New(io.Discard, "", 0),
			}}
			t.Cleanup(s.Close)
			if k.protocol == "HTTPS" {
				s.StartTLS()
			} else {
				s.Start()
			}
		}
	}
	return tally
}

// A probeListener demands the PROXY header of each connection.
type probeListener struct {
	net.Listener
	tally *probeTally
}

func (l *probeListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &probeConn{Conn: c, tally: l.tally}, nil
}

// A probeConn reads the header before anything else is read.
type probeConn struct {
	net.Conn
	tally *probeTally
	once  sync.Once
	err   error
}

func (c *probeConn) Read(b []byte) (int, error) {
	c.once.Do(c.header)
	if c.err != nil {
		return 0, c.err
	}
	return c.Conn.Read(b)
}

// header counts the LOCAL command with no addresses (PROXY protocol, 2.2). A
// connection that is cut before says nothing: the test may have ended the daemon.
func (c *probeConn) header() {
	const want = "\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00"
	got := make([]byte, len(want))
	switch n, err := io.ReadFull(c.Conn, got); {
	case err != nil && strings.HasPrefix(want, string(got[:n])):
		c.err = io.EOF
	case string(got) != want:
		c.tally.strangers.Add(1)
		c.err = errors.New("no LOCAL header")
	default:
		c.tally.locals.Add(1)
	}
}
