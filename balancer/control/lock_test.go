package control

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestRootLeavesTheLockToTheDaemon: nlb clear, run by root, may be the first to
// make the file.
func TestRootLeavesTheLockToTheDaemon(t *testing.T) {
	const uid = 65534
	folder := t.TempDir()
	if err := os.Chown(folder, uid, uid); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(folder, "nlb.lock")
	for range 2 { // the second finds the file
		l, err := Acquire(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Release(); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if s := info.Sys().(*syscall.Stat_t); s.Uid != uid || s.Gid != uid {
			t.Errorf("user %d, group %d", s.Uid, s.Gid)
		}
	}
}

func TestLockFollowsNoLink(t *testing.T) {
	victim, path := filepath.Join(t.TempDir(), "victim"), filepath.Join(t.TempDir(), "nlb.lock")
	if err := os.WriteFile(victim, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(victim, path); err != nil {
		t.Fatal(err)
	}
	if _, err := Acquire(path); !errors.Is(err, unix.ELOOP) {
		t.Errorf("error %v, want ELOOP", err)
	}
	if got, err := os.ReadFile(victim); err != nil || string(got) != "precious" {
		t.Errorf("what the link leads to is %q, %v", got, err)
	}
}
