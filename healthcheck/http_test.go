package healthcheck

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestReadStatus(t *testing.T) {
	long := strings.Repeat("x", 10_000)
	tests := map[string]struct {
		response string
		status   int
		err      error
	}{
		"plain":                    {"HTTP/1.1 200 OK\r\nServer: x\r\n\r\nbody", 200, nil},
		"HTTP/1.0 without fields":  {"HTTP/1.0 503 Busy\r\n\r\n", 503, nil},
		"no reason":                {"HTTP/1.1 204\r\n\r\n", 204, nil},
		"bare line feeds":          {"HTTP/1.1 301 Moved\nLocation: /\n\n", 301, nil},
		"interim":                  {"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", 200, nil},
		"upgrade nobody asked for": {"HTTP/1.1 101 Switching Protocols\r\n\r\n", 101, nil},
		"long field":               {"HTTP/1.1 200 OK\r\nX: " + long + "\r\n\r\n", 200, nil},
		"long field, exact buffer": {"HTTP/1.1 200 OK\r\n" + strings.Repeat("x", bodyLimit) + "\r\n\r\n", 200, nil},
		"long status line":         {"HTTP/1.1 200 " + long + "\r\n\r\n", 0, errStatusLine},
		"HTTP/2":                   {"HTTP/2.0 200 OK\r\n\r\n", 0, errStatusLine},
		"two digits":               {"HTTP/1.1 20 OK\r\n\r\n", 0, errStatusLine},
		"four digits":              {"HTTP/1.1 2000 OK\r\n\r\n", 0, errStatusLine},
		"below 100":                {"HTTP/1.1 099 No\r\n\r\n", 0, errStatusLine},
		"a sign":                   {"HTTP/1.1 +20 OK\r\n\r\n", 0, errStatusLine},
		"SSH":                      {"SSH-2.0-OpenSSH_9.2\r\n", 0, errStatusLine},
		"garbage without an end":   {"\x16\x03\x01\x02", 0, errStatusLine},
		"nothing":                  {"", 0, io.EOF},
		"cut in the status line":   {"HTTP/1.1 2", 0, io.EOF},
		"cut in the fields":        {"HTTP/1.1 200 OK\r\nServer: x\r\n", 0, io.EOF},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			status, err := readStatus(bufio.NewReaderSize(strings.NewReader(tt.response), bodyLimit))
			if status != tt.status || !errors.Is(err, tt.err) {
				t.Errorf("got %d, %v; want %d, %v", status, err, tt.status, tt.err)
			}
		})
	}
}

// FuzzReadStatus: what both we and net/http call a response has the same status.
func FuzzReadStatus(f *testing.F) {
	for _, seed := range []string{
		"HTTP/1.1 200 OK\r\nServer: x\r\n\r\nbody", "HTTP/1.0 503\n\n", "HTTP/1.1 100 \r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
		"HTTP/1.1  200 OK\r\n\r\n", "\x15\x03\x01\x00\x02\x02\x46", "HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, response []byte) {
		reader := bufio.NewReaderSize(bytes.NewReader(response), bodyLimit)
		status, err := readStatus(reader)
		if err != nil {
			return
		}
		if status != 101 && (status < 200 || status > 999) {
			t.Fatalf("status %d", status)
		}
		theirs := bufio.NewReader(bytes.NewReader(response))
		for {
			other, err := http.ReadResponse(theirs, nil)
			if err != nil {
				return // net/http also looks into the fields
			}
			if other.StatusCode >= 200 || other.StatusCode == 101 {
				if other.StatusCode != status {
					t.Fatalf("status %d, net/http says %d", status, other.StatusCode)
				}
				return
			}
		}
	})
}

func TestRequest(t *testing.T) {
	c := Check{Target: target, Protocol: HTTP, Path: "/health?deep=1", Host: "web.example"}.complete()
	got, err := request(c)
	if err != nil {
		t.Fatal(err)
	}
	want := "GET /health?deep=1 HTTP/1.1\r\nHost: web.example\r\nUser-Agent: nlb-health-check\r\n" +
		"Accept: */*\r\nConnection: close\r\n\r\n"
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("request (-want +got):\n%s", diff)
	}
	for _, c := range []Check{
		{Path: "/a b"}, {Path: "/\r\nX: y"}, {Path: "health"}, {Host: "a\nb"}, {Path: "/\x00"}, {Path: "http://elsewhere/"},
	} {
		c.Target, c.Protocol = target, HTTP
		if got, err := request(c.complete()); err == nil {
			t.Errorf("path %q, host %q: %q", c.Path, c.Host, got)
		}
	}
}

// A gusher is a connection that has an endless answer.
type gusher struct {
	net.Conn
	start, forever string
	read           int
}

func (g *gusher) Read(p []byte) (int, error) {
	for i := range p {
		if at := g.read + i; at < len(g.start) {
			p[i] = g.start[at]
		} else {
			p[i] = g.forever[(at-len(g.start))%len(g.forever)]
		}
	}
	g.read += len(p)
	return len(p), nil
}

func (g *gusher) Write(p []byte) (int, error)     { return len(p), nil }
func (g *gusher) SetReadDeadline(time.Time) error { return nil }

func TestEndlessAnswersAreCutShort(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\n"
	tests := map[string]struct {
		conn gusher
		kind Kind
		most int
	}{
		"body":             {gusher{start: ok + "\r\n", forever: "x"}, OK, headerLimit + bodyLimit},
		"field":            {gusher{start: ok, forever: "x"}, Malformed, headerLimit},
		"fields":           {gusher{start: ok, forever: "X: y\r\n"}, Malformed, headerLimit},
		"interim":          {gusher{forever: "HTTP/1.1 100 Continue\r\n\r\n"}, Malformed, headerLimit},
		"status line":      {gusher{start: ok[:12], forever: " "}, Malformed, headerLimit},
		"empty lines":      {gusher{forever: "\r\n"}, Malformed, headerLimit},
		"digits":           {gusher{start: "HTTP/1.1 ", forever: "2"}, Malformed, headerLimit},
		"a colourful blob": {gusher{forever: "\x00\xff\x16\x03"}, Malformed, headerLimit},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			r := Result{Start: time.Now()}
			ask(&tt.conn, Check{Target: target, Protocol: HTTP}.complete(), &r)
			if r.Kind != tt.kind {
				t.Errorf("%v, want %v: %v", r.Kind, tt.kind, r)
			}
			if tt.conn.read > tt.most {
				t.Errorf("read %d bytes, want at most %d", tt.conn.read, tt.most)
			}
		})
	}
}
