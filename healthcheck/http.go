package healthcheck

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"
)

const (
	// headerLimit bounds everything before the body, interim responses
	// included: a target may not make us read for as long as it likes.
	headerLimit = 16 << 10
	// bodyLimit and bodyGrace bound what is read of a body whose content
	// nobody looks at. It is read so that a usual health page arrives whole
	// and its server sees an orderly end instead of a reset.
	bodyLimit = 4 << 10
	bodyGrace = 100 * time.Millisecond

	userAgent = "nlb-health-check"
)

var (
	errHeaderTooLong = fmt.Errorf("the header is longer than %d bytes", headerLimit)
	errStatusLine    = errors.New("not a status line")
)

var readers = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, bodyLimit) }}

// ask sends one request and judges the answer. It follows no redirect, knows
// no proxy, resolves no name and reads a bounded number of bytes: a client of
// its own for one GET is smaller than net/http's options against doing more.
func ask(conn net.Conn, c Check, r *Result) {
	request, err := request(c)
	if err != nil {
		r.fail("", step("request", err))
		return
	}
	if _, err := io.WriteString(conn, request); err != nil {
		r.fail("send the request", err)
		return
	}
	reader := readers.Get().(*bufio.Reader)
	defer readers.Put(reader)
	limited := &io.LimitedReader{R: conn, N: headerLimit}
	reader.Reset(limited)
	defer reader.Reset(nil)

	r.Status, err = readStatus(reader)
	if limited.N == 0 && err != nil {
		err = errHeaderTooLong
	}
	if err != nil {
		r.fail("waiting for the response", err)
		return
	}
	r.Latency = time.Since(r.Start)
	r.Kind = OK
	if !c.Matches(r.Status) {
		r.Kind, r.Detail = CodeMismatch, matcherString(c.Matcher)
	}
	limited.N = bodyLimit
	drain(conn, reader, r.Start.Add(c.Timeout))
}

// drain reads a body within its limits. What becomes of it does not matter.
func drain(conn net.Conn, body io.Reader, deadline time.Time) {
	if grace := time.Now().Add(bodyGrace); grace.Before(deadline) {
		deadline = grace
	}
	if conn.SetReadDeadline(deadline) == nil {
		io.Copy(io.Discard, body)
	}
}

// request returns the request of a completed check.
func request(c Check) (string, error) {
	if !strings.HasPrefix(c.Path, "/") || hasControl(c.Path) || hasControl(c.Host) {
		return "", fmt.Errorf("path %q with host %q would break the request", c.Path, c.Host)
	}
	return "GET " + c.Path + " HTTP/1.1\r\n" +
		"Host: " + c.Host + "\r\n" +
		"User-Agent: " + userAgent + "\r\n" +
		"Accept: */*\r\n" +
		"Connection: close\r\n\r\n", nil
}

// hasControl finds what would end a request's line or one of its fields.
func hasControl(s string) bool {
	return strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r == 0x7f })
}

// readStatus reads a response up to its body and returns its status code.
// Interim responses (RFC 9110, 15.2) are skipped, except 101: it ends HTTP,
// and is never a right answer to a request that did not ask for an upgrade.
func readStatus(r *bufio.Reader) (int, error) {
	for {
		line, err := r.ReadSlice('\n')
		if err != nil && err != bufio.ErrBufferFull {
			return 0, early(line, err)
		}
		status, ok := parseStatusLine(line)
		if !ok || err != nil {
			return 0, fmt.Errorf("%w: %.40q", errStatusLine, line)
		}
		if err := skipFields(r); err != nil {
			return 0, err
		}
		if status >= 200 || status == 101 {
			return status, nil
		}
	}
}

// early tells garbage without a line end from a connection that was cut short.
func early(read []byte, err error) error {
	if prefix := []byte("HTTP/1."); !bytes.HasPrefix(prefix, read[:min(len(read), len(prefix))]) {
		return fmt.Errorf("%w: %.40q", errStatusLine, read)
	}
	return err
}

// parseStatusLine accepts "HTTP/1.x NNN" with or without a reason (RFC 9112, 4).
func parseStatusLine(line []byte) (status int, ok bool) {
	line = bytes.TrimRight(line, "\r\n")
	const form = "HTTP/1.x NNN"
	if len(line) < len(form) || !bytes.HasPrefix(line, []byte("HTTP/1.")) || !isDigit(line[7]) || line[8] != ' ' {
		return 0, false
	}
	if len(line) > len(form) && line[len(form)] != ' ' {
		return 0, false
	}
	for _, d := range line[9:12] {
		if !isDigit(d) {
			return 0, false
		}
		status = status*10 + int(d-'0')
	}
	return status, status >= 100
}

func isDigit(b byte) bool { return b >= '0' && b <= '9' }

// skipFields reads up to and including the empty line that ends a header. A
// line may be longer than the reader's buffer.
func skipFields(r *bufio.Reader) error {
	for continued := false; ; {
		line, err := r.ReadSlice('\n')
		if err != nil && err != bufio.ErrBufferFull {
			return err
		}
		if !continued && len(bytes.TrimRight(line, "\r\n")) == 0 && err == nil {
			return nil
		}
		continued = err != nil
	}
}
