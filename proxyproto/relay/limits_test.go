package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/internal/wait"
)

func TestMaxConnections(t *testing.T) {
	const most = 20
	to := port(target4, 8020)
	serveTarget(t, to, echo)
	r := startRelay(t, Options{Loops: 2, MaxConnections: most}, tableOf(destinations(to), vip4))
	var conns []*net.TCPConn
	for i := range most {
		conns = append(conns, call(t, vip4))
		roundTrip(t, conns[i], "in")
	}
	waits := call(t, vip4) // in the listener's queue
	io.WriteString(waits, "waits")
	wait.Until(t, waitAtMost, "the listeners to be shut", func() bool {
		for _, l := range r.loops {
			l.mu.Lock()
			shut := l.shut
			l.mu.Unlock()
			if shut {
				return true
			}
		}
		return false
	})
	if n := r.Stats().Connections; n != most {
		t.Errorf("%d connections, want %d", n, most)
	}
	conns[0].Close()
	got := make([]byte, 5)
	if _, err := io.ReadFull(waits, got); err != nil || string(got) != "waits" {
		t.Errorf("the one that waited got %q, %v", got, err)
	}
}

// takeFiles leaves the process no descriptor, and returns what gives one back.
func takeFiles(t *testing.T) (giveOne func()) {
	t.Helper()
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	highest := 0
	for _, e := range entries {
		var n int
		fmt.Sscan(e.Name(), &n)
		highest = max(highest, n)
	}
	var taken []int
	for len(taken) == 0 || taken[len(taken)-1] <= highest {
		fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		taken = append(taken, fd)
	}
	now := unix.Rlimit{Cur: uint64(taken[len(taken)-1] + 1), Max: before.Max}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &now); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &before)
		for _, fd := range taken {
			unix.Close(fd)
		}
	})
	return func() {
		unix.Close(taken[0])
		taken = taken[1:]
	}
}

// rawCall calls with a socket that exists already, and wants a reset.
func rawCall(t *testing.T, fd int, vip netip.AddrPort) {
	t.Helper()
	err := unix.Connect(fd, &unix.SockaddrInet4{Addr: vip.Addr().As4(), Port: int(vip.Port())})
	if err == nil {
		_, err = unix.Read(fd, make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the client's error is %v", err)
	}
}

func TestOutOfDescriptors(t *testing.T) {
	to := port(target4, 8021)
	serveTarget(t, to, echo)
	r := startRelay(t, Options{Loops: 1}, tableOf(destinations(to), vip4))
	stays := call(t, vip4)
	roundTrip(t, stays, "before")
	var fds []int
	for range 6 {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		fds = append(fds, fd)
	}
	t.Run("none", func(t *testing.T) {
		giveOne := takeFiles(t)
		for _, fd := range fds[:3] {
			rawCall(t, fd, vip4)
		}
		roundTrip(t, stays, "meanwhile")
		giveOne() // for the client's socket, not for the target's
		for _, fd := range fds[3:] {
			rawCall(t, fd, vip4)
		}
	})
	if n := r.Stats().Exhausted; n < 6 {
		t.Errorf("counted %d", n)
	}
	roundTrip(t, call(t, vip4), "after")
}

// TestIdleConnections reports what an idle connection costs, which is two
// descriptors and no buffer.
func TestIdleConnections(t *testing.T) {
	const most = 2000
	to := port(target4, 8022)
	serveTarget(t, to, echo)
	r := startRelay(t, Options{Loops: 2}, tableOf(destinations(to), vip4))
	files := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	before := files()
	conns := make([]*net.TCPConn, most)
	for i := range conns {
		conns[i] = call(t, vip4)
	}
	for _, c := range conns {
		roundTrip(t, c, "hello")
	}
	// One of each pair is the client's, one the target's.
	if got := float64(files()-before)/most - 2; got > 2.05 {
		t.Errorf("an idle connection has %.2f descriptors", got)
	}
	for _, l := range r.loops {
		l.mu.Lock()
		if n := l.machine.size(); n < most/4 {
			t.Errorf("a loop has %d of %d connections", n, most)
		}
		for _, c := range l.machine.conns {
			if c.up.holds() || c.down.holds() {
				t.Error("an idle connection holds bytes")
			}
		}
		l.mu.Unlock()
	}
	t.Logf("%d bytes for a connection", connBytes())
}

// connBytes measures what one connection object takes of the heap.
func connBytes() uint64 {
	var before, after runtime.MemStats
	const n = 10_000
	conns := make([]*conn, n)
	runtime.ReadMemStats(&before)
	for i := range conns {
		conns[i] = &conn{}
	}
	runtime.ReadMemStats(&after)
	runtime.KeepAlive(conns)
	return (after.HeapAlloc - before.HeapAlloc) / n
}

// TestRunReleasesEverything counts descriptors around a relay that ends with
// connections in every state.
func TestRunReleasesEverything(t *testing.T) {
	to, table := port(target4, 8025), tableOf(destinations(port(target4, 8025)), vip4)
	serveTarget(t, to, echo)
	opened := func() map[string]int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		kinds := make(map[string]int)
		for _, e := range entries {
			link, _ := os.Readlink("/proc/self/fd/" + e.Name())
			for _, kind := range []string{"eventpoll", "eventfd", "pipe:", "/dev/null", "socket:"} {
				if strings.Contains(link, kind) {
					kinds[kind]++
				}
			}
		}
		return kinds
	}
	files := listenersFor(t, table)
	before := opened()
	r, err := New(Options{Loops: 2})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Configure(table, files); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx) }()
	conns := make([]*net.TCPConn, 20)
	for i := range conns {
		conns[i] = call(t, vip4)
		roundTrip(t, conns[i], "hello")
	}
	cancel()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	for _, c := range conns {
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the client's error is %v", err)
		}
		c.Close()
	}
	before["socket:"]-- // the listener
	wait.Until(t, waitAtMost, "the targets to close", func() bool { return opened()["socket:"] <= before["socket:"] })
	if diff := cmp.Diff(before, opened()); diff != "" {
		t.Errorf("descriptors before and after: %s", diff)
	}
	if err := r.Configure(table, nil); err == nil {
		t.Error("it can be configured after its end")
	}
	if err := r.Run(t.Context()); err == nil {
		t.Error("it can run again")
	}
}

// TestRandomOpenings: whatever a client begins with, even if it looks like a
// header, arrives behind the one header, and whichever way it ends.
func TestRandomOpenings(t *testing.T) {
	to := port(target4, 8023)
	serveTarget(t, to, echo)
	r := startRelay(t, Options{Loops: 2}, tableOf(destinations(to), vip4))
	random := rand.New(rand.NewPCG(1, 1))
	var all errgroup.Group
	all.SetLimit(20)
	for i := range 200 {
		opening := pattern(fmt.Sprint(i), random.IntN(600))
		if i%4 == 0 {
			opening = append([]byte("\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c"), opening...)
		}
		all.Go(func() error {
			c, err := tryCall(vip4)
			if err != nil {
				return err
			}
			defer c.Close()
			if _, err := c.Write(opening); err != nil {
				return err
			}
			got := make([]byte, len(opening))
			if _, err := io.ReadFull(c, got); err != nil {
				return err
			}
			if string(got) != string(opening) {
				return fmt.Errorf("opening %d came back as something else", i)
			}
			if i%3 == 0 {
				return c.SetLinger(0)
			}
			return c.CloseWrite()
		})
	}
	if err := all.Wait(); err != nil {
		t.Error(err)
	}
	wait.Until(t, waitAtMost, "the connections to end", func() bool { return r.Stats().Connections == 0 })
}

// TestUrgent: urgent bytes travel in the stream.
func TestUrgent(t *testing.T) {
	to := port(target4, 8024)
	serveTarget(t, to, echo)
	startRelay(t, Options{Loops: 1}, tableOf(destinations(to), vip4))
	c := call(t, vip4)
	roundTrip(t, c, "one ")
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Write(func(fd uintptr) bool {
		err = unix.Sendto(int(fd), []byte("two "), unix.MSG_OOB, nil)
		return true
	}); err != nil {
		t.Fatal(err)
	}
	io.WriteString(c, "three")
	c.CloseWrite()
	if got, err := io.ReadAll(c); err != nil || string(got) != "two three" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestShareFiles(t *testing.T) {
	tests := []struct {
		files, loops, most int
		listeners          int
		pipes, connections int // no connections: an error
	}{
		{files: 1024, loops: 2, pipes: 32, connections: (1024 - 64 - 6 - 128) / 2},
		{files: 1024, loops: 2, listeners: 100, pipes: 32, connections: (1024 - 64 - 6 - 128 - 300) / 2},
		{files: 1024, loops: 2, listeners: 1000, pipes: 32},
		{files: 1 << 20, loops: 4, pipes: 256, connections: (1<<20 - 64 - 12 - 2048) / 2},
		{files: 1 << 20, loops: 4, most: 100, listeners: 100, pipes: 256, connections: 100},
		{files: 64, loops: 1, pipes: 4},
	}
	for _, tt := range tests {
		b := shareFiles(tt.files, tt.loops, tt.most)
		got, err := b.connections(tt.listeners)
		if (err != nil) != (tt.connections == 0) || got != tt.connections || b.pipes != tt.pipes {
			t.Errorf("%+v: %d connections, %d pipes, %v", tt, got, b.pipes, err)
		}
	}
}

// TestListenersTakeFiles: what a relay may open is shared anew when services come
// and go.
func TestListenersTakeFiles(t *testing.T) {
	r := startRelay(t, Options{Loops: 1}, tableOf(nil, vip4))
	one := r.Stats().MaxConnections
	two := tableOf(nil, vip4, vip6)
	if err := r.Configure(two, listenersFor(t, &balancer.Table{Services: two.Services[1:]})); err != nil {
		t.Fatal(err)
	}
	if most, fewer := r.Stats().MaxConnections, (listenerFiles+1)/2; most >= one || most < one-fewer {
		t.Errorf("%d connections beside two listeners, %d beside one", most, one)
	}
	if err := r.Configure(tableOf(nil, vip4), nil); err != nil {
		t.Fatal(err)
	}
	if most := r.Stats().MaxConnections; most != one {
		t.Errorf("%d connections when there is one listener again, %d before", most, one)
	}
	r.files.free = 2 + listenerFiles
	before := r.Stats()
	err := r.Configure(two, listenersFor(t, &balancer.Table{Services: two.Services[1:]}))
	if err == nil || !strings.Contains(err.Error(), "too few for 2 services") {
		t.Errorf("more services than files: %v", err)
	}
	if after := r.Stats(); after.MaxConnections != before.MaxConnections {
		t.Errorf("a refused table changed %d to %d", before.MaxConnections, after.MaxConnections)
	}
	r.Retire(time.Now().Add(time.Hour))
	if err := r.Configure(two, nil); err != nil {
		t.Errorf("services of its successor: %v", err)
	}
	if most := r.Stats().MaxConnections; most != (2+listenerFiles)/2 {
		t.Errorf("%d connections without a listener", most)
	}
}

func TestLongSilenceOfTheClock(t *testing.T) {
	b := newBench(t, 1, connects)
	b.event(b.target)
	b.m.turn(int64(24 * time.Hour)) // as after a suspended host
	if !b.client.gotRST {
		t.Error("the idle timeout was missed")
	}
}
