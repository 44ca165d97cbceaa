package nft

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// attrs is an append-only writer of netlink attributes (linux/netlink.h): a
// 4-byte header of length and type in host order, a payload, padding to 4.
type attrs []byte

func (b *attrs) put(typ uint16, payload []byte) {
	*b = binary.NativeEndian.AppendUint16(*b, uint16(4+len(payload)))
	*b = binary.NativeEndian.AppendUint16(*b, typ)
	*b = append(*b, payload...)
	b.pad()
}

func (b *attrs) pad() {
	for len(*b)%4 != 0 {
		*b = append(*b, 0)
	}
}

func (b *attrs) str(typ uint16, s string) { b.put(typ, append([]byte(s), 0)) }

func (b *attrs) u8(typ uint16, v uint8) { b.put(typ, []byte{v}) }

// u32 writes in network order, as all of nf_tables' numbers are.
func (b *attrs) u32(typ uint16, v uint32) {
	b.put(typ, binary.BigEndian.AppendUint32(nil, v))
}

// nest wraps what fill writes into one attribute.
func (b *attrs) nest(typ uint16, fill func(*attrs)) {
	at := b.open(typ)
	fill(b)
	b.close(at)
}

// open and close are nest without a closure, for the loops that write a million
// elements.
func (b *attrs) open(typ uint16) int {
	at := len(*b)
	*b = append(*b, 0, 0, 0, 0)
	binary.NativeEndian.PutUint16((*b)[at+2:], typ|unix.NLA_F_NESTED)
	return at
}

func (b *attrs) close(at int) {
	binary.NativeEndian.PutUint16((*b)[at:], uint16(len(*b)-at))
}

// attr is one attribute as read; typ has its flag bits removed.
type attr struct {
	typ    uint16
	nested bool
	data   []byte
}

const attrTypeMask = ^uint16(unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)

// next cuts the first attribute off b. ok is false at the end and on garbage.
func next(b []byte) (a attr, rest []byte, ok bool) {
	if len(b) < 4 {
		return attr{}, nil, false
	}
	n := int(binary.NativeEndian.Uint16(b))
	typ := binary.NativeEndian.Uint16(b[2:])
	if n < 4 || n > len(b) {
		return attr{}, nil, false
	}
	a = attr{typ & attrTypeMask, typ&unix.NLA_F_NESTED != 0, b[4:n]}
	return a, b[min((n+3)&^3, len(b)):], true
}

// find returns the payload of the first attribute of that type, or nil.
func find(b []byte, typ uint16) []byte {
	for a, rest, ok := next(b); ok; a, rest, ok = next(rest) {
		if a.typ == typ {
			return a.data
		}
	}
	return nil
}

func text(b []byte) string {
	for i, c := range b {
		if c == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}

func be32(b []byte) uint32 {
	if len(b) < 4 {
		return 0
	}
	return binary.BigEndian.Uint32(b)
}

func be64(b []byte) uint64 {
	if len(b) < 8 {
		return 0
	}
	return binary.BigEndian.Uint64(b)
}

// holds reports whether got says everything that want says: each attribute of
// want is in got with the same value. What got says beyond is left alone, since
// newer kernels report more than we know of.
func holds(want, got []byte) bool {
	for w, rest, ok := next(want); ok; w, rest, ok = next(rest) {
		g, found := findAttr(got, w.typ)
		if !found {
			return false
		}
		if w.nested {
			if !holds(w.data, g.data) {
				return false
			}
		} else if string(w.data) != string(g.data) {
			return false
		}
	}
	return true
}

// holdsList compares lists: by position, and all of them.
func holdsList(want, got []byte) bool {
	for {
		w, wrest, wok := next(want)
		g, grest, gok := next(got)
		if !wok || !gok {
			return wok == gok
		}
		if w.typ != g.typ || !holds(w.data, g.data) {
			return false
		}
		want, got = wrest, grest
	}
}

func findAttr(b []byte, typ uint16) (attr, bool) {
	for a, rest, ok := next(b); ok; a, rest, ok = next(rest) {
		if a.typ == typ {
			return a, true
		}
	}
	return attr{}, false
}

const (
	nlHeader  = 16 // struct nlmsghdr
	nfHeader  = 4  // struct nfgenmsg
	nftSubsys = unix.NFNL_SUBSYS_NFTABLES << 8
)

// A batch is one nf_tables transaction under construction. Its messages keep
// the index of the step that wrote them, so an error names its step.
type batch struct {
	buf  []byte
	step []int // by message, beginning after BATCH_BEGIN
	at   int   // start of the open message
}

func newBatch() *batch {
	b := &batch{buf: make([]byte, 0, 64<<10)}
	b.begin(unix.NFNL_MSG_BATCH_BEGIN, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES, 0)
	b.record(func(a *attrs) { a.u32(unix.NFNL_BATCH_GENID, 0) })
	b.end()
	return b
}

// fit makes the kernel refuse the transaction, with ERESTART, unless the ruleset
// is at that generation. The number is the first attribute of the first message.
func (b *batch) fit(generation uint32) {
	binary.BigEndian.PutUint32(b.buf[nlHeader+nfHeader+4:], generation)
}

// message appends one nf_tables message.
func (b *batch) message(step int, typ, flags uint16, fill func(*attrs)) {
	b.step = append(b.step, step)
	b.begin(nftSubsys|typ, flags, unix.NFPROTO_INET, 0, uint32(len(b.step)))
	b.record(fill)
	b.end()
}

func (b *batch) begin(typ, flags uint16, family uint8, resID uint16, seq uint32) {
	b.at = len(b.buf)
	b.buf = binary.NativeEndian.AppendUint32(b.buf, 0) // length, set by end
	b.buf = binary.NativeEndian.AppendUint16(b.buf, typ)
	b.buf = binary.NativeEndian.AppendUint16(b.buf, unix.NLM_F_REQUEST|flags)
	b.buf = binary.NativeEndian.AppendUint32(b.buf, seq)
	b.buf = binary.NativeEndian.AppendUint32(b.buf, 0) // port: the kernel's business
	b.buf = append(b.buf, family, unix.NFNETLINK_V0)
	b.buf = binary.BigEndian.AppendUint16(b.buf, resID)
}

func (b *batch) record(fill func(*attrs)) {
	a := attrs(b.buf)
	fill(&a)
	b.buf = a
}

func (b *batch) end() {
	binary.NativeEndian.PutUint32(b.buf[b.at:], uint32(len(b.buf)-b.at))
}

// finish closes the transaction. The last message asks for an
// acknowledgement, so that silence is never taken for success.
func (b *batch) finish() {
	b.acknowledge()
	b.begin(unix.NFNL_MSG_BATCH_END, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES, uint32(len(b.step)+1))
	b.end()
}

// acknowledge has the kernel answer the last message.
func (b *batch) acknowledge() {
	flags := binary.NativeEndian.Uint16(b.buf[b.at+6:])
	binary.NativeEndian.PutUint16(b.buf[b.at+6:], flags|unix.NLM_F_ACK)
}

// A socket is a netlink socket of family NETLINK_NETFILTER, used by one
// goroutine at a time.
type socket struct {
	fd   int
	port uint32
	seq  uint32
	buf  []byte
}

func dial() (*socket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket: %w", err)
	}
	s := &socket{fd: fd, buf: make([]byte, 256<<10)}
	if err := s.bind(); err != nil {
		unix.Close(fd)
		return nil, err
	}
	// A transaction is one send, and a refused one brings an answer for each
	// message. FORCE passes wmem_max and needs CAP_NET_ADMIN, as all we do.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20)
	// Errors come without a copy of the message that they are about.
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1)
	return s, nil
}

func (s *socket) bind() error {
	if err := unix.Bind(s.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("bind netlink socket: %w", err)
	}
	sa, err := unix.Getsockname(s.fd)
	if err != nil {
		return fmt.Errorf("name netlink socket: %w", err)
	}
	s.port = sa.(*unix.SockaddrNetlink).Pid
	return nil
}

func (s *socket) close() error { return unix.Close(s.fd) }

func (s *socket) send(b []byte) error {
	_ = unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, len(b)+64<<10)
	return retryEINTR(func() error { return unix.Sendto(s.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}) })
}

// recv reads one datagram into s.buf.
func (s *socket) recv(flags int) (n int, err error) {
	err = retryEINTR(func() error { n, _, err = unix.Recvfrom(s.fd, s.buf, flags); return err })
	return n, err
}

func retryEINTR(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}

// A stepError is the kernel's refusal of one step of a transaction.
type stepError struct {
	step int // -1: the transaction as a whole
	err  unix.Errno
}

func (e *stepError) Error() string { return e.err.Error() }
func (e *stepError) Unwrap() error { return e.err }

// errAnswersLost says the outcome of a transaction is unknown: observe again.
var errAnswersLost = errors.New("the kernel's answer was lost")

// commit sends a finished transaction and reads its outcome. The kernel works on it
// within the send, so every answer is there when it returns.
func (s *socket) commit(b *batch) error {
	if err := s.send(b.buf); err != nil {
		return fmt.Errorf("send transaction: %w", err)
	}
	var first *stepError
	acked := false
	for {
		n, err := s.recv(unix.MSG_DONTWAIT)
		if err == unix.EAGAIN {
			break
		}
		if err != nil {
			return fmt.Errorf("%w: %w", errAnswersLost, err)
		}
		walk(s.buf[:n], func(m message) bool {
			if m.typ != unix.NLMSG_ERROR {
				return true
			}
			errno := m.errno()
			if errno == 0 {
				acked = acked || int(m.seq) == len(b.step)
				return true
			}
			if first == nil {
				first = &stepError{step: b.stepOf(m.seq), err: errno}
			}
			return true
		})
	}
	if first != nil {
		return first
	}
	if !acked {
		return errAnswersLost
	}
	return nil
}

func (b *batch) stepOf(seq uint32) int {
	if seq == 0 || int(seq) > len(b.step) {
		return -1
	}
	return b.step[seq-1]
}

// A message is one netlink message as read; body begins after nfgenmsg.
type message struct {
	typ, flags uint16
	seq, port  uint32
	family     uint8
	raw        []byte // after nlmsghdr
	body       []byte
}

// errno is the error of an NLMSG_ERROR message, 0 for an acknowledgement.
func (m message) errno() unix.Errno {
	if len(m.raw) < 4 {
		return unix.EBADMSG
	}
	return unix.Errno(-int32(binary.NativeEndian.Uint32(m.raw)))
}

// walk calls f for each message of a datagram until f returns false.
func walk(b []byte, f func(message) bool) {
	for len(b) >= nlHeader {
		n := int(binary.NativeEndian.Uint32(b))
		if n < nlHeader || n > len(b) {
			return
		}
		m := message{
			typ: binary.NativeEndian.Uint16(b[4:]), flags: binary.NativeEndian.Uint16(b[6:]),
			seq: binary.NativeEndian.Uint32(b[8:]), port: binary.NativeEndian.Uint32(b[12:]),
			raw: b[nlHeader:n],
		}
		if len(m.raw) >= nfHeader {
			m.family, m.body = m.raw[0], m.raw[nfHeader:]
		}
		if !f(m) {
			return
		}
		b = b[min((n+3)&^3, len(b)):]
	}
}

// errInterrupted says that the ruleset changed while it was being read.
var errInterrupted = errors.New("the ruleset changed during the dump")

// list is a dump that is repeated when it was interrupted. Strangers' changes
// interrupt it too, and some dumps count across all tables, so that parts are
// missing or double then: f gets the answers of a whole dump only.
func (s *socket) list(typ uint16, fill func(*attrs), begin func(), f func(message)) error {
	return s.listOf(unix.NFPROTO_INET, typ, fill, begin, f)
}

// listAll is list of the tables of all families.
func (s *socket) listAll(typ uint16, fill func(*attrs), begin func(), f func(message)) error {
	return s.listOf(unix.NFPROTO_UNSPEC, typ, fill, begin, f)
}

// listOf is list of the tables of one family.
func (s *socket) listOf(family uint8, typ uint16, fill func(*attrs), begin func(), f func(message)) error {
	const attempts = 100
	for range attempts {
		begin()
		if err := s.requestOf(family, typ, true, fill, f); !errors.Is(err, errInterrupted) {
			return err
		}
	}
	return fmt.Errorf("%w, %d times in a row", errInterrupted, attempts)
}

// request sends one message and calls f for each answer. With dump the answers
// end with NLMSG_DONE, else there is one, or an error.
func (s *socket) request(typ uint16, dump bool, fill func(*attrs), f func(message)) error {
	return s.requestOf(unix.NFPROTO_INET, typ, dump, fill, f)
}

// requestOf is request about tables of a family.
func (s *socket) requestOf(family uint8, typ uint16, dump bool, fill func(*attrs), f func(message)) error {
	s.seq++
	flags := uint16(unix.NLM_F_ACK)
	if dump {
		flags = unix.NLM_F_DUMP
	}
	b := &batch{}
	b.begin(nftSubsys|typ, flags, family, 0, s.seq)
	b.record(fill)
	b.end()
	if err := s.send(b.buf); err != nil {
		return err
	}
	for {
		n, err := s.recv(0)
		if err != nil {
			return err
		}
		done, interrupted := false, false
		walk(s.buf[:n], func(m message) bool {
			if m.seq != s.seq {
				return true // of an earlier request that was given up
			}
			interrupted = interrupted || m.flags&unix.NLM_F_DUMP_INTR != 0
			switch m.typ {
			case unix.NLMSG_DONE:
				done = true
			case unix.NLMSG_ERROR:
				done = true
				if e := m.errno(); e != 0 {
					err = e
				}
			default:
				f(m)
			}
			return true
		})
		if err != nil {
			return err
		}
		if interrupted {
			s.drain()
			return errInterrupted
		}
		if done {
			return nil
		}
	}
}

// drain throws away what is left of an abandoned dump.
func (s *socket) drain() {
	for {
		if _, err := s.recv(unix.MSG_DONTWAIT); err != nil {
			return
		}
	}
}
