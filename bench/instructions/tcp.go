package main

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// tcpLoad makes connections, one after the other: connect, a request, an answer,
// and FINs, the client's first. Each has a port of its own.
type tcpLoad struct {
	site    *site
	next    int // port
	message []byte
}

func newTCPLoad(s *site) (load, error) {
	return &tcpLoad{site: s, next: firstFlow, message: make([]byte, payload)}, nil
}

func (*tcpLoad) close() {}

func (l *tcpLoad) prepare() error {
	if l.next++; l.next > lastFlow {
		return errors.New("no ports left for connections")
	}
	return nil
}

// run is called in the client's namespace.
func (l *tcpLoad) run() (connections int, err error) {
	if err := l.connection(); err != nil {
		return 0, fmt.Errorf("TCP connection from port %d: %w", l.next, err)
	}
	return 1, nil
}

func (l *tcpLoad) connection() error {
	client, err := bound(unix.SOCK_STREAM, l.site.Clients[0].Addr4, l.next)
	if err != nil {
		return err
	}
	target := -1
	defer func() {
		_ = unix.Close(client)
		if target >= 0 {
			_ = unix.Close(target)
		}
	}()
	to := l.site.address(l.next)
	if err := unix.Connect(client, &to); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return os.NewSyscallError("connect", err)
	}
	// A connection can be accepted when both sides have it.
	i, err := await(l.site.tcp...)
	if err != nil {
		return fmt.Errorf("accept: %w", err)
	}
	if target, _, err = unix.Accept4(l.site.tcp[i], unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC); err != nil {
		return os.NewSyscallError("accept4", err)
	}
	if err := l.pass(client, target); err != nil {
		return fmt.Errorf("request: %w", err)
	}
	if err := l.pass(target, client); err != nil {
		return fmt.Errorf("answer: %w", err)
	}
	return nil
}

// pass sends the message on one socket and reads it from the other.
func (l *tcpLoad) pass(from, to int) error {
	if _, err := unix.Write(from, l.message); err != nil {
		return os.NewSyscallError("write", err)
	}
	for {
		n, err := unix.Read(to, l.message)
		switch {
		case errors.Is(err, unix.EAGAIN):
			if _, err := await(to); err != nil {
				return err
			}
			continue
		case err != nil:
			return os.NewSyscallError("read", err)
		case n != len(l.message):
			return fmt.Errorf("%d bytes arrived of %d", n, len(l.message))
		}
		return nil
	}
}
