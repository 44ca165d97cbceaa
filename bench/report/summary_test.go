package report

import (
	"strings"
	"testing"
)

func TestWriteSummary(t *testing.T) {
	run := judged(t, Goal{"rate", GoalRow{Contestant: "ours"}, GoalRow{Contestant: "theirs"}, 0.98})
	var b strings.Builder
	if err := WriteSummary(&b, run); err != nil {
		t.Fatal(err)
	}
	golden(t, "summary.txt", []byte(b.String()))
}
