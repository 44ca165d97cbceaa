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
)

const healthFile = "health.json"

// rememberEvery bounds what a crash forgets.
const rememberEvery = 100 * time.Millisecond

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
}

// recallHealth reads what the last daemon knew. A file that makes no sense is
// worth a warning, not a refusal: the health checks know better in seconds.
func recallHealth(dir string, log *zap.Logger) balancer.HealthView {
	path := filepath.Join(dir, healthFile)
	content, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var list []remembered
	if err == nil {
		err = json.Unmarshal(content, &list)
	}
	if err != nil {
		log.Warn("what was known of the targets' health cannot be read, they begin anew",
			zap.String("file", path), zap.Error(err))
		return nil
	}
	health := make(balancer.HealthView, len(list))
	for _, r := range list {
		if r.State == balancer.Healthy || r.State == balancer.Unhealthy {
			health[balancer.TargetKey{Group: r.Group, AddrPort: r.Target}] =
				balancer.Health{State: r.State, Reason: r.Reason, Description: r.Description, Since: r.Since}
		}
	}
	return health
}

// rememberHealth writes what the health checks found, when it has changed, until
// ctx ends and once more then.
func rememberHealth(ctx context.Context, dir string, snapshot func() *balancer.Snapshot, log *zap.Logger) error {
	tick := time.NewTicker(rememberEvery)
	defer tick.Stop()
	var written []byte
	failing := false
	for more := true; more; {
		select {
		case <-ctx.Done():
			more = false
		case <-tick.C:
		}
		s := snapshot()
		if s == nil {
			continue
		}
		content, err := healthContent(s.Groups)
		if err == nil && !bytes.Equal(content, written) {
			err = balancer.WriteStateFile(dir, healthFile, content)
		}
		if err != nil && !failing {
			log.Error("the targets' health cannot be written down, a restart will have forgotten it", zap.Error(err))
		}
		if failing = err != nil; !failing {
			written = content
		}
	}
	return nil
}

func healthContent(groups []balancer.TargetGroupStatus) ([]byte, error) {
	list := []remembered{}
	for _, g := range groups {
		for _, t := range g.Targets {
			state := t.State
			if state == balancer.UnhealthyDraining {
				state = balancer.Unhealthy // the draining follows from since
			}
			if state == balancer.Healthy || state == balancer.Unhealthy {
				list = append(list, remembered{g.Name, t.Target.AddrPort(), state, t.Reason, t.Description, t.Since.UTC()})
			}
		}
	}
	content, err := json.MarshalIndent(list, "", " ")
	if err != nil {
		return nil, fmt.Errorf("health of targets: %w", err)
	}
	return append(content, '\n'), nil
}
