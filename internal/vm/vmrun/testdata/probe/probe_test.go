package probe

import (
	"os"
	"os/exec"
	"testing"
	"time"
)

func TestPass(t *testing.T) {
	if Half(false) != 1 {
		t.Error("not 1")
	}
	text, err := os.ReadFile("testdata/file.txt")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("testdata %s", text)
}

func TestFail(t *testing.T) { t.Error("failed on purpose") }

func TestSkip(t *testing.T) { t.Skip("skipped on purpose") }

func TestExit(*testing.T) { os.Exit(7) }

// TestDaemon leaves a process behind that holds standard output open.
func TestDaemon(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	cmd.Stdout = os.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
}

// TestCrash takes the kernel down.
func TestCrash(t *testing.T) {
	if err := os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0); err != nil {
		t.Fatal(err)
	}
}

// Without a timer the runtime would notice, and panic.
func TestHang(*testing.T) { <-time.After(time.Hour) }
