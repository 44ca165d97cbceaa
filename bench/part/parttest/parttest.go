// Package parttest has what the tests of the race's parts share.
package parttest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// BuildNLB builds nlb as it is here, and returns its path.
func BuildNLB(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "nlb")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", program, "nlb/cmd/nlb").CombinedOutput(); err != nil {
		t.Fatalf("build nlb: %v\n%s", err, out)
	}
	return program
}

// Script makes a program of a shell script, and returns its path.
func Script(t *testing.T, body string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

// NothingLeft fails if there is something in the folder for temporary files, which
// the test has set to one of its own, or a network namespace of this process.
func NothingLeft(t *testing.T) {
	t.Helper()
	for _, pattern := range []string{filepath.Join(os.TempDir(), "*"), fmt.Sprintf("/run/netns/nlb-%d-*", os.Getpid())} {
		if left, err := filepath.Glob(pattern); err != nil || len(left) > 0 {
			t.Errorf("left behind: %v, %v", left, err)
		}
	}
}
