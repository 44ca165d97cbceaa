package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"nlb/balancer"
)

// A conformity is one thing that a dataplane must do, shown with packets.
type conformity struct {
	name  string
	shows string    // for docs/conformance.md
	over  []flavour // what it is shown for; nil: all
	// needs adds to the configuration what the case needs, if that is anything.
	needs func(s *site, c *conformFile)
	run   func(x *trial)
	// otherwise shows what happens where a dataplane cannot do it; see cannot.
	otherwise func(x *trial)
	// taken says that a file which asks for it is not refused there.
	taken bool
}

// cannot lists the cases that a dataplane does not pass, and why. Each is checked
// to be refused, or to end as the reason says.
var cannot = map[balancer.Dataplane]map[string]string{
	balancer.IPVS: {
		"avoid-self":        "refused: IPVS cannot leave the client out of its choice",
		"shared-target":     "refused: IPVS has a destination once in a service",
		"idle-timeout":      "one for all: the longest of all listeners; `nlb plan` names those that want less",
		"dead-groups-share": "its flows go to the listener's other groups",
	},
}

// A flavour is a protocol and a family.
type flavour struct {
	network string // "tcp" or "udp"
	family
}

func (f flavour) String() string { return f.network + f.name }

// flavours are all there are; connections are those that the relay can take.
var flavours, connections = flavoursOf(networks...), flavoursOf("tcp")

func flavoursOf(networks ...string) (all []flavour) {
	for _, network := range networks {
		for _, f := range families {
			all = append(all, flavour{network, f})
		}
	}
	return all
}

// TestConformance shows what nlb does with the dataplane that NLB_DATAPLANE
// names, nftables by default. Every case can be run alone:
//
//	NLB_DATAPLANE=ipvs go test ./internal/e2e -run 'TestConformance$/drain$/tcp4'
func TestConformance(t *testing.T) {
	plane := balancer.NFTables
	if name := os.Getenv("NLB_DATAPLANE"); name != "" {
		if err := plane.UnmarshalText([]byte(name)); err != nil {
			t.Fatalf("NLB_DATAPLANE: %v", err)
		}
	}
	conform(t, plane)
}

// TestConformanceIPVS is the same with IPVS.
func TestConformanceIPVS(t *testing.T) {
	if !haveIPVS() {
		t.Skip("this kernel has no IPVS (module ip_vs)")
	}
	conform(t, balancer.IPVS)
}

// On a kernel without IPVS, the daemon says so and leaves nothing behind.
func TestRefusesWithoutIPVS(t *testing.T) {
	if haveIPVS() {
		t.Log("this kernel has IPVS: there is nothing to refuse")
		return
	}
	top := routed(t, labOfOne)
	c := conformFile{Dataplane: balancer.IPVS.String(), config: twoServices(top, top.Targets...)}
	d := prepare(t, top, c.String())
	d.launch()
	<-d.done
	d.cmd = nil
	if d.err == nil || !strings.Contains(d.log.String(), noIPVS) {
		t.Errorf("nlb serve without IPVS: %v, want %q\n%s", d.err, noIPVS, d.log)
	}
	if rules := must(t, top.LB, "nft", "list", "ruleset"); rules != "" {
		t.Errorf("the refused dataplane left rules behind:\n%s", rules)
	}
}

// noIPVS is what the program says, with the way out.
const noIPVS = "this kernel has no IPVS (module ip_vs): modprobe ip_vs, or use dataplane: nftables"

// haveIPVS reports whether the kernel has IPVS, or can load it.
func haveIPVS() bool {
	_ = exec.Command("modprobe", "ip_vs").Run() // there may be no modprobe, and nothing to load
	_, err := os.Stat("/proc/net/ip_vs")
	return err == nil
}

// conform shows all cases on one site: first those that change nothing, some at a
// time; then those that wait for what they changed, each in groups of its own, all
// at a time; and one after the other those that everybody notices.
func conform(t *testing.T, plane balancer.Dataplane) {
	t.Parallel()
	s := openSite(t, plane)
	s.show(t, 3, standing)
	s.turnTo(t, changing)
	s.show(t, len(changing), changing)
	s.turnTo(t, shaking)
	s.show(t, 1, shaking)
}

// cases are all cases in the order of the page.
func cases() (all []conformity) {
	for _, some := range [][]conformity{standing, changing, shaking} {
		all = append(all, some...)
	}
	return all
}

// show runs cases, so many at a time. These are subtests that wait, which is why
// there may be more of them than processors.
func (s *site) show(t *testing.T, atATime int, of []conformity) {
	places := make(chan struct{}, atATime)
	var wg sync.WaitGroup
	for i := range of {
		places <- struct{}{}
		wg.Go(func() {
			defer func() { <-places }()
			t.Run(of[i].name, func(t *testing.T) { s.try(t, &of[i]) })
		})
	}
	wg.Wait()
}

// try runs one case, or shows why it cannot be.
func (s *site) try(t *testing.T, c *conformity) {
	x := &trial{site: s, conformity: c, t: t, d: s.d.as(t)}
	defer func() {
		if t.Failed() {
			t.Log(x.d.dump()) // before the next cases change it
		}
	}()
	reason := cannot[s.plane][c.name]
	switch {
	case reason == "":
		c.run(x)
	case c.otherwise == nil:
		t.Fatalf("%v cannot, since %q, and nothing shows that", s.plane, reason)
	default:
		c.otherwise(x)
	}
}

// A trial is a case that runs.
type trial struct {
	*site
	*conformity
	t *testing.T
	d *daemon // its failures are this test's
}

// each runs a check for every flavour, as subtests.
func (x *trial) each(check func(x *trial, f flavour)) {
	over := x.over
	if over == nil {
		over = flavours
	}
	var wg sync.WaitGroup
	for _, f := range over {
		wg.Go(func() {
			x.t.Run(f.String(), func(t *testing.T) {
				one := *x
				one.t, one.d = t, x.site.d.as(t)
				check(&one, f)
			})
		})
	}
	wg.Wait()
}

// as is the daemon with another test's failures.
func (d *daemon) as(t *testing.T) *daemon {
	other := *d
	other.t = t
	return &other
}

// note labels what a failure is about.
func (x *trial) note(f flavour, what string) string {
	return fmt.Sprintf("%s, %v: %s", x.name, f, what)
}
