package measure

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestColumns(t *testing.T) {
	rows := [][]string{{"", "median", "remark"}, {"  router", "7", ""}, {"  nlb", "", "slow"}}
	const want = "" +
		"          median  remark\n" +
		"  router  7\n" +
		"  nlb             slow\n"
	if diff := cmp.Diff(want, Columns(rows)); diff != "" {
		t.Error(diff)
	}
}
