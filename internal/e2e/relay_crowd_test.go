package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nlb/bench/lab"
	"nlb/internal/wait"
)

// TestRelayCrowd has thousands of connections that say something once and are
// silent then. Others do not notice, and each takes little memory.
func TestRelayCrowd(t *testing.T) {
	t.Parallel()
	all := 4000
	if long() {
		all = 20_000
	}
	if room := connectionRoom(t); room < all {
		t.Logf("%d connections are not to be had: only root with CAP_SYS_RESOURCE may open enough files", all)
		all = room
	}
	top := routed(t, lab.Options{Clients: 2})
	serveHeaders(t, top.Targets, targetPort)
	d := serving(t, top, relaying(top, webPort, relayed("web", targetPort, targets(top.Targets...))))
	honest, crowd := top.Clients[0], top.Clients[1]
	empty := residentKiB(t, d.relay())
	churn, err := honest.Agent().Churn(soon(t), lab.Churn{Interval: 20 * time.Millisecond,
		Call: lab.Call{Network: "tcp", Dst: families[1].at(webPort), Parallel: 2, Timeout: patience}})
	if err != nil {
		t.Fatal(err)
	}
	h := hold(t, honest, webPort)
	var crowds []*lab.Flows
	for _, f := range families {
		const some = 1000
		for left := all / len(families); left > 0; left -= some {
			flows := held(t, crowd, lab.Call{Network: "tcp", Dst: f.at(webPort), N: min(some, left), Parallel: 50, Timeout: limit})
			named(t, "the crowd", flows.Opened, f.addr(top.LB))
			crowds = append(crowds, flows)
		}
	}
	full := residentKiB(t, d.relay())
	t.Logf("%d idle connections: %d MiB resident, %d MiB without them, %.1f KiB each", all, full>>10, empty>>10,
		float64(full-empty)/float64(all))
	const most = 400 << 10
	if full > most {
		t.Errorf("the relay has %d MiB resident", full>>10)
	}
	h.alive("there is a crowd", "t1", "t2")
	load, err := churn.Stop(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	if load.Failed > 0 || load.OK == 0 {
		t.Errorf("honest clients: %v", load)
	}
	t.Logf("honest clients meanwhile: %v", load)
	for _, flows := range crowds {
		if err := flows.Close(); err != nil {
			t.Fatal(err)
		}
	}
	wait.For(t, limit, "the crowd has left", func() error {
		active := 0
		for _, x := range d.group("web").Targets {
			active += int(*x.ActiveFlows)
		}
		if active > 100 { // the honest have less
			return fmt.Errorf("%d connections are there", active)
		}
		return nil
	})
}

// connectionRoom is how many connections a relay may have besides some others,
// each of which takes two files.
func connectionRoom(t *testing.T) int {
	t.Helper()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	const others = 2000 // files
	more := limit
	more.Max = max(limit.Max, 50_000)
	if unix.Setrlimit(unix.RLIMIT_NOFILE, &more) == nil { // some may, and the daemon inherits it
		limit = more
	}
	return int(min(limit.Max, 1<<20)-others) / 2
}

// residentKiB is the memory that a process has in use.
func residentKiB(t *testing.T, pid int) int {
	t.Helper()
	n, err := strconv.Atoi(strings.TrimSuffix(processStatus(t, pid, "VmRSS"), " kB"))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestRelayIsFull has more clients than the relay may have connections, because
// of its files or as it was told. Those that are too many wait, those that were
// there notice nothing, and when some leave, others take their places.
func TestRelayIsFull(t *testing.T) {
	t.Parallel()
	for name, how := range map[string]struct {
		before, options []string
		least, most     int // connections
	}{
		// Each has two files; some files are for other things.
		"files":           {before: []string{"prlimit", "--nofile=1024:1024"}, least: 300, most: 512},
		"max-connections": {options: []string{"--max-connections", "300"}, least: 300, most: 300},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			top := routed(t, lab.Options{})
			serveHeaders(t, top.Targets, targetPort)
			client := top.Clients[0]
			d := serving(t, top, relaying(top, webPort, relayed("web", targetPort, targets(top.Targets...))))
			d.startRelay(how.before, how.options...)
			h := hold(t, client, webPort)

			// All are accepted by the kernel. Whoever has a place is answered.
			const crowd = 600
			conns := make([]net.Conn, crowd)
			answers := make(chan int, crowd)
			for i := range conns {
				conn := connect(t, client, families[i%len(families)], webPort)
				conns[i] = conn
				if _, err := io.WriteString(conn, "who\n"); err != nil {
					t.Fatal(err)
				}
				go func() {
					if _, err := bufio.NewReader(conn).ReadString('\n'); err == nil {
						answers <- i
					}
				}()
			}
			served := map[int]bool{}
			gather := func() { // what was answered so far
				for len(answers) > 0 {
					served[<-answers] = true
				}
			}
			present := 0
			for _, flows := range h.flows {
				present += len(flows.Opened)
			}
			wait.For(t, limit, "some are served", func() error {
				if gather(); present+len(served) < how.least {
					return fmt.Errorf("%d", len(served))
				}
				return nil
			})
			h.alive("the relay is full", "t1", "t2")
			gather()
			places := len(served)
			if present+places > how.most {
				t.Errorf("%d connections are served, want %d at most", present+places, how.most)
			}
			// Each that leaves makes room, until all had their turn.
			wait.For(t, limit, "all that wait are served", func() error {
				gather()
				for i := range served {
					if conns[i] != nil {
						_ = conns[i].Close()
						conns[i] = nil
					}
				}
				if len(served) < crowd {
					return fmt.Errorf("%d of %d", len(served), crowd)
				}
				return nil
			})
			t.Logf("%d of %d clients had a place at once", places, crowd)
			h.alive("the crowd has left", "t1", "t2")
			for _, f := range families {
				got := replies(t, client, lab.Call{Network: "tcp", Dst: f.at(webPort), N: 20, Parallel: 5})
				named(t, "the crowd has left, IPv"+f.name, got, f.addr(top.LB))
			}
		})
	}
}

// TestRelayStorm has more clients than there is room for, who come again and again
// as fast as they can, for a minute with NLB_LONG=1. They take turns; those who
// have a connection notice nothing.
func TestRelayStorm(t *testing.T) {
	length := 5 * time.Second
	if long() {
		length = time.Minute
	}
	const stay, storm = 340, 400 // the latter of each family
	top := routed(t, lab.Options{Clients: 2})
	serveHeaders(t, top.Targets, targetPort)
	d := serving(t, top, relaying(top, webPort, relayed("web", targetPort, targets(top.Targets...))))
	d.startRelay([]string{"prlimit", "--nofile=1024:1024"})
	h := hold(t, top.Clients[0], webPort)
	// They leave room for some 25: files are for about 410 connections.
	for i := range stay {
		connect(t, top.Clients[1], families[i%len(families)], webPort)
	}
	var churns []*lab.Churning
	for _, f := range families {
		c, err := top.Clients[1].Agent().Churn(soon(t), lab.Churn{Interval: time.Millisecond,
			Call: lab.Call{Network: "tcp", Dst: f.at(webPort), Parallel: storm, Timeout: length + patience}})
		if err != nil {
			t.Fatal(err)
		}
		churns = append(churns, c)
	}
	begun := time.Now()
	for time.Since(begun) < length {
		h.alive("in the storm", "t1", "t2")
	}
	if !strings.Contains(d.log.String(), "as many connections as there may be") {
		t.Error("the relay was never full")
	}
	for i, c := range churns {
		load, err := c.Stop(soon(t))
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("IPv%s: %d connections in %v, %d failed, at most %v without one", families[i].name, load.OK, load.Elapsed.Round(time.Second), load.Failed, load.Gap)
		if load.Failed > 0 || load.OK < storm {
			t.Errorf("IPv%s: %v", families[i].name, load)
		}
	}
	h.alive("after the storm", "t1", "t2")
}
