package worker

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp/cmpopts"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/internal/nstest"
	"nlb/internal/wait"
)

// lifetime ends a worker whose test binary was killed.
const lifetime = 2 * time.Minute

// This binary is also the worker: "relay SOCKET VERSION", as a Manager starts
// it; and a stranger: "knock SOCKET".
func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == "relay" {
		os.Exit(beWorker(os.Args[2], os.Args[3]))
	}
	if len(os.Args) == 3 && os.Args[1] == "knock" {
		if hello, err := sayHello(context.Background(), os.Args[2]); err == nil {
			fmt.Println("let in by", hello.PID)
		}
		os.Exit(0)
	}
	os.Exit(nstest.Main(m))
}

func beWorker(socket, version string) int {
	ctx, cancel := context.WithTimeout(context.Background(), lifetime)
	defer cancel()
	log, err := zap.NewDevelopment()
	if err == nil {
		err = Run(ctx, WorkerOptions{Socket: socket, RetireAfter: time.Minute, User: DefaultUser, Version: version, Log: log})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "worker:", err)
		return 1
	}
	return 0
}

// values lets cmp compare addresses.
var values = cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{}, netip.Prefix{})

const (
	waitAtMost = 30 * time.Second
	version    = "v2"
)

var (
	vip    = netip.MustParseAddr("198.51.100.10")
	vip6   = netip.MustParseAddr("2001:db8::10")
	source = netip.MustParseAddr("10.0.0.2")
	client = netip.MustParseAddr("203.0.113.9")
	target = netip.MustParseAddrPort("10.0.1.11:8080")
)

func run(t *testing.T, words string) {
	t.Helper()
	args := strings.Fields(words)
	if out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", words, err, out)
	}
}

// A rig is a host with a VIP, a client and a target, all on its loopback.
type rig struct {
	t      *testing.T
	socket string
	output *os.File
	logs   *observer.ObservedLogs
	*Manager
}

func newRig(t *testing.T) *rig {
	t.Helper()
	for _, a := range []string{"198.51.100.10/32", "10.0.0.2/32", "203.0.113.9/32", "10.0.1.11/32"} {
		run(t, "ip addr replace "+a+" dev lo")
	}
	// Ports of connections that ended are free again after a second, not a minute:
	// the tests make tens of thousands.
	run(t, "sysctl -qw net.ipv4.tcp_tw_reuse=1")
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("2000 65000"), 0); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	r := &rig{t: t, socket: filepath.Join(dir, "relay.sock")}
	var err error
	if r.output, err = os.Create(filepath.Join(dir, "output")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.close()
		killWorkers(t, r.socket)
		_ = r.output.Close()
		if text, err := os.ReadFile(r.output.Name()); t.Failed() && err == nil {
			t.Logf("workers said:\n%s", text)
		}
	})
	r.Manager = r.manager(version)
	return r
}

// manager is another controller of the same worker.
func (r *rig) manager(version string) *Manager {
	r.t.Helper()
	program, err := os.Executable()
	if err != nil {
		r.t.Fatal(err)
	}
	core, logs := observer.New(zap.InfoLevel)
	r.logs = logs
	log := zaptest.NewLogger(r.t, zaptest.WrapOptions(zap.WrapCore(func(c zapcore.Core) zapcore.Core { return zapcore.NewTee(c, core) })))
	return New(ManagerOptions{
		Socket: r.socket, Program: program, Output: r.output, Version: version, Log: log,
		Args: func() []string { return []string{"relay", r.socket, version} },
	})
}

// workers lists the processes that serve or served at a socket.
func workers(t *testing.T, socket string) []int {
	t.Helper()
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, file := range lines {
		text, err := os.ReadFile(file)
		args := strings.Split(string(text), "\x00")
		if err != nil || len(args) < 3 || args[1] != "relay" || args[2] != socket {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	return pids
}

func killWorkers(t *testing.T, socket string) {
	for _, pid := range workers(t, socket) {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	wait.Until(t, waitAtMost, "the end of all workers", func() bool { return len(workers(t, socket)) == 0 })
	// Without a command line a process may still have files.
	wait.Until(t, waitAtMost, "the end of their listeners", func() bool { return bindable(netip.AddrPortFrom(vip, 80)) == nil })
}

// supervise runs m until the test ends or stop is called, which does not say
// goodbye to the worker.
func (r *rig) supervise(m *Manager) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- m.Run(ctx) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-ended; err != nil {
			r.t.Errorf("Run: %v", err)
		}
	}
	r.t.Cleanup(stop)
	return stop
}

func service(a netip.AddrPort, pool string) balancer.VirtualService {
	any := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	if a.Addr().Is6() {
		any = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	return balancer.VirtualService{
		Name: "web-" + strconv.Itoa(int(a.Port())), Address: a.Addr(), Port: a.Port(), Protocols: []uint8{balancer.ProtoTCP},
		IdleTimeout: 350 * time.Second, Allow: []netip.Prefix{any},
		Pools: []balancer.WeightedPool{{Pool: pool, Weight: 1}},
	}
}

func pool(name string, mode balancer.ClientIP, targets ...netip.AddrPort) balancer.Pool {
	p := balancer.Pool{Name: name, Protocols: []uint8{balancer.ProtoTCP}, ClientIP: mode}
	for _, a := range targets {
		p.Destinations = append(p.Destinations, balancer.Destination{
			Address: a.Addr(), Port: a.Port(), Weight: 1, Domain: []netip.Prefix{netip.PrefixFrom(a.Addr(), a.Addr().BitLen())},
		})
	}
	return p
}

// web is what a host with one relayed service on some ports wants.
func web(ports ...uint16) *balancer.Table {
	t := &balancer.Table{
		Key: balancer.HashKey{1, 2, 3}, VIPs: []netip.Addr{vip}, Sources: []netip.Addr{source},
		Pools: []balancer.Pool{pool("web", balancer.ProxyProtocolV2, target)},
	}
	for _, p := range ports {
		t.Services = append(t.Services, service(netip.AddrPortFrom(vip, p), "web"))
	}
	return t
}

// converge makes both Parts hold a table and returns what they changed.
func converge(t *testing.T, m *Manager, want *balancer.Table) []string {
	t.Helper()
	var lines []string
	err := balancer.Converge(t.Context(), []balancer.Part{m.Opener(), m.Closer()}, &balancer.Desired{Table: want},
		func(p balancer.PartPlan) { lines = append(lines, p.Plan.Lines()...) })
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

// hello is who serves now, or as soon as a worker that leaves has left.
func (r *rig) hello() (h Hello) {
	r.t.Helper()
	wait.Until(r.t, waitAtMost, "an answer", func() bool {
		var err error
		h, err = sayHello(r.t.Context(), r.socket)
		return err == nil
	})
	return h
}

// serveTarget answers at the target: it drops the PROXY header and echoes.
func serveTarget(t *testing.T) {
	t.Helper()
	nstest.Serve(t, target.String(), func(c net.Conn) {
		var head [16]byte
		if _, err := io.ReadFull(c, head[:]); err != nil {
			return
		}
		if _, err := io.CopyN(io.Discard, c, int64(head[14])<<8+int64(head[15])); err != nil {
			return
		}
		_, _ = io.Copy(c, c)
	})
}

// connect opens a connection of the client.
func connect(ctx context.Context, port uint16) (net.Conn, error) {
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(client, 0)), Timeout: waitAtMost}
	return d.DialContext(ctx, "tcp", netip.AddrPortFrom(vip, port).String())
}

// talk says a line and hears it.
func talk(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(waitAtMost)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, "hello\n"); err != nil {
		return err
	}
	line, err := bufio.NewReaderSize(c, 16).ReadString('\n')
	if err == nil && line != "hello\n" {
		err = fmt.Errorf("heard %q", line)
	}
	return err
}

// visit connects, talks and leaves.
func visit(ctx context.Context, port uint16) error {
	c, err := connect(ctx, port)
	if err != nil {
		return err
	}
	err = talk(c)
	_ = c.Close()
	return err
}

// A load visits again and again.
type load struct {
	visits atomic.Int64
	stop   func() []error
}

// visitors runs n of them until stop is called, which says what went wrong.
func visitors(t *testing.T, n int, port uint16) *load {
	ctx, cancel := context.WithCancel(context.Background())
	l := new(load)
	results := make(chan []error, n)
	for range n {
		go func() {
			var errs []error
			for ctx.Err() == nil {
				if err := visit(context.Background(), port); err != nil {
					errs = append(errs, err)
				}
				l.visits.Add(1)
			}
			results <- errs
		}()
	}
	l.stop = sync.OnceValue(func() []error {
		cancel()
		var all []error
		for range n {
			all = append(all, <-results...)
		}
		return all
	})
	t.Cleanup(func() { l.stop() })
	return l
}

// openFiles counts the open files of a process.
func openFiles(t *testing.T, pid int) int {
	t.Helper()
	names, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

func kill(t *testing.T, pid int, s syscall.Signal) {
	t.Helper()
	if err := unix.Kill(pid, s); err != nil {
		t.Fatal(err)
	}
}
