package measure

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// started is a daemon that runs a script until the test closes its input.
func started(t *testing.T, d *Daemon, log, script string) (in io.Closer) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "sh", "-c", script)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Start(cmd, log); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Join) // the test's context ends before
	if d.PID() != cmd.Process.Pid || d.Ended() {
		t.Errorf("while it reads: process %d, ended %v", d.PID(), d.Ended())
	}
	return in
}

func TestDaemon(t *testing.T) {
	var d Daemon
	if d.PID() != 0 || d.Ended() {
		t.Errorf("before the start: process %d, ended %v", d.PID(), d.Ended())
	}
	d.Join() // nothing to wait for
	log := filepath.Join(t.TempDir(), "log")
	for _, want := range []string{"no luck", "no luck\n\nno luck"} { // and once more
		in := started(t, &d, log, "echo; echo no luck >&2; read line")
		if err := in.Close(); err != nil {
			t.Fatal(err)
		}
		d.Join()
		if !d.Ended() || d.Said() != want {
			t.Errorf("ended %v, said %q", d.Ended(), d.Said())
		}
	}
	if err := d.Signal(os.Interrupt); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("a signal to what has ended: %v", err)
	}
}

// fifo opens a new FIFO, so that neither side waits for the other.
func fifo(t *testing.T, name string) *os.File {
	t.Helper()
	if err := unix.Mkfifo(name, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(name, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// TestDaemonWithChild has a child that keeps the output open, as nlb's relay
// does when nlb is killed: the end is seen, and the child prints on.
func TestDaemonWithChild(t *testing.T) {
	const limit = 10 * time.Second
	dir := t.TempDir()
	in, out := fifo(t, filepath.Join(dir, "in")), fifo(t, filepath.Join(dir, "out"))
	var d Daemon
	started(t, &d, filepath.Join(dir, "log"),
		"cd "+dir+"; { read line <in; echo child; echo >out; } & echo parent; read line")
	err := d.Await(t.Context(), limit, func(context.Context) error {
		if said := d.Said(); said != "parent" {
			return errors.New(said)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Signal(os.Kill); err != nil {
		t.Fatal(err)
	}
	err = d.Await(t.Context(), limit, func(context.Context) error { return errors.New("it has not ended") })
	if err != ErrEnded {
		t.Error(err)
	}
	if _, err := in.WriteString("go on\n"); err != nil {
		t.Fatal(err)
	}
	if err := out.SetReadDeadline(time.Now().Add(limit)); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Errorf("the child has not printed on: %v", err)
	}
	if said := d.Said(); said != "parent\nchild" {
		t.Errorf("said %q", said)
	}
}

func TestDaemonThatIsNotThere(t *testing.T) {
	dir := t.TempDir()
	for name, start := range map[string]struct{ program, log string }{
		"program": {"/nowhere/nlb", filepath.Join(dir, "log")},
		"folder":  {"true", filepath.Join(dir, "nowhere", "log")},
	} {
		var d Daemon
		if err := d.Start(exec.Command(start.program), start.log); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("start without a %s: %v", name, err)
		}
		if d.PID() != 0 || d.Ended() {
			t.Errorf("without a %s: process %d, ended %v", name, d.PID(), d.Ended())
		}
		d.Join()
	}
}

func TestAwait(t *testing.T) {
	errNotYet := errors.New("not yet")
	for _, c := range []struct {
		name  string
		after time.Duration // when it is ready, or has ended, or the caller gives up
		ready bool
		ended bool
		want  error
		took  time.Duration
	}{
		{"ready at once", 0, true, false, nil, 0},
		{"ready later", 50 * time.Millisecond, true, false, nil, 60 * time.Millisecond},
		{"ended", 50 * time.Millisecond, false, true, ErrEnded, 50 * time.Millisecond},
		{"given up", 50 * time.Millisecond, false, false, errNotYet, 50 * time.Millisecond},
		{"never ready", time.Hour, true, false, errNotYet, 1010 * time.Millisecond},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				d := Daemon{ended: make(chan struct{})}
				began := time.Now()
				timer := time.AfterFunc(c.after, func() {
					switch {
					case c.ended:
						close(d.ended)
					case !c.ready:
						cancel()
					}
				})
				defer timer.Stop()
				err := d.Await(ctx, 1010*time.Millisecond, func(context.Context) error {
					if c.ready && time.Since(began) >= c.after {
						return nil
					}
					return errNotYet
				})
				if took := time.Since(began); err != c.want || took != c.took {
					t.Errorf("%v after %v", err, took)
				}
			})
		})
	}
}

// TestAwaitNone: where no program runs, none ends.
func TestAwaitNone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var d Daemon
		tries := 0
		err := d.Await(t.Context(), time.Second, func(context.Context) error {
			if tries++; tries == 3 {
				return nil
			}
			return errors.New("not yet")
		})
		if err != nil || tries != 3 {
			t.Errorf("%v after %d", err, tries)
		}
	})
}
