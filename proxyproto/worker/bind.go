package worker

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// backlog of a listener. The kernel lowers it to net.core.somaxconn, which is
// 4096 by default. It is what outlives a worker that died.
const backlog = 4096

// listen opens a listening socket. The address need not be on this host yet, or
// any more (IP_FREEBIND, ip(7)).
func listen(at netip.AddrPort) (int, error) {
	fd, err := bind(at)
	if err != nil {
		return -1, err
	}
	if err := unix.Listen(fd, backlog); err != nil {
		_ = unix.Close(fd)
		return -1, bindError(at, err)
	}
	return fd, nil
}

// bindable says why nothing can listen there. It does not listen itself, so that
// nobody could connect.
func bindable(at netip.AddrPort) error {
	fd, err := bind(at)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

func bind(at netip.AddrPort) (int, error) {
	family := unix.AF_INET
	if at.Addr().Is6() {
		family = unix.AF_INET6
	}
	// Plain TCP: MPTCP would take options that the kernel modes do not.
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return -1, bindError(at, err)
	}
	if err := options(fd, at.Addr()); err != nil {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("%s: %w", at, err)
	}
	if err := unix.Bind(fd, sockaddr(at)); err != nil {
		_ = unix.Close(fd)
		return -1, bindError(at, err)
	}
	return fd, nil
}

func options(fd int, a netip.Addr) error {
	set := func(level, option int) error { return unix.SetsockoptInt(fd, level, option, 1) }
	// A connection that is in TIME_WAIT must not keep us from listening.
	err := set(unix.SOL_SOCKET, unix.SO_REUSEADDR)
	if a.Is4() {
		return errors.Join(err, set(unix.SOL_IP, unix.IP_FREEBIND))
	}
	return errors.Join(err, set(unix.SOL_IPV6, unix.IPV6_FREEBIND), set(unix.SOL_IPV6, unix.IPV6_V6ONLY))
}

func sockaddr(at netip.AddrPort) unix.Sockaddr {
	if at.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(at.Port()), Addr: at.Addr().As16()}
}

// bindError says in words why nothing can listen at an address.
func bindError(at netip.AddrPort, err error) error {
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		if who, found := occupant(at); found {
			return fmt.Errorf("%s: a program on this host listens on %s: %w", at, who, err)
		}
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fmt.Errorf("%s: not permitted (ports below net.ipv4.ip_unprivileged_port_start need CAP_NET_BIND_SERVICE): %w", at, err)
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE):
		return fmt.Errorf("%s: too many open files (raise LimitNOFILE): %w", at, err)
	case errors.Is(err, unix.EAFNOSUPPORT):
		return fmt.Errorf("%s: the kernel has no IPv6 (ipv6.disable=1?): %w", at, err)
	}
	return fmt.Errorf("%s: %w", at, err)
}

// occupant names who listens where nobody can any more, as far as it is to be
// seen.
func occupant(at netip.AddrPort) (string, bool) {
	// A socket of IPv6 may take IPv4 too, but not the other way round.
	files := []string{"/proc/net/tcp", "/proc/net/tcp6"}
	if at.Addr().Is6() {
		files = files[1:]
	}
	for _, file := range files {
		f, err := os.Open(file)
		if err != nil {
			continue
		}
		l, found := findListener(bufio.NewScanner(f), at)
		_ = f.Close()
		if !found {
			continue
		}
		if program := owner(l.inode); program != "" {
			return fmt.Sprintf("%s (%s)", l.at, program), true
		}
		return l.at.String(), true
	}
	return "", false
}

// A listener is a line of /proc/net/tcp.
type listener struct {
	at    netip.AddrPort
	inode string
}

// findListener looks for the one that keeps others from at: on the very address,
// or on all.
func findListener(lines *bufio.Scanner, at netip.AddrPort) (listener, bool) {
	for lines.Scan() {
		l, ok := parseListener(lines.Text())
		if ok && l.at.Port() == at.Port() && (l.at.Addr() == at.Addr() || l.at.Addr().IsUnspecified()) {
			return l, true
		}
	}
	return listener{}, false
}

// parseListener reads a line of /proc/net/tcp or tcp6
// (Documentation/networking/proc_net_tcp.rst): an ordinal, the local address and
// port, the remote ones, the state, and, tenth, the inode.
func parseListener(line string) (listener, bool) {
	const listening = "0A"
	fields := strings.Fields(line)
	if len(fields) < 10 || fields[3] != listening {
		return listener{}, false
	}
	address, port, ok := strings.Cut(fields[1], ":")
	number, err := strconv.ParseUint(port, 16, 16)
	if !ok || err != nil {
		return listener{}, false
	}
	raw, err := hex.DecodeString(address)
	if err != nil {
		return listener{}, false
	}
	// Words of 4 bytes are printed as numbers of this machine.
	for i := 0; i+4 <= len(raw); i += 4 {
		binary.NativeEndian.PutUint32(raw[i:], binary.BigEndian.Uint32(raw[i:]))
	}
	a, ok := netip.AddrFromSlice(raw)
	if !ok {
		return listener{}, false
	}
	return listener{netip.AddrPortFrom(a, uint16(number)), fields[9]}, true
}

// owner names a process that has the socket open; empty if there is none to be
// seen.
func owner(inode string) string {
	links, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return ""
	}
	want := "socket:[" + inode + "]"
	for _, l := range links {
		if to, err := os.Readlink(l); err != nil || to != want {
			continue
		}
		process := filepath.Dir(filepath.Dir(l))
		name, err := os.ReadFile(filepath.Join(process, "comm"))
		if err != nil {
			continue
		}
		return fmt.Sprintf("%s, pid %s", strings.TrimSpace(string(name)), filepath.Base(process))
	}
	return ""
}
