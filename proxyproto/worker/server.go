package worker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

const (
	// maxLinks bounds control connections: a controller has two.
	maxLinks = 64
	// quiet is how long a control connection may ask for nothing. That of a
	// successor may for ever, and so may one that watches.
	quiet = 10 * time.Second
)

var errLeaving = errors.New("the worker is leaving")

// serve answers requests until the control socket is closed.
func (w *worker) serve(ctx context.Context, tasks *sync.WaitGroup) {
	for {
		c, err := w.door.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			w.Log.Warn("control connection", zap.Error(err)) // EMFILE, most likely
			select {
			case <-ctx.Done():
				return
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		l := link{c.(*net.UnixConn)}
		if err := w.welcome(l); err != nil {
			l.close()
			if !errors.Is(err, errLeaving) {
				w.Log.Warn("control connection refused", zap.Error(err))
			}
			continue
		}
		tasks.Go(func() {
			if err := w.converse(l); err != nil && ctx.Err() == nil {
				w.Log.Warn("control connection", zap.Error(err))
			}
		})
	}
}

// welcome checks who connects.
func (w *worker) welcome(l link) error {
	peer, err := l.credentials()
	if err != nil {
		return err
	}
	if peer.Uid != 0 && peer.Uid != w.owner {
		return fmt.Errorf("user %d (pid %d) may not control the relay", peer.Uid, peer.Pid)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.leaving {
		return errLeaving
	}
	if len(w.links) >= maxLinks {
		return fmt.Errorf("more than %d", maxLinks)
	}
	w.links[l] = true
	return nil
}

// converse answers the requests of one connection. What is malformed ends it.
func (w *worker) converse(l link) error {
	defer func() {
		w.mu.Lock()
		delete(w.links, l)
		w.mu.Unlock()
		l.close()
	}()
	idle := quiet
	for {
		m, err := l.receive(idle)
		if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		if err != nil {
			return err
		}
		a := w.answer(l, m)
		err = l.send(a.frame, a.files, a.links)
		a.close()
		if a.after != nil {
			a.after()
		}
		switch {
		case errors.Is(err, net.ErrClosed), errors.Is(err, unix.EPIPE):
			return nil // somebody hung up, as whoever leaves does
		case err != nil:
			return fmt.Errorf("answer %s: %w", m.Op, err)
		}
		if m.Op == opWatch || m.Op == opTakeover {
			idle = 0
		}
	}
}

// An answer is what to send, and what to do when it was sent.
type answer struct {
	frame
	files sockets // copies
	links []link
	after func() // what would end the worker before it has answered
}

func (a answer) close() {
	a.files.close()
	for _, l := range a.links {
		l.close()
	}
}

// answer does what is asked for and says what came of it. The files of m are
// used up.
func (w *worker) answer(l link, m message) answer {
	deaf := w.deaf(l)
	if m.Op != opConfigure || deaf {
		m.close() // nobody else has use for them
	}
	if deaf {
		return answer{frame: frame{Error: errLeaving.Error(), Leaving: true}}
	}
	a, err := w.act(l, m)
	if err != nil {
		a.close()
		return answer{frame: frame{Error: err.Error()}}
	}
	return a
}

func (w *worker) act(l link, m message) (a answer, err error) {
	switch m.Op {
	case opHello, opWatch:
		a.Hello = w.hello()
	case opTable:
		a.frame = w.tableFrame()
	case opListeners:
		a.files, err = w.copies()
	case opTakeover:
		a, err = w.bequeath(l)
	case opConfigure:
		err = w.configure(m)
		a.Hello = w.hello()
	case opStats:
		a.Stats = toWire(w.stats())
	case opFlows:
		a.Flows = w.flows()
	case opRetire:
		w.follow(l)
		w.leave()
		a.Elders, a.links = w.elders.handOver()
		a.Stats = toWire(w.stats())
		a.after = func() { w.retire(m.Until) }
	case opStop:
		w.elders.stop()
		a.after = w.end
	default:
		err = fmt.Errorf("unknown request %q", m.Op)
	}
	return a, err
}

// bequeath gives the table and its sockets, which belong together, to the
// successor at the other end of l.
func (w *worker) bequeath(l link) (a answer, err error) {
	w.changing.Lock()
	defer w.changing.Unlock()
	a.frame = w.tableFrame()
	a.files, err = w.copies()
	w.follow(l)
	return a, err
}

// follow makes the other end of l the successor.
func (w *worker) follow(l link) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.successor = l
}

// deaf reports whether a request comes too late: a worker that leaves answers
// its successor only.
func (w *worker) deaf(l link) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.leaving && l != w.successor
}

func (w *worker) hello() *Hello {
	w.mu.Lock()
	defer w.mu.Unlock()
	return &Hello{
		Version: w.Version, PID: os.Getpid(), Generation: w.generation, Hash: w.hash, Retiring: w.leaving,
		Listeners: slices.SortedFunc(maps.Keys(w.sockets), netip.AddrPort.Compare),
	}
}

func (w *worker) tableFrame() frame {
	f := frame{Hello: w.hello()}
	w.mu.Lock()
	defer w.mu.Unlock()
	f.Table, f.Generation = w.table, w.generation
	return f
}

// copies are duplicates of the listening sockets: those here may be closed while
// the answer is on its way.
func (w *worker) copies() (sockets, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.sockets.copy()
}

func (s sockets) copy() (sockets, error) {
	copies := make(sockets, len(s))
	for a, fd := range s {
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			copies.close()
			return nil, fmt.Errorf("listener of %s: %w", a, err)
		}
		copies[a] = dup
	}
	return copies, nil
}
