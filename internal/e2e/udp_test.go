package e2e

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nlb/bench/lab"
)

// What becomes of datagrams too large for one packet (ip(7), IP_MTU_DISCOVER;
// the constants of IPv6 have the same values).
const (
	mayFragment     = unix.IP_PMTUDISC_DONT
	mustNotFragment = unix.IP_PMTUDISC_DO
)

// bindUDP opens a socket on a node.
func bindUDP(t *testing.T, n *lab.Node, local netip.AddrPort, discover int) *net.UDPConn {
	t.Helper()
	var conn *net.UDPConn
	err := n.Do(func() (err error) {
		conn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(local))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	level, option := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER
	if local.Addr().Is6() {
		level, option = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER
	}
	var opt error
	err = raw.Control(func(fd uintptr) { opt = unix.SetsockoptInt(int(fd), level, option, discover) })
	if err := errors.Join(err, opt, conn.SetDeadline(time.Now().Add(limit))); err != nil {
		t.Fatal(err)
	}
	return conn
}

// deliver sends a datagram, expects it at the other end and returns where it seems
// to come from.
func deliver(t *testing.T, what string, from, at *net.UDPConn, to netip.AddrPort, sent []byte) netip.AddrPort {
	t.Helper()
	if _, err := from.WriteToUDPAddrPort(sent, to); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	// One byte more than expected, to see that there is none.
	for b := make([]byte, len(sent)+1); ; {
		n, source, err := at.ReadFromUDPAddrPort(b)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if bytes.Equal(b[:n], sent) {
			return netip.AddrPortFrom(source.Addr().Unmap(), source.Port())
		}
	}
}
