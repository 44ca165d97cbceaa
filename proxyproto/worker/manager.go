package worker

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/balancer/events"
)

// ManagerOptions of New.
type ManagerOptions struct {
	// Socket is the path of the worker's control socket.
	Socket string
	// Program and Args start a worker: the path of nlb, and what follows its
	// name, which must name Socket. Without a Program workers are somebody else's
	// to start and to replace, such as a service's.
	Program string
	Args    func() []string
	// Output is where the worker's standard output and error go; nil is our
	// standard error.
	Output *os.File
	// Version is ours. A worker of another one is replaced, but only the first of
	// each version: the program on disk may be of that version for good.
	Version string
	Log     *zap.Logger
}

// A Manager is the controller's side of the relay. It opens the listening
// sockets, which may need privileges that the worker does not have, and has
// copies of them: while one worker has died and the next has not begun, clients
// wait in their queues.
//
// What the worker serves is asked of the worker; a new controller adopts the one
// that is there, with its sockets.
type Manager struct {
	o ManagerOptions
	// changed says that a worker may be there, or wanted, that was not before.
	changed chan struct{}
	line    *line

	mu      sync.Mutex // one at a time starts workers or tells them what to serve
	sockets sockets
	table   *balancer.Table // that the worker was last given, or has; nil: unknown

	listening sync.Map // the addresses of sockets, for those who do not wait for mu

	seen struct {
		sync.Mutex // guards hash and table
		hash       string
		table      *balancer.Table // of the hash
	}
}

// New returns a Manager. It does nothing by itself.
func New(o ManagerOptions) *Manager {
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if o.Output == nil {
		o.Output = os.Stderr
	}
	return &Manager{o: o, changed: make(chan struct{}, 1), line: newLine(), sockets: make(sockets)}
}

// served is what the relay serves.
type served struct {
	running bool
	table   *balancer.Table // never nil
}

// observe asks the worker what it serves. It changes nothing.
func (m *Manager) observe(ctx context.Context) (served, error) {
	l, err := dial(ctx, m.o.Socket)
	if err == nil {
		defer l.close()
		var have served
		if have, err = m.observeOn(ctx, l); err == nil {
			return have, nil
		}
	}
	if errors.Is(err, ErrNotRunning) {
		return served{table: new(balancer.Table)}, nil
	}
	return served{}, err
}

// Answers fails if a worker that has something to do does not answer.
func (m *Manager) Answers(ctx context.Context) error {
	if m.rests() {
		return nil
	}
	if _, err := m.observe(ctx); err != nil {
		return fmt.Errorf("the relay worker does not answer: %w", err)
	}
	return nil
}

func (m *Manager) observeOn(ctx context.Context, l link) (served, error) {
	hello, err := l.hello(ctx, opHello)
	if err != nil {
		return served{}, err
	}
	m.seen.Lock()
	defer m.seen.Unlock()
	if m.seen.table != nil && m.seen.hash == hello.Hash {
		return served{true, m.seen.table}, nil
	}
	answer, err := l.request(ctx, frame{Op: opTable}, nil)
	if err != nil {
		return served{}, err
	}
	answer.close()
	t, err := decodeTable(answer.Table)
	if err != nil {
		return served{}, err
	}
	if len(answer.Table) > 0 {
		m.seen.hash, m.seen.table = hash(answer.Table), t
	}
	return served{true, t}, nil
}

// give makes the worker serve a table; mu is held. It starts the worker if none
// is there, and opens the sockets that are missing: all of them or none.
func (m *Manager) give(ctx context.Context, t *balancer.Table) error {
	raw, err := encodeTable(t)
	if err != nil {
		return err
	}
	// A worker that was there may be leaving: the next attempt starts another.
	const attempts = 3
	for i := 1; ; i++ {
		err = m.giveOnce(ctx, t, raw)
		if err == nil || i == attempts || !errors.Is(err, ErrNotRunning) {
			return err
		}
	}
}

func (m *Manager) giveOnce(ctx context.Context, t *balancer.Table, raw []byte) error {
	hello, err := m.ensure(ctx, t)
	if errors.Is(err, errNeedless) {
		m.settle(t, nil)
		return nil
	}
	if err != nil {
		return err
	}
	opened, err := m.open(t)
	if err != nil {
		return err
	}
	request := frame{Op: opConfigure, Table: raw, Generation: hello.Generation + 1}
	answer, err := ask(ctx, m.o.Socket, request, m.missing(t, hello.Listeners))
	if err != nil {
		m.forget(opened)
		return err
	}
	answer.close()
	m.settle(t, opened)
	return nil
}

// settle notes what is served now, and closes what is not needed any more.
func (m *Manager) settle(t *balancer.Table, opened []netip.AddrPort) {
	wanted := addresses(t)
	for a := range m.sockets {
		if !wanted[a] {
			m.forget([]netip.AddrPort{a})
			m.o.Log.Info("relay listens no more", events.RelayListensNoMore.Field(), zap.Stringer("address", a))
		}
	}
	for _, a := range opened {
		m.o.Log.Info("relay listens", events.RelayListens.Field(), zap.Stringer("address", a))
	}
	m.table = t
	m.tell()
}

// errNeedless says that there is no worker, and nothing to do for one.
var errNeedless = errors.New("no relay worker is needed")

// open opens the sockets of services that have none, and returns for which.
func (m *Manager) open(t *balancer.Table) (opened []netip.AddrPort, err error) {
	var errs []error
	for i := range t.Services {
		a := addressOf(&t.Services[i])
		if _, have := m.sockets[a]; have {
			continue
		}
		fd, err := listen(a)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		m.keep(a, fd)
		opened = append(opened, a)
	}
	if len(errs) > 0 {
		m.forget(opened)
		return nil, errors.Join(errs...)
	}
	return opened, nil
}

// forget closes our copies of sockets.
func (m *Manager) forget(which []netip.AddrPort) {
	for _, a := range which {
		m.listening.Delete(a)
		_ = unix.Close(m.sockets[a])
		delete(m.sockets, a)
	}
}

func (m *Manager) forgetAll() {
	m.listening.Clear()
	m.sockets.close()
	m.sockets = make(sockets)
}

// keep keeps a socket that listens.
func (m *Manager) keep(a netip.AddrPort, fd int) {
	m.sockets[a] = fd
	m.listening.Store(a, nil)
}

// listens reports whether we have a socket for each service of a table. It does not
// wait for mu.
func (m *Manager) listens(t *balancer.Table) bool {
	for i := range t.Services {
		if _, have := m.listening.Load(addressOf(&t.Services[i])); !have {
			return false
		}
	}
	return true
}

// missing are the sockets of t that a worker with those listeners lacks.
func (m *Manager) missing(t *balancer.Table, listeners []netip.AddrPort) sockets {
	lacks := make(sockets)
	for a := range addresses(t) {
		if _, has := slices.BinarySearchFunc(listeners, a, netip.AddrPort.Compare); !has {
			lacks[a] = m.sockets[a]
		}
	}
	return lacks
}

// ensure returns who the worker is, and starts one if none is there that t
// needs; mu is held. Afterwards we have copies of all its sockets.
func (m *Manager) ensure(ctx context.Context, t *balancer.Table) (Hello, error) {
	hello, err := sayHello(ctx, m.o.Socket)
	if errors.Is(err, ErrNotRunning) {
		if len(t.Services) == 0 {
			return Hello{}, errNeedless
		}
		// Somebody else's may answer first, and have sockets already.
		hello, err = m.start(ctx, false)
	}
	if err != nil {
		return Hello{}, err
	}
	return hello, m.adopt(ctx, hello)
}

// adopt gets copies of the sockets that a worker has and we do not.
func (m *Manager) adopt(ctx context.Context, hello Hello) error {
	known := func(a netip.AddrPort) bool { _, have := m.sockets[a]; return have }
	if !slices.ContainsFunc(hello.Listeners, func(a netip.AddrPort) bool { return !known(a) }) {
		return nil
	}
	answer, err := ask(ctx, m.o.Socket, frame{Op: opListeners}, nil)
	if err != nil {
		return err
	}
	closeAll(answer.links)
	for a, fd := range answer.files {
		if known(a) {
			_ = unix.Close(fd)
			continue
		}
		m.keep(a, fd)
	}
	return nil
}

const (
	// startWithin is how long a worker may take until it answers.
	startWithin = 10 * time.Second
	startPoll   = time.Millisecond
)

// start starts a worker and waits until one answers: that one, if it is to take
// over from another.
func (m *Manager) start(ctx context.Context, takeOver bool) (Hello, error) {
	if m.o.Program == "" {
		return m.awaitOther(ctx)
	}
	cmd := exec.Command(m.o.Program, m.o.Args()...)
	cmd.Stdout, cmd.Stderr = m.o.Output, m.o.Output
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // our terminal is not its
	begun := time.Now()
	if err := cmd.Start(); err != nil {
		return Hello{}, fmt.Errorf("start the relay worker: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // until it ends, which may be after us
	poll := time.NewTicker(startPoll)
	defer poll.Stop()
	for time.Since(begun) < startWithin {
		hello, err := sayHello(ctx, m.o.Socket)
		ours := err == nil && hello.PID == cmd.Process.Pid
		if ours {
			m.o.Log.Info("relay worker started", events.RelayStarted.Field(), zap.Int("pid", hello.PID), zap.Duration("took", time.Since(begun)))
		}
		if ours || err == nil && !takeOver {
			return hello, nil
		}
		select {
		case <-ctx.Done():
			return Hello{}, fmt.Errorf("start the relay worker: %w", ctx.Err())
		case err := <-ended:
			// Another one may have taken over from it already.
			if hello, sayErr := sayHello(ctx, m.o.Socket); sayErr == nil && !takeOver {
				return hello, nil
			}
			return Hello{}, fmt.Errorf("start the relay worker: it ended at once: %v", reason(err))
		case <-poll.C:
		}
	}
	_ = cmd.Process.Kill()
	return Hello{}, fmt.Errorf("start the relay worker: pid %d did not answer within %s and was killed", cmd.Process.Pid, startWithin)
}

const (
	// otherWithin is many times what a service's manager takes to start one that
	// died. Passes of the loop wait as long.
	otherWithin = 2 * time.Second
	otherPoll   = 10 * time.Millisecond
)

// awaitOther waits until a worker answers that somebody else starts.
func (m *Manager) awaitOther(ctx context.Context) (Hello, error) {
	enough := time.After(otherWithin)
	poll := time.NewTicker(otherPoll)
	defer poll.Stop()
	for {
		hello, err := sayHello(ctx, m.o.Socket)
		if err == nil {
			return hello, nil
		}
		select {
		case <-ctx.Done():
			return Hello{}, fmt.Errorf("wait for a relay worker: %w", ctx.Err())
		case <-enough:
			return Hello{}, fmt.Errorf("no relay worker answers, and only root starts one itself (systemctl start nlb-relay): %w", err)
		case <-poll.C:
		}
	}
}

func reason(err error) string {
	if err == nil {
		return "exit status 0"
	}
	return err.Error()
}

// Upgrade starts a new worker, which takes over from the one that is there, and
// returns who it is when it serves. The connections of the old one go on.
func (m *Manager) Upgrade(ctx context.Context) (Hello, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	hello, err := m.start(ctx, true)
	if err != nil {
		return Hello{}, err
	}
	return hello, m.adopt(ctx, hello)
}

// Stats asks what the relay counted. Connections of workers that retire count.
// An error that matches ErrNotRunning says that there is no relay.
func (m *Manager) Stats(ctx context.Context) (Stats, error) {
	answer, err := ask(ctx, m.o.Socket, frame{Op: opStats}, nil)
	if err != nil {
		return Stats{}, err
	}
	answer.close()
	if answer.Stats == nil {
		return Stats{}, errors.New("stats: the relay worker gave none")
	}
	return answer.Stats.stats(), nil
}

// Flows lists the connections through the relay, those of workers that retire
// too, in no order. An error that matches ErrNotRunning says that there is no
// relay.
func (m *Manager) Flows(ctx context.Context) ([]Flow, error) {
	answer, err := ask(ctx, m.o.Socket, frame{Op: opFlows}, nil)
	if err != nil {
		return nil, err
	}
	answer.close()
	return answer.Flows, nil
}

// Stop ends the worker at a socket, and those that retire, with all connections,
// and removes the socket. It returns when the worker has ended, and nil if there
// was none. It fails if a worker hangs up but stays, as one does that has as many
// control connections as it takes. No Manager should be running: it would start
// another.
func Stop(ctx context.Context, socket string) error {
	if err := stopAll(ctx, socket); err != nil {
		return err
	}
	var errs []error
	for _, name := range append(ownNames(socket), socket) {
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// stopAll stops whoever answers at the socket, until nobody does.
func stopAll(ctx context.Context, socket string) error {
	var hungUp int32 // the process that did last
	for {
		l, err := dial(ctx, socket)
		if errors.Is(err, ErrNotRunning) {
			return nil
		}
		if err != nil {
			return err
		}
		pid, err := stop(ctx, l)
		switch {
		case err == nil:
		case !errors.Is(err, ErrNotRunning):
			return err
		case pid == hungUp:
			// One that leaves closes its door before it hangs up.
			return fmt.Errorf("stop: relay worker %d hangs up and stays: it may have too many control connections (try again in %s)", pid, quiet)
		}
		hungUp = pid
	}
}

// stop stops the worker at the other end of l, which it closes, and returns which
// process that is.
func stop(ctx context.Context, l link) (pid int32, err error) {
	defer l.close()
	peer, err := l.credentials()
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	worker, err := l.process()
	if err != nil {
		return peer.Pid, err
	}
	defer worker.close()
	if _, err := l.request(ctx, frame{Op: opStop}, nil); err != nil {
		return peer.Pid, err
	}
	return peer.Pid, worker.wait(ctx)
}
