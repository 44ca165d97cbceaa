package healthcheck

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A socket is the connection of one probe.
//
// It is a raw non-blocking socket in the runtime's poller rather than a
// net.TCPConn: no keep-alive options, no multipath TCP and no goroutine per
// dial to watch a context, and the options of a probe are all set in one place.
type socket struct {
	*os.File
	raw           syscall.RawConn
	peer          unix.Sockaddr
	local, remote netip.AddrPort
}

// LocalAddr and RemoteAddr make a socket a net.Conn, as crypto/tls wants it.
func (s *socket) LocalAddr() net.Addr  { return net.TCPAddrFromAddrPort(s.local) }
func (s *socket) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(s.remote) }

// A stepError is a failure of a probe's own preparation, before any packet.
type stepError struct {
	step string
	err  error
}

func (e *stepError) Error() string { return e.step + ": " + e.err.Error() }
func (e *stepError) Unwrap() error { return e.err }

func step(name string, err error) error {
	if err == nil {
		return nil
	}
	return &stepError{name, err}
}

// dial sends a SYN to the target of c and returns without waiting for the
// answer. Both the deadline and the end of ctx, for as long as stop was not
// called, interrupt whatever is done with the socket.
func dial(ctx context.Context, c Check, mark uint32, deadline time.Time) (s *socket, stop func() bool, err error) {
	fd, err := newSocket(c, mark)
	if err != nil {
		return nil, nil, err
	}
	peer, err := sockaddr(c.Target)
	if err == nil {
		err = unix.Connect(fd, peer)
	}
	if err != nil && err != unix.EINPROGRESS {
		unix.Close(fd)
		return nil, nil, err
	}
	s = &socket{File: os.NewFile(uintptr(fd), "probe"), peer: peer, remote: c.Target}
	if s.raw, err = s.SyscallConn(); err == nil {
		err = s.SetDeadline(deadline)
	}
	if err != nil {
		s.Close()
		return nil, nil, step("poll socket", err)
	}
	s.local = localAddr(fd)
	return s, context.AfterFunc(ctx, func() { s.SetDeadline(time.Unix(1, 0)) }), nil
}

// established waits until the handshake is over. A second connect(2) tells
// whether it is, and why not, in one call: 0, EALREADY or the error.
//
// The socket entered the poller after its SYN was sent. An edge between that
// and the wait cannot be lost: the state is looked at first, then waited for.
func (s *socket) established() error {
	var verdict error
	err := s.raw.Write(func(fd uintptr) bool {
		verdict = unix.Connect(int(fd), s.peer)
		return verdict != unix.EALREADY && verdict != unix.EINPROGRESS && verdict != unix.EINTR
	})
	if err != nil {
		return err
	}
	return verdict
}

// newSocket returns a socket that is ready to connect.
func newSocket(c Check, mark uint32) (int, error) {
	family := unix.AF_INET
	if c.Target.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return -1, step("open socket", err)
	}
	if err := prepare(fd, c, mark); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// prepare sets what every probe's socket has.
//
// How a probe ends is chosen here too. A plain close would leave a TIME_WAIT
// on this host for a minute: 600,000 of them at 10,000 probes a second. A
// reset (SO_LINGER 0) leaves none, but the target's read fails with
// ECONNRESET, which servers log as an error on every probe. A half-open probe
// that resets instead of completing the handshake is unseen by the target,
// and therefore blind to a process that hangs: completed handshakes fill the
// accept queue of such a process, and then the kernel drops the SYNs. So the
// handshake is completed and close sends a FIN, which the target reads as an
// orderly end; TCP_LINGER2 -1 (tcp(7)) forgets the connection once the FIN is
// acknowledged.
func prepare(fd int, c Check, mark uint32) error {
	if mark != 0 {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(mark)); err != nil {
			return step("set SO_MARK (needs CAP_NET_ADMIN)", err)
		}
	}
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_LINGER2, -1); err != nil {
		return step("set TCP_LINGER2", err)
	}
	if c.Protocol != TCP {
		// A LOCAL header or a TLS flight must not wait for the
		// acknowledgement of the one before (RFC 896).
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
			return step("set TCP_NODELAY", err)
		}
	}
	if !c.Source.IsValid() {
		return nil
	}
	// Without this, bind(2) would take a port that is free towards every
	// destination, and a few ten thousand probes would use them up.
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1); err != nil {
		return step("set IP_BIND_ADDRESS_NO_PORT", err)
	}
	sa, err := sockaddr(netip.AddrPortFrom(c.Source, 0))
	if err == nil {
		err = unix.Bind(fd, sa)
	}
	if err != nil {
		return step("bind to "+c.Source.String(), err)
	}
	return nil
}

// routeSource returns the address the kernel would probe the target from,
// without sending a packet: connecting a UDP socket only looks the route up.
func routeSource(target netip.AddrPort, mark uint32) (netip.Addr, error) {
	family := unix.AF_INET
	if target.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return netip.Addr{}, step("open socket", err)
	}
	defer unix.Close(fd)
	if mark != 0 {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(mark)); err != nil {
			return netip.Addr{}, step("set SO_MARK (needs CAP_NET_ADMIN)", err)
		}
	}
	sa, err := sockaddr(target)
	if err == nil {
		err = unix.Connect(fd, sa)
	}
	if err != nil {
		return netip.Addr{}, err
	}
	return localAddr(fd).Addr(), nil
}

// localAddr returns the address a socket is bound to, the zero AddrPort when
// it has none.
func localAddr(fd int) netip.AddrPort {
	// x/sys would ask for the protocol too, in a system call of its own.
	sa, err := syscall.Getsockname(fd)
	if err != nil {
		return netip.AddrPort{}
	}
	switch sa := sa.(type) {
	case *syscall.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *syscall.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

func sockaddr(ap netip.AddrPort) (unix.Sockaddr, error) {
	addr := ap.Addr()
	if addr.Is4() {
		return &unix.SockaddrInet4{Port: int(ap.Port()), Addr: addr.As4()}, nil
	}
	if !addr.Is6() {
		return nil, step("target", errors.New("has no address"))
	}
	zone, err := zoneID(addr.Zone())
	if err != nil {
		return nil, step("zone of "+addr.String(), err)
	}
	return &unix.SockaddrInet6{Port: int(ap.Port()), Addr: addr.As16(), ZoneId: zone}, nil
}

func zoneID(zone string) (uint32, error) {
	if zone == "" {
		return 0, nil
	}
	if n, err := strconv.ParseUint(zone, 10, 32); err == nil {
		return uint32(n), nil
	}
	link, err := net.InterfaceByName(zone)
	if err != nil {
		return 0, fmt.Errorf("look up interface: %w", err)
	}
	return uint32(link.Index), nil
}
