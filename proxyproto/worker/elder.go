package worker

import (
	"context"
	"errors"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"nlb/balancer"
	"nlb/proxyproto/relay"
)

// An elder is a worker that retires, under the care of the one that serves: its
// connections follow the table, and count. When that one retires in its turn, it
// hands the link over.
type elder struct {
	link link
	pid  int

	turn chan struct{} // has one element while a request is on its way; guards lost
	lost bool          // gone, or handed over

	last Stats // guarded by elders.mu: as it said last
}

func newElder(l link, pid int, last Stats) *elder {
	return &elder{link: l, pid: pid, turn: make(chan struct{}, 1), last: last}
}

// takeTurn waits until no request is on its way; it reports false if ctx ends
// first.
func (e *elder) takeTurn(ctx context.Context) bool {
	select {
	case e.turn <- struct{}{}:
		return true
	default: // a free turn is taken even when ctx has ended
	}
	select {
	case e.turn <- struct{}{}:
		return true
	case <-ctx.Done():
		return false
	}
}

func (e *elder) giveTurn() { <-e.turn }

// elderWaits bound the waits for elders while somebody waits for us, who gives up
// after answerWithin. All elders are asked at the same time.
type elderWaits struct {
	// counts is for what they count: passive checks ask for it ten times a second,
	// and what an elder said last will do.
	counts time.Duration
	answer time.Duration // for all else
	// stop is for their end: nobody can end one whose link we have closed.
	stop time.Duration
	// lost is how long one may take to answer before nobody asks it any more.
	lost time.Duration
}

var usualWaits = elderWaits{counts: 50 * time.Millisecond, answer: 2 * time.Second, stop: 8 * time.Second, lost: answerWithin}

// elders are all that were not lost.
type elders struct {
	waits  elderWaits
	log    *zap.Logger
	asking sync.WaitGroup // requests, which may outlast the wait for them

	mu  sync.Mutex // guards all below
	all []*elder
	// past is what those counted that are gone: counters must not go back.
	past       Stats
	generation uint64 // of the table that they are to follow
}

func (es *elders) add(e *elder) {
	es.mu.Lock()
	defer es.mu.Unlock()
	es.all = append(es.all, e)
}

func (es *elders) list() []*elder {
	es.mu.Lock()
	defer es.mu.Unlock()
	return slices.Clone(es.all)
}

// ask asks all elders the same and returns the answers of those that give one in
// time. The requests to the others go on: a process that gets no processor for a
// while has not gone.
func (es *elders) ask(f frame, within time.Duration) []message {
	list := es.list()
	if len(list) == 0 {
		return nil // as nearly always
	}
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	answers := make(chan message, len(list))
	for _, e := range list {
		es.asking.Go(func() {
			m, err := es.request(ctx, e, f)
			m.close() // nothing that comes with files is asked for
			// Those that are gone need not follow, nor those that we hang up on.
			if err != nil && !errors.Is(err, ErrNotRunning) && !errors.Is(err, net.ErrClosed) {
				es.log.Error("a relay worker that retires does not follow", zap.Int("pid", e.pid), zap.Error(err))
			}
			answers <- m
		})
	}
	var all []message
	for range list {
		select {
		case m := <-answers:
			all = append(all, m)
		case <-ctx.Done():
			return all
		}
	}
	return all
}

// request asks an elder when its turn comes. Once sent, the request does not end
// with ctx. One that does not answer at all is lost.
func (es *elders) request(ctx context.Context, e *elder, f frame) (message, error) {
	e.takeTurn(context.Background())
	defer e.giveTurn()
	switch {
	case e.lost:
		return message{}, ErrNotRunning
	case es.needless(ctx, f):
		return message{}, nil
	}
	bound, cancel := context.WithTimeout(context.WithoutCancel(ctx), es.waits.lost)
	defer cancel()
	m, err := e.link.request(bound, f, nil)
	es.mu.Lock()
	defer es.mu.Unlock()
	if _, refused := errors.AsType[refusal](err); err != nil && !refused {
		e.link.close()
		e.lost = true
		es.past = merge(es.past, past(e.last))
		es.remove(e)
	}
	if m.Stats != nil {
		e.last = m.Stats.stats()
	}
	return m, err
}

// remove takes e from the list; mu is held.
func (es *elders) remove(e *elder) {
	es.all = slices.DeleteFunc(es.all, func(other *elder) bool { return other == e })
}

// needless reports whether a request whose turn has come is of no use any more:
// nobody waits for what it asks, or a later table is to be followed.
func (es *elders) needless(ctx context.Context, f frame) bool {
	switch f.Op {
	case opStats, opFlows:
		return ctx.Err() != nil
	case opConfigure:
		es.mu.Lock()
		defer es.mu.Unlock()
		return f.Generation != es.generation
	}
	return false
}

// retire makes a worker retire and takes over its own elders.
func (es *elders) retire(ctx context.Context, e *elder, until time.Time) error {
	es.add(e)
	m, err := es.request(ctx, e, frame{Op: opRetire, Until: until})
	if err != nil {
		return err
	}
	m.files.close()
	var errs []error
	for i, fd := range m.links {
		l, err := linkOf(fd)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		es.add(newElder(l, m.Elders[i].PID, m.Elders[i].Stats.stats()))
	}
	return errors.Join(errs...)
}

// linkOf makes a link of a descriptor, which it closes.
func linkOf(fd int) (link, error) {
	f := os.NewFile(uintptr(fd), "control connection")
	defer func() { _ = f.Close() }()
	c, err := net.FileConn(f)
	if err != nil {
		return link{}, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		return link{}, errors.Join(errors.New("a control connection that is no Unix socket"), c.Close())
	}
	return link{u}, nil
}

// handOver gives the elders away, the latest if there are too many for a frame:
// nothing more is asked of them. The links are the caller's. One that does not
// answer in time stays in our care for as long as we are there.
func (es *elders) handOver() (infos []elderInfo, links []link) {
	ctx, cancel := context.WithTimeout(context.Background(), es.waits.answer)
	defer cancel()
	list := es.list()
	for _, e := range list[max(0, len(list)-filesPerFrame):] {
		if !e.takeTurn(ctx) { // an answer is on its way
			continue
		}
		if !e.lost {
			e.lost = true
			es.mu.Lock()
			infos = append(infos, elderInfo{PID: e.pid, Stats: *toWire(e.last)})
			links = append(links, e.link)
			es.remove(e)
			es.mu.Unlock()
		}
		e.giveTurn()
	}
	return infos, links
}

// configure makes them follow the table: they end the connections of targets
// that are being terminated. One that is slow to answer does so later.
func (es *elders) configure(f frame) {
	es.mu.Lock()
	es.generation = f.Generation
	es.mu.Unlock()
	es.ask(frame{Op: opConfigure, Table: f.Table, Generation: f.Generation}, es.waits.answer)
}

func (es *elders) stop() { es.ask(frame{Op: opStop}, es.waits.stop) }

// close hangs up, which ends all requests; wait returns when they have ended.
func (es *elders) close() {
	for _, e := range es.list() {
		e.link.close()
	}
}

func (es *elders) wait() { es.asking.Wait() }

// flows lists their connections.
func (es *elders) flows() []Flow {
	var flows []Flow
	for _, m := range es.ask(frame{Op: opFlows}, es.waits.answer) {
		flows = append(flows, m.Flows...)
	}
	return flows
}

// stats sums what they count and what those before them counted.
func (es *elders) stats() Stats {
	es.ask(frame{Op: opStats}, es.waits.counts)
	es.mu.Lock()
	defer es.mu.Unlock()
	all := es.past
	for _, e := range es.all {
		all = merge(all, e.last)
	}
	return all
}

// merge adds what two relays counted, for all targets of either.
func merge(a, b Stats) Stats {
	targets := maps.Clone(a.Targets)
	if targets == nil {
		targets = make(map[balancer.TargetKey]relay.TargetStats, len(b.Targets))
	}
	for k := range b.Targets {
		if _, known := targets[k]; !known {
			targets[k] = relay.TargetStats{}
		}
	}
	a.Targets = targets
	return sum(a, b)
}
