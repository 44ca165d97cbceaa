package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/balancer/control"
	"nlb/bench/lab"
	"nlb/internal/wait"
)

const (
	// delay is the deregistration delay of groups whose deadline is watched.
	delay = 4 * time.Second
	// slack is how far from its deadline the end of a flow may be.
	slack = time.Second
	// follow is how long a UDP client may be without a target that there is.
	follow = time.Second
)

// leaving is a group's deregistration_delay.
func leaving(timeout time.Duration, terminate bool) map[string]any {
	return map[string]any{"timeout": timeout.String(), "connection_termination": terminate}
}

// life runs nlb drain or nlb undrain for both addresses of a target, in several
// groups at the same time, and returns when the last of them had returned.
func (d *daemon) life(verb string, n *lab.Node, groups ...string) time.Time {
	d.t.Helper()
	var wg sync.WaitGroup
	outputs := make([]output, len(groups)*len(families))
	for i, group := range groups {
		for j, f := range families {
			wg.Go(func() { outputs[i*len(families)+j] = d.override(verb, group, f.addr(n).String()) })
		}
	}
	wg.Wait()
	for _, out := range outputs {
		if out.code != 0 {
			d.t.Fatalf("nlb %s: exit %d: %s%s", verb, out.code, out.stdout, out.stderr)
		}
	}
	return time.Now()
}

// override runs nlb drain or nlb undrain.
func (d *daemon) override(verb string, args ...string) output {
	return d.run(slices.Concat([]string{verb}, args, []string{"--socket", d.socket})...)
}

// standing is what status says of a node as a target, by both of its addresses.
func (d *daemon) standing(group string, n *lab.Node) []control.Target {
	d.t.Helper()
	return slices.DeleteFunc(d.group(group).Targets, func(x control.Target) bool {
		return x.Address != n.Addr4 && x.Address != n.Addr6
	})
}

// stands says what is wrong unless both targets of a node are in a state for a
// reason.
func (d *daemon) stands(group string, n *lab.Node, state balancer.State, reason string) error {
	d.t.Helper()
	found := d.standing(group, n)
	if len(found) != len(families) {
		return fmt.Errorf("%s is in %s as %+v", n.Name, group, found)
	}
	for _, x := range found {
		if x.State != state || reason != "" && x.Reason != reason {
			return fmt.Errorf("%v in %s is %v for %q, want %v for %q", x.AddrPort(), group, x.State, x.Reason, state, reason)
		}
	}
	return nil
}

// becomes waits until both targets of a node are in a state.
func (d *daemon) becomes(group string, n *lab.Node, state balancer.State, reason string) {
	d.t.Helper()
	wait.For(d.t, limit, fmt.Sprintf("%s in %s: %v", n.Name, group, state), func() error {
		return d.stands(group, n, state, reason)
	})
}

// disappears waits until a group does not know a node any more.
func (d *daemon) disappears(group string, n *lab.Node) {
	d.t.Helper()
	wait.For(d.t, limit, n.Name+" leaves "+group, func() error {
		if found := d.standing(group, n); len(found) > 0 {
			return fmt.Errorf("still there: %+v", found)
		}
		return nil
	})
}

// avoided fails the test unless new flows to a port work and none is a target's.
func avoided(t *testing.T, what string, client *lab.Node, port uint16, flows int, who string) {
	t.Helper()
	for _, f := range families {
		got := call(t, client, lab.Call{Network: "tcp", Dst: f.at(port), N: flows, Parallel: 20})
		t.Logf("%s, IPv%s: %d of %d new flows to port %d are at %s", what, f.name, got.ByWho[who], got.OK, port, who)
		if got.ByWho[who] > 0 || got.Failed > 0 {
			t.Errorf("%s, IPv%s: new flows to port %d: %v, want none at %s", what, f.name, port, got, who)
		}
	}
}

// reached fails the test unless new flows to a port work and some are a target's.
func reached(t *testing.T, what string, client *lab.Node, port uint16, who string) {
	t.Helper()
	const flows = 60
	for _, f := range families {
		got := call(t, client, lab.Call{Network: "tcp", Dst: f.at(port), N: flows, Parallel: 20})
		if got.ByWho[who] == 0 || got.Failed > 0 {
			t.Errorf("%s, IPv%s: new flows to port %d: %v, want some at %s", what, f.name, port, got, who)
		}
	}
}

// A holding is flows to one port of both VIPs that stay open.
type holding struct {
	t     *testing.T
	port  uint16
	flows []*lab.Flows // in the order of families
}

// hold opens so many flows that each of two targets has some in each family:
// that one has none is less likely than 1 in 4 million.
func hold(t *testing.T, client *lab.Node, port uint16) *holding {
	t.Helper()
	h := &holding{t: t, port: port}
	for _, f := range families {
		h.flows = append(h.flows, held(t, client, lab.Call{Network: "tcp", Dst: f.at(port), N: 24, Parallel: 12, Timeout: patience}))
	}
	return h
}

// at are the flows of one family that a target has.
func (h *holding) at(family int, who string) []lab.Reply {
	return slices.DeleteFunc(slices.Clone(h.flows[family].Opened), func(r lab.Reply) bool { return r.Who != who })
}

// alive fails the test unless the flows of the targets echo as ever.
func (h *holding) alive(when string, who ...string) {
	h.t.Helper()
	h.all(when+": flows are broken or moved", who, func(x lab.Flow) bool { return !x.Broken() && !x.Moved() })
}

// over fails the test unless the flows of the targets were reset.
func (h *holding) over(when string, who ...string) {
	h.t.Helper()
	h.all(when+": flows are not reset", who, func(x lab.Flow) bool { return x.Now.Err == lab.Reset })
}

// all fails the test unless something holds for each flow of the targets.
func (h *holding) all(otherwise string, who []string, holds func(lab.Flow) bool) {
	h.t.Helper()
	var found []lab.Flow
	for _, flows := range h.flows {
		all, err := flows.Check(soon(h.t))
		if err != nil {
			h.t.Fatal(err)
		}
		found = append(found, slices.DeleteFunc(all, func(x lab.Flow) bool { return !slices.Contains(who, x.First.Who) })...)
	}
	if len(found) == 0 {
		h.t.Fatalf("no flow to port %d is at %v", h.port, who)
	}
	if bad := slices.DeleteFunc(slices.Clone(found), holds); len(bad) > 0 {
		h.t.Errorf("%s: %d of %d to port %d, such as %+v", otherwise, len(bad), len(found), h.port, bad[0])
	}
}

// A witness sees what the first client and all targets receive.
type witness struct {
	t       *testing.T
	top     *lab.Topology
	client  *lab.Capture
	targets map[string]*lab.Capture
}

func watch(t *testing.T, top *lab.Topology) *witness {
	t.Helper()
	w := &witness{t: t, top: top, client: capture(t, top.Clients[0], "eth0"), targets: map[string]*lab.Capture{}}
	for _, n := range top.Targets {
		w.targets[n.Name] = capture(t, n, "eth0")
	}
	return w
}

// A path is one direction of a flow, as one of its ends sees it.
type path struct{ from, to netip.AddrPort }

// resets are the first resets that a capture saw arrive.
func (w *witness) resets(c *lab.Capture) map[path]time.Time {
	w.t.Helper()
	first := map[path]time.Time{}
	for _, p := range packets(w.t, c, func(p lab.Packet) bool { return !p.Out && p.Flags&lab.RST != 0 }) {
		way := path{p.From(), p.To()}
		if _, ok := first[way]; !ok {
			first[way] = p.Time
		}
	}
	return first
}

// ends are when both ends of flows of one target received a reset, the client's
// before the target's; zero times where they did not.
func (w *witness) ends(to netip.AddrPort, flows []lab.Reply) []time.Time {
	w.t.Helper()
	if len(flows) == 0 {
		w.t.Fatalf("no flow to %v", to)
	}
	client, target := w.resets(w.client), w.resets(w.targets[flows[0].Who])
	var times []time.Time
	for _, r := range flows {
		times = append(times, client[path{to, r.From}], target[path{netip.AddrPortFrom(r.Peer, r.Port), r.Local}])
	}
	return times
}

// cut waits until both ends of a target's flows were reset, and fails the test
// unless that was between two moments.
func (w *witness) cut(what string, h *holding, who string, earliest, latest time.Time) {
	w.t.Helper()
	for i, f := range families {
		w.reset(fmt.Sprintf("%s: flows of %s", what, who), f.at(h.port), h.at(i, who), earliest, latest)
	}
}

// reset waits until both ends of some flows of one target were reset, and fails
// the test unless that was between two moments.
func (w *witness) reset(what string, to netip.AddrPort, flows []lab.Reply, earliest, latest time.Time) {
	w.t.Helper()
	var times []time.Time
	wait.For(w.t, limit, fmt.Sprintf("%s to %v: resets", what, to), func() error {
		times = w.ends(to, flows)
		var missing [2]int
		for j, at := range times {
			if at.IsZero() {
				missing[j%2]++
			}
		}
		if missing != [2]int{} {
			return fmt.Errorf("of %d flows, %d clients and %d targets saw none", len(times)/2, missing[0], missing[1])
		}
		return nil
	})
	first, last := slices.MinFunc(times, time.Time.Compare), slices.MaxFunc(times, time.Time.Compare)
	w.t.Logf("%s to %v: both ends of %d flows reset between %v and %v after the earliest moment, %v before the latest", what, to, len(flows),
		first.Sub(earliest).Round(time.Millisecond), last.Sub(earliest).Round(time.Millisecond), latest.Sub(last).Round(time.Millisecond))
	if first.Before(earliest) || last.After(latest) {
		w.t.Errorf("%s to %v: reset between %v and %v after the earliest moment, which is %v before the latest",
			what, to, first.Sub(earliest), last.Sub(earliest), latest.Sub(earliest))
	}
}

// spared fails the test if an end of a target's flows was reset.
func (w *witness) spared(what string, h *holding, who string) {
	w.t.Helper()
	for i, f := range families {
		resets := slices.DeleteFunc(w.ends(f.at(h.port), h.at(i, who)), time.Time.IsZero)
		if len(resets) > 0 {
			w.t.Errorf("%s: flows of %s to %v saw %d resets, one at %v", what, who, f.at(h.port), len(resets), resets[0])
		}
	}
}

// leaks fails the test if the client received anything that a target sent and
// nobody translated, or a target something for a VIP.
func (w *witness) leaks() {
	w.t.Helper()
	raw := func(p lab.Packet) bool {
		return !p.Out && slices.ContainsFunc(w.top.Targets, func(n *lab.Node) bool { return p.Src == n.Addr4 || p.Src == n.Addr6 })
	}
	if found := packets(w.t, w.client, raw); len(found) > 0 {
		w.t.Errorf("%d packets reached the client un-NATed, such as %v", len(found), found[0])
	}
	for name, c := range w.targets {
		raw := func(p lab.Packet) bool { return !p.Out && (p.Dst == lab.VIP4 || p.Dst == lab.VIP6) }
		if found := packets(w.t, c, raw); len(found) > 0 {
			w.t.Errorf("%d packets reached %s un-NATed, such as %v", len(found), name, found[0])
		}
	}
}

// dialFrom opens a connection from a node's port, which may have been used before.
func dialFrom(t *testing.T, n *lab.Node, from, to netip.AddrPort) (*net.TCPConn, error) {
	t.Helper()
	d := net.Dialer{Timeout: patience, KeepAlive: -1, LocalAddr: net.TCPAddrFromAddrPort(from)}
	d.Control = func(_, _ string, raw syscall.RawConn) error {
		var opt error
		err := raw.Control(func(fd uintptr) {
			opt = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
		})
		return errors.Join(err, opt)
	}
	var conn net.Conn
	err := n.Do(func() (err error) {
		conn, err = d.DialContext(t.Context(), "tcp", to.String())
		return err
	})
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn.(*net.TCPConn), conn.SetDeadline(time.Now().Add(limit))
}

// A talker is a connection that is never silent.
type talker struct {
	flow  lab.Reply
	ended chan struct{} // closed when it is over
	at    time.Time     // when it was; valid when ended is closed
	err   error         // why; valid when ended is closed
}

// talk opens connections until one is at a target, and talks on it.
func talk(t *testing.T, client *lab.Node, to netip.AddrPort, who string) *talker {
	t.Helper()
	const tries = 30
	addr := client.Addr4
	if to.Addr().Is6() {
		addr = client.Addr6
	}
	for range tries {
		conn, err := dialFrom(t, client, netip.AddrPortFrom(addr, 0), to)
		if err != nil {
			t.Fatal(err)
		}
		answers := json.NewDecoder(conn)
		x := &talker{ended: make(chan struct{}), flow: lab.Reply{
			Answer: ask(t, conn, answers), From: conn.LocalAddr().(*net.TCPAddr).AddrPort(),
		}}
		if x.flow.Who == who {
			// It is closed with the test, however long that takes.
			if err := conn.SetDeadline(time.Time{}); err != nil {
				t.Fatal(err)
			}
			go x.run(conn, answers)
			return x
		}
		_ = conn.Close()
	}
	t.Fatalf("none of %d connections to %v is at %s", tries, to, who)
	return nil
}

// ask returns what is answered on a connection.
func ask(t *testing.T, conn io.Writer, answers *json.Decoder) lab.Answer {
	t.Helper()
	var a lab.Answer
	_, err := io.WriteString(conn, "who\n")
	if err == nil {
		err = answers.Decode(&a)
	}
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func (x *talker) run(conn net.Conn, answers *json.Decoder) {
	defer close(x.ended)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for range tick.C {
		var a lab.Answer
		if _, x.err = io.WriteString(conn, "who\n"); x.err == nil {
			x.err = answers.Decode(&a)
		}
		if x.err != nil {
			x.at = time.Now()
			return
		}
	}
}

// A pulse is a UDP client with one port that asks every 20 ms, answered or not.
type pulse struct {
	t    *testing.T
	to   netip.AddrPort
	conn *net.UDPConn

	mu    sync.Mutex
	sent  []time.Time // guarded by mu; of each question
	heard []heard     // guarded by mu
}

// heard is the answer to a question.
type heard struct {
	who       string
	asked, at time.Time
}

// beat begins a pulse. It ends with the test.
func beat(t *testing.T, n *lab.Node, f family, to netip.AddrPort) *pulse {
	t.Helper()
	p := &pulse{t: t, to: to, conn: bindUDP(t, n, netip.AddrPortFrom(f.addr(n), 0), mayFragment)}
	// It is closed with the test; some tests are longer than a wait may be.
	if err := p.conn.SetDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	go p.ask()
	go p.hear()
	return p
}

// beats begins a pulse to a port of each VIP.
func beats(t *testing.T, n *lab.Node, port uint16) []*pulse {
	t.Helper()
	var all []*pulse
	for _, f := range families {
		all = append(all, beat(t, n, f, f.at(port)))
	}
	return all
}

func (p *pulse) ask() {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for n := 0; ; n++ {
		p.mu.Lock()
		p.sent = append(p.sent, time.Now())
		p.mu.Unlock()
		_, err := p.conn.WriteToUDPAddrPort([]byte(strconv.Itoa(n)), p.to)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		<-tick.C
	}
}

func (p *pulse) hear() {
	for b := make([]byte, 2048); ; {
		n, _, err := p.conn.ReadFromUDPAddrPort(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		var a lab.Answer
		if err != nil || json.Unmarshal(b[:n], &a) != nil {
			continue
		}
		question, err := strconv.Atoi(a.Got)
		p.mu.Lock()
		if err == nil && question < len(p.sent) {
			p.heard = append(p.heard, heard{a.Who, p.sent[question], time.Now()})
		}
		p.mu.Unlock()
	}
}

// since are the questions after a moment, counted, and their answers.
func (p *pulse) since(moment time.Time) (questions int, answers []heard) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, at := range p.sent {
		if at.After(moment) {
			questions++
		}
	}
	for _, h := range p.heard {
		if h.asked.After(moment) {
			answers = append(answers, h)
		}
	}
	return questions, answers
}

// last is who answered last.
func (p *pulse) last() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.heard) == 0 {
		return ""
	}
	return p.heard[len(p.heard)-1].who
}

// found waits until the pulse is answered, and returns by whom.
func (p *pulse) found(what string) string {
	p.t.Helper()
	wait.For(p.t, limit, fmt.Sprintf("%s: an answer from %v", what, p.to), func() error {
		if p.last() == "" {
			return errors.New("none")
		}
		return nil
	})
	return p.last()
}

// enough is the number of questions that tell whether there is an answer.
const enough = 25

// answered fails the test unless one of the targets answers a question of the time
// after a moment, no later than follow after it, and from then on nobody else does.
func (p *pulse) answered(what string, moment time.Time, who ...string) {
	p.t.Helper()
	var by heard
	wait.For(p.t, limit, fmt.Sprintf("%s: an answer of %v from %v", what, who, p.to), func() error {
		_, answers := p.since(moment)
		i := slices.IndexFunc(answers, func(h heard) bool { return slices.Contains(who, h.who) })
		if i < 0 {
			return fmt.Errorf("%d answers, the last by %q", len(answers), p.last())
		}
		by = answers[i]
		return nil
	})
	took := by.at.Sub(moment)
	p.t.Logf("%s, %v: %s answers %v after the change", what, p.to, by.who, took.Round(time.Millisecond))
	if took > follow {
		p.t.Errorf("%s, %v: %s answers %v after the change, want %v at most", what, p.to, by.who, took.Round(time.Millisecond), follow)
	}
	for _, h := range p.after(what, by.asked) {
		if h.who != by.who {
			p.t.Errorf("%s, %v: %s answers when %s had answered before", what, p.to, h.who, by.who)
			return
		}
	}
}

// unanswered fails the test if somebody answers a question of the time after a
// moment.
func (p *pulse) unanswered(what string, moment time.Time) {
	p.t.Helper()
	if answers := p.after(what, moment); len(answers) > 0 {
		p.t.Errorf("%s, %v: %d answers, such as %+v", what, p.to, len(answers), answers[0])
	}
}

// after waits for some more questions and returns the answers.
func (p *pulse) after(what string, moment time.Time) []heard {
	p.t.Helper()
	var answers []heard
	wait.For(p.t, limit, what+": further questions", func() error {
		var questions int
		if questions, answers = p.since(moment); questions < enough {
			return fmt.Errorf("%d", questions)
		}
		return nil
	})
	return answers
}

// without are all nodes' names but one's.
func without(nodes []*lab.Node, name string) []string {
	var rest []string
	for _, n := range nodes {
		if n.Name != name {
			rest = append(rest, n.Name)
		}
	}
	return rest
}

// node is a topology's target by its name.
func node(t *testing.T, top *lab.Topology, name string) *lab.Node {
	t.Helper()
	i := slices.IndexFunc(top.Targets, func(n *lab.Node) bool { return n.Name == name })
	if i < 0 {
		t.Fatalf("no target is %q", name)
	}
	return top.Targets[i]
}

// mentions says whether our table has an address of a node.
func (d *daemon) mentions(n *lab.Node) bool {
	d.t.Helper()
	words := d.tableWords()
	return slices.ContainsFunc(words, func(w string) bool {
		return w == n.Addr4.String() || w == n.Addr6.String() || strings.HasPrefix(w, n.Addr4.String()+"/")
	})
}
