package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"go.uber.org/zap"

	"nlb/balancer"
	"nlb/balancer/events"
)

const healthFile = "health.json"

// rememberEvery bounds what a crash forgets. What changes all the time is
// written once in rememberRest, after rememberBurst times: each time is a file of
// all targets, synced.
const (
	rememberEvery = 100 * time.Millisecond
	rememberRest  = time.Second
	rememberBurst = 20
)

// A remembered is what is kept of one target's health. A daemon that comes back
// goes on where the former one was: it neither sends flows to a target that was
// found dead nor writes to a kernel that already does the right thing.
type remembered struct {
	Group       string         `json:"target_group"`
	Target      netip.AddrPort `json:"target"`
	State       balancer.State `json:"state"`
	Reason      string         `json:"reason,omitempty"`
	Description string         `json:"description,omitempty"`
	Since       time.Time      `json:"since"`
	// Of the passive check; absent where it never held the target.
	Held *rememberedHold `json:"held,omitempty"`
}

type rememberedHold struct {
	Since    time.Time `json:"since"`
	Until    time.Time `json:"until"`
	Times    int       `json:"times"`
	Failures uint64    `json:"failures"`
}

// recallHealth reads what the last daemon knew. A file that makes no sense is
// worth a warning, not a refusal: the health checks know better in seconds.
func recallHealth(dir string, log *zap.Logger) (balancer.HealthView, balancer.Holds) {
	path := filepath.Join(dir, healthFile)
	content, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var list []remembered
	if err == nil {
		err = json.Unmarshal(content, &list)
	}
	if err != nil {
		log.Warn("what was known of the targets' health cannot be read, they begin anew",
			events.StateCannotBeRead.Field(), zap.String("file", path), zap.Error(err))
		return nil, nil
	}
	health, holds := make(balancer.HealthView, len(list)), make(balancer.Holds)
	for _, r := range list {
		key := balancer.TargetKey{Group: r.Group, AddrPort: r.Target}
		if r.State == balancer.Healthy || r.State == balancer.Unhealthy {
			health[key] = balancer.Health{State: r.State, Reason: r.Reason, Description: r.Description, Since: r.Since}
		}
		if r.Held != nil {
			holds[key] = balancer.Hold(*r.Held)
		}
	}
	return health, holds
}

// rememberHealth writes what the health checks found, when it has changed, until
// ctx ends and once more then.
func rememberHealth(ctx context.Context, dir string, snapshot func() *balancer.Snapshot, log *zap.Logger) error {
	tick := time.NewTicker(rememberEvery)
	defer tick.Stop()
	var seen *balancer.Snapshot
	var written []byte
	var early time.Duration // how far the writes are ahead of one in rememberRest
	failing := false
	for more := true; more; {
		select {
		case <-ctx.Done():
			more = false
		case <-tick.C:
		}
		early = max(0, early-rememberEvery)
		s := snapshot()
		if s == nil || s == seen || more && early > (rememberBurst-1)*rememberRest {
			continue
		}
		content, err := healthContent(s.Groups)
		if err == nil && !bytes.Equal(content, written) {
			err = balancer.WriteStateFile(dir, healthFile, content)
			early += rememberRest
		}
		if err != nil && !failing {
			log.Error("the targets' health cannot be written down, a restart will have forgotten it", events.StateCannotBeKept.Field(), zap.Error(err))
		}
		if failing = err != nil; !failing {
			seen, written = s, content
		}
	}
	return nil
}

func healthContent(groups []balancer.TargetGroupStatus) ([]byte, error) {
	list := []remembered{}
	for _, g := range groups {
		for _, t := range g.Targets {
			h := t.Probed
			if h.State != balancer.Healthy && h.State != balancer.Unhealthy {
				continue
			}
			r := remembered{
				Group: g.Name, Target: t.Target.AddrPort(),
				State: h.State, Reason: h.Reason, Description: h.Description, Since: h.Since.UTC(),
			}
			if t.Hold.Times > 0 {
				r.Held = &rememberedHold{t.Hold.Since.UTC(), t.Hold.Until.UTC(), t.Hold.Times, t.Hold.Failures}
			}
			list = append(list, r)
		}
	}
	content, err := json.MarshalIndent(list, "", " ")
	if err != nil {
		return nil, fmt.Errorf("health of targets: %w", err)
	}
	return append(content, '\n'), nil
}
