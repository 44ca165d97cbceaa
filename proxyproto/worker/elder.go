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

	mu   sync.Mutex // one request at a time; guards lost
	lost bool       // gone, or handed over

	last Stats // guarded by elders.mu: as it said last
}

// elders are all that were not lost.
type elders struct {
	mu  sync.Mutex // guards all below
	all []*elder
	// past is what those counted that are gone: counters must not go back.
	past Stats
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

// elderWithin bounds the wait for an elder's answer, while somebody waits for
// ours. It leaves time for others within answerWithin.
const elderWithin = 2 * time.Second

// ask asks an elder. One that does not answer has ended, or is not to be waited
// for again. One that is to retire may take longer: it waits for elders of its own.
func (es *elders) ask(ctx context.Context, e *elder, f frame) (message, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.lost {
		return message{}, ErrNotRunning
	}
	if f.Op != opRetire {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, elderWithin)
		defer cancel()
	}
	m, err := e.link.request(ctx, f, nil)
	es.mu.Lock()
	defer es.mu.Unlock()
	if err != nil {
		e.link.close()
		e.lost = true
		es.past = merge(es.past, past(e.last))
		es.all = slices.DeleteFunc(es.all, func(other *elder) bool { return other == e })
		return message{}, err
	}
	if m.Stats != nil {
		e.last = m.Stats.stats()
	}
	return m, nil
}

// retire makes a worker retire and takes over its own elders.
func (es *elders) retire(ctx context.Context, e *elder, until time.Time) error {
	es.add(e)
	m, err := es.ask(ctx, e, frame{Op: opRetire, Until: until})
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
		es.add(&elder{link: l, pid: m.Elders[i].PID, last: m.Elders[i].Stats.stats()})
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
// nothing more is asked of them. The links are the caller's.
func (es *elders) handOver() (infos []elderInfo, links []link) {
	list := es.list()
	for _, e := range list[max(0, len(list)-filesPerFrame):] {
		e.mu.Lock() // no answer is on its way
		lost := e.lost
		e.lost = true
		e.mu.Unlock()
		if lost {
			continue
		}
		es.mu.Lock()
		infos = append(infos, elderInfo{PID: e.pid, Stats: *toWire(e.last)})
		links = append(links, e.link)
		es.all = slices.DeleteFunc(es.all, func(other *elder) bool { return other == e })
		es.mu.Unlock()
	}
	return infos, links
}

// configure makes them follow the table: they end the connections of targets
// that are being terminated.
func (es *elders) configure(f frame, log *zap.Logger) {
	for _, e := range es.list() {
		_, err := es.ask(context.Background(), e, frame{Op: opConfigure, Table: f.Table, Generation: f.Generation})
		if err != nil && !errors.Is(err, ErrNotRunning) {
			log.Error("a relay worker that retires does not follow any more", zap.Int("pid", e.pid), zap.Error(err))
		}
	}
}

func (es *elders) stop() {
	for _, e := range es.list() {
		_, _ = es.ask(context.Background(), e, frame{Op: opStop}) // who is gone has stopped
	}
}

func (es *elders) close() {
	for _, e := range es.list() {
		e.link.close()
	}
}

// flows lists their connections.
func (es *elders) flows() []Flow {
	var flows []Flow
	for _, e := range es.list() {
		if m, err := es.ask(context.Background(), e, frame{Op: opFlows}); err == nil {
			flows = append(flows, m.Flows...)
		}
	}
	return flows
}

// stats sums what they count and what those before them counted.
func (es *elders) stats() Stats {
	for _, e := range es.list() {
		_, _ = es.ask(context.Background(), e, frame{Op: opStats}) // what it said last counts on
	}
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
