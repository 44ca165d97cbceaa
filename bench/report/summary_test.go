package report

import (
	"strings"
	"testing"

	"nlb/internal/golden"
)

func TestWriteSummary(t *testing.T) {
	run := judged(t, Goal{"rate", GoalRow{Contestant: "ours"}, GoalRow{Contestant: "theirs"}, 0.98})
	var b strings.Builder
	if err := WriteSummary(&b, run); err != nil {
		t.Fatal(err)
	}
	golden.Check(t, "summary.txt", []byte(b.String()))
}
