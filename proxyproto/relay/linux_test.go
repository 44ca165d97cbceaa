package relay

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"nlb/internal/wait"
)

// TestErrorsMoveNothing: the machine takes what a call returns for a number of
// bytes even if there was no room, or nothing to read.
func TestErrorsMoveNothing(t *testing.T) {
	var k linuxKernel
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(ends[0])
	defer unix.Close(ends[1])
	r, w, size, errno := k.openPipe()
	if errno != 0 || size < leastPipe {
		t.Fatal(size, errno)
	}
	defer k.closePipe(r, w)
	fd, buf := int32(ends[0]), make([]byte, 1<<10)
	wantAgain := func(what string, n int, err unix.Errno) {
		t.Helper()
		if n != 0 || err != unix.EAGAIN {
			t.Errorf("%s: %d, %v", what, n, err)
		}
	}
	n, errno := k.read(fd, buf)
	wantAgain("read", n, errno)
	n, errno = k.splice(r, fd, 100)
	wantAgain("splice from an empty pipe", n, errno)
	for errno = 0; errno == 0; {
		n, errno = k.write(fd, buf)
	}
	wantAgain("write", n, errno)
}

// TestHandshakeEndsWithTheHeader: the target is spared a segment, and gets its
// answers acknowledged as fast as from anybody.
func TestHandshakeEndsWithTheHeader(t *testing.T) {
	for _, tt := range []struct {
		name   string
		to     netip.AddrPort
		source netip.Addr
	}{
		{"IPv4", port(target4, 8091), source4},
		{"IPv6", port(target6, 8091), source6},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := listen(t, tt.to)
			// A loop that gets no turn for long finds that the kernel could not wait.
			wait.For(t, waitAtMost, "one segment less", func() error {
				got, quick, err := segmentsOfDial(l, tt.to, tt.source)
				if err != nil {
					t.Fatal(err)
				}
				usual, err := segmentsUsually(l, tt.to)
				if err != nil {
					t.Fatal(err)
				}
				if !quick {
					t.Fatal("answers are acknowledged late")
				}
				if got != usual-1 {
					return fmt.Errorf("the target had %d segments until the header was there, and %d from others", got, usual)
				}
				return nil
			})
		})
	}
}

const aHeader = "header"

// segmentsOfDial is how many segments a target had when it has read what was written
// first, and whether it has its own acknowledged at once.
func segmentsOfDial(l *net.TCPListener, to netip.AddrPort, source netip.Addr) (n uint32, quick bool, err error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return 0, false, err
	}
	defer unix.Close(epoll)
	k := linuxKernel{epoll: int32(epoll)}
	fd, errno := k.dial(to, source, token{})
	if errno != 0 {
		return 0, false, errno
	}
	defer k.close(fd)
	var events [1]unix.EpollEvent
	if n := k.wait(events[:], int(waitAtMost.Milliseconds())); n != 1 || events[0].Events&unix.EPOLLOUT == 0 {
		return 0, false, fmt.Errorf("no connection: %d events, %x", n, events[0].Events)
	}
	if _, errno := k.write(fd, []byte(aHeader)); errno != 0 {
		return 0, false, errno
	}
	k.acknowledge(fd)
	value, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_QUICKACK)
	if err != nil {
		return 0, false, err
	}
	n, err = segmentsUntilHeader(l)
	return n, value == 1, err
}

// segmentsUsually is how many segments a target has had from a usual client by then.
func segmentsUsually(l *net.TCPListener, to netip.AddrPort) (uint32, error) {
	c, err := net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(to))
	if err != nil {
		return 0, err
	}
	defer c.Close()
	if _, err := io.WriteString(c, aHeader); err != nil {
		return 0, err
	}
	return segmentsUntilHeader(l)
}

func segmentsUntilHeader(l *net.TCPListener) (n uint32, err error) {
	c, err := l.AcceptTCP()
	if err != nil {
		return 0, err
	}
	defer c.Close()
	if _, err := io.ReadFull(c, make([]byte, len(aHeader))); err != nil {
		return 0, err
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		var info *unix.TCPInfo
		if info, failed = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); failed == nil {
			n = info.Segs_in
		}
	})
	if err == nil {
		err = failed
	}
	return n, err
}
