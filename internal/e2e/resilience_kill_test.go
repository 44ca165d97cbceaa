package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nlb/bench/lab"
	"nlb/internal/wait"
)

// variant is one of the files that reloads under load alternate between: the
// first three targets always, the others sometimes, another listener sometimes.
func variant(top *lab.Topology, n int) config {
	nodes := slices.Clone(top.Targets[:3])
	for i, extra := range top.Targets[3:] {
		if n>>i&1 == 1 {
			nodes = append(nodes, extra)
		}
	}
	c := twoServices(top, nodes...)
	if n%3 == 0 {
		c.Listeners = append(c.Listeners, listen("extra", "TCP", extraPort, "web")...)
	}
	return c
}

// chance draws the moments, and says how to draw the same ones again.
func chance(t *testing.T) *rand.Rand {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("moments are drawn from seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// pass lets a random part of d go by. The moment of a crash is what these tests
// are about; they wait for nothing by it.
func pass(r *rand.Rand, d time.Duration) { time.Sleep(time.Duration(r.Int64N(int64(d)))) }

// signal sends a signal to the daemon's process.
func (d *daemon) signal(s syscall.Signal) {
	d.t.Helper()
	if err := d.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		d.t.Fatal(err)
	}
}

// The daemon is killed at fifty random moments, while it starts or while it
// changes the kernel, and neither flows nor new connections notice. Each time
// the next one carries on from what the last one left.
func TestKillAtAnyMoment(t *testing.T) {
	const kills = 50
	top, d := served(t, lab.Options{Targets: 5}, 3)
	key := read(d.state("hash.key"))
	p := press(t, top)
	begun := time.Now()
	d.kill()
	d.start()
	startup := time.Since(begun)
	t.Logf("a start takes %v", startup.Round(time.Millisecond))
	r := chance(t)
	for i := range kills {
		file := variant(top, r.IntN(12)).String()
		switch how := i % 5; how {
		case 0, 1, 2: // while it starts, which applies a changed file
			if d.cmd != nil {
				d.kill()
			}
			d.write(file)
			d.launch()
			pass(r, startup)
		case 3: // while it reloads at a signal
			if d.cmd == nil {
				d.start()
			}
			d.write(file)
			d.signal(syscall.SIGHUP)
			pass(r, 80*time.Millisecond)
		case 4: // while somebody waits for the reload; held before the end
			if d.cmd == nil {
				d.start()
			}
			d.write(file)
			reload := d.command("reload")
			if err := reload.Start(); err != nil {
				t.Fatal(err)
			}
			pass(r, 80*time.Millisecond)
			d.signal(syscall.SIGSTOP)
			pass(r, 10*time.Millisecond)
			d.kill()
			_ = reload.Wait() // it may have been in time, or not
		}
		if d.cmd != nil {
			d.kill()
		}
		if now := read(d.state("hash.key")); now != key {
			t.Fatalf("kill %d: the hash key changed from %q to %q", i, key, now)
		}
		if i%10 == 9 {
			p.check(fmt.Sprintf("after %d kills", i+1))
		}
	}
	d.write(variant(top, 0).String())
	d.start()
	d.waitAllHealthy()
	if err := d.planned(); err != nil {
		t.Error(err)
	}
	works(t, top, "after the last kill")
	t.Logf("%d new connections", p.end())
	d.tidy()
}

var keyText = regexp.MustCompile(`^[0-9a-f]{32}\n$`)

// tidy fails the test if kills left files in the state folder that nobody
// removes again.
func (d *daemon) tidy() {
	d.t.Helper()
	known := []string{"nlb.lock"}
	for _, name := range []string{"hash.key", "health.json", "numbers.last", "sysctls.json", "drains.json", "targets.json"} {
		known = append(known, name, name+".new")
	}
	entries, err := os.ReadDir(d.state(""))
	if err != nil {
		d.t.Error(err)
	}
	for _, e := range entries {
		if !slices.Contains(known, e.Name()) {
			d.t.Errorf("the state folder has %s", e.Name())
		}
	}
}

// A first start that is killed leaves nothing half-done: a key is whole or
// absent, no VIP is there without the rules that guard it, and the next start
// makes the rest. strace(1) holds the daemon up at every message and file it
// writes, so that the kill falls between two of them.
func TestKillDuringTheFirstStart(t *testing.T) {
	const kills = 16
	top, d := served(t, lab.Options{Targets: 2}, 2)
	r := chance(t)
	seen := make(map[string]int)
	d.stop()
	for i := range kills {
		if out := d.run("clear", "--state-dir", d.state("")); out.code != 0 {
			t.Fatalf("clear: %+v", out)
		}
		if err := os.RemoveAll(d.state("")); err != nil {
			t.Fatal(err)
		}
		d.launchSlowly(10 * time.Millisecond)
		// Half of them in the part in which it writes.
		pass(r, time.Second)
		d.kill()
		found := d.halfway()
		seen[found]++
		if text := read(d.state("hash.key")); !keyText.MatchString(text) && !strings.Contains(text, "no such file") {
			t.Errorf("kill %d left the hash key %q", i, text)
		}
		d.start()
		// It learns of the targets' health at its own pace.
		wait.For(t, limit, fmt.Sprintf("after kill %d, which left %s", i, found), d.planned)
		works(t, top, fmt.Sprintf("after kill %d, which left %s", i, found))
		d.kill()
	}
	t.Logf("kills left: %v", seen)
	d.start()
	d.tidy()
	d.stop()
	if out := d.run("clear", "--state-dir", d.state("")); out.code != 0 {
		t.Errorf("clear: %+v", out)
	}
}

// A daemon that is told to stop at whatever moment stops, and is not sorry.
func TestStopAtAnyMoment(t *testing.T) {
	const stops = 12
	top, d := served(t, lab.Options{Targets: 3}, 3)
	p := press(t, top)
	d.stop()
	begun := time.Now()
	d.start()
	startup := time.Since(begun)
	d.stop()
	r := chance(t)
	for i := range stops {
		before := len(d.log.String())
		d.write(variant(top, i).String())
		d.launch()
		pass(r, 2*startup)
		d.signal(syscall.SIGTERM)
		d.await()
		said := d.log.String()[before:]
		// Before it listens to signals, one ends it as any other program.
		if early := !strings.Contains(said, "nlb starts"); d.err != nil && !early {
			t.Errorf("stop %d: %v\n%s", i, d.err, said)
		}
		if strings.Contains(said, "ERROR") || strings.Contains(said, "panic") || strings.Contains(said, "nlb: ") {
			t.Errorf("stop %d: it complained:\n%.3000s", i, said)
		}
	}
	works(t, top, "after the last stop")
	p.end()
	d.start()
}

// A daemon that dies over its key, again and again, does not fill the folder.
func TestKilledKeysLeaveNoLitter(t *testing.T) {
	_, d := served(t, lab.Options{Targets: 2}, 2)
	d.stop()
	if err := os.Remove(d.state("hash.key")); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		// The first file that gets its name is the key.
		d.launchTraced("renameat,renameat2", "signal=KILL:when=1")
		d.await()
		if text := read(d.state("hash.key")); !strings.Contains(text, "no such file") {
			t.Fatalf("there is a key: %q", text)
		}
	}
	d.start()
	d.tidy()
}

// launchSlowly is launch with a pause before each message to the kernel and
// each file that is written.
func (d *daemon) launchSlowly(pause time.Duration) {
	d.t.Helper()
	d.launchTraced("sendto,sendmsg,write,fsync,renameat,renameat2", fmt.Sprintf("delay_enter=%d", pause.Microseconds()))
}

// launchTraced is launch with something that strace(1) does to system calls. The
// process is the daemon's own, for the tracer detaches itself.
func (d *daemon) launchTraced(calls, what string) {
	d.t.Helper()
	d.cmd = d.node.Command(context.Background(), "strace", "-D", "-f", "-qq", "-o", filepath.Join(d.dir, "strace"),
		"-e", "trace="+calls, "-e", "inject="+calls+":"+what,
		program, "serve", "-c", d.config, "--state-dir", d.state(""), "--log-level", "debug", "--socket", d.socket)
	d.cmd.Stdout, d.cmd.Stderr = d.log, d.log
	if err := d.cmd.Start(); err != nil {
		d.t.Fatalf("make deps installs strace: %v", err)
	}
	cmd, done := d.cmd, make(chan struct{})
	d.done = done
	go func() {
		d.err = cmd.Wait()
		close(done)
	}()
}

// untrace ends the tracer of launchTraced. System calls that it held up are made.
func (d *daemon) untrace() {
	d.t.Helper()
	status := read(fmt.Sprintf("/proc/%d/status", d.cmd.Process.Pid))
	_, rest, _ := strings.Cut(status, "TracerPid:")
	line, _, _ := strings.Cut(rest, "\n")
	tracer, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil || tracer == 0 {
		d.t.Fatalf("nobody traces the daemon: %q", line)
	}
	if err := unix.Kill(tracer, unix.SIGKILL); err != nil {
		d.t.Fatal(err)
	}
}

// halfway says what of a start's work the kernel holds, and fails the test if a
// VIP is there and its guard is not.
func (d *daemon) halfway() string {
	d.t.Helper()
	_, err := d.tool("nft", "list", "chain", "inet", "nlb", "input")
	table := err == nil
	accounting := strings.TrimSpace(must(d.t, d.node, "cat", "/proc/sys/net/netfilter/nf_conntrack_acct")) == "1"
	addresses := must(d.t, d.node, "ip", "address", "show", "dev", "lo")
	vips := strings.Count(addresses, lab.VIP4.String()) + strings.Count(addresses, lab.VIP6.String())
	if vips > 0 && !table {
		d.t.Error("a VIP is bound and nothing guards it")
	}
	key := !strings.Contains(read(d.state("hash.key")), "no such file")
	return fmt.Sprintf("key %t, table %t, sysctls %t, %d VIPs", key, table, accounting, vips)
}
