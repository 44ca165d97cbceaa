package golden

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// A judge is a test that notes how it failed.
type judge struct {
	testing.TB
	text string
}

func (j *judge) Helper() {}

func (j *judge) Errorf(format string, args ...any) { j.text = fmt.Sprintf(format, args...) }

func (j *judge) Fatalf(format string, args ...any) { j.Errorf(format, args...); runtime.Goexit() }

// judged is what a test says that compares a file with a text.
func judged(t *testing.T, path, got string) string {
	j := &judge{TB: t}
	done := make(chan struct{})
	go func() { defer close(done); CheckFile(j, path, got) }()
	<-done
	return j.text
}

func TestCheck(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a", "b.txt")
	if text := judged(t, path, "one"); !strings.Contains(text, path) || !strings.Contains(text, "-update writes it") {
		t.Errorf("of a missing file it says %q", text)
	}
	*update = true
	text := judged(t, path, "one")
	*update = false
	if written, err := os.ReadFile(path); text != "" || err != nil || string(written) != "one" {
		t.Errorf("-update wrote %q (%v), and says %q", written, err, text)
	}
	if text := judged(t, path, "one"); text != "" {
		t.Errorf("of the same it says %q", text)
	}
	if text := judged(t, path, "two"); !strings.Contains(text, `"one"`) || !strings.Contains(text, `"two"`) {
		t.Errorf("of another it says %q", text)
	}
}
