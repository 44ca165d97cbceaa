// Package prometheus_test holds what an operator feeds to Prometheus and Grafana
// to what the daemon exposes, with Prometheus' own tools.
package prometheus_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"

	"nlb/balancer/metrics"
)

func read(t *testing.T, path string) []byte {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func promtool(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("promtool", args...).CombinedOutput(); err != nil {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

func TestRulesAreValid(t *testing.T) { promtool(t, "check", "rules", "--lint-fatal", "nlb.rules.yml") }

// TestIncidents plays the incidents of the file, before and during each.
func TestIncidents(t *testing.T) { promtool(t, "test", "rules", "nlb.rules_test.yml") }

// A rule is one of nlb.rules.yml.
type rule struct {
	Record      string            `yaml:"record"`
	Alert       string            `yaml:"alert"`
	Expr        string            `yaml:"expr"`
	Labels      map[string]string `yaml:"labels"`
	Annotations map[string]string `yaml:"annotations"`
}

func rules(t *testing.T) (all []rule) {
	t.Helper()
	var file struct {
		Groups []struct {
			Rules []rule `yaml:"rules"`
		} `yaml:"groups"`
	}
	if err := yaml.Unmarshal(read(t, "nlb.rules.yml"), &file); err != nil {
		t.Fatal(err)
	}
	for _, g := range file.Groups {
		all = append(all, g.Rules...)
	}
	return all
}

// TestEveryAlertHasAnIncident: one that was never seen to fire may be unable to,
// and one that was never seen silent may always fire.
func TestEveryAlertHasAnIncident(t *testing.T) {
	var file struct {
		Tests []struct {
			Alerts []struct {
				Name     string      `yaml:"alertname"`
				Expected []yaml.Node `yaml:"exp_alerts"`
			} `yaml:"alert_rule_test"`
		} `yaml:"tests"`
	}
	if err := yaml.Unmarshal(read(t, "nlb.rules_test.yml"), &file); err != nil {
		t.Fatal(err)
	}
	fires, silent := map[string]bool{}, map[string]bool{}
	for _, test := range file.Tests {
		for _, a := range test.Alerts {
			if len(a.Expected) > 0 {
				fires[a.Name] = true
			} else {
				silent[a.Name] = true
			}
		}
	}
	want := map[string]bool{}
	for _, r := range rules(t) {
		if r.Alert != "" {
			want[r.Alert] = true
		}
	}
	if diff := cmp.Diff(want, fires); diff != "" {
		t.Errorf("alerts, and those that fire in a test: %s", diff)
	}
	if diff := cmp.Diff(want, silent); diff != "" {
		t.Errorf("alerts, and those that are silent in a test: %s", diff)
	}
}

// TestAlertsSayWhatToDo: a summary, how bad it is, and a section to read.
func TestAlertsSayWhatToDo(t *testing.T) {
	page := string(read(t, "../../docs/metrics.md"))
	for _, r := range rules(t) {
		if r.Alert == "" {
			continue
		}
		if r.Annotations["summary"] == "" || !slices.Contains([]string{"warning", "critical"}, r.Labels["severity"]) {
			t.Errorf("%s: summary %q, severity %q", r.Alert, r.Annotations["summary"], r.Labels["severity"])
		}
		if want := "docs/metrics.md#" + strings.ToLower(r.Alert); r.Annotations["runbook"] != want {
			t.Errorf("%s: runbook %q, want %q", r.Alert, r.Annotations["runbook"], want)
		}
		if !strings.Contains(page, "\n### "+r.Alert+"\n") {
			t.Errorf("docs/metrics.md has no section %s", r.Alert)
		}
	}
}

// named matches what an expression may name of nlb's.
var named = regexp.MustCompile(`\bnlb[_:][a-z0-9_:]+`)

// checkNames fails for metrics that the daemon does not expose, and that no rule records.
func checkNames(t *testing.T, where, expr string) {
	t.Helper()
	known := map[string]bool{}
	for _, d := range metrics.Definitions() {
		known[d.Name] = true
		if d.Kind == metrics.Histogram {
			known[d.Name+"_bucket"], known[d.Name+"_sum"], known[d.Name+"_count"] = true, true, true
		}
	}
	for _, r := range rules(t) {
		known[r.Record] = true
	}
	for _, name := range named.FindAllString(expr, -1) {
		if !known[name] {
			t.Errorf("%s: there is no metric %s", where, name)
		}
	}
}

func TestRulesNameWhatThereIs(t *testing.T) {
	for _, r := range rules(t) {
		if !strings.Contains(r.Expr, "nlb") {
			t.Errorf("%s%s is not about nlb", r.Record, r.Alert)
		}
		checkNames(t, r.Record+r.Alert, r.Expr)
	}
}

// A panel is what these tests read of one of Grafana's.
type panel struct {
	ID          int    `json:"id"`
	Type        string `json:"type"`
	Title       string `json:"title"`
	Description string `json:"description"`
	Datasource  struct {
		UID string `json:"uid"`
	} `json:"datasource"`
	GridPos struct{ X, Y, W, H int } `json:"gridPos"`
	Targets []struct {
		RefID string `json:"refId"`
		Expr  string `json:"expr"`
	} `json:"targets"`
	FieldConfig *json.RawMessage `json:"fieldConfig"`
	Options     *json.RawMessage `json:"options"`
}

// TestDashboard: Grafana takes what it does not understand without a word, and shows nothing.
func TestDashboard(t *testing.T) {
	var d struct {
		UID           string  `json:"uid"`
		Title         string  `json:"title"`
		SchemaVersion int     `json:"schemaVersion"`
		Panels        []panel `json:"panels"`
		Templating    struct {
			List []struct {
				Name       string `json:"name"`
				Definition string `json:"definition"`
			} `json:"list"`
		} `json:"templating"`
	}
	if err := json.Unmarshal(read(t, "../grafana/nlb.json"), &d); err != nil {
		t.Fatal(err)
	}
	if d.UID == "" || d.Title == "" || d.SchemaVersion < 36 { // as of 36, data sources are objects
		t.Errorf("uid %q, title %q, schema version %d", d.UID, d.Title, d.SchemaVersion)
	}
	var variables []string
	for _, v := range d.Templating.List {
		variables = append(variables, v.Name)
		checkNames(t, "variable "+v.Name, v.Definition)
	}
	ids, taken := map[int]string{}, map[[2]int]string{}
	for _, p := range d.Panels {
		if other, twice := ids[p.ID]; twice {
			t.Errorf("%s and %s have the same id", p.Title, other)
		}
		ids[p.ID] = p.Title
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other := taken[[2]int{x, y}]; other != "" || x >= 24 {
					t.Fatalf("%s is not beside %q", p.Title, other)
				}
				taken[[2]int{x, y}] = p.Title
			}
		}
		if p.Type != "row" {
			checkPanel(t, &p, variables)
		}
	}
}

var variable = regexp.MustCompile(`\$\{?(\w+)`)

func checkPanel(t *testing.T, p *panel, variables []string) {
	t.Helper()
	if p.Title == "" || p.Description == "" || p.Datasource.UID != "${datasource}" || p.FieldConfig == nil || p.Options == nil || len(p.Targets) == 0 {
		t.Errorf("panel %d, %q: description %q, data source %q, %d queries", p.ID, p.Title, p.Description, p.Datasource.UID, len(p.Targets))
	}
	if p.GridPos.W == 0 || p.GridPos.H == 0 {
		t.Errorf("%s has no room", p.Title)
	}
	refs := map[string]bool{}
	for _, q := range p.Targets {
		if refs[q.RefID] || q.RefID == "" {
			t.Errorf("%s: two queries are %q", p.Title, q.RefID)
		}
		refs[q.RefID] = true
		checkNames(t, p.Title, q.Expr)
		for _, m := range variable.FindAllStringSubmatch(q.Expr, -1) {
			if m[1] != "__rate_interval" && !slices.Contains(variables, m[1]) {
				t.Errorf("%s: there is no variable %s", p.Title, m[1])
			}
		}
	}
}
