package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"nlb/bench/lab"
	"nlb/internal/wait"
)

// The tests of what an operator does in years, within minutes: all ways of the
// client's address side by side, under load, while everything changes.

// A passage is a client_ip with a listener on both VIPs and a group of its own.
type passage struct {
	name, mode   string
	port, target uint16
}

var passages = []passage{
	{"preserve", "preserve", 81, 8081},
	{"hairpin", "hairpin_snat", 82, 8082},
	{"snat", "snat", 83, 8083},
	{"relayed", "proxy_protocol_v2", 84, 8084},
}

// relayed says whether the way is the relay's, which does TCP alone.
func (w passage) relayed() bool { return w.mode == "proxy_protocol_v2" }

func (w passage) protocol() string {
	if w.relayed() {
		return "TCP"
	}
	return "TCP_UDP"
}

// servePassages makes a node a target of all passages, by an agent that may be killed.
func servePassages(t *testing.T, n *lab.Node) *lab.Agent {
	t.Helper()
	a := n.NewAgent()
	for _, w := range passages {
		o := lab.Serve{Ports: []uint16{w.target}}
		if w.relayed() {
			o.Networks, o.Proxy = []string{"tcp"}, true
		}
		if _, err := a.Serve(soon(t), o); err != nil {
			t.Fatal(err)
		}
	}
	return a
}

// A setting is what reloads change, and none of which a client may notice. The
// zero value is where a test begins.
type setting struct {
	weight int  // of the first target, less one
	away   bool // the last target is not in the file
	extra  bool // a listener that nobody needs is there
	idle   int  // an index of idles
	allow  int  // an index of allowing
}

var (
	idles = []string{"350s", "6000s", "60s"}
	// allowing are lists that all have the client.
	allowing = [][]string{nil, {"203.0.113.0/24", "2001:db8:99::/64"}, {"0.0.0.0/0", "::/0"}, {"203.0.113.9", "2001:db8:99::9"}}
)

// changes are the kinds of change, each of which makes another file.
var changes = []struct {
	what string
	make func(*setting)
}{
	{"a weight", func(s *setting) { s.weight = (s.weight + 1) % 3 }},
	{"a target leaves or comes back", func(s *setting) { s.away = !s.away }},
	{"a listener comes or goes", func(s *setting) { s.extra = !s.extra }},
	{"idle timeouts", func(s *setting) { s.idle = (s.idle + 1) % len(idles) }},
	{"allow lists", func(s *setting) { s.allow = (s.allow + 1) % len(allowing) }},
}

// config is the file. Flows of the target that is away go on for an hour, which
// is longer than it stays away.
func (s setting) config(top *lab.Topology) config {
	nodes := top.Targets
	if s.away {
		nodes = nodes[:len(nodes)-1]
	}
	c := config{Sources: sources(top), VIPs: both()}
	for _, w := range passages {
		of := targets(nodes...)
		for i := range families {
			of[i*len(nodes)] = of[i*len(nodes)].weighed(1 + s.weight)
		}
		g := pool(w.name, w.protocol(), w.mode, w.target, of)
		g.Deregister = leaving(time.Hour, false)
		c.Groups = append(c.Groups, g)
		for _, l := range listen(w.name, w.protocol(), w.port, w.name) {
			l.Idle, l.Allow = idles[s.idle], ofFamily(l.VIP, allowing[s.allow])
			c.Listeners = append(c.Listeners, l)
		}
	}
	if s.extra {
		c.Listeners = append(c.Listeners, listen("extra", "TCP_UDP", webPort, "snat")...)
	}
	return c
}

// longSite is a network with a client and targets for all passages, in which a
// hundred thousand connections leave nothing behind that slows down the next.
func longSite(t *testing.T) (*lab.Topology, map[string]*lab.Agent) {
	t.Helper()
	top := routed(t, lab.Options{Targets: 4})
	// The client's ports that are in TIME-WAIT may be taken again after a second
	// (ip-sysctl, tcp_tw_reuse), and there are as many as can be.
	for key, value := range map[string]string{"net.ipv4.tcp_tw_reuse": "1", "net.ipv4.ip_local_port_range": "1024 65535"} {
		if err := top.Clients[0].Sysctl(key, value); err != nil {
			t.Fatal(err)
		}
	}
	// What is over is forgotten within seconds, not minutes: conntrack has room for
	// 262,144 flows by default, and a test ends with looking whether all are gone.
	for _, key := range []string{"tcp_timeout_time_wait", "tcp_timeout_close", "tcp_timeout_last_ack", "tcp_timeout_fin_wait",
		"tcp_timeout_close_wait", "udp_timeout", "udp_timeout_stream"} {
		if err := top.LB.Sysctl("net.netfilter.nf_conntrack_"+key, "5"); err != nil {
			t.Fatal(err)
		}
	}
	serving := map[string]*lab.Agent{}
	for _, n := range top.Targets {
		serving[n.Name] = servePassages(t, n)
	}
	return top, serving
}

// Kinds of traffic.
const (
	ofCalls     = "connection" // new ones all the time, with a question each
	ofStreams   = "stream"     // connections that are never silent; see lab.Stream
	ofDatagrams = "datagram"   // from UDP sockets that keep their port
)

// A traffic is one client's to one listener.
type traffic struct {
	way    passage
	family family
	kind   string
	calls  *lab.Churning  // of calls and datagrams
	flows  *lab.Streaming // of streams
}

func (x *traffic) String() string {
	return fmt.Sprintf("%s, IPv%s, %ss", x.way.mode, x.family.name, x.kind)
}

// A rush is how much traffic there is to each listener of each family.
type rush struct {
	callers  int           // at the same time
	pause    time.Duration // of a caller from one connection to the next
	streams  int           // which send a few lines every streamPace
	sockets  int           // of datagrams; none where it is 0
	patience time.Duration
	reopen   bool // streams that break are opened anew
}

// streamPace keeps targets, which answer under the race detector, from taking all
// the time that there is.
const streamPace = 200 * time.Millisecond

// begin starts the traffic to all passages, from the first client.
func (r rush) begin(t *testing.T, top *lab.Topology) []*traffic {
	t.Helper()
	agent := top.Clients[0].Agent()
	var all []*traffic
	for _, w := range passages {
		for _, f := range families {
			to := lab.Call{Network: "tcp", Dst: f.at(w.port), Timeout: r.patience}
			calls := lab.Churn{Call: to, Interval: r.pause}
			calls.Parallel = r.callers
			churning, err := agent.Churn(soon(t), calls)
			if err != nil {
				t.Fatal(err)
			}
			flows := lab.Stream{Call: to, Interval: streamPace, Reopen: r.reopen}
			flows.N = r.streams
			streaming, err := agent.Stream(soon(t), flows)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, &traffic{w, f, ofCalls, churning, nil}, &traffic{w, f, ofStreams, nil, streaming})
			if w.relayed() || r.sockets == 0 {
				continue
			}
			asks := lab.Churn{Call: to, Interval: 100 * time.Millisecond, Keep: true}
			asks.Network, asks.Parallel = "udp", r.sockets
			asking, err := agent.Churn(soon(t), asks)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, &traffic{w, f, ofDatagrams, asking, nil})
		}
	}
	return all
}

// A score is what traffic has met: exchanges that went well, which of streams are
// lines, and those that failed.
type score struct {
	well, failed int
	open         int // streams
	failures     []lab.Failure
	gap          time.Duration // the longest without a connection or an answer; not of streams
}

// met is the score up to now.
func (x *traffic) met(t *testing.T) score {
	t.Helper()
	if x.flows != nil {
		s, err := x.flows.Load(soon(t))
		if err != nil {
			t.Fatal(err)
		}
		return streamed(s)
	}
	l, err := x.calls.Load(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	return called(l)
}

// stop ends the traffic.
func (x *traffic) stop(t *testing.T) score {
	t.Helper()
	if x.flows != nil {
		s, err := x.flows.Stop(soon(t))
		if err != nil {
			t.Fatal(err)
		}
		return streamed(s)
	}
	l, err := x.calls.Stop(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	return called(l)
}

func called(l lab.Load) score {
	return score{well: l.OK, failed: l.Failed, failures: l.Failures, gap: l.Gap}
}

func streamed(s lab.Streamed) score {
	return score{well: int(s.Lines), failed: s.Failed, open: s.Open, failures: s.Failures}
}

// A release is an nlb that can be installed.
type release struct{ path, version string }

// releases builds nlb once more, as another version, and puts both where install
// finds them.
func releases(t *testing.T, d *daemon) [2]release {
	t.Helper()
	other := filepath.Join(d.dir, "other")
	out, err := exec.CommandContext(t.Context(), "go", "build", "-ldflags=-X=main.packaged=0.0.0-other", "-o", other, "nlb/cmd/nlb").CombinedOutput()
	if err != nil {
		t.Fatalf("build nlb: %v\n%s", err, out)
	}
	one := filepath.Join(d.dir, "one")
	copyProgram(t, one)
	all := [2]release{{path: one}, {path: other}}
	for i := range all {
		out, err := exec.CommandContext(t.Context(), all[i].path, "version").Output()
		if err != nil {
			t.Fatal(err)
		}
		all[i].version = strings.TrimSpace(string(out))
	}
	if all[0].version == all[1].version {
		t.Fatalf("both programs are %q", all[0].version)
	}
	return all
}

// install puts a release in the place of the program that runs, the way that
// packages do: the old file is there for those who have it open.
func (d *daemon) install(r release) {
	d.t.Helper()
	d.installed = filepath.Join(d.dir, "nlb")
	fresh := d.installed + ".new"
	err := os.Link(r.path, fresh)
	if err == nil {
		err = os.Rename(fresh, d.installed)
	}
	if err != nil {
		d.t.Fatal(err)
	}
}

// upgrade installs a release and replaces the daemon, which is stopped or killed.
// It returns when the relay is of that release as well.
func (d *daemon) upgrade(to release, end func()) {
	d.t.Helper()
	former := d.relay()
	d.install(to)
	end()
	d.start()
	wait.For(d.t, limit, "a relay of "+to.version, func() error {
		now, err := d.relayPID()
		if err == nil && now == former {
			err = errors.New("the former one serves")
		}
		return err
	})
}
