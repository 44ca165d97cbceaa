package worker

import (
	"errors"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"
)

// TestManagerWithoutProgramOnlyWaits: it starts none, and gives up when nobody
// else does.
func TestManagerWithoutProgramOnlyWaits(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "relay.sock")
	synctest.Test(t, func(t *testing.T) {
		m := New(ManagerOptions{Socket: socket})
		begun := time.Now()
		if _, err := m.start(t.Context(), false); !errors.Is(err, ErrNotRunning) {
			t.Errorf("error %v, want ErrNotRunning", err)
		}
		if took := time.Since(begun); took < otherWithin || took > otherWithin+otherPoll {
			t.Errorf("it waited for %s", took)
		}
	})
}
