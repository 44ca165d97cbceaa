package e2e

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"nlb/balancer"
	"nlb/internal/golden"
)

const pageHead = `# Conformance

What nlb does, shown case by case with packets: in network namespaces with clients, targets, a segment and a node of
pods, targets say who called. Each case is shown for the protocols and families that it names, with one file and one
daemon for all cases.

` + "```sh unrun=minutes" + `
go test ./internal/e2e -run 'TestConformance$'                 # nftables; root, about 12 s
NLB_DATAPLANE=ipvs go test ./internal/e2e -run 'TestConformance$'   # IPVS, where the kernel has it
go test ./internal/e2e -run 'TestConformance$/drain$/tcp4'     # one case
make test-vm PKG=./internal/e2e                                # both in Debian's kernels 6.1 and 6.12, emulated, half of each case's flavours on each
make test-vm KERNEL=6.12 PKG=./internal/e2e RUN='TestConformanceIPVS$'  # one of them
` + "```" + `

Where a dataplane cannot do what a case asks for, its column says what happens, which is shown as well.

`

// page is docs/conformance.md.
func page() string {
	var b strings.Builder
	b.WriteString(pageHead)
	b.WriteString("| case | what is shown | for | nftables | IPVS |\n|---|---|---|---|---|\n")
	for _, c := range cases() {
		over := "TCP, UDP; IPv4, IPv6"
		switch {
		case c.over == nil:
		case c.over[0].network == "tcp":
			over = "TCP; IPv4, IPv6"
		default:
			over = "UDP; IPv4, IPv6"
		}
		verdict := func(d balancer.Dataplane) string {
			if reason := cannot[d][c.name]; reason != "" {
				return reason
			}
			return "yes"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s | %s |\n", c.name, c.shows, over, verdict(balancer.NFTables), verdict(balancer.IPVS))
	}
	return b.String()
}

// TestPageOfConformance compares docs/conformance.md with the cases.
func TestPageOfConformance(t *testing.T) {
	golden.CheckFile(t, filepath.Join("..", "..", "docs", "conformance.md"), page())
	known := map[string]bool{}
	for _, c := range cases() {
		if known[c.name] {
			t.Errorf("two cases are called %s", c.name)
		}
		known[c.name] = true
	}
	for plane, reasons := range cannot {
		for name := range reasons {
			if !known[name] {
				t.Errorf("%v cannot %s, which is no case", plane, name)
			}
		}
	}
}
