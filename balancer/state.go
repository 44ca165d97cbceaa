package balancer

import (
	"errors"
	"os"
	"path/filepath"
)

// WriteStateFile replaces a file of the state folder, which is made if it is
// missing. The new content, of mode 0600, is on disk and so is its folder entry
// when it returns: a crash leaves the old file or the new one, never a part. The
// folder's lock keeps other writers out.
func WriteStateFile(dir, name string, content []byte) (err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	// One name for all attempts, so that crashes leave no litter behind.
	f, err := os.OpenFile(filepath.Join(dir, name+".new"), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	_, err = f.Write(content)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), filepath.Join(dir, name)); err != nil {
		return err
	}
	return syncFolder(dir)
}

func syncFolder(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
