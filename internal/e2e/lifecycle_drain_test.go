package e2e

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/bench/lab"
	"nlb/internal/wait"
)

// Ports of the life cycle tests' listeners.
const (
	cutPort  = 80 // flows are cut at the end
	snatPort = 81 // and their targets see the balancer
	livePort = 82 // flows are never cut
	latePort = 83 // flows are cut later, or would have been
)

// TestDrain deregisters one of two targets at run time, in groups that cut flows
// at the deadline and in one that does not, and registers it again.
func TestDrain(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{})
	serveTargets(t, top, targetPort)
	client, t1, t2 := top.Clients[0], top.Targets[0], top.Targets[1]
	all := []struct {
		name, mode string
		port       uint16
		terminate  bool
	}{
		{"cut", "preserve", cutPort, true},
		{"source", "snat", snatPort, true},
		{"kept", "preserve", livePort, false},
	}
	c := config{Sources: sources(top), VIPs: both()}
	var names []string
	for _, g := range all {
		p := pool(g.name, "TCP", g.mode, targetPort, targets(top.Targets...))
		p.Deregister = leaving(delay, g.terminate)
		c.Groups = append(c.Groups, p)
		c.Listeners = append(c.Listeners, listen(g.name, "TCP", g.port, g.name)...)
		names = append(names, g.name)
	}
	d := serving(t, top, c)
	holdings := map[string]*holding{}
	for _, g := range all {
		holdings[g.name] = hold(t, client, g.port)
	}
	talkers := map[string]*talker{}
	for _, g := range all {
		talkers[g.name] = talk(t, client, families[0].at(g.port), t1.Name)
	}
	w := watch(t, top)

	before := time.Now()
	drained := d.life("drain", t1, names...)
	for _, g := range all {
		holdings[g.name].alive("draining", t1.Name, t2.Name)
		avoided(t, "draining", client, g.port, 40, t1.Name)
		if err := d.stands(g.name, t1, balancer.Draining, balancer.ReasonDeregistrationInProgress); err != nil {
			t.Error(err)
		}
	}
	since := d.standing("cut", t1)[0].Since
	// Again, which does not begin anew.
	d.life("drain", t1, "cut")
	if err := d.reload(c.String()); err != nil {
		t.Error(err)
	}
	if now := d.standing("cut", t1)[0].Since; !now.Equal(since) {
		t.Errorf("a second drain moved its beginning from %v to %v", since, now)
	}
	if late := time.Since(before); late < delay {
		for _, h := range holdings {
			h.alive("draining", t1.Name, t2.Name)
		}
	} else {
		t.Errorf("the machine took %v for what should come before the deadline", late)
	}

	for _, g := range all {
		d.becomes(g.name, t1, balancer.Unused, balancer.ReasonNotRegistered)
		avoided(t, "drained", client, g.port, 40, t1.Name)
		h, x := holdings[g.name], talkers[g.name]
		if g.terminate {
			w.cut(g.name, h, t1.Name, before.Add(delay-slack), drained.Add(delay+slack))
			h.over("after the deadline", t1.Name)
			select {
			case <-x.ended:
				if end := before.Add(delay); !errors.Is(x.err, unix.ECONNRESET) || x.at.Before(end.Add(-slack)) || x.at.After(drained.Add(delay+slack)) {
					t.Errorf("%s: a busy flow ended %v after the deadline: %v", g.name, x.at.Sub(end), x.err)
				}
			case <-soon(t).Done():
				t.Errorf("%s: a busy flow goes on after the deadline", g.name)
			}
			w.reset(g.name+": a busy flow", families[0].at(g.port), []lab.Reply{x.flow}, before.Add(delay-slack), drained.Add(delay+slack))
		} else {
			w.spared(g.name, h, t1.Name)
			h.alive("after the deadline", t1.Name)
			select {
			case <-x.ended:
				t.Errorf("%s: a busy flow ended: %v", g.name, x.err)
			default:
			}
		}
		w.spared(g.name, h, t2.Name)
		h.alive("after the deadline", t2.Name)
	}
	w.leaks()
	// There is nothing to change, and plan says what the file does not.
	wait.For(t, limit, "a plan of overrides alone", func() error {
		out := d.run("plan", "-c", d.config, "--state-dir", d.state(""))
		if n := strings.Count(out.stdout, "# override: "); out.code != 0 || n != len(all)*len(families) || n != strings.Count(out.stdout, "\n") {
			return fmt.Errorf("%+v, want %d overrides", out, len(all)*len(families))
		}
		return nil
	})

	d.life("undrain", t1, names...)
	d.waitAllHealthy()
	for _, g := range all {
		reached(t, "registered again", client, g.port, t1.Name)
	}
	holdings["kept"].alive("registered again", t1.Name, t2.Name)
}

// TestDrainSurvivesACrash kills the daemon while targets drain, in one group
// before the deadline and in the other until after it.
func TestDrainSurvivesACrash(t *testing.T) {
	t.Parallel()
	for name, missed := range map[string]bool{"back before the deadline": false, "back after the deadline": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			top := routed(t, lab.Options{})
			serveTargets(t, top, targetPort)
			client, t1, t2 := top.Clients[0], top.Targets[0], top.Targets[1]
			g := pool("web", "TCP", "preserve", targetPort, targets(top.Targets...))
			g.Deregister = leaving(delay, true)
			d := serving(t, top, config{
				Sources: sources(top), VIPs: both(), Listeners: listen("web", "TCP", cutPort, "web"), Groups: []group{g},
			})
			h := hold(t, client, cutPort)
			w := watch(t, top)
			before := time.Now()
			drained := d.life("drain", t1, "web")
			d.kill()
			avoided(t, "nobody is there", client, cutPort, 40, t1.Name)
			if missed {
				wait.For(t, limit, "the deadline", func() error {
					if left := time.Until(drained.Add(delay)); left > 0 {
						return fmt.Errorf("%v left", left)
					}
					return nil
				})
				h.alive("nobody is there to cut it", t1.Name)
				before, drained = time.Now(), time.Now().Add(slack)
				d.start()
				// From the moment that the daemon is back.
				w.cut("missed", h, t1.Name, before, time.Now().Add(slack))
			} else {
				d.start()
				if err := d.stands("web", t1, balancer.Draining, balancer.ReasonDeregistrationInProgress); err != nil && time.Since(before) < delay {
					t.Error(err)
				}
				w.cut("in time", h, t1.Name, before.Add(delay-slack), drained.Add(delay+slack))
			}
			d.becomes("web", t1, balancer.Unused, balancer.ReasonNotRegistered)
			h.over("after the deadline", t1.Name)
			avoided(t, "drained", client, cutPort, 40, t1.Name)
			h.alive("after the deadline", t2.Name)
			w.spared("the other target", h, t2.Name)
			// What is over is not begun again by the next start.
			d.kill()
			d.start()
			if err := d.stands("web", t1, balancer.Unused, balancer.ReasonNotRegistered); err != nil {
				t.Error(err)
			}
			h.alive("after another start", t2.Name)
		})
	}
}

// TestDrainRefusals has drains that name nothing, or not enough.
func TestDrainRefusals(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Targets: 1})
	serveTargets(t, top, 8080, 8081)
	t1 := top.Targets[0]
	addr4, addr6 := t1.Addr4.String(), t1.Addr6.String()
	var twice []target
	for _, f := range families {
		twice = append(twice, target{Address: f.addr(t1), Port: 8080}, target{Address: f.addr(t1), Port: 8081})
	}
	d := serving(t, top, config{
		Sources: sources(top), VIPs: both(),
		Listeners: append(listen("web", "TCP", 80, "web"), listen("two", "TCP", 81, "two")...),
		Groups: []group{
			pool("web", "TCP", "preserve", 8080, targets(t1)),
			pool("two", "TCP", "preserve", 8080, twice),
		},
	})
	const usage = 2
	for _, verb := range []string{"drain", "undrain"} {
		for _, tt := range []struct {
			args  []string
			usage bool
			says  []string
		}{
			{args: []string{"nobody", addr4}, says: []string{"nobody"}},
			{args: []string{"web", "10.0.1.99"}, says: []string{"10.0.1.99", "web"}},
			{args: []string{"web", addr4 + ":9999"}, says: []string{addr4 + ":9999", "web"}},
			{args: []string{"two", addr4}, says: []string{addr4, "8080", "8081"}},
			{args: []string{"two", addr6}, says: []string{addr6, "8080", "8081"}},
			{args: []string{"web", "t1"}, says: []string{"t1"}},
			{args: []string{"web", addr4 + ":99999"}, says: []string{"99999"}},
			{args: []string{"web", addr4 + ":"}, says: []string{addr4 + ":"}},
			{args: []string{"web", ""}},
			{args: []string{"web"}, usage: true},
			{args: nil, usage: true},
			{args: []string{"web", addr4, addr6}, usage: true},
		} {
			out := d.override(verb, tt.args...)
			if out.code != 1 && out.code != usage || tt.usage && out.code != usage || out.stdout != "" {
				t.Errorf("nlb %s %q: exit %d, stdout %q", verb, tt.args, out.code, out.stdout)
			}
			if !strings.HasPrefix(out.stderr, "nlb: ") || strings.Count(strings.TrimSpace(out.stderr), "\n") > 3 {
				t.Errorf("nlb %s %q is not clear: %q", verb, tt.args, out.stderr)
			}
			for _, word := range tt.says {
				if !strings.Contains(out.stderr, word) {
					t.Errorf("nlb %s %q does not say %s: %q", verb, tt.args, word, out.stderr)
				}
			}
		}
	}
	for _, name := range []string{"web", "two"} {
		for _, x := range d.group(name).Targets {
			if x.State != balancer.Healthy {
				t.Errorf("a refused drain had an effect: %+v", x)
			}
		}
	}
	// With the port it is clear who is meant.
	for _, name := range []string{addr4 + ":8081", "[" + addr6 + "]:8081"} {
		if out := d.override("drain", "two", name); out.code != 0 {
			t.Errorf("drain of %s: %+v", name, out)
		}
	}
	for _, x := range d.group("two").Targets {
		if want := map[uint16]balancer.State{8080: balancer.Healthy, 8081: balancer.Draining}[x.Port]; x.State != want {
			t.Errorf("%v is %v, want %v", x.AddrPort(), x.State, want)
		}
	}
	d.stop()
	if out := d.override("drain", "web", addr4); out.code != 1 || !strings.Contains(out.stderr, d.socket) {
		t.Errorf("without a daemon: %+v", out)
	}
}

// TestRemovalDrains takes a target out of the file. It drains as with nlb drain,
// whatever happens meanwhile, and is forgotten; one that comes back is not.
func TestRemovalDrains(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{})
	serveTargets(t, top, targetPort)
	client, t1, t2 := top.Clients[0], top.Targets[0], top.Targets[1]
	ports := map[string]uint16{"cut": cutPort, "kept": livePort, "back": latePort}
	names := []string{"cut", "kept", "back"}
	// file has the target in the last n groups only.
	file := func(n int) config {
		c := config{Sources: sources(top), VIPs: both()}
		for i, name := range names {
			in := top.Targets
			if i < len(names)-n {
				in = in[1:]
			}
			p := pool(name, "TCP", "preserve", targetPort, targets(in...))
			p.Deregister = leaving(delay, name != "kept")
			c.Groups = append(c.Groups, p)
			c.Listeners = append(c.Listeners, listen(name, "TCP", ports[name], name)...)
		}
		return c
	}
	d := serving(t, top, file(len(names)))
	holdings := map[string]*holding{}
	for _, name := range names {
		holdings[name] = hold(t, client, ports[name])
	}
	w := watch(t, top)

	before := time.Now()
	if err := d.reload(file(0).String()); err != nil {
		t.Fatal(err)
	}
	removed := time.Now()
	for _, name := range names {
		if err := d.stands(name, t1, balancer.Draining, balancer.ReasonDeregistrationInProgress); err != nil {
			t.Error(err)
		}
		avoided(t, "removed", client, ports[name], 20, t1.Name)
	}
	if err := d.reload(file(1).String()); err != nil {
		t.Fatal(err)
	}
	d.kill()
	d.start()
	changed := file(1)
	changed.Groups[0].Targets[0] = changed.Groups[0].Targets[0].weighed(7)
	if err := d.reload(changed.String()); err != nil {
		t.Fatal(err)
	}
	if late := time.Since(before); late < delay {
		for _, h := range holdings {
			h.alive("draining", t1.Name, t2.Name)
		}
		wait.For(t, limit, "nothing to change", d.planned)
	} else {
		t.Errorf("the machine took %v for what should come before the deadline", late)
	}

	w.cut("removed", holdings["cut"], t1.Name, before.Add(delay-slack), removed.Add(delay+slack))
	holdings["cut"].over("after the deadline", t1.Name)
	d.disappears("cut", t1)
	d.disappears("kept", t1)
	holdings["kept"].alive("after the deadline", t1.Name)
	w.spared("kept", holdings["kept"], t1.Name)
	d.becomes("back", t1, balancer.Healthy, "")
	reached(t, "back", client, ports["back"], t1.Name)
	holdings["back"].alive("after the deadline that there would have been", t1.Name)
	w.spared("back", holdings["back"], t1.Name)
	for _, name := range names {
		w.spared(name, holdings[name], t2.Name)
		holdings[name].alive("after the deadline", t2.Name)
	}
	w.leaks()
	wait.For(t, limit, "nothing to change", d.planned)
}

// TestRemovedWhileDown takes a target, and a group with its listener, out of the
// file while no daemon runs. They drain from when the next one begins, whatever
// happens to that one.
func TestRemovedWhileDown(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{})
	serveTargets(t, top, targetPort)
	client, t1, t2 := top.Clients[0], top.Targets[0], top.Targets[1]
	ports := map[string]uint16{"cut": cutPort, "kept": livePort, "gone": latePort}
	file := func(nodes []*lab.Node, names ...string) config {
		c := config{Sources: sources(top), VIPs: both()}
		for _, name := range names {
			p := pool(name, "TCP", "preserve", targetPort, targets(nodes...))
			p.Deregister = leaving(delay, name != "kept")
			c.Groups = append(c.Groups, p)
			c.Listeners = append(c.Listeners, listen(name, "TCP", ports[name], name)...)
		}
		return c
	}
	d := serving(t, top, file(top.Targets, "cut", "kept", "gone"))
	holdings := map[string]*holding{}
	for name, port := range ports {
		holdings[name] = hold(t, client, port)
	}
	w := watch(t, top)
	left := map[string][]*lab.Node{"cut": {t1}, "kept": {t1}, "gone": {t1, t2}}

	d.kill()
	d.write(file(top.Targets[1:], "cut", "kept").String())
	wait.For(t, limit, "longer than the delay", passed(time.Now().Add(delay)))
	for _, h := range holdings {
		h.alive("nobody is there", t1.Name, t2.Name)
	}
	before := time.Now()
	d.start()
	began := time.Now()
	// Another crash does not prolong what has begun.
	d.kill()
	d.start()
	for name, nodes := range left {
		for _, n := range nodes {
			if err := d.stands(name, n, balancer.Draining, balancer.ReasonDeregistrationInProgress); err != nil {
				t.Error(err)
			}
			for _, x := range d.standing(name, n) {
				if !x.Removed {
					t.Errorf("%s: %v is not said to have been removed", name, x.AddrPort())
				}
			}
		}
	}
	for _, name := range []string{"cut", "kept"} {
		avoided(t, "removed", client, ports[name], 20, t1.Name)
	}
	if late := time.Since(before); late < delay {
		for _, h := range holdings {
			h.alive("draining", t1.Name, t2.Name)
		}
		wait.For(t, limit, "nothing to change", d.planned)
	} else {
		t.Errorf("the machine took %v for what should come before the deadline", late)
	}

	for _, name := range []string{"cut", "gone"} {
		for _, n := range left[name] {
			w.cut("removed", holdings[name], n.Name, before.Add(delay-slack), began.Add(delay+slack))
			holdings[name].over("after the deadline", n.Name)
		}
	}
	d.disappears("cut", t1)
	d.disappears("kept", t1)
	holdings["kept"].alive("after the deadline", t1.Name, t2.Name)
	w.spared("kept", holdings["kept"], t1.Name)
	holdings["cut"].alive("after the deadline", t2.Name)
	w.spared("cut", holdings["cut"], t2.Name)
	avoided(t, "after the deadline", client, cutPort, 20, t1.Name)
	w.leaks()
	wait.For(t, limit, "nothing to change", d.planned)
	// What is over is not begun again by the next start.
	d.kill()
	d.start()
	for name := range left {
		if name != "gone" && len(d.standing(name, t1)) > 0 {
			t.Errorf("%s: %v", name, d.standing(name, t1))
		}
	}
	holdings["kept"].alive("after another start", t1.Name, t2.Name)
}

// passed fails until a moment has come.
func passed(at time.Time) func() error {
	return func() error {
		if left := time.Until(at); left > 0 {
			return fmt.Errorf("%v left", left)
		}
		return nil
	}
}

// TestRegistrationsAreForgotten has a start that finds a damaged list of what was
// registered, and one after nlb clear, with which flows ended: neither drains.
func TestRegistrationsAreForgotten(t *testing.T) {
	t.Parallel()
	const list = "targets.json"
	top, d := served(t, lab.Options{Targets: 3}, 3)
	without := func(nodes ...*lab.Node) {
		t.Helper()
		d.write(twoServices(top, nodes...).String())
		d.start()
		for _, name := range []string{"web", "dns"} {
			if n := len(d.group(name).Targets); n != len(nodes)*len(families) {
				t.Errorf("%s has %d targets: %+v", name, n, d.group(name).Targets)
			}
		}
	}
	d.kill()
	if err := os.WriteFile(d.state(list), []byte(`[{"name"`), 0o600); err != nil {
		t.Fatal(err)
	}
	without(top.Targets[:2]...)
	if said := d.log.String(); !strings.Contains(said, d.state(list)) {
		t.Errorf("no warning names %s:\n%.3000s", d.state(list), said)
	}
	d.stop()
	key := read(d.state("hash.key"))
	if text := read(d.state(list)); !strings.Contains(text, top.Targets[1].Addr4.String()) || strings.Contains(text, top.Targets[2].Addr4.String()) {
		t.Errorf("%s: %s", list, text)
	}
	if out := d.run("clear", "--state-dir", d.state("")); out.code != 0 {
		t.Fatalf("clear: %+v", out)
	}
	if _, err := os.Stat(d.state(list)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s after a clear: %v", list, err)
	}
	without(top.Targets[0])
	if now := read(d.state("hash.key")); now != key {
		t.Errorf("another hash key after a clear: %q, was %q", now, key)
	}
}
