package measure

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"time"
)

// A Daemon is a program that runs while it is measured. The zero Daemon is where
// none runs: it has no process and never ends.
type Daemon struct {
	cmd   *exec.Cmd     // nil until it is started
	ended chan struct{} // closed when it has; nil until it is started
	log   string        // the file that it prints to
}

// Start starts the program, which prints to a file, after what is there. A
// Daemon that has ended may be started again. Whoever made the command, or
// Signal, also ends it; Join waits for that. The errors are os's and exec's.
func (d *Daemon) Start(cmd *exec.Cmd, log string) error {
	// Not a pipe, since its children print there too and may live on: Wait would
	// last until they have ended as well, and after that they would get SIGPIPE.
	file, err := os.OpenFile(log, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer file.Close() // the program has a copy
	cmd.Stdout, cmd.Stderr = file, file
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	d.cmd, d.ended, d.log = cmd, ended, log
	go func() {
		_ = cmd.Wait() // Await and Ended report an end that nobody wanted
		close(ended)
	}()
	return nil
}

// Said is what the program and its children have printed, without space around
// it, or else why that cannot be read.
func (d *Daemon) Said() string {
	text, err := os.ReadFile(d.log)
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(text))
}

// Signal sends a signal to a program that was started. The error is
// os.ErrProcessDone if it has ended.
func (d *Daemon) Signal(s os.Signal) error { return d.cmd.Process.Signal(s) }

// PID is the process; 0 if none was started.
func (d *Daemon) PID() int {
	if d.cmd == nil {
		return 0
	}
	return d.cmd.Process.Pid
}

// Ended says whether the program was started and has ended.
func (d *Daemon) Ended() bool {
	select {
	case <-d.ended:
		return true
	default:
		return false
	}
}

// Join waits for the end of a program that was started.
func (d *Daemon) Join() {
	if d.cmd != nil {
		<-d.ended
	}
}

// ErrEnded is when a program ended that was awaited.
var ErrEnded = errors.New("the program has ended")

// Await asks every 20 ms, for as long as limit, until ready has no error. It
// returns ErrEnded if the program has ended before, and what ready said last if
// the time is over or ctx is done.
func (d *Daemon) Await(ctx context.Context, limit time.Duration, ready func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ready(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-d.ended:
			return ErrEnded
		case <-ctx.Done():
			return err
		}
	}
}
