package balancer

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// WriteStateFile replaces a file of the state folder, which is made if it is
// missing. The new content, of mode 0600, is on disk and so is its folder entry
// when it returns: a crash leaves the old file or the new one, never a part. The
// folder's lock keeps other writers out.
func WriteStateFile(dir, name string, content []byte) (err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	// One name for all attempts, so that crashes leave no litter behind. What is
	// there goes: root must not write where a link in somebody else's folder leads.
	temporary := filepath.Join(dir, name+".new")
	if err := os.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	_, err = f.Write(content)
	if err = errors.Join(err, GiveToFolder(f), f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), filepath.Join(dir, name)); err != nil {
		return err
	}
	return syncFolder(dir)
}

// GiveToFolder makes a file that root has just made its folder's owner's: root
// runs nlb clear, say, and the daemon, another user, has to read what that leaves.
func GiveToFolder(f *os.File) error {
	if os.Geteuid() != 0 {
		return nil
	}
	info, err := os.Stat(filepath.Dir(f.Name()))
	if err != nil {
		return err
	}
	folder, ok := info.Sys().(*syscall.Stat_t)
	if !ok || folder.Uid == 0 {
		return nil
	}
	if err := f.Chown(int(folder.Uid), int(folder.Gid)); err != nil {
		return fmt.Errorf("give to the folder's owner: %w", err)
	}
	return nil
}

func syncFolder(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
