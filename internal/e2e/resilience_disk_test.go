package e2e

import (
	"errors"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/bench/lab"
	"nlb/internal/wait"
)

// TestStuckDisk has a disk that answers nothing. A drain that it knows of ends in
// time, although nobody can write that down, and a target that dies then is left
// out. What somebody asks for waits until the disk answers.
func TestStuckDisk(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Targets: 3})
	client, t1, t2, t3 := top.Clients[0], top.Targets[0], top.Targets[1], top.Targets[2]
	var listeners []*lab.Listeners
	for _, n := range top.Targets {
		listeners = append(listeners, serveOn(t, n, lab.Serve{Ports: []uint16{targetPort}}))
	}
	p := pool("web", "TCP", "preserve", targetPort, targets(top.Targets...))
	p.Deregister = leaving(delay, true)
	d := serving(t, top, config{Sources: sources(top), VIPs: both(), Listeners: listen("web", "TCP", cutPort, "web"), Groups: []group{p}})
	h := hold(t, client, cutPort)
	w := watch(t, top)
	before := time.Now()
	drained := d.life("drain", t1, "web")
	d.kill()
	d.launchTraced("fsync", "delay_enter=600000000")
	release := sync.OnceFunc(d.untrace)
	t.Cleanup(release)
	wait.For(t, limit, "a daemon that answers", func() error { _, err := d.ask(); return err })
	d.becomes("web", t1, balancer.Unused, balancer.ReasonNotRegistered)
	w.cut("the disk is stuck", h, t1.Name, before.Add(delay-slack), drained.Add(delay+slack))
	// The drain's end is on its way to the disk, and stays there.
	wait.For(t, limit, "the end of the drain to be written", func() error {
		if on, next := read(d.state("drains.json")), read(d.state("drains.json.new")); strings.Contains(on, "done") || !strings.Contains(next, "done") {
			return errors.New("on disk is " + on + "\nto be there: " + next)
		}
		return nil
	})
	must(t, d.node, "sysctl", "-qw", "net.netfilter.nf_conntrack_acct=0")
	wait.For(t, limit, "the sysctl to be set again", func() error {
		if now := must(t, d.node, "sysctl", "-n", "net.netfilter.nf_conntrack_acct"); strings.TrimSpace(now) != "1" {
			return errors.New("it is " + now)
		}
		return nil
	})
	if err := listeners[1].Close(); err != nil {
		t.Fatal(err)
	}
	d.becomes("web", t2, balancer.Unhealthy, "")
	avoided(t, "the disk is stuck", client, cutPort, 40, t2.Name)
	reached(t, "the disk is stuck", client, cutPort, t3.Name)
	if on := read(d.state("drains.json")); strings.Contains(on, "done") {
		t.Errorf("the disk is not stuck: %s", on)
	}
	h.alive("the disk is stuck", t3.Name)
	wait.For(t, limit, "it to be said", func() error {
		if !strings.Contains(d.log.String(), "state.write_slow") {
			return errors.New("it is not")
		}
		return nil
	})
	back := make(chan output, len(families))
	for _, f := range families {
		go func() { back <- d.override("undrain", "web", f.addr(t1).String()) }()
	}
	avoided(t, "nobody knows that it is back", client, cutPort, 40, t1.Name)
	select {
	case out := <-back:
		t.Errorf("it is back, and a crash would take it away again: %+v", out)
	default:
	}
	release()
	for range families {
		if out := <-back; out.code != 0 {
			t.Errorf("undrain: %+v", out)
		}
	}
	reached(t, "the disk answers", client, cutPort, t1.Name)
	h.alive("the disk answers", t3.Name)
	if on := read(d.state("drains.json")); strings.Contains(on, "target") {
		t.Errorf("a restart would drain it: %s", on)
	}
}

// TestNobodyReadsTheLog has a daemon whose log goes to a pipe that is full before it
// begins. All goes on, and who reads it late has missed nothing. Another one's reader
// is gone.
func TestNobodyReadsTheLog(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{})
	client, t1, t2 := top.Clients[0], top.Targets[0], top.Targets[1]
	dies := serveOn(t, t1, lab.Serve{Ports: []uint16{targetPort}})
	serveOn(t, t2, lab.Serve{Ports: []uint16{targetPort}})
	d := prepare(t, top, config{
		Sources: sources(top), VIPs: both(), Listeners: listen("web", "TCP", cutPort, "web"),
		Groups: []group{pool("web", "TCP", "preserve", targetPort, targets(top.Targets...))},
	}.String())
	d.terse = true
	log, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	room, err := unix.FcntlInt(out.Fd(), unix.F_GETPIPE_SZ, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := out.Write(make([]byte, room)); err != nil {
		t.Fatal(err)
	}
	d.launchInto(out)
	out.Close()
	d.converges()
	d.waitAllHealthy()
	if err := dies.Close(); err != nil {
		t.Fatal(err)
	}
	d.becomes("web", t1, balancer.Unhealthy, "")
	avoided(t, "nobody reads", client, cutPort, 40, t1.Name)
	reached(t, "nobody reads", client, cutPort, t2.Name)

	read := make(chan string, 1)
	go func() {
		all, _ := io.ReadAll(log) // ends with the daemon
		read <- string(all)
	}()
	d.stop()
	said := <-read
	at := 0
	for _, event := range []string{"daemon.started", "vip.added", "daemon.ready", `"to": "healthy"`, `"to": "unhealthy"`, "daemon.stopped"} {
		next := strings.Index(said[at:], event)
		if next < 0 {
			t.Fatalf("%s is not where it should be in\n%s", event, strings.Trim(said, "\x00"))
		}
		at += next
	}

	log, out, err = os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	log.Close()
	d.launchInto(out)
	out.Close()
	d.converges()
	d.becomes("web", t1, balancer.Unhealthy, "")
	reached(t, "nobody can read", client, cutPort, t2.Name)
	d.stop()
}
