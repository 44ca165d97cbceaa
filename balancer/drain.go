package balancer

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// terminateFor is how long the flows of a target that is cut off are answered
// with resets: three prompts that each take a slow client's round trip, as long
// again for a busy host, and then the same again until the Sweeper says that there
// are none.
const terminateFor = 5 * time.Second

// A Drain is the deregistration of one target. It takes no new flows from Since
// on, and its flows live on until Until.
type Drain struct {
	Since, Until time.Time
	// Terminate ends the flows that are left at Until.
	Terminate bool
	// Removed says that the target is not in the Spec any more. Target,
	// Protocol and ClientIP are what it was; without Removed they are unused.
	Removed  bool
	Target   Target
	Protocol Protocol
	ClientIP ClientIP
	// Done says that Until has passed and all that follows from it is over.
	Done bool
}

// Drains has the targets that are being deregistered, or were at run time.
type Drains map[TargetKey]Drain

// over reports that nothing more follows from the Drain of k.
func (d Drain) over(k TargetKey, seen View) bool {
	if !d.Terminate {
		return !seen.Now.Before(d.Until)
	}
	return !seen.Now.Before(seen.endsFrom(k, d.Until).Add(terminateFor))
}

func newDrain(g *TargetGroup, now time.Time) Drain {
	return Drain{
		Since: now, Until: now.Add(g.DeregistrationDelay.Timeout),
		Terminate: g.DeregistrationDelay.ConnectionTermination,
	}
}

// Follow returns the drains after the Spec changed from old to spec. A target
// that is gone drains under the delay that its group has now, or had last; one
// that came back is registered anew. Old is nil if nobody knows it, as at the
// first start, and may be one that Registered has reduced.
func (d Drains) Follow(old, spec *Spec, now time.Time) Drains {
	here := targetKeys(spec)
	next := make(Drains, len(d))
	for k, drain := range d {
		switch {
		case here[k] && drain.Removed:
			continue
		case !here[k] && !drain.Removed:
			if drain.Done || !drain.describe(old, k) {
				continue // nothing follows from it, or nobody knows what it was
			}
		}
		next[k] = drain
	}
	if old == nil {
		return next
	}
	used := old.GroupsInUse()
	for k := range targetKeys(old) {
		if _, known := d[k]; known || here[k] || !used[k.Group] {
			continue
		}
		g := spec.Group(k.Group)
		if g == nil {
			g = old.Group(k.Group)
		}
		drain := newDrain(g, now)
		drain.describe(old, k)
		next[k] = drain
	}
	return next
}

// describe makes d one of a target that left, and remembers what it was; it
// reports whether spec, which may be nil, knows it. Its Colocated matter to new flows
// alone: a daemon that forgets them now changes nothing in the kernel when it starts anew.
func (d *Drain) describe(spec *Spec, k TargetKey) bool {
	if spec == nil {
		return false
	}
	g := spec.Group(k.Group)
	if g == nil {
		return false
	}
	for _, t := range g.Targets {
		if t.AddrPort() == k.AddrPort {
			t.Colocated = nil
			d.Removed, d.Target, d.Protocol, d.ClientIP = true, t, g.Protocol, g.ClientIP
			return true
		}
	}
	return false
}

// overdue returns the drains as a daemon that was away takes them up: what
// should have happened meanwhile happens now.
func (d Drains) overdue(now time.Time) Drains {
	next := make(Drains, len(d))
	for k, drain := range d {
		if !drain.Done && drain.Until.Before(now) {
			drain.Until = now
		}
		next[k] = drain
	}
	return next
}

// Restart returns the drains as a daemon that begins with spec takes them up:
// what should have happened while none ran happens now, and what has left since
// registered was noted drains. See Follow for a registered that nobody knows.
func (d Drains) Restart(registered, spec *Spec, now time.Time) Drains {
	return d.overdue(now).Follow(registered, spec, now)
}

// settle marks what is over and forgets the targets that have left. Changed
// reports whether there was any.
func (d Drains) settle(seen View) (next Drains, changed bool) {
	next = maps.Clone(d)
	for k, drain := range d {
		switch {
		case drain.Done || !drain.over(k, seen):
		case drain.Removed:
			delete(next, k)
			changed = true
		default:
			drain.Done = true
			next[k] = drain
			changed = true
		}
	}
	return next, changed
}

// findTarget returns the target of a group that has the address and, unless it
// is 0, the port.
func findTarget(spec *Spec, group string, addr netip.Addr, port uint16) (TargetKey, error) {
	if spec == nil {
		return TargetKey{}, errors.New("no configuration is in force")
	}
	g := spec.Group(group)
	if g == nil {
		var names []string
		for _, g := range spec.TargetGroups {
			names = append(names, g.Name)
		}
		return TargetKey{}, fmt.Errorf("there is no target group %q; there are: %s", group, strings.Join(names, ", "))
	}
	var found []string
	var key TargetKey
	for _, t := range g.Targets {
		if t.Address == addr && (port == 0 || t.Port == port) {
			found = append(found, t.AddrPort().String())
			key = TargetKey{Group: group, AddrPort: t.AddrPort()}
		}
	}
	switch len(found) {
	case 1:
		return key, nil
	case 0:
		what := addr.String()
		if port != 0 {
			what = netip.AddrPortFrom(addr, port).String()
		}
		return TargetKey{}, fmt.Errorf("target group %s has no target %s", group, what)
	}
	return TargetKey{}, fmt.Errorf("target group %s has %d targets at %s: name one of %s",
		group, len(found), addr, strings.Join(found, ", "))
}

const drainsFile = "drains.json"

// A drainRecord is one Drain as it is kept in the state folder.
type drainRecord struct {
	Group     string         `json:"target_group"`
	Target    netip.AddrPort `json:"target"`
	Since     time.Time      `json:"since"`
	Until     time.Time      `json:"until"`
	Terminate bool           `json:"connection_termination"`
	Done      bool           `json:"done,omitempty"`
	Removed   *removedRecord `json:"removed,omitempty"`
}

// A removedRecord is what a target was that is not in the file any more.
type removedRecord struct {
	Protocol Protocol `json:"protocol"`
	ClientIP ClientIP `json:"client_ip"` // of its group
	Weight   int      `json:"weight"`
	// OwnClientIP is the target's.
	OwnClientIP ClientIP `json:"target_client_ip,omitzero"`
}

// check reports what no target ever was: it would be put into the kernel.
func (r drainRecord) check() error {
	if r.Removed == nil {
		return nil // the configuration says what it is
	}
	if err := checkGroup(r.Group, r.Removed.Protocol, r.Removed.ClientIP); err != nil {
		return fmt.Errorf("target group %q: %w", r.Group, err)
	}
	return checkTarget(r.Target, r.Removed.Weight)
}

// Save writes the drains to the state folder.
func (d Drains) Save(dir string) error {
	records := []drainRecord{}
	for k, drain := range d {
		r := drainRecord{k.Group, k.AddrPort, drain.Since.UTC(), drain.Until.UTC(), drain.Terminate, drain.Done, nil}
		if drain.Removed {
			r.Removed = &removedRecord{drain.Protocol, drain.ClientIP, drain.Target.Weight, drain.Target.ClientIP}
		}
		records = append(records, r)
	}
	slices.SortFunc(records, func(a, b drainRecord) int {
		if c := strings.Compare(a.Group, b.Group); c != 0 {
			return c
		}
		return a.Target.Compare(b.Target)
	})
	content, err := json.MarshalIndent(records, "", " ")
	if err != nil {
		return fmt.Errorf("drains: %w", err)
	}
	return WriteStateFile(dir, drainsFile, append(content, '\n'))
}

// LoadDrains reads what Save wrote; without a file there are none. The error
// names the file: to begin with a target that an operator took out would be
// worse than not to begin.
func LoadDrains(dir string) (Drains, error) {
	path := filepath.Join(dir, drainsFile)
	content, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Drains{}, nil
	}
	if err != nil {
		return nil, err
	}
	drains, err := decodeDrains(content)
	if err != nil {
		return nil, fmt.Errorf("%s, which says what targets were drained, makes no sense: %w (remove it to register them all)", path, err)
	}
	return drains, nil
}

func decodeDrains(content []byte) (Drains, error) {
	var records []drainRecord
	if err := json.Unmarshal(content, &records); err != nil {
		return nil, err
	}
	drains := make(Drains, len(records))
	for _, r := range records {
		if err := r.check(); err != nil {
			return nil, err
		}
		drain := Drain{Since: r.Since, Until: r.Until, Terminate: r.Terminate, Done: r.Done}
		if r.Removed != nil {
			drain.Removed, drain.Protocol, drain.ClientIP = true, r.Removed.Protocol, r.Removed.ClientIP
			drain.Target = Target{
				Address: r.Target.Addr(), Port: r.Target.Port(), Weight: r.Removed.Weight, ClientIP: r.Removed.OwnClientIP,
			}
		}
		drains[TargetKey{Group: r.Group, AddrPort: r.Target}] = drain
	}
	return drains, nil
}
