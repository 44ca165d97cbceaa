package balancer

// A SYNProxy answers the handshakes of a listener's clients before a target, or
// connection tracking, hears of them: with a SYN cookie (RFC 4987, 3.6). Only who
// proves its address by returning the cookie becomes a flow. The zero value is off.
//
// Since a cookie remembers nothing, what it announces to clients must be what the
// targets would have.
type SYNProxy struct {
	// MSS is the largest segment that clients may send, in bytes (RFC 9293, 3.7.1).
	MSS uint16
	// WindowScale is the shift of the windows that targets announce, 0 to 14
	// (RFC 7323, 2.2). Without Timestamps there is none.
	WindowScale uint8
	// Timestamps carry what the cookie has no room for: window scaling and selective
	// acknowledgements are to be had with them only.
	Timestamps bool
}

// On reports whether there is a SYN proxy.
func (p SYNProxy) On() bool { return p.MSS > 0 }

// A SourceLimit bounds the flows that a listener has of one client. The zero value
// bounds nothing.
type SourceLimit struct {
	// Flows is how many there may be at a time.
	Flows uint32
	// Prefix is the length in bits of what counts as one client.
	Prefix int
}

// On reports whether there is a limit.
func (l SourceLimit) On() bool { return l.Flows > 0 }
