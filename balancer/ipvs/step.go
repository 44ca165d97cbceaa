package ipvs

import (
	"fmt"
	"strings"

	"nlb/balancer"
)

// An operation is one kind of write to the kernel.
type operation uint8

const (
	addService operation = iota + 1
	editService
	removeService
	addDestination
	editDestination
	removeDestination
	setSysctl
	setTimeouts
)

// A step is one write to the kernel.
type step struct {
	op   operation
	of   service     // the service that it is, or is of; without its destinations
	dest destination // of operations on one
	set  setting     // of setSysctl
	// idle are the timeouts of setTimeouts.
	idle timeouts
}

// timeouts are idle times of connections, in seconds. 0 leaves one as it is.
type timeouts struct{ tcp, udp int }

// line says the step in the words of ipvsadm(8) or sysctl(8).
func (s step) line() string {
	to := strings.Join([]string{protocolFlag(s.of.key.proto), s.of.key.at.String()}, " ")
	switch s.op {
	case addService:
		return "ipvsadm -A " + to + options(&s.of)
	case editService:
		return "ipvsadm -E " + to + options(&s.of)
	case removeService:
		return "ipvsadm -D " + to
	case addDestination:
		return fmt.Sprintf("ipvsadm -a %s -r %s%s", to, s.dest.at, s.dest.options())
	case editDestination:
		return fmt.Sprintf("ipvsadm -e %s -r %s%s", to, s.dest.at, s.dest.options())
	case removeDestination:
		return fmt.Sprintf("ipvsadm -d %s -r %s", to, s.dest.at)
	case setSysctl:
		return fmt.Sprintf("sysctl -w %s=%d", s.set.name, s.set.value)
	case setTimeouts:
		return fmt.Sprintf("ipvsadm --set %d 0 %d", s.idle.tcp, s.idle.udp)
	}
	panic(fmt.Sprintf("no such operation: %d", s.op))
}

func protocolFlag(proto uint8) string {
	switch proto {
	case balancer.ProtoTCP:
		return "-t"
	case balancer.ProtoUDP:
		return "-u"
	}
	return "--sctp-service"
}

// options are those of a service. Netmask and cookie have none without persistence.
func options(s *service) string {
	text := " -s " + s.scheduler
	var flags []string
	if s.flags&flagFallback != 0 {
		flags = append(flags, "mh-fallback")
	}
	if s.flags&flagPort != 0 {
		flags = append(flags, "mh-port")
	}
	if len(flags) > 0 {
		text += " -b " + strings.Join(flags, ",")
	}
	return text
}

func (d destination) options() string { return fmt.Sprintf(" -m -w %d", d.weight) }

// transition lists the steps from some services to others, both sorted by key: new
// ones first, then what sends more flows to a destination, then what sends fewer,
// then removals. So whatever has a usable destination before and after has one
// throughout, wherever it ends.
func transition(from, to []service) []step {
	var add, raise, lower, remove []step
	for i := range to {
		s := bare(&to[i])
		h := findService(from, s.key)
		if h == nil {
			add = append(add, step{op: addService, of: s})
			for _, d := range usableFirst(to[i].destinations) {
				add = append(add, step{op: addDestination, of: s, dest: d})
			}
			continue
		}
		for _, d := range usableFirst(to[i].destinations) {
			is := h.find(d.at)
			switch {
			case is == nil:
				raise = append(raise, step{op: addDestination, of: s, dest: d})
			case is.same(d):
			case d.weight > 0 && is.weight <= d.weight:
				raise = append(raise, step{op: editDestination, of: s, dest: d})
			default:
				lower = append(lower, step{op: editDestination, of: s, dest: d})
			}
		}
		if !h.same(&s) {
			raise = append(raise, step{op: editService, of: s})
		}
		for _, d := range h.destinations {
			if to[i].find(d.at) == nil {
				remove = append(remove, step{op: removeDestination, of: s, dest: destination{at: d.at}})
			}
		}
	}
	for i := range from {
		if findService(to, from[i].key) == nil {
			remove = append(remove, step{op: removeService, of: bare(&from[i])})
		}
	}
	return append(append(append(add, raise...), lower...), remove...)
}

func bare(s *service) service {
	b := *s
	b.destinations = nil
	return b
}

// usableFirst puts destinations with a weight before those without.
func usableFirst(ds []destination) []destination {
	out := make([]destination, 0, len(ds))
	for _, d := range ds {
		if d.weight > 0 {
			out = append(out, d)
		}
	}
	for _, d := range ds {
		if d.weight == 0 {
			out = append(out, d)
		}
	}
	return out
}
