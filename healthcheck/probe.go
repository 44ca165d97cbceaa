package healthcheck

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"nlb/proxyproto"
)

// A Prober makes single probes. The zero value is ready to use. It may be used
// by many goroutines at once.
type Prober struct {
	// Mark is put on every packet of a probe (SO_MARK), so that rules can
	// leave probes alone. 0 marks nothing; anything else needs CAP_NET_ADMIN.
	Mark uint32
	// Forbidden tells which addresses a probe may not leave from: the VIPs.
	// Nil forbids none. It is called by many goroutines at once.
	Forbidden func(netip.Addr) bool
	// Instead names an address to probe a target from when the kernel would
	// take a forbidden one. Nil, or the zero Addr: there is none.
	Instead func(target netip.Addr) netip.Addr
	// Roots is what checks without Roots of their own trust; nil: the host's.
	Roots *x509.CertPool
}

// localHeader says that the connection is the sender's own, no client is behind
// it (PROXY protocol, 2.2).
var localHeader = string(proxyproto.AppendLocal(nil))

// Probe asks once. It returns within the check's timeout and the deadline of
// ctx, whatever the target does; a probe that ctx ended is Unmade.
func (p *Prober) Probe(ctx context.Context, c Check) Result {
	c = c.complete()
	r := Result{Target: c.Target, Start: time.Now()}
	p.probe(ctx, c, &r)
	if r.Latency == 0 {
		r.Latency = time.Since(r.Start)
	}
	if ctx.Err() != nil && r.Kind != OK {
		r.Kind, r.Detail = Unmade, "it was called off"
	}
	return r
}

func (p *Prober) probe(ctx context.Context, c Check, r *Result) {
	if !p.chooseSource(&c, r) {
		return
	}
	s, stop, err := dial(ctx, c, p.Mark, r.Start.Add(c.Timeout))
	if err != nil {
		r.fail("connect", err)
		return
	}
	defer s.Close()
	defer stop()
	// The address is known as soon as the SYN was sent. The route was asked
	// before, but it may have changed, or depend on the transport protocol.
	r.Local = s.local
	if p.forbids(s.local.Addr()) {
		r.Kind = SourceIsVIP
		return
	}
	err = s.established()
	if errors.Is(err, unix.ECONNRESET) && c.Protocol == TCP && !c.ProxyProtocolLocal {
		// Only a connection that was established can be reset: a SYN that
		// meets a reset is refused. The handshake is all that was asked for,
		// so a reset just before or just after the look is the same answer.
		err = nil
	}
	if err != nil {
		r.fail("no answer to the connection attempt", err)
		return
	}
	if c.ProxyProtocolLocal {
		if _, err := io.WriteString(s, localHeader); err != nil {
			r.fail("send PROXY header", err)
			return
		}
	}
	switch c.Protocol {
	case TCP:
		r.Kind = OK
	case HTTP:
		ask(s, c, r)
	case HTTPS:
		p.askTLS(s, c, r)
	}
}

// chooseSource looks at the source before there is a packet that could show it
// to the target.
func (p *Prober) chooseSource(c *Check, r *Result) bool {
	if p.Forbidden == nil {
		return true
	}
	source := c.Source
	if !source.IsValid() {
		var err error
		if source, err = routeSource(c.Target, p.Mark); err != nil {
			r.fail("connect", err)
			return false
		}
		if p.Instead != nil && p.Forbidden(source) {
			if other := p.Instead(c.Target.Addr()); other.IsValid() {
				source, c.Source = other, other
			}
		}
	}
	if p.Forbidden(source) {
		r.Kind, r.Local = SourceIsVIP, netip.AddrPortFrom(source, 0)
		return false
	}
	return true
}

func (p *Prober) forbids(a netip.Addr) bool { return p.Forbidden != nil && p.Forbidden(a) }

// askTLS is ask in TLS.
func (p *Prober) askTLS(s net.Conn, c Check, r *Result) {
	config := &tls.Config{
		ServerName:         c.ServerName,
		InsecureSkipVerify: !c.VerifyTLS,
		RootCAs:            p.Roots,
		NextProtos:         []string{"http/1.1"},
	}
	if c.Roots != nil {
		config.RootCAs = c.Roots.pool
	}
	if c.VerifyTLS && c.ServerName == "" {
		config.ServerName = c.Target.Addr().WithZone("").String()
	}
	conn := tls.Client(s, config)
	if err := conn.Handshake(); err != nil {
		r.failTLS(err)
		return
	}
	ask(conn, c, r)
	// Best effort, as the verdict is in: without it, servers log a truncation.
	conn.CloseWrite()
}

// failTLS says what the error of a handshake means.
func (r *Result) failTLS(err error) {
	var noRoots x509.SystemRootsError
	if errors.As(err, &noRoots) {
		r.Kind, r.Detail = Unmade, noRoots.Error()
		return
	}
	r.fail("TLS handshake", err)
	if r.Kind == Malformed {
		r.Kind, r.Detail = TLS, shown(words(err))
	}
}

// shown makes words of the peer's, such as the names in its certificate, fit for
// a terminal and a log: on one line, and not at length.
func shown(s string) string {
	const most = 300
	s = strings.Map(func(c rune) rune {
		if unicode.IsPrint(c) {
			return c
		}
		return '?'
	}, s)
	if len(s) <= most {
		return s
	}
	cut := most
	for !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut] + "..."
}

// fail says what the error of a step means.
func (r *Result) fail(during string, err error) {
	r.Kind, r.Detail = failure(err), during
	switch r.Kind {
	case Unmade, Unreachable:
		r.Detail = words(err)
	case Malformed:
		r.Detail = during + ": " + words(err)
	}
}

// failure says which Kind an error is.
func failure(err error) Kind {
	var prepared *stepError
	switch {
	case errors.As(err, &prepared):
		return Unmade
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, unix.ETIMEDOUT):
		return Timeout
	case errors.Is(err, unix.ECONNREFUSED):
		return Refused
	case errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EPIPE):
		return Reset
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return Closed
	case isAny(err, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.EHOSTDOWN, unix.ENETDOWN,
		unix.EPERM, unix.EACCES, unix.ENOPROTOOPT, unix.EPROTO, unix.EOPNOTSUPP, unix.EINVAL):
		// A local firewall that refuses to send says EPERM, a prohibit route
		// EACCES, ICMP errors of the path the others.
		return Unreachable
	case isAny(err, unix.EADDRNOTAVAIL, unix.EADDRINUSE, unix.EAGAIN, unix.ENOBUFS, unix.ENOMEM, unix.EMFILE, unix.ENFILE):
		return Unmade
	}
	return Malformed
}

func isAny(err error, errnos ...unix.Errno) bool {
	for _, e := range errnos {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// words leaves out the file name that os.File puts before the kernel's text.
func words(err error) string {
	var path *os.PathError
	if errors.As(err, &path) {
		return path.Err.Error()
	}
	return err.Error()
}
