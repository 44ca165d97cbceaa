package change

import (
	"context"
	"time"

	"golang.org/x/sys/unix"

	"nlb/bench/part"
)

// A size is how large a configuration is.
type size struct {
	services int
	// Cases of metrics that it is measured for.
	cold, change, memory string
	// rare is measured in the first round of a full run alone: it takes some
	// contestants very long.
	rare bool
}

var sizes = []size{
	{services: 100, cold: "100 x 10, cold", change: "100 x 10, one target", memory: "100 x 10"},
	{services: 1000, cold: "1,000 x 10, cold", change: "1,000 x 10, one target", memory: "1,000 x 10", rare: true},
}

// scalePort is the one of the first service.
const scalePort = 1000

// plan has ten targets for each service, which are all the same, so that nlb has
// no more than ten to probe: nobody else looks after targets here.
func (z size) plan() plan {
	var p plan
	for i := range z.services {
		p.services = append(p.services, service{scalePort + uint16(i), targets()})
	}
	return p
}

// A scaling is what a large configuration costs.
type scaling struct {
	cold, change time.Duration
	memory       int64 // bytes; 0 for contestants without a process
}

// scale starts the site's contestant with a large configuration, and takes one
// target away from the service in the middle. It wraps errLate if the contestant
// is not ready in time.
func (s *site) scale(ctx context.Context, z size) (r scaling, err error) {
	p := z.plan()
	if r.cold, err = s.start(ctx, p, p.services[z.services-1]); err != nil {
		return r, err
	}
	if r.memory, err = s.rest(ctx); err != nil {
		return r, err
	}
	n := z.services / 2
	l := load{to: p.services[n].at(), every: reloadRate}
	if err := s.settle(ctx, l, targets()); err != nil {
		return r, err
	}
	r.change, err = s.remove(ctx, p, n, l)
	return r, err
}

// abandon ends a contestant that is late. It cannot be ended before the kernel is
// through with what it was told last.
func (s *site) abandon() {
	if s.Balancer.PID() != 0 {
		_ = s.Balancer.Signal(unix.SIGKILL) // or it has ended
	}
	s.Balancer.Join()
}

// quiet is how long a contestant is left alone before its memory is read.
const quiet = 300 * time.Millisecond

// rest is the memory of the contestant's processes a moment later.
func (s *site) rest(ctx context.Context) (int64, error) {
	if s.program == part.NFT {
		return 0, nil
	}
	if err := s.pass(ctx, load{}, quiet); err != nil {
		return 0, s.explain(err)
	}
	return proportional(s.LB.NS)
}

// idleFlows is how many connections are open that nobody uses.
const idleFlows = 2000

// A crowd is what connections cost that are open.
type crowd struct{ empty, full int64 } // bytes; full may be 0

// hold starts the site's contestant with one listener and, if it is to be full,
// opens connections through it.
func (s *site) hold(ctx context.Context, full bool) (r crowd, err error) {
	by := service{scalePort, targets()}
	if _, err := s.start(ctx, plan{services: []service{by}}, by); err != nil {
		return r, err
	}
	if err := s.drain(ctx); err != nil {
		return r, s.explain(err)
	}
	if r.empty, err = s.rest(ctx); err != nil || !full {
		return r, err
	}
	s.count()
	s.keep = true
	l := load{to: by.at(), every: reloadRate / 2, most: idleFlows}
	if err := s.run(ctx, l, startTime, func() bool { return s.answered == idleFlows }); err != nil {
		return r, s.explain(err)
	}
	r.full, err = s.rest(ctx)
	return r, err
}
