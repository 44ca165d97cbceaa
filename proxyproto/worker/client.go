package worker

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrNotRunning is wrapped when there is no worker at the socket.
var ErrNotRunning = errors.New("no relay worker is running")

// answerWithin bounds the wait for an answer. A worker resets the connections of
// a target that is being terminated before it answers.
const answerWithin = 10 * time.Second

// dial connects to the worker at a socket. If nobody is there, a worker may be
// left whose successor took its place and died before it said so: it serves on,
// and is found by a name of its own.
func dial(ctx context.Context, socket string) (link, error) {
	l, err := dialName(ctx, socket)
	if !errors.Is(err, ErrNotRunning) {
		return l, err
	}
	for _, name := range ownNames(socket) {
		if l, err := dialName(ctx, name); err == nil {
			return l, nil
		}
	}
	return link{}, err
}

// ownName is where a worker answers as long as it takes requests, whoever has its
// place at the socket.
func ownName(socket string, pid int) string { return fmt.Sprintf("%s.%d", socket, pid) }

// newSuffix ends the second name that a worker's control socket has until it takes
// the place at the path.
const newSuffix = ".new"

// ownNames are those of all workers that ever were at the socket and whose names
// nobody removed. One that died before it had its place left two.
func ownNames(socket string) (names []string) {
	entries, err := os.ReadDir(filepath.Dir(socket))
	if err != nil {
		return nil // no folder, no worker
	}
	for _, e := range entries {
		suffix, ok := strings.CutPrefix(e.Name(), filepath.Base(socket))
		pid, dotted := strings.CutPrefix(strings.TrimSuffix(suffix, newSuffix), ".")
		if _, err := strconv.ParseUint(pid, 10, 31); ok && dotted && err == nil {
			names = append(names, socket+suffix)
		}
	}
	return names
}

func dialName(ctx context.Context, socket string) (link, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", socket)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
		return link{}, fmt.Errorf("%s: %w", socket, ErrNotRunning)
	}
	if err != nil {
		return link{}, err
	}
	return link{c.(*net.UnixConn)}, nil
}

// request asks and returns the answer. The end of ctx interrupts it and leaves
// the link useless.
func (l link) request(ctx context.Context, f frame, files sockets) (message, error) {
	stop := context.AfterFunc(ctx, l.close)
	defer stop()
	err := l.send(f, files, nil)
	var m message
	if err == nil {
		m, err = l.receive(answerWithin)
	}
	switch {
	case ctx.Err() != nil:
		m.close()
		return message{}, fmt.Errorf("%s: %w", f.Op, ctx.Err())
	case errors.Is(err, io.EOF), errors.Is(err, unix.EPIPE), errors.Is(err, unix.ECONNRESET):
		return message{}, fmt.Errorf("%s: the relay worker hung up: %w", f.Op, ErrNotRunning)
	case err != nil:
		return message{}, fmt.Errorf("%s: relay worker: %w", f.Op, err)
	case m.Leaving:
		m.close()
		return message{}, fmt.Errorf("%s: %s: %w", f.Op, m.Error, ErrNotRunning)
	case m.Error != "":
		m.close()
		return message{}, refusal{f.Op, m.Error}
	}
	return m, nil
}

// A refusal is the answer of a worker that does not do what it was asked for. It
// can be asked again.
type refusal struct{ op, reason string }

func (r refusal) Error() string { return fmt.Sprintf("%s: relay worker: %s", r.op, r.reason) }

// ask connects, asks one thing and hangs up.
func ask(ctx context.Context, socket string, f frame, files sockets) (message, error) {
	l, err := dial(ctx, socket)
	if err != nil {
		return message{}, err
	}
	defer l.close()
	return l.request(ctx, f, files)
}

// hello asks who is there.
func (l link) hello(ctx context.Context, op string) (Hello, error) {
	m, err := l.request(ctx, frame{Op: op}, nil)
	if err != nil {
		return Hello{}, err
	}
	m.close()
	if m.Hello == nil {
		return Hello{}, fmt.Errorf("%s: the relay worker did not say who it is", op)
	}
	return *m.Hello, nil
}

func sayHello(ctx context.Context, socket string) (Hello, error) {
	l, err := dial(ctx, socket)
	if err != nil {
		return Hello{}, err
	}
	defer l.close()
	return l.hello(ctx, opHello)
}

// hash names a table.
func hash(table []byte) string {
	sum := sha256.Sum256(table)
	return hex.EncodeToString(sum[:])
}

// credentials says who is at the other end: who connected, or who listened.
func (l link) credentials() (*unix.Ucred, error) {
	raw, err := l.conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var (
		peer   *unix.Ucred
		failed error
	)
	err = raw.Control(func(fd uintptr) { peer, failed = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	return peer, errors.Join(err, failed)
}

// A process is one that can be waited for, though it is no child.
type process struct{ pidfd *os.File }

// process returns the one at the other end.
func (l link) process() (process, error) {
	peer, err := l.credentials()
	if err != nil {
		return process{}, err
	}
	fd, err := unix.PidfdOpen(int(peer.Pid), unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) {
		return process{}, ErrNotRunning
	}
	if err != nil {
		return process{}, fmt.Errorf("pidfd_open %d: %w", peer.Pid, err)
	}
	return process{os.NewFile(uintptr(fd), "pidfd")}, nil
}

func (p process) close() { _ = p.pidfd.Close() }

// wait returns when the process has ended: its pidfd is readable then.
func (p process) wait(ctx context.Context) error {
	if deadline, ok := ctx.Deadline(); ok {
		if err := p.pidfd.SetReadDeadline(deadline); err != nil {
			return err
		}
	}
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Read(func(fd uintptr) bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return err == nil && n > 0
	})
}
