package main

import (
	"bytes"
	"encoding/json"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"nlb/bench/counting"
	"nlb/bench/measure"
	"nlb/bench/part"
)

// testBoot has 900 instructions for the first way and 100 more for each next.
func testBoot(more float64) counting.Counts {
	c := make(counting.Counts, len(counting.Metrics()))
	for m := range c {
		c[m] = make(map[string]float64)
		for i, w := range counting.Ways {
			c[m][w.Name] = 900 + more + 100*float64(i)
		}
	}
	return c
}

func TestNewReport(t *testing.T) {
	r := newReport([]counting.Counts{testBoot(0), testBoot(1000)})
	if len(r.Metrics) != len(counting.Metrics()) || r.Boots != 2 {
		t.Fatalf("%d metrics, %d boots", len(r.Metrics), r.Boots)
	}
	// Direct routing is the second way, minimal DNAT the third.
	want := wayReport{
		Name:         part.Preserve,
		Instructions: measure.Summary{Median: 1700, Min: 1200, Max: 2200},
		Added:        measure.Summary{Median: 200, Min: 200, Max: 200},
		Ratio:        measure.Summary{Median: 1.15, Min: 1.1, Max: 1.2},
		Against:      part.MinimalDNAT,
		Beyond:       &measure.Summary{Median: 100, Min: 100, Max: 100},
	}
	ways := r.Metrics[0].Ways
	i := slices.IndexFunc(ways, func(w wayReport) bool { return w.Name == part.Preserve })
	if i < 0 {
		t.Fatalf("no %s in the report", part.Preserve)
	}
	if diff := cmp.Diff(want, ways[i]); diff != "" {
		t.Error(diff)
	}
}

func TestTable(t *testing.T) {
	same := func(v float64) measure.Summary { return measure.Summary{Median: v, Min: v, Max: v} }
	r := report{Kernel: "6.12", QEMU: "7.2", Commit: "0123456789ab", Boots: 2, Metrics: []metricReport{{"packet", []wayReport{
		{Name: counting.Here, Instructions: same(700)},
		{Name: part.Direct, Instructions: measure.Summary{Median: 1000, Min: 998, Max: 1002}},
		{Name: "minimal", Instructions: same(1500), Added: same(500), Ratio: same(1.5)},
		{Name: "nlb", Instructions: same(1600), Added: measure.Summary{Median: 600, Min: 590, Max: 610},
			Ratio: measure.Summary{Median: 1.6, Min: 1.598, Max: 1.602}, Against: "minimal", Beyond: new(same(100))},
	}}}}
	const want = `Linux 6.12, QEMU 7.2, nlb 0123456789ab, 2 boots. Instructions, the sender's and the receiver's included; ± is half of what the boots differ by.

packet
                           instructions  ±  added  ±   ratio  ±      beyond the minimum
  sockets on the balancer  700           0
  direct routing           1000          2
  minimal                  1500          0  +500   0   1.500  0.000
  nlb                      1600          0  +600   10  1.600  0.002  +100
`
	var b bytes.Buffer
	if err := measure.Write(&b, "table", &r); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Error(diff)
	}
	b.Reset()
	var back report
	if err := measure.Write(&b, "json", &r); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b.Bytes(), &back); err != nil || !cmp.Equal(r, back) {
		t.Errorf("%v\n%s", err, cmp.Diff(r, back))
	}
}

func TestDescribe(t *testing.T) {
	for _, c := range []struct{ revision, modified, want string }{
		{"", "", "unknown"},
		{"0123456789abcdef", "false", "0123456789ab"},
		{"0123456789abcdef", "true", "0123456789ab, modified"},
	} {
		if got := describe(map[string]string{"vcs.revision": c.revision, "vcs.modified": c.modified}); got != c.want {
			t.Errorf("%+v: %q", c, got)
		}
	}
}

func TestWhatIsMissingIsSaid(t *testing.T) {
	var stdout, stderr bytes.Buffer
	o := options{program: filepath.Join(t.TempDir(), "nlb"), kernel: "6.12", boots: 1, format: "table"}
	err := run(t.Context(), o, &stdout, &stderr)
	if err == nil || !strings.HasPrefix(err.Error(), "needs nlb itself, linked statically: make build-static builds it: ") {
		t.Error(err)
	}
}
