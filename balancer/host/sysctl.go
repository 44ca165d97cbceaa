package host

import (
	"fmt"
	"slices"
	"strings"

	"nlb/balancer"
)

// The sysctls, by their keys.
const (
	keyForward4   = "net/ipv4/ip_forward"
	keyForward6   = "net/ipv6/conf/all/forwarding"
	keyAccounting = "net/netfilter/nf_conntrack_acct"
)

func keySendRedirects(ifname string) string { return "net/ipv4/conf/" + ifname + "/send_redirects" }
func keyAcceptRA(ifname string) string      { return "net/ipv6/conf/" + ifname + "/accept_ra" }

// A setting is a sysctl and a value of it.
type setting struct {
	Key   string `json:"key"`
	Value string `json:"value"`
}

// line is the setting as sysctl(8) sets it.
func (s setting) line() string {
	return fmt.Sprintf("sysctl -w %s=%s", balancer.SysctlName(s.Key), s.Value)
}

// perInterface reports that the key goes when its interface goes.
func perInterface(key string) bool {
	parts := strings.Split(key, "/")
	return len(parts) == 5 && parts[2] == "conf" && parts[3] != "all" && parts[3] != "default"
}

// A record says what a sysctl that we set was before.
type record struct {
	Key      string `json:"key"`
	Previous string `json:"previous"`
	Ours     string `json:"ours"`
	// Also has settings that setting Previous again would change, with what
	// they were: the kernel copies forwarding to all interfaces.
	Also []setting `json:"also,omitempty"`
}

// undo is what restores the record, in order.
func (r record) undo() []setting {
	return append([]setting{{r.Key, r.Previous}}, r.Also...)
}

// A dragged setting is one that changes together with another.
type dragged struct {
	key string
	// off is what the kernel makes of it when forwarding is turned off again.
	off string
}

// drags lists what the kernel sets along with forwarding, given the names below
// conf (linux net/ipv4/devinet.c, inet_forward_change, and net/ipv6/addrconf.c,
// addrconf_fixup_forwarding).
func drags(key string, names4, names6 []string) []dragged {
	var ds []dragged
	each := func(family string, names []string) {
		for _, name := range names {
			if name != "all" {
				ds = append(ds, dragged{"net/" + family + "/conf/" + name + "/forwarding", "0"})
			}
		}
	}
	switch key {
	case keyForward4:
		each("ipv4", names4)
		ds = append(ds, dragged{"net/ipv4/conf/all/accept_redirects", "1"})
	case keyForward6:
		each("ipv6", names6)
	}
	return ds
}

// A state is what was found on the host.
type state struct {
	// values by key; what does not exist is not in it.
	values map[string]string
	// names4 and names6 are the names below conf of either family.
	names4, names6 []string
	// advertised are the interfaces that hold a default route learnt from
	// router advertisements, sorted.
	advertised []string
}

// wanted lists what the desired state needs, in the order to set it. Router
// advertisements come before forwarding, which purges the default routes learnt
// from them unless accept_ra is 2.
func wanted(want *balancer.Desired, found state, saved []record) []setting {
	if want == nil {
		return nil
	}
	var ss []setting
	if want.Forwarding6 {
		ss = append(ss, acceptRA(found, saved)...)
		ss = append(ss, setting{keyForward6, "1"})
	}
	if want.Forwarding4 {
		ss = append(ss, setting{keyForward4, "1"})
		// The kernel sends redirects if either says so.
		ss = append(ss, setting{keySendRedirects("all"), "0"})
		for _, ifname := range want.Egress {
			ss = append(ss, setting{keySendRedirects(ifname), "0"})
		}
	}
	return append(ss, setting{keyAccounting, "1"})
}

// acceptRA lists where router advertisements must be taken although we forward:
// where the default route comes from them, and where we asked for it before.
func acceptRA(found state, saved []record) []setting {
	var ss []setting
	for _, ifname := range found.advertised {
		if found.values[keyAcceptRA(ifname)] == "1" {
			ss = append(ss, setting{keyAcceptRA(ifname), "2"})
		}
	}
	for _, r := range saved {
		if strings.HasSuffix(r.Key, "/accept_ra") && found.values[r.Key] == r.Ours {
			ss = append(ss, setting{r.Key, r.Ours})
		}
	}
	return ss
}

// A Plan is a list of sysctls to restore and, after that, to set.
type Plan struct {
	restore, set []record
	// forget has records of values that somebody changed since.
	forget []record
	// keep has the records of what stays set.
	keep []record
}

// Empty reports that there is nothing to change.
func (p Plan) Empty() bool { return len(p.restore)+len(p.set)+len(p.forget) == 0 }

// Lines says the plan in the words of sysctl(8). What was ours and is not any
// more, since somebody changed it, is a comment.
func (p Plan) Lines() []string {
	var lines []string
	for _, r := range p.forget {
		lines = append(lines, fmt.Sprintf("# %s was changed by somebody since we set it to %s: left alone", balancer.SysctlName(r.Key), r.Ours))
	}
	for _, r := range p.restore {
		for _, s := range r.undo() {
			lines = append(lines, s.line())
		}
	}
	for _, r := range p.set {
		lines = append(lines, setting{r.Key, r.Ours}.line())
	}
	return lines
}

// diff says how what was found becomes what is wanted, given the records of
// what we set before, oldest first.
func diff(found state, want []setting, saved []record) Plan {
	var p Plan
	wants := map[string]bool{}
	for _, s := range want {
		wants[s.Key] = true
	}
	settled := map[string]bool{}
	for _, r := range slices.Backward(saved) {
		value, exists := found.values[r.Key]
		switch {
		case wants[r.Key] && value == r.Ours:
			p.keep = append(p.keep, r)
			settled[r.Key] = true
		case wants[r.Key], !exists && perInterface(r.Key):
			// Set anew, with a new record, or gone with its interface.
		case value != r.Ours:
			p.forget = append(p.forget, r)
		default:
			// The newest goes first: forwarding before what it depends on.
			p.restore = append(p.restore, r.restorable(found))
		}
	}
	slices.Reverse(p.keep)
	for _, s := range want {
		value, exists := found.values[s.Key]
		if settled[s.Key] || value == s.Value || !exists && perInterface(s.Key) {
			continue
		}
		p.set = append(p.set, record{Key: s.Key, Previous: value, Ours: s.Value, Also: also(found, s.Key)})
	}
	return p
}

// also lists what turning forwarding off again would change.
func also(found state, key string) []setting {
	var ss []setting
	for _, d := range drags(key, found.names4, found.names6) {
		if value, exists := found.values[d.key]; exists && value != d.off {
			ss = append(ss, setting{d.key, value})
		}
	}
	return ss
}

// restorable is r without the settings that somebody changed since.
func (r record) restorable(found state) record {
	r.Also = slices.DeleteFunc(slices.Clone(r.Also), func(s setting) bool { return found.values[s.Key] != s.Value })
	return r
}
