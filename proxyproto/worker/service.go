package worker

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"

	sd "github.com/coreos/go-systemd/v22/daemon"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"nlb/balancer/events"
)

// announce tells systemd that the worker serves and is its service's main
// process: a successor that its predecessor started has to say so
// (sd_notify(3), MAINPID=). Without systemd it does nothing.
func (w *worker) announce() {
	if _, err := sd.SdNotify(false, fmt.Sprintf("MAINPID=%d\n%s", os.Getpid(), sd.SdNotifyReady)); err != nil {
		w.Log.Warn("systemd was not told", events.SystemdFailed.Field(), zap.Error(err))
	}
}

// startSuccessor starts the program on disk with our arguments. It takes over, or
// ends and says why, and then this worker goes on.
//
// It becomes our parent's child, not ours (CLONE_PARENT, clone(2)): a supervisor
// learns at once of the end of its own children only, and we may be here for as
// long as our last connection.
func (w *worker) startSuccessor() {
	program, err := os.Executable() // also of a file that was replaced
	if err != nil {
		w.Log.Error("no successor can be started", events.RelaySuccessorFailed.Field(), zap.Error(err))
		return
	}
	cmd := exec.Command(program, os.Args[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_PARENT}
	if err := cmd.Start(); err != nil {
		w.Log.Error("no successor can be started", events.RelaySuccessorFailed.Field(), zap.String("program", program), zap.Error(err))
		return
	}
	w.Log.Info("relay worker starts its successor", events.RelaySuccessorStarted.Field(), zap.Int("pid", cmd.Process.Pid))
	_ = cmd.Process.Release() // not ours to wait for
}
