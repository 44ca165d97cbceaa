package healthcheck

import (
	"bufio"
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/pires/go-proxyproto"
	"golang.org/x/sys/unix"
)

// patience bounds what should not take long; nothing is measured against it.
const patience = 20 * time.Second

// serve answers each connection to a new listener with answer, and closes it.
func serve(t *testing.T, address string, answer func(*net.TCPConn)) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	t.Cleanup(running.Wait)
	t.Cleanup(func() { l.Close() })
	running.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer conn.Close()
				conn.SetDeadline(time.Now().Add(patience))
				answer(conn.(*net.TCPConn))
			})
		}
	})
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// readRequest reads up to the empty line.
func readRequest(conn net.Conn) string {
	var request strings.Builder
	for r := bufio.NewReader(conn); !strings.HasSuffix(request.String(), "\r\n\r\n"); {
		line, err := r.ReadString('\n')
		request.WriteString(line)
		if err != nil {
			break
		}
	}
	return request.String()
}

// say answers a request with text.
func say(text string) func(*net.TCPConn) {
	return func(conn *net.TCPConn) {
		readRequest(conn)
		io.WriteString(conn, text)
	}
}

// pour answers a request with text, over and over until nobody listens.
func pour(text string) func(*net.TCPConn) {
	return func(conn *net.TCPConn) {
		readRequest(conn)
		for {
			if _, err := io.WriteString(conn, text); err != nil {
				return
			}
		}
	}
}

// silence says nothing until the other side leaves.
func silence(conn *net.TCPConn) { io.Copy(io.Discard, conn) }

// drip says text one byte at a time, far too slowly, until the other side leaves.
func drip(text string) func(*net.TCPConn) {
	return func(conn *net.TCPConn) {
		readRequest(conn)
		for i := range text {
			io.WriteString(conn, text[i:i+1])
			conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
			if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
				return
			}
		}
	}
}

func reset(conn *net.TCPConn) { conn.SetLinger(0) }

func TestProbe(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\n\r\n"
	tests := map[string]struct {
		protocol Protocol
		target   func(*net.TCPConn)
		kinds    []Kind // either
		status   int
		words    string // in the description
	}{
		"TCP, orderly":              {TCP, silence, []Kind{OK}, 0, "accepted a connection"},
		"TCP, closed at once":       {TCP, func(*net.TCPConn) {}, []Kind{OK}, 0, ""},
		"TCP, reset at once":        {TCP, reset, []Kind{OK}, 0, ""},
		"HTTP, orderly":             {HTTP, say(ok + "fine"), []Kind{OK}, 200, "answered 200"},
		"HTTP, not ready":           {HTTP, say("HTTP/1.1 503 Busy\r\n\r\n"), []Kind{CodeMismatch}, 503, "answered 503, expected 200-399"},
		"HTTP, redirect":            {HTTP, say("HTTP/1.1 302 Found\r\nLocation: http://203.0.113.9/\r\n\r\n"), []Kind{OK}, 302, ""},
		"HTTP, endless body":        {HTTP, pour(ok + strings.Repeat("x", 4096)), []Kind{OK}, 200, ""},
		"HTTP, body that never is":  {HTTP, func(c *net.TCPConn) { say(ok)(c); silence(c) }, []Kind{OK}, 200, ""},
		"HTTP, silence":             {HTTP, silence, []Kind{Timeout}, 0, "waiting for the response"},
		"HTTP, one byte at a time":  {HTTP, drip(strings.Repeat("HTTP/1.1 100 Continue\r\n\r\n", 50)), []Kind{Timeout}, 0, "waiting for the response"},
		"HTTP, endless field":       {HTTP, pour("HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 1<<20)), []Kind{Malformed}, 0, "longer than 16384 bytes"},
		"HTTP, 100 Continue flood":  {HTTP, pour("HTTP/1.1 100 Continue\r\n\r\n"), []Kind{Malformed}, 0, "longer than 16384 bytes"},
		"HTTP, garbage":             {HTTP, say("SSH-2.0-OpenSSH_9.2\r\n"), []Kind{Malformed}, 0, "SSH-2.0"},
		"HTTP, closed at once":      {HTTP, func(*net.TCPConn) {}, []Kind{Closed, Reset}, 0, ""},
		"HTTP, reset at once":       {HTTP, reset, []Kind{Reset, Closed}, 0, ""},
		"HTTP, closed in the midst": {HTTP, say("HTTP/1.1 200 OK\r\nServer"), []Kind{Closed}, 0, "waiting for the response"},
		"HTTPS, garbage":            {HTTPS, func(c *net.TCPConn) { io.WriteString(c, "220 mail ready\r\n"); silence(c) }, []Kind{TLS}, 0, "TLS with"},
		"HTTPS, silence":            {HTTPS, silence, []Kind{Timeout}, 0, "TLS handshake"},
		"HTTPS, endless handshake":  {HTTPS, pourRaw("\x16\x03\x03\x40\x00" + "\x02\xff\xff\xff" + strings.Repeat("x", 16380)), []Kind{TLS, Reset}, 0, ""},
		"HTTPS, closed at once":     {HTTPS, func(*net.TCPConn) {}, []Kind{Closed, Reset}, 0, ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := Check{Target: serve(t, "127.0.0.1:0", tt.target), Protocol: tt.protocol, Timeout: patience}
			if tt.kinds[0] == Timeout {
				c.Timeout = 300 * time.Millisecond
			}
			r := new(Prober).Probe(t.Context(), c)
			if r.Kind != tt.kinds[0] && r.Kind != tt.kinds[len(tt.kinds)-1] {
				t.Fatalf("%v, want %v: %v", r.Kind, tt.kinds, r)
			}
			if r.Status != tt.status {
				t.Errorf("status %d, want %d", r.Status, tt.status)
			}
			if !strings.Contains(r.String(), tt.words) {
				t.Errorf("%q does not say %q", r, tt.words)
			}
			if got := r.Local.Addr().String(); got != "127.0.0.1" {
				t.Errorf("local address %v", got)
			}
		})
	}
}

// pourRaw is pour without waiting for a request.
func pourRaw(text string) func(*net.TCPConn) {
	return func(conn *net.TCPConn) {
		for {
			if _, err := io.WriteString(conn, text); err != nil {
				return
			}
		}
	}
}

func TestProbeRefused(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		target := l.Addr().(*net.TCPAddr).AddrPort()
		l.Close()
		r := new(Prober).Probe(t.Context(), Check{Target: target, Timeout: patience})
		if r.Kind != Refused || r.Reason() != ReasonFailedHealthChecks {
			t.Errorf("%v, reason %q: %v", r.Kind, r.Reason(), r)
		}
		want := fmt.Sprintf("connection refused by %v after ", target)
		if got := r.String(); !strings.HasPrefix(got, want) || !strings.HasSuffix(got, " from "+target.Addr().String()) {
			t.Errorf("said %q", got)
		}
	}
}

// TestProbeFindsHungProcess: nobody accepts, as when a process was stopped.
// The probes themselves fill its queue, and then it fails.
func TestProbeFindsHungProcess(t *testing.T) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 2)); err != nil {
		t.Fatal(err)
	}
	c := Check{Target: localAddr(fd), Timeout: 200 * time.Millisecond}
	for range 10 {
		r := new(Prober).Probe(t.Context(), c)
		if r.Kind == Timeout {
			if want := "no answer to the connection attempt"; !strings.Contains(r.String(), want) {
				t.Errorf("%q does not say %q", r, want)
			}
			return
		}
	}
	t.Error("ten probes of a process that accepts nothing succeeded")
}

// TestProbeLeavesNothingBehind: the target sees an orderly end, we keep no
// TIME_WAIT.
func TestProbeLeavesNothingBehind(t *testing.T) {
	const probes = 50
	ends := make(chan error, probes)
	target := serve(t, "127.0.0.1:0", func(conn *net.TCPConn) {
		_, err := conn.Read(make([]byte, 1))
		ends <- err
	})
	for range probes {
		if r := new(Prober).Probe(t.Context(), Check{Target: target, Timeout: patience}); !r.OK() {
			t.Fatal(r)
		}
	}
	for range probes {
		if err := <-ends; err != io.EOF {
			t.Fatalf("the target read %v, want an orderly end", err)
		}
	}
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		t.Fatal(err)
	}
	const timeWait = " 06 "
	for line := range strings.Lines(string(table)) {
		if remote := fmt.Sprintf(":%04X%s", target.Port(), timeWait); strings.Contains(line, remote) {
			t.Errorf("left behind: %s", line)
		}
	}
}

func TestProbeEndsWithItsContext(t *testing.T) {
	arrived := make(chan bool, 1)
	target := serve(t, "127.0.0.1:0", func(conn *net.TCPConn) { arrived <- true; silence(conn) })
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-arrived; cancel() }()
	r := new(Prober).Probe(ctx, Check{Target: target, Protocol: HTTP, Timeout: time.Hour})
	if r.Kind != Unmade {
		t.Errorf("%v, want %v: %v", r.Kind, Unmade, r)
	}
}

func TestProbeSource(t *testing.T) {
	var accepted atomic.Int32
	peers := make(chan netip.Addr, 1)
	target := serve(t, "127.0.0.1:0", func(conn *net.TCPConn) {
		accepted.Add(1)
		peers <- conn.RemoteAddr().(*net.TCPAddr).AddrPort().Addr()
	})
	vip := netip.MustParseAddr("127.0.0.1")
	isVIP := func(a netip.Addr) bool { return a == vip }
	source := netip.MustParseAddr("127.0.0.2")

	t.Run("given", func(t *testing.T) {
		r := (&Prober{Forbidden: isVIP}).Probe(t.Context(), Check{Target: target, Source: source})
		if !r.OK() || r.Local.Addr() != source {
			t.Errorf("%v from %v", r, r.Local)
		}
		if peer := <-peers; peer != source {
			t.Errorf("the target saw %v", peer)
		}
	})
	for name, c := range map[string]Check{
		"a VIP by the route": {Target: target},
		"a VIP by choice":    {Target: target, Source: vip},
	} {
		t.Run(name, func(t *testing.T) {
			before := accepted.Load()
			r := (&Prober{Forbidden: isVIP}).Probe(t.Context(), c)
			want := fmt.Sprintf("the probe of %v leaves from 127.0.0.1, which is a VIP: a target that carries the VIP itself "+
				"drops the probe or answers to itself; set source_addresses or the health check's source "+
				"to an address that is no VIP", target)
			if diff := cmp.Diff(want, r.String()); diff != "" || r.Kind != SourceIsVIP {
				t.Errorf("%v (-want +got):\n%s", r.Kind, diff)
			}
			// Connections are accepted in order: after one more, an earlier
			// one would have been seen.
			(&Prober{}).Probe(t.Context(), Check{Target: target})
			<-peers
			if n := accepted.Load() - before; n != 1 {
				t.Errorf("%d connections, want the one that was allowed", n)
			}
		})
	}
	t.Run("a VIP after the route changed", func(t *testing.T) {
		var asked atomic.Int32
		changed := func(netip.Addr) bool { return asked.Add(1) > 1 }
		r := (&Prober{Forbidden: changed}).Probe(t.Context(), Check{Target: target})
		<-peers
		if r.Kind != SourceIsVIP {
			t.Errorf("%v: %v", r.Kind, r)
		}
	})
	t.Run("not on this host", func(t *testing.T) {
		r := new(Prober).Probe(t.Context(), Check{Target: target, Source: netip.MustParseAddr("192.0.2.1")})
		if want := "bind to 192.0.2.1: cannot assign requested address"; r.Kind != Unmade || r.Conclusive() || !strings.Contains(r.String(), want) {
			t.Errorf("%v: %v", r.Kind, r)
		}
	})
	t.Run("of the other family", func(t *testing.T) {
		r := new(Prober).Probe(t.Context(), Check{Target: target, Source: netip.MustParseAddr("::1")})
		if r.Kind != Unmade {
			t.Errorf("%v: %v", r.Kind, r)
		}
	})
}

func TestSocketOptions(t *testing.T) {
	const mark = 0x40000000
	for _, c := range []Check{
		{Target: netip.MustParseAddrPort("127.0.0.1:80"), Source: netip.MustParseAddr("127.0.0.2"), Protocol: HTTP},
		{Target: netip.MustParseAddrPort("[::1]:80"), Source: netip.MustParseAddr("::1"), Protocol: HTTP},
	} {
		fd, err := newSocket(c, mark)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		for _, option := range []struct {
			name              string
			level, name_, val int
		}{
			{"SO_MARK", unix.SOL_SOCKET, unix.SO_MARK, mark},
			{"TCP_LINGER2", unix.IPPROTO_TCP, unix.TCP_LINGER2, -1},
			{"TCP_NODELAY", unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
			{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 0},
			{"SO_PROTOCOL", unix.SOL_SOCKET, unix.SO_PROTOCOL, unix.IPPROTO_TCP},
		} {
			if got, err := unix.GetsockoptInt(fd, option.level, option.name_); err != nil || got != option.val {
				t.Errorf("%v: %s is %d, %v; want %d", c.Target, option.name, got, err, option.val)
			}
		}
		// The port is chosen at connect: IP_BIND_ADDRESS_NO_PORT is in force.
		if got, want := localAddr(fd), netip.AddrPortFrom(c.Source, 0); got != want {
			t.Errorf("bound to %v, want %v", got, want)
		}
	}
}

func TestProxyProtocolLocal(t *testing.T) {
	for _, protocol := range []Protocol{TCP, HTTP} {
		t.Run(protocol.String(), func(t *testing.T) {
			received := make(chan []byte, 1)
			target := serve(t, "127.0.0.1:0", func(conn *net.TCPConn) {
				header := make([]byte, 16)
				io.ReadFull(conn, header)
				if protocol == HTTP {
					header = append(header, readRequest(conn)...)
					io.WriteString(conn, "HTTP/1.1 200 OK\r\n\r\n")
				}
				rest, _ := io.ReadAll(conn)
				received <- append(header, rest...)
			})
			r := new(Prober).Probe(t.Context(), Check{Target: target, Protocol: protocol, ProxyProtocolLocal: true})
			if !r.OK() {
				t.Fatal(r)
			}
			got := <-received
			want := []byte{0x0d, 0x0a, 0x0d, 0x0a, 0x00, 0x0d, 0x0a, 0x51, 0x55, 0x49, 0x54, 0x0a, 0x20, 0x00, 0x00, 0x00}
			if diff := cmp.Diff(want, got[:16]); diff != "" {
				t.Errorf("header (-want +got):\n%s", diff)
			}
			reader := bufio.NewReader(bytes.NewReader(got))
			header, err := proxyproto.Read(reader)
			if err != nil || !header.Command.IsLocal() || header.Version != 2 {
				t.Fatalf("header %+v, %v", header, err)
			}
			rest, _ := io.ReadAll(reader)
			if protocol == TCP && len(rest) != 0 || protocol == HTTP && !bytes.HasPrefix(rest, []byte("GET / HTTP/1.1\r\n")) {
				t.Errorf("then came %q", rest)
			}
		})
	}
}

func TestProbeHTTPS(t *testing.T) {
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusNoContent)
	}))
	server.Config.ErrorLog = log.New(io.Discard, "", 0) // some handshakes are meant to fail
	server.StartTLS()
	defer server.Close()
	target := server.Listener.Addr().(*net.TCPAddr).AddrPort()
	roots := x509.NewCertPool()
	roots.AddCert(server.Certificate())
	tests := map[string]struct {
		prober Prober
		check  Check
		kind   Kind
	}{
		"any certificate will do":     {Prober{}, Check{}, OK},
		"an unknown root":             {Prober{Roots: x509.NewCertPool()}, Check{VerifyTLS: true}, TLS},
		"a certificate for the name":  {Prober{Roots: roots}, Check{VerifyTLS: true, ServerName: "example.com"}, OK},
		"a certificate for others":    {Prober{Roots: roots}, Check{VerifyTLS: true, ServerName: "web.invalid"}, TLS},
		"a certificate for the addr.": {Prober{Roots: roots}, Check{VerifyTLS: true}, OK},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			tt.check.Target, tt.check.Protocol, tt.check.Timeout = target, HTTPS, patience
			if r := tt.prober.Probe(t.Context(), tt.check); r.Kind != tt.kind {
				t.Errorf("%v, want %v: %v", r.Kind, tt.kind, r)
			}
		})
	}
}

// TestProbeIgnoresProxies: a probe goes to the target, whatever the
// environment says.
func TestProbeIgnoresProxies(t *testing.T) {
	t.Setenv("HTTP_PROXY", "http://127.0.0.1:1")
	t.Setenv("ALL_PROXY", "http://127.0.0.1:1")
	requests := make(chan string, 1)
	target := serve(t, "[::1]:0", func(conn *net.TCPConn) {
		requests <- readRequest(conn)
		io.WriteString(conn, "HTTP/1.0 200 OK\r\n\r\n")
	})
	if r := new(Prober).Probe(t.Context(), Check{Target: target, Protocol: HTTP, Path: "/health"}); !r.OK() {
		t.Fatal(r)
	}
	if got, want := <-requests, "GET /health HTTP/1.1\r\nHost: "+target.String()+"\r\n"; !strings.HasPrefix(got, want) {
		t.Errorf("request %q", got)
	}
}

func TestFailure(t *testing.T) {
	tests := []struct {
		err    error
		kind   Kind
		reason string
	}{
		{unix.ECONNREFUSED, Refused, ReasonFailedHealthChecks},
		{unix.ETIMEDOUT, Timeout, ReasonTimeout},
		{&os.PathError{Op: "read", Err: os.ErrDeadlineExceeded}, Timeout, ReasonTimeout},
		{&os.PathError{Op: "read", Err: unix.ECONNRESET}, Reset, ReasonFailedHealthChecks},
		{unix.EPIPE, Reset, ReasonFailedHealthChecks},
		{io.ErrUnexpectedEOF, Closed, ReasonFailedHealthChecks},
		{unix.EHOSTUNREACH, Unreachable, ReasonFailedHealthChecks},
		{unix.ENETUNREACH, Unreachable, ReasonFailedHealthChecks},
		{unix.EPERM, Unreachable, ReasonFailedHealthChecks},
		{unix.EADDRNOTAVAIL, Unmade, ReasonNone},
		{step("open socket", unix.EMFILE), Unmade, ReasonNone},
		{step("set SO_MARK", unix.EPERM), Unmade, ReasonNone},
		{errStatusLine, Malformed, ReasonFailedHealthChecks},
	}
	for _, tt := range tests {
		r := Result{Kind: failure(tt.err)}
		if r.Kind != tt.kind || r.Reason() != tt.reason {
			t.Errorf("%v: %v, reason %q; want %v, %q", tt.err, r.Kind, r.Reason(), tt.kind, tt.reason)
		}
	}
}

func TestResultWords(t *testing.T) {
	local := netip.MustParseAddrPort("10.0.0.2:40112")
	ms := 400 * time.Microsecond
	tests := []struct {
		result Result
		want   string
	}{
		{Result{}, "not probed yet"},
		{Result{Kind: OK, Latency: ms, Local: local}, "10.0.1.11:8080 accepted a connection after 0.4 ms from 10.0.0.2"},
		{Result{Kind: OK, Status: 204, Latency: ms, Local: local}, "10.0.1.11:8080 answered 204 after 0.4 ms from 10.0.0.2"},
		{Result{Kind: Refused, Latency: ms, Local: local}, "connection refused by 10.0.1.11:8080 after 0.4 ms from 10.0.0.2"},
		{Result{Kind: Timeout, Detail: "TLS handshake", Latency: time.Second}, "timeout of 10.0.1.11:8080: TLS handshake after 1000.0 ms"},
		{Result{Kind: CodeMismatch, Status: 503, Detail: "200-399", Latency: ms}, "10.0.1.11:8080 answered 503, expected 200-399 after 0.4 ms"},
		{Result{Kind: Unreachable, Detail: "no route to host", Latency: ms}, "10.0.1.11:8080 is unreachable: no route to host after 0.4 ms"},
		{Result{Kind: Unmade, Detail: "open socket: too many open files"}, "could not probe 10.0.1.11:8080: open socket: too many open files"},
	}
	for _, tt := range tests {
		tt.result.Target = target
		if diff := cmp.Diff(tt.want, tt.result.String()); diff != "" {
			t.Errorf("%v (-want +got):\n%s", tt.result.Kind, diff)
		}
	}
}
