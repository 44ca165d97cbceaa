package main

import (
	"errors"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

func TestParse(t *testing.T) {
	o, err := parse([]string{"--quick", "--peers", "none", "--nlb", "other/nlb", "--core=0"})
	if err != nil {
		t.Fatal(err)
	}
	if !o.quick || o.programs["nlb"] != "other/nlb" || o.core != 0 || o.flags["nlb"] != "other/nlb" || o.flags["rounds"] != "0" {
		t.Errorf("%+v", o)
	}
	for want, args := range map[string][]string{
		`unexpected argument "fast"`:        {"fast"},
		"--rounds: -1 is less than 1":       {"--rounds", "-1"},
		"unknown flag: --speed":             {"--speed"},
		`--modes: there is no "dsr", only `: {"--modes", "dsr"},
	} {
		if _, err := parse(args); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%q: %v, not %s", args, err, want)
		}
	}
	if _, err := parse([]string{"--help"}); !errors.Is(err, pflag.ErrHelp) {
		t.Errorf("--help: %v", err)
	}
	text := help()
	for _, want := range []string{"--quick ", "--peers ", "modes    preserve, ", "peers    nftables, ", "--haproxy program"} {
		if !strings.Contains(text, want) {
			t.Errorf("the help does not have %q:\n%s", want, text)
		}
	}
}
