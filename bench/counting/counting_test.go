package counting

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"nlb/bench/lab"
	"nlb/bench/part"
	"nlb/config"
)

func TestMain(m *testing.M) {
	MaybeGuest()
	lab.MaybeRunAgent()
	os.Exit(m.Run())
}

// TestLoads runs each load for a few rounds over a router in namespaces of this
// host: all that is sent must arrive, in every run.
func TestLoads(t *testing.T) {
	for _, name := range []string{Here, part.Direct} {
		s, err := newSite(t.Context(), known(name), "")
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		t.Cleanup(func() {
			if err := s.close(); err != nil {
				t.Error(err)
			}
		})
		for _, m := range metrics {
			m.batches, m.runs = 3, 2
			var n float64
			err := s.Clients[0].Do(func() (err error) {
				n, err = m.count(s)
				return err
			})
			if err != nil || n <= 0 {
				t.Errorf("%s, %s: %g, %v", name, m.name, n, err)
			}
		}
	}
}

// TestConfigsAreValid has nlb's own parser read the configuration of each way.
func TestConfigsAreValid(t *testing.T) {
	for _, w := range Ways {
		if w.nlb.ClientIP == "" {
			continue
		}
		text := strings.NewReplacer("VIP", lab.VIP4.String(), "T0", "10.0.1.11", "T1", "10.0.1.12").Replace(w.config())
		c, err := config.Parse("nlb.yaml", []byte(text))
		if err != nil {
			t.Errorf("%s: %v", w.Name, err)
			continue
		}
		if got := len(c.Spec.Listeners); got < w.nlb.Listeners {
			t.Errorf("%s: %d listeners", w.Name, got)
		}
		if got := len(c.Spec.TargetGroups[0].Targets); got != targets {
			t.Errorf("%s: %d targets", w.Name, got)
		}
	}
}

// TestRulesetsAreValid has the real nft read the ruleset of each way, by the names
// of links that a routed lab has. Its flowtable needs a kernel that has one.
func TestRulesetsAreValid(t *testing.T) {
	s, err := newSite(t.Context(), known(part.Direct), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.close(); err != nil {
			t.Error(err)
		}
	})
	for _, w := range Ways {
		if w.ruleset == "" || w.fast {
			continue
		}
		if err := s.enter(t.Context(), w.ruleset, "nft", "--check", "-f", "-"); err != nil {
			t.Errorf("%s: %v", w.Name, err)
		}
	}
	if err := s.enter(t.Context(), "table ip minimal { nonsense }", "nft", "--check", "-f", "-"); err == nil {
		t.Error("nft takes anything")
	}
}

func TestWaysAreComparedWithOthers(t *testing.T) {
	seen := map[string]bool{"": true}
	for _, w := range Ways {
		if !seen[w.Against] {
			t.Errorf("%s is compared with %q, which isn't among the ways before it", w.Name, w.Against)
		}
		if seen[w.Name] {
			t.Errorf("there are two ways %q", w.Name)
		}
		seen[w.Name] = true
	}
}

func TestParseCounts(t *testing.T) {
	ways := []string{part.Direct, part.Preserve}
	counts := Counts{{ways[0]: 1, ways[1]: 2}, {ways[0]: 3, ways[1]: 4}, {ways[0]: 5, ways[1]: 6}}
	text, err := json.Marshal(counts)
	if err != nil {
		t.Fatal(err)
	}
	got, err := parseCounts(text, ways)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(counts, got); diff != "" {
		t.Error(diff)
	}
	for bad, want := range map[string]string{
		"":                             "the guest's results: ",
		"[{}]":                         "the guest's results have 1 metrics, not 3",
		`[{"direct routing":1},{},{}]`: metrics[0].name + ", nlb preserve: the guest counted 0",
		strings.ReplaceAll(string(text), "4", "0"): metrics[1].name + ", nlb preserve: the guest counted 0",
	} {
		if _, err := parseCounts([]byte(bad), ways); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s: %v, want %s", bad, err, want)
		}
	}
}

func TestObeySaysWhatIsWrong(t *testing.T) {
	for bad, want := range map[string]string{
		"":                    "what to count: ",
		`{"Ways":["nobody"]}`: `there is no way "nobody"`,
	} {
		var out bytes.Buffer
		if err := obey(t.Context(), bad, &out, io.Discard); err == nil || !strings.HasPrefix(err.Error(), want) || out.Len() > 0 {
			t.Errorf("%s: %v, want %s; printed %q", bad, err, want, &out)
		}
	}
}
