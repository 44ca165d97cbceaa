// Package golden compares what a test got with a file in its testdata. With the
// flag -update it writes the file: go test ./balancer/nft -update.
package golden

import (
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write anew what tests compare with: golden files, and tables in docs/")

// Update reports whether files are to be written instead of compared with.
func Update() bool { return *update }

// Check compares got with testdata/name.
func Check[T string | []byte](t testing.TB, name string, got T) {
	t.Helper()
	CheckFile(t, filepath.Join("testdata", filepath.FromSlash(name)), got)
}

// CheckFile compares got with all of a file, wherever that is.
func CheckFile[T string | []byte](t testing.TB, path string, got T) {
	t.Helper()
	if Update() {
		Write(t, path, string(got))
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("-update writes it: %v", err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s (-want +got), -update writes it:\n%s", path, diff)
	}
}

// Write writes a file, and its folder.
func Write(t testing.TB, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}
