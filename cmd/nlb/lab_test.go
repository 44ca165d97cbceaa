package main

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"nlb/bench/traps"
)

func TestNearScenarios(t *testing.T) {
	for word, want := range map[string]string{
		"hairpin-slef":   "hairpin-self",
		"rpfilter":       "rp-filter-strict",
		"server-first":   "proxy-protocol-server-first",
		"udp-stale":      "stale-udp",
		"":               "hairpin-self", // nothing is near: the first
		"vip-expose-all": "vip-exposes-host",
	} {
		if got := nearScenarios(word, traps.All()); got[0] != want {
			t.Errorf("near %q: %v, want %s first", word, got, want)
		}
	}
}

func TestChosenScenarios(t *testing.T) {
	// In the order of the list, whatever the order of the arguments.
	chosen, err := chosenScenarios([]string{"stale-udp", "hairpin-self"})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, sc := range chosen {
		names = append(names, sc.Name)
	}
	if diff := cmp.Diff([]string{"hairpin-self", "stale-udp"}, names); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if all, err := chosenScenarios([]string{"all"}); err != nil || len(all) != len(traps.All()) {
		t.Errorf("all: %d scenarios, %v", len(all), err)
	}
}
