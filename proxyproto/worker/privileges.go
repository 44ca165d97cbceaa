package worker

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// An identity is whom a worker becomes.
type identity struct {
	uid, gid int
	change   bool
}

// lookUp finds the user of WorkerOptions.User. Only root can become another.
func lookUp(name string) (identity, error) {
	now := identity{uid: os.Geteuid(), gid: os.Getegid()}
	if name == "" {
		return now, nil
	}
	id, err := findUser(name)
	if err != nil {
		return identity{}, err
	}
	if id == now {
		return now, nil
	}
	if now.uid != 0 {
		return identity{}, fmt.Errorf("user %s: only root can become another user", name)
	}
	id.change = true
	return id, nil
}

func findUser(name string) (identity, error) {
	u, err := user.Lookup(name)
	if err != nil {
		uid, notNumber := strconv.Atoi(name)
		if notNumber != nil || uid < 0 {
			return identity{}, fmt.Errorf("user %s: %w", name, err)
		}
		if u, err = user.LookupId(name); err != nil {
			return identity{uid: uid, gid: uid}, nil // a number needs no entry
		}
	}
	uid, uidErr := strconv.Atoi(u.Uid)
	gid, gidErr := strconv.Atoi(u.Gid)
	if err := errors.Join(uidErr, gidErr); err != nil {
		return identity{}, fmt.Errorf("user %s: %w", name, err)
	}
	return identity{uid: uid, gid: gid}, nil
}

// become gives up all other identities and, with user 0, every capability
// (capabilities(7), "Effect of user ID changes on capabilities"). Each call
// changes all threads.
func (id identity) become() error {
	if !id.change {
		return nil
	}
	if err := syscall.Setgroups(nil); err != nil {
		return fmt.Errorf("setgroups: %w", err)
	}
	if err := syscall.Setresgid(id.gid, id.gid, id.gid); err != nil {
		return fmt.Errorf("setresgid %d: %w", id.gid, err)
	}
	if err := syscall.Setresuid(id.uid, id.uid, id.uid); err != nil {
		return fmt.Errorf("setresuid %d: %w", id.uid, err)
	}
	return nil
}

// noNewPrivileges makes sure that no program this process could ever start gets
// more privileges than it has (PR_SET_NO_NEW_PRIVS). It belongs before all else:
// where the C library owns the threads, so that the runtime cannot reach them
// all, the program is started again, from a thread that has the flag already.
// Its process and its arguments stay the same.
func noNewPrivileges() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	const op = "PR_SET_NO_NEW_PRIVS"
	if set, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0); err == nil && set == 1 {
		return nil // from birth, hence every thread
	}
	_, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0)
	if errno == 0 {
		return nil
	}
	if errno != unix.ENOTSUP {
		return fmt.Errorf("%s: %w", op, errno)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	// By this name it is the same program even if its file was replaced.
	err := syscall.Exec("/proc/self/exe", os.Args, os.Environ())
	return fmt.Errorf("%s: start again: %w", op, err)
}
