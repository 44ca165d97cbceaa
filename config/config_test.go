package config

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spf13/pflag"

	"nlb/balancer"
	"nlb/internal/golden"
)

var addresses = cmp.Options{cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})}

// fixtures returns what the files of testdata with a suffix hold, by name.
func fixtures(t testing.TB, suffix string) map[string][]byte {
	t.Helper()
	paths, err := filepath.Glob("testdata/*" + suffix)
	if err != nil || len(paths) == 0 {
		t.Fatalf("no fixtures *%s: %v", suffix, err)
	}
	found := make(map[string][]byte)
	for _, p := range paths {
		data, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		found[filepath.Base(p)] = data
	}
	return found
}

func TestGoodFixtures(t *testing.T) {
	for name, data := range fixtures(t, ".good.yml") {
		if _, err := Parse(name, data); err != nil {
			t.Errorf("%s:\n%v", name, err)
		}
	}
}

// TestBadFixtures pins every message in full.
func TestBadFixtures(t *testing.T) {
	for name, data := range fixtures(t, ".bad.yml") {
		t.Run(name, func(t *testing.T) {
			_, err := Parse(name, data)
			if err == nil {
				t.Fatal("no error")
			}
			golden.Check(t, strings.TrimSuffix(name, ".yml")+".want", err.Error()+"\n")
		})
	}
}

func TestDefaults(t *testing.T) {
	got, err := Parse("minimal.good.yml", fixtures(t, "minimal.good.yml")["minimal.good.yml"])
	if err != nil {
		t.Fatal(err)
	}
	vip := netip.MustParseAddr("198.51.100.10")
	want := &Config{
		Settings: Settings{
			Dataplane: "nftables",
			StateDir:  "/var/lib/nlb",
			Log:       LogSettings{Level: "info", Format: "console"},
			Metrics:   MetricsSettings{Address: "127.0.0.1:9469"},
		},
		File: "minimal.good.yml",
		Spec: &balancer.Spec{
			VIPs: []balancer.VIP{{Address: vip}},
			Listeners: []balancer.Listener{{
				Name: "web", VIP: vip, Protocol: balancer.TCP, Port: 80,
				Forward:        []balancer.WeightedGroup{{TargetGroup: "web", Weight: 1}},
				TCPIdleTimeout: 350 * time.Second,
				Allow:          []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")},
			}},
			TargetGroups: []balancer.TargetGroup{{
				Name: "web", Protocol: balancer.TCP, Port: 8080, ClientIP: balancer.SNAT,
				DeregistrationDelay: balancer.DeregistrationDelay{Timeout: 300 * time.Second},
				Unhealthy:           balancer.UnhealthyAction{ConnectionTermination: true},
				FailOpen:            balancer.FailOpen{MinimumHealthyCount: 1},
				HealthCheck: balancer.HealthCheck{
					Protocol: balancer.CheckTCP, Path: "/", Matcher: []balancer.StatusRange{{First: 200, Last: 399}},
					Interval: 30 * time.Second, Timeout: 10 * time.Second, HealthyThreshold: 5, UnhealthyThreshold: 2,
				},
				Targets: []balancer.Target{{Address: netip.MustParseAddr("10.0.1.11"), Port: 8080, Weight: 1}},
			}},
		},
	}
	if diff := cmp.Diff(want, got, addresses); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestProtection: what a listener leaves out may depend on its VIP.
func TestProtection(t *testing.T) {
	got, err := Parse("protection.good.yml", fixtures(t, "protection.good.yml")["protection.good.yml"])
	if err != nil {
		t.Fatal(err)
	}
	type protection struct {
		Proxy balancer.SYNProxy
		Limit balancer.SourceLimit
	}
	want := map[string]protection{
		"four":  {balancer.SYNProxy{MSS: 1460, WindowScale: 7}, balancer.SourceLimit{Flows: 100, Prefix: 32}},
		"six":   {Limit: balancer.SourceLimit{Flows: 100, Prefix: 64}},
		"both":  {Proxy: balancer.SYNProxy{MSS: 1220, WindowScale: 9, Timestamps: true}},
		"ready": {},
	}
	found := make(map[string]protection)
	for _, l := range got.Spec.Listeners {
		found[l.Name] = protection{l.SYNProxy, l.SourceLimit}
	}
	if diff := cmp.Diff(want, found); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestFull(t *testing.T) {
	got, err := Parse("full.good.yml", fixtures(t, "full.good.yml")["full.good.yml"])
	if err != nil {
		t.Fatal(err)
	}
	addr, prefix := netip.MustParseAddr, netip.MustParsePrefix
	vip4, vip6 := addr("198.51.100.10"), addr("2001:db8:100::10")
	everybody := []netip.Prefix{prefix("0.0.0.0/0"), prefix("::/0")}
	standard := balancer.HealthCheck{
		Protocol: balancer.CheckTCP, Path: "/", Matcher: []balancer.StatusRange{{First: 200, Last: 399}},
		Interval: 30 * time.Second, Timeout: 10 * time.Second, HealthyThreshold: 5, UnhealthyThreshold: 2,
	}
	fast := standard
	fast.Port, fast.Interval, fast.Timeout, fast.UnhealthyThreshold, fast.Source = 8053, 1500*time.Millisecond, 1500*time.Millisecond, 10, addr("2001:db8:1::2")
	want := &Config{
		Settings: Settings{
			Dataplane: "auto", StateDir: "/srv/nlb", Log: LogSettings{Level: "debug", Format: "json"},
			Metrics: MetricsSettings{Address: "[2001:db8:1::2]:9000"},
		},
		File: "full.good.yml",
		Spec: &balancer.Spec{
			SourceAddresses: []netip.Addr{addr("10.0.0.2"), addr("10.0.0.3"), addr("2001:db8:1::2")},
			Flowtable:       true,
			UntrackedRelay:  true,
			VIPs:            []balancer.VIP{{Address: vip4, Interface: "eth0.100"}, {Address: vip6}},
			Listeners: []balancer.Listener{{
				Name: "dns", VIP: vip6, Protocol: balancer.TCPUDP, Port: 53,
				Forward:        []balancer.WeightedGroup{{TargetGroup: "dns-blue", Weight: 999}, {TargetGroup: "dns-green", Weight: 0}},
				TCPIdleTimeout: balancer.LongestIdle,
				Allow:          []netip.Prefix{prefix("2001:db8:99::/48"), prefix("2001:db8:98::1/128"), prefix("203.0.113.0/24")},
				SourceLimit:    balancer.SourceLimit{Flows: 1000000, Prefix: 56},
			}, {
				Name: "web", VIP: vip4, Protocol: balancer.TCP, Port: 443, TCPIdleTimeout: 350 * time.Second, Allow: everybody,
				Forward: []balancer.WeightedGroup{{TargetGroup: "web", Weight: 1}},
			}, {
				Name: "quic", VIP: vip4, Protocol: balancer.UDP, Port: 443, TCPIdleTimeout: 350 * time.Second, Allow: everybody,
				Forward: []balancer.WeightedGroup{{TargetGroup: "dns-blue", Weight: 1}},
			}},
			TargetGroups: []balancer.TargetGroup{{
				Name: "dns-blue", Protocol: balancer.TCPUDP, Port: 5353, ClientIP: balancer.Preserve, AvoidSelf: true,
				Stickiness:          balancer.StickySourceIP,
				DeregistrationDelay: balancer.DeregistrationDelay{ConnectionTermination: true},
				Unhealthy:           balancer.UnhealthyAction{DrainingInterval: 100 * time.Hour},
				FailOpen:            balancer.FailOpen{MinimumHealthyPercentage: 50},
				HealthCheck:         fast,
				Passive:             balancer.PassiveCheck{MaxFailures: 100, Hold: time.Hour, MaxHold: 24 * time.Hour},
				Targets: []balancer.Target{
					{Address: addr("2001:db8:78::11"), Port: 5353, Weight: 256, Colocated: []netip.Prefix{prefix("2001:db8:f1::/64"), prefix("2001:db8:78::1b/128")}},
					{Address: addr("10.0.1.11"), Port: 53, ClientIP: balancer.SNAT},
				},
			}, {
				Name: "dns-green", Protocol: balancer.TCPUDP, Port: 53, ClientIP: balancer.HairpinSNAT, HairpinSubnet: true,
				DeregistrationDelay: balancer.DeregistrationDelay{Timeout: time.Hour},
				Unhealthy:           balancer.UnhealthyAction{ConnectionTermination: true},
				FailOpen:            balancer.FailOpen{MinimumHealthyCount: 1},
				HealthCheck:         standard,
			}, {
				Name: "web", Protocol: balancer.TCP, Port: 8443, ClientIP: balancer.ProxyProtocolV2,
				DeregistrationDelay: balancer.DeregistrationDelay{Timeout: 300 * time.Second},
				Unhealthy:           balancer.UnhealthyAction{ConnectionTermination: true},
				FailOpen:            balancer.FailOpen{MinimumHealthyCount: 1},
				ProxyProtocol:       balancer.ProxyProtocol{UniqueID: true, CRC32C: true},
				HealthCheck: balancer.HealthCheck{
					Protocol: balancer.CheckHTTP, Path: "/healthz?deep=1", Host: "www.example.com:8443",
					Matcher:  []balancer.StatusRange{{First: 200, Last: 200}, {First: 204, Last: 204}, {First: 301, Last: 302}},
					Interval: 300 * time.Second, Timeout: 6 * time.Second, HealthyThreshold: 1, UnhealthyThreshold: 2, ProxyProtocolLocal: true,
				},
				Passive: balancer.PassiveCheck{MaxFailures: 5, Hold: 10 * time.Second, MaxHold: 5 * time.Minute},
				Targets: []balancer.Target{
					{Address: addr("10.0.1.11"), Port: 8443, Weight: 1}, {Address: addr("10.0.1.11"), Port: 8444, Weight: 1},
				},
			}},
		},
	}
	if diff := cmp.Diff(want, got, addresses); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestDefaultTimeout(t *testing.T) {
	for _, tt := range []struct {
		check string
		want  time.Duration
	}{
		{"{}", 10 * time.Second},
		{"{protocol: HTTP}", 6 * time.Second},
		{"{protocol: HTTPS}", 10 * time.Second},
		{"{interval: 8s}", 8 * time.Second},
		{"{protocol: HTTP, interval: 2s}", 2 * time.Second},
		{"{protocol: HTTP, timeout: 20s}", 20 * time.Second},
	} {
		c, err := Parse("t.yml", []byte("target_groups: [{name: g, protocol: TCP, port: 80, client_ip: snat, health_check: "+tt.check+"}]"))
		if err != nil {
			t.Errorf("%s: %v", tt.check, err)
			continue
		}
		if got := c.Spec.TargetGroups[0].HealthCheck.Timeout; got != tt.want {
			t.Errorf("%s: timeout %s, want %s", tt.check, got, tt.want)
		}
	}
}

func TestPassiveCheck(t *testing.T) {
	standard := balancer.PassiveCheck{MaxFailures: 5, Hold: 10 * time.Second, MaxHold: 5 * time.Minute}
	for _, tt := range []struct {
		protocol, check string
		want            balancer.PassiveCheck
	}{
		{"TCP", "{}", balancer.PassiveCheck{}},
		{"TCP", "{enabled: true}", standard},
		{"TCP_UDP", "{enabled: true}", standard},
		{"TCP", "{enabled: true, max_failures: 1, hold: 90s, max_hold: 1m30s}", balancer.PassiveCheck{MaxFailures: 1, Hold: 90 * time.Second, MaxHold: 90 * time.Second}},
		{"TCP", "{max_failures: 1, hold: 2s, max_hold: 3s}", balancer.PassiveCheck{}},
		{"UDP", "{enabled: false, max_failures: 1}", balancer.PassiveCheck{}},
	} {
		c, err := Parse("t.yml", []byte("target_groups: [{name: g, protocol: "+tt.protocol+", port: 80, client_ip: snat, passive_health_check: "+tt.check+"}]"))
		if err != nil {
			t.Errorf("%s %s: %v", tt.protocol, tt.check, err)
			continue
		}
		if diff := cmp.Diff(tt.want, c.Spec.TargetGroups[0].Passive); diff != "" {
			t.Errorf("%s %s (-want +got):\n%s", tt.protocol, tt.check, diff)
		}
	}
}

func TestProblemsAreErrors(t *testing.T) {
	_, err := Parse("nlb.yaml", []byte("dataplane: nftables\nlog: {level: loud}\nstate_dir: here\n"))
	var all Problems
	if !errors.As(fmt.Errorf("reload: %w", err), &all) || len(all) != 2 {
		t.Fatalf("errors.As found %v", all)
	}
	var one Problem
	if !errors.As(err, &one) {
		t.Fatal("errors.As found no Problem")
	}
	want := Problem{
		File: "nlb.yaml", Line: 2, Column: 14, Path: "log.level",
		What: `"loud" is not a choice`, Want: "debug, info, warn or error",
	}
	if diff := cmp.Diff(want, one); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestTooLarge(t *testing.T) {
	_, err := Parse("big.yml", bytes.Repeat([]byte("#\n"), maxFile/2+1))
	if want := "big.yml:1:1: the file is too large (at most 16 MiB)"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

// TestManyProblems has more problems than a report may show.
func TestManyProblems(t *testing.T) {
	_, err := Parse("many.yml", []byte("vips:\n"+strings.Repeat("- {adress: 1, x: 2}\n", 3*maxProblems)))
	var all Problems
	if !errors.As(err, &all) || len(all) != maxProblems+1 {
		t.Fatalf("%d problems", len(all))
	}
	if last := all[maxProblems].What; last != "only 1000 problems are shown" {
		t.Errorf("the last is %q", last)
	}
}

// TestAliasBomb expands 500 targets 1,000 times.
func TestAliasBomb(t *testing.T) {
	var b strings.Builder
	b.WriteString("target_groups:\n- &g\n  name: g\n  protocol: TCP\n  port: 80\n  client_ip: snat\n  targets:\n")
	for i := range 500 {
		fmt.Fprintf(&b, "  - {address: 10.0.%d.%d}\n", i/250, i%250+1)
	}
	b.WriteString(strings.Repeat("- *g\n", 1000))
	_, err := Parse("bomb.yml", []byte(b.String()))
	if err == nil || !strings.Contains(err.Error(), "the aliases expand to too much (at most 100000 values)") {
		t.Errorf("got %.200v", err)
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "nlb.yaml")
	if err := os.WriteFile(path, []byte("dataplane: ipvs\nlog: {level: warn}\nmetrics: {address: '127.0.0.1:1'}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	flags := func(args ...string) *pflag.FlagSet {
		f := pflag.NewFlagSet("serve", pflag.ContinueOnError)
		f.String("config", "", "")
		f.String("state-dir", "/flag/default", "")
		f.String("log-level", "", "")
		f.String("metrics-address", "", "")
		if err := f.Parse(args); err != nil {
			t.Fatal(err)
		}
		return f
	}
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	base := Settings{Dataplane: "ipvs", StateDir: "/var/lib/nlb", Log: LogSettings{"warn", "console"}, Metrics: MetricsSettings{"127.0.0.1:1"}}
	for _, tt := range []struct {
		name  string
		path  string
		flags *pflag.FlagSet
		env   map[string]string
		want  func(*Settings)
	}{
		{name: "file", path: path, want: func(*Settings) {}},
		{name: "flags at their defaults", path: path, flags: flags(), want: func(*Settings) {}},
		{
			name: "environment over file", path: path, flags: flags(),
			env:  map[string]string{"NLB_LOG_LEVEL": "error", "NLB_LOG_FORMAT": "json", "NLB_STATE_DIR": "/env", "NLB_DATAPLANE": "auto"},
			want: func(s *Settings) { *s = Settings{"auto", "/env", LogSettings{"error", "json"}, s.Metrics} },
		},
		{
			name: "flag over environment", path: path, flags: flags("--log-level=debug", "--state-dir=/flag"),
			env:  map[string]string{"NLB_LOG_LEVEL": "error", "NLB_STATE_DIR": "/env"},
			want: func(s *Settings) { s.Log.Level, s.StateDir = "debug", "/flag" },
		},
		{name: "relative flag", path: path, flags: flags("--state-dir=state"), want: func(s *Settings) { s.StateDir = filepath.Join(here, "state") }},
		{name: "metrics off by variable", path: path, env: map[string]string{"NLB_METRICS_ADDRESS": ""}, want: func(s *Settings) { s.Metrics.Address = "" }},
		{name: "metrics off by flag", path: path, flags: flags("--metrics-address="), want: func(s *Settings) { s.Metrics.Address = "" }},
		{name: "file by variable", env: map[string]string{"NLB_CONFIG": path}, want: func(*Settings) {}},
		{name: "file by flag", flags: flags("--config", path), env: map[string]string{"NLB_CONFIG": "/nowhere"}, want: func(*Settings) {}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for k, v := range tt.env {
				t.Setenv(k, v)
			}
			got, err := Load(tt.path, tt.flags)
			if err != nil {
				t.Fatal(err)
			}
			want := base
			tt.want(&want)
			if diff := cmp.Diff(want, got.Settings); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if got.File != path {
				t.Errorf("file %s, want %s", got.File, path)
			}
			dataplane := map[string]balancer.Dataplane{"ipvs": balancer.IPVS, "auto": balancer.NFTables}[want.Dataplane]
			if got.Spec.Dataplane != dataplane {
				t.Errorf("dataplane %v of %s", got.Spec.Dataplane, want.Dataplane)
			}
		})
	}
}

func TestLoadErrors(t *testing.T) {
	path := filepath.Join(t.TempDir(), "nlb.yaml")
	if err := os.WriteFile(path, []byte("log: {level: loud}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	flags := pflag.NewFlagSet("serve", pflag.ContinueOnError)
	flags.String("dataplane", "", "")
	if err := flags.Parse([]string{"--dataplane=nftable"}); err != nil {
		t.Fatal(err)
	}
	t.Setenv("NLB_STATE_DIR", "state")
	_, err := Load(path, flags)
	want := strings.Join([]string{
		`--dataplane: dataplane: "nftable" is not a choice (did you mean "nftables"? nftables, ipvs or auto)`,
		`NLB_STATE_DIR: state_dir: "state" is not an absolute path (such as /var/lib/nlb)`,
		path + `:1:14: log.level: "loud" is not a choice (debug, info, warn or error)`,
	}, "\n")
	if err == nil {
		t.Fatal("no error")
	}
	if diff := cmp.Diff(want, err.Error()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}

	if _, err := Load(path+".absent", nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent file: %v", err)
	}
	if _, err := Load("/dev/zero", nil); err == nil || !strings.HasSuffix(err.Error(), "the file is too large (at most 16 MiB)") {
		t.Errorf("endless file: %v", err)
	}
}

func TestClosest(t *testing.T) {
	choices := []string{"protocol", "port", "tcp_idle_timeout", "TCP_UDP", "vip"}
	for word, want := range map[string]string{
		"prot": "port", "protcol": "protocol", "rpotocol": "protocol", "tcp-idle-timeout": "tcp_idle_timeout",
		"TCPUDP": "TCP_UDP", "vpi": "vip", "": "", "zebra": "", "vip ": "vip", strings.Repeat("p", 1000): "",
	} {
		if got := closest(word, choices); got != want {
			t.Errorf("closest(%q) = %q, want %q", word, got, want)
		}
	}
}
