package worker

import (
	"fmt"
	"maps"
	"math"
	"net/netip"
	"reflect"
	"slices"

	"nlb/balancer"
	"nlb/balancer/maglev"
)

// relayed restricts a table to what a relay serves: the services that may choose
// a pool with ClientIP ProxyProtocolV2, and the destinations of those pools. The
// other pools stay, without destinations: services name them, and slots are
// dealt by how many pools there are.
//
// A pool that was relayed in have, which may be nil, keeps its destinations when
// it is relayed no more: its connections go on, as those of kernel modes do when
// a group changes its mode.
func relayed(t, have *balancer.Table) *balancer.Table {
	r := &balancer.Table{Key: t.Key, Sources: t.Sources}
	known := make(map[string]bool)
	if have != nil {
		for i := range have.Pools {
			known[have.Pools[i].Name] = len(have.Pools[i].Destinations) > 0
		}
	}
	relays := make(map[string]bool)
	for i := range t.Pools {
		p := t.Pools[i]
		relays[p.Name] = p.Relays()
		if !relays[p.Name] && !known[p.Name] {
			p = balancer.Pool{Name: p.Name, ClientIP: p.ClientIP}
		}
		p.Destinations = slices.Clone(p.Destinations)
		for j := range p.Destinations {
			p.Destinations[j].Domain = nil // a relayed connection is no hairpin
		}
		r.Pools = append(r.Pools, p)
	}
	for _, s := range t.Services {
		if slices.ContainsFunc(s.Pools, func(w balancer.WeightedPool) bool { return relays[w.Pool] }) {
			r.Services = append(r.Services, s)
		}
	}
	if t.Dataplane == balancer.IPVS {
		keepRelayed(r, t.RelayedOnly().Services)
	}
	if len(r.Services) == 0 && len(byKey(r)) == 0 {
		return new(balancer.Table) // nothing to relay, whatever else there is
	}
	return r
}

// keepRelayed leaves the relay nothing to choose but what it relays. Rules of
// nftables send it the flows whose hash leads to a relayed destination, and it
// finds that by the same hash; IPVS has a hash of its own. It has no part in the
// services that are only relayed, whose shares stay those of the rules.
//
// Destinations that are not relayed stay, without weight: they may have been, and
// have connections.
func keepRelayed(t *balancer.Table, only []*balancer.VirtualService) {
	whole := make(map[netip.AddrPort]bool, len(only))
	for _, s := range only {
		whole[addressOf(s)] = true
	}
	pools := make(map[string]*balancer.Pool, len(t.Pools))
	for i := range t.Pools {
		pools[t.Pools[i].Name] = &t.Pools[i]
	}
	for i := range t.Services {
		if s := &t.Services[i]; !whole[addressOf(s)] {
			s.Pools = relayedShares(s, pools)
		}
	}
	for i := range t.Pools {
		p := &t.Pools[i]
		for j := range p.Destinations {
			if d := &p.Destinations[j]; p.ClientIPOf(d) != balancer.ProxyProtocolV2 {
				d.Weight, d.Kept = 0, 0
			}
		}
	}
}

// relayedShares are the pools of a service, each with the part of its weight that
// IPVS leaves to the relay.
func relayedShares(s *balancer.VirtualService, pools map[string]*balancer.Pool) []balancer.WeightedPool {
	const fine = 1000 // weights are whole numbers
	shares := slices.Clone(s.Pools)
	for i := range shares {
		w := &shares[i]
		w.Weight = int(math.Ceil(float64(w.Weight) * fine * relayedShare(pools[w.Pool], s.Address.BitLen())))
	}
	return shares
}

// relayedShare is the relayed part, from 0 to 1, of the weight that a pool has
// for the flows to a VIP of so many bits.
func relayedShare(p *balancer.Pool, bits int) float64 {
	var all, relayed int
	for _, i := range p.Usable(bits) {
		d := &p.Destinations[i]
		all += d.Weight
		if p.ClientIPOf(d) == balancer.ProxyProtocolV2 {
			relayed += d.Weight
		}
	}
	if relayed == 0 {
		return 0
	}
	return float64(relayed) / float64(all)
}

// staged is what a relay serves while the dataplane changes from have to want:
// all of want, and whatever the dataplane may still send until it has changed.
//
//   - A service that goes stays, with its pools as they were if no service that
//     stays uses them.
//   - A pool that is relayed no more stays relayed.
//
// A pool that is gone altogether is left out where it would change the number of
// slots: in that moment its service refuses new connections.
func staged(have, want *balancer.Table) *balancer.Table {
	t := *want
	t.Services, t.Pools = slices.Clone(want.Services), slices.Clone(want.Pools)
	stay := addresses(want)
	used := make(map[string]bool) // by services that stay
	for i := range want.Services {
		for _, w := range want.Services[i].Pools {
			used[w.Pool] = true
		}
	}
	at := make(map[string]int, len(t.Pools))
	for i := range t.Pools {
		at[t.Pools[i].Name] = i
	}
	before := make(map[string]*balancer.Pool, len(have.Pools))
	for i := range have.Pools {
		p := &have.Pools[i]
		before[p.Name] = p
		if j, there := at[p.Name]; there && p.Relays() && !t.Pools[j].Relays() {
			t.Pools[j] = *p
		}
	}
	for _, s := range have.Services {
		if stay[addressOf(&s)] {
			continue
		}
		var pools []balancer.WeightedPool
		for _, w := range s.Pools {
			j, there := at[w.Pool]
			was := before[w.Pool]
			switch {
			case was == nil, !there && maglev.BaseFor(len(t.Pools)+1) != maglev.BaseFor(len(want.Pools)):
				continue
			case !there:
				at[w.Pool] = len(t.Pools)
				t.Pools = append(t.Pools, *was)
			case !used[w.Pool]:
				t.Pools[j] = *was
			}
			pools = append(pools, w)
		}
		s.Pools = pools
		t.Services = append(t.Services, s)
	}
	return &t
}

// changes says in words what makes a table of another.
func changes(from, to *balancer.Table) []string {
	var lines []string
	say := func(format string, args ...any) { lines = append(lines, "relay: "+fmt.Sprintf(format, args...)) }
	if from.Key != to.Key && !empty(from) {
		say("another hash key")
	}
	if !slices.Equal(from.Sources, to.Sources) {
		say("connect from %v", to.Sources)
	}
	compare(byAddress(from), byAddress(to), netip.AddrPort.Compare,
		func(a netip.AddrPort, s *balancer.VirtualService) { say("listen on %s", a) },
		func(a netip.AddrPort, s *balancer.VirtualService) { say("stop listening on %s", a) },
		func(a netip.AddrPort, was, is *balancer.VirtualService) {
			for _, what := range serviceChanges(was, is) {
				say("%s %s", a, what)
			}
		})
	compare(byKey(from), byKey(to), compareKeys,
		func(k balancer.TargetKey, d *balancer.Destination) {
			say("%s %s add with weight %d", k.Group, k.AddrPort, d.Weight)
		},
		func(k balancer.TargetKey, _ *balancer.Destination) {
			say("%s %s remove", k.Group, k.AddrPort)
		},
		func(k balancer.TargetKey, was, is *balancer.Destination) {
			for _, what := range destinationChanges(was, is) {
				say("%s %s %s", k.Group, k.AddrPort, what)
			}
		})
	for _, what := range poolChanges(from, to) {
		say("%s", what)
	}
	if len(lines) == 0 && !reflect.DeepEqual(from, to) {
		say("the same, written differently")
	}
	return lines
}

func empty(t *balancer.Table) bool { return len(t.Services)+len(t.Pools) == 0 }

// compare walks two maps in the order of their keys.
func compare[K comparable, V any](from, to map[K]V, order func(a, b K) int, added, removed func(K, V), both func(k K, was, is V)) {
	for _, k := range slices.SortedFunc(maps.Keys(to), order) {
		if was, there := from[k]; there {
			both(k, was, to[k])
		} else {
			added(k, to[k])
		}
	}
	for _, k := range slices.SortedFunc(maps.Keys(from), order) {
		if _, there := to[k]; !there {
			removed(k, from[k])
		}
	}
}

func byAddress(t *balancer.Table) map[netip.AddrPort]*balancer.VirtualService {
	m := make(map[netip.AddrPort]*balancer.VirtualService, len(t.Services))
	for i := range t.Services {
		m[addressOf(&t.Services[i])] = &t.Services[i]
	}
	return m
}

func byKey(t *balancer.Table) map[balancer.TargetKey]*balancer.Destination {
	m := make(map[balancer.TargetKey]*balancer.Destination)
	for i := range t.Pools {
		p := &t.Pools[i]
		for j := range p.Destinations {
			d := &p.Destinations[j]
			m[balancer.TargetKey{Group: p.Name, AddrPort: d.AddrPort()}] = d
		}
	}
	return m
}

func serviceChanges(was, is *balancer.VirtualService) []string {
	var what []string
	if was.Name != is.Name {
		what = append(what, fmt.Sprintf("is named %s -> %s", was.Name, is.Name))
	}
	if was.IdleTimeout != is.IdleTimeout {
		what = append(what, fmt.Sprintf("idle timeout %s -> %s", was.IdleTimeout, is.IdleTimeout))
	}
	if !slices.Equal(was.Allow, is.Allow) {
		what = append(what, fmt.Sprintf("allow %v", is.Allow))
	}
	if was.Sticky != is.Sticky || !slices.Equal(was.Pools, is.Pools) {
		what = append(what, "choose "+choice(is))
	}
	return what
}

func choice(s *balancer.VirtualService) string {
	text := "by the flow from"
	if s.Sticky {
		text = "by the client from"
	}
	for _, w := range s.Pools {
		text += fmt.Sprintf(" %s:%d", w.Pool, w.Weight)
	}
	return text
}

func destinationChanges(was, is *balancer.Destination) []string {
	var what []string
	switch {
	case was.Weight != is.Weight:
		what = append(what, fmt.Sprintf("weight %d -> %d", was.Weight, is.Weight))
	case was.Kept != is.Kept:
		what = append(what, fmt.Sprintf("hashes by weight %d -> %d", was.Kept, is.Kept))
	}
	if is.Terminate && !was.Terminate {
		what = append(what, "reset its connections")
	}
	if was.Terminate && !is.Terminate {
		what = append(what, "keep its connections")
	}
	if was.Source != is.Source {
		what = append(what, fmt.Sprintf("connect from %v", is.Source))
	}
	return what
}

// poolChanges are those of pools in both tables, and the number of pools.
func poolChanges(from, to *balancer.Table) []string {
	var what []string
	before := make(map[string]*balancer.Pool, len(from.Pools))
	for i := range from.Pools {
		before[from.Pools[i].Name] = &from.Pools[i]
	}
	same := len(from.Pools) == len(to.Pools)
	for i := range to.Pools {
		is := &to.Pools[i]
		was := before[is.Name]
		if was == nil {
			same = false
			continue
		}
		if was.ClientIP != is.ClientIP {
			what = append(what, fmt.Sprintf("%s client_ip %v -> %v", is.Name, was.ClientIP, is.ClientIP))
		}
		if was.ProxyProtocol != is.ProxyProtocol {
			what = append(what, fmt.Sprintf("%s headers with unique_id %v, crc32c %v", is.Name, is.ProxyProtocol.UniqueID, is.ProxyProtocol.CRC32C))
		}
		if was.Sticky != is.Sticky {
			what = append(what, fmt.Sprintf("%s sticky %v -> %v", is.Name, was.Sticky, is.Sticky))
		}
	}
	if !same && len(from.Pools) > 0 {
		what = append(what, fmt.Sprintf("target groups %d -> %d", len(from.Pools), len(to.Pools)))
	}
	return what
}
