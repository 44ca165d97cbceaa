package relay

import (
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"testing"

	"go.uber.org/zap/zaptest"

	"nlb/balancer"
	"nlb/balancer/maglev"
	"nlb/balancer/nft"
)

// twoPools is a table with a service per VIP that chooses between two pools of
// three destinations of each family.
func twoPools(mode balancer.ClientIP, sticky bool) *balancer.Table {
	t := tableOf(nil, vip4, vip6)
	t.Sources, t.Pools = nil, nil
	for i, name := range []string{"blue", "green"} {
		p := balancer.Pool{Name: name, Protocols: []uint8{balancer.ProtoTCP}, ClientIP: mode, Sticky: sticky}
		for n := range 3 {
			for _, a := range []netip.Addr{target4, target6} {
				p.Destinations = append(p.Destinations, balancer.Destination{
					Address: a, Port: uint16(8500 + 10*i + n), Weight: n, // one of them drains
					Domain: []netip.Prefix{netip.PrefixFrom(a, a.BitLen())},
				})
			}
		}
		t.Pools = append(t.Pools, p)
	}
	for i := range t.Services {
		s := &t.Services[i]
		s.Name, s.Sticky = fmt.Sprint("service", i), sticky
		s.Allow = everybody[i : i+1]
		s.Pools = []balancer.WeightedPool{{Pool: "blue", Weight: 3}, {Pool: "green", Weight: 2}}
		t.VIPs = append(t.VIPs, s.Address)
	}
	return t
}

// TestChoosesAsTheKernel lets nftables send connections by a table, and asks the
// relay's plan of the same table where they should have gone.
func TestChoosesAsTheKernel(t *testing.T) {
	for _, sticky := range []bool{false, true} {
		t.Run(fmt.Sprintf("sticky %v", sticky), func(t *testing.T) {
			kernelTable := twoPools(balancer.Preserve, sticky)
			fail(kernelTable)
			for _, p := range kernelTable.Pools {
				for _, d := range p.Destinations {
					answerWithAddress(t, d.AddrPort())
				}
			}
			program(t, kernelTable)
			relayTable := twoPools(balancer.ProxyProtocolV2, sticky)
			fail(relayTable)
			p, err := compile(relayTable, nil, 1)
			if err != nil {
				t.Fatal(err)
			}
			seen := make(map[string]int)
			for _, s := range p.services {
				for range 60 {
					c := call(t, s.vip)
					buf := make([]byte, 100)
					n, err := c.Read(buf)
					if err != nil {
						t.Fatal(err)
					}
					in, hash := s.choose(c.LocalAddr().(*net.TCPAddr).AddrPort())
					want := in.family(s.vip.Addr()).next(hash, nil).target.key.AddrPort.String()
					if got := string(buf[:n]); got != want {
						t.Errorf("%v went to %s, and the relay chooses %s", c.LocalAddr(), got, want)
					}
					seen[want]++
					c.Close()
				}
			}
			if !sticky && len(seen) != 6 {
				t.Errorf("%d targets were chosen: %v", len(seen), seen)
			}
		})
	}
}

// fail has the health of one target of four be against it: its hashes lead
// elsewhere.
func fail(t *balancer.Table) {
	d := &t.Pools[0].Destinations[4]
	d.Weight, d.Kept = 0, d.Weight
	d = &t.Pools[1].Destinations[3]
	d.Weight, d.Kept = 0, d.Weight
}

// program gives the table to nftables until the test ends.
func program(t *testing.T, table *balancer.Table) {
	t.Helper()
	d, err := nft.New(zaptest.NewLogger(t), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.Close()
		if out, err := exec.Command("nft", "delete", "table", "inet", "nlb").CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	plan, err := d.Plan(t.Context(), &balancer.Desired{Table: table})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Apply(t.Context(), plan); err != nil {
		t.Fatal(err)
	}
}

// answerWithAddress tells who connects whom it reached.
func answerWithAddress(t *testing.T, at netip.AddrPort) {
	t.Helper()
	l := listen(t, at)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = fmt.Fprint(c, at)
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
}

func TestChooseGolden(t *testing.T) {
	table := twoPools(balancer.ProxyProtocolV2, false)
	p, err := compile(table, nil, 1)
	if err != nil {
		t.Fatal(err)
	}
	s := p.services[vip4]
	key := []byte{203, 0, 113, 9, 198, 51, 100, 10, 0x9c, 0x40, 0, 0, 0, 80, 0, 0, 6, 0, 0, 0}
	if got, want := s.flow(port(client4, 40000)).Hash(false, 7), maglev.JHash(key, 7); got != want {
		t.Errorf("hash %#x, want %#x", got, want)
	}
	if got, want := s.flow(port(client4, 40000)).Hash(true, 7), maglev.JHash(key[:4], 7); got != want {
		t.Errorf("sticky hash %#x, want %#x", got, want)
	}
}

func TestOtherPoolsAreNotRelayed(t *testing.T) {
	table := twoPools(balancer.ProxyProtocolV2, false)
	table.Pools[1].ClientIP = balancer.SNAT
	p, err := compile(table, nil, 1)
	if err != nil {
		t.Fatal(err)
	}
	for i := range uint16(200) {
		in, _ := p.services[vip4].choose(port(client4, 1000+i))
		if in != nil && in.name != "blue" {
			t.Fatalf("chose %s", in.name)
		}
	}
}

func TestSlotsAreKept(t *testing.T) {
	table := twoPools(balancer.ProxyProtocolV2, false)
	first, err := compile(table, nil, 1)
	if err != nil {
		t.Fatal(err)
	}
	first.targets[balancer.TargetKey{Group: "blue", AddrPort: port(target4, 8501)}].tallies[0].bytes = 7
	table.Pools[1].Destinations[2].Weight = 0
	second, err := compile(table, first, 1)
	if err != nil {
		t.Fatal(err)
	}
	same := func(pool string) bool {
		return &first.pools[pool].families[0].slots[0] == &second.pools[pool].families[0].slots[0]
	}
	if !same("blue") || same("green") {
		t.Errorf("kept: blue %v, green %v", same("blue"), same("green"))
	}
	if second.targets[balancer.TargetKey{Group: "blue", AddrPort: port(target4, 8501)}].tallies[0].bytes != 7 {
		t.Error("a target's counters were lost")
	}
}

func TestAllows(t *testing.T) {
	table := tableOf(nil, vip4)
	var allow []netip.Prefix
	for _, p := range []string{"203.0.113.0/24", "10.0.0.0/8", "203.0.113.64/26", "192.0.2.1/32"} {
		allow = append(allow, netip.MustParsePrefix(p))
	}
	table.Services[0].Allow = balancer.Aggregate(allow)
	p, err := compile(table, nil, 1)
	if err != nil {
		t.Fatal(err)
	}
	for client, want := range map[string]bool{
		"203.0.113.0": true, "203.0.113.70": true, "203.0.113.200": true, "203.0.114.0": false, "9.255.255.255": false,
		"10.255.0.1": true, "11.0.0.0": false, "192.0.2.1": true, "192.0.2.2": false, "1.1.1.1": false, "255.0.0.1": false,
	} {
		if got := p.services[vip4].allows(netip.MustParseAddr(client)); got != want {
			t.Errorf("%s: %v", client, got)
		}
	}
	table.Services[0].Allow = nil
	if p, err = compile(table, nil, 1); err != nil || p.services[vip4].allows(client4) {
		t.Errorf("nobody is allowed, but %v was (%v)", client4, err)
	}
}

func TestUnknownPool(t *testing.T) {
	table := tableOf(nil, vip4)
	table.Services[0].Pools[0].Pool = "nowhere"
	_, err := compile(table, nil, 1)
	if want := `service "198.51.100.10:80": there is no pool "nowhere"`; err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
	table.Services[0].Protocols = []uint8{balancer.ProtoUDP}
	_, err = compile(table, nil, 1)
	if want := `service "198.51.100.10:80": only TCP can be relayed`; err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
}
