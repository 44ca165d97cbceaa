package relay

import (
	"bufio"
	"context"
	"io"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// BenchmarkConnections opens a connection through the relay, asks 64 bytes, gets
// them back and closes; "direct" does the same without the relay.
func BenchmarkConnections(b *testing.B) {
	to := port(target4, 9001)
	serveRaw(b, to)
	startRelay(b, Options{Loops: 1}, tableOf(destinations(to), vip4))
	b.Run("relay", func(b *testing.B) { connections(b, vip4) })
	b.Run("direct", func(b *testing.B) { connections(b, to) })
}

func connections(b *testing.B, to netip.AddrPort) {
	b.ReportAllocs()
	b.SetParallelism(8)
	b.RunParallel(func(pb *testing.PB) {
		asked, got := make([]byte, 64), make([]byte, 64)
		for pb.Next() {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err == nil {
				err = unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())})
			}
			if err != nil {
				b.Error(err)
				return
			}
			_, _ = unix.Write(fd, asked)
			for n := 0; n < len(got); {
				more, err := unix.Read(fd, got[n:])
				if err != nil || more == 0 {
					b.Errorf("%d bytes, then %v", n, err)
					break
				}
				n += more
			}
			// As a client that has its answer: no TIME_WAIT at either end.
			_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
			_ = unix.Close(fd)
		}
	})
}

// serveRaw echoes 64 bytes, behind a header or not, without allocating.
func serveRaw(b *testing.B, at netip.AddrPort) {
	l := listen(b, at)
	b.Cleanup(func() { l.Close() })
	for range 16 {
		go func() {
			buf := make([]byte, 4096)
			for {
				c, err := l.AcceptTCP()
				if err != nil {
					return
				}
				for n, want := 0, 64; n < want; {
					more, err := c.Read(buf[n:])
					if err != nil {
						break
					}
					if n == 0 && buf[0] == '\r' {
						want += 28
					}
					n += more
				}
				_, _ = c.Write(buf[:64])
				_, _ = c.Read(buf) // the end
				c.Close()
			}
		}()
	}
}

// BenchmarkBulk is one connection that carries bytes from the client to the
// target.
func BenchmarkBulk(b *testing.B) {
	to := port(target4, 9002)
	var sinks sync.WaitGroup
	serveTarget(b, to, func(g *greeted) { defer sinks.Done(); _, _ = io.Copy(io.Discard, g.r) })
	startRelay(b, Options{Loops: 1}, tableOf(destinations(to), vip4))
	chunk := make([]byte, 256<<10)
	b.SetBytes(int64(len(chunk)))
	b.ReportAllocs()
	sinks.Add(1)
	c := call(b, vip4)
	for b.Loop() {
		if _, err := c.Write(chunk); err != nil {
			b.Fatal(err)
		}
	}
	c.CloseWrite()
	sinks.Wait()
}

// BenchmarkRoundTrip is a question and an answer on a connection that stays.
func BenchmarkRoundTrip(b *testing.B) {
	to := port(target4, 9003)
	serveTarget(b, to, echo)
	startRelay(b, Options{Loops: 1}, tableOf(destinations(to), vip4))
	c := call(b, vip4)
	r := bufio.NewReader(c)
	b.ReportAllocs()
	buf := make([]byte, 64)
	for b.Loop() {
		if _, err := c.Write(buf); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(r, buf); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkMachine is a short connection without a kernel.
func BenchmarkMachine(b *testing.B) {
	k := newFakeKernel(b, 0)
	m, s, _ := newMachine(b, k, tableOf(destinations(port(target4, 1), port(target4, 2)), vip4))
	m.kernel = quiet{}
	b.ReportAllocs()
	for b.Loop() {
		m.start(3, port(client4, 40000), s)
		c := m.conns[0]
		m.note(c.token(1), unix.EPOLLOUT)
		m.note(c.token(0), unix.EPOLLOUT)
		m.turn(0)
		m.note(c.token(1), unix.EPOLLIN|unix.EPOLLRDHUP)
		m.note(c.token(0), unix.EPOLLIN|unix.EPOLLRDHUP)
		m.turn(0)
	}
}

// A quiet kernel does nothing at once.
type quiet struct{ kernel }

func (quiet) watch(int32, token) unix.Errno                              { return 0 }
func (quiet) acknowledge(int32)                                          {}
func (quiet) dial(netip.AddrPort, netip.Addr, token) (int32, unix.Errno) { return 4, 0 }
func (quiet) read(int32, []byte) (int, unix.Errno)                       { return 64, 0 }
func (quiet) write(_ int32, p []byte) (int, unix.Errno)                  { return len(p), 0 }
func (quiet) finish(int32) unix.Errno                                    { return 0 }
func (quiet) close(int32)                                                {}

// BenchmarkStats has a thousand targets and says how long they hold up a loop,
// of the whole.
func BenchmarkStats(b *testing.B) {
	var to []netip.AddrPort
	for i := range uint16(1000) {
		to = append(to, port(target4, 1000+i))
	}
	r, err := New(Options{Loops: 2})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		_ = r.Run(ctx)
	})
	if err := r.Configure(tableOf(destinations(to...)), nil); err != nil {
		b.Fatal(err)
	}
	targets := slices.Collect(maps.Values(r.plan.targets))
	sums := make([]TargetStats, len(targets))
	b.Run("all", func(b *testing.B) {
		for b.Loop() {
			r.Stats()
		}
	})
	b.Run("held", func(b *testing.B) {
		for b.Loop() {
			var s Stats
			s.addLoop(r.loops[0], targets, sums)
		}
	})
}
