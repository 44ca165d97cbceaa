// Package report keeps what a benchmark has measured, and makes of it what
// people read. It measures nothing.
//
// A run is a file of JSON Lines, each a record with one key that says which:
//
//	{"header":{"schema":1,…}}       first: the machine, contestants and metrics
//	{"measurement":{"round":1,…}}   one value of one contestant
//	{"note":{"text":"…"}}           what else has to be said
//	{"end":{"seconds":61.5,…}}      last, if nothing interrupted the run
//
// The program that measures makes a Header, which names everything that will be
// measured, and gives a Writer one value after the other:
//
//	f, err := os.Create("run.jsonl")
//	w, err := report.NewWriter(f, header)
//	for round := 1; round <= header.Rounds; round++ {
//		// in an order that changes:
//		err = w.Measure(report.Measurement{Round: round, Metric: "UDP packets", Case: "listeners=100", Contestant: "direct", Value: 1.29e6, Unit: "packets/s"})
//	}
//	err = w.End(report.End{Seconds: …, LoadAfter: …})
//
// Each record is written whole and at once, so that what was measured before an
// interruption is there. Then, or from the file alone at any time:
//
//	run, err := report.ReadFile("run.jsonl")
//	err = report.WriteFiles("result", run) // report.md, report.html, charts/
//
// What the author of a header decides:
//
//   - One contestant has the role Baseline: the way without any balancer, which
//     all others are divided by. It should be measured in every metric, case and
//     round, next to the others; without its value there is no ratio to it, and
//     CompareRuns has nothing to compare. What runs on another machine, such as
//     IPVS in a virtual one, is a metric or a case of its own with a baseline
//     measured there.
//   - Contestants are peers only if they do the same Job: a relay with PROXY
//     protocol headers is not to be measured against bare address translation.
//   - Metrics say which values are better, whether they may be compared at all
//     (PrintedOnly is for those whose values are mostly chance) and whether the
//     load generator can be what limits them.
//
// # Statistics
//
// Everything is by metric and case. A ratio is that of two contestants within a
// round, because what happens to the machine then happens to both; the median
// over the rounds is the result, and its spread is that of the rounds' ratios.
// The best peer is the one with the best median of its values among those that
// do the same job; it is the same in all rounds. A row is never dropped, but it
// is marked as
//
//   - noisy, if the quartiles of a ratio are further apart than NoisySpread of
//     its median, or if it has fewer than EnoughRounds rounds, of what is not counted;
//   - bounded by the generator, if the baseline has less than Headroom times
//     what is measured: then the generator is too much of it.
//
// # Two runs
//
// CompareRuns compares ratios to the baseline, because machines differ. The
// command is
//
//	go run ./bench/compare old.jsonl new.jsonl
package report
