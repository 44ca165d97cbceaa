package traps

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/bench/lab"
)

// A Scenario is one trap.
type Scenario struct {
	Name    string // as the command line has it
	Title   string // who calls whom, in one line
	Drawing string // of the network, up to 78 columns wide
	Naive   string // the set-up that somebody would try first
	Why     string // why it fails
	Cure    string // what nlb does instead

	build   func(lab.Options) (*lab.Topology, error)
	options lab.Options
	// showData has paths show data, too: where it is about who speaks first.
	showData bool
	// hideProbes leaves out of paths what lb exchanges with targets by itself.
	hideProbes bool
	// naive and cure make their set-up, call, and judge. Both run in the same
	// network, one after the other; what s.undo has is undone in between.
	naive, cure func(context.Context, *site) (Finding, error)
}

// All returns the scenarios, in the order in which they are best read.
func All() []Scenario {
	return []Scenario{
		hairpinSelf, hairpinSameNode, hairpinSameSubnet, hairpinAvoidSelf,
		rpFilterStrict, asymmetricReturn, externalSNAT,
		vipOnDummyRefused, vipExposesHost, healthCheckVIPSource,
		failOpen, emptyBackends, replyTupleMismatch, nodeToOwnVIP,
		proxyProtocolServerFirst, staleUDP,
	}
}

// A Finding is what became of one set-up.
type Finding struct {
	Works bool `json:"works"`
	// Evidence is what showed it: for a naive set-up the reason of its failure, ""
	// if that was not seen.
	Evidence string `json:"evidence"`
	// Path is the way of the packets.
	Path []Hop `json:"path"`
	// Stations are the nodes that were watched, as the set-up left them.
	Stations []Station `json:"-"`
}

// The verdicts of a Result.
const (
	Pass         = "pass"         // the naive set-up failed for its reason, and the cure works
	Broken       = "broken"       // one of these did not come out
	Unsupported  = "unsupported"  // the kernel lacks something: see Result.Missing
	Inapplicable = "inapplicable" // the dataplane has no such cure: see Result.Missing
)

// A Result is what became of a scenario.
type Result struct {
	Scenario string `json:"scenario"`
	// Dataplane is what nlb was run with.
	Dataplane balancer.Dataplane `json:"dataplane"`
	Supported bool               `json:"supported"`
	Naive     Finding            `json:"naive"`
	Cure      Finding            `json:"cure"`
	Verdict   string             `json:"verdict"`
	// Missing is what the kernel said it does not support, or why the dataplane has
	// no such cure, if Supported is false.
	Missing string `json:"missing,omitempty"`
	// Note is what the dataplane has to do with the cure, if that is not plain.
	Note string `json:"note,omitempty"`
	// Namespaces are those that were kept.
	Namespaces []string `json:"namespaces,omitempty"`
	Seconds    float64  `json:"seconds"`
}

// Options say how a scenario is run.
type Options struct {
	Program string // nlb, to be started with serve
	// Dataplane is nlb's. Probe says whether the kernel has it.
	Dataplane balancer.Dataplane
	// Keep leaves the namespaces, with the cured nlb running. RemoveKept removes
	// them, once this process has ended.
	Keep bool
	// Captures is a folder for the packets of each set-up and node, in pcap
	// format; "" for none. It has to exist.
	Captures string
	// Walks has Compare keep the packets' ways, for which it makes one call at a
	// time.
	Walks bool
	// WithoutCure leaves out what the scenario's cure is about: the check of the
	// check. The verdict has to be Broken then.
	WithoutCure bool
	// callTime is how long a compared call may take; 0: compareTime.
	callTime time.Duration
	// Progress is told what is being done; nil: nobody.
	Progress func(stage string)
}

// limit bounds a scenario, patience each wait for nlb in it, and answerTime each
// call that has to be answered. Nothing takes that long unless the machine is
// very busy.
const (
	limit      = 2 * time.Minute
	patience   = 40 * time.Second
	answerTime = 10 * time.Second
)

// Run runs a scenario. The error says that it could not be run; one that did not
// come out, or that the kernel does not support, has a Result that says so.
func Run(ctx context.Context, sc Scenario, o Options) (Result, error) {
	if reason := notByIPVS[sc.Name]; o.Dataplane == balancer.IPVS && reason != "" {
		return without(sc, o, Inapplicable, reason), nil
	}
	r, err := run(ctx, sc, o)
	if lacking(err) && !errors.Is(err, ErrLeft) {
		return without(sc, o, Unsupported, err.Error()), nil
	}
	return r, err
}

// without is the Result of a scenario that cannot be run.
func without(sc Scenario, o Options, verdict, missing string) Result {
	none := Finding{Path: []Hop{}}
	return Result{Scenario: sc.Name, Dataplane: o.Dataplane, Naive: none, Cure: none, Verdict: verdict, Missing: missing}
}

// lacking tells the errors of a kernel that was built without something: a kind
// of link, nf_tables, a family of sockets.
func lacking(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EAFNOSUPPORT)
}

func run(ctx context.Context, sc Scenario, o Options) (r Result, err error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	begun := time.Now()
	if o.Progress == nil {
		o.Progress = func(string) {}
	}
	o.Progress("building the network")
	s, err := newSite(sc, o)
	if err != nil {
		return r, fmt.Errorf("%s: %w", sc.Name, err)
	}
	defer func() {
		if o.Keep && err == nil {
			r.Namespaces = s.names()
			return
		}
		err = errors.Join(err, s.close())
	}()
	o.Progress("the naive set-up")
	naive, err := s.stage(ctx, "naive", sc.naive)
	if err != nil {
		return r, fmt.Errorf("%s: the naive set-up: %w", sc.Name, err)
	}
	o.Progress("nlb with the cure")
	cure, err := s.stage(ctx, "cure", sc.cure)
	if err != nil {
		return r, fmt.Errorf("%s: the cure: %w", sc.Name, err)
	}
	r = Result{
		Scenario: sc.Name, Dataplane: o.Dataplane, Supported: true, Naive: naive, Cure: cure, Verdict: Broken, Note: note(sc, o.Dataplane),
		Seconds: float64(time.Since(begun).Round(10*time.Millisecond)) / float64(time.Second),
	}
	if !naive.Works && naive.Evidence != "" && cure.Works {
		r.Verdict = Pass
	}
	return r, nil
}

// stage runs one set-up, reads its captures and takes back what it put up for
// itself.
func (s *site) stage(ctx context.Context, name string, run func(context.Context, *site) (Finding, error)) (Finding, error) {
	f, err := run(ctx, s)
	if err != nil {
		return f, err
	}
	if f.Path == nil {
		if f.Path, err = s.path(ctx); err != nil {
			return f, err
		}
	}
	if f.Stations, err = s.stations(); err != nil {
		return f, err
	}
	if s.options.Captures != "" {
		prefix := filepath.Join(s.options.Captures, s.scenario.Name+"-"+name)
		if err := s.save(ctx, prefix); err != nil {
			return f, err
		}
	}
	return f, errors.Join(s.unwatch(), s.revert())
}

// save writes the captures, a file for each node.
func (s *site) save(ctx context.Context, prefix string) error {
	for _, w := range s.watched {
		packets, err := w.capture.Packets(ctx, nil)
		if err != nil {
			return err
		}
		if err := os.WriteFile(prefix+"-"+w.node.Name+".pcap", pcap(packets), 0o644); err != nil {
			return err
		}
	}
	return nil
}
