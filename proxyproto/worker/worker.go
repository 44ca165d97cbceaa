package worker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"runtime"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/proxyproto/relay"
)

// DefaultRetireAfter is how long the connections of a worker that retires may
// go on: as long as the longest deregistration delay of ELBv2.
const DefaultRetireAfter = time.Hour

// DefaultUser is whom a worker becomes that root started.
const DefaultUser = "nobody"

// WorkerOptions of Run.
type WorkerOptions struct {
	// Socket is the path of the control socket. A worker that answers there is
	// taken over from.
	Socket string
	// RetireAfter is how long the connections of a worker that retires may go
	// on, its predecessor's as well as its own.
	RetireAfter time.Duration
	// User is the name or number of the user to become once all is open; empty
	// changes nothing.
	User string
	// MaxConnections is how many connections there may be; 0 means as many as
	// RLIMIT_NOFILE has room for.
	MaxConnections int
	// Stay makes the worker a service of its own: it does not end for want of
	// something to do, tells systemd about itself (sd_notify(3)), and SIGHUP makes
	// it start the program on disk anew, which takes over.
	Stay    bool
	Version string
	Log     *zap.Logger
}

// An engine is what a worker needs of a relay.Relay, whose comments apply.
type engine interface {
	Run(ctx context.Context) error
	Configure(t *balancer.Table, listeners map[netip.AddrPort]*os.File) error
	Retire(until time.Time)
	Done() <-chan struct{}
	Stats() relay.Stats
	Flows() []relay.Flow
}

// Run is the process nlb relay. It relays what controllers ask for over the
// control socket, and returns nil when it has retired, was stopped, or had
// nothing to do for a while.
//
// SIGTERM retires it, SIGINT or a second SIGTERM ends it at once, as does the
// end of ctx, which therefore must not follow from a signal.
//
// Run changes the identity of the whole process, and may start its program
// again in the same process: it belongs into a program of its own, before
// anything else was begun.
func Run(ctx context.Context, o WorkerOptions) error {
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if err := noNewPrivileges(); err != nil {
		return err
	}
	// ps(1) would call it like the daemon, or "exe" if it was started again.
	_ = os.WriteFile("/proc/self/comm", []byte("nlb-relay"), 0)
	id, err := lookUp(o.User)
	if err != nil {
		return err
	}
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT)
	if o.Stay {
		signal.Notify(signals, unix.SIGHUP)
	}
	defer signal.Stop(signals)
	// Whoever read our messages may be gone, as a controller that was killed is.
	signal.Ignore(unix.SIGPIPE)
	// A loop that waits for events gives its processor up. With none to spare, the
	// scheduler's monitor takes it back each time, and never comes to rest: an
	// eighth of the worker's time.
	loops := runtime.GOMAXPROCS(0)
	runtime.GOMAXPROCS(loops + 1)
	e, err := relay.New(relay.Options{Loops: loops, MaxConnections: o.MaxConnections, Log: o.Log})
	if err != nil {
		return err
	}
	w := newWorker(o, e)
	return w.run(ctx, signals, id)
}

// A worker is a relay with a control socket.
type worker struct {
	WorkerOptions
	engine engine
	owner  uint32 // who may connect, besides root
	end    context.CancelFunc

	// Requests that change something take turns.
	changing sync.Locker

	mu         sync.Mutex // guards all below; held for moments only
	door       net.Listener
	links      map[link]bool // that are served
	sockets    sockets
	table      []byte // as JSON
	hash       string
	generation uint64
	services   int
	leaving    bool // no more requests are taken
	successor  link // who took over: asks on
	elders     elders
}

func newWorker(o WorkerOptions, e engine) *worker {
	return &worker{
		WorkerOptions: o, engine: e, owner: uint32(os.Geteuid()), end: func() {},
		links: make(map[link]bool), sockets: make(sockets), changing: new(sync.Mutex),
		elders: elders{waits: usualWaits, log: o.Log},
	}
}

// run serves until the worker is done.
func (w *worker) run(ctx context.Context, signals <-chan os.Signal, id identity) error {
	ctx, w.end = context.WithCancel(ctx)
	defer w.elders.wait()
	var tasks sync.WaitGroup // which ask elders
	defer tasks.Wait()
	defer w.elders.close()
	defer w.hangUp() // which ends the tasks that serve
	defer w.end()
	relaying := make(chan error, 1)
	tasks.Go(func() { relaying <- w.engine.Run(ctx) })

	if err := w.open(ctx); err != nil {
		return err
	}
	if err := id.become(); err != nil {
		return err
	}
	w.Log.Info("relay worker serves", zap.String("version", w.Version), zap.Int("pid", os.Getpid()),
		zap.Int("uid", os.Geteuid()), zap.Int("services", w.services), zap.String("socket", w.Socket))
	tasks.Go(func() { w.serve(ctx, &tasks) })
	if w.Stay {
		w.announce()
	} else {
		tasks.Go(func() { w.watchIdle(ctx) })
	}
	told := false
	for {
		select {
		case err := <-relaying:
			return err
		case <-ctx.Done():
			return nil
		case <-w.engine.Done():
			w.Log.Info("relay worker has retired: its last connection is gone")
			return nil
		case s := <-signals:
			if s == unix.SIGHUP {
				w.startSuccessor()
				continue
			}
			if s == unix.SIGINT || told {
				w.Log.Warn("relay worker ends at once", zap.Stringer("signal", s))
				return nil
			}
			told = true
			w.retire(time.Now().Add(w.RetireAfter))
		}
	}
}

// open takes over from the worker at the socket, if there is one, and listens
// there in its place. There is a worker at the socket at every moment, and the
// old one accepts until the new one does. A lock lets one worker open at a time:
// of two that take over from the same one, the first would be lost.
func (w *worker) open(ctx context.Context) error {
	held, err := w.lock(ctx)
	if err != nil {
		return err
	}
	defer held.Close()
	old, err := w.takeOver(ctx)
	if err != nil {
		return fmt.Errorf("take over: %w", err)
	}
	if w.door, err = w.listen(); err != nil {
		if old != nil {
			old.link.close()
		}
		return err
	}
	if old != nil {
		if err := w.elders.retire(ctx, old, time.Now().Add(w.RetireAfter)); err != nil {
			// It may accept on, and serves whom it accepts well.
			w.Log.Error("the former relay worker could not be told to retire", zap.Int("pid", old.pid), zap.Error(err))
		}
	}
	w.tidy(ctx)
	return nil
}

// tidy removes the names of workers that answer no more. They cannot do it: they
// have no privileges.
func (w *worker) tidy(ctx context.Context) {
	for _, name := range ownNames(w.Socket) {
		if name == ownName(w.Socket, os.Getpid()) {
			continue
		}
		if l, err := dialName(ctx, name); err == nil {
			l.close()
		} else if errors.Is(err, ErrNotRunning) {
			_ = os.Remove(name) // left for the next one
		}
	}
}

// lock takes the lock beside the socket. It is never removed, because another
// process could then lock what is no longer there.
func (w *worker) lock(ctx context.Context) (*os.File, error) {
	f, err := os.OpenFile(w.Socket+".lock", os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", f.Name(), err), f.Close())
		}
		// Another one is starting, which takes milliseconds.
		select {
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), f.Close())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// takeOver makes the engine serve what the worker at the socket serves. It
// returns nil if there is none.
func (w *worker) takeOver(ctx context.Context) (*elder, error) {
	l, err := dial(ctx, w.Socket)
	if errors.Is(err, ErrNotRunning) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	m, err := l.request(ctx, frame{Op: opTakeover}, nil)
	if err != nil {
		l.close()
		if errors.Is(err, ErrNotRunning) {
			return nil, nil // it died or is leaving
		}
		return nil, err
	}
	if m.Hello == nil {
		m.close()
		l.close()
		return nil, errors.New("the relay worker did not say who it is")
	}
	w.Log.Info("relay worker takes over", zap.Int("pid", m.Hello.PID), zap.String("version", m.Hello.Version),
		zap.Int("listeners", len(m.files)))
	if len(m.Table) > 0 {
		if err := w.configure(m); err != nil {
			l.close()
			return nil, err
		}
	}
	return newElder(l, m.Hello.PID, Stats{}), nil
}

// listen puts a new control socket in the place of whatever is there. It keeps
// the name it has before.
func (w *worker) listen() (net.Listener, error) {
	own := ownName(w.Socket, os.Getpid())
	temporary := own + newSuffix
	for _, name := range []string{own, temporary} {
		if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: own, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", w.Socket, err)
	}
	// The path may be a successor's by the time this one closes. A socket that
	// nobody listens on refuses, which says all there is to say.
	l.SetUnlinkOnClose(false)
	err = os.Chmod(own, 0o600)
	if err == nil {
		err = os.Link(own, temporary)
	}
	if err == nil {
		err = os.Rename(temporary, w.Socket)
	}
	if err != nil {
		_ = os.Remove(temporary) // it may not be there
		return nil, errors.Join(fmt.Errorf("socket %s: %w", w.Socket, err), os.Remove(own), l.Close())
	}
	return l, nil
}

// configure makes the engine serve the table of m and takes over its files.
func (w *worker) configure(m message) error {
	closeAll(m.links)
	t, err := decodeTable(m.Table)
	if err != nil {
		m.files.close()
		return err
	}
	w.changing.Lock()
	defer w.changing.Unlock()
	added, given, err := w.admit(t, m.files)
	if err == nil {
		err = w.engine.Configure(t, given)
	}
	if err != nil {
		added.close()
		return err
	}
	w.settle(t, m, added)
	w.elders.configure(m.frame)
	return nil
}

// admit returns those of files that t needs and nobody gave before, and copies
// of them for the engine. All others are closed.
func (w *worker) admit(t *balancer.Table, files sockets) (added sockets, given map[netip.AddrPort]*os.File, err error) {
	added, given = make(sockets), make(map[netip.AddrPort]*os.File)
	wanted := addresses(t)
	w.mu.Lock()
	defer w.mu.Unlock()
	for a, fd := range files {
		if _, have := w.sockets[a]; have || !wanted[a] || w.leaving {
			_ = unix.Close(fd)
			continue
		}
		added[a] = fd
	}
	for a, fd := range added {
		copied, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			for _, f := range given {
				_ = f.Close()
			}
			return added, nil, fmt.Errorf("listener of %s: %w", a, err)
		}
		given[a] = os.NewFile(uintptr(copied), a.String())
	}
	return added, given, nil
}

// settle notes what the engine serves now.
func (w *worker) settle(t *balancer.Table, m message, added sockets) {
	wanted := addresses(t)
	w.mu.Lock()
	defer w.mu.Unlock()
	for a, fd := range added {
		w.sockets[a] = fd
	}
	for a, fd := range w.sockets {
		if !wanted[a] || w.leaving {
			_ = unix.Close(fd)
			delete(w.sockets, a)
		}
	}
	w.table, w.hash, w.generation, w.services = m.Table, hash(m.Table), m.Generation, len(t.Services)
}

// retire lets connections go on until then and accepts no more.
func (w *worker) retire(until time.Time) {
	w.leave()
	w.changing.Lock()
	defer w.changing.Unlock()
	w.engine.Retire(until)
	w.Log.Info("relay worker retires: its connections go on", zap.Time("until", until),
		zap.Uint64("connections", w.engine.Stats().Connections))
}

// leave hangs up on everybody but a successor and takes no more requests. It
// reports whether it was the first to.
func (w *worker) leave() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.leaving {
		return false
	}
	w.leaving = true
	if w.door != nil {
		_ = w.door.Close()
	}
	for l := range w.links {
		if l != w.successor {
			l.close()
		}
	}
	w.sockets.close()
	w.sockets = make(sockets)
	return true
}

// hangUp leaves, and hangs up on a successor too.
func (w *worker) hangUp() {
	w.leave()
	w.mu.Lock()
	defer w.mu.Unlock()
	for l := range w.links {
		l.close()
	}
}

const (
	// idleFor is how long a worker without anything to do stays.
	idleFor   = 10 * time.Second
	idleEvery = time.Second
)

// watchIdle ends a worker that has had no service and no connection for
// idleFor.
func (w *worker) watchIdle(ctx context.Context) {
	tick := time.NewTicker(idleEvery)
	defer tick.Stop()
	busy := time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if w.busy() {
			busy = time.Now()
		}
		if time.Since(busy) >= idleFor && w.leaveIdle() {
			w.Log.Info("relay worker ends: it has had nothing to do", zap.Duration("for", idleFor))
			w.end()
			return
		}
	}
}

func (w *worker) busy() bool {
	w.mu.Lock()
	services, leaving := w.services, w.leaving
	w.mu.Unlock()
	return services > 0 || leaving || w.stats().Connections > 0
}

// leaveIdle leaves unless a table came meanwhile.
func (w *worker) leaveIdle() bool {
	w.changing.Lock()
	defer w.changing.Unlock()
	return !w.busy() && w.leave()
}

func (w *worker) stats() Stats { return sum(w.engine.Stats(), w.elders.stats()) }

func (w *worker) flows() []Flow { return append(w.engine.Flows(), w.elders.flows()...) }

// addresses are what the services of a table listen on.
func addresses(t *balancer.Table) map[netip.AddrPort]bool {
	all := make(map[netip.AddrPort]bool, len(t.Services))
	for i := range t.Services {
		all[addressOf(&t.Services[i])] = true
	}
	return all
}

func addressOf(s *balancer.VirtualService) netip.AddrPort {
	return netip.AddrPortFrom(s.Address, s.Port)
}
