package healthcheck

import (
	"fmt"
	"net/netip"
	"time"
)

// Reason codes of target health (ELBv2 API, TargetHealth.Reason).
const (
	ReasonNone                  = ""
	ReasonInitialHealthChecking = "Elb.InitialHealthChecking"
	ReasonFailedHealthChecks    = "Target.FailedHealthChecks"
	ReasonTimeout               = "Target.Timeout"
	ReasonCodeMismatch          = "Target.ResponseCodeMismatch"
)

// A Kind is how a probe ended.
type Kind uint8

const (
	// NotProbed is the zero Kind: nothing was asked yet.
	NotProbed Kind = iota
	// OK is the answer of a healthy target.
	OK
	// Refused: nothing listens on the port.
	Refused
	// Timeout: the deadline passed before the answer was complete.
	Timeout
	// Reset: the connection was reset.
	Reset
	// Closed: the connection was closed before the answer was complete.
	Closed
	// Unreachable: no packet gets to the target.
	Unreachable
	// TLS: the handshake failed, or the certificate was not accepted.
	TLS
	// Malformed: the answer is not HTTP/1.
	Malformed
	// CodeMismatch: the HTTP status is not in the Matcher.
	CodeMismatch
	// SourceIsVIP: the probe would leave, or left, from a VIP.
	SourceIsVIP
	// Unmade: the probe could not be made for a reason of this host, such as
	// a lack of file descriptors. It says nothing about the target.
	Unmade
)

var kindNames = [...]string{
	"not probed", "ok", "refused", "timeout", "reset", "closed", "unreachable",
	"tls", "malformed", "code mismatch", "source is a VIP", "unmade",
}

func (k Kind) String() string {
	if int(k) < len(kindNames) {
		return kindNames[k]
	}
	return fmt.Sprintf("Kind(%d)", uint8(k))
}

// A Result is how one probe ended.
type Result struct {
	Kind   Kind
	Target netip.AddrPort
	// Local is what the probe left from; zero when it did not get that far.
	Local netip.AddrPort
	// Start is when the probe began. Latency is from there to the verdict.
	Start   time.Time
	Latency time.Duration
	// Status is the HTTP status code, 0 when none was received.
	Status int
	// Detail is what Kind cannot say: the step that failed, the peer's or the
	// kernel's words.
	Detail string
}

// OK reports whether the target answered as it should.
func (r Result) OK() bool { return r.Kind == OK }

// Conclusive reports whether the result says anything about the target.
func (r Result) Conclusive() bool { return r.Kind != NotProbed && r.Kind != Unmade }

// Reason returns the reason code for a target whose health check ended so.
func (r Result) Reason() string {
	switch r.Kind {
	case NotProbed, OK, Unmade:
		return ReasonNone
	case Timeout:
		return ReasonTimeout
	case CodeMismatch:
		return ReasonCodeMismatch
	}
	return ReasonFailedHealthChecks
}

// String says the result in words, such as "connection refused by
// 10.0.1.11:8080 after 0.4 ms from 10.0.0.2". Words are made when they are
// read: most results never are.
func (r Result) String() string {
	switch r.Kind {
	case NotProbed:
		return "not probed yet"
	case OK:
		if r.Status != 0 {
			return fmt.Sprintf("%v answered %d%s", r.Target, r.Status, r.circumstances())
		}
		return fmt.Sprintf("%v accepted a connection%s", r.Target, r.circumstances())
	case Refused:
		return fmt.Sprintf("connection refused by %v%s", r.Target, r.circumstances())
	case Timeout:
		return fmt.Sprintf("timeout of %v: %s%s", r.Target, r.Detail, r.circumstances())
	case Reset:
		return fmt.Sprintf("connection reset by %v: %s%s", r.Target, r.Detail, r.circumstances())
	case Closed:
		return fmt.Sprintf("connection closed by %v: %s%s", r.Target, r.Detail, r.circumstances())
	case Unreachable:
		return fmt.Sprintf("%v is unreachable: %s%s", r.Target, r.Detail, r.circumstances())
	case TLS:
		return fmt.Sprintf("TLS with %v failed: %s%s", r.Target, r.Detail, r.circumstances())
	case Malformed:
		return fmt.Sprintf("%v does not speak HTTP/1: %s%s", r.Target, r.Detail, r.circumstances())
	case CodeMismatch:
		return fmt.Sprintf("%v answered %d, expected %s%s", r.Target, r.Status, r.Detail, r.circumstances())
	case SourceIsVIP:
		return fmt.Sprintf("the probe of %v leaves from %v, which is a VIP: a target that carries the VIP itself "+
			"drops the probe or answers to itself; set source_addresses or the health check's source "+
			"to an address that is no VIP", r.Target, r.Local.Addr())
	case Unmade:
		return fmt.Sprintf("could not probe %v: %s", r.Target, r.Detail)
	}
	return r.Kind.String()
}

func (r Result) circumstances() string {
	after := fmt.Sprintf(" after %.1f ms", float64(r.Latency)/float64(time.Millisecond))
	if r.Local.Addr().IsValid() {
		after += " from " + r.Local.Addr().String()
	}
	return after
}
