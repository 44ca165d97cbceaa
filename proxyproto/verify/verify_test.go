package verify

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	oracle "github.com/pires/go-proxyproto"
	"go.uber.org/goleak"
)

func dial(ctx context.Context, target netip.AddrPort) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "tcp", target.String())
}

// want is a verdict and what its detail looks like; durations are "N ms".
type want struct {
	kind   Kind
	detail string
}

var (
	durations = regexp.MustCompile(`[0-9.]+ ms`)
	versions  = regexp.MustCompile(`(nginx)/[0-9.]+`)
)

func check(t *testing.T, name string, target netip.AddrPort, o Options, w want) {
	t.Helper()
	v := Target(t.Context(), dial, target, o)
	detail := durations.ReplaceAllString(v.Detail, "N ms")
	detail = versions.ReplaceAllString(detail, "$1")
	detail = strings.ReplaceAll(detail, "reset after", "closed after") // depends on what was unread
	if v.Kind != w.kind || detail != w.detail {
		t.Errorf("%s: %s, %s\nwant %s, %s", name, v.Kind, v.Detail, w.kind, w.detail)
	}
}

func TestNginx(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) })
	run(t, nginxConfig, 8444, "nginx", "-p", ".", "-c", "FILE")
	for _, addr := range loopbacks {
		for port, tt := range map[uint16]struct {
			check Check
			want  want
		}{
			8080: {HTTP, want{Refused, "with a header: HTTP status 400 after N ms; without: HTTP status 204 after N ms"}},
			8081: {HTTP, want{Required, "with a header: HTTP status 204 after N ms; without: closed after N ms"}},
			8443: {HTTPS, want{Refused, `with a header: "HTTP/1.1 400 Bad Request\r\nServer: nginx\r\n"… after N ms; without: TLS ServerHello after N ms`}},
			8444: {HTTPS, want{Required, "with a header: TLS ServerHello after N ms; without: closed after N ms"}},
		} {
			at := netip.AddrPortFrom(addr, port)
			check(t, at.String(), at, Options{Check: tt.check, Timeout: patience}, tt.want)
		}
	}
}

func TestHAProxy(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) })
	run(t, haproxyConfig, 9443, "haproxy", "-db", "-f", "FILE")
	for _, addr := range loopbacks {
		for port, tt := range map[uint16]struct {
			check Check
			want  want
		}{
			9080: {HTTP, want{Refused, "with a header: HTTP status 400 after N ms; without: HTTP status 200 after N ms"}},
			9081: {HTTP, want{Required, "with a header: HTTP status 503 after N ms; without: closed after N ms"}},
			9443: {HTTPS, want{Refused, "with a header: closed after N ms; without: TLS ServerHello after N ms"}},
			9444: {HTTPS, want{Required, "with a header: TLS ServerHello after N ms; without: closed after N ms"}},
		} {
			at := netip.AddrPortFrom(addr, port)
			check(t, at.String(), at, Options{Check: tt.check, Timeout: patience}, tt.want)
		}
	}
}

// serve runs handle for each connection to the address it returns, and closes
// the connection after it. All of it is over when the test is.
func serve(t *testing.T, addr netip.Addr, handle func(net.Conn)) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", netip.AddrPortFrom(addr, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	return accept(t, l, handle)
}

func accept(t *testing.T, l net.Listener, handle func(net.Conn)) netip.AddrPort {
	t.Helper()
	var all sync.WaitGroup
	all.Go(func() {
		for conn, err := l.Accept(); err == nil; conn, err = l.Accept() {
			all.Go(func() {
				defer conn.Close()
				handle(conn)
			})
		}
	})
	t.Cleanup(func() { l.Close(); all.Wait() })
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// proxied is what a server sees behind go-proxyproto with the policy, for sources
// that send a header within limit.
func proxied(t *testing.T, addr netip.Addr, policy oracle.Policy, limit time.Duration) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", netip.AddrPortFrom(addr, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	return &oracle.Listener{
		Listener:          l,
		ReadHeaderTimeout: limit,
		ConnPolicy:        func(oracle.ConnPolicyOptions) (oracle.Policy, error) { return policy, nil },
	}
}

// web answers requests to a listener, with TLS if certified.
func web(t *testing.T, l net.Listener, certified bool) netip.AddrPort {
	t.Helper()
	at := l.Addr().(*net.TCPAddr).AddrPort()
	quiet := log.New(io.Discard, "", 0)
	server := &http.Server{ErrorLog: quiet, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/health" {
			w.WriteHeader(http.StatusTeapot)
		}
	})}
	if certified {
		pem := certificate(t)
		pair, err := tls.X509KeyPair(pem, pem)
		if err != nil {
			t.Fatal(err)
		}
		l = tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{pair}})
	}
	done := make(chan struct{})
	go func() { defer close(done); server.Serve(l) }()
	t.Cleanup(func() { server.Close(); <-done })
	return at
}

// TestGoProxyProto has the policies of a Go server.
func TestGoProxyProto(t *testing.T) {
	for name, addr := range loopbacks {
		t.Run(name, func(t *testing.T) {
			tests := []struct {
				policy    oracle.Policy
				certified bool
				want      want
			}{
				{oracle.REQUIRE, false, want{Required, "with a header: HTTP status 200 after N ms; without: closed after N ms"}},
				{oracle.USE, false, want{Accepted, "with a header: HTTP status 200 after N ms; without: HTTP status 200 after N ms"}},
				{oracle.SKIP, false, want{Refused, "with a header: HTTP status 400 after N ms; without: HTTP status 200 after N ms"}},
				{oracle.REQUIRE, true, want{Required, "with a header: TLS ServerHello after N ms; without: closed after N ms"}},
				{oracle.USE, true, want{Accepted, "with a header: TLS ServerHello after N ms; without: TLS ServerHello after N ms"}},
				{oracle.SKIP, true, want{Refused, "with a header: closed after N ms; without: TLS ServerHello after N ms"}},
			}
			for _, tt := range tests {
				o := Options{Check: HTTP, Path: "/health", Timeout: patience}
				if tt.certified {
					o = Options{Check: HTTPS, Host: "web.example", Timeout: patience}
				}
				check(t, fmt.Sprint("policy ", tt.policy, ", TLS ", tt.certified), web(t, proxied(t, addr, tt.policy, patience), tt.certified), o, tt.want)
			}
		})
	}
}

// say writes what a server says first, and reads what its client says.
func say(words string) func(net.Conn) {
	return func(conn net.Conn) {
		io.WriteString(conn, words)
		io.Copy(io.Discard, conn)
	}
}

func echo(conn net.Conn) { io.Copy(conn, conn) }

// ssh says its version, and ends when the client's is none.
func ssh(conn net.Conn) {
	io.WriteString(conn, "SSH-2.0-OpenSSH_9.2\r\n")
	b := make([]byte, 4)
	if n, _ := io.ReadFull(conn, b); n > 0 && string(b) != "SSH-" {
		io.WriteString(conn, "Invalid SSH identification string.\r\n")
	} else {
		io.Copy(io.Discard, conn)
	}
}

// redis answers a line that it does not know.
func redis(conn net.Conn) {
	if n, _ := conn.Read(make([]byte, 64)); n > 0 {
		say("-ERR unknown command\r\n")(conn)
	}
}

// tick is long enough for loopback on a busy machine: silence is known only by
// waiting.
const tick = 2 * time.Second

// TestTCP has servers of which nothing is asked.
func TestTCP(t *testing.T) {
	const neither = "no answer within N ms; without: no answer within N ms; the port waits for its client to speak; the check HTTP or HTTPS tells more where it applies"
	tests := map[string]struct {
		listen func(*testing.T, netip.Addr) net.Listener
		handle func(net.Conn)
		want   want
	}{
		"echo": {nil, echo, want{Refused,
			`with a header: "\r\n\r\n\x00\r\nQUIT\n \x00\x00\x00" after N ms; without: no answer within N ms; the server took the header for data, and sent it back`}},
		"waits": {nil, say(""), want{Undecided, "with a header: " + neither}},
		"sshd": {nil, ssh, want{Refused,
			`with a header: "SSH-2.0-OpenSSH_9.2\r\nInvalid SSH identification "… after N ms, closed after N ms; without: "SSH-2.0-OpenSSH_9.2\r\n" after N ms`}},
		"redis": {nil, redis, want{Undecided,
			`with a header: "-ERR unknown command\r\n" after N ms; without: no answer within N ms; either a greeting behind a receiver that requires the header, or the complaint of a server that does not know it`}},
		"mysql": {nil, say("J\x00\x00\x00\n8.0.36"), want{Undecided,
			`with a header: "J\x00\x00\x00\n8.0.36" after N ms; without: "J\x00\x00\x00\n8.0.36" after N ms; the server speaks first, and has not said what it thinks of the header`}},
		"a greeting after a header": {strictFor(patience), say("220 mail\r\n"), want{Undecided,
			`with a header: "220 mail\r\n" after N ms; without: no answer within N ms; either a greeting behind a receiver that requires the header, or the complaint of a server that does not know it`}},
		"echo after a header": {strictFor(patience), echo, want{Undecided, "with a header: " + neither}},
		"a greeting after a header, and little patience": {strictFor(tick / 10), say("220 mail\r\n"), want{Required,
			`with a header: "220 mail\r\n" after N ms; without: closed after N ms`}},
		"closes at once": {nil, func(net.Conn) {}, want{Undecided,
			"with a header: closed after N ms; without: closed after N ms; the server ends every connection"}},
	}
	var all sync.WaitGroup // t.Parallel has as many at once as there are cores, and these just wait
	defer all.Wait()
	for name, tt := range tests {
		for family, addr := range loopbacks {
			var target netip.AddrPort
			if tt.listen != nil {
				target = accept(t, tt.listen(t, addr), tt.handle)
			} else {
				target = serve(t, addr, tt.handle)
			}
			all.Go(func() { check(t, name+", "+family, target, Options{Timeout: tick}, tt.want) })
		}
	}
}

func strictFor(limit time.Duration) func(*testing.T, netip.Addr) net.Listener {
	return func(t *testing.T, addr netip.Addr) net.Listener { return proxied(t, addr, oracle.REQUIRE, limit) }
}

// TestOddServers asks for what the port does not have.
func TestOddServers(t *testing.T) {
	const ill = "; the port does not speak the protocol of the check, or its server is ill"
	flood := func(conn net.Conn) {
		for b := slices.Repeat([]byte("x"), 1<<16); ; {
			if _, err := conn.Write(b); err != nil {
				return
			}
		}
	}
	long := `"` + strings.Repeat("x", 48) + `"… after N ms`
	tests := map[string]struct {
		check  Check
		handle func(net.Conn)
		want   want
	}{
		"HTTP, of a mail server": {HTTP, say("220 a mail server\r\n"), want{Undecided, `with a header: "220 a mail server\r\n" after N ms; without: "220 a mail server\r\n" after N ms` + ill}},
		"HTTPS, of echo":         {HTTPS, echo, want{Refused, `with a header: "\r\n\r\n\x00\r\nQUIT\n`}},
		"HTTP, of a flood":       {HTTP, flood, want{Undecided, "with a header: " + long + "; without: " + long + ill}},
		"TCP, of a flood":        {TCP, flood, want{Undecided, "with a header: " + long + "; without: " + long + "; the server speaks first, and has not said what it thinks of the header"}},
		"HTTP, always 400": {HTTP, func(conn net.Conn) {
			conn.Read(make([]byte, 1<<10))
			io.WriteString(conn, "HTTP/1.1 400 Bad Request\r\n\r\n")
		}, want{Undecided, "with a header: HTTP status 400 after N ms; without: HTTP status 400 after N ms; the request was not understood either way, so that the header made no difference"}},
		"HTTPS, a plain server's alerts": {HTTPS, func(conn net.Conn) {
			b := make([]byte, 1<<10)
			conn.Read(b)
			if b[0] == recordHandshake {
				conn.Write([]byte{recordAlert, 3, 3, 0, 2, 2, 112})
			} else {
				conn.Write([]byte{recordAlert, 3, 3, 0, 2, 2, 70})
			}
		}, want{Refused, "with a header: protocol version not supported (TLS alert 70) after N ms; without: unrecognized name (TLS alert 112) after N ms"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			target := serve(t, loopbacks["IPv4"], tt.handle)
			v := Target(t.Context(), dial, target, Options{Check: tt.check, Timeout: patience})
			if got := durations.ReplaceAllString(v.Detail, "N ms"); v.Kind != tt.want.kind || !strings.HasPrefix(got, tt.want.detail) {
				t.Errorf("%s, %s\nwant %s, %s", v.Kind, v.Detail, tt.want.kind, tt.want.detail)
			}
		})
	}
}

// TestConnections has what goes wrong before there is an answer.
func TestConnections(t *testing.T) {
	defer goleak.VerifyNone(t)
	refused := errors.New("connect: connection refused")
	target := netip.MustParseAddrPort("10.0.0.7:80")
	var dials int
	v := Target(t.Context(), func(context.Context, netip.AddrPort) (net.Conn, error) { dials++; return nil, refused }, target, Options{})
	if want := "no connection after N ms: connect: connection refused"; v.Kind != Unreachable || durations.ReplaceAllString(v.Detail, "N ms") != want || dials != 1 {
		t.Errorf("nobody listens: %v, %d dials", v, dials)
	}

	dials = 0
	v = Target(t.Context(), func(context.Context, netip.AddrPort) (net.Conn, error) {
		if dials++; dials > 1 {
			return nil, refused
		}
		near, far := net.Pipe()
		far.Close()
		return near, nil
	}, target, Options{Check: HTTP})
	if v.Kind != Undecided || !strings.HasSuffix(v.Detail, "connection refused; there was nothing to compare with") {
		t.Errorf("only one connection: %v", v)
	}

	ctx, cancel := context.WithCancel(t.Context())
	v = Target(ctx, func(context.Context, netip.AddrPort) (net.Conn, error) {
		cancel()
		near, far := net.Pipe()
		t.Cleanup(func() { far.Close() })
		return near, nil
	}, target, Options{})
	if v != (Verdict{Undecided, "it was called off"}) {
		t.Errorf("called off: %v", v)
	}
}

// TestDeadline: whatever the target does, an answer is there in time, of which
// the first connection had half.
func TestDeadline(t *testing.T) {
	for _, c := range []Check{TCP, HTTP, HTTPS} {
		synctest.Test(t, func(t *testing.T) {
			start := time.Now()
			var at []time.Duration
			v := Target(t.Context(), func(context.Context, netip.AddrPort) (net.Conn, error) {
				at = append(at, time.Since(start))
				near, far := net.Pipe()
				go io.Copy(io.Discard, far)
				return near, nil
			}, netip.MustParseAddrPort("10.0.0.7:80"), Options{Check: c, Timeout: 8 * time.Second})
			if v.Kind != Undecided || time.Since(start) != 8*time.Second || !slices.Equal(at, []time.Duration{0, 4 * time.Second}) {
				t.Errorf("check %d: %v after %v, dials at %v", c, v, time.Since(start), at)
			}
		})
	}
}

// FuzzAnswer: any bytes of a server are words.
func FuzzAnswer(f *testing.F) {
	for _, seed := range []string{"", "HTTP/1.1 204 No Content\r\n", "HTTP/1.1  99", "HTTP/1.1 +12", "\x15\x03\x03\x00\x02\x02\x28", "\x16\x03", "\x15\x03\x03\x00\x02\x02"} {
		f.Add([]byte(seed), uint8(HTTP))
		f.Add([]byte(seed), uint8(HTTPS))
	}
	f.Fuzz(func(t *testing.T, data []byte, c uint8) {
		a := answer{check: Check(c % 3), data: data}
		if a.String() == "" {
			t.Error("no words")
		}
		if s := a.status(); s != 0 && (s < 100 || s > 999) {
			t.Errorf("status %d", s)
		}
		if a.grade() > nothing && len(data) == 0 {
			t.Error("silence was taken for an answer")
		}
	})
}
