package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"
)

// A Relay is a userspace balancer of the naive kind: it takes connections, and
// announces their clients to one target by PROXY protocol v2 headers, once they
// have said something. It does IPv4 alone.
type Relay struct {
	Listen netip.AddrPort
	Target netip.AddrPort
}

// relayDial bounds how long a target may take to accept.
const relayDial = 5 * time.Second

// Relay opens a relay on the node until it, or the agent, is closed.
func (a *Agent) Relay(ctx context.Context, o Relay) (io.Closer, error) {
	id, err := a.ask(ctx, "relay", o, nil)
	if err != nil {
		return nil, err
	}
	return opened{a, id}, nil
}

// relaying is an open Relay.
type relaying struct {
	Relay
	listener net.Listener
	mu       sync.Mutex
	conns    map[net.Conn]bool // guarded by mu; nil when closed
}

func (s *server) relay(ctx context.Context, id uint64, o Relay) (none, error) {
	if !o.Listen.Addr().Is4() || !o.Target.Addr().Is4() {
		return none{}, errors.New("a relay does IPv4 alone")
	}
	l, err := (&net.ListenConfig{KeepAlive: -1}).Listen(ctx, "tcp4", o.Listen.String())
	if err != nil {
		return none{}, err
	}
	r := &relaying{Relay: o, listener: l, conns: map[net.Conn]bool{}}
	go r.accept()
	s.keep(id, r)
	return none{}, nil
}

func (r *relaying) accept() {
	for {
		c, err := r.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil && r.keep(c) {
			go r.serve(c)
		}
	}
}

// keep remembers a connection for Close, or closes it if that was before.
func (r *relaying) keep(c net.Conn) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.conns == nil {
		_ = c.Close()
		return false
	}
	r.conns[c] = true
	return true
}

func (r *relaying) drop(c net.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.conns, c)
	_ = c.Close()
}

func (r *relaying) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for c := range r.conns {
		_ = c.Close()
	}
	r.conns = nil
	return r.listener.Close()
}

// serve connects at once, and sends the header with the client's first bytes.
func (r *relaying) serve(client net.Conn) {
	defer r.drop(client)
	target, err := net.DialTimeout("tcp4", r.Target.String(), relayDial)
	if err != nil || !r.keep(target) {
		return
	}
	defer r.drop(target)
	var back sync.WaitGroup
	back.Go(func() {
		_, _ = io.Copy(client, target) // whatever ends it ends the connection
		_ = client.Close()
	})
	defer back.Wait()
	first := make([]byte, 4096)
	n, err := client.Read(first)
	if err == nil {
		_, err = target.Write(append(r.header(client), first[:n]...))
	}
	if err == nil {
		_, _ = io.Copy(target, client)
	}
	_ = target.Close()
}

// header is version 2, command PROXY, TCP over IPv4, and 12 bytes of addresses
// (HAProxy, proxy-protocol.txt, 2.2).
func (r *relaying) header(client net.Conn) []byte {
	from := client.RemoteAddr().(*net.TCPAddr).AddrPort()
	b := append([]byte(proxySignature), 0x21, 0x11, 0, 12)
	b = append(b, from.Addr().Unmap().AsSlice()...)
	b = append(b, r.Listen.Addr().AsSlice()...)
	b = binary.BigEndian.AppendUint16(b, from.Port())
	return binary.BigEndian.AppendUint16(b, r.Listen.Port())
}
