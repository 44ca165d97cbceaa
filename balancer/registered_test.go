package balancer

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"nlb/internal/bubble"
)

// minuteSpec is webSpec with a delay of a minute, after which flows are cut.
func minuteSpec(targets int) *Spec {
	spec := webSpec(targets)
	spec.TargetGroups[0].DeregistrationDelay = DeregistrationDelay{Timeout: time.Minute, ConnectionTermination: true}
	return spec
}

// richSpec has what Registered leaves out or brings in order.
func richSpec() *Spec {
	spec := minuteSpec(2)
	web := &spec.TargetGroups[0]
	web.Targets[0].Colocated = prefixes("10.244.1.0/24")
	web.Targets[0].Weight = 256
	web.Targets[1].ClientIP = ProxyProtocolV2
	web.Targets = append(web.Targets, Target{Address: addr("2001:db8::11"), Port: 8080})
	slices.Reverse(web.Targets)
	spec.TargetGroups = append(spec.TargetGroups,
		TargetGroup{Name: "unused", Protocol: TCP, ClientIP: SNAT, Targets: []Target{target("10.0.1.99")}},
		TargetGroup{Name: "dns", Protocol: TCPUDP, ClientIP: Preserve})
	spec.Listeners[0].Forward = append(spec.Listeners[0].Forward, WeightedGroup{TargetGroup: "dns"})
	return spec
}

const richContent = `[
 {
  "name": "dns",
  "protocol": "TCP_UDP",
  "client_ip": "preserve",
  "deregistration_delay": {
   "timeout": "0s",
   "connection_termination": false
  },
  "targets": []
 },
 {
  "name": "web",
  "protocol": "TCP",
  "client_ip": "hairpin_snat",
  "deregistration_delay": {
   "timeout": "1m0s",
   "connection_termination": true
  },
  "targets": [
   {
    "address": "10.0.1.11",
    "port": 8080,
    "weight": 256
   },
   {
    "address": "10.0.1.12",
    "port": 8080,
    "weight": 1,
    "client_ip": "proxy_protocol_v2"
   },
   {
    "address": "2001:db8::11",
    "port": 8080,
    "weight": 0
   }
  ]
 }
]
`

func TestRegisteredIsKept(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made")
	if got, err := LoadRegistered(dir); got != nil || err != nil {
		t.Fatalf("without a file: %v, %v", got, err)
	}
	if err := ForgetRegistered(dir); err != nil {
		t.Errorf("without a file: %v", err)
	}
	spec := richSpec()
	if err := SaveRegistered(dir, spec); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(filepath.Join(dir, registeredFile))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(richContent, string(content)); diff != "" {
		t.Error(diff)
	}
	got, err := LoadRegistered(dir)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Registered(spec), got, compareKeys); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(got, Registered(got), compareKeys); diff != "" {
		t.Errorf("reduced twice: %s", diff)
	}
	now := time.Now()
	if diff := cmp.Diff(Drains{}.Follow(spec, &Spec{}, now), Drains{}.Follow(got, &Spec{}, now),
		compareKeys, cmp.FilterPath(func(p cmp.Path) bool { return p.Last().String() == ".Colocated" }, cmp.Ignore())); diff != "" {
		t.Errorf("what drains (-of a reload +of a restart): %s", diff)
	}
	if err := ForgetRegistered(dir); err != nil {
		t.Error(err)
	}
	if got, err := LoadRegistered(dir); got != nil || err != nil {
		t.Errorf("forgotten: %v, %v", got, err)
	}
	if err := os.WriteFile(filepath.Join(dir, registeredFile), content[:len(content)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := LoadRegistered(dir); got != nil || err == nil || !strings.Contains(err.Error(), registeredFile) {
		t.Errorf("half a file: %v, %v", got, err)
	}
}

func TestDamagedRegistrations(t *testing.T) {
	const group = `"name":"web","protocol":"TCP","client_ip":"snat"`
	const delay = `"deregistration_delay":{"timeout":"1s"}`
	with := func(targets string) string { return "[{" + group + "," + delay + `,"targets":[` + targets + "]}]" }
	const one = `{"address":"10.0.1.11","port":80,"weight":1}`
	if _, err := DecodeRegistered([]byte(with(one))); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ content, says string }{
		{"", "unexpected end"},
		{"{}", "cannot unmarshal"},
		{with(one) + "x", "invalid character"},
		{`[{` + group + `}]`, "deregistration_delay"},
		{`[{` + group + `,"deregistration_delay":{"timeout":"-1s"}}]`, "deregistration_delay of -1s"},
		{`[{"protocol":"TCP","client_ip":"snat",` + delay + `}]`, "missing"},
		{`[{"name":"web","client_ip":"snat",` + delay + `}]`, "missing"},
		{`[{"name":"web","protocol":"TCP",` + delay + `}]`, "missing"},
		{`[{"name":"web","protocol":"SCTP","client_ip":"snat",` + delay + `}]`, "SCTP"},
		{`[{` + group + `,` + delay + `},{` + group + `,` + delay + `}]`, `target group "web": is there twice`},
		{with(`{"port":80}`), "no target"},
		{with(`{"address":"10.0.1.11"}`), "10.0.1.11:0 is no target"},
		{with(`{"address":"224.0.0.1","port":80}`), "no target"},
		{with(`{"address":"127.0.0.1","port":80}`), "no target"},
		{with(`{"address":"::ffff:10.0.1.11","port":80}`), "no target"},
		{with(`{"address":"2001:db8::1%eth0","port":80}`), "no target"},
		{with(`{"address":"10.0.1.11","port":80,"weight":257}`), "257 is no weight"},
		{with(`{"address":"10.0.1.11","port":80,"weight":-1}`), "-1 is no weight"},
		{with(one + "," + one), "10.0.1.11:80 is there twice"},
	} {
		if spec, err := DecodeRegistered([]byte(c.content)); spec != nil || err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %s", c.content, err, c.says)
		}
	}
}

func FuzzDecodeRegistered(f *testing.F) {
	f.Add([]byte(richContent))
	f.Add([]byte("null"))
	f.Fuzz(func(t *testing.T, content []byte) {
		spec, err := DecodeRegistered(content)
		if err != nil {
			return
		}
		text, err := EncodeRegistered(spec)
		if err != nil {
			t.Fatal(err)
		}
		again, err := DecodeRegistered(text)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(spec, again, compareKeys); diff != "" {
			t.Error(diff)
		}
	})
}

// A shelf is a state folder. It gets full by errors, and its disk can be stuck.
type shelf struct {
	mu         sync.Mutex
	drains     Drains        // mu
	registered *Spec         // mu
	writes     []string      // mu
	drainsErr  error         // mu
	targetsErr error         // mu
	stuck      chan struct{} // mu, nil: it is not; closed when it is not any more
}

// stick keeps all writes that begin from ending until release is called.
func (s *shelf) stick() (release func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	stuck := make(chan struct{})
	s.stuck = stuck
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.stuck = nil
		close(stuck)
	}
}

// reach waits for the disk.
func (s *shelf) reach() {
	s.mu.Lock()
	stuck := s.stuck
	s.mu.Unlock()
	if stuck != nil {
		<-stuck
	}
}

// fail makes writes of either kind fail, or not any more.
func (s *shelf) fail(drains, targets error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drainsErr, s.targetsErr = drains, targets
}

// kept is what has been written.
func (s *shelf) kept() (Drains, *Spec) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.drains, s.registered
}

// options are those of a daemon with that file and this state folder.
func (s *shelf) options(w *world, spec *Spec) Options {
	drains, registered := s.kept()
	return Options{
		Parts: w.parts(), Spec: spec, Drains: drains, Registered: registered,
		KeepDrains: func(d Drains) error {
			s.reach()
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.drainsErr != nil {
				return s.drainsErr
			}
			s.drains, s.writes = maps.Clone(d), append(s.writes, "drains")
			return nil
		},
		KeepRegistered: func(spec *Spec) error {
			s.reach()
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.targetsErr != nil {
				return s.targetsErr
			}
			s.registered, s.writes = spec, append(s.writes, "targets")
			return nil
		},
	}
}

// wrote tells what was written since it was last asked.
func (s *shelf) wrote() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer func() { s.writes = nil }()
	return strings.Join(s.writes, " ")
}

// draining is until when a target drains that has left, zero if it does not.
func draining(r *Reconciler, k TargetKey) time.Time {
	for _, g := range r.Snapshot().Groups {
		for _, t := range g.Targets {
			if t.key(g.Name) == k && t.Removed && t.State == Draining {
				return t.Until
			}
		}
	}
	return time.Time{}
}

func TestRegisteredIsWrittenWhenItChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, s := newWorld(), &shelf{}
		w.fault = func(step) error { return errors.New("device or resource busy") }
		r, stop := start(s.options(w, minuteSpec(2)))
		defer stop()
		bubble.Pass(time.Minute)
		if got := s.wrote(); got != "" {
			t.Errorf("before the kernel holds it: %s", got)
		}
		w.setFault(nil)
		<-r.Converged()
		synctest.Wait()
		if got := s.wrote(); got != "targets" {
			t.Errorf("first: %s", got)
		}
		colocated := minuteSpec(2)
		colocated.TargetGroups[0].Targets[0].Colocated = prefixes("10.244.1.0/24")
		for _, c := range []struct {
			name string
			spec *Spec
			want string
		}{
			{"nothing changes", minuteSpec(2), ""},
			{"what is not kept changes", colocated, ""},
			{"one leaves", minuteSpec(1), "drains targets"},
			{"one comes back", minuteSpec(2), "drains targets"},
			{"the delay changes", webSpec(2), "targets"},
		} {
			if err := r.SetSpec(t.Context(), c.spec); err != nil {
				t.Fatal(err)
			}
			bubble.Pass(DefaultResync)
			if got := s.wrote(); got != c.want {
				t.Errorf("%s: wrote %q, want %q", c.name, got, c.want)
			}
			_, registered := s.kept()
			if diff := cmp.Diff(Registered(c.spec), registered, compareKeys); diff != "" {
				t.Errorf("%s: %s", c.name, diff)
			}
		}
	})
}

func TestTargetsThatLeftUnseenDrain(t *testing.T) {
	gone := webKey("10.0.1.12")
	without := minuteSpec(1)
	elsewhere := minuteSpec(1)
	elsewhere.VIPs, elsewhere.Listeners, elsewhere.TargetGroups = nil, nil, nil
	unlinked := minuteSpec(1)
	unlinked.Listeners = nil
	hour := minuteSpec(1)
	hour.TargetGroups[0].DeregistrationDelay.Timeout = time.Hour
	for _, c := range []struct {
		name  string
		spec  *Spec
		delay time.Duration
	}{
		{"the target", without, time.Minute},
		{"under the delay of now", hour, time.Hour},
		{"its group and listener too", elsewhere, time.Minute},
		{"its listener too", unlinked, time.Minute},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w, s := newWorld(), &shelf{}
				_, stop := start(s.options(w, minuteSpec(2)))
				synctest.Wait()
				stop()
				bubble.Pass(2 * time.Hour) // as long as it is down, nothing ends
				s.wrote()
				began := time.Now()
				r, stop := start(s.options(w, c.spec))
				synctest.Wait()
				if got, want := draining(r, gone), began.Add(c.delay); !got.Equal(want) {
					t.Errorf("drains until %v, want %v", got, want)
				}
				if got := s.wrote(); got != "drains targets" {
					t.Errorf("wrote %q", got)
				}
				// The deadline outlives another restart, and is kept.
				stop()
				bubble.Pass(time.Second)
				r, stop = start(s.options(w, c.spec))
				defer func() { stop() }()
				synctest.Wait()
				if got, want := draining(r, gone), began.Add(c.delay); !got.Equal(want) {
					t.Errorf("after another start: drains until %v, want %v", got, want)
				}
				bubble.Pass(time.Until(began.Add(c.delay)))
				if drains, _ := s.kept(); !drains[gone].Terminate || !drains[gone].Removed {
					t.Errorf("at the deadline: %+v", drains)
				}
				bubble.Pass(terminateFor)
				if drains, _ := s.kept(); len(drains) > 0 {
					t.Errorf("after it: %v", drains)
				}
				stop()
				s.wrote()
				r, stop = start(s.options(w, c.spec))
				synctest.Wait()
				if got := s.wrote(); got != "" || !draining(r, gone).IsZero() {
					t.Errorf("it drains again, wrote %q", got)
				}
			})
		})
	}
}

// TestCrashBeforeRegisteredIsWritten has daemons that die when the kernel holds
// a Spec and nobody has noted what is registered.
func TestCrashBeforeRegisteredIsWritten(t *testing.T) {
	gone, crash := webKey("10.0.1.12"), errors.New("crashed")
	begin := func(t *testing.T) (*world, *shelf, *Reconciler, func()) {
		w, s := newWorld(), &shelf{}
		r, stop := start(s.options(w, minuteSpec(2)))
		synctest.Wait()
		s.fail(nil, crash)
		return w, s, r, stop
	}
	t.Run("of a reload", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w, s, r, stop := begin(t)
			until := time.Now().Add(time.Minute)
			if err := r.SetSpec(t.Context(), minuteSpec(1)); err != nil {
				t.Fatal(err)
			}
			stop()
			s.fail(nil, nil)
			bubble.Pass(time.Second)
			r, stop = start(s.options(w, minuteSpec(1)))
			defer stop()
			synctest.Wait()
			if got := draining(r, gone); !got.Equal(until) {
				t.Errorf("drains until %v, want %v", got, until)
			}
			if _, registered := s.kept(); len(registered.TargetGroups[0].Targets) != 1 {
				t.Errorf("registered: %v", registered)
			}
		})
	})
	t.Run("of a start", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w, s, _, stop := begin(t)
			stop()
			until := time.Now().Add(time.Minute)
			_, stop = start(s.options(w, minuteSpec(1)))
			synctest.Wait()
			stop()
			s.fail(nil, nil)
			bubble.Pass(time.Second)
			r, stop := start(s.options(w, minuteSpec(1)))
			defer stop()
			synctest.Wait()
			if got := draining(r, gone); !got.Equal(until) {
				t.Errorf("drains until %v, want %v", got, until)
			}
		})
	})
	t.Run("of a reload that adds", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w, s, r, stop := begin(t)
			if err := r.SetSpec(t.Context(), minuteSpec(3)); err != nil {
				t.Fatal(err)
			}
			stop()
			s.fail(nil, nil)
			r, stop = start(s.options(w, minuteSpec(1)))
			defer stop()
			synctest.Wait()
			// The new one is not known to have been there: its flows are left alone.
			if drains, _ := s.kept(); len(drains) != 1 || draining(r, gone).IsZero() {
				t.Errorf("drains: %v", drains)
			}
		})
	})
	t.Run("of drains", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w, s, _, stop := begin(t)
			stop()
			s.fail(crash, nil)
			_, stop = start(s.options(w, minuteSpec(1)))
			synctest.Wait()
			stop()
			// As long as the drain is not written down, the registration must stay.
			if _, registered := s.kept(); len(registered.TargetGroups[0].Targets) != 2 {
				t.Errorf("registered: %v", registered)
			}
			s.fail(nil, nil)
			r, stop := start(s.options(w, minuteSpec(1)))
			defer stop()
			synctest.Wait()
			if got, want := draining(r, gone), time.Now().Add(time.Minute); !got.Equal(want) {
				t.Errorf("drains until %v, want %v", got, want)
			}
		})
	})
}

func TestFullDiskIsSaidOnceAndWrittenLater(t *testing.T) {
	core, logs := observer.New(zapcore.ErrorLevel)
	synctest.Test(t, func(t *testing.T) {
		s := &shelf{}
		s.fail(nil, errors.New("no space left on device"))
		o := s.options(newWorld(), minuteSpec(2))
		o.Log = zap.New(core)
		r, stop := start(o)
		defer stop()
		bubble.Pass(time.Minute)
		if err := r.Snapshot().Err; err != nil {
			t.Error(err) // the kernel is what it should be
		}
		s.fail(nil, nil)
		bubble.Pass(DefaultResync)
		if got := s.wrote(); got != "targets" {
			t.Errorf("wrote %q", got)
		}
	})
	if n := logs.Len(); n != 1 {
		t.Errorf("said %d times: %v", n, logs.All())
	}
}
