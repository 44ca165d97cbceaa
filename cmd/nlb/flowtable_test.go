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
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"

	"nlb/balancer/nft"
	"nlb/bench/lab"
)

// patience bounds every wait; an emulated machine is slow.
const patience = 30 * time.Second

// A fastLab has nlb with a flowtable between a client and two targets.
type fastLab struct {
	*lab.Topology
	t    *testing.T
	file string
	log  strings.Builder
	// open has how many connections each target has, by its name.
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

func newFastLab(t *testing.T) *fastLab {
	t.Helper()
	plane, err := nft.New(zap.NewNop(), "")
	if err != nil {
		t.Fatal(err)
	}
	err = plane.ProbeFastPath()
	if err := plane.Close(); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Skip(err)
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

// serve runs the daemon until the test ends.
func (l *fastLab) serve() {
	l.t.Helper()
	cmd := l.LB.Command(context.Background(), "nlb", "serve", "-c", l.file, "--socket", l.socket())
	cmd.Stdout, cmd.Stderr = &l.log, &l.log
	if err := cmd.Start(); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		if l.t.Failed() {
			l.t.Log(l.log.String())
		}
	})
	l.until("all targets are healthy", func() bool {
		out, err := l.command("nlb", "status", "--socket", l.socket(), "-o", "json").Output()
		return err == nil && strings.Count(string(out), `"healthy"`) == 8
	})
}

func (l *fastLab) command(name string, args ...string) interface{ Output() ([]byte, error) } {
	return l.LB.Command(l.t.Context(), name, args...)
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
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			l.t.Fatalf("not within %v: %s\n%s", patience, what, l.log.String())
		}
	}
}

// targets answer each line with it and their name.
func (l *fastLab) targets() {
	l.t.Helper()
	l.open = make(map[string]*atomic.Int64)
	for _, n := range l.Targets {
		l.open[n.Name] = new(atomic.Int64)
		for _, a := range []netip.Addr{n.Addr4, n.Addr6} {
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
			go serveLines(tcp, n.Name, l.open[n.Name])
			go serveDatagrams(udp, n.Name)
		}
	}
}

// serveLines counts those who have said something: probes do not.
func serveLines(l *net.TCPListener, name string, open *atomic.Int64) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
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
		conn, err = net.DialTimeout(network, netip.AddrPortFrom(vip, port).String(), patience)
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
	if err := conn.SetDeadline(time.Now().Add(patience / 3)); err != nil {
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

// TestFlowtable has flows of both protocols and families offloaded by the daemon,
// forgotten in time and ended.
func TestFlowtable(t *testing.T) {
	l := newFastLab(t)
	for _, f := range []struct {
		name string
		vip  netip.Addr
		of   func(*lab.Node) netip.Addr
	}{
		{"ip4", lab.VIP4, func(n *lab.Node) netip.Addr { return n.Addr4 }},
		{"ip6", lab.VIP6, func(n *lab.Node) netip.Addr { return n.Addr6 }},
	} {
		t.Run(f.name, func(t *testing.T) {
			l.t = t
			conn, udp := l.dial("tcp", f.vip, 80), l.dial("udp", f.vip, 53)
			who, whoUDP := l.offload(conn), l.offload(udp)
			l.keepsIdleTimeout(conn)
			l.offload(conn)
			l.offload(udp)
			at := func(name string) string {
				for _, n := range l.Targets {
					if n.Name == name {
						return netip.AddrPortFrom(f.of(n), 8080).String()
					}
				}
				t.Fatalf("no target %q", name)
				return ""
			}
			l.run("nlb", "drain", "tcp", at(who), "--socket", l.socket())
			begun := time.Now()
			if _, err := say(conn, "are you there?"); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("not reset but %v: %s", err, l.entry(conn))
			}
			t.Logf("reset %v after the drain", time.Since(begun))
			l.until("the target is told", func() bool { return l.open[who].Load() == 0 })
			t.Logf("both told %v after the drain", time.Since(begun))
			l.until("the flow is forgotten", func() bool { return l.entry(conn) == "" })

			l.run("nlb", "drain", "udp", at(whoUDP), "--socket", l.socket())
			begun = time.Now()
			l.until("the flow follows", func() bool {
				who, err := say(udp, "who are you?")
				return err == nil && who != whoUDP
			})
			t.Logf("followed %v after the drain", time.Since(begun))
			l.offload(udp)
			l.run("nlb", "undrain", "tcp", at(who), "--socket", l.socket())
			l.run("nlb", "undrain", "udp", at(whoUDP), "--socket", l.socket())
		})
	}
	t.Run("off", func(t *testing.T) {
		l.t = t
		conn := l.dial("tcp", lab.VIP4, 80)
		l.offload(conn)
		l.configure(false)
		l.run("nlb", "reload", "--socket", l.socket())
		l.until("no flow is offloaded", func() bool { return !strings.Contains(l.entry(conn), "OFFLOAD") })
		l.keepsIdleTimeout(conn)
		if list := l.run("nft", "list", "table", "inet", "nlb"); strings.Contains(list, "flow add") || strings.Contains(list, "flowtable") {
			t.Errorf("something is left:\n%s", list)
		}
	})
}

// keepsIdleTimeout is silent until the flow is about to be forgotten as if it had
// never been offloaded.
func (l *fastLab) keepsIdleTimeout(conn net.Conn) {
	l.t.Helper()
	if _, err := say(conn, "the last word for now"); err != nil {
		l.t.Fatal(err)
	}
	silent := time.Now()
	var line string
	var left int
	l.until("the flow has the listener's idle timeout", func() bool {
		line = l.entry(conn)
		m := secondsLeft.FindStringSubmatch(line)
		if m == nil || strings.Contains(line, "OFFLOAD") {
			return false
		}
		left, _ = strconv.Atoi(m[1])
		return left <= fastIdle
	})
	// Never too early; a packet of the conversation may have come a moment later.
	if earliest := fastIdle - int(time.Since(silent).Seconds()) - 2; left < earliest {
		l.t.Errorf("%d s left, want %d at least: %s", left, earliest, line)
	}
	l.t.Logf("%d s left after %v of silence", left, time.Since(silent))
}
