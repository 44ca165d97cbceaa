package ready

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"nlb/balancer"
)

func TestChecks(t *testing.T) {
	refused := errors.New("apply nft: device or resource busy")
	for _, c := range []struct {
		name  string
		check func(now time.Time) Check
		want  string
	}{
		{"a loop that turns", func(now time.Time) Check {
			return Loop(func() time.Time { return now.Add(-AliveWithin) }, AliveWithin)
		}, ""},
		{"a loop that hangs", func(now time.Time) Check {
			return Loop(func() time.Time { return now.Add(-AliveWithin - time.Second) }, AliveWithin)
		}, "loop: the reconciler's loop has not turned for 1m1s"},
		{"probes in time", func(time.Time) Check {
			return Probes("probes", func() time.Duration { return ProbedWithin }, ProbedWithin)
		}, ""},
		{"late probes", func(time.Time) Check {
			return Probes("probes", func() time.Duration { return ProbedWithin + time.Second }, ProbedWithin)
		}, "probes: the result of a probe is overdue for 11s"},
		{"before the first pass", kernel(nil), "kernel: nobody has looked at the kernel yet"},
		{"a kernel that refuses from the start", kernel(func(time.Time) balancer.Snapshot {
			return balancer.Snapshot{Err: refused}
		}), "kernel: the kernel does not hold the configuration yet: apply nft: device or resource busy"},
		{"a kernel that refuses", kernel(func(now time.Time) balancer.Snapshot {
			return balancer.Snapshot{Err: refused, Converged: now}
		}), "kernel: the kernel does not hold the configuration: apply nft: device or resource busy"},
		{"a kernel that is as it should be", kernel(func(now time.Time) balancer.Snapshot {
			return balancer.Snapshot{Held: true, Converged: now.Add(-FreshWithin)}
		}), ""},
		{"a kernel that nobody looked at for long", kernel(func(now time.Time) balancer.Snapshot {
			return balancer.Snapshot{Held: true, Converged: now.Add(-FreshWithin - time.Second)}
		}), "kernel: the kernel was last seen to hold the configuration 31s ago"},
		{"routes of a moment ago", kernel(func(now time.Time) balancer.Snapshot {
			return balancer.Snapshot{Held: true, Err: refused, Converged: now.Add(-time.Second)}
		}), ""},
		{"routes of long ago", kernel(func(now time.Time) balancer.Snapshot {
			return balancer.Snapshot{Held: true, Err: refused, Converged: now.Add(-time.Minute)}
		}), "kernel: the kernel was last seen to hold the configuration 1m0s ago: apply nft: device or resource busy"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				got := ""
				if err := (Checks{c.check(time.Now())}).Err(); err != nil {
					got = err.Error()
				}
				if got != c.want {
					t.Errorf("got %q, want %q", got, c.want)
				}
			})
		})
	}
}

// kernel makes a Kernel check that sees a snapshot, none if at is nil.
func kernel(at func(now time.Time) balancer.Snapshot) func(time.Time) Check {
	return func(now time.Time) Check {
		return Kernel(func() *balancer.Snapshot {
			if at == nil {
				return nil
			}
			s := at(now)
			return &s
		}, FreshWithin)
	}
}

func TestHandler(t *testing.T) {
	well := func(name string) Check { return Check{name, func() error { return nil }} }
	ill := Check{"kernel", func() error { return errors.Join(errors.New("two"), errors.New("lines")) }}
	stuck := Check{"loop", func() error { return errors.New("stuck") }}
	type answer struct {
		Code       int
		Type, Body string
	}
	const words, object = "text/plain; charset=utf-8", "application/json"
	for _, c := range []struct {
		name        string
		alive, does Checks
		path        string
		want        answer
	}{
		{"alive", Checks{well("loop")}, Checks{ill}, "/livez", answer{200, words, "alive\n"}},
		{"dead", Checks{stuck}, Checks{well("kernel")}, "/livez", answer{503, words, "not alive\nloop: stuck\n"}},
		{"ready", Checks{well("loop")}, Checks{well("kernel")}, "/readyz", answer{200, words, "ready\n"}},
		{"who is dead is not ready", Checks{stuck}, Checks{well("kernel")}, "/readyz", answer{503, words, "not ready\nloop: stuck\n"}},
		{"all that fails", Checks{stuck}, Checks{ill}, "/readyz", answer{503, words, "not ready\nloop: stuck\nkernel: two; lines\n"}},
		{"each check", Checks{well("loop")}, Checks{ill}, "/readyz?verbose", answer{503, object,
			`{"ok":false,"checks":[{"name":"loop","ok":true,"error":""},{"name":"kernel","ok":false,"error":"two\nlines"}]}` + "\n"}},
		{"each check of the living", Checks{well("loop")}, Checks{ill}, "/livez?verbose", answer{200, object,
			`{"ok":true,"checks":[{"name":"loop","ok":true,"error":""}]}` + "\n"}},
	} {
		w := httptest.NewRecorder()
		Handler(c.alive, c.does).ServeHTTP(w, httptest.NewRequest(http.MethodGet, c.path, nil))
		got := answer{w.Code, w.Header().Get("Content-Type"), w.Body.String()}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
		if w.Header().Get("Cache-Control") != "no-store" {
			t.Errorf("%s may be cached", c.name)
		}
	}
	w := httptest.NewRecorder()
	Handler(nil, nil).ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/readyz", nil))
	if w.Code != http.StatusMethodNotAllowed {
		t.Errorf("POST: %d", w.Code)
	}
}
