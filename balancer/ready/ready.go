// Package ready tells those who watch over a daemon whether it is alive and whether it
// does its work: monitoring, orchestrators, the anycast announcement of its VIPs, and
// systemd's watchdog.
//
//	GET /livez    the daemon's own parts move; if not, a restart is the cure
//	GET /readyz   and the kernel holds the configuration, by what probes say now;
//	              if not, a restart cures nothing, but traffic may be better off elsewhere
//
// The answer is 200 or 503, and a body of words: the checks that failed, one a line.
// With ?verbose it is a JSON object that has all checks by name.
package ready

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"nlb/balancer"
)

// Where the handler answers.
const (
	LivePath  = "/livez"
	ReadyPath = "/readyz"
)

const (
	// AliveWithin is how long a part of the daemon may stand still before it counts as
	// dead: six resyncs, each of which makes the loop turn. A pass over thousands of
	// targets on a busy host takes seconds.
	AliveWithin = 6 * balancer.DefaultResync
	// FreshWithin is how old the last sight of a kernel that is as it should be may be.
	FreshWithin = 3 * balancer.DefaultResync
	// ProbedWithin is how late the result of a probe may be.
	ProbedWithin = 10 * time.Second
)

// A Check is one thing that has to be so.
type Check struct {
	Name string
	// Fault says why it is not so, nil if it is. It is called by many goroutines at once.
	Fault func() error
}

// Checks are all to be passed.
type Checks []Check

// Err names the checks that fail, nil if none does.
func (c Checks) Err() error {
	var errs []error
	for _, one := range c {
		if err := one.Fault(); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", one.Name, err))
		}
	}
	return errors.Join(errs...)
}

// Loop fails when the Reconciler's loop has not turned for so long.
func Loop(turned func() time.Time, within time.Duration) Check {
	return Check{"loop", func() error {
		if still := time.Since(turned()); still > within {
			return fmt.Errorf("the reconciler's loop has not turned for %s", still.Round(time.Second))
		}
		return nil
	}}
}

// Probes fails when a probe of a health check should have been made, and be over, for
// so long; overdue says for how long that is.
func Probes(name string, overdue func() time.Duration, within time.Duration) Check {
	return Check{name, func() error {
		if late := overdue(); late > within {
			return fmt.Errorf("the result of a probe is overdue for %s", late.Round(time.Second))
		}
		return nil
	}}
}

// Kernel fails until the kernel was first seen to hold the configuration, while it does
// not, and when it was last seen to for longer than within.
func Kernel(snapshot func() *balancer.Snapshot, within time.Duration) Check {
	return Check{"kernel", func() error {
		s := snapshot()
		switch {
		case s == nil:
			return errors.New("nobody has looked at the kernel yet")
		case s.Converged.IsZero():
			return fmt.Errorf("the kernel does not hold the configuration yet: %w", s.Err)
		case !s.Held:
			return fmt.Errorf("the kernel does not hold the configuration: %w", s.Err)
		}
		old := time.Since(s.Converged)
		if old <= within {
			return nil
		}
		err := fmt.Errorf("the kernel was last seen to hold the configuration %s ago", old.Round(time.Second))
		if s.Err != nil {
			err = fmt.Errorf("%w: %w", err, s.Err)
		}
		return err
	}}
}

// Handler answers on LivePath by the checks of alive, on ReadyPath by those of both.
func Handler(alive, does Checks) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET "+LivePath, endpoint{"alive", alive})
	mux.Handle("GET "+ReadyPath, endpoint{"ready", append(alive[:len(alive):len(alive)], does...)})
	return mux
}

// An endpoint answers whether checks pass.
type endpoint struct {
	word   string // what that means
	checks Checks
}

// A report is the answer in JSON. Fields are added and never renamed or removed.
type report struct {
	OK     bool     `json:"ok"`
	Checks []result `json:"checks"`
}

type result struct {
	Name string `json:"name"`
	OK   bool   `json:"ok"`
	// Error is why it failed; empty if it did not.
	Error string `json:"error"`
}

// ServeHTTP implements http.Handler.
func (e endpoint) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	report := e.report()
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	code := http.StatusOK
	if !report.OK {
		code = http.StatusServiceUnavailable
	}
	// With an error the client is gone, and there is nobody to tell.
	if r.URL.Query().Has("verbose") {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(report)
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(code)
	_, _ = fmt.Fprint(w, e.words(report))
}

func (e endpoint) report() report {
	all := report{OK: true, Checks: []result{}}
	for _, c := range e.checks {
		one := result{Name: c.Name, OK: true}
		if err := c.Fault(); err != nil {
			one.OK, one.Error, all.OK = false, err.Error(), false
		}
		all.Checks = append(all.Checks, one)
	}
	return all
}

func (e endpoint) words(r report) string {
	if r.OK {
		return e.word + "\n"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "not %s\n", e.word)
	for _, c := range r.Checks {
		if !c.OK {
			fmt.Fprintf(&b, "%s: %s\n", c.Name, strings.ReplaceAll(c.Error, "\n", "; "))
		}
	}
	return b.String()
}
