package main

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"nlb/bench/measure"
)

// tcpLoad makes connections, one after the other: connect, a request, a
// response, and the client's RST, which leaves no TIME_WAIT on either side.
// Each has a port of its own until all have been used.
type tcpLoad struct {
	site      *site
	next      int // port
	listeners []unix.PollFd
	message   []byte
}

func newTCPLoad(s *site) *tcpLoad {
	return &tcpLoad{site: s, next: firstPort, listeners: measure.Readable(s.sockets.TCP...), message: make([]byte, payload)}
}

func (*tcpLoad) close() {}

// run is called in the client's namespace.
func (l *tcpLoad) run(d time.Duration) (begun, made int, err error) {
	for end := time.Now().Add(d); time.Now().Before(end); made++ {
		if err := l.connection(); err != nil {
			return 0, 0, fmt.Errorf("TCP connection from port %d: %w", l.next, err)
		}
		if l.next++; l.next > lastPort {
			l.next = firstPort
		}
	}
	return made, made, nil
}

// reset makes close(2) send a RST.
var reset = unix.Linger{Onoff: 1}

func (l *tcpLoad) connection() error {
	client, err := measure.Bind(unix.SOCK_STREAM, l.site.Clients[0].Addr4, l.next)
	if err != nil {
		return err
	}
	target := -1
	defer func() {
		_ = unix.Close(client) // the RST, which finds the target's side there
		if target >= 0 {
			_ = unix.Close(target)
		}
	}()
	if err := unix.SetsockoptLinger(client, unix.SOL_SOCKET, unix.SO_LINGER, &reset); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	to := l.site.address(l.next)
	if err := unix.Connect(client, &to); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return os.NewSyscallError("connect", err)
	}
	// A connection can be accepted when both sides have it.
	i, err := measure.FirstReadable(l.listeners)
	if err != nil {
		return fmt.Errorf("accept: %w", err)
	}
	fd, _, errno := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(l.listeners[i].Fd), 0, 0, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
	if errno != 0 {
		return os.NewSyscallError("accept4", errno)
	}
	target = int(fd)
	if err := measure.Pass(client, target, l.message); err != nil {
		return fmt.Errorf("request: %w", err)
	}
	if err := measure.Pass(target, client, l.message); err != nil {
		return fmt.Errorf("response: %w", err)
	}
	return nil
}
