package balancer

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func positive(n int) error {
	if n <= 0 {
		return errors.New("not positive")
	}
	return nil
}

func TestRecords(t *testing.T) {
	r := Records[int]{Dir: filepath.Join(t.TempDir(), "state"), Name: "was.json", Check: positive}
	holds := func(when string, want ...int) {
		t.Helper()
		got, err := r.Load()
		if d := cmp.Diff(want, got); err != nil || d != "" {
			t.Errorf("%s: %v, -want +got\n%s", when, err, d)
		}
	}
	store := func(n ...int) {
		t.Helper()
		if err := r.Store(n); err != nil {
			t.Error(err)
		}
	}
	holds("before")
	store()
	store(3, 1, 2)
	holds("stored", 3, 1, 2)
	store(4)
	holds("replaced", 4)
	store()
	if left, err := os.ReadDir(r.Dir); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}

	nowhere := Records[int]{Name: "was.json", Check: positive}
	if err := nowhere.Store([]int{1}); err != nil {
		t.Error(err)
	}
	if got, err := nowhere.Load(); err != nil || got != nil {
		t.Errorf("without a folder: %v, %v", got, err)
	}
}

// What is damaged is kept for who wants to look, and stands in nobody's way.
func TestDamagedRecords(t *testing.T) {
	r := Records[int]{Dir: t.TempDir(), Name: "was.json", Check: positive}
	for _, damage := range []string{"{", `{"settings": [-1]}`} {
		if err := os.WriteFile(r.path(), []byte(damage), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := r.Load()
		if _, ok := errors.AsType[*DamagedError](err); !ok {
			t.Errorf("%s: %v", damage, err)
		}
		if err := r.Store([]int{1}); err != nil {
			t.Error(err)
		}
		if got, err := r.Load(); err != nil || len(got) != 1 {
			t.Errorf("stored after %s: %v, %v", damage, got, err)
		}
	}
	for aside, want := range map[string]string{"was.json.damaged": "{", "was.json.damaged.2": `{"settings": [-1]}`} {
		if got, err := os.ReadFile(filepath.Join(r.Dir, aside)); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", aside, got, err)
		}
	}
}

// Records of another life say nothing about this one.
func TestRecordsOfElsewhere(t *testing.T) {
	boot, netns, err := here()
	if err != nil {
		t.Fatal(err)
	}
	r := Records[int]{Dir: t.TempDir(), Name: "was.json", Check: positive}
	for _, tt := range []struct {
		boot, netns string
		want        []int
	}{
		{boot, netns, []int{7}},
		{"another", netns, nil},
		{boot, "another", nil},
	} {
		b, err := json.Marshal(recordsFile[int]{tt.boot, tt.netns, []int{7}})
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(r.path(), b, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := r.Load()
		if d := cmp.Diff(tt.want, got); err != nil || d != "" {
			t.Errorf("%s %s: error %v (-want +got):\n%s", tt.boot, tt.netns, err, d)
		}
	}
}

func FuzzRecords(f *testing.F) {
	f.Add([]byte(`{"boot":"b","netns":"n","settings":[1,2]}`))
	f.Add([]byte(`{"boot":"b","netns":"n","settings":[0]}`))
	r := Records[int]{Check: positive}
	f.Fuzz(func(t *testing.T, b []byte) {
		records, err := r.parse(b, "b", "n")
		for _, n := range records {
			if err != nil || n <= 0 {
				t.Errorf("let %d through: %v", n, err)
			}
		}
	})
}
