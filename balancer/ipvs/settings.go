package ipvs

import (
	"maps"
	"slices"

	"nlb/balancer"
)

// A setting is one of IPVS's for the whole network namespace.
type setting struct {
	name  string
	value int
}

// The settings, sysctls by their names. The timeouts have no other name than
// those here, and are in seconds.
const (
	// settingConntrack has IPVS keep connection tracking informed, which is where
	// the rules of nftables see what it chose.
	settingConntrack = "net.ipv4.vs.conntrack"
	// settingExpire ends the connections of a destination that is gone with their
	// next packet, instead of dropping all their packets for minutes.
	settingExpire = "net.ipv4.vs.expire_nodest_conn"
	// settingSloppy takes up TCP connections in their middle, as nftables does:
	// those of another balancer, or from before a restart. IPVS does not ask for
	// sockets before it does so: of connections that the relay has had since before
	// its service came to have destinations as well, all those were reset that the
	// hash gave to one of these. So where there is a relay nothing is taken up.
	settingSloppy = "net.ipv4.vs.sloppy_tcp"
	// settingReuse chooses anew for a client that uses its port again.
	settingReuse = "net.ipv4.vs.conn_reuse_mode"

	timeoutTCP = "timeout of tcp"
	timeoutUDP = "timeout of udp"
)

var sysctls = []string{settingConntrack, settingExpire, settingSloppy, settingReuse}

// udpIdle is how long a UDP flow may be silent, in seconds: NLB's 120 (Elastic
// Load Balancing, "Listeners for your Network Load Balancers").
const udpIdle = 120

// wantedSettings lists what the services of a Table need.
func wantedSettings(t *balancer.Table) []setting {
	sloppy := 1
	if relays(t) {
		sloppy = 0
	}
	ss := []setting{{settingConntrack, 1}, {settingExpire, 1}, {settingSloppy, sloppy}, {settingReuse, 1}}
	if idle := longestIdle(t); idle > 0 {
		ss = append(ss, setting{timeoutTCP, idle})
	}
	return append(ss, setting{timeoutUDP, udpIdle})
}

// A record says what a setting was before it was ours.
type record struct {
	Name     string `json:"name"`
	Previous int    `json:"previous"`
	// Ours are the values that we gave it: one, and while another is being set
	// that one too.
	Ours []int `json:"ours"`
}

// A change is a change of settings and of the records of them.
type change struct {
	set []setting
	// forgotten have values that somebody changed since: these are theirs.
	forgotten []record
	// saved is on disk now, before is while set is carried out, after afterwards.
	saved, before, after []record
}

func (c *change) empty() bool { return len(c.set)+len(c.forgotten) == 0 }

// install makes the settings what they should be. What this kernel does not have
// is left out.
func install(found map[string]int, to []setting, saved []record) change {
	before, after := byName(saved), byName(saved)
	c := change{saved: saved}
	for _, s := range to {
		value, exists := found[s.name]
		if !exists || value == s.value {
			continue
		}
		r := record{Name: s.name, Previous: value, Ours: []int{s.value}}
		underway := r
		if old := before[s.name]; slices.Contains(old.Ours, value) {
			r.Previous = old.Previous
			underway = record{Name: s.name, Previous: old.Previous, Ours: []int{s.value, value}}
		}
		before[s.name], after[s.name] = underway, r
		c.set = append(c.set, s)
	}
	c.before, c.after = sorted(before), sorted(after)
	return c
}

// restore gives back what is not needed any more. Needed are the settings of a
// Table; with keep all others stay too, for services that linger.
func restore(found map[string]int, to []setting, keep bool, saved []record) change {
	needed := make(map[string]bool)
	for _, s := range to {
		needed[s.name] = true
	}
	c := change{saved: saved, before: saved}
	for _, r := range saved {
		value, exists := found[r.Name]
		switch {
		case keep || needed[r.Name]:
			c.after = append(c.after, r)
		case exists && slices.Contains(r.Ours, value):
			c.set = append(c.set, setting{r.Name, r.Previous})
		default:
			c.forgotten = append(c.forgotten, r)
		}
	}
	return c
}

// same reports whether two lists of records are the same.
func same(a, b []record) bool {
	return slices.EqualFunc(a, b, func(a, b record) bool {
		return a.Name == b.Name && a.Previous == b.Previous && slices.Equal(a.Ours, b.Ours)
	})
}

func byName(records []record) map[string]record {
	m := make(map[string]record, len(records))
	for _, r := range records {
		m[r.Name] = r
	}
	return m
}

func sorted(m map[string]record) []record {
	var records []record
	for _, name := range slices.Sorted(maps.Keys(m)) {
		records = append(records, m[name])
	}
	return records
}

// steps are the writes that carry out the change: both timeouts are one.
func (c *change) steps() []step {
	var steps []step
	var idle timeouts
	for _, s := range c.set {
		switch s.name {
		case timeoutTCP:
			idle.tcp = s.value
		case timeoutUDP:
			idle.udp = s.value
		default:
			steps = append(steps, step{op: setSysctl, set: s})
		}
	}
	if idle != (timeouts{}) {
		steps = append(steps, step{op: setTimeouts, idle: idle})
	}
	return steps
}
