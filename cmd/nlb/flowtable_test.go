package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"

	"nlb/balancer/nft"
	"nlb/bench/lab"
	"nlb/internal/wait"
)

// patience bounds every wait; an emulated machine is slow.
const patience = 30 * time.Second

// A fastLab has nlb with a flowtable between a client and two targets.
type fastLab struct {
	*lab.Topology
	t    *testing.T
	file string
	// open has how many connections each target has, by its name and the family.
	open map[string]*atomic.Int64
}

// fastIdle is the listeners' idle timeout, the shortest there is.
const fastIdle = 60

const fastConfig = `
flowtable: %v
state_dir: %s
metrics: {address: ""}
vips: [{address: 198.51.100.10}, {address: "2001:db8:77::10"}]
listeners:
  - {name: tcp4, vip: 198.51.100.10, protocol: TCP, port: 80, tcp_idle_timeout: 60s, forward: [{target_group: tcp}]}
  - {name: tcp6, vip: "2001:db8:77::10", protocol: TCP, port: 80, tcp_idle_timeout: 60s, forward: [{target_group: tcp}]}
  - {name: udp4, vip: 198.51.100.10, protocol: UDP, port: 53, forward: [{target_group: udp}]}
  - {name: udp6, vip: "2001:db8:77::10", protocol: UDP, port: 53, forward: [{target_group: udp}]}
target_groups:
  - name: tcp
    protocol: TCP
    port: 8080
    client_ip: preserve
    deregistration_delay: {timeout: 0s, connection_termination: true}
    health_check: {interval: 5s, timeout: 4s}
    targets: &targets [{address: 10.0.1.11}, {address: 10.0.1.12}, {address: "2001:db8:1::11"}, {address: "2001:db8:1::12"}]
  - name: udp
    protocol: UDP
    port: 8080
    client_ip: preserve
    deregistration_delay: {timeout: 0s, connection_termination: true}
    health_check: {interval: 5s, timeout: 4s}
    targets: *targets
`

// missingFlowtables says what the kernel lacks.
func missingFlowtables(t *testing.T) error {
	t.Helper()
	plane, err := nft.New(zap.NewNop(), "")
	if err != nil {
		t.Fatal(err)
	}
	missing := plane.ProbeFastPath()
	if err := plane.Close(); err != nil {
		t.Fatal(err)
	}
	return missing
}

func newFastLab(t *testing.T) *fastLab {
	t.Helper()
	if missing := missingFlowtables(t); missing != nil {
		t.Skip(missing)
	}
	top, err := lab.Routed(lab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := top.Close(); err != nil {
			t.Error(err)
		}
	})
	l := &fastLab{Topology: top, t: t, file: filepath.Join(t.TempDir(), "nlb.yaml")}
	for _, vip := range []netip.Addr{lab.VIP4, lab.VIP6} {
		if err := top.LB.Address("lo", netip.PrefixFrom(vip, vip.BitLen())); err != nil {
			t.Fatal(err)
		}
	}
	// A silent flow leaves the flowtable soon.
	for _, proto := range []string{"tcp", "udp"} {
		if err := top.LB.Sysctl("net.netfilter.nf_flowtable_"+proto+"_timeout", "2"); err != nil {
			t.Fatal(err)
		}
	}
	l.targets()
	l.configure(true)
	l.serve()
	return l
}

func (l *fastLab) configure(flowtable bool) {
	l.t.Helper()
	content := fmt.Sprintf(fastConfig, flowtable, filepath.Dir(l.file))
	if err := os.WriteFile(l.file, []byte(content), 0o644); err != nil {
		l.t.Fatal(err)
	}
}

func (l *fastLab) socket() string { return filepath.Join(filepath.Dir(l.file), "nlb.sock") }

func (l *fastLab) logFile() string { return filepath.Join(filepath.Dir(l.file), "nlb.log") }

// logged is what the daemon has printed.
func (l *fastLab) logged() string {
	b, err := os.ReadFile(l.logFile())
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// serve runs the daemon until the test ends.
func (l *fastLab) serve() {
	l.t.Helper()
	cmd := l.LB.Command(context.Background(), "nlb", "serve", "-c", l.file, "--socket", l.socket())
	log, err := os.Create(l.logFile())
	if err != nil {
		l.t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		if l.t.Failed() {
			l.t.Log(l.logged())
		}
	})
	l.until("all targets are healthy", func() bool {
		out, err := l.LB.Command(l.t.Context(), "nlb", "status", "--socket", l.socket(), "-o", "json").Output()
		return err == nil && strings.Count(string(out), `"healthy"`) == 8
	})
}

func (l *fastLab) run(name string, args ...string) string {
	l.t.Helper()
	out, err := l.LB.Command(l.t.Context(), name, args...).Output()
	if err != nil {
		l.t.Fatalf("%s %q: %v", name, args, err)
	}
	return string(out)
}

func (l *fastLab) until(what string, ok func() bool) {
	l.t.Helper()
	wait.Until(l.t, patience, what, ok, l.logged)
}

// targets answer each line with it and their name.
func (l *fastLab) targets() {
	l.t.Helper()
	l.open = make(map[string]*atomic.Int64)
	for _, n := range l.Targets {
		for family, a := range map[string]netip.Addr{"ip4": n.Addr4, "ip6": n.Addr6} {
			open := new(atomic.Int64)
			l.open[n.Name+family] = open
			at := netip.AddrPortFrom(a, 8080)
			var tcp *net.TCPListener
			var udp *net.UDPConn
			err := n.Do(func() (err error) {
				if tcp, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at)); err == nil {
					udp, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
				}
				return err
			})
			if err != nil {
				l.t.Fatal(err)
			}
			l.t.Cleanup(func() { tcp.Close(); udp.Close() })
			go serveLines(tcp, n.Name, open)
			go serveDatagrams(udp, n.Name)
		}
	}
}

// serveLines counts those who have said something: probes do not.
func serveLines(l *net.TCPListener, name string, open *atomic.Int64) {
	for {
		conn, err := l.AcceptTCP()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			if err := conn.SetKeepAlive(false); err != nil {
				return
			}
			said := false
			for lines := bufio.NewScanner(conn); lines.Scan(); {
				if !said {
					said = true
					open.Add(1)
					defer open.Add(-1)
				}
				if _, err := fmt.Fprintln(conn, lines.Text(), name); err != nil {
					return
				}
			}
		}()
	}
}

func serveDatagrams(conn *net.UDPConn, name string) {
	b := make([]byte, 2048)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		_, _ = conn.WriteToUDPAddrPort(fmt.Appendln(nil, strings.TrimSpace(string(b[:n])), name), from)
	}
}

func (l *fastLab) dial(network string, vip netip.Addr, port uint16) net.Conn {
	l.t.Helper()
	var conn net.Conn
	err := l.Clients[0].Do(func() (err error) {
		// A flow is silent only without keep-alive probes.
		d := net.Dialer{Timeout: patience, KeepAlive: -1}
		conn, err = d.DialContext(l.t.Context(), network, netip.AddrPortFrom(vip, port).String())
		return err
	})
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { conn.Close() })
	return conn
}

// say sends a line and returns who answered it.
func say(conn net.Conn, line string) (who string, err error) {
	return sayWithin(patience/3, conn, line)
}

func sayWithin(limit time.Duration, conn net.Conn, line string) (who string, err error) {
	if err := conn.SetDeadline(time.Now().Add(limit)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(conn, line+"\n"); err != nil {
		return "", err
	}
	got, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return "", err
	}
	who, ok := strings.CutPrefix(strings.TrimSpace(got), line+" ")
	if !ok {
		return "", fmt.Errorf("said %q, got %q", line, got)
	}
	return who, nil
}

// entry is the line of conntrack -L about the client's flow.
func (l *fastLab) entry(conn net.Conn) string {
	l.t.Helper()
	family := "ipv4"
	local := addrPortOf(conn)
	if local.Addr().Is6() {
		family = "ipv6"
	}
	for _, line := range strings.Split(l.run("conntrack", "-L", "-f", family, "-p", conn.LocalAddr().Network(), "-o", "extended"), "\n") {
		if strings.Contains(line, fmt.Sprintf(" sport=%d ", local.Port())) {
			return line
		}
	}
	return ""
}

func addrPortOf(conn net.Conn) netip.AddrPort {
	return netip.MustParseAddrPort(conn.LocalAddr().String())
}

// offload talks until the flow is in the flowtable, and returns who answers.
func (l *fastLab) offload(conn net.Conn) (who string) {
	l.t.Helper()
	l.until("the flow is offloaded", func() bool {
		var err error
		if who, err = say(conn, "warm-up"); err != nil {
			l.t.Fatal(err)
		}
		return strings.Contains(l.entry(conn), "[OFFLOAD]")
	})
	return who
}

// secondsLeft is how long the flow of a line of conntrack -L is remembered.
var secondsLeft = regexp.MustCompile(`(?:tcp|udp) +\d+ (\d+) `)

// fastFlows are a client's flows to the VIP of one family, which are offloaded.
type fastFlows struct {
	family   string
	vip      netip.Addr
	of       func(*lab.Node) netip.Addr
	tcp, udp net.Conn
	// Who answers them.
	tcpTarget, udpTarget string
}

// targetOf is the target's address and port, as nlb drain wants it.
func (f *fastFlows) targetOf(l *fastLab, name string) string {
	i := slices.IndexFunc(l.Targets, func(n *lab.Node) bool { return n.Name == name })
	return netip.AddrPortFrom(f.of(l.Targets[i]), 8080).String()
}

// TestFlowtable has flows of both protocols and families offloaded by the daemon,
// forgotten in time and ended. What takes time is awaited for both families at once.
func TestFlowtable(t *testing.T) {
	l := newFastLab(t)
	families := []*fastFlows{
		{family: "ip4", vip: lab.VIP4, of: func(n *lab.Node) netip.Addr { return n.Addr4 }},
		{family: "ip6", vip: lab.VIP6, of: func(n *lab.Node) netip.Addr { return n.Addr6 }},
	}
	for _, f := range families {
		f.tcp, f.udp = l.dial("tcp", f.vip, 80), l.dial("udp", f.vip, 53)
	}
	for _, f := range families {
		f.tcpTarget, f.udpTarget = l.offload(f.tcp), l.offload(f.udp)
	}
	l.awaitIdleTimeout(l.lastWords(families), families)
	for _, f := range families {
		t.Run(f.family, func(t *testing.T) {
			l.t = t
			l.offload(f.tcp)
			l.offload(f.udp)
			l.endsTCP(f)
			l.movesUDP(f)
		})
	}
	l.t = t
	for _, f := range families {
		l.run("nlb", "undrain", "tcp", f.targetOf(l, f.tcpTarget), "--socket", l.socket())
		f.tcp = l.dial("tcp", f.vip, 80)
		l.offload(f.tcp)
	}
	silent := l.lastWords(families)
	l.configure(false)
	l.run("nlb", "reload", "--socket", l.socket())
	t.Logf("turned off %v later", time.Since(silent))
	// Not the whole table, which takes nft half a minute in an emulated machine.
	for _, what := range []string{"flowtables inet", "chain inet nlb forward"} {
		if list := l.run("nft", append([]string{"list"}, strings.Fields(what)...)...); strings.Contains(list, "flow add") || strings.Contains(list, "devices") {
			t.Errorf("turned off, but something is left:\n%s", list)
		}
	}
	l.awaitIdleTimeout(silent, families)
}

// endsTCP drains the target of an offloaded flow: both ends are reset.
func (l *fastLab) endsTCP(f *fastFlows) {
	l.t.Helper()
	l.run("nlb", "drain", "tcp", f.targetOf(l, f.tcpTarget), "--socket", l.socket())
	begun := time.Now()
	if _, err := say(f.tcp, "are you there?"); !errors.Is(err, syscall.ECONNRESET) {
		l.t.Errorf("not reset but %v: %s", err, l.entry(f.tcp))
	}
	l.t.Logf("reset %v after the drain", time.Since(begun))
	l.until("the target is told", func() bool { return l.open[f.tcpTarget+f.family].Load() == 0 })
	l.t.Logf("both told %v after the drain", time.Since(begun))
	l.until("the flow is forgotten", func() bool { return l.entry(f.tcp) == "" })
}

// movesUDP drains the target of an offloaded flow, which chooses anew.
func (l *fastLab) movesUDP(f *fastFlows) {
	l.t.Helper()
	l.run("nlb", "drain", "udp", f.targetOf(l, f.udpTarget), "--socket", l.socket())
	begun := time.Now()
	l.until("the flow follows", func() bool {
		// An answer on its way when its flow is removed is lost, and nobody repeats it.
		who, err := sayWithin(time.Second, f.udp, "who are you?")
		return err == nil && who != f.udpTarget
	})
	l.t.Logf("followed %v after the drain", time.Since(begun))
	l.offload(f.udp)
}

// lastWords speaks in the TCP flows once more, and returns when that was.
func (l *fastLab) lastWords(families []*fastFlows) time.Time {
	l.t.Helper()
	for _, f := range families {
		if _, err := say(f.tcp, "the last word for now"); err != nil {
			l.t.Fatal(err)
		}
	}
	return time.Now()
}

// awaitIdleTimeout waits until the TCP flows, which are silent, are about to be
// forgotten as if they had never been offloaded.
func (l *fastLab) awaitIdleTimeout(silent time.Time, families []*fastFlows) {
	l.t.Helper()
	for _, f := range families {
		var line string
		var left int
		l.until("the flow has the listener's idle timeout", func() bool {
			line = l.entry(f.tcp)
			m := secondsLeft.FindStringSubmatch(line)
			if m == nil || strings.Contains(line, "OFFLOAD") {
				return false
			}
			left, _ = strconv.Atoi(m[1])
			return left <= fastIdle
		})
		// Never too early; conntrack -L leaves fractions of seconds away.
		if earliest := fastIdle - int(time.Since(silent).Seconds()) - 2; left < earliest {
			l.t.Errorf("%d s left, want %d at least: %s", left, earliest, line)
		}
		l.t.Logf("%s: %d s left after %v of silence", f.family, left, time.Since(silent))
	}
}
