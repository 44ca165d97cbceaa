package docs_test

import (
	"fmt"
	"strings"
	"testing"

	"nlb/balancer/top"
)

// TestScreenOfTop: the screen is what the program's own tests draw.
func TestScreenOfTop(t *testing.T) {
	for _, b := range blocks(read(t, "docs/top.md")) {
		if b.value("by") == t.Name() && b.text == read(t, "balancer/top/testdata/list-80x24.txt") {
			return
		}
	}
	t.Error("docs/top.md does not have balancer/top/testdata/list-80x24.txt as a block")
}

// TestKeysOfTop: the table has all keys, and none besides.
func TestKeysOfTop(t *testing.T) {
	want := []string{"| key | does |", "|---|---|"}
	for _, k := range top.Keys() {
		want = append(want, fmt.Sprintf("| `%s` | %s |", strings.Join(k.Names, "`, `"), k.Does))
	}
	if table := strings.Join(want, "\n"); !strings.Contains(read(t, "docs/top.md"), "\n"+table+"\n\n") {
		t.Errorf("docs/top.md does not have this table:\n%s", table)
	}
}
