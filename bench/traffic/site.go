package traffic

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"nlb/bench/lab"
	"nlb/bench/measure"
	"nlb/bench/part"
	"nlb/bench/peers"
)

// A site is a contestant made real: a network of its own, alike for all, with
// the contestant on the balancer's node.
type site struct {
	*contestant
	measure.Site
	meter   meter
	station *station
	packets []int // the targets' UDP sockets, if the contestant forwards
}

// newSite builds a contestant's network, which is ready for traffic then. The
// meter is for the core, and does not know of a balancer yet.
func newSite(ctx context.Context, c *contestant, programs part.Programs, m meter) (*site, error) {
	s := &site{contestant: c, meter: m}
	if err := s.build(ctx, programs); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

func (s *site) build(ctx context.Context, programs part.Programs) (err error) {
	if err := s.Build(lab.Options{Targets: targets, Offload: true}); err != nil {
		return err
	}
	if err := s.ManyConnections(); err != nil {
		return err
	}
	if s.station, err = newStation(s); err != nil {
		return err
	}
	if err := s.listenUDP(); err != nil {
		return err
	}
	if err := s.install(ctx, programs[s.program]); err != nil {
		return err
	}
	if err := s.await(ctx); err != nil {
		return err
	}
	if err := s.findProcesses(); err != nil {
		return err
	}
	return s.hurry()
}

func (s *site) listenUDP() error {
	if !s.forwards {
		return nil
	}
	for _, t := range s.Targets {
		err := t.Do(func() error {
			fd, err := measure.Bind(unix.SOCK_DGRAM, t.Addr4, measure.Port)
			if err == nil {
				s.packets = append(s.packets, fd)
			}
			return err
		})
		if err != nil {
			return fmt.Errorf("%s: %w", t.Name, err)
		}
	}
	return nil
}

// close removes the network and all in it, complete or not.
func (s *site) close() error {
	if s.station != nil {
		s.station.close()
	}
	for _, fd := range s.packets {
		_ = unix.Close(fd)
	}
	return s.Close()
}

// install makes the balancer of what the contestant is.
func (s *site) install(ctx context.Context, program string) error {
	switch s.contestant.program {
	case part.NFT:
		return s.loadRuleset(ctx, program)
	case part.NLB:
		return s.startNLB(ctx, program)
	case part.HAProxy:
		return s.startRelay("haproxy.cfg", func(file string) []string { return peers.HAProxy{}.Command(program, file) })
	case part.Nginx:
		return s.startRelay("nginx.conf", func(file string) []string { return peers.Nginx{}.Command(program, file) })
	}
	return nil
}

func (s *site) loadRuleset(ctx context.Context, nft string) error {
	cmd := s.LB.Command(ctx, nft, "-f", "-")
	cmd.Stdin = strings.NewReader(s.config(&s.Site))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("nft -f: %w: %s", err, out)
	}
	return nil
}

// startTime is how long a balancer may take to be ready: nlb looks after its
// targets first.
const startTime = 20 * time.Second

func (s *site) startNLB(ctx context.Context, program string) error {
	cmd, err := s.NLB(program, s.config(&s.Site))
	if err != nil {
		return err
	}
	if err := s.Start(alone(cmd)); err != nil {
		return fmt.Errorf("start: %w", err)
	}
	return s.AwaitNLB(ctx, startTime, measure.Forwards)
}

// startRelay starts a program by the command line for its file. Its life is the
// network's: the site's close ends it.
func (s *site) startRelay(file string, command func(file string) []string) error {
	if err := s.LB.Address("lo", netip.PrefixFrom(lab.VIP4, 32)); err != nil {
		return err
	}
	path, err := s.Write(file, s.config(&s.Site))
	if err != nil {
		return err
	}
	argv := command(path)
	if err := s.Start(alone(s.LB.Command(context.Background(), argv[0], argv[1:]...))); err != nil {
		return fmt.Errorf("start: %w", err)
	}
	return nil
}

// alone gives a balancer a session of its own, as nlb's relay always has, since
// the scheduler shares the core among sessions.
func alone(cmd *exec.Cmd) *exec.Cmd {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return cmd
}

// await waits until a connection comes through the balancer, as it should, and
// the kernel tracks it, or not, as it should.
func (s *site) await(ctx context.Context) error {
	err := s.Balancer.Await(ctx, startTime, func(context.Context) error { return s.try() })
	switch {
	case err == nil:
		return nil
	case s.Balancer.PID() == 0:
		return fmt.Errorf("waited in vain: %w", err)
	case errors.Is(err, measure.ErrEnded):
		return fmt.Errorf("it has ended: %s", s.Balancer.Said())
	}
	return fmt.Errorf("waited in vain: %w\n%s", err, s.Balancer.Said())
}

func (s *site) try() error {
	if err := s.Clients[0].Do(s.station.try); err != nil {
		return err
	}
	tracked, err := s.tracksVIP()
	if err == nil && tracked != s.tracked {
		err = fmt.Errorf("that connections are tracked on the balancer's node is %v", tracked)
	}
	return err
}

// tracksVIP says whether the kernel tracks any connection to the VIP on the
// balancer's node.
func (s *site) tracksVIP() (tracked bool, err error) {
	err = s.LB.Do(func() error {
		flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
		for _, f := range flows {
			tracked = tracked || f.Forward.DstIP.Equal(net.IP(lab.VIP4.AsSlice()))
		}
		return err
	})
	return tracked, err
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
	if s.Balancer.PID() != 0 && len(s.meter.balancer) == 0 {
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
