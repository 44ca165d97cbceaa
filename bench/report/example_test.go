package report

import (
	"bytes"
	"io"
	"math/rand/v2"
	"testing"
	"time"
)

// exampleHeader has every field and what is hard to show: several cases and
// jobs, a metric without a baseline, and text that means something elsewhere.
func exampleHeader() Header {
	return Header{
		Schema: Schema, Start: time.Date(2026, 10, 14, 12, 30, 0, 0, time.UTC),
		Command: "bench/run.sh -quick=false | tee 'a & b'",
		Flags:   map[string]string{"rounds": "9", "nlb": "bin/nlb"}, Mode: Full, Rounds: 9,
		Machine:    Machine{CPU: "Example CPU <3 GHz>", Cores: 2, Core: 1, RAMBytes: 8 << 30, Kernel: "6.12.0"},
		LoadBefore: [3]float64{0.05, 0.1, 0.2},
		Contestants: []Contestant{
			{Name: "direct", Role: Baseline, Job: "none", Commands: []string{"sysctl -w net.ipv4.ip_forward=1"}},
			{Name: "minimal DNAT", Role: Peer, Job: "DNAT", Version: "nftables v1.0.6", Commands: []string{"nft -f -"}, Config: "table ip minimal {\n\tchain prerouting {\n\t}\n}\n"},
			{Name: "nginx stream, UDP", Role: Peer, Job: "DNAT", Version: "nginx/1.22.1"},
			{Name: "nlb preserve", Role: NLB, Job: "DNAT", Version: "nlb 1.0", Commands: []string{"nlb run -c nlb.yml"}, Config: "client_ip: preserve # ```` not the end ````\n"},
			{Name: "HAProxy, splice-request <b>|</b>", Role: Peer, Job: "PROXY protocol", Version: "HAProxy 2.6.12"},
			{Name: "nlb proxy_protocol_v2", Role: NLB, Job: "PROXY protocol", Version: "nlb 1.0"},
		},
		Metrics: []Metric{
			{Name: "UDP packets", Unit: "packets/s", Better: More, Limited: true, Cases: []string{"listeners=1", "listeners=1000"}},
			{Name: "balancer's CPU for a connection", Unit: "µs", Better: Less, Decimals: 2},
			{Name: "p50 of 4000 requests a second", Unit: "µs", Better: Less, Decimals: 1},
			{Name: "p99 of 4000 requests a second", Unit: "µs", Better: Less, Decimals: 1, PrintedOnly: true},
			{Name: "bulk of 8 flows", Unit: "Gbit/s", Better: More, Decimals: 2},
		},
	}
}

// levels are about what each contestant of exampleHeader has in a metric; 0 is
// not measured.
var levels = map[string][]float64{
	"UDP packets":                     {1.29e6, 877e3, 410e3, 869e3, 0, 0},
	"balancer's CPU for a connection": {0, 0, 0, 0, 38.4, 33.2},
	"p50 of 4000 requests a second":   {41, 47, 0, 47.5, 78, 61},
	"p99 of 4000 requests a second":   {90, 101, 0, 99, 160, 131},
}

// writeExample writes an example run with values that spread by up to noise (a
// part of them) either way, times factor where it says so; keep ends the run
// after so many measurements.
func writeExample(t testing.TB, w io.Writer, seed uint64, noise float64, factor func(Measurement) float64, keep int) {
	t.Helper()
	h := exampleHeader()
	out, err := NewWriter(w, h)
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(seed, 0))
	for round := 1; round <= h.Rounds; round++ {
		for _, m := range h.Metrics {
			for _, c := range m.cases() {
				for _, i := range r.Perm(len(h.Contestants)) {
					if levels[m.Name] == nil || levels[m.Name][i] == 0 {
						continue
					}
					v := Measurement{Round: round, Metric: m.Name, Case: c, Contestant: h.Contestants[i].Name, Unit: m.Unit}
					v.Value = levels[m.Name][i] * (1 + noise*(2*r.Float64()-1)) * factor(v)
					if keep--; keep < 0 {
						return
					}
					if err := out.Measure(v); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
	}
	for _, n := range []Note{
		{Text: "ksoftirqd had 3 % of the core\nin round 2"},
		{Metric: "UDP packets", Case: "listeners=1000", Contestant: "nlb preserve", Text: "7 packets lost <script>alert(1)</script>"},
	} {
		if err := out.Note(n); err != nil {
			t.Fatal(err)
		}
	}
	if err := out.End(End{Seconds: 61.5, LoadAfter: [3]float64{1.01, 0.5, 0.3}}); err != nil {
		t.Fatal(err)
	}
}

func unchanged(Measurement) float64 { return 1 }

// example is writeExample's run, read.
func example(t testing.TB, seed uint64, noise float64, factor func(Measurement) float64) *Run {
	t.Helper()
	var b bytes.Buffer
	writeExample(t, &b, seed, noise, factor, 1e6)
	run, err := Read(&b)
	if err != nil {
		t.Fatal(err)
	}
	return run
}
