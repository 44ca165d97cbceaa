package verify

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"nlb/proxyproto"
)

const (
	// maxAnswer bounds what is read of a target that speaks without end: a
	// status line or a greeting is far shorter.
	maxAnswer = 4 << 10
	// maxHandshake leaves room for a long certificate chain.
	maxHandshake = 64 << 10
	// maxQuote is how much of an answer a Detail shows, in bytes.
	maxQuote = 48
)

// An answer is what came back on one connection.
type answer struct {
	check  Check
	err    error         // why there was no connection
	data   []byte        // what the server said, or its beginning
	ended  bool          // the server closed or reset the connection
	reset  bool          // it was the latter
	first  time.Duration // from the connection to the first byte; 0 without one
	lasted time.Duration // from the connection to its end, or until nobody looked any more
}

// ask opens a connection and gathers the answer until ctx ends.
func ask(ctx context.Context, dial Dial, target netip.AddrPort, o Options, header bool) answer {
	a := answer{check: o.Check}
	start := time.Now()
	raw, err := dial(ctx, target)
	if err != nil {
		a.err, a.lasted = err, time.Since(start)
		return a
	}
	defer raw.Close()
	stop := context.AfterFunc(ctx, func() { raw.SetDeadline(time.Unix(1, 0)) })
	defer stop()

	c := &conn{Conn: raw, opened: time.Now(), most: maxAnswer}
	if header {
		c.prefix = proxyproto.AppendLocal(nil)
	}
	switch o.Check {
	case TCP:
		err = c.listen()
	case HTTP:
		err = c.get(target, o)
	case HTTPS:
		c.most = maxHandshake
		err = c.handshake(ctx, o.Host)
	}
	a.data, a.first, a.lasted = c.data, c.first, time.Since(c.opened)
	a.reset = errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE)
	a.ended = a.reset || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
	return a
}

// A conn remembers what is read from it, up to most bytes, after which reads
// fail, and puts prefix before the first write: a server that closes at the sight
// of the header must not get the chance to fail a second write before its last
// words were read.
type conn struct {
	net.Conn
	opened time.Time
	prefix []byte
	most   int
	data   []byte
	first  time.Duration
}

var errEnough = errors.New("enough was read")

func (c *conn) Read(b []byte) (int, error) {
	room := c.most - len(c.data)
	if room <= 0 {
		return 0, errEnough
	}
	n, err := c.Conn.Read(b[:min(len(b), room)])
	if n > 0 && len(c.data) == 0 {
		c.first = time.Since(c.opened)
	}
	c.data = append(c.data, b[:n]...)
	return n, err
}

func (c *conn) Write(b []byte) (int, error) {
	prefix := c.prefix
	c.prefix = nil
	n, err := c.Conn.Write(append(prefix, b...))
	return max(n-len(prefix), 0), err
}

// listen sends the header, if there is one, and reads until the connection ends.
func (c *conn) listen() error {
	if c.prefix != nil {
		if _, err := c.Write(nil); err != nil {
			return err
		}
	}
	return c.until(func() bool { return false })
}

// get sends a request and reads a line, whether it is a status or not.
func (c *conn) get(target netip.AddrPort, o Options) error {
	path, host := o.Path, o.Host
	if path == "" {
		path = "/"
	}
	if host == "" {
		host = target.String()
	}
	request := "GET " + path + " HTTP/1.1\r\nHost: " + host + "\r\nUser-Agent: nlb-verify\r\nAccept: */*\r\nConnection: close\r\n\r\n"
	if _, err := io.WriteString(c, request); err != nil {
		return err
	}
	echo := proxyproto.LocalHeader // a header that comes back begins with line ends
	return c.until(func() bool { return len(c.data) >= echo && bytes.IndexByte(c.data, '\n') >= 0 })
}

// handshake makes a TLS handshake to its end, as far as the server lets it. A
// certificate proves nothing about the header, and is not looked at.
func (c *conn) handshake(ctx context.Context, name string) error {
	session := tls.Client(c, &tls.Config{ServerName: name, InsecureSkipVerify: true})
	if err := session.HandshakeContext(ctx); err != nil {
		return err
	}
	return session.Close()
}

// until reads until enough says so or nothing more comes.
func (c *conn) until(enough func() bool) error {
	for b := make([]byte, maxAnswer); !enough(); {
		if _, err := c.Read(b); err != nil {
			return err
		}
	}
	return nil
}

func (a answer) spoke() bool { return len(a.data) > 0 }

// A grade says how well a server understood what it got.
type grade uint8

const (
	nothing    grade = iota // no answer, or one of another protocol
	complained              // an answer of the protocol, to something it did not understand
	served                  // an answer to the request
)

func (a answer) grade() grade {
	switch a.check {
	case HTTP:
		switch status := a.status(); {
		case status == 0:
			return nothing
		case status == 400: // also what a server says to a header it does not know
			return complained
		}
		return served
	case HTTPS:
		switch kind, alert := a.record(); {
		case kind == recordHandshake, kind == recordAlert && aboutHello(alert):
			return served
		case kind == recordAlert:
			return complained
		}
	}
	return nothing
}

// status returns the code of an HTTP/1 status line (RFC 9112, 4), or 0.
func (a answer) status() int {
	version, rest, _ := strings.Cut(string(a.data), " ")
	if !strings.HasPrefix(version, "HTTP/1.") || len(rest) < 3 {
		return 0
	}
	code, err := strconv.ParseUint(rest[:3], 10, 16)
	if err != nil || code < 100 {
		return 0
	}
	return int(code)
}

// Content types of TLS records (RFC 8446, 5.1).
const (
	recordAlert     = 21
	recordHandshake = 22
)

// record returns the type of the first TLS record, and the description if it is
// an alert; 0 if there is none.
func (a answer) record() (kind, alert byte) {
	const header = 5 // type, version, length
	if len(a.data) < header+2 || a.data[1] != 3 {
		return 0, 0
	}
	return a.data[0], a.data[header+1]
}

// aboutHello tells the alerts that only a ClientHello that was understood calls
// for (RFC 8446, 6.2). The others are also what a server sends that took a PROXY
// header for a broken record.
func aboutHello(alert byte) bool {
	switch alert {
	case 40, // handshake_failure
		71,  // insufficient_security
		109, // missing_extension
		112, // unrecognized_name
		116, // certificate_required
		120: // no_application_protocol
		return true
	}
	return false
}

// String says what came back, and when.
func (a answer) String() string {
	if a.err != nil {
		return fmt.Sprintf("no connection after %s: %v", ms(a.lasted), a.err)
	}
	var end string
	switch {
	case a.reset:
		end = "reset after " + ms(a.lasted)
	case a.ended:
		end = "closed after " + ms(a.lasted)
	}
	if !a.spoke() {
		if end == "" {
			return "no answer within " + ms(a.lasted)
		}
		return end
	}
	said := a.words() + " after " + ms(a.first)
	if end == "" || a.grade() != nothing {
		return said
	}
	return said + ", " + end
}

func (a answer) words() string {
	if status := a.status(); a.check == HTTP && status != 0 {
		return "HTTP status " + strconv.Itoa(status)
	}
	if a.check == HTTPS {
		switch kind, alert := a.record(); kind {
		case recordHandshake:
			return "TLS ServerHello"
		case recordAlert:
			return strings.TrimPrefix(tls.AlertError(alert).Error(), "tls: ") + " (TLS alert " + strconv.Itoa(int(alert)) + ")"
		}
	}
	if len(a.data) > maxQuote {
		return fmt.Sprintf("%q…", a.data[:maxQuote])
	}
	return fmt.Sprintf("%q", a.data)
}

// ms is for reading: a tenth of a millisecond is exact enough.
func ms(d time.Duration) string {
	if d < 10*time.Millisecond {
		return fmt.Sprintf("%.1f ms", float64(d)/1e6)
	}
	return fmt.Sprintf("%d ms", d.Milliseconds())
}
