package nstest

import (
	"net"
	"testing"
)

// Serve listens at an address and handles each connection in a goroutine of its
// own, which closes it. It ends with the test, which it fails if it cannot listen,
// or when the listener is closed.
func Serve(t testing.TB, at string, handle func(net.Conn)) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = c.Close() }()
				handle(c)
			}()
		}
	}()
	return l
}
