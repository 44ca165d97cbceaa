package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// Mode is the socket's: its owner and its group may connect.
const Mode fs.FileMode = 0o660

// A Socket is a daemon's socket and the lock that goes with it.
type Socket struct {
	*net.UnixListener
	lock *Lock
}

// SocketLock is the lock file of the socket at path.
func SocketLock(path string) string { return path + ".lock" }

// Listen opens the socket at path and makes its folder. A socket whose daemon
// died is replaced; one whose daemon lives is an error that matches ErrHeld.
func Listen(ctx context.Context, path string) (*Socket, error) {
	if err := checkPath(path); err != nil {
		return nil, err
	}
	held, err := Acquire(SocketLock(path))
	if err != nil {
		return nil, fmt.Errorf("socket %s: is another nlb running? %w", path, err)
	}
	l, err := listen(ctx, path)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("socket %s: %w", path, err), held.Release())
	}
	return &Socket{UnixListener: l, lock: held}, nil
}

// checkPath says what the kernel calls an invalid argument (unix(7), sun_path).
func checkPath(path string) error {
	const longest = 107
	if len(path) > longest {
		return fmt.Errorf("socket %s: a path of %d bytes is too long, a socket's has at most %d: name another with --socket", path, len(path), longest)
	}
	return nil
}

func listen(ctx context.Context, path string) (*net.UnixListener, error) {
	if err := removeStale(ctx, path); err != nil {
		return nil, err
	}
	// With the mode set before bind(2) nobody finds the door open for the
	// moment until chmod(2), which undoes what the umask took away.
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var failed error
		err := c.Control(func(fd uintptr) { failed = unix.Fchmod(int(fd), uint32(Mode)) })
		return errors.Join(err, failed)
	}}
	l, err := config.Listen(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, Mode); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l.(*net.UnixListener), nil
}

// removeStale removes what a dead daemon left. The lock says that none of ours
// lives, so whoever answers is a stranger.
func removeStale(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s is there and is not a socket; remove it or choose another path", filepath.Base(path))
	}
	var d net.Dialer
	if c, err := d.DialContext(ctx, "unix", path); err == nil {
		_ = c.Close()
		return errors.New("another program listens there; choose another path")
	}
	return os.Remove(path)
}

// Close removes the socket and releases the lock.
func (l *Socket) Close() error {
	return errors.Join(l.UnixListener.Close(), l.lock.Release())
}
