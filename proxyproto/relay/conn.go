package relay

import (
	"net/netip"
)

// A state is where a connection stands; see the drawing in the package comment.
type state uint8

const (
	closed state = iota
	dialing
	listening
	greeting
	open
)

func (s state) String() string {
	return [...]string{"closed", "dialing", "listening", "greeting", "open"}[s]
}

// A course is where one direction of a connection stands.
type course uint8

const (
	flowing course = iota
	blocked        // bytes are held; nothing is read
	ended          // the sender's FIN was read; bytes may be held
	shut           // the FIN was passed on
)

// maxTries is how many targets are dialed for one connection.
const maxTries = 3

// A conn is one client's connection. It belongs to a machine, which uses it
// again when it is closed.
type conn struct {
	index      int32
	generation int32
	state      state
	queued     bool // to run in this turn or the next
	tries      uint8

	client, target socket
	up, down       direction // client to target, target to client

	peer    netip.AddrPort // the client
	service *service
	pool    *pool
	aim     aim
	tried   [maxTries]*target // the last of the tries is the present one

	withdrawn bool // the target left while it was dialed, by no fault of its own

	patient bool // waits for the client's first bytes
	unheard bool // the header went out alone, and nobody has spoken yet

	tally *tally // its, in this loop; nil when there is none
	first int32  // bytes of the client behind the header, in the same buffer

	since    int64 // accepted, nanoseconds of the machine's clock
	active   int64 // the last byte moved, or the dial began
	deadline int64 // of the dial

	timer
}

// to is the target that the connection was sent to.
func (c *conn) to() *target { return c.tried[c.tries-1] }

// A socket is one end. Its flags say what is known of it without a call.
type socket struct {
	fd       int32
	readable bool // until a read finds nothing
	writable bool // until a write does not take all
	hungUp   bool // a FIN is at the end of what can be read
	urgent   bool // had urgent bytes, at which reads stop short
	failed   bool // an error is pending behind what can be read
}

// A direction carries bytes from one end to the other.
type direction struct {
	course course
	// Bytes that were read and not yet written are in one of these.
	held *buffer
	pipe *pipe
	// large counts the bytes that came in large pieces, one after the other.
	large int32
	moved uint64
}

// holds reports whether bytes wait for the receiver.
func (d *direction) holds() bool { return d.held != nil || d.pipe != nil && d.pipe.held > 0 }
