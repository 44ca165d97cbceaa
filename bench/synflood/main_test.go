package main

import (
	"bytes"
	"strings"
	"testing"
)

func TestTable(t *testing.T) {
	var b bytes.Buffer
	r := Report{Rows: []Row{
		{Asked: 250, Sent: 249.6, Honest: 2000, Succeeded: 1990, Flows: 1250},
		{Cookies: true, Proxied: true, Asked: 1250, Sent: 1250, Honest: 0},
	}}
	if err := r.Table(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"no SYN cookies  open", "250", "99.50 %", "1250", "SYN cookies     SYN proxy", "0.00 %"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in\n%s", want, b.String())
		}
	}
}
