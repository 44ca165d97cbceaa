package e2e

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nlb/bench/lab"
	"nlb/internal/wait"
)

// relayServed is two services as served has them, of which the TCP one is
// relayed, and traffic.
func relayServed(t *testing.T) (*lab.Topology, *daemon) {
	t.Helper()
	top, c := relayedServices(t)
	return top, serving(t, top, c)
}

// relayedServices is what relayServed serves.
func relayedServices(t *testing.T) (*lab.Topology, config) {
	t.Helper()
	top := routed(t, lab.Options{Targets: 3})
	serveHeaders(t, top.Targets, targetPort)
	for _, n := range top.Targets {
		serveOn(t, n, lab.Serve{Ports: []uint16{targetPort}, Networks: []string{"udp"}})
	}
	c := twoServices(top, top.Targets...)
	for i := range c.Groups {
		if c.Groups[i].Name == "web" {
			c.Groups[i].ClientIP = "proxy_protocol_v2"
		} else { // what speaks UDP reads no header, and has no TCP to be probed by
			c.Groups[i].HealthCheck["port"] = targetPort
		}
	}
	return top, c
}

// gone waits until a process has ended, if it is not the test's own child, who
// has to be waited for.
func gone(t *testing.T, pid int) {
	t.Helper()
	wait.For(t, limit, fmt.Sprint("process ", pid, " ends"), func() error {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) || strings.Contains(string(stat), ") Z ") {
			return nil
		}
		return fmt.Errorf("%s %v", stat, err)
	})
}

// TestRelaySurvives stops and kills the daemon under load: the relay goes on, and
// the next daemon adopts it. It is nobody, and clear ends it.
func TestRelaySurvives(t *testing.T) {
	t.Parallel()
	top, d := relayServed(t)
	pid := d.relay()
	for key, want := range map[string]string{
		"Uid": "65534 65534 65534 65534", "Gid": "65534 65534 65534 65534", "Groups": "",
		"CapInh": "0000000000000000", "CapPrm": "0000000000000000", "CapEff": "0000000000000000", "CapAmb": "0000000000000000",
		"NoNewPrivs": "1",
	} {
		if got := processStatus(t, pid, key); got != want {
			t.Errorf("the relay's %s is %q, want %q", key, got, want)
		}
	}
	p := press(t, top)
	for _, end := range []struct {
		how  string
		ends func()
	}{{"killed", d.kill}, {"stopped", d.stop}} {
		for round := range 2 {
			when := fmt.Sprintf("serve was %s, round %d", end.how, round)
			end.ends()
			if now := d.relay(); now != pid {
				t.Fatalf("%s: relay %d follows %d", when, now, pid)
			}
			p.check(when)
			works(t, top, when)
			d.start()
			if now := d.relay(); now != pid {
				t.Fatalf("%s, and began again: relay %d follows %d", when, now, pid)
			}
			p.check(when + ", and began again")
			d.waitAllHealthy()
			if err := d.planned(); err != nil {
				t.Errorf("%s: %v", when, err)
			}
		}
	}
	t.Logf("%d new connections", p.end())

	early := held(t, top.Clients[0], lab.Call{Network: "tcp", Dst: families[0].at(webPort), N: 5})
	d.stop()
	if out := d.run("clear", "--state-dir", d.state("")); out.code != 0 {
		t.Errorf("clear: %+v", out)
	}
	gone(t, pid)
	if left := d.relays(); len(left) > 0 {
		t.Errorf("clear left the relays %v", left)
	}
	if listening := must(t, top.LB, "ss", "-Hltn", fmt.Sprint("sport = ", webPort)); listening != "" {
		t.Errorf("clear left %s", listening)
	}
	flows, err := early.Check(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range flows {
		if x.Now.Err == "" {
			t.Errorf("a connection goes on after clear: %+v", x)
		}
	}
	if _, err := os.Stat(d.relaySocket()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("clear left the relay's socket: %v", err)
	}
	d.start()
	d.waitAllHealthy()
	works(t, top, "after clear and another start")
}

// TestRelayIsKilled kills the relay while clients come: those it had are cut off,
// and those that come wait for the next one. None is refused.
func TestRelayIsKilled(t *testing.T) {
	t.Parallel()
	top, d := relayServed(t)
	client := top.Clients[0]
	const kills = 3
	for i := range kills {
		pid := d.relay()
		h := hold(t, client, webPort)
		var loads []*lab.Churning
		for _, f := range families {
			c, err := client.Agent().Churn(soon(t), lab.Churn{Interval: 5 * time.Millisecond,
				Call: lab.Call{Network: "tcp", Dst: f.at(webPort), Parallel: 2, Timeout: patience}})
			if err != nil {
				t.Fatal(err)
			}
			loads = append(loads, c)
		}
		before := time.Now()
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		// One that came before the death was complete may be cut off.
		wait.For(t, limit, "a client is served", func() error {
			got := call(t, client, lab.Call{Network: "tcp", Dst: families[0].at(webPort), Timeout: patience})
			if got.Failed > got.ByErr[lab.Reset]+got.ByErr[lab.Closed] {
				t.Errorf("kill %d: the first client: %v", i, got)
			}
			if got.OK == 0 {
				return errors.New(got.String())
			}
			return nil
		})
		took := time.Since(before)
		if took > patience {
			t.Errorf("kill %d: no client was served for %v", i, took)
		}
		wait.For(t, limit, "another relay", func() error {
			now, err := d.relayPID()
			if err == nil && now == pid {
				err = errors.New("the same")
			}
			return err
		})
		var gap time.Duration
		for _, c := range loads {
			l, err := c.Stop(soon(t))
			if err != nil {
				t.Fatal(err)
			}
			gap = max(gap, l.Gap)
			// At the moment of its death it had some connections.
			if cut := l.ByErr[lab.Reset] + l.ByErr[lab.Closed]; l.Failed > cut || cut > 4 || l.OK == 0 {
				t.Errorf("kill %d: %v", i, l)
			}
		}
		t.Logf("kill %d: a client that came at once was served after %v; no client was served for %v",
			i, took.Round(time.Millisecond), gap.Round(time.Millisecond))
		h.all("a flow goes on without its relay", []string{"t1", "t2", "t3"}, func(x lab.Flow) bool { return x.Broken() })
		works(t, top, fmt.Sprint("after kill ", i))
	}
	if err := d.planned(); err != nil {
		t.Error(err)
	}
}

// TestRelayUpgrades starts one relay after another under load. Each takes over
// from the one before, which finishes its connections.
func TestRelayUpgrades(t *testing.T) {
	t.Parallel()
	upgrades := 10
	if long() {
		upgrades = 50
	}
	top, d := relayServed(t)
	p := press(t, top)
	begun := time.Now()
	former := []int{d.relay()}
	for range upgrades {
		former = append(former, d.startRelay(nil))
		p.check(fmt.Sprintf("after %d upgrades", len(former)-1))
	}
	t.Logf("%d upgrades took %v", upgrades, time.Since(begun).Round(time.Millisecond))
	// The first has the held connections; those between have none and are gone.
	wait.For(t, limit, "those without connections end", func() error {
		alive := d.relays()
		alive = slices.DeleteFunc(alive, func(pid int) bool {
			stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			return strings.Contains(string(stat), ") Z ")
		})
		want := []int{former[0], former[upgrades]}
		slices.Sort(alive)
		slices.Sort(want)
		if !slices.Equal(alive, want) {
			return fmt.Errorf("%v are there, want %v", alive, want)
		}
		return nil
	})
	// Those of the first are counted and follow the table, through all of them.
	count := func() (flows uint64) {
		for _, x := range d.group("web").Targets {
			if x.ActiveFlows != nil {
				flows += *x.ActiveFlows
			}
		}
		return flows
	}
	wait.For(t, limit, "held flows are counted", func() error {
		if n := count(); n < uint64(len(families)*heldFlows) {
			return fmt.Errorf("%d", n)
		}
		return nil
	})
	t.Logf("%d new connections", p.end())
	// Its last connections ended.
	gone(t, former[0])
	if err := d.planned(); err != nil {
		t.Error(err)
	}
}

// TestRelayHangs stops the relay for a while, as a debugger or a lack of memory does:
// it is there and answers nothing. What the kernel does goes on: targets of another
// group that die are out of service, also while a reload waits for the relay, which
// comes to nothing. When the relay goes on it is told what it missed. One that does
// not is killed, and the next one serves.
func TestRelayHangs(t *testing.T) {
	t.Parallel()
	const plainPort, plainTarget = 81, 8081
	top := routed(t, lab.Options{Targets: 3})
	client, t1, t2 := top.Clients[0], top.Targets[0], top.Targets[1]
	headers := serveHeaders(t, top.Targets, targetPort)
	plain := make(map[string]*lab.Listeners)
	for _, n := range top.Targets {
		plain[n.Name] = serveOn(t, n, lab.Serve{Ports: []uint16{plainTarget}, Networks: []string{"tcp"}})
	}
	c := config{
		Sources: sources(top), VIPs: both(),
		Listeners: slices.Concat(listen("web", "TCP", webPort, "web"), listen("plain", "TCP", plainPort, "plain")),
		Groups: []group{
			pool("web", "TCP", "proxy_protocol_v2", targetPort, targets(top.Targets...)),
			pool("plain", "TCP", "preserve", plainTarget, targets(top.Targets...)),
		},
	}
	d := serving(t, top, c)
	pid := d.relay()
	signal := func(sig unix.Signal) {
		t.Helper()
		if err := unix.Kill(pid, sig); err != nil {
			t.Fatal(err)
		}
	}
	stop := func() (goOn func()) {
		signal(unix.SIGSTOP)
		goOn = sync.OnceFunc(func() { _ = unix.Kill(pid, unix.SIGCONT) }) // if it is still there
		t.Cleanup(goOn)
		return goOn
	}
	goOn := stop()
	dies := func(n *lab.Node, of map[string]*lab.Listeners) {
		t.Helper()
		if err := of[n.Name].Close(); err != nil {
			t.Fatal(err)
		}
	}
	avoid := func(port uint16, dead ...*lab.Node) {
		t.Helper()
		wait.For(t, limit, "new flows avoid the dead", func() error {
			for _, f := range families {
				got := call(t, client, lab.Call{Network: "tcp", Dst: f.at(port), N: 40, Parallel: 20})
				for _, n := range dead {
					if got.ByWho[n.Name] > 0 || got.Failed > 0 {
						return fmt.Errorf("port %d, IPv%s: %v", port, f.name, got)
					}
				}
			}
			return nil
		})
	}
	c.Groups[1].Targets = targets(top.Targets[1:]...)
	d.write(c.String())
	refused := make(chan output, 1)
	go func() { refused <- d.run("reload") }()
	dies(t1, plain)
	avoid(plainPort, t1)
	if out := <-refused; out.code != 1 || !strings.Contains(out.stderr, "relay worker does not answer") {
		t.Errorf("reload: %+v", out)
	}
	dies(t1, headers)
	dies(t2, plain)
	avoid(plainPort, t1, t2)
	if s := d.status(); !s.Apply.Held || !strings.Contains(s.Apply.Error, "relay worker has not answered for") {
		t.Errorf("status: %+v", s.Apply)
	}
	goOn()
	avoid(webPort, t1)
	if now := d.relay(); now != pid {
		t.Errorf("relay %d follows %d", now, pid)
	}
	if err := d.reload(c.String()); err != nil {
		t.Error(err)
	}
	if err := d.planned(); err != nil {
		t.Error(err)
	}
	// A daemon that begins meanwhile leaves all as it is, until the relay is gone.
	goOn = stop()
	d.kill()
	d.launch()
	wait.For(t, limit, "the daemon says what it waits for", func() error {
		s, err := d.ask()
		if err == nil && (s.Apply.Held || s.Apply.Error == "") {
			err = fmt.Errorf("%+v", s.Apply)
		}
		return err
	})
	avoid(plainPort, t1, t2)
	signal(unix.SIGKILL)
	goOn()
	d.converges()
	avoid(webPort, t1)
}
