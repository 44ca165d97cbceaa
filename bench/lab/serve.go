package lab

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// A Serve says where a target listens and how it answers.
//
// Each line (TCP) or datagram (UDP) is answered by a line of JSON, an Answer,
// and connections stay open. A line that begins with "GET " is an HTTP request,
// answered with status 200 and the same JSON, after which the connection ends.
type Serve struct {
	Who      string     // default: the node's name
	Ports    []uint16   // 0 means a free one, see Listeners.Bound
	Networks []string   // "tcp", "udp"; default both
	Addr     netip.Addr // default: every address of both families
	// Greet makes a TCP target speak first, like SMTP: it sends an Answer as
	// soon as it has a connection, and one to each line as well.
	Greet bool
	// Proxy makes a TCP target read a PROXY protocol v2 header first. A
	// connection that does not begin with one is closed.
	Proxy bool
}

// An Answer is what a target says: who it is and who called.
type Answer struct {
	Who   string         `json:"who"`
	Peer  netip.Addr     `json:"peer"`
	Port  uint16         `json:"port"` // the peer's
	Local netip.AddrPort `json:"local"`
	Got   string         `json:"got"` // the question, up to gotLimit bytes of it
	// Client is the source that a PROXY header named; zero without one, and for
	// the LOCAL command.
	Client netip.AddrPort `json:"client,omitzero"`
}

const gotLimit = 100

// Listeners are open on a node until they or the agent are closed.
type Listeners struct {
	opened
	// Bound are the addresses that TCP and then UDP listen on, in the order of Serve.Ports.
	Bound []netip.AddrPort
}

// Serve opens listeners. If one cannot be opened, none is.
func (a *Agent) Serve(ctx context.Context, o Serve) (*Listeners, error) {
	if o.Who == "" {
		o.Who = a.node.Name
	}
	var bound []netip.AddrPort
	id, err := a.ask(ctx, "serve", o, &bound)
	if err != nil {
		return nil, err
	}
	return &Listeners{opened{a, id}, bound}, nil
}

// A target is the open listeners of one Serve.
type target struct {
	Serve
	mu     sync.Mutex
	open   map[io.Closer]bool // guarded by mu; nil when closed
	tcp    []net.Listener
	udp    []*net.UDPConn
	bounds []netip.AddrPort
}

func (s *server) serve(ctx context.Context, id uint64, o Serve) ([]netip.AddrPort, error) {
	if len(o.Networks) == 0 {
		o.Networks = []string{"tcp", "udp"}
	}
	t := &target{Serve: o, open: map[io.Closer]bool{}}
	for _, network := range o.Networks {
		for _, port := range o.Ports {
			if err := t.listen(ctx, network, port); err != nil {
				return nil, errors.Join(err, t.Close())
			}
		}
	}
	for _, l := range t.tcp {
		go t.accept(l)
	}
	for _, c := range t.udp {
		go t.receive(c)
	}
	s.keep(id, t)
	return t.bounds, nil
}

func (t *target) listen(ctx context.Context, network string, port uint16) error {
	host := ""
	if t.Addr.IsValid() {
		host = t.Addr.String()
	}
	address := net.JoinHostPort(host, fmt.Sprint(port))
	switch network {
	case "tcp":
		l, err := (&net.ListenConfig{KeepAlive: -1}).Listen(ctx, "tcp", address)
		if err != nil {
			return err
		}
		t.keep(l)
		t.tcp = append(t.tcp, l)
		t.bounds = append(t.bounds, l.Addr().(*net.TCPAddr).AddrPort())
	case "udp":
		l, err := (&net.ListenConfig{Control: wantDestination}).ListenPacket(ctx, "udp", address)
		if err != nil {
			return err
		}
		c := l.(*net.UDPConn)
		t.keep(c)
		t.udp = append(t.udp, c)
		t.bounds = append(t.bounds, c.LocalAddr().(*net.UDPAddr).AddrPort())
	default:
		return fmt.Errorf("%q is neither tcp nor udp", network)
	}
	return nil
}

// keep remembers what Close has to close, and closes it if that was before.
func (t *target) keep(c io.Closer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.open == nil {
		_ = c.Close()
		return
	}
	t.open[c] = true
}

func (t *target) forget(c io.Closer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.open, c)
	_ = c.Close()
}

func (t *target) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var errs []error
	for c := range t.open {
		errs = append(errs, c.Close())
	}
	t.open = nil
	return errors.Join(errs...)
}

// line is the answer to a question.
func (a Answer) line(got []byte) []byte {
	a.Got = string(bytes.TrimSpace(got[:min(len(got), gotLimit)]))
	line, _ := json.Marshal(a) // cannot fail: strings and numbers
	return append(line, '\n')
}

func (t *target) answer(peer, local netip.AddrPort) Answer {
	return Answer{
		Who: t.Who, Peer: peer.Addr().Unmap(), Port: peer.Port(),
		Local: netip.AddrPortFrom(local.Addr().Unmap(), local.Port()),
	}
}

func (t *target) accept(l net.Listener) {
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // the connection failed, not the listener
		}
		t.keep(c)
		go func() {
			defer t.forget(c)
			t.converse(c)
		}()
	}
}

func (t *target) converse(c net.Conn) {
	answer := t.answer(c.RemoteAddr().(*net.TCPAddr).AddrPort(), c.LocalAddr().(*net.TCPAddr).AddrPort())
	lines := bufio.NewReader(c)
	if t.Proxy {
		client, err := readProxyHeader(lines)
		if err != nil {
			return
		}
		answer.Client = client
	}
	if t.Greet {
		if _, err := c.Write(answer.line(nil)); err != nil {
			return
		}
	}
	for {
		line, err := lines.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) {
			continue // bulk data, or a line too long to be a question
		}
		if err != nil {
			return
		}
		say := answer.line(line)
		if bytes.HasPrefix(line, []byte("GET ")) {
			answerHTTP(c, lines, say)
			return
		}
		if _, err := c.Write(say); err != nil {
			return
		}
	}
}

// proxySignature begins a PROXY protocol v2 header (HAProxy, proxy-protocol.txt, 2.2).
const proxySignature = "\r\n\r\n\x00\r\nQUIT\n"

var errNoProxyHeader = errors.New("not a PROXY v2 header")

// readProxyHeader returns the source a header names. It is the lab's own reading
// of the specification, apart from the one that writes headers.
func readProxyHeader(r *bufio.Reader) (netip.AddrPort, error) {
	var fixed [16]byte
	if _, err := io.ReadFull(r, fixed[:]); err != nil {
		return netip.AddrPort{}, err
	}
	if string(fixed[:12]) != proxySignature || fixed[12]>>4 != 2 {
		return netip.AddrPort{}, errNoProxyHeader
	}
	rest := make([]byte, binary.BigEndian.Uint16(fixed[14:]))
	if _, err := io.ReadFull(r, rest); err != nil {
		return netip.AddrPort{}, err
	}
	const local, proxy = 0, 1
	switch fixed[12] & 0x0f {
	case local:
		return netip.AddrPort{}, nil
	case proxy:
	default:
		return netip.AddrPort{}, errNoProxyHeader
	}
	// Source address, destination address, source port, destination port.
	switch family := fixed[13] >> 4; {
	case family == 1 && len(rest) >= 12:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(rest[:4])), binary.BigEndian.Uint16(rest[8:])), nil
	case family == 2 && len(rest) >= 36:
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte(rest[:16])), binary.BigEndian.Uint16(rest[32:])), nil
	}
	return netip.AddrPort{}, errNoProxyHeader
}

// ProxySource is the client that a PROXY v2 header in the packet's Data names. It
// reports false if there is no header, or one that names nobody.
func (p Packet) ProxySource() (netip.AddrPort, bool) {
	i := bytes.Index(p.Data, []byte(proxySignature))
	if p.Proto != unix.IPPROTO_TCP || i < 0 {
		return netip.AddrPort{}, false
	}
	client, err := readProxyHeader(bufio.NewReader(bytes.NewReader(p.Data[i:])))
	return client, err == nil && client.IsValid()
}

// answerHTTP reads the header to its end, lest the close turn into a reset.
func answerHTTP(c net.Conn, lines *bufio.Reader, body []byte) {
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			return
		}
		if strings.TrimSpace(line) == "" {
			break
		}
	}
	fmt.Fprintf(c, "HTTP/1.0 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
}

// wantDestination makes a socket tell the address each datagram was sent to,
// for both families if it is an IPv6 one.
func wantDestination(_, _ string, raw syscall.RawConn) error {
	var opt error
	err := raw.Control(func(fd uintptr) {
		if opt = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1); opt != nil {
			opt = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
		}
	})
	return errors.Join(err, opt)
}

func (t *target) receive(c *net.UDPConn) {
	port := c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
	datagram, control := make([]byte, 65535), make([]byte, 256)
	for {
		size, n, _, peer, err := c.ReadMsgUDPAddrPort(datagram, control)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error of an earlier answer
		}
		to, back := destination(control[:n])
		// A lost answer is the caller's to notice.
		_, _, _ = c.WriteMsgUDPAddrPort(t.answer(peer, netip.AddrPortFrom(to, port)).line(datagram[:size]), back, peer)
	}
}

// destination finds the address a datagram was sent to, and makes the control
// message that answers from it. The kernel's own choice would be another one on
// a host with several. The interface is left to the routes.
func destination(control []byte) (netip.Addr, []byte) {
	msgs, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return netip.Addr{}, nil
	}
	for _, m := range msgs {
		switch {
		case m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_PKTINFO && len(m.Data) >= unix.SizeofInet6Pktinfo:
			addr := [16]byte(m.Data[:16])
			return netip.AddrFrom16(addr).Unmap(), unix.PktInfo6(&unix.Inet6Pktinfo{Addr: addr})
		case m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_PKTINFO && len(m.Data) >= unix.SizeofInet4Pktinfo:
			// struct in_pktinfo: interface, local address, the header's destination.
			addr := [4]byte(m.Data[8:12])
			return netip.AddrFrom4(addr), unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: addr})
		}
	}
	return netip.Addr{}, nil
}
