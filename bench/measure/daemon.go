package measure

import (
	"bytes"
	"context"
	"errors"
	"os/exec"
	"strings"
	"sync"
	"time"
)

// A Daemon is a program that runs while it is measured. The zero Daemon is where
// none runs: it has no process and never ends.
type Daemon struct {
	Log LogBuffer // what it prints

	cmd   *exec.Cmd     // nil until it is started
	ended chan struct{} // closed when it has; nil until it is started
}

// Start starts the program, once. Whoever made the command also ends it; Join
// waits for that. The error is exec's.
func (d *Daemon) Start(cmd *exec.Cmd) error {
	cmd.Stdout, cmd.Stderr = &d.Log, &d.Log
	if err := cmd.Start(); err != nil {
		return err
	}
	d.cmd, d.ended = cmd, make(chan struct{})
	go func() {
		_ = cmd.Wait() // Await and Ended report an end that nobody wanted
		close(d.ended)
	}()
	return nil
}

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

// A LogBuffer keeps what a process prints. It may be read while that goes on.
type LogBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer // guarded by mu
}

// Write appends to what is kept, and never fails.
func (l *LogBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

// String is all that was printed so far, without space around it.
func (l *LogBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.TrimSpace(l.text.String())
}
