package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"nlb/bench/lab"
	"nlb/internal/wait"
)

const (
	metricsAt    = "127.0.0.1:9469"
	prometheusAt = "127.0.0.1:9090"
)

// TestPrometheus lets Debian's Prometheus, with our rules, scrape a daemon whose
// target dies: the alerts that are meant for that fire, no others, and all
// queries of the dashboard have an answer. The port of the metrics is taken at
// first, which must keep nobody from forwarding.
func TestPrometheus(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{})
	serveTargets(t, top, 8080)
	for _, n := range top.Targets {
		serveOn(t, n, lab.Serve{Ports: []uint16{2525}, Networks: []string{"tcp"}, Proxy: true})
	}
	taken := listenOn(t, top.LB, metricsAt)
	d := serving(t, top, config{
		Sources: sources(top), VIPs: both(), Metrics: metrics{Address: metricsAt},
		Listeners: append(listen("web", "TCP", 80, "web"), listen("mail", "TCP", 25, "mail")...),
		Groups: []group{
			pool("web", "TCP", "preserve", 8080, targets(top.Targets...)),
			relayed("mail", 2525, targets(top.Targets...)),
		},
	})
	if log := d.log.String(); !strings.Contains(log, "http is not served") || !strings.Contains(log, "address already in use") {
		t.Error("the log does not say that the port is taken")
	}
	if err := taken.Close(); err != nil {
		t.Fatal(err)
	}
	p := startPrometheus(t, top.LB)
	// NLBDaemonAbsent may fire until the daemon has its port.
	wait.For(t, limit, "a scrape, and no alert", func() error {
		if err := p.is("up", 1); err != nil {
			return err
		}
		if err := p.rulesAreOK(); err != nil {
			return err
		}
		if firing := p.firing(t); len(firing) > 0 {
			return fmt.Errorf("firing %v", firing)
		}
		return nil
	})

	const calls = 20
	for _, port := range []uint16{80, 25} {
		if got := call(t, top.Clients[0], lab.Call{Network: "tcp", Dst: netip.AddrPortFrom(lab.VIP4, port), N: calls}); got.Failed > 0 {
			t.Fatalf("port %d: %v", port, got)
		}
	}
	for query, want := range map[string]float64{
		`sum(nlb_target_new_flows_total{target_group="web"})`:          calls,
		`sum(nlb_target_new_flows_total{target_group="mail"})`:         calls,
		`nlb_relay_accepted_connections_total`:                         calls,
		`nlb_target_group_targets{target_group="web",state="healthy"}`: 4, // by two addresses each
		`nlb_apply_in_force`:                          1,
		`sum(nlb_source_up)`:                          3,
		`count(nlb_target_processed_bytes_total > 0)`: 4, // of two groups and targets, by IPv4
		`count(nlb_target_processed_packets_total{target_group="mail"}>=0)`: 0,
	} {
		wait.For(t, limit, query, func() error { return p.is(query, want) })
	}

	top.Targets[1].Agent().Kill()
	d.waitHealthy("web", 2)
	d.waitHealthy("mail", 2)
	// Only the client itself is left, which preserve cannot serve.
	allFail(t, "hairpin", call(t, top.Targets[0], lab.Call{Network: "tcp", Dst: netip.AddrPortFrom(lab.VIP4, 80), Timeout: briefly}), lab.Timeout)
	d.write("listeners: 7")
	if out := d.run("reload"); out.code == 0 {
		t.Error("a bad file was taken")
	}
	want := []string{"NLBHairpinDropped", "NLBReloadFailed", "NLBTargetUnhealthy"}
	wait.For(t, limit, "alerts", func() error {
		if got := p.firing(t); !slices.Equal(got, want) {
			return fmt.Errorf("firing %v, want %v", got, want)
		}
		return nil
	})
	for query, want := range map[string]float64{
		`sum(nlb_target_state{target_group="web",state="unhealthy"})`: 2,
		`nlb_config_last_reload_successful`:                           0,
	} {
		if err := p.is(query, want); err != nil {
			t.Error(err)
		}
	}
	for title, queries := range dashboard(t) {
		for _, q := range queries {
			wait.For(t, limit, "dashboard, "+title+": "+q, func() error {
				samples, err := p.query(q)
				if err == nil && len(samples) == 0 {
					err = fmt.Errorf("no result")
				}
				return err
			})
		}
	}
	checkMetrics(t, p)
}

// checkMetrics asks promtool about what the daemon exposes.
func checkMetrics(t *testing.T, p *prometheus) {
	t.Helper()
	text, err := p.get("http://"+metricsAt+"/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("promtool", "check", "metrics")
	cmd.Stdin = strings.NewReader(string(text))
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("promtool check metrics: %v\n%s", err, out)
	}
}

// listenOn takes a port of a node.
func listenOn(t *testing.T, n *lab.Node, address string) (l net.Listener) {
	t.Helper()
	err := n.Do(func() (err error) {
		l, err = net.Listen("tcp", address)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

// A prometheus is the program, on a node.
type prometheus struct{ client *http.Client }

// startPrometheus starts it with our rules, which are given seconds where they
// have minutes. The test's end stops it.
func startPrometheus(t *testing.T, n *lab.Node) *prometheus {
	t.Helper()
	dir := t.TempDir()
	rules, err := os.ReadFile("../../deploy/prometheus/nlb.rules.yml")
	if err != nil {
		t.Fatal(err)
	}
	rules = regexp.MustCompile(`\bfor: .*`).ReplaceAll(rules, []byte("for: 2s"))
	for name, text := range map[string]string{
		"nlb.rules.yml": string(rules),
		"prometheus.yml": `global: {scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 500ms}
scrape_configs: [{job_name: nlb, static_configs: [{targets: ["` + metricsAt + `"]}]}]
rule_files: [nlb.rules.yml]
`,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	log := &logBuffer{file: filepath.Join(dir, "log")}
	cmd := n.Command(ctx, "prometheus", "--config.file", filepath.Join(dir, "prometheus.yml"),
		"--storage.tsdb.path", filepath.Join(dir, "data"), "--web.listen-address", prometheusAt, "--log.level", "warn")
	out := log.open(t)
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = limit
	if err := cmd.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait() // its status is that of the signal
		if t.Failed() {
			t.Logf("--- prometheus\n%s", log)
		}
	})
	return &prometheus{&http.Client{Timeout: limit, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, address string) (c net.Conn, err error) {
			err = n.Do(func() (err error) {
				c, err = new(net.Dialer).DialContext(ctx, network, address)
				return err
			})
			return c, err
		},
	}}}
}

// get reads a page, and its JSON into v unless that is nil.
func (p *prometheus) get(page string, v any) ([]byte, error) {
	r, err := p.client.Get(page)
	if err != nil {
		return nil, err
	}
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	switch {
	case err != nil:
		return nil, err
	case r.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("%s: %s: %s", page, r.Status, text)
	case v != nil:
		err = json.Unmarshal(text, v)
	}
	return text, err
}

// A sample is one of a query's results: what it is about, and its value.
type sample struct {
	Metric map[string]string `json:"metric"`
	Value  [2]any            `json:"value"` // time, and the value as text
}

// query evaluates an expression now.
func (p *prometheus) query(expr string) ([]sample, error) {
	var answer struct {
		Data struct {
			Result []sample `json:"result"`
		} `json:"data"`
	}
	_, err := p.get("http://"+prometheusAt+"/api/v1/query?query="+url.QueryEscape(expr), &answer)
	return answer.Data.Result, err
}

// is says why an expression is not one sample of that value; no sample is 0.
func (p *prometheus) is(expr string, want float64) error {
	samples, err := p.query(expr)
	if err != nil {
		return err
	}
	if len(samples) == 0 && want == 0 {
		return nil
	}
	if len(samples) != 1 || samples[0].Value[1] != fmt.Sprint(want) {
		return fmt.Errorf("%s is %v, want %v", expr, samples, want)
	}
	return nil
}

// rulesAreOK says which rule was not evaluated yet, or failed.
func (p *prometheus) rulesAreOK() error {
	var answer struct {
		Data struct {
			Groups []struct {
				Rules []struct{ Name, Health, LastError string } `json:"rules"`
			} `json:"groups"`
		} `json:"data"`
	}
	if _, err := p.get("http://"+prometheusAt+"/api/v1/rules", &answer); err != nil {
		return err
	}
	if len(answer.Data.Groups) == 0 {
		return fmt.Errorf("no rules")
	}
	for _, g := range answer.Data.Groups {
		for _, r := range g.Rules {
			if r.Health != "ok" {
				return fmt.Errorf("%s: %s %s", r.Name, r.Health, r.LastError)
			}
		}
	}
	return nil
}

// firing are the alerts that fire, sorted, each once. How late verdicts are is
// for the machine to say.
func (p *prometheus) firing(t *testing.T) []string {
	t.Helper()
	samples, err := p.query(`count by (alertname) (ALERTS{alertstate="firing", alertname!="NLBVerdictsLate"})`)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, s := range samples {
		names = append(names, s.Metric["alertname"])
	}
	slices.Sort(names)
	return names
}

// dashboard has the queries of each panel, with all that may be chosen chosen.
func dashboard(t *testing.T) map[string][]string {
	t.Helper()
	text, err := os.ReadFile("../../deploy/grafana/nlb.json")
	if err != nil {
		t.Fatal(err)
	}
	var d struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(text, &d); err != nil {
		t.Fatal(err)
	}
	all := make(map[string][]string)
	chosen := strings.NewReplacer("$instance", ".*", "$target_group", ".*", "$__rate_interval", "10s")
	for _, p := range d.Panels {
		for _, q := range p.Targets {
			all[p.Title] = append(all[p.Title], chosen.Replace(q.Expr))
		}
	}
	if len(all) < 20 {
		t.Errorf("only %d panels were found", len(all))
	}
	return all
}
