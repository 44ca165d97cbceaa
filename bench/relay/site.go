package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"nlb/bench/lab"
	"nlb/bench/measure"
)

// A site is a contestant made real: a network of its own, alike for all, with
// the contestant on the balancer's node.
type site struct {
	contestant
	measure.Site
	meter   meter
	station *station
}

// newSite builds a contestant's network, which is ready for traffic then.
func newSite(ctx context.Context, c contestant, o *options) (*site, error) {
	s := &site{contestant: c}
	if err := s.build(ctx, o); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

func (s *site) build(ctx context.Context, o *options) (err error) {
	if err := s.Build(lab.Options{Targets: 1, Offload: true}); err != nil {
		return err
	}
	if err := s.tune(); err != nil {
		return err
	}
	if s.station, err = newStation(s); err != nil {
		return err
	}
	if s.start != nil {
		if err := s.run(o); err != nil {
			return err
		}
	}
	if err := s.await(ctx); err != nil {
		return err
	}
	return s.findProcesses()
}

// tune prepares the nodes for many short connections, as one does: whoever
// closes first keeps the port for a minute, and may use it again after a second
// (ip-sysctl, tcp_tw_reuse).
func (s *site) tune() error {
	for _, n := range s.Nodes() {
		err := errors.Join(
			n.Sysctl("net.ipv4.ip_local_port_range", "1024 65535"),
			n.Sysctl("net.ipv4.tcp_tw_reuse", "1"),
		)
		if err != nil {
			return err
		}
	}
	return nil
}

// close removes the network and all in it, complete or not.
func (s *site) close() error {
	if s.station != nil {
		s.station.close()
	}
	return s.Close()
}

// run starts the balancer.
func (s *site) run(o *options) error {
	cmd, err := s.start(s, o)
	if err != nil {
		return err
	}
	if err := s.Start(cmd); err != nil {
		return fmt.Errorf("start: %w", err)
	}
	return nil
}

// startTime is how long a balancer may take to be ready: nlb looks after its
// target first.
const startTime = 20 * time.Second

// await waits until a connection comes through the balancer, with the right
// header, and the kernel tracks it, or not, as it should.
func (s *site) await(ctx context.Context) error {
	err := s.Balancer.Await(ctx, startTime, func(context.Context) error { return s.try() })
	switch {
	case errors.Is(err, measure.ErrEnded):
		return fmt.Errorf("it has ended: %s", s.Balancer.Said())
	case err != nil:
		return fmt.Errorf("waited in vain: %w\n%s", err, s.Balancer.Said())
	}
	return nil
}

func (s *site) try() error {
	if err := s.Clients[0].Do(s.station.try); err != nil {
		return err
	}
	return s.LB.Do(func() error {
		text, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_count")
		if errors.Is(err, os.ErrNotExist) {
			text, err = []byte("0"), nil // the module is not there
		}
		if err != nil {
			return err
		}
		count, err := strconv.Atoi(strings.TrimSpace(string(text)))
		if err != nil {
			return err
		}
		// A health check is one connection, to another port, and a relayed one is two.
		if tracked := count > 1; tracked != s.tracked {
			return fmt.Errorf("%d connections are tracked on the balancer's node", count)
		}
		return nil
	})
}

// findProcesses finds the balancer's processes: all that are in its namespace.
func (s *site) findProcesses() error {
	var space unix.Stat_t
	if err := unix.Stat(filepath.Join("/run/netns", s.LB.NS), &space); err != nil {
		return err
	}
	names, err := filepath.Glob("/proc/[0-9]*/ns/net")
	if err != nil {
		return err
	}
	for _, name := range names {
		var st unix.Stat_t
		pid, _ := strconv.Atoi(strings.Split(name, "/")[2])
		// A process may end while we look at it. This one has a thread in there now
		// and then.
		if unix.Stat(name, &st) == nil && st.Ino == space.Ino && st.Dev == space.Dev && pid != os.Getpid() {
			s.meter.balancer = append(s.meter.balancer, pid)
		}
	}
	if s.start != nil && len(s.meter.balancer) == 0 {
		return errors.New("there is no process of the balancer")
	}
	return nil
}

// hurry gives the balancer the urgency that everything here has. Nobody needs to
// take it back, since the sessions end with the site.
func (s *site) hurry() error {
	for _, pid := range s.meter.balancer {
		if _, err := hurry(pid); err != nil {
			return err
		}
	}
	return nil
}
