package healthcheck

import (
	"bufio"
	"context"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// startTarget starts a process that accepts on every loopback address, and
// returns its port.
func startTarget(b *testing.B) uint16 {
	b.Helper()
	process := exec.Command(os.Args[0])
	process.Env = append(os.Environ(), asTarget+"=1")
	stdin, err := process.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	stdout, err := process.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := process.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { stdin.Close(); process.Wait() })
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		b.Fatal(err)
	}
	return netip.MustParseAddrPort(strings.TrimSpace(line)).Port()
}

// BenchmarkTCP is one probe after the other, of a target in another process.
func BenchmarkTCP(b *testing.B) {
	c := Check{Target: netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), startTarget(b))}
	b.ReportAllocs()
	for b.Loop() {
		if r := new(Prober).Probe(b.Context(), c); !r.OK() {
			b.Fatal(r)
		}
	}
}

// BenchmarkTenThousand has 10,000 targets probed every second until b.N probes
// were made, and reports the processor time of this process. On loopback, that
// includes the kernel's work for the target's side. Run it with
// -benchtime=50000x.
func BenchmarkTenThousand(b *testing.B) {
	port := startTarget(b)
	for name, probe := range map[string]func(context.Context, Check) Result{
		"TCP":      nil,
		"schedule": func(context.Context, Check) Result { return Result{Kind: OK} },
	} {
		b.Run(name, func(b *testing.B) {
			made, enough := 0, make(chan bool)
			count := make(chan Result, 1024)
			p := probe
			if p == nil {
				p = new(Prober).Probe
			}
			s := New(Options{Probe: func(ctx context.Context, c Check) Result {
				r := p(ctx, c)
				select {
				case count <- r:
				case <-ctx.Done():
				}
				return r
			}})
			go func() {
				defer close(enough)
				for ; made < b.N; made++ {
					if r := <-count; !r.OK() {
						b.Error(r)
					}
				}
			}()
			checks := make([]Check, 10_000)
			for i := range checks {
				address := netip.AddrFrom4([4]byte{127, 1, byte(i >> 8), byte(i)})
				checks[i] = everySecond(netip.AddrPortFrom(address, port))
			}
			s.Set(checks)
			ctx, cancel := context.WithCancel(b.Context())
			done := make(chan error, 1)
			before, began := processorTime(b), time.Now()
			go func() { done <- s.Run(ctx) }()
			<-enough
			used, took := processorTime(b)-before, time.Since(began)
			cancel()
			<-done
			b.ReportMetric(float64(b.N)/took.Seconds(), "probes/s")
			b.ReportMetric(float64(used.Microseconds())/float64(b.N), "cpu-µs/probe")
			b.ReportMetric(0, "ns/op")
		})
	}
}

func processorTime(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
