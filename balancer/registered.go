package balancer

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// Registered reduces a Spec to what Drains.Follow has to know of a target that
// leaves it: the groups that listeners forward to, sorted, and one listener
// that forwards to them all.
func Registered(spec *Spec) *Spec {
	used := spec.GroupsInUse()
	groups := []TargetGroup{}
	for _, g := range spec.TargetGroups {
		if !used[g.Name] {
			continue
		}
		reduced := TargetGroup{
			Name: g.Name, Protocol: g.Protocol, ClientIP: g.ClientIP, DeregistrationDelay: g.DeregistrationDelay,
			Targets: make([]Target, 0, len(g.Targets)),
		}
		for _, t := range g.Targets {
			reduced.Targets = append(reduced.Targets, Target{Address: t.Address, Port: t.Port, Weight: t.Weight, ClientIP: t.ClientIP})
		}
		slices.SortFunc(reduced.Targets, func(a, b Target) int { return a.AddrPort().Compare(b.AddrPort()) })
		groups = append(groups, reduced)
	}
	slices.SortFunc(groups, func(a, b TargetGroup) int { return cmp.Compare(a.Name, b.Name) })
	return inUse(groups)
}

// inUse is a Spec in which a listener forwards to each of the groups.
func inUse(groups []TargetGroup) *Spec {
	var all Listener
	for _, g := range groups {
		all.Forward = append(all.Forward, WeightedGroup{TargetGroup: g.Name, Weight: 1})
	}
	return &Spec{Listeners: []Listener{all}, TargetGroups: groups}
}

const registeredFile = "targets.json"

// A groupRecord is one group of a reduced Spec as it is kept in the state folder.
type groupRecord struct {
	Name     string         `json:"name"`
	Protocol Protocol       `json:"protocol"`
	ClientIP ClientIP       `json:"client_ip"`
	Delay    delayRecord    `json:"deregistration_delay"`
	Targets  []targetRecord `json:"targets"`
}

type delayRecord struct {
	Timeout   string `json:"timeout"` // as in the configuration: a Go duration
	Terminate bool   `json:"connection_termination"`
}

type targetRecord struct {
	Address netip.Addr `json:"address"`
	Port    uint16     `json:"port"`
	Weight  int        `json:"weight"`
	// ClientIP is the target's own.
	ClientIP ClientIP `json:"client_ip,omitzero"`
}

// EncodeRegistered is the content of the file that SaveRegistered writes.
// Specs that Registered reduces to the same have the same.
func EncodeRegistered(spec *Spec) ([]byte, error) {
	records := []groupRecord{}
	for _, g := range Registered(spec).TargetGroups {
		delay := g.DeregistrationDelay
		r := groupRecord{g.Name, g.Protocol, g.ClientIP, delayRecord{delay.Timeout.String(), delay.ConnectionTermination}, []targetRecord{}}
		for _, t := range g.Targets {
			r.Targets = append(r.Targets, targetRecord{t.Address, t.Port, t.Weight, t.ClientIP})
		}
		records = append(records, r)
	}
	content, err := json.MarshalIndent(records, "", " ")
	if err != nil {
		return nil, fmt.Errorf("registered targets: %w", err)
	}
	return append(content, '\n'), nil
}

// DecodeRegistered returns the reduced Spec that EncodeRegistered was given. A
// content that no Spec has is an error: what it says would be put into the kernel.
func DecodeRegistered(content []byte) (*Spec, error) {
	var records []groupRecord
	if err := json.Unmarshal(content, &records); err != nil {
		return nil, err
	}
	var groups []TargetGroup
	named := make(map[string]bool)
	for _, r := range records {
		g, err := r.group()
		if err == nil && named[r.Name] {
			err = errors.New("is there twice")
		}
		if err != nil {
			return nil, fmt.Errorf("target group %q: %w", r.Name, err)
		}
		named[r.Name] = true
		groups = append(groups, g)
	}
	return Registered(inUse(groups)), nil
}

func (r groupRecord) group() (TargetGroup, error) {
	g := TargetGroup{Name: r.Name, Protocol: r.Protocol, ClientIP: r.ClientIP}
	delay, err := time.ParseDuration(r.Delay.Timeout)
	switch {
	case err != nil:
		return g, fmt.Errorf("deregistration_delay: %w", err)
	case delay < 0:
		return g, fmt.Errorf("a deregistration_delay of %v", delay)
	}
	if err := checkGroup(r.Name, r.Protocol, r.ClientIP); err != nil {
		return g, err
	}
	g.DeregistrationDelay = DeregistrationDelay{Timeout: delay, ConnectionTermination: r.Delay.Terminate}
	known := make(map[netip.AddrPort]bool)
	for _, t := range r.Targets {
		target := Target{Address: t.Address, Port: t.Port, Weight: t.Weight, ClientIP: t.ClientIP}
		at := target.AddrPort()
		if err := checkTarget(at, t.Weight); err != nil {
			return g, err
		}
		if known[at] {
			return g, fmt.Errorf("target %v is there twice", at)
		}
		known[at] = true
		g.Targets = append(g.Targets, target)
	}
	return g, nil
}

// checkGroup refuses what no Spec has.
func checkGroup(name string, protocol Protocol, mode ClientIP) error {
	if name == "" || protocol == 0 || mode == 0 {
		return errors.New("a name, a protocol or a client_ip is missing")
	}
	return nil
}

// checkTarget refuses what no Spec has.
func checkTarget(at netip.AddrPort, weight int) error {
	switch a := at.Addr(); {
	case !a.IsGlobalUnicast() || a.Is4In6() || a.Zone() != "" || at.Port() == 0:
		return fmt.Errorf("%v is no target", at)
	case weight < 0 || weight > maxWeight:
		return fmt.Errorf("target %v: %d is no weight", at, weight)
	}
	return nil
}

// maxWeight is the largest Target.Weight.
const maxWeight = 256

// SaveRegistered writes what is registered to the state folder, for a daemon
// that comes back with another configuration.
func SaveRegistered(dir string, spec *Spec) error {
	content, err := EncodeRegistered(spec)
	if err != nil {
		return err
	}
	return WriteStateFile(dir, registeredFile, content)
}

// LoadRegistered reads what SaveRegistered wrote, and returns nil without a
// file. The error names the file. It is no reason not to begin: a target that
// left unseen goes without a drain, and its flows live on.
func LoadRegistered(dir string) (*Spec, error) {
	path := filepath.Join(dir, registeredFile)
	content, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	spec, err := DecodeRegistered(content)
	if err != nil {
		return nil, fmt.Errorf("%s, which says what targets were registered, makes no sense: %w", path, err)
	}
	return spec, nil
}

// ForgetRegistered removes what SaveRegistered wrote, for when no target has
// flows any more.
func ForgetRegistered(dir string) error {
	err := os.Remove(filepath.Join(dir, registeredFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
