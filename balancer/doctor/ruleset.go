package doctor

import (
	"bytes"
	"fmt"
)

// A Chain is one of a table of nf_tables that is not ours.
type Chain struct {
	Family string `json:"family"` // ip, ip6 or inet
	Table  string `json:"table"`
	Name   string `json:"name"`
	// Type and Hook are empty for a chain that is only jumped to.
	Type     string `json:"type,omitempty"` // filter, nat or route
	Hook     string `json:"hook,omitempty"`
	Priority int32  `json:"priority,omitempty"`
	// Drops says that the policy is drop.
	Drops bool   `json:"drops,omitempty"`
	Rules []Rule `json:"rules,omitempty"`
}

func (c *Chain) String() string { return fmt.Sprintf("%s %s %s", c.Family, c.Table, c.Name) }

// ofIPTables says that iptables made the chain, whose own program gets confused by
// rules of nft in it.
func (c *Chain) ofIPTables() bool {
	return c.Family != "inet" && (c.Name == "FORWARD" || c.Name == "INPUT" || c.Name == "OUTPUT" ||
		c.Name == "PREROUTING" || c.Name == "POSTROUTING")
}

// A Rule does its Action with packets that meet all Conditions.
type Rule struct {
	Conditions []Condition `json:"if,omitempty"`
	Action     Action      `json:"do"`
	// To is the chain of a Jump or Goto.
	To string `json:"to,omitempty"`
}

// An Action is what a rule does, as far as it matters here.
type Action string

const (
	Continue Action = "continue" // it counts, logs, marks …
	Accept   Action = "accept"
	Drop     Action = "drop" // or reject
	Return   Action = "return"
	Jump     Action = "jump"
	Goto     Action = "goto"
	ToSource Action = "snat" // or masquerade
	ToDest   Action = "dnat" // or redirect, or tproxy
	NoTrack  Action = "notrack"
	// Unknown may be any of them: a verdict map, a queue, an extension of
	// iptables.
	Unknown Action = "unknown"
)

// A Condition compares bytes of a packet, or of what the kernel knows about it,
// with a value.
type Condition struct {
	Field Field `json:"field"`
	// Mask is applied before the comparison; empty is all ones.
	Mask []byte `json:"mask,omitempty"`
	Op   Op     `json:"op"`
	// Value has the length of the field; In and NotIn have a Set instead.
	Value []byte `json:"value,omitempty"`
	// Set is the name of a set of the rule's table. Ranges are its elements if
	// Listed, which large sets and those that packets change are not.
	Set    string  `json:"set,omitempty"`
	Ranges []Range `json:"ranges,omitempty"`
	Listed bool    `json:"listed,omitempty"`
}

// A Range is an element of a set: all from First to Last.
type Range struct {
	First []byte `json:"first"`
	Last  []byte `json:"last"`
}

// A Field is some bytes of a header, or one of the values that rules can ask
// for. The zero Field is something that is not known here.
type Field struct {
	Of     string `json:"of,omitempty"` // network, transport, or such as "meta 16", "ct 0"
	Offset uint32 `json:"offset,omitempty"`
	Len    uint32 `json:"len,omitempty"`
}

// An Op is enum nft_cmp_ops of linux/netfilter/nf_tables.h, or about a set.
type Op uint32

const (
	Equal Op = iota
	NotEqual
	Less
	LessOrEqual
	Greater
	GreaterOrEqual
	In
	NotIn
)

// A truth is true, false or not known.
type truth int

const (
	no truth = iota
	maybe
	yes
)

// holds evaluates the condition for a packet.
func (c *Condition) holds(p *Packet) truth {
	got, known := p.read(c.Field)
	if !known || len(c.Mask) != 0 && len(c.Mask) != len(got) {
		return maybe
	}
	if len(c.Mask) != 0 {
		got = bytes.Clone(got)
		for i := range got {
			got[i] &= c.Mask[i]
		}
	}
	if c.Op == In || c.Op == NotIn {
		return c.holdsInSet(got)
	}
	if len(got) != len(c.Value) {
		return maybe
	}
	order := bytes.Compare(got, c.Value)
	switch c.Op {
	case Equal:
		return truthOf(order == 0)
	case NotEqual:
		return truthOf(order != 0)
	case Less:
		return truthOf(order < 0)
	case LessOrEqual:
		return truthOf(order <= 0)
	case Greater:
		return truthOf(order > 0)
	case GreaterOrEqual:
		return truthOf(order >= 0)
	}
	return maybe
}

// holdsInSet does not know about elements of another length: their key has more
// than one field.
func (c *Condition) holdsInSet(got []byte) truth {
	if !c.Listed {
		return maybe
	}
	in := false
	for _, r := range c.Ranges {
		if len(r.First) != len(got) || len(r.Last) != len(got) {
			return maybe
		}
		in = in || bytes.Compare(r.First, got) <= 0 && bytes.Compare(got, r.Last) <= 0
	}
	return truthOf(in == (c.Op == In))
}

func truthOf(b bool) truth {
	if b {
		return yes
	}
	return no
}

func (r *Rule) matches(p *Packet) truth {
	all := yes
	for i := range r.Conditions {
		if all = min(all, r.Conditions[i].holds(p)); all == no {
			break
		}
	}
	return all
}

// An Outcome is what becomes of a packet in a base chain. It is doubtful when
// a rule that was not understood may have decided otherwise.
type Outcome struct {
	Action   Action // Accept, Drop, ToSource, ToDest or NoTrack
	Doubtful bool
}

// A ruleset finds chains by name.
type ruleset map[chainName]*Chain

type chainName struct{ family, table, name string }

func (c *Chain) key() chainName { return chainName{c.Family, c.Table, c.Name} }

func rulesetOf(chains []Chain) ruleset {
	rs := make(ruleset, len(chains))
	for i := range chains {
		rs[chains[i].key()] = &chains[i]
	}
	return rs
}

const (
	// maxJumps is how deep the kernel lets chains call each other
	// (NFT_JUMP_STACK_SIZE in include/net/netfilter/nf_tables.h).
	maxJumps = 16
	// maxSteps bounds a walk: chains that many rules jump to are walked as
	// often, and a packet of which little is known takes all of these ways.
	maxSteps = 100_000
)

// walk takes a packet through a base chain. Rules that only may drop or rewrite
// it are taken not to, since most lists of blocked addresses are like that;
// rules that only may accept it make the rest doubtful.
func (rs ruleset) walk(base *Chain, p *Packet) Outcome {
	w := walker{rules: rs, packet: p}
	if action, ended := w.chain(base, maxJumps); ended {
		return Outcome{action, w.doubtful}
	}
	if w.noTrack {
		return Outcome{NoTrack, w.doubtful}
	}
	if base.Drops {
		return Outcome{Drop, w.doubtful}
	}
	return Outcome{Accept, false}
}

type walker struct {
	rules    ruleset
	packet   *Packet
	steps    int
	doubtful bool
	noTrack  bool
}

// chain reports the action that ended the walk, or that none did.
func (w *walker) chain(c *Chain, depth int) (Action, bool) {
	for i := range c.Rules {
		r := &c.Rules[i]
		if w.steps++; w.steps > maxSteps || depth == 0 {
			w.doubtful = true
			return "", false
		}
		truth := r.matches(w.packet)
		if truth == no {
			continue
		}
		if r.Action == Jump || r.Action == Goto {
			action, ended := w.jump(c, r, truth, depth)
			if ended || r.Action == Goto && truth == yes {
				return action, ended
			}
			continue
		}
		if action, ended, left := w.rule(r, truth); ended || left {
			return action, ended
		}
	}
	return "", false
}

// rule does what a rule says that is no jump. The walk has ended, or the chain
// is left, or neither.
func (w *walker) rule(r *Rule, truth truth) (action Action, ended, left bool) {
	switch r.Action {
	case Continue:
	case Unknown:
		w.doubtful = true
	case NoTrack:
		w.noTrack = w.noTrack || truth == yes
	case Accept, Return:
		if truth == maybe {
			w.doubtful = true
			break
		}
		if r.Action == Return {
			return "", false, true
		}
		if w.noTrack { // accepted, and not to be tracked
			return NoTrack, true, false
		}
		return Accept, true, false
	default: // Drop, and what rewrites
		return r.Action, truth == yes, false
	}
	return "", false, false
}

// jump walks another chain. If it only may be walked, so may be what ends it.
func (w *walker) jump(from *Chain, r *Rule, truth truth, depth int) (Action, bool) {
	to := w.rules[chainName{from.Family, from.Table, r.To}]
	if to == nil {
		w.doubtful = true // it came while the rules were read
		return "", false
	}
	action, ended := w.chain(to, depth-1)
	if ended && truth == maybe {
		w.doubtful = w.doubtful || action == Accept
		return "", false
	}
	return action, ended
}
