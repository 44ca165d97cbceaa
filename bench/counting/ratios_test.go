package counting

import (
	"encoding/json"
	"flag"
	"fmt"
	"math"
	"os"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"nlb/bench/part"
)

var update = flag.Bool("update", false, "record what TestGuestRatios counts")

const recordFile = "testdata/ratios.json"

// TestGuestRatios fails if nlb takes more instructions than it did, beside the
// smallest ruleset that does the same.
func TestGuestRatios(t *testing.T) {
	needsStatic(t)
	t.Parallel()
	c, err := NewCounter(t.Context(), program, Series)
	if err != nil {
		t.Fatal(err)
	}
	counts, err := c.Count(t.Context(), needed(), limit, t.Output())
	if err != nil {
		t.Fatal(err)
	}
	now := ratios(c.Machine(), counts)
	text, err := json.MarshalIndent(now, "", "\t")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s", text)
	if *update {
		if err := os.WriteFile(recordFile, append(text, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	for _, complaint := range compare(readRecord(t), now) {
		t.Error(complaint)
	}
	if t.Failed() {
		t.Log("if that is meant: make record-instructions, and commit " + recordFile)
	}
}

func readRecord(t *testing.T) *record {
	t.Helper()
	text, err := os.ReadFile(recordFile)
	if err != nil {
		t.Fatal(err)
	}
	var r record
	if err := json.Unmarshal(text, &r); err != nil {
		t.Fatalf("%s: %v", recordFile, err)
	}
	return &r
}

// A record has what nlb's ways cost by a boot, beside ways without it.
type record struct {
	// Machine is the kernel and the emulator, as Counter.Machine has it.
	Machine string  `json:"machine"`
	Ratios  []ratio `json:"ratios"`
}

// A ratio is that of an nlb way's instructions for a metric, all of them, to
// those of another way in the same boot.
type ratio struct {
	Metric string `json:"metric"`
	Way    string `json:"way"`
	// Minimum is the ratio to the way that does the same job with the least
	// (Way.Against). This is what nlb is answerable for: what a kernel changes for
	// both cancels out.
	Minimum float64 `json:"minimum"`
	// Direct is the ratio to a router, for people.
	Direct float64 `json:"direct"`
}

// guarded are the ways of nlb's whose ratios are recorded.
var guarded = []*Way{known(part.Preserve), known(part.Hairpin), known(part.SNAT), known(part.PreserveFast), known(part.PreserveIPVS)}

// needed are the names of the guarded ways, and before each those that it is
// compared with.
func needed() []string {
	names := []string{part.Direct}
	for _, w := range guarded {
		for _, n := range []string{w.Against, w.Name} {
			if !slices.Contains(names, n) {
				names = append(names, n)
			}
		}
	}
	return names
}

// ratios are those of the guarded ways in a boot that has counted the needed ones.
func ratios(machine string, c Counts) *record {
	r := &record{Machine: machine}
	for m, metric := range metrics {
		for _, w := range guarded {
			n := c[m][w.Name]
			r.Ratios = append(r.Ratios, ratio{
				Metric: metric.name, Way: w.Name,
				Minimum: rounded(n / c[m][w.Against]), Direct: rounded(n / c[m][part.Direct]),
			})
		}
	}
	return r
}

// rounded has the digits of a ratio in which two boots agree, and one more.
func rounded(v float64) float64 { return math.Round(v*1e4) / 1e4 }

// How far a ratio may be from the recorded one. Boots of the same machine are
// within 0.5 %. Another kernel, which Debian releases every few weeks, may have
// another price for what nlb has more of than the minimum.
const (
	tolerance       = 0.02
	toleranceAbroad = 0.05
)

// compare says what is wrong with the counted ratios, by the recorded ones. Where
// nlb has become better it is to be recorded, or else as much could be lost again
// unseen; but only by who has the machine on which it was.
func compare(was, is *record) (complaints []string) {
	same := was.Machine == is.Machine
	limit := tolerance
	if !same {
		limit = toleranceAbroad
	}
	for _, now := range is.Ratios {
		i := slices.IndexFunc(was.Ratios, func(r ratio) bool { return r.Metric == now.Metric && r.Way == now.Way })
		if i < 0 {
			complaints = append(complaints, fmt.Sprintf("%s, %s: no ratio is recorded", now.Metric, now.Way))
			continue
		}
		then := was.Ratios[i]
		change := now.Minimum/then.Minimum - 1
		verdict := ""
		switch {
		case change > limit:
			verdict = "worse"
		case change < -limit && same:
			verdict = "better: record it"
		default:
			continue
		}
		complaints = append(complaints, fmt.Sprintf("%s, %s: %.3f times the minimum is recorded, %.3f counted (%+.1f %%; %.3f and %.3f times direct routing): %s",
			now.Metric, now.Way, then.Minimum, now.Minimum, 100*change, then.Direct, now.Direct, verdict))
	}
	return complaints
}

func TestCompare(t *testing.T) {
	recorded := &record{Machine: "here", Ratios: []ratio{
		{Metric: "packet", Way: "nlb", Minimum: 1.2, Direct: 1.5},
		{Metric: "connection", Way: "nlb", Minimum: 2, Direct: 3},
	}}
	counted := func(machine string, packet, connection float64) *record {
		return &record{Machine: machine, Ratios: []ratio{
			{Metric: "packet", Way: "nlb", Minimum: packet, Direct: 1.6},
			{Metric: "connection", Way: "nlb", Minimum: connection, Direct: 3},
		}}
	}
	worse := []string{"packet, nlb: 1.200 times the minimum is recorded, 1.230 counted (+2.5 %; 1.500 and 1.600 times direct routing): worse"}
	for _, c := range []struct {
		name string
		now  *record
		want []string
	}{
		{"the same", counted("here", 1.2, 2), nil},
		{"within the tolerance", counted("here", 1.22, 1.97), nil},
		{"worse", counted("here", 1.23, 2), worse},
		{"better", counted("here", 1.2, 1.9), []string{
			"connection, nlb: 2.000 times the minimum is recorded, 1.900 counted (-5.0 %; 3.000 and 3.000 times direct routing): better: record it",
		}},
		{"somewhat worse on another machine", counted("there", 1.23, 2), nil},
		{"better on another machine", counted("there", 1.2, 1.5), nil},
		{"much worse on another machine", counted("there", 1.2, 2.2), []string{
			"connection, nlb: 2.000 times the minimum is recorded, 2.200 counted (+10.0 %; 3.000 and 3.000 times direct routing): worse",
		}},
		{"unknown", &record{Machine: "here", Ratios: []ratio{{Metric: "packet", Way: "other", Minimum: 1}}}, []string{
			"packet, other: no ratio is recorded",
		}},
	} {
		if diff := cmp.Diff(c.want, compare(recorded, c.now)); diff != "" {
			t.Errorf("%s: %s", c.name, diff)
		}
	}
}

func TestRatios(t *testing.T) {
	counts := make(Counts, len(metrics))
	for m := range counts {
		counts[m] = make(map[string]float64)
		for i, name := range needed() {
			counts[m][name] = float64(m+1) * float64(i+1)
		}
	}
	r := ratios("here", counts)
	if len(r.Ratios) != len(metrics)*len(guarded) {
		t.Fatalf("%d ratios", len(r.Ratios))
	}
	// Direct routing, minimal DNAT and nlb preserve are the first three.
	if diff := cmp.Diff(ratio{Metric: metrics[0].name, Way: part.Preserve, Minimum: 3. / 2, Direct: 3}, r.Ratios[0]); diff != "" {
		t.Error(diff)
	}
	for _, ratio := range r.Ratios {
		if !(ratio.Minimum > 0 && ratio.Direct > 0) {
			t.Errorf("%+v", ratio)
		}
	}
}

// TestRecordIsComplete has a ratio for each guarded way and metric, and no other.
func TestRecordIsComplete(t *testing.T) {
	want, got := make(map[[2]string]int), make(map[[2]string]int)
	for _, m := range metrics {
		for _, way := range guarded {
			want[[2]string{m.name, way.Name}] = 1
		}
	}
	for _, r := range readRecord(t).Ratios {
		got[[2]string{r.Metric, r.Way}]++
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
