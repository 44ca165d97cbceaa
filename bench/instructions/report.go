package main

import (
	"fmt"
	"io"
	"runtime/debug"

	"nlb/bench/counting"
	"nlb/bench/measure"
	"nlb/bench/part"
)

// A report is the outcome; its JSON form is stable, but for more fields.
type report struct {
	Kernel  string         `json:"kernel"`
	QEMU    string         `json:"qemu"`
	Commit  string         `json:"commit"`
	Boots   int            `json:"boots"`
	Metrics []metricReport `json:"metrics"`
}

type metricReport struct {
	Name string      `json:"name"`
	Ways []wayReport `json:"ways"`
}

// A wayReport has instructions for each packet or connection, over the boots.
type wayReport struct {
	Name string `json:"name"`
	// Instructions include the sender's and the receiver's.
	Instructions measure.Summary `json:"instructions"`
	// Added is how many more they are than without a balancer in the same boot,
	// Ratio how many times as many.
	Added measure.Summary `json:"added"`
	Ratio measure.Summary `json:"ratio"`
	// Against is the way that does the same job with the least, and Beyond how
	// many more instructions than there.
	Against string           `json:"against,omitempty"`
	Beyond  *measure.Summary `json:"beyond,omitempty"`
}

func newReport(boots []counting.Counts) *report {
	r := &report{Boots: len(boots)}
	for m, name := range counting.Metrics() {
		mr := metricReport{Name: name}
		direct := column(boots, m, part.Direct)
		for _, by := range counting.Ways {
			counts := column(boots, m, by.Name)
			wr := wayReport{
				Name:         by.Name,
				Instructions: measure.Summarize(counts),
				Added:        measure.Compare(counts, direct, more),
				Ratio:        measure.Compare(counts, direct, measure.Ratio),
			}
			if by.Against != "" {
				wr.Against = by.Against
				wr.Beyond = new(measure.Compare(counts, column(boots, m, by.Against), more))
			}
			mr.Ways = append(mr.Ways, wr)
		}
		r.Metrics = append(r.Metrics, mr)
	}
	return r
}

// more is how much more a is than b.
func more(a, b float64) float64 { return a - b }

// column is what each boot says of a way.
func column(boots []counting.Counts, metric int, way string) []float64 {
	values := make([]float64, len(boots))
	for i, b := range boots {
		values[i] = b[metric][way]
	}
	return values
}

// commit is what this program was built from, as the go command has recorded it.
func commit() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	settings := make(map[string]string)
	for _, s := range info.Settings {
		settings[s.Key] = s.Value
	}
	return describe(settings)
}

// describe is a commit by the settings of a build (runtime/debug.BuildSetting).
func describe(settings map[string]string) string {
	revision := settings["vcs.revision"]
	switch {
	case revision == "":
		return "unknown"
	case settings["vcs.modified"] == "true":
		return revision[:min(12, len(revision))] + ", modified"
	}
	return revision[:min(12, len(revision))]
}

// Table has the metrics one after the other.
func (r *report) Table(w io.Writer) error {
	fmt.Fprintf(w, "Linux %s, QEMU %s, nlb %s, %d boots. Instructions, the sender's and the receiver's included; ± is half of what the boots differ by.\n",
		r.Kernel, r.QEMU, r.Commit, r.Boots)
	for _, m := range r.Metrics {
		if err := measure.WriteSection(w, m.Name, m.rows()); err != nil {
			return err
		}
	}
	return nil
}

func (m *metricReport) rows() [][]string {
	rows := [][]string{{"", "instructions", "±", "added", "±", "ratio", "±", "beyond the minimum"}}
	for _, way := range m.Ways {
		row := []string{"  " + way.Name, fmt.Sprintf("%.0f", way.Instructions.Median), half(way.Instructions, 0), "", "", "", "", ""}
		if way.Name != part.Direct && way.Name != counting.Here {
			row[3], row[4] = fmt.Sprintf("%+.0f", way.Added.Median), half(way.Added, 0)
			row[5], row[6] = fmt.Sprintf("%.3f", way.Ratio.Median), half(way.Ratio, 3)
		}
		if way.Beyond != nil {
			row[7] = fmt.Sprintf("%+.0f", way.Beyond.Median)
		}
		rows = append(rows, row)
	}
	return rows
}

// half is half of how far the boots spread, with as many decimals.
func half(s measure.Summary, decimals int) string {
	return fmt.Sprintf("%.*f", decimals, (s.Max-s.Min)/2)
}
