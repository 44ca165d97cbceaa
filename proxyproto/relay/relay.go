package relay

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"nlb/balancer"
)

// complainEvery is how often a complaint is logged at most.
const complainEvery = 5 * time.Second

// Options of a Relay.
type Options struct {
	// Loops is how many threads relay; 0 means as many as GOMAXPROCS.
	Loops int
	// MaxConnections is how many connections there may be at a time; more wait in
	// the listeners' queues. 0 means as many as RLIMIT_NOFILE, which is raised to
	// its hard limit, has room for beside the listeners; a larger number is lowered
	// to that.
	MaxConnections int
	// Log gets what an operator should know; nil discards it.
	Log *zap.Logger
}

// A Relay carries the connections of relayed services. Its methods may be called
// from any goroutine.
type Relay struct {
	loops []*loop
	log   *zap.Logger
	files budget
	epoch time.Time

	admitted       atomic.Int64 // connections that there are
	maxConnections atomic.Int64 // beside the listeners that there are
	retired        atomic.Bool
	done           chan struct{}
	finish         func() // closes done, once

	full, short complaint // of connections, of descriptors

	mu       sync.Mutex // of configuring, retiring, starting and ending
	plan     *plan
	doors    []*door // by index; nil where a number is free
	deadline *time.Timer
	started  bool
	ended    bool
}

// New returns a Relay that does nothing yet. It fails if the process may not
// open enough files. Run must be called once, even if only with a context that
// ended, to release what New opened.
func New(o Options) (*Relay, error) {
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if o.Loops <= 0 {
		o.Loops = runtime.GOMAXPROCS(0)
	}
	files, err := raiseFiles()
	if err != nil {
		return nil, err
	}
	b := shareFiles(files, o.Loops, o.MaxConnections)
	most, err := b.connections(0)
	if err != nil {
		return nil, err
	}
	r := &Relay{log: o.Log, files: b, epoch: time.Now(), done: make(chan struct{})}
	r.limit(most)
	r.finish = sync.OnceFunc(func() { close(r.done) })
	if r.plan, err = compile(&balancer.Table{}, nil, o.Loops); err != nil {
		return nil, err
	}
	for i := range o.Loops {
		l, err := newLoop(r, i, b)
		if err != nil {
			for _, l := range r.loops {
				l.close()
			}
			return nil, err
		}
		l.machine.adopt(r.plan)
		r.loops = append(r.loops, l)
	}
	return r, nil
}

// Run relays until ctx ends. Then it resets all connections, closes the
// listeners and returns nil. It may be called once.
func (r *Relay) Run(ctx context.Context) error {
	r.mu.Lock()
	again := r.started
	r.started = true
	r.mu.Unlock()
	if again {
		return errors.New("relay: Run was called before")
	}
	var loops sync.WaitGroup
	for _, l := range r.loops {
		loops.Go(l.run)
	}
	<-ctx.Done()

	r.mu.Lock()
	defer r.mu.Unlock()
	r.ended = true
	for _, l := range r.loops {
		l.stop()
	}
	loops.Wait()
	if r.deadline != nil {
		r.deadline.Stop()
	}
	r.closeDoors(r.doors)
	r.doors = nil
	return nil
}

// Configure makes the relay serve the services of t and choose among its pools.
// It may be called before Run, and at any time after. When it returns nil, all
// loops have taken t over and the connections that it ends were reset: those of
// a Destination with Terminate. Those of one that is in no Pool any more go on.
//
// t has all pools of the balancer, because their number decides how the kernel
// deals slots, and only services that are relayed. listeners has listening
// sockets by VIP and port. A service needs one, now or from an earlier call;
// without it Configure fails and changes nothing. The sockets are the relay's
// from now on, also if it fails: one that it does not need is closed. The
// listener of a service that is gone is closed, its connections go on. After
// Retire no listener is needed, and none is used.
func (r *Relay) Configure(t *balancer.Table, listeners map[netip.AddrPort]*os.File) error {
	defer func() {
		for _, f := range listeners {
			_ = f.Close() // what is needed was duplicated
		}
	}()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ended {
		return errors.New("relay: it has ended")
	}
	p, err := compile(t, r.plan, len(r.loops))
	if err != nil {
		return fmt.Errorf("relay: %w", err)
	}
	listening := len(p.services)
	if r.retired.Load() {
		listening = 0
	}
	most, err := r.files.connections(listening)
	if err != nil {
		return fmt.Errorf("relay: %w", err)
	}
	doors, added, err := r.arrange(p, listeners)
	if err != nil {
		r.closeDoors(added)
		return fmt.Errorf("relay: %w", err)
	}
	r.keepBusy(p)
	r.limit(most)
	r.install(p, doors)
	return nil
}

// limit notes how many connections there may be.
func (r *Relay) limit(most int) {
	was := r.maxConnections.Swap(int64(most))
	if most < r.files.configured && was != int64(most) {
		r.log.Warn("fewer connections than configured: open files are limited",
			zap.Int("configured", r.files.configured), zap.Int("max_connections", most), zap.Int("files", r.files.limit))
	}
}

// keepBusy leaves targets in the plan that are not in its table and have
// connections: they count, and are found again if the target comes back.
func (r *Relay) keepBusy(p *plan) {
	for key, t := range r.plan.targets {
		if p.targets[key] == nil && r.active(t) > 0 {
			p.targets[key], p.kept[key] = t, true
		}
	}
}

func (r *Relay) active(t *target) (n uint64) {
	for i, l := range r.loops {
		l.mu.Lock()
		n += t.tallies[i].active
		l.mu.Unlock()
	}
	return n
}

// install hands a plan and its doors to all loops.
func (r *Relay) install(p *plan, doors []*door) {
	for _, l := range r.loops {
		l.adopt(p, doors)
	}
	for i, d := range r.doors {
		if d != nil && (i >= len(doors) || doors[i] != d) {
			r.closeDoors([]*door{d})
		}
	}
	r.plan, r.doors = p, doors
	for _, l := range r.loops {
		l.sweep()
	}
}

// arrange returns the doors of a plan by index, those that stay under the index
// they have, and which of them are new.
func (r *Relay) arrange(p *plan, listeners map[netip.AddrPort]*os.File) (doors, added []*door, err error) {
	if r.retired.Load() {
		return nil, nil, nil
	}
	doors = make([]*door, len(r.doors))
	have := make(map[netip.AddrPort]bool)
	for i, d := range r.doors {
		if d != nil && p.services[d.vip] != nil {
			doors[i], have[d.vip] = d, true
		}
	}
	for vip := range p.services {
		if have[vip] {
			continue
		}
		f := listeners[vip]
		if f == nil {
			return nil, added, fmt.Errorf("no listener for %s", vip)
		}
		d := &door{vip: vip}
		if d.fd, err = listenerOf(f); err != nil {
			return nil, added, fmt.Errorf("listener for %s: %w", vip, err)
		}
		added = append(added, d)
	}
	// An index is not used again at once: an event may still name the old door.
	for _, d := range added {
		d.index = len(doors)
		for i := range doors {
			if doors[i] == nil && (i >= len(r.doors) || r.doors[i] == nil) {
				d.index = i
				break
			}
		}
		if d.index == len(doors) {
			doors = append(doors, nil)
		}
		doors[d.index] = d
	}
	return doors, added, nil
}

// listenerOf duplicates a listening socket: File.Fd would make it block.
func listenerOf(f *os.File) (int32, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	fd := -1
	if controlErr := raw.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) }); controlErr != nil {
		return -1, controlErr
	}
	if err != nil {
		return -1, err
	}
	if listening, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err != nil || listening == 0 {
		_ = unix.Close(fd)
		return -1, errors.Join(err, errors.New("it is not a listening socket"))
	}
	// What is set here, accepted sockets have from the start.
	err = errors.Join(unix.SetNonblock(fd, true), unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1))
	if err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return int32(fd), nil
}

func (r *Relay) closeDoors(doors []*door) {
	for _, d := range doors {
		if d != nil {
			_ = unix.Close(int(d.fd))
		}
	}
}

// Retire closes the listeners and lets connections go on until the moment until,
// when those that are left are reset. A second call may change the moment.
func (r *Relay) Retire(until time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ended {
		return
	}
	r.install(r.plan, nil)
	r.retired.Store(true)
	if r.admitted.Load() == 0 {
		r.finish()
	}
	if r.deadline != nil {
		r.deadline.Stop()
	}
	r.deadline = time.AfterFunc(time.Until(until), r.resetAll)
}

func (r *Relay) resetAll() {
	for _, l := range r.loops {
		l.inPieces(l.machine.resetConns)
	}
}

// Done is closed when the relay is retired and its last connection is gone.
func (r *Relay) Done() <-chan struct{} { return r.done }

// --- what loops ask ----------------------------------------------------------------

// clock is the time of all machines.
func (r *Relay) clock() int64 { return int64(time.Since(r.epoch)) }

// admit takes a place for a connection, if there is one; leave gives it back.
func (r *Relay) admit() bool {
	if r.admitted.Add(1) <= r.maxConnections.Load() {
		return true
	}
	r.leave()
	return false
}

func (r *Relay) leave() {
	if r.admitted.Add(-1) == 0 && r.retired.Load() {
		r.finish()
	}
}

// hasRoom reports whether it is worth accepting again: listeners would be shut
// and opened for each single connection otherwise.
func (r *Relay) hasRoom() bool {
	most := r.maxConnections.Load()
	return r.admitted.Load() <= most-max(1, most/20)
}

// A complaint is about trouble that comes with every connection: it is logged
// now and then.
type complaint struct{ last atomic.Int64 } // when, by the relay's clock

func (c *complaint) complain(r *Relay, message string, fields ...zap.Field) {
	now, last := r.clock(), c.last.Load()
	if last != 0 && now-last < int64(complainEvery) || !c.last.CompareAndSwap(last, now) {
		return
	}
	r.log.Warn(message, fields...)
}
