package verify

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"time"
)

// A Check is the protocol that a target speaks after the header.
type Check uint8

// The checks.
const (
	TCP   Check = iota // nothing is sent after the header
	HTTP               // a GET request
	HTTPS              // a TLS handshake; the certificate does not matter
)

// Options say how a target is asked.
type Options struct {
	Check Check
	// Path is what the check HTTP gets; empty: "/".
	Path string
	// Host is the Host header of the check HTTP, empty: the target's address,
	// and the SNI of HTTPS, empty: none.
	Host string
	// Timeout bounds both connections together; the first takes at most half of
	// it. 0: 5 s. A TCP target that is silent takes all of it.
	Timeout time.Duration
}

// A Kind is what a target does with a header, in a word.
type Kind string

// The kinds of Verdict.
const (
	// Required: serves connections with a header and no others.
	Required Kind = "required"
	// Accepted: serves both kinds of connections.
	Accepted Kind = "accepted"
	// Refused: serves connections without a header, and no others.
	Refused Kind = "refused"
	// Undecided: what came back is what more than one kind of target does.
	Undecided Kind = "undecided"
	// Unreachable: there was no connection.
	Unreachable Kind = "unreachable"
)

// A Verdict is what was found out about a target.
type Verdict struct {
	Kind Kind
	// Detail says what came back and after how many milliseconds, on both
	// connections, and, for Undecided, what that may mean.
	Detail string
}

var calledOff = Verdict{Undecided, "it was called off"}

// A Dial connects to a target over TCP. It keeps to the deadline of ctx.
type Dial = func(ctx context.Context, target netip.AddrPort) (net.Conn, error)

// Target asks one target. It opens two connections, one after the other, for a
// server may serve one at a time, and closes both. It returns within
// Options.Timeout, or when ctx ends, which is Undecided.
func Target(ctx context.Context, dial Dial, target netip.AddrPort, o Options) Verdict {
	if o.Timeout <= 0 {
		o.Timeout = 5 * time.Second
	}
	whole, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	half, cancelHalf := context.WithTimeout(whole, o.Timeout/2)
	defer cancelHalf()

	with := ask(half, dial, target, o, true)
	if ctx.Err() != nil {
		return calledOff
	}
	if with.err != nil {
		return Verdict{Unreachable, with.String()}
	}
	without := ask(whole, dial, target, o, false)
	if ctx.Err() != nil {
		return calledOff
	}
	kind, meaning := judge(o.Check, with, without)
	detail := fmt.Sprintf("with a header: %v; without: %v", with, without)
	if meaning != "" {
		detail += "; " + meaning
	}
	return Verdict{kind, detail}
}
