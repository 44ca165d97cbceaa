package growth

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"nlb/bench/part"
	"nlb/bench/report"
)

// FirstPacket is the name of the one metric: ns of the core's work for each new
// UDP flow.
const FirstPacket = "first packet of a flow"

const unit = "ns"

// Part measures FirstPacket. Its sizes are cases.
var Part = part.Part{
	Name: "growth",
	Metrics: []part.Metric{{
		Key:    "first-packet",
		Metric: report.Metric{Name: FirstPacket, Unit: unit, Better: report.Less, Cases: caseNames()},
	}},
	Contestants: contestants,
	Goals:       goals(),
	Setups:      setups(),
	Rounds:      9, QuickRounds: 3,
	Estimate: estimate,
	Open:     open,
}

// goals are that one listener of a thousand costs what the only one costs, and not
// more than in the least that does the same.
func goals() (all []report.Goal) {
	for _, c := range part.Contestants {
		if c.Role == report.NLB && slices.Contains(contestants, c.Name) {
			row := func(size size) report.GoalRow { return report.GoalRow{Case: size.name, Contestant: c.Name} }
			all = append(all, report.Goal{Metric: FirstPacket, Row: row(sizes[2]), Of: row(sizes[0]), Limit: 1.05})
			least := part.MinimalDNAT
			if c.Job == part.HidesClient {
				least = part.MinimalSNAT
			}
			for _, size := range sizes {
				of := report.GoalRow{Case: size.name, Contestant: least}
				all = append(all, report.Goal{Metric: FirstPacket, Row: row(size), Of: of, Limit: 1.03})
			}
		}
	}
	return all
}

// A size is how large a configuration is.
type size struct {
	name               string
	listeners, targets int
}

// sizes grow in one direction at a time. The first of each direction is the same
// configuration, in the same network.
var sizes = []size{
	{"listeners=1", 1, few},
	{"listeners=100", 100, few},
	{"listeners=1000", 1000, few},
	{"targets=3", 1, few},
	{"targets=100", 1, 100},
	{"targets=1000", 1, 1000},
}

// few is how many targets there are where something else is many.
const few = 3

func caseNames() []string {
	names := make([]string, len(sizes))
	for i, s := range sizes {
		names[i] = s.name
	}
	return names
}

// A care is how much is done: for which sizes, and how long each contestant is
// measured with each in a round, with what is done before and after its turns.
type care struct {
	sizes []size
	share time.Duration
}

// careFor leaves the sizes in the middle out of a quick run: most of its time is
// that of making the networks.
func careFor(o *part.Options) care {
	if o.Quick {
		return care{[]size{sizes[0], sizes[2], sizes[3], sizes[5]}, 40 * time.Millisecond}
	}
	return care{sizes, 130 * time.Millisecond}
}

// wanted are the contestants that are asked for, in their order.
func wanted(o *part.Options) (names []string) {
	for _, c := range contestants {
		if o.Wants(FirstPacket, c) {
			names = append(names, c)
		}
	}
	return names
}

// siteTakes is about how long it takes to make and to remove a network, for the
// estimate: 30 ms for most, two seconds for an nlb with a thousand of something.
const siteTakes = 500 * time.Millisecond

func estimate(o part.Options) (round, around time.Duration) {
	c, n := careFor(&o), len(wanted(&o))
	return c.round(n), time.Duration(n*c.networks()) * siteTakes
}

// round is how long a round of so many contestants lasts.
func (c *care) round(contestants int) time.Duration {
	return time.Duration(contestants*len(c.sizes)) * c.share
}

// networks is how many a contestant has.
func (c *care) networks() int {
	type network struct{ listeners, targets int }
	distinct := make(map[network]bool)
	for _, s := range c.sizes {
		distinct[network{s.listeners, s.targets}] = true
	}
	return len(distinct)
}

// open makes the networks. It is an error if a program is missing or does not
// forward all that it should.
func open(ctx context.Context, o part.Options) (part.Runner, error) {
	r, err := openWith(ctx, &o, careFor(&o))
	if err != nil {
		return nil, err // and not a nil *runner that is no nil Runner
	}
	return r, nil
}

func openWith(ctx context.Context, o *part.Options, c care) (*runner, error) {
	r := &runner{care: c, out: newBurst()}
	if err := r.build(ctx, o); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

func (r *runner) build(ctx context.Context, o *part.Options) error {
	for _, name := range wanted(o) {
		for _, size := range r.sizes {
			if r.find(name, size) != nil {
				continue
			}
			s := &site{contestant: name, size: size}
			r.sites = append(r.sites, s)
			if err := s.build(ctx, o.Programs); err != nil {
				return fmt.Errorf("%s, %s: %w", name, size.name, err)
			}
		}
	}
	// The programs have begun side by side, which takes less time.
	for _, s := range r.sites {
		if err := s.await(ctx); err != nil {
			return fmt.Errorf("%s, %s: %w", s.contestant, s.name, err)
		}
	}
	return r.warmUp()
}
