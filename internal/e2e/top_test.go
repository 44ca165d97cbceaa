package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/charmbracelet/x/ansi"
	"github.com/charmbracelet/x/vt"
	"github.com/creack/pty"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/bench/lab"
	"nlb/internal/wait"
)

// A terminal is a pseudo-terminal with a program on it, and somebody who looks at
// its screen.
type terminal struct {
	t              *testing.T
	keyboard, line *os.File // the terminal's two ends; the program has the line
	before         *unix.Termios
	cmd            *exec.Cmd
	ended, closed  chan struct{} // closed when the program has ended, and when all it wrote was read
	err            error         // of the program; valid when it has ended

	mu       sync.Mutex
	screen   *vt.Emulator // guarded by mu
	raw      bytes.Buffer // guarded by mu; all that the program wrote
	noCursor bool         // guarded by mu
}

// onTerminal starts a program on a terminal of 80 × 24 cells.
func onTerminal(t *testing.T, cmd *exec.Cmd) *terminal {
	t.Helper()
	keyboard, line, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	x := &terminal{
		t: t, keyboard: keyboard, line: line, cmd: cmd, screen: vt.NewEmulator(80, 24),
		ended: make(chan struct{}), closed: make(chan struct{}),
	}
	x.screen.SetCallbacks(vt.Callbacks{CursorVisibility: func(visible bool) { x.noCursor = !visible }})
	x.resize(80, 24)
	x.before = x.settings()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = line, line, line
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		x.err = cmd.Wait()
		close(x.ended)
	}()
	var readers sync.WaitGroup
	readers.Go(x.watch)
	// What the terminal answers to questions about itself. The pipe has to be emptied,
	// or the terminal stands still; its end is that of the writer.
	readers.Go(func() { _, _ = io.Copy(keyboard, x.screen) })
	go func() {
		readers.Wait()
		close(x.closed)
	}()
	t.Cleanup(x.end)
	return x
}

// watch shows what the program writes, until its end of the line is closed.
func (x *terminal) watch() {
	buffer := make([]byte, 4096)
	for {
		n, err := x.keyboard.Read(buffer)
		x.mu.Lock()
		_, _ = x.screen.Write(buffer[:n])
		x.raw.Write(buffer[:n])
		x.mu.Unlock()
		if err != nil {
			_ = x.screen.InputPipe().(io.Closer).Close()
			return
		}
	}
}

// end is the terminal's part of the test's end.
func (x *terminal) end() {
	_ = x.cmd.Process.Kill()
	<-x.ended
	_ = x.line.Close() // the last one, so that the reader ends
	<-x.closed
	_ = x.keyboard.Close()
}

func (x *terminal) resize(columns, rows int) {
	x.t.Helper()
	x.mu.Lock()
	defer x.mu.Unlock()
	x.screen.Resize(columns, rows)
	if err := pty.Setsize(x.keyboard, &pty.Winsize{Cols: uint16(columns), Rows: uint16(rows)}); err != nil {
		x.t.Fatal(err)
	}
}

// settings are those of the line, such as echo.
func (x *terminal) settings() *unix.Termios {
	x.t.Helper()
	s, err := unix.IoctlGetTermios(int(x.line.Fd()), unix.TCGETS)
	if err != nil {
		x.t.Fatal(err)
	}
	return s
}

// press types.
func (x *terminal) press(keys string) {
	x.t.Helper()
	if _, err := x.keyboard.WriteString(keys); err != nil {
		x.t.Fatal(err)
	}
}

func (x *terminal) text() string {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.screen.String()
}

func (x *terminal) written() string {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.raw.String()
}

// shows waits until a line of the screen fits the pattern.
func (x *terminal) shows(pattern string) {
	x.t.Helper()
	want := regexp.MustCompile("(?m)" + pattern)
	wait.For(x.t, limit, fmt.Sprintf("a screen with %q", pattern), func() error {
		if text := x.text(); !want.MatchString(text) {
			return errors.New("\n" + text)
		}
		return nil
	})
}

// restored waits for the program's end, and fails the test unless that is without
// an error and the terminal is as it was.
func (x *terminal) restored() {
	x.t.Helper()
	select {
	case <-x.ended:
	case <-time.After(limit):
		x.t.Fatalf("the program did not end within %v:\n%s", limit, x.text())
	}
	if x.err != nil {
		x.t.Errorf("the program: %v\n%s", x.err, x.text())
	}
	if diff := cmp.Diff(x.before, x.settings()); diff != "" {
		x.t.Errorf("settings of the terminal (-before +after):\n%s", diff)
	}
	// What was written before the end may not have been read yet.
	wait.For(x.t, limit, "the terminal as it was", func() error {
		x.mu.Lock()
		defer x.mu.Unlock()
		if x.screen.IsAltScreen() || x.noCursor {
			return fmt.Errorf("alternate screen %v, cursor hidden %v", x.screen.IsAltScreen(), x.noCursor)
		}
		return nil
	})
	// The last word on each mode that was ever set has to be that it is not.
	modes := regexp.MustCompile(`\x1b\[\?([0-9;]+)([hl])`)
	last := map[string]string{}
	for _, m := range modes.FindAllStringSubmatch(x.written(), -1) {
		last[m[1]] = m[2]
	}
	delete(last, "25") // whether the cursor shows
	for mode, set := range last {
		if set == "h" {
			x.t.Errorf("mode %s stays set", mode)
		}
	}
}

// top is nlb top on a terminal, with words added to its environment.
func (d *daemon) top(env ...string) *terminal {
	d.t.Helper()
	cmd := exec.Command(program, "top", "--socket", d.socket, "--interval", "200ms")
	cmd.Env = slices.Concat(slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "NLB_") || strings.HasPrefix(v, "NO_COLOR=") || strings.HasPrefix(v, "TERM=")
	}), []string{"TERM=xterm-256color"}, env)
	return onTerminal(d.t, cmd)
}

// color matches a sequence that sets one (ECMA-48, SGR 30 to 49 and 90 to 107).
var color = regexp.MustCompile(`\x1b\[(?:[0-9]+;)*(?:[34][0-8]|9[0-7]|10[0-7])[;m]`)

// TestTop drains and undrains a target on the live screen, looks at it while the
// daemon is away, and ends it in several ways.
func TestTop(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{})
	serveTargets(t, top, targetPort)
	web := pool("web", "TCP", "preserve", targetPort, targets(top.Targets...))
	web.Deregister = leaving(5*time.Minute, false)
	d := serving(t, top, config{Sources: sources(top), VIPs: both(), Listeners: listen("web", "TCP", webPort, "web"), Groups: []group{web}})
	t1 := fmt.Sprintf("%v:%d", top.Targets[0].Addr4, targetPort)
	name := regexp.QuoteMeta(t1)
	stands := func(s balancer.State) {
		t.Helper()
		wait.For(t, limit, fmt.Sprintf("%s %v", t1, s), func() error {
			for _, x := range d.group("web").Targets {
				if x.AddrPort().String() == t1 && x.State == s {
					return nil
				}
			}
			return fmt.Errorf("%+v", d.group("web").Targets)
		})
	}

	x := d.top()
	x.shows(`^nftables, configuration 1, in force`)
	x.shows(`^ +` + name + ` +healthy`)
	x.press("/" + t1 + "\r")
	x.shows(`1 of 4 targets`)
	x.press("G")
	x.shows(`^> +` + name)

	x.press("d")
	x.shows(`^Drain ` + name + ` of web\?`)
	x.shows(`For 5m00s, the deregistration delay of web`)
	x.press("n")
	x.shows(`stays as it is`)
	stands(balancer.Healthy)
	x.press("dy")
	x.shows(`^> +` + name + ` +draining .* 4m5\ds left`)
	stands(balancer.Draining)
	x.press("u")
	x.shows(`^Undrain ` + name + ` of web\?`)
	x.press("y")
	x.shows(`^> +` + name + ` +healthy`)
	stands(balancer.Healthy)

	// A smaller terminal has fewer columns, and everything again when it grows.
	x.resize(40, 10)
	x.shows(`^   TARGET +STATE +NEW/S$`)
	x.resize(100, 30)
	x.shows(`WEIGHT NOTE`)

	d.kill()
	x.shows(`^NO ANSWER, this is \d+s old: no daemon answers`)
	x.press("d")
	x.shows(`the daemon does not answer`)
	d.start()
	d.waitAllHealthy()
	x.shows(`^> +` + name + ` +healthy`)
	wait.For(t, limit, "an answer", func() error {
		if strings.Contains(x.text(), "NO ANSWER") {
			return errors.New(x.text())
		}
		return nil
	})
	x.press("q")
	x.restored()
	if !color.MatchString(x.written()) {
		t.Errorf("no color without NO_COLOR: %q", x.written())
	}

	// Any value of NO_COLOR that is not empty counts (no-color.org).
	x = d.top("NO_COLOR=please")
	x.shows(`^ +` + name + ` +healthy`)
	d.kill()
	x.shows(`^NO ANSWER`)
	_ = x.cmd.Process.Signal(syscall.SIGTERM)
	x.restored()
	if found := color.FindString(x.written()); found != "" {
		t.Errorf("%q in spite of NO_COLOR", found)
	}
	if bold := ansi.NewStyle().Bold().String(); !strings.Contains(x.written(), strings.TrimSuffix(bold, "m")) {
		t.Error("NO_COLOR takes more away than colors")
	}

	// Without a daemon from the beginning, and at its terminal's end.
	x = d.top()
	x.shows(`^NO ANSWER: no daemon answers`)
	_ = x.cmd.Process.Signal(syscall.SIGHUP)
	x.restored()

	d.start()
	d.waitAllHealthy()
	d.expect([]expectation{
		{"top --socket SOCKET", 2, "", `^nlb: standard output is no terminal: nlb top --once [^\n]*\nSee nlb help.\n$`},
		{"top --socket SOCKET --once --interval 100ms --sort bytes", 0, `(?m)\A[^\x1b]*^   ` + name + ` +healthy[^\x1b]*\z`, ""},
		{"top --socket SOCKET --once --interval 100ms --filter nobody", 0, `^nftables, [^\n]*\n[^\n]*4 healthy\n`, ""},
		{"top --socket DIR/nobody.sock --once", 1, "", `^nlb: no daemon answers on [^\n]*nobody.sock: `},
		{"top --once --interval 1ms", 2, "", `want at least 100ms`},
		{"top --once --sort size", 2, "", `must be one of name, state`},
	}...)
}
