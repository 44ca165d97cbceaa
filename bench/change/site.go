package change

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"nlb/bench/lab"
	"nlb/bench/measure"
	"nlb/bench/part"
	"nlb/bench/peers"
)

// targetCount is how many targets there are. They are addresses of one node, at
// which the balancer arrives by way of another, so that a dead one is silent:
// there is no neighbour whose absence the kernel could notice.
const targetCount = 10

// targets are their addresses.
func targets() []netip.Addr {
	var all []netip.Addr
	for i := range targetCount {
		all = append(all, netip.AddrFrom4([4]byte{10, 1, 0, byte(1 + i)}))
	}
	return all
}

// A site is a contestant made real: a network of its own, alike for all, with
// the contestant on the balancer's node.
type site struct {
	way
	measure.Site
	*station
	programs part.Programs
	files    files
}

// newSite builds a contestant's network with all targets alive. The contestant
// does not run yet.
func newSite(w way, programs part.Programs) (*site, error) {
	s := &site{way: w, programs: programs}
	if err := s.build(); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", w.name, err), s.close())
	}
	return s, nil
}

func (s *site) build() (err error) {
	if err := s.Build(lab.Options{Targets: 1, Offload: true}); err != nil {
		return err
	}
	s.files.dir = s.Path("")
	if s.program == part.Nginx {
		if s.files.module, err = peers.StreamModule(); err != nil {
			return err
		}
	}
	if err := s.ManyConnections(); err != nil {
		return err
	}
	if s.program != part.NLB && s.relays() { // nlb does it itself
		if err := s.LB.Address("lo", netip.PrefixFrom(lab.VIP4, 32)); err != nil {
			return err
		}
	}
	host := s.Targets[0]
	if err := s.LB.Route(netip.MustParsePrefix("10.1.0.0/24"), host.Addr4, host.Name); err != nil {
		return err
	}
	if s.station, err = newStation(s.Clients[0], host); err != nil {
		return err
	}
	for _, t := range targets() {
		if err := s.appear(t); err != nil {
			return err
		}
	}
	return nil
}

// appear gives a target its address and starts it.
func (s *site) appear(t netip.Addr) error {
	if err := s.bind(t); err != nil {
		return err
	}
	return s.serve(t)
}

// vanish ends a target as a broken cable does: nobody answers any more.
func (s *site) vanish(t netip.Addr) error {
	return s.Targets[0].Unaddress("lo", netip.PrefixFrom(t, 32))
}

// bind is the opposite of vanish.
func (s *site) bind(t netip.Addr) error { return s.Targets[0].Address("lo", netip.PrefixFrom(t, 32)) }

// close removes the network and all in it, complete or not.
func (s *site) close() error {
	if s.station != nil {
		s.station.close()
	}
	return s.Close()
}

// An order is a change that is ready to be given.
type order struct {
	give func() error
	// signal is what it is given by, if that is so. There must be a handler: a
	// HAProxy that has just been reloaded has none at first, and ignores it.
	signal syscall.Signal
	// done has the outcome, if giving is not all there is to it.
	done chan error
}

// prepare writes a plan into the contestant's file, and returns what makes the
// contestant read it.
func (s *site) prepare(ctx context.Context, p plan) (*order, error) {
	text := s.config(p, s.LB.Addr4, s.files)
	if s.program == part.NLB {
		cmd, err := s.NLB(s.programs[part.NLB], text)
		return s.order(cmd, p, unix.SIGHUP), err
	}
	file, err := s.Write("config", text)
	if err != nil {
		return nil, err
	}
	argv, reload := s.command(file)
	if s.program == part.NFT {
		return s.load(ctx, argv), nil
	}
	return s.order(s.LB.Command(context.Background(), argv[0], argv[1:]...), p, reload), nil
}

// order starts a command, whose life is the network's, or sends the running one
// a signal.
func (s *site) order(cmd *exec.Cmd, p plan, reload syscall.Signal) *order {
	if p.again {
		return &order{signal: reload, give: func() error { return s.Balancer.Signal(reload) }}
	}
	return &order{give: func() error {
		// A session of its own, as nlb's relay always has, since the scheduler
		// shares the core among sessions (sched(7), "The autogroup feature").
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		return s.Start(cmd)
	}}
}

// load runs a command in the background. The child of a thread is in the thread's
// namespace: without lab.Node.Command, which would enter it in a first program.
func (s *site) load(ctx context.Context, argv []string) *order {
	o := &order{done: make(chan error, 1)}
	o.give = func() error {
		go func() {
			o.done <- s.LB.Do(func() error {
				if out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput(); err != nil {
					return fmt.Errorf("%s: %w: %s", argv[0], err, out)
				}
				return nil
			})
		}()
		return nil
	}
	return o
}

// heard says whether the program would take notice of an order.
func (s *site) heard(o *order) bool {
	if o.signal == 0 {
		return true
	}
	// proc_pid_status(5): the signals that are caught, signal 1 in the lowest bit.
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.Balancer.PID()))
	_, mask, found := bytes.Cut(text, []byte("SigCgt:\t"))
	if err != nil || !found || len(mask) < 16 {
		return false // it has ended
	}
	caught, err := strconv.ParseUint(string(mask[:16]), 16, 64)
	return err == nil && caught>>(o.signal-1)&1 == 1
}

// wait waits for the outcome.
func (o *order) wait() error {
	if o.done == nil {
		return nil
	}
	return <-o.done
}

// startTime is how long a contestant may take for anything it is told.
const startTime = 30 * time.Second

// explain adds what the contestant has said to an error.
func (s *site) explain(err error) error {
	switch {
	case err == nil:
		return nil
	case s.Balancer.PID() == 0:
		return fmt.Errorf("%s: %w", s.name, err)
	case s.Balancer.Ended() && !errors.Is(err, measure.ErrEnded):
		err = errors.Join(err, measure.ErrEnded)
	}
	return fmt.Errorf("%s: %w\n%s", s.name, err, s.Balancer.Said())
}

// start gives the contestant its first plan and returns how long it took until
// the first client was answered by a service.
func (s *site) start(ctx context.Context, p plan, by service) (time.Duration, error) {
	o, err := s.prepare(ctx, p)
	if err != nil {
		return 0, err
	}
	s.count()
	began := time.Now()
	if err := o.give(); err != nil {
		return 0, fmt.Errorf("start: %w", err)
	}
	ended := func() bool { return s.Balancer.PID() != 0 && s.Balancer.Ended() }
	err = s.run(ctx, load{to: by.at(), every: trying}, startTime, func() bool { return s.answered > 0 || ended() })
	took := time.Since(began)
	if err == nil && ended() {
		err = measure.ErrEnded
	}
	return took, s.explain(errors.Join(err, o.wait()))
}

// trying is how often a client tries to get an answer from a contestant that
// starts.
const trying = 5 * time.Millisecond

// settle waits until each of some targets gets flows.
func (s *site) settle(ctx context.Context, l load, targets []netip.Addr) error {
	for _, t := range targets {
		s.wire.forget(t)
	}
	err := s.run(ctx, l, startTime, func() bool {
		return !slices.ContainsFunc(targets, func(t netip.Addr) bool { return s.wire.of(t).n == 0 })
	})
	return s.explain(err)
}
