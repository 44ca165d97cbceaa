package nft

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/balancer/events"
)

// A Dataplane is the balancer.Part that keeps table inet nlb.
//
// It reads the table once and then trusts that reading for as long as the
// kernel confirms it: the ruleset's generation counts transactions, a plan is
// committed only at the generation it was made for, and transactions of others
// are followed. So a change of one target among thousands does not read
// everything again, strangers who change their own tables all the time are in
// nobody's way, and nothing is ever taken from memory unverified.
type Dataplane struct {
	log *zap.Logger
	dir string // the state folder, "" if there is none

	mu   sync.Mutex // guards all below
	sock *socket
	// others hears of other people's transactions.
	others *socket
	// have is the table at generation; known says whether it is.
	have       *Ruleset
	generation uint32
	known      bool
	// meddled says that somebody else touched the table, or may have, since
	// Watch last told of it; touched, that the transaction whose messages are
	// being read did.
	meddled, touched bool
	numbers          *numbers // of the targets that are installed, or were
	saved            uint16   // numbers.last as its file has it, 0 if it has none
	renderer         renderer
}

// New opens the dataplane. It fails where nf_tables is not to be had. dir is the
// state folder, which keeps the number that was given last, so that the flows of
// a target that is gone are not taken for another's after a restart or when the
// table was removed. With "" nothing is kept, and the highest number installed
// counts.
func New(log *zap.Logger, dir string) (*Dataplane, error) {
	s, err := dial()
	if err != nil {
		return nil, err
	}
	if _, err := s.generation(); err != nil {
		return nil, errors.Join(missingFeature(err), s.close())
	}
	others, err := follow(s.port)
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	d := &Dataplane{log: log, dir: dir, sock: s, others: others, numbers: newNumbers()}
	if d.saved, err = readLast(dir); err != nil {
		log.Warn("the last target number is unknown: the highest one installed counts", events.StateCannotBeRead.Field(), zap.Error(err))
	}
	d.numbers.last = d.saved
	return d, nil
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
	return errors.Join(d.sock.close(), d.others.close())
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
	p := &Plan{have: d.have}
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
	const attempts = 20
	for range attempts {
		if err := d.catchUp(); err != nil {
			return err
		}
		now, err := d.sock.generation()
		if err != nil {
			return err
		}
		switch {
		case d.known && now == d.generation:
			return d.lostDevices()
		case d.known && d.others.wait(newsDelay):
			// The number of a transaction is there before the news of it.
		default:
			// Whoever touches the table while it is being read is heard of
			// afterwards, under a later number.
			have, err := d.sock.dump()
			if err != nil {
				return err
			}
			d.numbers = d.numbers.adopt(have)
			d.have, d.generation, d.known = have, now, true
		}
	}
	return fmt.Errorf("table inet %s changed %d times while it was read", TableName, attempts)
}

// newsDelay bounds the wait for the news of a transaction that was counted.
const newsDelay = 100 * time.Millisecond

// Apply implements balancer.Part: one transaction, all or nothing.
func (d *Dataplane) Apply(_ context.Context, plan balancer.Plan) error {
	p := plan.(*Plan)
	if p.Empty() {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	b := newBatch()
	b.buf = slices.Grow(b.buf, p.elems()*slotBytes)
	for i, s := range p.steps {
		s.encode(b, i)
	}
	b.finish()
	const attempts = 100
	for range attempts {
		if err := d.refresh(); err != nil {
			return err
		}
		if d.have != p.have {
			break
		}
		err := d.commit(b)
		if err == nil {
			d.have = p.want
			if p.numbers != nil {
				d.numbers = p.numbers
			}
			return nil
		}
		var refused *stepError
		if !errors.As(err, &refused) || refused.err != unix.ERESTART {
			d.known = false
			return explain(err, p)
		}
	}
	return fmt.Errorf("the table changed since the plan was made: %w", balancer.ErrOvertaken)
}

// Keep implements balancer.Keeper: it writes the number that was given last. A crash
// before that loses nothing as long as the target is installed, since a start finds
// the numbers of those in the table.
func (d *Dataplane) Keep() error {
	d.mu.Lock()
	last, saved := d.numbers.last, d.saved
	d.mu.Unlock()
	if d.dir == "" || last == saved {
		return nil
	}
	if err := writeLast(d.dir, last); err != nil {
		return fmt.Errorf("the last target number: %w", err)
	}
	d.mu.Lock()
	d.saved = last
	d.mu.Unlock()
	return nil
}

// quietBytes is how long a transaction may be that we listen during. For each
// element of it the kernel prepares a notification of a page for listeners, all
// of which exist at the end of the commit: 4 GiB for a million.
const quietBytes = 64 << 10

// commit sends the transaction, to be carried out if the ruleset is still at
// d.generation, and moves that on.
func (d *Dataplane) commit(b *batch) error {
	b.fit(d.generation)
	then := nextGeneration(d.generation)
	if len(b.buf) < quietBytes {
		if err := d.sock.commit(b); err != nil {
			return err
		}
		d.generation = then
		return nil
	}
	if err := d.others.leave(); err != nil {
		return err
	}
	err := d.sock.commit(b)
	err = errors.Join(err, d.others.join())
	if err == nil {
		d.generation = then
	}
	if now, unknown := d.sock.generation(); unknown != nil || now != d.generation {
		d.known, d.meddled = false, true // somebody may have come by unheard
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
		return " (a kernel part may be missing: modprobe nft_chain_nat nft_ct nft_hash nft_socket)"
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

// Number is the inverse of TargetOf: the mark of a target's flows under
// TargetMask. ok is false if the target is not installed.
func (d *Dataplane) Number(k balancer.TargetKey) (m Mark, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	num, ok := d.numbers.byKey[k]
	return Mark(markOf(num, 0)), ok
}

// Numbers are those of the targets in force: in the marks of their flows and in the
// names of their chains. Targets that are relayed have one, too, and no chain.
func (d *Dataplane) Numbers() map[balancer.TargetKey]uint16 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return maps.Clone(d.numbers.byKey)
}

// Know takes over numbers that the Dataplane of another process gave, which works on the
// same table and state folder: what it plans is then what that one would. The table
// tells only those that have chains. It comes before the first Plan.
func (d *Dataplane) Know(given map[balancer.TargetKey]uint16) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.numbers = d.numbers.clone()
	for k, num := range given {
		d.numbers.set(k, num)
	}
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
	var e Events
	begin := func() { e = Events{NewFlows: map[balancer.TargetKey]uint64{}, Totals: map[string]uint64{}} }
	flows := make(map[string]balancer.TargetKey, len(d.numbers.byKey))
	for k, num := range d.numbers.byKey {
		flows[targetChainName(num, k.Group)] = k
	}
	err := d.sock.listObjects(begin, func(name string, typ uint32, data []byte) {
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
