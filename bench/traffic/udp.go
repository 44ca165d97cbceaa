package traffic

import (
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"nlb/bench/lab"
	"nlb/bench/measure"
)

const (
	flowsPerTarget = 2
	batchSize      = 32
	payload        = 64 // bytes
	firstPort      = 10000
	lastPort       = 60000
	// unmeasured is how long packets go before they are measured.
	unmeasured = time.Millisecond
)

// packets sends packets of established flows. Its clock is the thread's, which
// does all of the work: what nlb and the softirq thread have of the core in the
// meantime is added.
func packets(s *site, d time.Duration, to *sample) error {
	l, err := newUDPLoad(s)
	if err != nil {
		return err
	}
	defer l.close()
	if _, _, err := l.run(unmeasured); err != nil {
		return err
	}
	c, err := newClock(append(slices.Clone(s.meter.balancer), s.meter.softirqd))
	if err != nil {
		return err
	}
	sent, received, err := l.run(d)
	if err != nil {
		return err
	}
	worked, err := c.worked()
	switch {
	case err != nil:
		return err
	case received == 0:
		return errSilence
	}
	to.add(float64(received), worked)
	to.lost += max(0, sent-received)
	return nil
}

// address is where a client's flow from a port goes.
func (s *site) address(from int) unix.SockaddrInet4 {
	a := lab.VIP4
	if !s.balanced() {
		a = s.Targets[from%targets].Addr4
	}
	return unix.SockaddrInet4{Addr: a.As4(), Port: measure.Port}
}

// A flow is a client's socket and the target that has the flow.
type flow struct{ client, target int }

// udpLoad sends packets of established flows, an equal number of flows to each
// target, whatever the balancer's hash: flows more than that are given up.
type udpLoad struct {
	flows []flow
	out   *measure.Batch
	in    *measure.Batch
}

func (l *udpLoad) close() {
	for _, f := range l.flows {
		_ = unix.Close(f.client)
	}
}

// newUDPLoad is called in the client's namespace.
func newUDPLoad(s *site) (l *udpLoad, err error) {
	// Room for two batches, so that what came late is caught up with.
	l = &udpLoad{out: measure.NewBatch(batchSize, payload), in: measure.NewBatch(2*batchSize, payload)}
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	var have [targets]int
	for p := firstPort; len(l.flows) < targets*flowsPerTarget; p++ {
		if p > lastPort {
			return nil, fmt.Errorf("no ports left, and targets have %v flows", have)
		}
		f, i, err := s.establish(p)
		if err != nil {
			return nil, fmt.Errorf("UDP flow from port %d: %w", p, err)
		}
		if have[i] == flowsPerTarget {
			_ = unix.Close(f.client)
			continue
		}
		have[i]++
		l.flows = append(l.flows, f)
	}
	return l, nil
}

// establish makes a flow: a packet there, and one back. Without the second,
// connection tracking would not call it established.
func (s *site) establish(p int) (f flow, target int, err error) {
	to := s.address(p)
	f.client, err = measure.Bind(unix.SOCK_DGRAM, s.Clients[0].Addr4, p)
	if err != nil {
		return f, 0, err
	}
	defer func() {
		if err != nil {
			_ = unix.Close(f.client)
		}
	}()
	if err := unix.Connect(f.client, &to); err != nil {
		return f, 0, os.NewSyscallError("connect", err)
	}
	if _, err := unix.Write(f.client, []byte{0}); err != nil {
		return f, 0, os.NewSyscallError("send", err)
	}
	target, err = measure.FirstReadable(measure.Readable(s.packets...))
	if err != nil {
		return f, 0, fmt.Errorf("to the targets: %w", err)
	}
	f.target = s.packets[target]
	_, from, err := unix.Recvfrom(f.target, make([]byte, 1), 0)
	if err != nil {
		return f, 0, os.NewSyscallError("recvfrom", err)
	}
	if err := unix.Sendto(f.target, []byte{0}, 0, from); err != nil {
		return f, 0, os.NewSyscallError("sendto", err)
	}
	if _, err := measure.FirstReadable(measure.Readable(f.client)); err != nil {
		return f, 0, fmt.Errorf("back to the client: %w", err)
	}
	_, err = unix.Read(f.client, make([]byte, 1))
	return f, target, os.NewSyscallError("read", err)
}

// run sends for a time, once at least, and counts what went and what came.
func (l *udpLoad) run(d time.Duration) (sent, received int, err error) {
	end := time.Now().Add(d)
	for again := true; again; again = time.Now().Before(end) {
		for _, f := range l.flows {
			n, err := l.out.Send(f.client)
			if err != nil {
				return 0, 0, os.NewSyscallError("sendmmsg", err)
			}
			sent += n
			if n, err = l.in.Receive(f.target); err != nil {
				return 0, 0, os.NewSyscallError("recvmmsg", err)
			}
			received += n
		}
	}
	return sent, received, nil
}
