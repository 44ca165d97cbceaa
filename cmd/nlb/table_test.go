package main

import (
	"bytes"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nlb/balancer"
	"nlb/balancer/control"
	"nlb/config"
)

func TestRenderStatus(t *testing.T) {
	now := time.Date(2026, 1, 2, 15, 4, 5, 0, time.UTC)
	n := func(n uint64) *uint64 { return &n }
	target := func(a string, weight, effective int, s balancer.State, reason, description string, ago time.Duration) control.Target {
		return control.Target{Address: netip.MustParseAddr(a), Port: 8080, Weight: weight, EffectiveWeight: effective,
			State: s, Reason: reason, Description: description, Since: now.Add(-ago),
			ActiveFlows: n(3), NewFlowsTotal: n(40), BytesTotal: n(5000)}
	}
	uncounted := target("10.0.3.11", 1, 1, balancer.Unhealthy, balancer.ReasonTimeout, "no answer within 10s", 26*time.Hour)
	uncounted.ActiveFlows, uncounted.NewFlowsTotal, uncounted.BytesTotal = nil, nil, nil
	status := &control.Status{
		Dataplane: "nftables",
		Apply:     control.Apply{Generation: 2, ConvergedAt: now.Add(-4 * time.Second)},
		Listeners: []control.Listener{
			{Name: "dns", VIP: netip.MustParseAddr("2001:db8::10"), Port: 53, Protocol: balancer.TCPUDP,
				Forward: []control.Forward{{TargetGroup: "blue", Weight: 9}, {TargetGroup: "green", Weight: 1}}},
			{Name: "web", VIP: netip.MustParseAddr("198.51.100.10"), Port: 80, Protocol: balancer.TCP,
				Forward: []control.Forward{{TargetGroup: "blue", Weight: 1}}},
		},
		TargetGroups: []control.TargetGroup{
			{Name: "blue", Protocol: balancer.TCP, ClientIP: balancer.HairpinSNAT, Targets: []control.Target{
				target("10.0.1.11", 1, 1, balancer.Healthy, "", "", 75*time.Second),
				target("10.0.1.12", 256, 0, balancer.Unhealthy, balancer.ReasonFailedHealthChecks, "connection refused", 3*time.Hour),
			}},
			{Name: "green", Protocol: balancer.TCP, ClientIP: balancer.Preserve, FailOpen: true, Targets: []control.Target{uncounted}},
		},
	}
	const want = `nftables, configuration 2, in force as of 4s ago

LISTENER  ADDRESS            PROTOCOL  FORWARD
dns       [2001:db8::10]:53  TCP_UDP   blue (9), green (1)
web       198.51.100.10:80   TCP       blue

target group blue, TCP, hairpin_snat
TARGET          WEIGHT    STATE      SINCE  FLOWS  NEW  BYTES  REASON
10.0.1.11:8080  1         healthy    1m15s  3      40   5000   -
10.0.1.12:8080  0 of 256  unhealthy  3h00m  3      40   5000   Target.FailedHealthChecks: connection refused

target group green, TCP, preserve
FAIL OPEN: too few targets are healthy, new flows go to all of them
TARGET          WEIGHT  STATE      SINCE  FLOWS  NEW  BYTES  REASON
10.0.3.11:8080  1       unhealthy  1d02h  ?      ?    ?      Target.Timeout: no answer within 10s
`
	var got bytes.Buffer
	if err := renderStatus(&got, status, now); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got.String()); diff != "" {
		t.Error(diff)
	}
}

func TestRenderTrouble(t *testing.T) {
	now := time.Date(2026, 1, 2, 15, 4, 5, 0, time.UTC)
	for _, c := range []struct {
		name  string
		apply control.Apply
		want  string
	}{
		{"never", control.Apply{Generation: 1, Error: "apply VIP announcement: no such device"},
			"nftables, configuration 1, NEVER IN FORCE\nERROR: apply VIP announcement: no such device\n"},
		{"no longer", control.Apply{Generation: 1, Error: "plan nftables: busy", ConvergedAt: now.Add(-time.Minute)},
			"nftables, configuration 1, NOT IN FORCE since 1m00s ago\nERROR: plan nftables: busy\n"},
		{"uncounted", control.Apply{Generation: 1, ConvergedAt: now, CountersError: "accounting is off"},
			"nftables, configuration 1, in force as of 0s ago\nCOUNTERS: accounting is off\n"},
		{"routes of earlier", control.Apply{Generation: 1, Held: true, Error: "find the routes to the targets: busy", ConvergedAt: now.Add(-time.Minute)},
			"nftables, configuration 1, in force, by what was known before\nERROR: find the routes to the targets: busy\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got bytes.Buffer
			renderApply(&got, &control.Status{Dataplane: "nftables", Apply: c.apply}, now)
			if diff := cmp.Diff(c.want, got.String()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestRenderConntrack(t *testing.T) {
	for _, c := range []struct {
		conntrack *control.Conntrack
		want      string
	}{
		{nil, ""},
		{&control.Conntrack{Count: 70, Max: 100, DropsTotal: 5}, ""},
		{&control.Conntrack{Count: 90, Max: 100, DropsTotal: 5, Alarm: true}, "CONNTRACK NEARLY FULL: 90 of 100 flows, 5 dropped so far\n"},
	} {
		var got, plain bytes.Buffer
		now := time.Date(2026, 1, 2, 15, 4, 5, 0, time.UTC)
		renderApply(&got, &control.Status{Conntrack: c.conntrack}, now)
		renderApply(&plain, &control.Status{}, now)
		if diff := cmp.Diff(plain.String()+c.want, got.String()); diff != "" {
			t.Errorf("%+v (-want +got):\n%s", c.conntrack, diff)
		}
	}
}

func TestPrintPlans(t *testing.T) {
	plans := []balancer.PartPlan{
		{Part: "VIP withdrawal", Plan: lines{"ip addr del 198.51.100.11/32 dev lo"}},
		{Part: "nftables", Plan: lines{"add table inet nlb", "add chain inet nlb guard"}},
	}
	for _, c := range []struct {
		out  output
		in   []balancer.PartPlan
		want string
	}{
		{table, plans, "ip addr del 198.51.100.11/32 dev lo\nadd table inet nlb\nadd chain inet nlb guard\n"},
		{table, nil, ""},
		{jsonText, nil, "[]\n"},
		{jsonText, plans[:1], `[
  {
    "part": "VIP withdrawal",
    "lines": [
      "ip addr del 198.51.100.11/32 dev lo"
    ]
  }
]
`},
	} {
		var got bytes.Buffer
		if err := printPlans(&got, c.out, c.in); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(c.want, got.String()); diff != "" {
			t.Error(diff)
		}
	}
}

type lines []string

func (l lines) Empty() bool     { return len(l) == 0 }
func (l lines) Lines() []string { return l }

func TestStandardStateDir(t *testing.T) {
	cfg, err := config.Parse("reference.yml", config.Reference())
	if err != nil {
		t.Fatal(err)
	}
	if cfg.StateDir != standardStateDir {
		t.Errorf("the file's default is %s", cfg.StateDir)
	}
}
