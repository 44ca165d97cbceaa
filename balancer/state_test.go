package balancer

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// daemonsFolder is a folder of another user than root, which these tests run as.
func daemonsFolder(t *testing.T) (folder string, uid uint32) {
	t.Helper()
	folder, uid = t.TempDir(), 65534
	if err := os.Chown(folder, int(uid), int(uid)); err != nil {
		t.Fatal(err)
	}
	return folder, uid
}

func TestRootLeavesStateToTheDaemon(t *testing.T) {
	folder, uid := daemonsFolder(t)
	if err := WriteStateFile(folder, "state", []byte("new")); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(filepath.Join(folder, "state"))
	if err != nil {
		t.Fatal(err)
	}
	if s := info.Sys().(*syscall.Stat_t); s.Uid != uid || s.Gid != uid || info.Mode() != 0o600 {
		t.Errorf("user %d, group %d, mode %v", s.Uid, s.Gid, info.Mode())
	}
}

// TestStateFollowsNoLink: whoever owns the folder must not choose what root
// writes to.
func TestStateFollowsNoLink(t *testing.T) {
	folder, _ := daemonsFolder(t)
	victim := filepath.Join(t.TempDir(), "victim")
	if err := os.WriteFile(victim, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(victim, filepath.Join(folder, "state.new")); err != nil {
		t.Fatal(err)
	}
	if err := WriteStateFile(folder, "state", []byte("new")); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{victim: "precious", filepath.Join(folder, "state"): "new"} {
		if got, err := os.ReadFile(path); err != nil || string(got) != want {
			t.Errorf("%s is %q, %v, want %q", path, got, err, want)
		}
	}
}
