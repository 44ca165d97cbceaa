package counting

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"nlb/bench/lab"
	"nlb/bench/measure"
	"nlb/bench/part"
)

const (
	targets = 2
	many    = 1000 // listeners, where there are many
)

// A Way is one way from a client to a target.
type Way struct {
	Name string
	// Against is the way that does the same job with the least, by name; empty for
	// none.
	Against string
	// commands are a script for the balancer and ruleset is for nft -f, with VIP,
	// T0 and T1 for the addresses.
	commands, ruleset string
	// nlb is what nlb is told. Without a mode, and without commands and a ruleset,
	// the balancer is only a router and clients know the targets.
	nlb measure.Forwarding
	// masked is for those where targets see the balancer and not the client.
	masked bool
	// fast is for those with a flowtable.
	fast bool
	// here has the balancer's own sockets for a target.
	here bool
}

// routes says whether clients know the targets, and no VIP.
func (w *Way) routes() bool { return w.commands == "" && w.ruleset == "" && w.nlb.ClientIP == "" }

// Ways that no other benchmark has. The others have the names of bench/part.
const (
	Here        = "sockets on the balancer"
	directAgain = "direct routing, again"
	trackedSNAT = "IPVS mh + conntrack + masquerade"
	fastSNAT    = "nftables DNAT + masquerade + flowtable"
)

// Ways are all, in the order in which they are shown. They begin with the sender
// and the receiver alone and go on with the way that all others are compared with.
// The last is that one again: it shows how much two equal things differ within a
// boot.
var Ways = []Way{
	{Name: Here, here: true},
	{Name: part.Direct},
	{Name: part.MinimalDNAT, ruleset: rulesDNAT},
	{Name: part.Preserve, Against: part.MinimalDNAT, nlb: onNFT("preserve", 1)},
	{Name: "nlb preserve, 1000 listeners", Against: part.MinimalDNAT, nlb: onNFT("preserve", many)},
	{Name: part.Hairpin, Against: part.MinimalDNAT, nlb: onNFT("hairpin_snat", 1)},
	{Name: part.MinimalSNAT, masked: true, ruleset: rulesSNAT},
	{Name: part.SNAT, Against: part.MinimalSNAT, masked: true, nlb: onNFT("snat", 1)},
	{Name: part.MinimalFast, fast: true, ruleset: rulesFast},
	{Name: part.PreserveFast, Against: part.MinimalFast, fast: true, nlb: withFlowtable("preserve")},
	{Name: fastSNAT, masked: true, fast: true, ruleset: rulesFastSNAT},
	{Name: "nlb snat with flowtable", Against: fastSNAT, masked: true, fast: true, nlb: withFlowtable("snat")},
	{Name: part.IPVS, commands: commandsIPVS},
	{Name: part.TrackedIPVS, commands: commandsTracked, ruleset: rulesTracked},
	{Name: part.PreserveIPVS, Against: part.TrackedIPVS, nlb: onIPVS("preserve", 1)},
	{Name: "nlb preserve on IPVS, 1000 listeners", Against: part.TrackedIPVS, nlb: onIPVS("preserve", many)},
	{Name: trackedSNAT, masked: true, commands: commandsTracked, ruleset: rulesTrackedSNAT},
	{Name: part.SNATIPVS, Against: trackedSNAT, masked: true, nlb: onIPVS("snat", 1)},
	{Name: directAgain},
}

func onNFT(clientIP string, listeners int) measure.Forwarding {
	return measure.Forwarding{Dataplane: "nftables", ClientIP: clientIP, Listeners: listeners}
}

func withFlowtable(clientIP string) measure.Forwarding {
	f := onNFT(clientIP, 1)
	f.Flowtable = true
	return f
}

func onIPVS(clientIP string, listeners int) measure.Forwarding {
	return measure.Forwarding{Dataplane: "ipvs", ClientIP: clientIP, Listeners: listeners}
}

// find is the way of a name. It is an error if there is none.
func find(name string) (*Way, error) {
	for i := range Ways {
		if Ways[i].Name == name {
			return &Ways[i], nil
		}
	}
	return nil, fmt.Errorf("there is no way %q", name)
}

// known is find for the names that this package itself uses.
func known(name string) *Way {
	w, err := find(name)
	if err != nil {
		panic("counting: " + err.Error())
	}
	return w
}

// A site is a way made real: a network and what is in it.
type site struct {
	*Way
	measure.Site
	servers []*lab.Node // who has the sockets: the targets, usually
	sockets measure.Sockets
}

// newSite builds the network of a way, which is ready for traffic then. nlb has
// ended: the kernel goes on by itself, and nobody else uses the processor.
func newSite(ctx context.Context, w *Way, program string) (*site, error) {
	s := &site{Way: w}
	err := s.build()
	if err == nil && w.nlb.ClientIP != "" {
		err = s.install(ctx, program)
	}
	if err == nil && w.commands != "" {
		err = s.enter(ctx, s.commands, "sh", "-e")
	}
	if err == nil && w.ruleset != "" {
		err = s.enter(ctx, s.ruleset, "nft", "-f", "-")
	}
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

func (s *site) build() error {
	if err := s.Build(lab.Options{Targets: targets, Offload: true}); err != nil {
		return err
	}
	s.servers = s.Targets
	if s.here {
		s.servers = []*lab.Node{s.LB}
	}
	for _, n := range s.servers {
		if err := n.Do(func() error { return s.sockets.Listen(n.Addr4) }); err != nil {
			return fmt.Errorf("%s: %w", n.Name, err)
		}
	}
	return nil
}

// close removes the network and all in it, complete or not.
func (s *site) close() error {
	s.sockets.Close()
	return s.Close()
}

// enter gives a text, with this network's addresses, to a command on the balancer.
func (s *site) enter(ctx context.Context, text string, command ...string) error {
	cmd := s.LB.Command(ctx, command[0], command[1:]...)
	cmd.Stdin = strings.NewReader(s.Expand(text))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", command[0], err, out)
	}
	return nil
}

// patience is how long nlb may take to begin and to end, by the guest's clock: a
// minute for as many instructions as a server executes in one.
const patience = time.Minute

// install has nlb forward to all targets, and ends it.
func (s *site) install(ctx context.Context, program string) error {
	if err := s.StartNLB(ctx, program, s.Config(s.nlb), patience); err != nil {
		return err
	}
	if err := s.Balancer.Signal(unix.SIGTERM); err != nil {
		return fmt.Errorf("end nlb: %w", err)
	}
	err := s.Balancer.Await(ctx, patience, func(context.Context) error { return errors.New("nlb still runs") })
	if !errors.Is(err, measure.ErrEnded) {
		return fmt.Errorf("%w\n%s", err, s.Balancer.Said())
	}
	return nil
}

// checkOffloaded fails if there is a flowtable and not so many UDP flows are in it.
func (s *site) checkOffloaded(flows int) error {
	if !s.fast {
		return nil
	}
	out, err := s.LB.Command(context.Background(), "conntrack", "-L", "-p", "udp").Output()
	if err != nil {
		return fmt.Errorf("list UDP flows: %w", err)
	}
	if got := strings.Count(string(out), "[OFFLOAD]"); got != flows {
		return fmt.Errorf("%d UDP flows are in the flowtable, not %d:\n%s", got, flows, out)
	}
	return nil
}

// address is where a client's flow from a port goes.
func (s *site) address(from int) unix.SockaddrInet4 {
	a := lab.VIP4
	if s.routes() {
		a = s.servers[from%len(s.servers)].Addr4
	}
	return unix.SockaddrInet4{Addr: a.As4(), Port: measure.Port}
}

// client is whom a target sees.
func (s *site) client() netip.Addr {
	if s.masked {
		return s.LB.Addr4
	}
	return s.Clients[0].Addr4
}
