package conntrack

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// The parts of linux/netfilter/nfnetlink_conntrack.h that we use.
const (
	msgNew    = unix.NFNL_SUBSYS_CTNETLINK << 8   // IPCTNL_MSG_CT_NEW, 0
	msgGet    = unix.NFNL_SUBSYS_CTNETLINK<<8 | 1 // IPCTNL_MSG_CT_GET
	msgDelete = unix.NFNL_SUBSYS_CTNETLINK<<8 | 2 // IPCTNL_MSG_CT_DELETE
	msgPerCPU = unix.NFNL_SUBSYS_CTNETLINK<<8 | 4 // IPCTNL_MSG_CT_GET_STATS_CPU
	msgStats  = unix.NFNL_SUBSYS_CTNETLINK<<8 | 5 // IPCTNL_MSG_CT_GET_STATS

	ctaTupleOrig     = 1
	ctaTupleReply    = 2
	ctaStatus        = 3
	ctaProtoinfo     = 4
	ctaTimeout       = 7
	ctaMark          = 8
	ctaCountersOrig  = 9
	ctaCountersReply = 10
	ctaID            = 12
	ctaZone          = 18
	ctaMarkMask      = 21

	ctaTupleIP    = 1
	ctaTupleProto = 2

	ctaIPv4Src = 1
	ctaIPv4Dst = 2
	ctaIPv6Src = 3
	ctaIPv6Dst = 4

	ctaProtoNum     = 1
	ctaProtoSrcPort = 2
	ctaProtoDstPort = 3

	ctaCountersPackets = 1
	ctaCountersBytes   = 2

	ctaProtoinfoTCP      = 1
	ctaProtoinfoTCPState = 1

	ctaStatsInsertFailed = 9
	ctaStatsDrop         = 10
	ctaStatsEarlyDrop    = 11

	ctaStatsGlobalEntries    = 1
	ctaStatsGlobalMaxEntries = 2

	nested = unix.NLA_F_NESTED
)

const (
	nlHeader = 16 // struct nlmsghdr
	nfHeader = 4  // struct nfgenmsg
)

// attr is one netlink attribute as read; typ has its flag bits removed.
type attr struct {
	typ  uint16
	data []byte
}

const attrTypeMask = ^uint16(unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)

// next cuts the first attribute off b. ok is false at the end, where rest is
// empty, and on garbage, where it is not.
func next(b []byte) (a attr, rest []byte, ok bool) {
	if len(b) < unix.SizeofNlAttr {
		return attr{}, b, false
	}
	n := int(binary.NativeEndian.Uint16(b))
	if n < unix.SizeofNlAttr || n > len(b) {
		return attr{}, b, false
	}
	typ := binary.NativeEndian.Uint16(b[2:]) & attrTypeMask
	return attr{typ, b[unix.SizeofNlAttr:n]}, b[min((n+3)&^3, len(b)):], true
}

// attrs is an append-only writer of attributes: a header of length and type in
// host order, a payload, padding to 4 bytes.
type attrs []byte

func (b *attrs) put(typ uint16, payload []byte) {
	*b = binary.NativeEndian.AppendUint16(*b, uint16(unix.SizeofNlAttr+len(payload)))
	*b = binary.NativeEndian.AppendUint16(*b, typ)
	*b = append(*b, payload...)
	for len(*b)%4 != 0 {
		*b = append(*b, 0)
	}
}

// u32 writes in network order, as all of ctnetlink's numbers are.
func (b *attrs) u32(typ uint16, v uint32) {
	var n [4]byte
	binary.BigEndian.PutUint32(n[:], v)
	b.put(typ, n[:])
}

// appendMessage appends one ctnetlink message.
func appendMessage(b []byte, typ, flags uint16, seq uint32, family uint8, body []byte) []byte {
	b = binary.NativeEndian.AppendUint32(b, uint32(nlHeader+nfHeader+len(body)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST|flags)
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = binary.NativeEndian.AppendUint32(b, 0) // port: the kernel's business
	b = append(b, family, unix.NFNETLINK_V0, 0, 0)
	return append(b, body...)
}

// A message is one netlink message as read.
type message struct {
	typ, flags uint16
	seq        uint32
	family     uint8
	raw        []byte // after nlmsghdr
	body       []byte // after nfgenmsg
}

// errno is the error in an NLMSG_ERROR or NLMSG_DONE message, 0 for none.
func (m message) errno() unix.Errno {
	if len(m.raw) < 4 {
		return unix.EBADMSG
	}
	return unix.Errno(-int32(binary.NativeEndian.Uint32(m.raw)))
}

// nextMessage cuts the first message off a datagram. ok is false at the end and
// on garbage.
func nextMessage(b []byte) (m message, rest []byte, ok bool) {
	if len(b) < nlHeader {
		return message{}, nil, false
	}
	n := uint64(binary.NativeEndian.Uint32(b))
	if n < nlHeader || n > uint64(len(b)) {
		return message{}, nil, false
	}
	m = message{
		typ: binary.NativeEndian.Uint16(b[4:]), flags: binary.NativeEndian.Uint16(b[6:]),
		seq: binary.NativeEndian.Uint32(b[8:]), raw: b[nlHeader:n],
	}
	if len(m.raw) >= nfHeader {
		m.family, m.body = m.raw[0], m.raw[nfHeader:]
	}
	return m, b[min((n+3)&^3, uint64(len(b))):], true
}

const (
	// The kernel fills at most 32 KiB of a dump into one datagram, and that
	// much only for readers that have shown the room for it (netlink_dump).
	datagram = 64 << 10
	// A batch of refused requests brings an answer for each of them, which
	// the kernel charges with 768 bytes or more.
	answerBuffer = 4 << 20
	// The kernel answers within the request. This is for the case that an
	// answer was lost.
	answerTimeout = 5 // seconds
)

// A conn asks questions. It lives for one operation, so that nothing is left in
// it of one that was given up, and belongs to one goroutine.
type conn struct {
	fd  int
	seq uint32
	buf []byte
}

func dial() (*conn, error) {
	fd, err := open(0)
	if err != nil {
		return nil, err
	}
	setReceiveBuffer(fd, answerBuffer)
	// Errors come without a copy of the message that they are about.
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1)
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: answerTimeout}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("limit the wait on a netlink socket: %w", err)
	}
	return &conn{fd: fd, buf: make([]byte, datagram)}, nil
}

func open(flags int) (fd int, err error) {
	fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|flags, unix.NETLINK_NETFILTER)
	if err != nil {
		return 0, fmt.Errorf("open netlink socket: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		unix.Close(fd)
		return 0, fmt.Errorf("bind netlink socket: %w", err)
	}
	return fd, nil
}

// setReceiveBuffer asks for more than rmem_max, which needs CAP_NET_ADMIN in
// the initial user namespace, and takes what it gets otherwise.
func setReceiveBuffer(fd, bytes int) {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, bytes) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, bytes)
	}
}

func (c *conn) close() { unix.Close(c.fd) }

// A pool keeps connections for the next that needs one, since to close one may
// take long: the kernel looks then whether the socket owned tables of nftables, and
// before that waits for the transaction under way and for what the last one removed
// to be freed, an RCU grace period or several (nft_rcv_nl_event). Reconcilers, who
// ask conntrack between their transactions, would do so with each pass.
type pool struct {
	mu   sync.Mutex
	idle []*conn
}

// poolIdle is how many connections are kept, each with its buffer of 64 KiB: few
// use them at a time.
const poolIdle = 2

// use calls f with a connection that nobody else uses. One that fails may have
// answers to come, and is not used again.
func (p *pool) use(f func(*conn) error) error {
	c := p.take()
	if c == nil {
		var err error
		if c, err = dial(); err != nil {
			return err
		}
	}
	if err := f(c); err != nil {
		c.close()
		return err
	}
	p.put(c)
	return nil
}

// take returns a connection that was kept, nil if none is left.
func (p *pool) take() *conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := len(p.idle)
	if n == 0 {
		return nil
	}
	c := p.idle[n-1]
	p.idle = p.idle[:n-1]
	return c
}

func (p *pool) put(c *conn) {
	p.mu.Lock()
	if len(p.idle) < poolIdle {
		p.idle = append(p.idle, c)
		c = nil
	}
	p.mu.Unlock()
	if c != nil {
		c.close()
	}
}

func (p *pool) close() {
	p.mu.Lock()
	idle := p.idle
	p.idle = nil
	p.mu.Unlock()
	for _, c := range idle {
		c.close()
	}
}

func (c *conn) send(b []byte) error {
	err := retryEINTR(func() error {
		return unix.Sendto(c.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	})
	if err != nil {
		return fmt.Errorf("ask ctnetlink: %w", err)
	}
	return nil
}

// recv reads one datagram. It has no address: only the kernel and holders of
// CAP_NET_ADMIN can send to a socket of this family.
func (c *conn) recv() (b []byte, err error) {
	n := 0
	err = retryEINTR(func() error { n, err = unix.Read(c.fd, c.buf); return err })
	switch {
	case err == unix.EAGAIN:
		return nil, errors.New("ctnetlink does not answer")
	case err != nil:
		return nil, fmt.Errorf("read from ctnetlink: %w", err)
	}
	return c.buf[:n], nil
}

func retryEINTR(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}

// answers calls f for each answer to the request that was sent last, until one
// of them ends the conversation or f says so. An answer that ends it with an
// error is that error.
func (c *conn) answers(ctx context.Context, f func(message) (done bool, err error)) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		b, err := c.recv()
		if err != nil {
			return err
		}
		for m, rest, ok := nextMessage(b); ok; m, rest, ok = nextMessage(rest) {
			done, err := f(m)
			if done || err != nil {
				return err
			}
		}
	}
}

// A markFilter matches flows whose mark, under mask, is value. The zero one
// matches all flows.
type markFilter struct{ value, mask uint32 }

func (f markFilter) attrs() attrs {
	var a attrs
	if f.mask != 0 {
		a.u32(ctaMark, f.value)
		a.u32(ctaMarkMask, f.mask)
	}
	return a
}

var errInterrupted = errors.New("the table changed during the dump")

// dump calls f for each flow that filter matches. Now and then the kernel shows
// one twice, and a flow that comes or goes meanwhile may be shown or not.
func (c *conn) dump(ctx context.Context, filter markFilter, f func(*record) error) error {
	c.seq++
	err := c.send(appendMessage(nil, msgGet, unix.NLM_F_DUMP, c.seq, unix.AF_UNSPEC, filter.attrs()))
	if err != nil {
		return err
	}
	var r record
	return c.answers(ctx, func(m message) (bool, error) {
		if m.flags&unix.NLM_F_DUMP_INTR != 0 {
			return true, errInterrupted
		}
		switch m.typ {
		case unix.NLMSG_DONE, unix.NLMSG_ERROR:
			if errno := m.errno(); errno != 0 {
				return true, fmt.Errorf("dump conntrack table: %w", errno)
			}
			return true, nil
		}
		if err := r.parse(m); err != nil {
			return true, err
		}
		return false, f(&r)
	})
}

// A request asks for a change of one flow: it is of type msgNew or msgDelete.
type request struct {
	typ  uint16
	flow flowName // and what to change
}

// change makes the requests in a single send, and returns how many were carried
// out and how many not because a flowtable has the flow. A flow that ended by
// itself counts in neither and is no error.
func (c *conn) change(ctx context.Context, requests []request) (done, held int, err error) {
	var b []byte
	for i, r := range requests {
		flags := uint16(0)
		if i == len(requests)-1 {
			flags = unix.NLM_F_ACK // the others answer only when they fail
		}
		c.seq++
		b = appendMessage(b, r.typ, flags, c.seq, r.flow.family, r.flow.attrs)
	}
	if err := c.send(b); err != nil {
		return 0, 0, err
	}
	done = len(requests)
	var failed error
	err = c.answers(ctx, func(m message) (bool, error) {
		if m.typ != unix.NLMSG_ERROR {
			return false, nil
		}
		errno := m.errno()
		if errno != 0 {
			done--
		}
		switch errno {
		case 0, unix.ENOENT, unix.ETIME: // it ended, or was about to
		case unix.EBUSY:
			held++
		default:
			failed = errno
		}
		return m.seq == c.seq, nil
	})
	return done, held, errors.Join(failed, err)
}
