package nft

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"nlb/balancer"
)

// flowtableName is the one flowtable of the table.
const flowtableName = "fast"

// Of linux/netfilter/nf_tables.h.
const (
	nftaFlowtableTable = 1
	nftaFlowtableName  = 2
	nftaFlowtableHook  = 3
	nftaFlowtableFlags = 7

	nftaFlowtableHookNum      = 1
	nftaFlowtableHookPriority = 2
	nftaFlowtableHookDevs     = 3
	nftaDeviceName            = 1

	// flowtableCounter has conntrack count offloaded packets too.
	flowtableCounter = 2

	netdevIngress = 0 // NF_NETDEV_INGRESS

	exprOffload       = "flow_offload"
	nftaFlowTableName = 1 // of this expression
)

// A Flowtable takes established flows past the hooks: what arrives at one of its
// devices and belongs to a flow in it is rewritten and sent on at once.
type Flowtable struct {
	Name     string
	Priority int32
	Flags    uint32
	Devices  []string // sorted
}

func (f *Flowtable) equal(o *Flowtable) bool {
	if f == nil || o == nil {
		return f == o
	}
	return f.Name == o.Name && f.Priority == o.Priority && f.Flags == o.Flags && slices.Equal(f.Devices, o.Devices)
}

// body is the flowtable's block in nft's language.
func (f *Flowtable) body() []string {
	lines := []string{
		fmt.Sprintf("hook ingress priority %d;", f.Priority),
		fmt.Sprintf("devices = { %s };", strings.Join(f.Devices, ", ")),
	}
	if f.Flags&flowtableCounter != 0 {
		lines = append(lines, "counter;")
	}
	return lines
}

// flowtableOf is the flowtable of a table that has one.
func flowtableOf(t *balancer.Table) *Flowtable {
	if len(t.FastPath) == 0 {
		return nil
	}
	return &Flowtable{Name: flowtableName, Flags: flowtableCounter, Devices: t.FastPath}
}

// offloadRule hands established flows of ours to the flowtable. They are assured
// by then: the handshake is over, or a UDP client has been answered and asked
// again, so that every packet for which there is a rule has met it.
// The kernel itself leaves out segments with FIN or RST, and flows that end.
//
// It comes before the count of how flows begin, which accepts the assured ones,
// and after the rules that end flows, so that a flow that is being ended is never
// taken in again.
func offloadRule() Rule {
	return rule(func(b *ruleBuilder) {
		b.ctState(ctEstablished, "established")
		b.ctStatus(ctAssured, "assured", unix.NFT_CMP_NEQ)
		b.ctMarkAny(TargetMask)
		b.flowAdd(flowtableName)
	})
}

// flowAdd takes the packet's flow into the flowtable.
func (b *ruleBuilder) flowAdd(name string) {
	b.expr(exprOffload, func(a *attrs) { a.str(nftaFlowTableName, name) })
	b.say("flow add @%s", name)
}

// ctOffload is IPS_OFFLOAD: the flow is in a flowtable.
const ctOffload = 1 << 14

// releasedRule drops the segments of flows that are being ended and that the
// former flowtable has not released yet. Packets do not pass that any more, but
// until it is destroyed, some milliseconds after the transaction, it has the
// flows, and when it releases them it takes the time that they have left from the
// state that they are in (flow_offload_fixup_ct): a flow that our reset had closed
// meanwhile would be forgotten before its other end is told. Whoever sent the
// segment sends it again.
func releasedRule() Rule {
	return rule(func(b *ruleBuilder) {
		b.l4proto(unix.IPPROTO_TCP)
		b.ctMarkInSet(TargetMask, setEnded)
		b.ctStatus(ctOffload, "offload", unix.NFT_CMP_NEQ)
		b.drop()
	})
}

// remade reports whether the flowtable has to be made anew, empty: its devices are
// others, or a target is now ended, whose flows must meet the rules again. The
// other flows come back with their next packet.
func remade(have, want *Ruleset) bool {
	if have.Flowtable == nil || want.Flowtable == nil {
		return false
	}
	if !have.Flowtable.equal(want.Flowtable) {
		return true
	}
	if ended := want.Sets[setEnded]; ended != nil {
		add, _ := elemChanges(have.Sets[setEnded], ended)
		return len(add) > 0
	}
	return false
}

// flowtableChanges are what comes before rules are added and after they are
// flushed: the flowtable goes while no rule names it.
func flowtableChanges(have, want *Ruleset) (del, add []step) {
	again := remade(have, want)
	if have.Flowtable != nil && (want.Flowtable == nil || again) {
		del = append(del, delFlowtable{have.Flowtable})
	}
	if want.Flowtable != nil && (have.Flowtable == nil || again) {
		add = append(add, addFlowtable{want.Flowtable})
	}
	return del, add
}

type addFlowtable struct{ f *Flowtable }

func (s addFlowtable) text() string {
	return says("add flowtable inet %s %s { %s }", TableName, s.f.Name, strings.Join(s.f.body(), " "))
}

func (s addFlowtable) encode(b *batch, i int) {
	b.message(i, unix.NFT_MSG_NEWFLOWTABLE, unix.NLM_F_CREATE, func(a *attrs) {
		a.str(nftaFlowtableTable, TableName)
		a.str(nftaFlowtableName, s.f.Name)
		a.nest(nftaFlowtableHook, func(a *attrs) {
			a.u32(nftaFlowtableHookNum, netdevIngress)
			a.u32(nftaFlowtableHookPriority, uint32(s.f.Priority))
			a.nest(nftaFlowtableHookDevs, func(a *attrs) {
				for _, d := range s.f.Devices {
					a.str(nftaDeviceName, d)
				}
			})
		})
		a.u32(nftaFlowtableFlags, s.f.Flags)
	})
}

type delFlowtable struct{ f *Flowtable }

func (s delFlowtable) text() string {
	return says("delete flowtable inet %s %s", TableName, s.f.Name)
}
func (s delFlowtable) encode(b *batch, i int) {
	b.message(i, unix.NFT_MSG_DELFLOWTABLE, 0, func(a *attrs) {
		a.str(nftaFlowtableTable, TableName)
		a.str(nftaFlowtableName, s.f.Name)
	})
}

func parseFlowtable(b []byte) *Flowtable {
	hook := find(b, nftaFlowtableHook)
	f := &Flowtable{
		Name:     text(find(b, nftaFlowtableName)),
		Priority: int32(be32(find(hook, nftaFlowtableHookPriority))),
		Flags:    be32(find(b, nftaFlowtableFlags)),
	}
	devices := find(hook, nftaFlowtableHookDevs)
	for a, rest, ok := next(devices); ok; a, rest, ok = next(rest) {
		f.Devices = append(f.Devices, text(a.data))
	}
	slices.Sort(f.Devices)
	return f
}

// dumpFlowtables reads ours; another one in our table is foreign.
func (s *socket) dumpFlowtables(rs *Ruleset) error {
	var foreign []string
	begin := func() { foreign, rs.Flowtable = nil, nil }
	err := s.list(unix.NFT_MSG_GETFLOWTABLE, func(a *attrs) { a.str(nftaFlowtableTable, TableName) }, begin, func(m message) {
		if !isOurs(m, nftaFlowtableTable) {
			return
		}
		if f := parseFlowtable(m.body); f.Name == flowtableName {
			rs.Flowtable = f
		} else {
			foreign = append(foreign, "flowtable "+f.Name)
		}
	})
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
		return nil // a kernel without flowtables has none of them
	}
	rs.Foreign = append(rs.Foreign, foreign...)
	return wrapDump("flowtables", err)
}

// lostDevices brings d.have up to date with the links that went: the kernel takes
// them out of the flowtable and counts no transaction for that.
func (d *Dataplane) lostDevices() error {
	if d.have == nil || d.have.Flowtable == nil {
		return nil
	}
	now := &Ruleset{}
	if err := d.sock.dumpFlowtables(now); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	if !now.Flowtable.equal(d.have.Flowtable) {
		have := *d.have
		have.Flowtable = now.Flowtable
		d.have = &have
	}
	return nil
}

// ProbeFastPath says what the kernel lacks for Table.FastPath; nil if it has all.
// Nothing is changed: the kernel tries a transaction and drops it, because it does
// not end.
func (d *Dataplane) ProbeFastPath() error {
	trial := &Flowtable{Name: "probe", Flags: flowtableCounter}
	err := d.try(addFlowtable{trial}, addRule{chainProbe, rule(func(b *ruleBuilder) { b.flowAdd(trial.Name) })})
	if err == nil {
		return nil
	}
	return fmt.Errorf("flowtable: this kernel has no flowtables: %w (modprobe -a nf_flow_table nf_flow_table_inet nft_flow_offload, or flowtable: false)", err)
}

// SuspendFastPath takes all flows out of the flowtable and keeps them out until
// resume is called, or until the table is next planned and applied. The kernel
// gives the last of them back some milliseconds later.
func (d *Dataplane) SuspendFastPath() (resume func() error, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.refresh(); err != nil {
		return nil, err
	}
	fast := d.have
	if fast == nil || fast.Flowtable == nil {
		return func() error { return nil }, nil
	}
	slow := fast.withoutFastPath()
	if err := d.switchTo(slow); err != nil {
		return nil, err
	}
	return func() error {
		d.mu.Lock()
		defer d.mu.Unlock()
		if err := d.refresh(); err != nil || d.have != slow {
			return err // it was put back with other changes
		}
		err := d.switchTo(fast)
		if err != nil {
			d.meddled = true // so that it is planned anew
		}
		return err
	}, nil
}

// switchTo commits the difference between d.have and next. It needs mu, and a
// refresh just before.
func (d *Dataplane) switchTo(next *Ruleset) error {
	p := &Plan{have: d.have, want: next, steps: diff(d.have, next)}
	b := newBatch()
	for i, s := range p.steps {
		s.encode(b, i)
	}
	b.finish()
	if err := d.commit(b); err != nil {
		d.known = false
		return explain(err, p)
	}
	d.have = next
	return nil
}

// withoutFastPath is r but for the flowtable and the rules that name it.
func (r *Ruleset) withoutFastPath() *Ruleset {
	slow := *r
	slow.Flowtable = nil
	slow.Chains = maps.Clone(r.Chains)
	if c := r.Chains[chainForward]; c != nil {
		forward := *c
		forward.Rules = slices.DeleteFunc(slices.Clone(c.Rules), Rule.offloads)
		slow.Chains[chainForward] = &forward
	}
	return &slow
}

// offloads reports whether the rule names a flowtable.
func (r Rule) offloads() bool {
	for e, rest, ok := next(r.exprs); ok; e, rest, ok = next(rest) {
		if text(find(e.data, unix.NFTA_EXPR_NAME)) == exprOffload {
			return true
		}
	}
	return false
}
