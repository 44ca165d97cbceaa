package web

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"nlb/balancer"
	"nlb/balancer/control"
	"nlb/internal/bubble"
)

// An event is one server-sent event.
type event struct{ Name, Data string }

// parseEvents reads events as the HTML standard says, section 9.2.6, as far as we
// use of it.
func parseEvents(t *testing.T, text string) (events []event) {
	t.Helper()
	var e event
	lines := bufio.NewScanner(strings.NewReader(text))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), ": ")
		switch name {
		case "event":
			e.Name = value
		case "data":
			e.Data += value
		case "":
			events, e = append(events, e), event{}
		default:
			t.Fatalf("not a line of an event: %q", lines.Text())
		}
	}
	if e != (event{}) {
		t.Fatalf("an event has no end: %+v", e)
	}
	return events
}

func TestStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := growing(10, "10.0.1.11", "10.0.1.12")
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		sent := make(chan []byte, 1)
		go newStreams(newRecorder(source)).run(ctx, func(event []byte) error {
			sent <- event
			return nil
		})
		const (
			apply  = `{"generation":1,"held":true,"error":"","converged_at":"2000-01-01T00:00:00Z","took_seconds":0,"writes_total":0,"drift_repairs_total":0,"failures_total":0,"verdict_latency":{"count":0,"sum_seconds":0,"buckets":null}}`
			reload = `{"success":true,"error":"","attempts_total":0,"failures_total":0}`
			first  = `{"address":"10.0.1.11","port":8080,"weight":1,"effective_weight":1,"state":"healthy","reason":"","description":"","since":"2000-01-01T00:00:00Z",`
			second = `{"address":"10.0.1.12","port":8080,"weight":1,"effective_weight":1,"state":"unhealthy","reason":"Target.Timeout","description":"","since":"2000-01-01T00:00:00Z",`
		)
		steps := []struct {
			name   string
			before func()
			want   []event
		}{
			{"everything at first", func() {}, []event{{"status", `{"at":"2000-01-01T00:00:00Z","step_seconds":2,"status":` + jsonOf(t, source.make(epoch)) +
				`,"listener_rates":{"http":[0,null,null]},"rates":{"web":[[0,null,null],[0,null,null]]}}`}}},
			{"then what is counted", func() {}, []event{{"change", `{"at":"2000-01-01T00:00:02Z","apply":` + apply +
				`,"reload":` + reload + `,"totals":{},"listener_rates":{"http":[4,20,20000]},"target_groups":[],"rates":{"web":[[2,10,10000],[2,10,10000]]}}`}}},
			{"a group of which a target failed", func() {
				source.change(func(s *script) {
					was := s.make
					s.make = func(now time.Time) *control.Status {
						status := was(now)
						t := &status.TargetGroups[0].Targets[1]
						t.State, t.Reason = balancer.Unhealthy, balancer.ReasonTimeout
						return status
					}
				})
			}, []event{{"change", `{"at":"2000-01-01T00:00:04Z","apply":` + apply +
				`,"reload":` + reload + `,"totals":{},"listener_rates":{"http":[8,20,20000]},"target_groups":[{"name":"web","protocol":"TCP","client_ip":"hairpin_snat","fail_open":false,"targets":[` +
				first + `"active_flows":4,"new_flows_total":40,"bytes_total":40000},` + second + `"active_flows":4,"new_flows_total":40,"bytes_total":40000}]}],` +
				`"rates":{"web":[[4,10,10000],[4,10,10000]]}}`}}},
			{"nothing of a group at rest", func() {
				source.change(func(s *script) {
					still := s.make(epoch.Add(6 * time.Second))
					s.make = func(time.Time) *control.Status { return still }
				})
			}, []event{{"change", `{"at":"2000-01-01T00:00:06Z","apply":` + apply +
				`,"reload":` + reload + `,"totals":{},"listener_rates":{"http":[12,20,20000]},"target_groups":[],"rates":{"web":[[6,10,10000],[6,10,10000]]}}`}}},
			{"rates fall to nothing", func() {}, []event{{"change", `{"at":"2000-01-01T00:00:08Z","apply":` + apply +
				`,"reload":` + reload + `,"totals":{},"listener_rates":{"http":[12,0,0]},"target_groups":[],"rates":{"web":[[6,0,0],[6,0,0]]}}`}}},
			{"and stay there", func() {}, []event{{"change", `{"at":"2000-01-01T00:00:10Z","apply":` + apply +
				`,"reload":` + reload + `,"totals":{},"listener_rates":{"http":[12,0,0]},"target_groups":[],"rates":{}}`}}},
			{"why there is nothing", func() {
				source.change(func(s *script) { s.err = errNothing })
			}, []event{{"failure", `{"error":"the daemon has not finished its first pass"}`}}},
			{"everything after a failure", func() {
				source.change(func(s *script) { s.err = nil })
			}, []event{{"status", `{"at":"2000-01-01T00:00:14Z","step_seconds":2,"status":` + jsonOf(t, withFailed(6)) +
				`,"listener_rates":{"http":[12,0,0]},"rates":{"web":[[6,0,0],[6,0,0]]}}`}}},
			{"everything when a group comes", func() {
				source.change(func(s *script) {
					s.make = func(time.Time) *control.Status { return statusOf(nil, groupOf("api"), groupOf("web")) }
				})
			}, []event{{"status", `{"at":"2000-01-01T00:00:16Z","step_seconds":2,"status":` + jsonOf(t, statusOf(nil, groupOf("api"), groupOf("web"))) +
				`,"listener_rates":{},"rates":{"api":[],"web":[]}}`}}},
		}
		for _, s := range steps {
			s.before()
			if diff := cmp.Diff(s.want, parseEvents(t, string(<-sent))); diff != "" {
				t.Errorf("%s:\n%s", s.name, diff)
			}
		}
	})
}

// TestAChangeTellsAllThatCanChange: a field that is new in a status is not to be
// forgotten here.
func TestAChangeTellsAllThatCanChange(t *testing.T) {
	tells := make(map[string]bool)
	for f := range reflect.TypeFor[change]().Fields() {
		tells[f.Tag.Get("json")] = true
	}
	for _, asWhole := range []string{"dataplane", "listeners"} {
		tells[asWhole] = true
	}
	for f := range reflect.TypeFor[control.Status]().Fields() {
		if name := f.Tag.Get("json"); !tells[name] {
			t.Errorf("an event of a change does not tell %s", name)
		}
	}
}

// withFailed is what a growing source comes to after some seconds, when its second
// target has failed.
func withFailed(seconds int) *control.Status {
	status := growing(10, "10.0.1.11", "10.0.1.12").make(epoch.Add(time.Duration(seconds) * time.Second))
	t := &status.TargetGroups[0].Targets[1]
	t.State, t.Reason = balancer.Unhealthy, balancer.ReasonTimeout
	return status
}

func TestEachFieldOfATargetIsItsStandingOrCounted(t *testing.T) {
	held := control.Held{Times: 1}
	base := targetAt("10.0.1.11", 100)
	base.Held = &held
	for _, tt := range []struct {
		name   string
		change func(*control.Target)
		same   bool
	}{
		{"nothing", func(*control.Target) {}, true},
		{"counted", func(t *control.Target) { t.ActiveFlows, t.NewFlowsTotal, t.BytesTotal = count(1), nil, count(3) }, true},
		{"another hold alike", func(t *control.Target) { h := held; t.Held = &h }, true},
		{"another hold", func(t *control.Target) { t.Held = &control.Held{Times: 2} }, false},
		{"no hold", func(t *control.Target) { t.Held = nil }, false},
		{"state", func(t *control.Target) { t.State = balancer.Draining }, false},
		{"weight", func(t *control.Target) { t.EffectiveWeight = 0 }, false},
		{"until", func(t *control.Target) { t.Until = epoch }, false},
		{"description", func(t *control.Target) { t.Description = "connection refused" }, false},
	} {
		other := base
		tt.change(&other)
		if got := sameTarget(base, other); got != tt.same {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.same)
		}
	}
}

func TestStreamsAreBounded(t *testing.T) {
	s := newStreams(newRecorder(growing(1)))
	for range maxStreams {
		s.places <- struct{}{}
	}
	ask := func() *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		s.ServeHTTP(w, httptest.NewRequest(http.MethodHead, "/api/v1/stream", nil))
		return w
	}
	w := ask()
	if w.Code != http.StatusServiceUnavailable || w.Header().Get("Retry-After") != "10" {
		t.Errorf("one too many is answered with %d, Retry-After %q", w.Code, w.Header().Get("Retry-After"))
	}
	if diff := cmp.Diff("{\"error\":\"32 watch already, which is as many as may\"}\n", w.Body.String()); diff != "" {
		t.Error(diff)
	}
	<-s.places
	for range 2 { // each gives its place back
		if w := ask(); w.Code != http.StatusOK {
			t.Errorf("with a free place: %d %s", w.Code, w.Body)
		}
	}
}

func TestStreamEndsWithAWatcherWhoIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sent := 0
		newStreams(newRecorder(growing(1))).run(t.Context(), func([]byte) error {
			if sent++; sent == 3 {
				return http.ErrHandlerTimeout
			}
			return nil
		})
		if took := time.Since(epoch); sent != 3 || took != 2*usualStep {
			t.Errorf("it ended after %d events and %v, want 3 and %v", sent, took, 2*usualStep)
		}
	})
}

// A line is a listener of one connection, which is there already.
type line struct {
	conns  chan net.Conn
	closed chan struct{}
}

func (l line) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l line) Close() error   { close(l.closed); return nil }
func (l line) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 9469} }

func TestStreamOutlivesTheServersLimitsAndLeavesWhoDoesNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		watcher, conn := net.Pipe()
		l := line{make(chan net.Conn, 1), make(chan struct{})}
		l.conns <- conn
		s := newStreams(newRecorder(growing(1, "10.0.1.11")))
		server := &http.Server{Handler: s, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second}
		served := make(chan error)
		go func() { served <- server.Serve(l) }()

		if _, err := io.WriteString(watcher, "GET /api/v1/stream HTTP/1.1\r\nHost: localhost\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		response, err := http.ReadResponse(bufio.NewReader(watcher), nil)
		if err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(response.Body)
		for events := 0; events < 60; {
			if !lines.Scan() {
				t.Fatalf("the stream ended after %d events and %v: %v", events, time.Since(epoch), lines.Err())
			}
			if lines.Text() == "" {
				events++
			}
		}

		bubble.Pass(usualStep + takenWithin) // without reading
		if n := len(s.places); n != 0 {
			t.Errorf("%d streams go on for somebody who does not read", n)
		}
		if err := errors.Join(watcher.Close(), server.Close()); err != nil {
			t.Error(err)
		}
		if err := <-served; err != http.ErrServerClosed {
			t.Error(err)
		}
	})
}
