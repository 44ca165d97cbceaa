package nft

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"nlb/balancer"
)

// A Dataplane is the balancer.Part that keeps table inet nlb.
//
// It reads the table once and then trusts that reading for as long as the
// kernel confirms it: the ruleset's generation counts transactions, a plan is
// committed only at the generation it was made for, and transactions of others
// are listened to. So a change of one target among thousands does not read
// everything again, and nothing is ever taken from memory unverified.
type Dataplane struct {
	log *zap.Logger

	mu   sync.Mutex // guards all below
	sock *socket
	// have is the table at generation; known says whether it is.
	have       *Ruleset
	generation uint32
	known      bool
	numbers    *numbers // of the targets that are installed, or were
	renderer   renderer
	// listener hears of other people's transactions; nil outside Watch.
	listener *listener
}

// New opens the dataplane. It fails where nf_tables is not to be had.
func New(log *zap.Logger) (*Dataplane, error) {
	s, err := dial()
	if err != nil {
		return nil, err
	}
	if _, err := s.generation(); err != nil {
		s.close()
		return nil, missingFeature(err)
	}
	return &Dataplane{log: log, sock: s, numbers: newNumbers()}, nil
}

func missingFeature(err error) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("nftables: %w (needs CAP_NET_ADMIN: run as root)", err)
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("nftables: this kernel has no nf_tables: %w (modprobe nf_tables)", err)
	}
	return fmt.Errorf("nftables: %w", err)
}

// Close closes the dataplane and leaves the kernel as it is.
func (d *Dataplane) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.sock.close()
}

// Name implements balancer.Part.
func (d *Dataplane) Name() string { return "nftables" }

// Plan implements balancer.Part.
func (d *Dataplane) Plan(_ context.Context, want *balancer.Desired) (balancer.Plan, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.refresh(); err != nil {
		return nil, err
	}
	p := &Plan{generation: d.generation}
	if want != nil {
		n, err := d.numbers.assign(tableKeys(want.Table))
		if err != nil {
			return nil, err
		}
		p.numbers, p.want = n, d.renderer.render(want.Table, n)
	}
	p.steps = diff(d.have, p.want)
	return p, nil
}

// refresh makes d.have what is installed now.
func (d *Dataplane) refresh() error {
	if d.known {
		now, err := d.sock.generation()
		if err != nil {
			return err
		}
		if now == d.generation {
			return nil
		}
	}
	d.known = false
	have, gen, err := d.sock.observe()
	if err != nil {
		return err
	}
	d.numbers = d.numbers.adopt(have)
	d.have, d.generation, d.known = have, gen, true
	return nil
}

// Apply implements balancer.Part: one transaction, all or nothing.
func (d *Dataplane) Apply(_ context.Context, plan balancer.Plan) error {
	p := plan.(*Plan)
	if p.Empty() {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	b := newBatch(p.generation)
	for i, s := range p.steps {
		s.encode(b, i)
	}
	d.known = false
	then := nextGeneration(p.generation)
	if err := d.commit(b, then); err != nil {
		return explain(err, p)
	}
	// The commit was the one transaction since the plan was made. Whatever
	// comes after it has a later number, and refresh will notice.
	d.have, d.generation, d.known = p.want, then, true
	if p.numbers != nil {
		d.numbers = p.numbers
	}
	return nil
}

// quietBytes is how long a transaction may be that listeners may hear of. For
// each element of it the kernel prepares a notification of a page, all of which
// exist at the end of the commit: 4 GiB for a million.
const quietBytes = 64 << 10

// commit sends the transaction, behind the listener's back if it is a long one.
// What the listener misses meanwhile shows in the generation.
func (d *Dataplane) commit(b *batch, then uint32) error {
	if d.listener == nil || len(b.buf) < quietBytes {
		return d.sock.commit(b)
	}
	if err := d.listener.leave(); err != nil {
		return err
	}
	err := d.sock.commit(b)
	err = errors.Join(err, d.listener.join())
	if now, unknown := d.sock.generation(); unknown != nil || now != then {
		d.listener.changed()
	}
	return err
}

// nextGeneration counts as the kernel does: zero is left out.
func nextGeneration(g uint32) uint32 {
	if g++; g == 0 {
		g = 1
	}
	return g
}

func explain(err error, p *Plan) error {
	var refused *stepError
	if !errors.As(err, &refused) {
		return err
	}
	if refused.err == unix.ERESTART {
		return fmt.Errorf("the ruleset changed since the plan was made: %w", balancer.ErrOvertaken)
	}
	if refused.step < 0 {
		return fmt.Errorf("commit of %d steps: %w", len(p.steps), err)
	}
	return fmt.Errorf("%s: %w%s", clip(p.steps[refused.step].text(), 200), err, remedy(refused.err))
}

func remedy(e unix.Errno) string {
	switch e {
	case unix.EPERM:
		return " (needs CAP_NET_ADMIN: run as root)"
	case unix.ENOENT, unix.EOPNOTSUPP:
		return " (a kernel part may be missing: modprobe nft_chain_nat nft_ct nft_hash)"
	case unix.ENOMEM, unix.ENOBUFS:
		return " (out of kernel memory)"
	}
	return ""
}

func clip(s string, n int) string {
	s = strings.ReplaceAll(s, "\n", " ")
	if len(s) > n {
		return s[:n] + " …"
	}
	return s
}

// TargetOf names the target that a flow's conntrack mark stands for.
func (d *Dataplane) TargetOf(m Mark) (balancer.TargetKey, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	k, ok := d.numbers.byNum[m.Target()]
	return k, ok
}

// Events has what happened to new flows since the table was made.
type Events struct {
	NewFlows map[balancer.TargetKey]uint64
	// Drops and other totals, by the counter's name.
	Totals map[string]uint64
}

// Events reads the table's counters.
func (d *Dataplane) Events(context.Context) (Events, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	e := Events{NewFlows: map[balancer.TargetKey]uint64{}, Totals: map[string]uint64{}}
	flows := make(map[string]balancer.TargetKey, len(d.numbers.byKey))
	for k, num := range d.numbers.byKey {
		flows[targetChainName(num, k.Group)] = k
	}
	err := d.sock.eachObject(func(name string, typ uint32, data []byte) {
		if typ != objectCounter {
			return
		}
		packets := be64(find(data, unix.NFTA_COUNTER_PACKETS))
		if k, ok := flows[name]; ok {
			e.NewFlows[k] = packets
		} else {
			e.Totals[name] = packets
		}
	})
	if errors.Is(err, unix.ENOENT) {
		err = nil // no table yet
	}
	return e, err
}
