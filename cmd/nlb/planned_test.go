package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"nlb/balancer"
	"nlb/balancer/control"
	"nlb/balancer/events"
	"nlb/internal/wait"
)

// A planned is a daemon in the tests' namespace whose reloads are compared with their
// plans.
type planned struct {
	t                 *testing.T
	file, socket, log string
}

// The checked group has verdicts, others never get any: nothing but a reload changes
// the kernel.
const plannedConfig = `
state_dir: %s
source_addresses: [10.0.0.2]
metrics: {address: ""}
log: {level: debug, format: json}
%s
target_groups:
  - name: checked
    protocol: TCP
    port: 8080
    client_ip: snat
    unhealthy: {connection_termination: false}
    health_check: {interval: 1s, timeout: 1s}
    targets: [{address: 10.0.1.11}, {address: 10.0.1.12}]
%s`

// write puts together a file of listeners and of groups besides the checked one.
func (p *planned) write(listeners string, groups ...string) {
	p.t.Helper()
	text := fmt.Sprintf(plannedConfig, filepath.Dir(p.file), listeners, strings.Join(groups, ""))
	if err := os.WriteFile(p.file, []byte(text), 0o600); err != nil {
		p.t.Fatal(err)
	}
}

// nlb runs a command in this process and returns what it printed on stdout.
func (p *planned) nlb(want int, args ...string) []byte {
	p.t.Helper()
	var stdout, stderr bytes.Buffer
	if code := run(p.t.Context(), append(args, "--socket", p.socket), &stdout, &stderr); code != want {
		p.t.Fatalf("nlb %v: exit %d, want %d: %s", args, code, want, stderr.String())
	}
	return stdout.Bytes()
}

// judged reports whether the targets of the checked group have their verdicts.
func (p *planned) judged() bool {
	s, err := control.NewClient(p.socket).Status(p.t.Context())
	if err != nil {
		return false
	}
	for _, g := range s.TargetGroups {
		if g.Name == "checked" {
			return g.Targets[0].State == balancer.Healthy && g.Targets[1].State == balancer.Unhealthy
		}
	}
	return false
}

// start runs the daemon until the test ends, and waits for its verdicts.
func (p *planned) start() {
	p.t.Helper()
	log, err := os.Create(p.log)
	if err != nil {
		p.t.Fatal(err)
	}
	cmd := exec.Command("nlb", "serve", "-c", p.file, "--socket", p.socket)
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { p.stop(cmd, log) })
	wait.Until(p.t, patience, "the verdicts", p.judged, func() string {
		said, err := os.ReadFile(p.log)
		return fmt.Sprintf("the daemon's log (%v):\n%s", err, said)
	})
}

// stop ends the daemon and removes what it made.
func (p *planned) stop(cmd *exec.Cmd, log *os.File) {
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		p.t.Error(err)
	}
	if err := cmd.Wait(); err != nil {
		p.t.Error(err)
	}
	var said bytes.Buffer
	args := []string{"clear", "--force", "--state-dir", filepath.Dir(p.file), "--socket", p.socket}
	if code := run(context.WithoutCancel(p.t.Context()), args, &said, &said); code != exitFine {
		p.t.Errorf("nlb clear: %s", said.String())
	}
	if err := log.Close(); err != nil {
		p.t.Error(err)
	}
	emptyNamespace(p.t)
}

// plan is what nlb plan says, with the exit code that it should have.
func (p *planned) plan(code int) (changes []change) {
	p.t.Helper()
	if err := json.Unmarshal(p.nlb(code, "plan", "-c", p.file, "-o", "json"), &changes); err != nil {
		p.t.Fatal(err)
	}
	return changes
}

// reload is what a reload did, by the daemon's log.
func (p *planned) reload() []change {
	p.t.Helper()
	before, err := os.Stat(p.log)
	if err != nil {
		p.t.Fatal(err)
	}
	p.nlb(exitFine, "reload")
	log, err := os.ReadFile(p.log)
	if err != nil {
		p.t.Fatal(err)
	}
	done := []change{}
	for line := range bytes.Lines(log[before.Size():]) {
		var entry struct {
			Msg, Part, Event string
			Changes          []string
		}
		if err := json.Unmarshal(line, &entry); err != nil {
			p.t.Fatalf("%v: %s", err, line)
		}
		if entry.Event == events.ConfigReloaded.Name() {
			return done
		}
		if entry.Msg == "kernel changed" {
			done = append(done, change{entry.Part, entry.Changes})
		}
	}
	p.t.Fatalf("the log does not tell of the reload:\n%s", log[before.Size():])
	return nil
}

// listenersOf are the sections of VIPs and of listeners.
func listenersOf(vips string, lines ...string) string {
	return "vips: [" + vips + "]\nlisteners:\n  - " + strings.Join(lines, "\n  - ")
}

// fresh is a group whose targets' checks never come to a verdict.
func fresh(mode, targets string) string {
	return fmt.Sprintf(`
  - name: fresh
    protocol: TCP
    port: 8081
    client_ip: %s
    health_check: {interval: 300s, timeout: 1s, unhealthy_threshold: 10}
    targets: [%s]
`, mode, targets)
}

// What nlb plan prints is what the reload that follows does, line by line.
func TestReloadDoesWhatPlanSays(t *testing.T) {
	for _, a := range []string{"10.0.0.2", "10.0.1.11", "10.0.1.12", "10.0.1.21", "10.0.1.22", "10.0.1.23"} {
		if out, err := exec.Command("ip", "address", "add", a+"/32", "dev", "lo").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	answers, err := net.Listen("tcp", "10.0.1.11:8080")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = answers.Close() })
	dir := t.TempDir()
	p := &planned{t, filepath.Join(dir, "nlb.yaml"), filepath.Join(dir, "nlb.sock"), filepath.Join(dir, "log")}

	const (
		vip  = `{address: 198.51.100.10, interface: lo}`
		vips = vip + `, {address: 198.51.100.11, interface: lo}`

		one   = `{name: one, vip: 198.51.100.10, protocol: TCP, port: 80, forward: [{target_group: checked}]}`
		two   = `{name: two, vip: 198.51.100.10, protocol: TCP, port: 81, forward: [{target_group: fresh}]}`
		mixed = `{name: two, vip: 198.51.100.10, protocol: TCP, port: 81, forward: [{target_group: fresh, weight: 3}, {target_group: checked, weight: 1}]}`
		timed = `{name: two, vip: 198.51.100.10, protocol: TCP, port: 81, tcp_idle_timeout: 60s, allow: ["203.0.113.0/24"], forward: [{target_group: fresh}]}`
		three = `{name: three, vip: 198.51.100.11, protocol: TCP, port: 80, forward: [{target_group: checked}]}`

		first  = `{address: 10.0.1.21}`
		heavy  = `{address: 10.0.1.21, weight: 5}`
		second = `{address: 10.0.1.22, colocated: ["10.244.1.0/24"]}`
		third  = `{address: 10.0.1.23}`
	)
	p.write(listenersOf(vip, one))
	p.start()
	reloads := uint64(0)
	step := func(what string, changes bool, listeners string, groups ...string) {
		t.Helper()
		p.write(listeners, groups...)
		code := exitFine
		if changes {
			code = int(exitChanges)
		}
		if diff := cmp.Diff(p.plan(code), p.reload()); diff != "" {
			t.Errorf("%s: what was planned and what was done (-plan +reload):\n%s", what, diff)
		}
		reloads++
	}
	step("nothing", false, listenersOf(vip, one))
	step("group added that nobody uses", false, listenersOf(vip, one), fresh("hairpin_snat", first+","+second))
	step("listener added", true, listenersOf(vip, one, two), fresh("hairpin_snat", first+","+second))
	step("target added", true, listenersOf(vip, one, two), fresh("hairpin_snat", first+","+second+","+third))
	step("target re-weighted", true, listenersOf(vip, one, two), fresh("hairpin_snat", heavy+","+second+","+third))
	step("groups weighted", true, listenersOf(vip, one, mixed), fresh("hairpin_snat", heavy+","+second+","+third))
	step("target removed", true, listenersOf(vip, one, mixed), fresh("hairpin_snat", heavy+","+third))
	step("nothing is left to do", false, listenersOf(vip, one, mixed), fresh("hairpin_snat", heavy+","+third))
	step("idle timeout and allow changed", true, listenersOf(vip, one, timed), fresh("hairpin_snat", heavy+","+third))
	step("mode changed", true, listenersOf(vip, one, timed), fresh("snat", heavy+","+third))
	step("mode changed to the relay's", true, listenersOf(vip, one, timed), fresh("proxy_protocol_v2", heavy+","+third))
	step("mode changed from the relay's", true, listenersOf(vip, one, timed), fresh("snat", heavy+","+third))
	step("VIP added", true, listenersOf(vips, one, timed, three), fresh("snat", heavy+","+third))
	p.nlb(exitFine, "drain", "fresh", "10.0.1.23")
	step("target comes back while another drains", true, listenersOf(vips, one, timed, three), fresh("snat", heavy+","+second+","+third))
	step("drained target leaves", false, listenersOf(vips, one, timed, three), fresh("snat", heavy+","+second))
	step("VIP removed", true, listenersOf(vip, one, timed), fresh("snat", heavy+","+second))
	step("listener removed", true, listenersOf(vip, one), fresh("snat", heavy+","+second))
	step("group removed", false, listenersOf(vip, one))

	status, err := control.NewClient(p.socket).Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if r := status.Reload; !r.Success || r.AttemptsTotal != reloads || r.FailuresTotal != 0 || r.LastSuccessAt.Before(r.LastAttemptAt) {
		t.Errorf("after %d reloads: %+v", reloads, r)
	}
}
