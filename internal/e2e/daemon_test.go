package e2e

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"nlb/balancer"
	"nlb/balancer/control"
	"nlb/bench/lab"
	"nlb/internal/vm"
	"nlb/internal/wait"
	"nlb/proxyproto/worker"
)

// limit bounds every wait of the tests. Nothing they wait for takes that long,
// unless the machine is emulated.
var limit = func() time.Duration {
	if os.Getenv(vm.EnvKernel) != "" {
		return time.Minute
	}
	return 20 * time.Second
}()

// program is the nlb under test, and racing the same with the race detector.
var program, racing string

// raced are the tests whose daemon is built with the race detector: those in
// which most happens at once. It makes a daemon several times slower, and then
// the others could not tell whether something comes in time.
var raced = map[string]bool{
	"TestDrainRefusals":        true,
	"TestFailOpenIsSaid":       true,
	"TestManyChangesUnderLoad": true,
	"TestModes":                true,
	"TestRelayComesAndGoes":    true,
	"TestRelaySurvives":        true,
	"TestRelayUntrackedSwitch": true,
	"TestReloadsUnderLoad":     true,
	"TestStopAtAnyMoment":      true,
}

func TestMain(m *testing.M) {
	lab.MaybeRunAgent()
	os.Exit(testMain(m))
}

func testMain(m *testing.M) int {
	if os.Getenv(vm.EnvKernel) == "" {
		moreAtOnce()
	}
	dir, err := os.MkdirTemp("", "nlb-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if err := build(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// moreAtOnce lets half as many tests again run at the same time as there are
// cores, unless -parallel has said how many: most of them wait, for a deadline or
// for the next probe.
func moreAtOnce() {
	flag.Parse()
	atOnce, cores := flag.Lookup("test.parallel"), runtime.GOMAXPROCS(0)
	if atOnce.Value.String() == strconv.Itoa(cores) {
		_ = atOnce.Value.Set(strconv.Itoa(cores + cores/2))
	}
}

// guestBinary goes along to emulated machines, where there is no Go. It is linked
// statically, since there are no libraries either.
const guestBinary = "bin/nlb-static"

// build makes both programs, or finds the one that NLB_BINARY names for all tests.
func build(dir string) (err error) {
	named := os.Getenv("NLB_BINARY")
	if named == "" && os.Getenv(vm.EnvKernel) != "" {
		named = guestBinary
	}
	if named != "" {
		// Tests run in their package's folder, the name is meant from the module's.
		if !filepath.IsAbs(named) {
			named = filepath.Join("..", "..", named)
		}
		program, err = filepath.Abs(named)
		racing = program
		return err
	}
	program, racing = filepath.Join(dir, "nlb"), filepath.Join(dir, "nlb-racing")
	for _, args := range [][]string{{"-o", program}, {"-race", "-o", racing}} {
		out, err := exec.Command("go", slices.Concat([]string{"build"}, args, []string{"nlb/cmd/nlb"})...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("build nlb: %w\n%s", err, out)
		}
	}
	return nil
}

// isRaced reports whether a test's daemon is slow for the race detector.
func isRaced(t *testing.T) bool {
	name, _, _ := strings.Cut(t.Name(), "/")
	return racing != program && raced[name]
}

// soon bounds a test's waiting.
func soon(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	return ctx
}

// A daemon is nlb serve on a node, with a configuration file, a state folder and
// a socket of its own. It survives its process: kill or stop, then start.
type daemon struct {
	t      *testing.T
	node   *lab.Node
	dir    string
	config string
	socket string
	log    *logBuffer
	client *control.Client
	// terse leaves out of the log what changes in the kernel, which may be long.
	terse bool
	// installed is the program's path if it is none of program and racing.
	installed string

	cmd  *exec.Cmd     // the process; nil when none runs
	done chan struct{} // closed when cmd has ended
	err  error         // what Wait said; valid when done is closed
}

// start runs nlb serve in the topology's balancer and returns when it has
// converged. The test's end stops it, and fails the test if that goes wrong.
func start(t *testing.T, top *lab.Topology, config string) *daemon {
	t.Helper()
	d := prepare(t, top, config)
	d.start()
	return d
}

// prepare is start without the process.
func prepare(t *testing.T, top *lab.Topology, config string) *daemon {
	t.Helper()
	// Not t.TempDir, which is too long for a socket's name (unix(7): 108 bytes).
	dir, err := os.MkdirTemp("", "nlb-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	d := &daemon{
		t: t, node: top.LB, dir: dir, log: &logBuffer{file: filepath.Join(dir, "log")},
		config: filepath.Join(dir, "nlb.yaml"), socket: filepath.Join(dir, "nlb.sock"),
	}
	d.client = control.NewClient(d.socket)
	d.write(config)
	t.Cleanup(d.end)
	return d
}

// start runs the process, again if it was killed or stopped, and waits until it
// has converged.
func (d *daemon) start() {
	d.t.Helper()
	d.launch()
	d.converges()
}

// converges waits until the kernel holds the configuration.
func (d *daemon) converges() {
	d.t.Helper()
	wait.For(d.t, limit, "converge", func() error {
		select {
		case <-d.done:
			d.t.Fatalf("nlb serve ended: %v\n%s", d.err, d.log)
		default:
		}
		s, err := d.ask()
		switch {
		case err != nil:
			return err
		case s.Apply.Error != "":
			return errors.New(s.Apply.Error)
		case s.Apply.ConvergedAt.IsZero():
			return errors.New("never converged")
		}
		return nil
	})
}

// launch runs the process and does not wait for anything.
func (d *daemon) launch() {
	d.t.Helper()
	out := d.log.open(d.t)
	defer out.Close()
	d.launchInto(out)
}

// launchInto is launch with another place for the log.
func (d *daemon) launchInto(out *os.File) {
	d.t.Helper()
	level := "debug"
	if d.terse {
		level = "info"
	}
	d.cmd = d.command("serve", "-c", d.config, "--state-dir", filepath.Join(d.dir, "state"), "--log-level", level)
	d.cmd.Stdout, d.cmd.Stderr = out, out
	if err := d.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	d.done = make(chan struct{})
	go func() {
		d.err = d.cmd.Wait()
		close(d.done)
	}()
}

// command is nlb on the balancer's node, with the daemon's socket if the
// subcommand has one, and without the caller's own settings.
func (d *daemon) command(args ...string) *exec.Cmd {
	switch args[0] {
	case "serve", "reload", "status", "plan", "clear", "explain", "flows":
		args = append(args, "--socket", d.socket)
	}
	binary := program
	switch {
	case d.installed != "":
		binary = d.installed
	case args[0] == "serve" && isRaced(d.t):
		binary = racing
	}
	cmd := d.node.Command(context.Background(), binary, args...)
	cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "NLB_") })
	return cmd
}

// An output is what a command left behind.
type output struct {
	stdout, stderr string
	code           int
}

// run runs nlb with a subcommand and its arguments, other than --socket.
func (d *daemon) run(args ...string) output {
	d.t.Helper()
	cmd := d.command(args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		d.t.Fatalf("nlb %v: %v", args, err)
	}
	return output{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// write replaces the configuration file.
func (d *daemon) write(config string) {
	d.t.Helper()
	if err := os.WriteFile(d.config, []byte(config), 0o600); err != nil {
		d.t.Fatal(err)
	}
}

// reload replaces the configuration file and runs nlb reload.
func (d *daemon) reload(config string) error {
	d.t.Helper()
	d.write(config)
	if out := d.run("reload"); out.code != 0 {
		return fmt.Errorf("nlb reload: exit %d: %s", out.code, strings.TrimSpace(out.stderr))
	}
	return nil
}

// kill ends the process as a crash does.
func (d *daemon) kill() {
	d.t.Helper()
	if d.cmd == nil {
		d.t.Fatal("no daemon runs")
	}
	_ = d.cmd.Process.Kill()
	d.await()
}

// stop ends the process with SIGTERM.
func (d *daemon) stop() {
	d.t.Helper()
	if d.cmd == nil {
		d.t.Fatal("no daemon runs")
	}
	_ = d.cmd.Process.Signal(syscall.SIGTERM)
	if d.await(); d.err != nil {
		d.t.Errorf("nlb serve: %v\n%s", d.err, d.log)
	}
}

// await waits for the process's end, and helps after a while.
func (d *daemon) await() {
	d.t.Helper()
	select {
	case <-d.done:
	case <-time.After(limit):
		_ = d.cmd.Process.Kill()
		<-d.done
		d.t.Errorf("nlb serve did not end within %v", limit)
	}
	d.cmd = nil
}

// end is the daemon's part of the test's end.
func (d *daemon) end() {
	if d.t.Failed() {
		d.t.Log(d.dump())
	}
	if d.cmd != nil {
		d.stop()
	}
	d.endRelay()
	if log := d.log.String(); strings.Contains(log, "DATA RACE") {
		d.t.Errorf("the race detector found a race:\n%s", log)
	}
}

// endRelay ends the relays that the daemon's processes left behind, as they should.
func (d *daemon) endRelay() {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if err := worker.Stop(ctx, d.relaySocket()); err != nil {
		d.t.Errorf("end the relay: %v", err)
	}
}

// relaySocket is where the relay is told what to do.
func (d *daemon) relaySocket() string { return strings.TrimSuffix(d.socket, ".sock") + "-relay.sock" }

// dump is the state that a failure is to be understood from.
func (d *daemon) dump() string {
	var b strings.Builder
	commands := []string{"nft -a list ruleset", "conntrack -L", "conntrack -L -f ipv6", "ip address", "ip route", "ip -6 route", "nstat -az"}
	if haveIPVS() {
		commands = append(commands, "ipvsadm -Ln", "ipvsadm -Lnc")
	}
	for _, c := range commands {
		text, err := d.tool(strings.Fields(c)...)
		if err != nil {
			text = err.Error()
		}
		fmt.Fprintf(&b, "--- %s\n%s\n", c, abridge(text))
	}
	text, _ := os.ReadFile(d.config)
	fmt.Fprintf(&b, "--- configuration\n%s\n--- log\n%s\n", text, d.log)
	return b.String()
}

// abridge leaves out the lines of maps' elements and of counters that are zero,
// of which there are thousands.
func abridge(text string) string {
	const longest, most = 300, 400
	var kept []string
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		if f := strings.Fields(line); len(f) == 3 && f[1] == "0" && strings.HasPrefix(f[2], "0.") {
			continue // nstat
		}
		if strings.HasSuffix(line, ",") && strings.Count(line, " : ") > 0 && len(kept) > 0 && strings.HasSuffix(kept[len(kept)-1], ",") {
			continue // further elements
		}
		if len(line) > longest {
			line = line[:longest] + " ..."
		}
		kept = append(kept, line)
	}
	if len(kept) > most {
		kept = append(kept[:most], "...")
	}
	return strings.Join(kept, "\n")
}

// copyProgram puts a copy of the program under test at a path. Another process writes
// it: whatever we fork meanwhile would have a file of ours open for writing, and nobody
// could run it then (ETXTBSY, execve(2)).
func copyProgram(t *testing.T, path string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), "cp", program, path).CombinedOutput(); err != nil {
		t.Fatalf("copy the program: %v\n%s", err, out)
	}
}

// tool runs another program on the balancer's node and returns its output.
func (d *daemon) tool(argv ...string) (string, error) {
	return tool(d.t, d.node, argv...)
}

// tool runs a program on a node and returns its standard output.
func tool(t *testing.T, n *lab.Node, argv ...string) (string, error) {
	t.Helper()
	// Cleanup functions, where t.Context has ended, use it too.
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	cmd := n.Command(ctx, argv[0], argv[1:]...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s: %v: %w: %s", n.Name, argv, err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// must runs a program on a node that has to succeed.
func must(t *testing.T, n *lab.Node, argv ...string) string {
	t.Helper()
	out, err := tool(t, n, argv...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// status is what the daemon says of itself.
func (d *daemon) status() *control.Status {
	d.t.Helper()
	s, err := d.ask()
	if err != nil {
		d.t.Fatal(err)
	}
	return s
}

func (d *daemon) ask() (*control.Status, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	return d.client.Status(ctx)
}

// group is the status of one target group.
func (d *daemon) group(name string) control.TargetGroup {
	d.t.Helper()
	groups := d.status().TargetGroups
	i := slices.IndexFunc(groups, func(g control.TargetGroup) bool { return g.Name == name })
	if i < 0 {
		d.t.Fatalf("no target group %q in %v", name, groups)
	}
	return groups[i]
}

// waitHealthy waits until a group has exactly n healthy targets and the kernel
// sends to them alone.
func (d *daemon) waitHealthy(group string, n int) {
	d.t.Helper()
	wait.For(d.t, limit, fmt.Sprintf("%d healthy in %s", n, group), func() error {
		healthy, strangers := 0, 0
		g := d.group(group)
		for _, t := range g.Targets {
			switch {
			case t.State == balancer.Healthy:
				healthy++
			case t.EffectiveWeight > 0 && !g.FailOpen:
				strangers++
			}
		}
		if healthy != n || strangers > 0 {
			return fmt.Errorf("%+v", g.Targets)
		}
		return nil
	})
}

// waitAllHealthy waits for every target of every group in the file.
func (d *daemon) waitAllHealthy() {
	d.t.Helper()
	for _, g := range d.status().TargetGroups {
		here := 0
		for _, t := range g.Targets {
			if !t.Removed {
				here++
			}
		}
		d.waitHealthy(g.Name, here)
	}
}

// A logBuffer collects what a process prints.
type logBuffer struct {
	// file has the rest of it, if there is a name: a process that outlives the one
	// that started it must not hold a pipe to us, for whose end Wait waits.
	file string

	mu   sync.Mutex
	text bytes.Buffer // guarded by mu
}

// open opens the file for a process to append to.
func (l *logBuffer) open(t *testing.T) *os.File {
	t.Helper()
	f, err := os.OpenFile(l.file, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == "" {
		return l.text.String()
	}
	return l.text.String() + read(l.file)
}

// made closes a new topology with the test.
func made(t *testing.T, build func(lab.Options) (*lab.Topology, error), o lab.Options) *lab.Topology {
	t.Helper()
	top, err := build(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := top.Close(); err != nil {
			t.Errorf("close the lab: %v", err)
		}
	})
	return top
}

func routed(t *testing.T, o lab.Options) *lab.Topology {
	t.Helper()
	return made(t, lab.Routed, o)
}

// serveTargets makes every target listen on the ports, for TCP and UDP.
func serveTargets(t *testing.T, top *lab.Topology, ports ...uint16) {
	t.Helper()
	for _, n := range top.Targets {
		serveOn(t, n, lab.Serve{Ports: ports})
	}
}

func serveOn(t *testing.T, n *lab.Node, o lab.Serve) *lab.Listeners {
	t.Helper()
	l, err := n.Agent().Serve(soon(t), o)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// call makes calls from a node and counts what came of them. Without a timeout
// they have the time that a busy machine may take.
func call(t *testing.T, n *lab.Node, c lab.Call) lab.Tally {
	t.Helper()
	return lab.Count(replies(t, n, c))
}

func replies(t *testing.T, n *lab.Node, c lab.Call) []lab.Reply {
	t.Helper()
	if c.Timeout == 0 {
		c.Timeout = limit / 4
	}
	all, err := n.Agent().Call(soon(t), c)
	if err != nil {
		t.Fatal(err)
	}
	return all
}
