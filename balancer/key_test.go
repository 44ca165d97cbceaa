package balancer

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestKeyIsDrawnOnceAndKept(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made", "on", "the", "way")
	if _, err := LoadKey(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("a key from nowhere: %v", err)
	}
	first, err := LoadOrCreateKey(dir)
	if err != nil {
		t.Fatal(err)
	}
	second, err := LoadOrCreateKey(dir)
	if err != nil {
		t.Fatal(err)
	}
	if first != second || first == (HashKey{}) {
		t.Errorf("keys %x and %x", first, second)
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != 1 {
		t.Errorf("left behind: %v", files)
	}
	info, err := os.Stat(filepath.Join(dir, keyFile))
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}
}

func TestDamagedKeyIsNeverReplaced(t *testing.T) {
	for _, text := range []string{"", "\n", "00112233445566778899aabbccddeef", "00112233445566778899aabbccddeeffff", "00112233445566778899aabbccddeegg\n"} {
		path := filepath.Join(t.TempDir(), keyFile)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := LoadOrCreateKey(filepath.Dir(path))
		if err == nil || !strings.Contains(err.Error(), path+" is damaged") || !strings.Contains(err.Error(), "remove it") {
			t.Errorf("%q: error %v", text, err)
		}
		if kept, err := os.ReadFile(path); err != nil || string(kept) != text {
			t.Errorf("%q became %q, %v", text, kept, err)
		}
	}
}
