package web

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"nlb/internal/bubble"
)

// A pipes is a listener whose clients are in the same bubble.
type pipes struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), closed: make(chan struct{})} }

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error   { p.once.Do(func() { close(p.closed) }); return nil }
func (p *pipes) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 9469} }

func (p *pipes) dial(context.Context, string, string) (net.Conn, error) {
	here, there := net.Pipe()
	select {
	case p.conns <- there:
		return here, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

// get asks once, on a connection of its own.
func (p *pipes) get() (int, error) {
	t := &http.Transport{DialContext: p.dial, DisableKeepAlives: true}
	defer t.CloseIdleConnections()
	r, err := (&http.Client{Transport: t}).Get("http://nlb.example/")
	if err != nil {
		return 0, err
	}
	_, err = io.Copy(io.Discard, r.Body)
	return r.StatusCode, errors.Join(err, r.Body.Close())
}

// run has s run until stop, which reports how long the end took.
func run(t *testing.T, s *Server) (stop func() time.Duration) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	return func() time.Duration {
		begun := time.Now()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		return time.Since(begun)
	}
}

var teapot = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) })

func TestServerAnswersAndEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPipes()
		s := NewServer("127.0.0.1:9469", teapot, zap.NewNop())
		s.listen = func(context.Context) (net.Listener, error) { return p, nil }
		stop := run(t, s)
		if status, err := p.get(); err != nil || status != http.StatusTeapot {
			t.Errorf("%d, %v", status, err)
		}
		if took := stop(); took > farewell {
			t.Errorf("ended after %v", took)
		}
		if _, err := p.get(); err == nil {
			t.Error("it answers after its end")
		}
	})
}

// A port that is taken is said once, and tried again until it is free.
func TestServerWaitsForItsPort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zap.InfoLevel)
		p, tries := newPipes(), 0
		s := NewServer("127.0.0.1:9469", teapot, zap.New(core))
		s.listen = func(context.Context) (net.Listener, error) {
			if tries++; tries <= 20 {
				return nil, fmt.Errorf("listen: address already in use")
			}
			return p, nil
		}
		begun := time.Now()
		stop := run(t, s)
		if status, err := p.get(); err != nil || status != http.StatusTeapot {
			t.Errorf("%d, %v", status, err)
		}
		// 250 ms doubled six times, and then 10 s for each of the other attempts.
		if took, want := time.Since(begun), 15750*time.Millisecond+14*lastPause; took != want {
			t.Errorf("served after %v, want %v", took, want)
		}
		stop()
		if n := logs.FilterLevelExact(zap.ErrorLevel).Len(); n != 1 {
			t.Errorf("the error was logged %d times", n)
		}
		if n := logs.FilterMessage("http is served").Len(); n != 1 {
			t.Errorf("that it is served was logged %d times", n)
		}
	})
}

// A listener that fails is replaced.
func TestServerOutlivesItsListener(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, second := newPipes(), newPipes()
		left := []*pipes{first, second}
		s := NewServer("127.0.0.1:9469", teapot, zap.NewNop())
		s.listen = func(context.Context) (net.Listener, error) { l := left[0]; left = left[1:]; return l, nil }
		stop := run(t, s)
		if _, err := first.get(); err != nil {
			t.Error(err)
		}
		_ = first.Close()
		if status, err := second.get(); err != nil || status != http.StatusTeapot {
			t.Errorf("%d, %v", status, err)
		}
		stop()
	})
}

// Who says half a request, and who does not take the answer, is left.
func TestServerLeavesSlowClients(t *testing.T) {
	endless := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		for {
			if _, err := w.Write(make([]byte, 4096)); err != nil {
				return
			}
		}
	})
	for name, c := range map[string]struct {
		says string
		want time.Duration
	}{
		"half a header": {"GET / HTTP/1.1\r\nHost: nlb", headerWithin},
		"no reader":     {"GET / HTTP/1.1\r\nHost: nlb.example\r\n\r\n", answerWithin},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPipes()
				s := NewServer("127.0.0.1:9469", endless, zap.NewNop())
				s.listen = func(context.Context) (net.Listener, error) { return p, nil }
				stop := run(t, s)
				c2, err := p.dial(t.Context(), "", "")
				if err != nil {
					t.Fatal(err)
				}
				if _, err := io.WriteString(c2, c.says); err != nil {
					t.Fatal(err)
				}
				begun := time.Now()
				bubble.Pass(c.want + time.Second)
				_, err = io.Copy(io.Discard, c2) // what was written before the end
				if took := time.Since(begun); err != nil || took != c.want+time.Second {
					t.Errorf("the connection was there after %v: %v", took, err)
				}
				stop()
			})
		})
	}
}

// A handler that does not end does not keep the daemon from ending.
func TestServerEndsWithoutItsHandlers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, begun, release := newPipes(), make(chan struct{}), make(chan struct{})
		stuck := http.HandlerFunc(func(http.ResponseWriter, *http.Request) { close(begun); <-release })
		s := NewServer("127.0.0.1:9469", stuck, zap.NewNop())
		s.listen = func(context.Context) (net.Listener, error) { return p, nil }
		stop := run(t, s)
		answered := make(chan error, 1)
		go func() { _, err := p.get(); answered <- err }()
		<-begun
		if took := stop(); took != farewell {
			t.Errorf("ended after %v, want %v", took, farewell)
		}
		if err := <-answered; err == nil {
			t.Error("who asked learned nothing of it")
		}
		close(release)
	})
}

func TestServerWithoutAddress(t *testing.T) {
	if err := NewServer("", teapot, zap.NewNop()).Run(t.Context()); err != nil {
		t.Error(err)
	}
}
