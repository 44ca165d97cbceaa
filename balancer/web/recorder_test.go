package web

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"nlb/balancer/control"
	"nlb/internal/bubble"
)

// growing counts rate flows a second since the epoch at each of some targets.
func growing(rate uint64, addresses ...string) *script {
	return &script{make: func(now time.Time) *control.Status {
		n := rate * uint64(now.Sub(epoch)/time.Second)
		group := groupOf("web")
		for _, a := range addresses {
			group.Targets = append(group.Targets, targetAt(a, n))
		}
		return statusOf([]control.Listener{listenerOf("http", 80, "web")}, group)
	}}
}

func seenBy(t *testing.T, r *recorder) past {
	t.Helper()
	seen, err := r.seen(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return seen
}

// jsonOf is how a value reads in JSON, unindented.
func jsonOf(t *testing.T, v any) string {
	t.Helper()
	text, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestHistory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := growing(10, "10.0.1.11")
		r := newRecorder(source)
		seenBy(t, r)
		bubble.Pass(2 * time.Second)
		seenBy(t, r)
		bubble.Pass(8 * time.Second) // nobody looks
		source.change(func(s *script) {
			s.make = growing(10, "10.0.1.11", "10.0.1.12").make
		})
		const want = `{"step_seconds":2,"at":["2000-01-01T00:00:00Z","2000-01-01T00:00:02Z","2000-01-01T00:00:10Z"],` +
			`"listeners":[{"name":"http","active_flows":[0,2,20],"new_flows_per_second":[null,10,10],"bytes_per_second":[null,10000,10000]}],` +
			`"target_groups":[{"name":"web","active_flows":[0,2,20],"new_flows_per_second":[null,10,10],"bytes_per_second":[null,10000,10000],` +
			`"targets":[{"address":"10.0.1.11","port":8080,"active_flows":[0,2,10],"new_flows_per_second":[null,10,10],"bytes_per_second":[null,10000,10000]},` +
			`{"address":"10.0.1.12","port":8080,"active_flows":[null,null,10],"new_flows_per_second":[null,null,null],"bytes_per_second":[null,null,null]}]}]}`
		if diff := cmp.Diff(want, jsonOf(t, newHistory(seenBy(t, r), []string{"web"}))); diff != "" {
			t.Error(diff)
		}
	})
}

func TestHistoryIsAsDocumented(t *testing.T) {
	page, err := os.ReadFile("../../docs/status-page.md")
	if err != nil {
		t.Fatal(err)
	}
	_, example, found := strings.Cut(string(page), "```json by=TestHistoryIsAsDocumented\n")
	if !found {
		t.Fatal("the page has no such example")
	}
	example, _, _ = strings.Cut(example, "```")
	var want bytes.Buffer
	if err := json.Compact(&want, []byte(example)); err != nil {
		t.Fatal(err)
	}

	at := time.Date(2026, 1, 2, 15, 4, 5, 0, time.UTC)
	r := newRecorder(nil)
	for i, counts := range [][3]uint64{{40, 0, 0}, {41, 21, 25200}} {
		target := targetAt("10.0.1.11", 0)
		target.ActiveFlows, target.NewFlowsTotal, target.BytesTotal = &counts[0], &counts[1], &counts[2]
		status := statusOf([]control.Listener{listenerOf("http", 80, "web")}, groupOf("web", target))
		r.newest = r.record(status, at.Add(time.Duration(i)*r.step))
	}
	history := newHistory(past{r.step, r.newest.status, r.samples}, []string{"web"})
	if diff := cmp.Diff(want.String(), jsonOf(t, history)); diff != "" {
		t.Error(diff)
	}
}

func TestListenersThatShareAGroupAreNotToldApart(t *testing.T) {
	status := statusOf([]control.Listener{listenerOf("http", 80, "web"), listenerOf("https", 443, "web", "api"), listenerOf("dns", 53, "dns")},
		groupOf("web", targetAt("10.0.1.11", 100)), groupOf("api", targetAt("10.0.2.11", 200)), groupOf("dns", targetAt("10.0.3.11", 300)))
	f := newRecorder(nil).record(status, epoch)
	const want = `[[null,null,null],[null,null,null],[30,null,null]]`
	if diff := cmp.Diff(want, jsonOf(t, listenerPoints(status, f.sample))); diff != "" {
		t.Error(diff)
	}
}

func TestBetween(t *testing.T) {
	counted := func(active, flows, bytes *uint64) *control.Target {
		return &control.Target{ActiveFlows: active, NewFlowsTotal: flows, BytesTotal: bytes}
	}
	for _, tt := range []struct {
		name    string
		was, is *control.Target
		want    string
	}{
		{"rates", counted(count(1), count(10), count(100)), counted(count(3), count(15), count(1101)), "[3,2.5,500.5]"},
		{"at rest", counted(count(1), count(10), count(100)), counted(count(1), count(10), count(100)), "[1,0,0]"},
		{"new", nil, counted(count(3), count(15), count(1100)), "[3,null,null]"},
		{"nobody counts", counted(count(1), count(10), count(100)), counted(nil, nil, nil), "[null,null,null]"},
		{"somebody counts again", counted(nil, nil, nil), counted(count(1), count(10), count(100)), "[1,null,null]"},
		{"counted anew", counted(count(1), count(10), count(100)), counted(count(1), count(9), count(100)), "[1,null,0]"},
		{"large", counted(nil, count(0), count(0)), counted(count(16e6), count(1e9), count(25e12)), "[16000000,500000000,12500000047104]"},
	} {
		if got := jsonOf(t, between(tt.was, tt.is, 2)); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.name, got, tt.want)
		}
	}
}

func TestSamplesAreForgotten(t *testing.T) {
	t.Run("when they are old", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := newRecorder(growing(1, "10.0.1.11"))
			for range 200 {
				seenBy(t, r)
				bubble.Pass(usualStep)
			}
			if n := len(r.samples); n != int(window/usualStep) {
				t.Errorf("%d samples are kept, want %d", n, window/usualStep)
			}
			if want := len(r.samples) * pointSize; r.size != want+targetSize && r.size != want {
				t.Errorf("they are said to take %d bytes, want %d", r.size, want)
			}
			bubble.Pass(window)
			last := seenBy(t, r)
			if diff := cmp.Diff("[[70,null,null]]", jsonOf(t, last.samples[len(last.samples)-1].points)); diff != "" || len(last.samples) != 1 {
				t.Errorf("%d samples after a long time, the last:\n%s", len(last.samples), diff)
			}
		})
	})
	t.Run("when they are too many", func(t *testing.T) {
		r := newRecorder(nil)
		r.limit = 10 * 100 * (pointSize + targetSize)
		for i := range 50 {
			// Another target each time, so that no two have the same layout.
			status := crowd(1, 99, uint64(i))
			status.TargetGroups[0].Targets = append(status.TargetGroups[0].Targets, targetAt("10.9.9.9", 1))
			status.TargetGroups[0].Targets[99].Port = uint16(1 + i)
			r.newest = r.record(status, epoch.Add(time.Duration(i)*time.Second))
		}
		if len(r.samples) != 10 || r.size != r.limit {
			t.Errorf("%d samples of %d bytes are kept, want 10 of %d", len(r.samples), r.size, r.limit)
		}
	})
}

func TestOneAsksForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := growing(1, "10.0.1.11")
		r := newRecorder(source)
		for range 20 {
			if _, err := r.frame(t.Context()); err != nil {
				t.Fatal(err)
			}
			if _, err := r.status(t.Context()); err != nil {
				t.Fatal(err)
			}
			seenBy(t, r)
		}
		if n := source.times(); n != 1 {
			t.Errorf("the source was asked %d times in one moment", n)
		}
		bubble.Pass(fresh)
		if _, err := r.status(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := r.frame(t.Context()); err != nil {
			t.Fatal(err)
		}
		if n := source.times(); n != 2 {
			t.Errorf("the source was asked %d times after %v, want 2: once more for the status, and no sample is due", n, fresh)
		}
	})
}

func TestWaitingForATurnEnds(t *testing.T) {
	r := newRecorder(growing(1))
	r.turn <- struct{}{} // somebody else's
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for name, ask := range map[string]func() error{
		"status": func() error { _, err := r.status(ctx); return err },
		"frame":  func() error { _, err := r.frame(ctx); return err },
		"seen":   func() error { _, err := r.seen(ctx); return err },
	} {
		if err := ask(); err != context.Canceled {
			t.Errorf("%s: %v, want %v", name, err, context.Canceled)
		}
	}
}

// What a sample of 10,000 targets costs, without the source's part.
func BenchmarkRecord(b *testing.B) {
	r := newRecorder(nil)
	at := epoch
	statuses := []*control.Status{crowd(100, 100, 0), crowd(100, 100, 10)}
	b.ReportAllocs()
	for i := range b.N {
		r.newest = r.record(statuses[i%2], at)
		at = at.Add(usualStep)
	}
	b.ReportMetric(float64(r.size)/1e6, "MB-kept")
}

// What telling it takes, once for all streams.
func BenchmarkEvents(b *testing.B) {
	for name, event := range map[string]func(*frame) []byte{
		"whole":  func(f *frame) []byte { return f.whole() },
		"change": func(f *frame) []byte { return f.change() },
	} {
		b.Run(name, func(b *testing.B) {
			statuses := []*control.Status{crowd(100, 100, 0), crowd(100, 100, 10)}
			size := 0
			for i := range b.N {
				b.StopTimer()
				r := newRecorder(nil)
				r.newest = r.record(statuses[i%2], epoch)
				f := r.record(statuses[(i+1)%2], epoch.Add(usualStep))
				b.StartTimer()
				size = len(event(f))
			}
			b.ReportMetric(float64(size)/1e3, "kB-sent")
		})
	}
}
