package healthcheck

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"nlb/internal/bubble"
)

// A villain is a target that wants to cost more than its share.
type villain struct {
	protocol Protocol
	answer   func(net.Conn)
	kinds    []Kind // either
}

const okHeader = "HTTP/1.1 200 OK\r\n"

// impatience is the timeout of probes that are known to end so.
const impatience = 100 * time.Millisecond

var block = bytes.Repeat([]byte("x"), 64<<10)

// flood sends start and then block after block, until nobody listens.
func flood(start string) func(net.Conn) {
	return func(conn net.Conn) {
		readRequest(conn)
		io.WriteString(conn, start)
		for {
			if _, err := conn.Write(block); err != nil {
				return
			}
		}
	}
}

// trickle sends text at one byte a second, start first.
func trickle(start, text string) func(net.Conn) {
	return func(conn net.Conn) {
		gone := make(chan bool)
		go func() { io.Copy(io.Discard, conn); close(gone) }()
		defer func() { conn.Close(); <-gone }()
		io.WriteString(conn, start)
		for i := range text {
			select {
			case <-gone:
				return
			case <-time.After(time.Second):
			}
			if _, err := io.WriteString(conn, text[i:i+1]); err != nil {
				return
			}
		}
		<-gone
	}
}

func hold(conn net.Conn) { io.Copy(io.Discard, conn) }

// garble says what is no TLS and listens on.
func garble(text string) func(net.Conn) {
	return func(conn net.Conn) {
		gone := make(chan bool)
		go func() { hold(conn); close(gone) }()
		io.WriteString(conn, text)
		<-gone
	}
}

// floodTLS completes a handshake and then has no end of a body.
func floodTLS(cert tls.Certificate) func(net.Conn) {
	return func(raw net.Conn) {
		conn := tls.Server(raw, &tls.Config{Certificates: []tls.Certificate{cert}})
		readRequest(conn)
		gone := make(chan bool)
		go func() { io.Copy(io.Discard, conn); close(gone) }()
		defer func() { raw.Close(); <-gone }()
		io.WriteString(conn, okHeader+"\r\n")
		for {
			if _, err := conn.Write(block[:1<<10]); err != nil {
				return
			}
		}
	}
}

func villains(t *testing.T) map[string]villain {
	cert := newAuthority(t, "villain").issue(t, time.Now().Add(time.Hour), "127.0.0.1")
	long := strings.Repeat("x", 3600)
	return map[string]villain{
		"silence":                        {HTTP, hold, []Kind{Timeout}},
		"silence for a handshake":        {HTTPS, hold, []Kind{Timeout}},
		"endless body":                   {HTTP, flood(okHeader + "\r\n"), []Kind{OK}},
		"endless body in TLS":            {HTTPS, floodTLS(cert), []Kind{OK}},
		"a header of 1 MB":               {HTTP, flood(okHeader + "X: "), []Kind{Malformed}},
		"a status line of 1 MB":          {HTTP, flood("HTTP/1.1 200 "), []Kind{Malformed}},
		"a byte a second":                {HTTP, trickle("", okHeader+long), []Kind{Timeout}},
		"a field's byte a second":        {HTTP, trickle(okHeader, long), []Kind{Timeout}},
		"a body's byte a second":         {HTTP, trickle(okHeader+"\r\n", long), []Kind{OK}},
		"a handshake's byte a second":    {HTTPS, trickle("\x16\x03\x03\x10\x00\x02\x00\x0f\xfc", long), []Kind{Timeout}},
		"garbage for a handshake":        {HTTPS, garble("\x00\xff220 mail ready\r\n"), []Kind{TLS}},
		"a handshake of 16 MB":           {HTTPS, garble("\x16\x03\x03\x00\x04\x02\xff\xff\xff"), []Kind{TLS}},
		"a handshake for an HTTP check":  {HTTP, garble("\x16\x03\x03\x10\x00\x02\x00\x0f\xfc\n"), []Kind{Malformed}},
		"an alert for an HTTP check":     {HTTP, garble("\x15\x03\x01\x00\x02\x02\x46\n"), []Kind{Malformed}},
		"a response for a TLS handshake": {HTTPS, garble("HTTP/1.1 400 Bad Request\r\n\r\n"), []Kind{TLS}},
	}
}

// askPipe is a Prober's Probe with a pipe for a network, for tests in a bubble.
func askPipe(ctx context.Context, c Check, answer func(net.Conn)) Result {
	c = c.complete()
	r := Result{Target: c.Target, Start: time.Now()}
	client, server := net.Pipe()
	client.SetDeadline(r.Start.Add(c.Timeout))
	gone := make(chan bool)
	go func() { answer(server); server.Close(); close(gone) }()
	stop := context.AfterFunc(ctx, func() { client.Close() })
	if c.Protocol == HTTPS {
		new(Prober).askTLS(client, c, &r)
	} else {
		ask(client, c, &r)
	}
	stop()
	client.Close()
	<-gone
	if ctx.Err() != nil {
		r.Kind = Unmade
	}
	return r
}

// TestVillainsKeepToTheTimeout: to the nanosecond, by the clock of a bubble.
func TestVillainsKeepToTheTimeout(t *testing.T) {
	for name, v := range villains(t) {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := Check{Target: target, Protocol: v.protocol, Timeout: 5 * time.Second}
				began := time.Now()
				r := askPipe(t.Context(), c, v.answer)
				took := time.Since(began)
				if !slices.Contains(v.kinds, r.Kind) {
					t.Errorf("%v, want %v: %v", r.Kind, v.kinds, r)
				}
				switch {
				case r.Kind == Timeout && took != c.Timeout:
					t.Errorf("timed out after %v of %v", took, c.Timeout)
				case r.Kind != Timeout && took > bodyGrace:
					t.Errorf("took %v, although the verdict was clear at once", took)
				}
			})
		})
	}
}

// hung is a listener whose accept queue is full: SYNs are not answered.
func hung(t *testing.T) netip.AddrPort {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	address := localAddr(fd)
	for range 10 {
		if (&Prober{}).Probe(t.Context(), Check{Target: address, Timeout: impatience}).Kind == Timeout {
			return address
		}
	}
	t.Fatal("ten connections did not fill the queue")
	return address
}

// resetting has the connection reset after text, which waits for a word.
func resetting(wait bool, text string) func(*net.TCPConn) {
	return func(conn *net.TCPConn) {
		if wait {
			conn.Read(make([]byte, 4<<10))
		}
		io.WriteString(conn, text)
		conn.SetLinger(0)
	}
}

// open has villains listen, and adds those that need a kernel.
func open(t *testing.T) map[string]Check {
	t.Helper()
	checks := make(map[string]Check)
	for name, v := range villains(t) {
		address := serve(t, "127.0.0.1:0", func(conn *net.TCPConn) {
			// What an endless villain sends ahead is its own memory: with the race
			// detector, a quarter of its TLS records have a buffer of their own.
			if err := conn.SetWriteBuffer(4 << 10); err != nil {
				t.Error(err)
			}
			v.answer(conn)
		})
		checks[name] = Check{Target: address, Protocol: v.protocol, Timeout: patience}
		if v.kinds[0] == Timeout {
			checks[name] = Check{Target: address, Protocol: v.protocol, Timeout: impatience}
		}
	}
	for name, answer := range map[string]func(*net.TCPConn){
		"reset at once":           resetting(false, ""),
		"reset after the request": resetting(true, ""),
		"reset in the midst":      resetting(true, okHeader+"X: "), // garbage for HTTPS
	} {
		for _, p := range []Protocol{HTTP, HTTPS} {
			checks[fmt.Sprint(name, ", ", p)] = Check{Target: serve(t, "127.0.0.1:0", answer), Protocol: p, Timeout: patience}
		}
	}
	stuck := hung(t)
	for _, p := range []Protocol{TCP, HTTP, HTTPS} {
		checks[fmt.Sprint("half-open, ", p)] = Check{Target: stuck, Protocol: p, Timeout: impatience}
	}
	return checks
}

// TestVillainsCostLittle: the memory of a probe, and of our own villain, whose
// share is a few KiB.
func TestVillainsCostLittle(t *testing.T) {
	const most = 256 << 10
	var last Result
	for name, c := range open(t) {
		least := uint64(1 << 63)
		for range 3 { // the least: other goroutines of the test binary allocate too
			least = min(least, allocated(func() {
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				defer cancel()
				last = new(Prober).Probe(ctx, c)
			}))
		}
		t.Logf("%-32s %4d KiB  %v", name, least>>10, last)
		if least > most {
			t.Errorf("%s: a probe allocated %d bytes, want at most %d", name, least, most)
		}
		if last.Kind == Unmade || last.OK() != strings.Contains(name, "body") {
			t.Errorf("%s: %v: %v", name, last.Kind, last)
		}
	}
}

// allocated returns the bytes that the process allocated while f ran.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// TestVillainsDelayNoOther: a hundred villains, ten good targets, and the pace
// of the latter by the clock of a bubble.
func TestVillainsDelayNoOther(t *testing.T) {
	const good, length = 10, 20 * time.Second
	all := villains(t)
	synctest.Test(t, func(t *testing.T) {
		answers := make(map[netip.AddrPort]villain)
		starts := make(map[netip.AddrPort][]time.Time)
		began := make(chan netip.AddrPort)
		noted := make(chan bool)
		go func() {
			defer close(noted)
			for address := range began {
				starts[address] = append(starts[address], time.Now())
			}
		}()
		var checks []Check
		add := func(v villain) netip.AddrPort {
			c := everySecond(numbered(len(checks)))
			c.Protocol = v.protocol
			answers[c.Target] = v
			checks = append(checks, c)
			return c.Target
		}
		for _, v := range all {
			for range 7 {
				add(v)
			}
		}
		var friends []netip.AddrPort
		for range good {
			friends = append(friends, add(villain{HTTP, func(conn net.Conn) { readRequest(conn); io.WriteString(conn, okHeader+"\r\n") }, []Kind{OK}}))
		}
		s := New(Options{Probe: func(ctx context.Context, c Check) Result {
			began <- c.Target
			return askPipe(ctx, c, answers[c.Target].answer)
		}})
		stop := run(t, s)
		s.Set(checks)
		bubble.Pass(length)
		for _, st := range s.Snapshot() {
			v := answers[st.Check.Target]
			if !slices.Contains(v.kinds, st.Last.Kind) {
				t.Errorf("%v, want %v: %v", st.Last.Kind, v.kinds, st.Last)
			}
			if want := st.Last.OK(); (st.State == Healthy) != want {
				t.Errorf("%v is %v", st.Last, st.State)
			}
		}
		stop()
		close(began)
		<-noted
		for _, f := range friends {
			at := starts[f]
			if want := int(length / time.Second); len(at) < want || len(at) > want+1 {
				t.Errorf("%d probes of a good target in %v", len(at), length)
			}
			for i := range at[1:] {
				if gap := (at[i+1].Sub(at[i]) - time.Second).Abs(); gap > 2*launchStep {
					t.Errorf("gap %d of a good target is %v off", i, gap)
				}
			}
		}
	})
}

// TestVillainsDelayNoOtherProbe is that on real sockets: good targets are probed
// again and again while probes of the villains hang.
func TestVillainsDelayNoOtherProbe(t *testing.T) {
	const rounds = 20
	answered := make(chan Result)
	friend := Check{Target: serve(t, "127.0.0.1:0", say(okHeader+"\r\n")), Protocol: HTTP, Interval: 20 * time.Millisecond, Timeout: patience}
	s := New(Options{Probe: func(ctx context.Context, c Check) Result {
		r := new(Prober).Probe(ctx, c)
		if c.Target == friend.Target {
			select {
			case answered <- r:
			case <-ctx.Done():
			}
		}
		return r
	}})
	checks := []Check{friend}
	for _, c := range open(t) {
		c.Interval, c.Timeout = 100*time.Millisecond, patience
		checks = append(checks, c)
	}
	s.Set(checks)
	defer run(t, s)()
	tooLong := time.After(patience)
	for range rounds {
		select {
		case r := <-answered:
			if !r.OK() {
				t.Fatal(r)
			}
		case <-tooLong:
			t.Fatal("the good target waits for the villains")
		}
	}
	hanging := 0
	for _, st := range s.Snapshot() {
		if st.Probes == 0 {
			hanging++
		}
	}
	if hanging < 8 {
		t.Errorf("only %d villains hang", hanging)
	}
}

// TestRedirectIsNotFollowed: it is an answer like any other, and where it leads
// is nobody's business.
func TestRedirectIsNotFollowed(t *testing.T) {
	followed := make(chan bool, 1)
	elsewhere := serve(t, "127.0.0.1:0", func(*net.TCPConn) { followed <- true })
	for _, tt := range []struct {
		matcher []StatusRange
		kind    Kind
	}{
		{nil, OK}, {[]StatusRange{{302, 302}}, OK}, {[]StatusRange{{200, 299}}, CodeMismatch},
	} {
		from := serve(t, "127.0.0.1:0", say("HTTP/1.1 302 Found\r\nLocation: http://"+elsewhere.String()+"/\r\nContent-Length: 0\r\n\r\n"))
		r := new(Prober).Probe(t.Context(), Check{Target: from, Protocol: HTTP, Matcher: tt.matcher, Timeout: patience})
		if r.Kind != tt.kind || r.Status != 302 {
			t.Errorf("matcher %v: %v, want %v: %v", tt.matcher, r.Kind, tt.kind, r)
		}
	}
	// Connections are accepted in order: after this one, an earlier one would
	// have been seen.
	if r := new(Prober).Probe(t.Context(), Check{Target: elsewhere, Timeout: patience}); !r.OK() {
		t.Fatal(r)
	}
	<-followed
	select {
	case <-followed:
		t.Error("the redirect was followed")
	default:
	}
}
