package measure

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"testing"
	"testing/synctest"
	"time"
)

func TestDaemon(t *testing.T) {
	var d Daemon
	if d.PID() != 0 || d.Ended() {
		t.Errorf("before the start: process %d, ended %v", d.PID(), d.Ended())
	}
	d.Join() // nothing to wait for
	cmd := exec.CommandContext(t.Context(), "sh", "-c", "echo; echo no luck >&2; read line")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Start(cmd); err != nil {
		t.Fatal(err)
	}
	if d.PID() != cmd.Process.Pid || d.Ended() {
		t.Errorf("while it reads: process %d, ended %v", d.PID(), d.Ended())
	}
	if err := in.Close(); err != nil {
		t.Fatal(err)
	}
	d.Join()
	if !d.Ended() || d.Log.String() != "no luck" {
		t.Errorf("ended %v, log %q", d.Ended(), &d.Log)
	}
}

func TestDaemonThatIsNotThere(t *testing.T) {
	var d Daemon
	if err := d.Start(exec.Command("/nowhere/nlb")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("start: %v", err)
	}
	if d.PID() != 0 || d.Ended() {
		t.Errorf("process %d, ended %v", d.PID(), d.Ended())
	}
	d.Join()
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
