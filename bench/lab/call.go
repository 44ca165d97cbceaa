package lab

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Why a call failed, in one word, the same for TCP and UDP. Other failures have
// the error's own text.
const (
	Timeout     = "timeout"     // nothing came back in time
	Refused     = "refused"     // a RST to the SYN, or ICMP port unreachable
	Reset       = "reset"       // a RST to an established connection
	Closed      = "closed"      // a FIN instead of an answer
	Unreachable = "unreachable" // no route here, or an ICMP error from elsewhere
)

// A Call is a number of connections (TCP) or sockets (UDP) to one address, each
// with one question and one answer.
type Call struct {
	Network  string // "tcp" or "udp"
	Dst      netip.AddrPort
	SrcAddr  netip.Addr    // default: the kernel's choice
	SrcPort  uint16        // default: the kernel's choice
	N        int           // default 1; of UDP, each keeps a socket until the last has its reply
	Parallel int           // calls at a time; default 1
	Timeout  time.Duration // of each call; default 1 s
	// Again is how long a UDP question may go without its answer before it is asked
	// again, as resolvers do; 0 for never. On a busy host the kernel drops packets
	// between namespaces (net.core.netdev_max_backlog).
	Again time.Duration
	// Silent says nothing and waits for the target's greeting (TCP).
	Silent bool
}

// A Reply is what came of a call.
type Reply struct {
	Answer
	From netip.AddrPort `json:"from"`          // the caller's own end
	Err  string         `json:"err,omitempty"` // "" is success; Timeout, Refused …
}

// A Tally counts replies.
type Tally struct {
	OK     int            `json:"ok"`
	Failed int            `json:"failed"`
	ByWho  map[string]int `json:"by_who"`  // successes, by target
	ByPeer map[string]int `json:"by_peer"` // successes, by the address the target saw
	ByErr  map[string]int `json:"by_err"`  // failures, by reason
}

// Count tallies replies.
func Count(replies []Reply) Tally {
	var t Tally
	for _, r := range replies {
		t.add(r)
	}
	return t
}

func (t *Tally) add(r Reply) {
	count := func(m *map[string]int, key string) {
		if *m == nil {
			*m = map[string]int{}
		}
		(*m)[key]++
	}
	if r.Err != "" {
		t.Failed++
		count(&t.ByErr, r.Err)
		return
	}
	t.OK++
	count(&t.ByWho, r.Who)
	count(&t.ByPeer, r.Peer.String())
}

// clone is a copy that shares no map.
func (t Tally) clone() Tally {
	t.ByWho, t.ByPeer, t.ByErr = maps.Clone(t.ByWho), maps.Clone(t.ByPeer), maps.Clone(t.ByErr)
	return t
}

// String is like "98 ok map[t1:50 t2:48] seen as map[203.0.113.9:98], 2 failed map[timeout:2]".
func (t Tally) String() string {
	return fmt.Sprintf("%d ok %v seen as %v, %d failed %v", t.OK, t.ByWho, t.ByPeer, t.Failed, t.ByErr)
}

// Call makes the calls and returns their replies, in no order. Calls that fail
// are replies with Err; the error is the agent's.
func (a *Agent) Call(ctx context.Context, c Call) ([]Reply, error) {
	var replies []Reply
	_, err := a.ask(ctx, "call", c, &replies)
	return replies, err
}

func (s *server) call(ctx context.Context, _ uint64, c Call) ([]Reply, error) {
	if err := c.complete(); err != nil {
		return nil, err
	}
	replies := make([]Reply, c.N)
	if c.Network == "tcp" || c.SrcPort != 0 {
		inParallel(c.Parallel, c.N, func(i int) { replies[i] = c.once(ctx) })
		return replies, ctx.Err()
	}
	// The port of a UDP socket that is closed could be the next call's, which
	// would then be no flow of its own to anybody on the way.
	flows := make([]*flow, c.N)
	inParallel(c.Parallel, c.N, func(i int) { flows[i], replies[i] = c.try(ctx) })
	for _, f := range flows {
		f.close()
	}
	return replies, ctx.Err()
}

func (c *Call) complete() error {
	if c.Network != "tcp" && c.Network != "udp" {
		return fmt.Errorf("%q is neither tcp nor udp", c.Network)
	}
	c.N, c.Parallel = max(c.N, 1), max(c.Parallel, 1)
	if c.Timeout == 0 {
		c.Timeout = time.Second
	}
	return nil
}

// inParallel calls f with 0 to n-1, a few at a time.
func inParallel(workers, n int, f func(i int)) {
	var wg sync.WaitGroup
	next := make(chan int)
	for range min(workers, n) {
		wg.Go(func() {
			for i := range next {
				f(i)
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
}

// once makes one call.
func (c *Call) once(ctx context.Context) Reply {
	f, reply := c.try(ctx)
	f.close()
	return reply
}

// try makes one call and leaves its flow open. There is none after an error.
func (c *Call) try(ctx context.Context) (*flow, Reply) {
	f, err := c.dial(ctx)
	if err != nil {
		return nil, Reply{Err: failure(err)}
	}
	reply := f.exchange(!c.Silent, c.again())
	for left := c.Timeout - c.again(); reply.Err == Timeout && left > 0; left -= c.again() {
		f.asked-- // the same question
		reply = f.exchange(true, min(left, c.again()))
	}
	return f, reply
}

// again is how long a question is waited for at a time.
func (c *Call) again() time.Duration {
	if c.Network == "udp" && c.Again > 0 {
		return min(c.Again, c.Timeout)
	}
	return c.Timeout
}

// A flow is one connection, or one UDP socket with a fixed peer.
type flow struct {
	net.Conn
	lines *bufio.Reader
	asked int // questions so far
}

func (f *flow) close() {
	if f != nil {
		_ = f.Close()
	}
}

func (c *Call) dial(ctx context.Context) (*flow, error) {
	d := net.Dialer{Timeout: c.Timeout, KeepAlive: -1}
	if c.SrcAddr.IsValid() || c.SrcPort != 0 {
		d.LocalAddr = localAddr(c.Network, c.SrcAddr, c.SrcPort)
		d.Control = reuseAddress
	}
	conn, err := d.DialContext(ctx, c.Network, c.Dst.String())
	if err != nil {
		return nil, err
	}
	if tcp, ok := conn.(*net.TCPConn); ok && c.SrcPort != 0 {
		// Ends in a reset: after a FIN, TIME-WAIT would keep the port for a minute (RFC 9293, 3.6.1).
		_ = tcp.SetLinger(0)
	}
	return &flow{Conn: conn, lines: bufio.NewReaderSize(conn, 1024)}, nil
}

func localAddr(network string, addr netip.Addr, port uint16) net.Addr {
	var ip net.IP
	if addr.IsValid() {
		ip = addr.AsSlice()
	}
	if network == "tcp" {
		return &net.TCPAddr{IP: ip, Port: int(port)}
	}
	return &net.UDPAddr{IP: ip, Port: int(port)}
}

func reuseAddress(_, _ string, raw syscall.RawConn) error {
	var opt error
	err := raw.Control(func(fd uintptr) {
		opt = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	})
	return errors.Join(err, opt)
}

// exchange asks, if it should, and reads the answer to that question: a UDP
// answer that is late must not pass for the next one.
func (f *flow) exchange(ask bool, timeout time.Duration) Reply {
	r := Reply{From: localOf(f.Conn)}
	question := ""
	err := f.SetDeadline(time.Now().Add(timeout))
	if err == nil && ask {
		f.asked++
		question = fmt.Sprint("who ", f.asked)
		if _, err = f.Write([]byte(question + "\n")); errors.Is(err, unix.ECONNREFUSED) {
			// An ICMP error of an earlier datagram, which this send only reported (udp(7)).
			_, err = f.Write([]byte(question + "\n"))
		}
	}
	for err == nil {
		if r.Answer, err = f.answer(); err == nil && r.Got == question {
			return r
		}
	}
	return Reply{From: r.From, Err: failure(err)}
}

func (f *flow) answer() (a Answer, err error) {
	line, err := f.lines.ReadSlice('\n')
	if err == nil {
		err = json.Unmarshal(line, &a)
	}
	return a, err
}

func localOf(c net.Conn) netip.AddrPort {
	switch a := c.LocalAddr().(type) {
	case *net.TCPAddr:
		return a.AddrPort()
	case *net.UDPAddr:
		return a.AddrPort()
	}
	return netip.AddrPort{}
}

func failure(err error) string {
	var timeout interface{ Timeout() bool }
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		return Refused
	case errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EPIPE):
		return Reset
	case errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EACCES):
		return Unreachable
	case errors.Is(err, os.ErrDeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return Timeout
	case errors.Is(err, io.EOF):
		return Closed
	}
	return err.Error()
}
