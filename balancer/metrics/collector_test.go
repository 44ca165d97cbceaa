package metrics

import (
	"context"
	"errors"
	"fmt"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"

	"nlb/balancer"
	"nlb/balancer/conntrack"
	"nlb/healthcheck"
	"nlb/internal/golden"
	"nlb/proxyproto/relay"
)

func addr(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func target(at string, state balancer.State, reason string, share int) balancer.TargetStatus {
	return balancer.TargetStatus{
		Target: balancer.Target{Address: addr(at).Addr(), Port: addr(at).Port(), Weight: 1},
		Health: balancer.Health{State: state, Reason: reason}, Share: share,
	}
}

// incident is a reading in which everything has happened: a group that fails
// open, one that is relayed but for one target, and an empty one.
func incident() Reading {
	mixed := target("10.0.1.14:25", balancer.Draining, balancer.ReasonDeregistrationInProgress, 0)
	mixed.Target.ClientIP = balancer.SNAT
	vip := netip.MustParseAddr("198.51.100.10")
	return Reading{
		Snapshot: &balancer.Snapshot{
			Spec: &balancer.Spec{Listeners: []balancer.Listener{
				{Name: "web", VIP: vip, Port: 80, Protocol: balancer.TCP, Forward: []balancer.WeightedGroup{{TargetGroup: "web", Weight: 1}, {TargetGroup: "empty", Weight: 0}}},
				{Name: "mail", VIP: netip.MustParseAddr("2001:db8:77::10"), Port: 25, Protocol: balancer.TCP, Forward: []balancer.WeightedGroup{{TargetGroup: "mail", Weight: 1}}},
			}},
			Groups: []balancer.TargetGroupStatus{
				{Name: "empty", Protocol: balancer.TCP, ClientIP: balancer.SNAT},
				{Name: "mail", Protocol: balancer.TCP, ClientIP: balancer.ProxyProtocolV2, Targets: []balancer.TargetStatus{
					target("10.0.1.13:25", balancer.Healthy, "", 1), mixed,
				}},
				{Name: "web", Protocol: balancer.TCP, ClientIP: balancer.Preserve, FailOpen: balancer.FailOpenState{Open: true}, Targets: []balancer.TargetStatus{
					target("10.0.1.11:8080", balancer.Unhealthy, balancer.ReasonTimeout, 1),
					target("[2001:db8:1::12]:8080", balancer.UnhealthyDraining, balancer.ReasonFailedHealthChecks, 1),
				}},
			},
			Generation: 3, Held: true, Passed: time.Unix(1700000010, 5e8), Converged: time.Unix(1700000000, 0), Took: 12 * time.Millisecond,
			Writes: 20, Repairs: 2, Failures: 4,
			Latency: balancer.Latency{Count: 4, Sum: 10 * time.Second, Buckets: [11]uint64{1, 0, 2, 10: 1}},
		},
		Kernel: &Kernel{
			Targets: map[balancer.TargetKey]balancer.Counters{
				{Group: "web", AddrPort: addr("10.0.1.11:8080")}: {ActiveFlows: 2, NewFlows: 7, Bytes: 900, Packets: 9, Resets: 1},
			},
			Totals: map[string]uint64{
				"unwanted_drops": 1, "invalid_drops": 2, "not_allowed_drops": 3, "no_target_drops": 4, "hairpin_drops": 5, "no_source_drops": 6, "hairpins": 7, "resets": 8,
				"relay_failed": 99, // the relay's, which are told otherwise
			},
		},
		Table:      &conntrack.Usage{Entries: 10, Limit: 1000, InsertFailed: 1, Dropped: 2, EarlyDropped: 3},
		LostEvents: 8,
		Relay: &relay.Stats{
			Connections: 5, MaxConnections: 500, OpenFiles: 60, MaxFiles: 1024, Accepted: 50, Refused: 1, Failed: 2, NoTarget: 3, IdleTimeouts: 4, Exhausted: 5, NoPort: 6,
			Targets: map[balancer.TargetKey]relay.TargetStats{{Group: "mail", AddrPort: addr("10.0.1.13:25")}: {Active: 4, New: 40, Bytes: 4000}},
		},
		Reload: Reload{OK: false, Succeeded: time.Unix(1699999999, 0)},
		Failed: map[string]error{},
	}
}

// probed has seen one probe end in each way.
func probed() *Probes {
	p := NewProbes()
	for k := healthcheck.OK; k <= healthcheck.Unmade; k++ {
		p.Observe("web", healthcheck.Result{Kind: k, Latency: 3 * time.Millisecond})
	}
	p.Observe("gone", healthcheck.Result{Kind: healthcheck.OK})
	p.Observe("gone", healthcheck.Result{Kind: healthcheck.Refused})
	p.Forget("gone")
	return p
}

func expose(t *testing.T, r Reading, p *Probes) string {
	t.Helper()
	c := NewCollector("v1.2.3", func(context.Context) Reading { return r }, p)
	answer := httptest.NewRecorder()
	NewHandler(c, zap.NewNop()).ServeHTTP(answer, httptest.NewRequest("GET", "/metrics", nil))
	if answer.Code != 200 {
		t.Fatalf("%d: %s", answer.Code, answer.Body)
	}
	return answer.Body.String()
}

// goVersion is what of nlb's own metrics differs from machine to machine.
var goVersion = regexp.MustCompile(`goversion="[^"]*"`)

// own are the samples of nlb's own metrics. That each has its help and type is
// what promtool looks at.
func own(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "nlb_") {
			b.WriteString(goVersion.ReplaceAllString(line, `goversion="go"`))
		}
	}
	return b.String()
}

func TestExposition(t *testing.T) {
	silent := incident()
	silent.Relay, silent.Kernel = nil, nil
	silent.Failed = map[string]error{SourceRelay: errors.New("timeout"), SourceDataplane: errors.New("busy")}
	for name, c := range map[string]struct {
		reading Reading
		probes  *Probes
	}{
		"incident.txt": {incident(), probed()},
		// What could not be counted is not there.
		"silent.txt": {silent, NewProbes()},
		// Before the first pass, with no relay.
		"start.txt": {Reading{Reload: Reload{OK: true, Succeeded: time.Unix(1700000000, 0)}, Kernel: &Kernel{}}, NewProbes()},
	} {
		t.Run(name, func(t *testing.T) { golden.Check(t, name, own(expose(t, c.reading, c.probes))) })
	}
}

// TestEveryMetricIsExposed: what the documentation lists can be seen, with those labels.
func TestEveryMetricIsExposed(t *testing.T) {
	text := expose(t, incident(), probed())
	for _, d := range Definitions() {
		if !strings.Contains(text, "\n# TYPE "+d.Name+" "+string(d.Kind)+"\n") {
			t.Errorf("%s is not exposed as a %s", d.Name, d.Kind)
		}
		sample := regexp.MustCompile(`(?m)^` + d.Name + `(?:_bucket)?(?:\{([^}]*)\})? `).FindStringSubmatch(text)
		if sample == nil {
			t.Errorf("%s has no sample", d.Name)
			continue
		}
		var labels []string
		for _, m := range regexp.MustCompile(`(\w+)="`).FindAllStringSubmatch(sample[1], -1) {
			if m[1] != "le" {
				labels = append(labels, m[1])
			}
		}
		want := slices.Sorted(slices.Values(d.Labels))
		if diff := cmp.Diff(want, labels, cmp.Transformer("empty", func(s []string) []string { return append([]string{}, s...) })); diff != "" {
			t.Errorf("labels of %s: %s", d.Name, diff)
		}
	}
}

// TestNamesAreGood asks promtool, which knows Prometheus' rules for names, units and help.
func TestNamesAreGood(t *testing.T) {
	cmd := exec.Command("promtool", "check", "metrics")
	cmd.Stdin = strings.NewReader(expose(t, incident(), probed()))
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("promtool check metrics: %v\n%s", err, out)
	}
}

// TestReadingEnds: a source that hangs is given up before the scraper gives up.
func TestReadingEnds(t *testing.T) {
	var deadline time.Time
	c := NewCollector("v1.2.3", func(ctx context.Context) Reading { deadline, _ = ctx.Deadline(); return Reading{} }, NewProbes())
	begun := time.Now()
	NewHandler(c, zap.NewNop()).ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/metrics", nil))
	if deadline.Before(begun) || deadline.After(time.Now().Add(scrapeWithin)) {
		t.Errorf("a reading that begins at %v may take until %v", begun, deadline)
	}
}

const (
	tableBegin = "<!-- metrics: written by go test ./balancer/metrics -update -->\n"
	tableEnd   = "<!-- end of metrics -->\n"
)

// TestDocumentation: docs/metrics.md has each metric, with its meaning.
func TestDocumentation(t *testing.T) {
	const path = "../../docs/metrics.md"
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, begins := strings.Cut(string(text), tableBegin)
	_, after, ends := strings.Cut(rest, tableEnd)
	if !begins || !ends {
		t.Fatalf("%s has no place for the metrics", path)
	}
	golden.CheckFile(t, path, before+tableBegin+table()+tableEnd+after)
}

func table() string {
	var b strings.Builder
	b.WriteString("| metric | labels | meaning | CloudWatch |\n|---|---|---|---|\n")
	for _, d := range Definitions() {
		var labels []string
		for _, l := range d.Labels {
			labels = append(labels, "`"+l+"`")
		}
		b.WriteString("| `" + d.Name + "` (" + string(d.Kind) + ") | " + strings.Join(labels, ", ") + " | " + d.Help + " | " + d.CloudWatch + " |\n")
	}
	return b.String()
}

// BenchmarkScrape exposes a hundred groups of a hundred targets each, without
// what it takes to read the kernel.
func BenchmarkScrape(b *testing.B) {
	r := incident()
	groups := make([]balancer.TargetGroupStatus, 100)
	for i := range groups {
		groups[i] = balancer.TargetGroupStatus{Name: fmt.Sprint("web-", i), ClientIP: balancer.SNAT, Targets: make([]balancer.TargetStatus, 100)}
		for j := range groups[i].Targets {
			groups[i].Targets[j] = target(fmt.Sprintf("10.0.%d.%d:80", i, j), balancer.Healthy, "", 1)
		}
	}
	s := *r.Snapshot
	s.Groups, r.Snapshot = groups, &s
	h := NewHandler(NewCollector("v1.2.3", func(context.Context) Reading { return r }, NewProbes()), zap.NewNop())
	b.ReportAllocs()
	for b.Loop() {
		answer := httptest.NewRecorder()
		h.ServeHTTP(answer, httptest.NewRequest("GET", "/metrics", nil))
		b.SetBytes(int64(answer.Body.Len()))
	}
}
