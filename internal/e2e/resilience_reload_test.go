package e2e

import (
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"testing"
	"time"

	"nlb/bench/lab"
	"nlb/internal/wait"
)

// change is one of the files that TestReloadsUnderLoad goes through. Whatever n
// is, the first three targets and the listeners web and dns are there and let the
// client in.
func change(top *lab.Topology, n int) config {
	c := variant(top, n)
	modes := []string{"hairpin_snat", "snat", "preserve"}
	acls := [][]string{nil, {"203.0.113.0/24", "2001:db8:99::/64"}, {"0.0.0.0/0", "::/0"}, {"203.0.113.9", "2001:db8:99::9"}}
	web, dns := &c.Groups[0], &c.Groups[1]
	dns.Targets = targets(top.Targets[:3]...) // changes of one group's targets cost enough time
	web.ClientIP = modes[n/2%len(modes)]
	dns.ClientIP = modes[n/3%len(modes)]
	web.Targets[n%3] = web.Targets[n%3].weighed(1 + n%2)
	if n%5 == 0 {
		web.Stickiness = "source_ip"
	}
	for i := range c.Listeners {
		c.Listeners[i].Allow = ofFamily(c.Listeners[i].VIP, acls[n/4%len(acls)])
	}
	if n%7 == 0 { // a second group shares the listeners' flows
		more := pool("more", "TCP", "snat", targetPort, targets(top.Targets[:2]...))
		c.Groups = append(c.Groups, more)
		for i := range c.Listeners {
			if strings.HasPrefix(c.Listeners[i].Name, "web") {
				c.Listeners[i].Forward = []forward{{"web", 3}, {"more", 1}}
			}
		}
	}
	return c
}

// ofFamily are the prefixes of an address's family; the file may have both.
func ofFamily(addr string, prefixes []string) []string {
	var same []string
	for _, p := range prefixes {
		if strings.Contains(p, ":") == strings.Contains(addr, ":") {
			same = append(same, p)
		}
	}
	return same
}

// Two hundred reloads while clients connect all the time: targets, weights,
// listeners, modes, stickiness, ACLs and groups change. No connection fails, no
// flow of a target that stays is broken or moved.
func TestReloadsUnderLoad(t *testing.T) {
	reloads := 200
	if isRaced(t) {
		reloads = 60 // under the race detector a reload takes several times as long
	}
	top, d := served(t, lab.Options{Targets: 5}, 3)
	p := press(t, top)
	begun := time.Now()
	for n := range reloads {
		if err := d.reload(change(top, n).String()); err != nil {
			t.Fatalf("reload %d: %v", n, err)
		}
		if n%25 == 24 {
			p.check(fmt.Sprintf("after %d reloads", n+1))
		}
	}
	t.Logf("a reload took %v", (time.Since(begun) / time.Duration(reloads)).Round(time.Millisecond))
	if got := d.status().Apply; got.Generation != uint64(reloads)+1 || got.FailuresTotal != 0 {
		t.Errorf("%d configurations were put in force, %d passes failed", got.Generation, got.FailuresTotal)
	}
	d.waitAllHealthy()
	if err := d.planned(); err != nil {
		t.Error(err)
	}
	works(t, top, "after all reloads")
	t.Logf("%d new connections", p.end())
}

// SIGHUP reloads; a file that is broken by then leaves the former one in force.
func TestHangUpReloads(t *testing.T) {
	top, d := served(t, lab.Options{Targets: 3}, 3)
	const sighup = 1
	d.write(variant(top, 0).String())
	d.signal(sighup)
	wait.For(t, limit, "second configuration", func() error {
		if s := d.status(); s.Apply.Generation != 2 || len(s.Listeners) != 6 {
			return fmt.Errorf("configuration %d, %d listeners", s.Apply.Generation, len(s.Listeners))
		}
		return nil
	})
	s := listenForSilence(t, top.LB)
	d.write("listeners: [")
	d.signal(sighup)
	wait.For(t, limit, "the error", func() error {
		if !strings.Contains(d.log.String(), "reload failed, the former configuration stays in force") {
			return errors.New("not logged")
		}
		return nil
	})
	if now := d.status(); now.Apply.Generation != 2 || len(now.Listeners) != 6 || now.Apply.Error != "" {
		t.Errorf("in force now: %+v, %d listeners", now.Apply, len(now.Listeners))
	}
	if heard := s.heard(); heard != "" {
		t.Errorf("the kernel was written to:\n%s", heard)
	}
	works(t, top, "after a broken file")
}

// Hosts have other programs that change their own nftables all the time, such
// as container runtimes. Reloads get through nonetheless, and so does a start.
func TestReloadsBesideABusyStranger(t *testing.T) {
	top, d := served(t, lab.Options{Targets: 4}, 3)
	p := press(t, top)
	stop := busyStranger(t, top.LB)
	for n := range 10 {
		if err := d.reload(change(top, n).String()); err != nil {
			t.Errorf("reload %d: %v", n, err)
		}
	}
	d.kill()
	d.start()
	d.waitAllHealthy() // a verdict that comes now would be a change to plan
	if err := d.planned(); err != nil {
		t.Error(err)
	}
	if made := stop(); made < 20 {
		t.Errorf("%d foreign transactions only", made)
	}
	if got := d.status().Apply; got.DriftRepairsTotal != 0 {
		t.Errorf("%d repairs, although nobody touched the table", got.DriftRepairsTotal)
	}
	p.end()
}

// busyStranger makes twenty transactions a second in a table of its own until
// the returned function, which counts them, ends that.
func busyStranger(t *testing.T, n *lab.Node) (stop func() int) {
	t.Helper()
	cmd := n.Command(t.Context(), "nft", "-i")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var out logBuffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(in, "add table ip busy; add set ip busy s { type ipv4_addr; }\n"); err != nil {
		t.Fatal(err)
	}
	quit, made := make(chan struct{}), make(chan int)
	go func() {
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for n := 0; ; n++ {
			verb := []string{"add", "delete"}[n%2]
			if _, err := io.WriteString(in, verb+" element ip busy s { 192.0.2.7 }\n"); err != nil {
				made <- n
				return
			}
			select {
			case <-quit:
				made <- n
				return
			case <-tick.C:
			}
		}
	}()
	return func() int {
		close(quit)
		total := <-made
		_ = in.Close()
		var exit *exec.ExitError
		if err := cmd.Wait(); err != nil && !errors.As(err, &exit) {
			t.Error(err)
		}
		if total == 0 {
			t.Log(out.String())
		}
		return total
	}
}
