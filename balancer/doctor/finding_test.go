package doctor

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/internal/golden"
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// healthyFacts are those of a host whose kernel has everything.
func healthyFacts(spec *balancer.Spec) *Facts {
	return &Facts{
		Question:  Question{Role: Balancer, Spec: spec, Clients: DefaultClients()},
		NFTables:  true,
		Conntrack: true,
		Sysctls: map[string]string{
			keyCTAccounts: "1", keyCTMax: "1000", keyCTCount: "10", keyCTBuckets: "1000", keyForward4: "1",
		},
	}
}

func specOf(clientIP balancer.ClientIP, targets ...balancer.Target) *balancer.Spec {
	return &balancer.Spec{
		TargetGroups: []balancer.TargetGroup{{
			Name: "web", Protocol: balancer.TCP, ClientIP: clientIP, Targets: targets,
			HealthCheck: balancer.HealthCheck{Protocol: balancer.CheckTCP},
		}},
	}
}

// pureMistakes are those that a namespace cannot be brought to make: settings of
// the whole kernel, kernels without a part, flows of real clients.
var pureMistakes = []struct {
	id, name string
	facts    func() *Facts
	want     []Finding // id, severity, what, and how it is cured
}{
	{
		id: "nf-tables-missing",
		facts: func() *Facts {
			f := healthyFacts(nil)
			f.NFTables = false
			return f
		},
		want: []Finding{{Severity: Error, What: "the kernel has no nf_tables", Cure: []Command{{"modprobe", "nf_tables"}}}},
	},
	{
		id: "conntrack-missing",
		facts: func() *Facts {
			f := healthyFacts(nil)
			f.Conntrack, f.Sysctls = false, nil
			return f
		},
		want: []Finding{{Severity: Error, What: "the kernel has no connection tracking", Cure: []Command{{"modprobe", "nf_conntrack"}}}},
	},
	{
		id: "ipvs-missing",
		facts: func() *Facts {
			return healthyFacts(&balancer.Spec{Dataplane: balancer.IPVS})
		},
		want: []Finding{{Severity: Error, What: "dataplane: ipvs, and the kernel has no IPVS", Cure: []Command{{"modprobe", "-a", "ip_vs", "ip_vs_mh"}}}},
	},
	{
		id: "conntrack-full", name: "soon",
		facts: func() *Facts {
			f := healthyFacts(nil)
			f.Sysctls[keyCTCount] = "800"
			return f
		},
		want: []Finding{{Severity: Warning, What: "800 of 1000 flows, 80 %", Cure: []Command{set(keyCTMax, "2000")}}},
	},
	{
		id: "conntrack-full", name: "now",
		facts: func() *Facts {
			f := healthyFacts(nil)
			f.Sysctls[keyCTCount] = "950"
			return f
		},
		want: []Finding{{Severity: Error, What: "950 of 1000 flows, 95 %", Cure: []Command{set(keyCTMax, "2000")}}},
	},
	{
		id: "conntrack-buckets",
		facts: func() *Facts {
			f := healthyFacts(nil)
			f.Sysctls[keyCTBuckets] = "124"
			return f
		},
		want: []Finding{{
			Severity: Warning, What: "net.netfilter.nf_conntrack_max = 1000, net.netfilter.nf_conntrack_buckets = 124",
			Cure: []Command{set(keyCTBuckets, "1000")},
		}},
	},
	{
		id: "iptables-legacy",
		facts: func() *Facts {
			f := healthyFacts(nil)
			f.LegacyTables = []string{"iptables filter", "ip6tables nat"}
			return f
		},
		want: []Finding{{
			Severity: Notice, What: "in use: iptables filter, ip6tables nat",
			Advice: "iptables-legacy-save and ip6tables-legacy-save show their rules; iptables-nft holds them where they are seen",
		}},
	},
	{
		id: "foreign-drop", name: "of IPVS",
		facts: func() *Facts {
			spec := specOf(balancer.Preserve, balancer.Target{Address: addr("10.0.1.11"), Port: 80})
			spec.TargetGroups[0].HealthCheck.Port = 81
			spec.Dataplane = balancer.IPVS
			spec.Listeners = []balancer.Listener{{VIP: addr("198.51.100.10"), Port: 80, Protocol: balancer.TCP}}
			f := healthyFacts(spec)
			f.IPVS = true
			base := func(hook string, rules ...Rule) Chain {
				return Chain{Family: "inet", Table: "fw", Name: hook, Type: "filter", Hook: hook, Drops: true, Rules: rules}
			}
			established := Condition{Field: Field{Of: ctField(unix.NFT_CT_STATE), Len: 4}, Mask: native(stateEstablished), Op: NotEqual, Value: native(0)}
			f.Chains = []Chain{
				// Only replies pass here.
				base("forward", Rule{Conditions: []Condition{established}, Action: Accept}),
				base("input"), base("output"),
			}
			return f
		},
		want: []Finding{
			{
				Severity: Error, What: "inet fw input (input, priority 0): drop for tcp to 198.51.100.10:80",
				Cure: []Command{strings.Fields("nft insert rule inet fw input ip daddr 198.51.100.10 tcp dport 80 accept")},
			},
			{
				Severity: Error, What: "inet fw output (output, priority 0): drop for tcp to 10.0.1.11:80 and 1 more",
				Cure: []Command{
					strings.Fields("nft insert rule inet fw output ip daddr 10.0.1.11 tcp dport 80 accept"),
					strings.Fields("nft insert rule inet fw output ip daddr 10.0.1.11 tcp dport 81 accept"),
				},
			},
		},
	},
	{
		id: "return-path",
		facts: func() *Facts {
			f := healthyFacts(specOf(balancer.Preserve, balancer.Target{Address: addr("10.0.1.11")}, balancer.Target{Address: addr("10.0.1.12")}))
			f.Routes = []Route{{To: addr("10.0.1.11"), Reachable: true, Interface: "in0", Source: addr("10.0.1.2")}}
			f.Flows = []FlowSum{
				{Client: addr("203.0.113.1"), Target: addr("10.0.1.11"), Unanswered: 2},
				{Client: addr("203.0.113.2"), Target: addr("10.0.1.11"), Unanswered: 1},
				// One client of the other is behind a firewall of its own.
				{Client: addr("203.0.113.1"), Target: addr("10.0.1.12"), Unanswered: 9},
				{Client: addr("203.0.113.2"), Target: addr("10.0.1.12"), Answered: 1},
			}
			return f
		},
		want: []Finding{{
			Severity: Error, What: "3 flows to 10.0.1.11, none of them answered",
			Advice: "on 10.0.1.11: nlb doctor --target --lb 10.0.1.2; or client_ip: snat for it",
		}},
	},
	{
		id: "undeclared-colocated",
		facts: func() *Facts {
			f := healthyFacts(specOf(balancer.HairpinSNAT,
				balancer.Target{Address: addr("10.0.1.11"), Colocated: []netip.Prefix{netip.MustParsePrefix("10.0.1.21/32")}},
				balancer.Target{Address: addr("2001:db8:1::11")}))
			f.Flows = []FlowSum{
				{Client: addr("10.0.1.20"), Target: addr("10.0.1.11"), Unanswered: 1},
				{Client: addr("10.0.1.21"), Target: addr("10.0.1.11"), Unanswered: 1}, // declared
				{Client: addr("10.0.1.11"), Target: addr("10.0.1.11"), Unanswered: 1}, // itself
				{Client: addr("10.0.2.20"), Target: addr("10.0.1.11"), Unanswered: 1}, // no neighbour
				{Client: addr("10.0.1.22"), Target: addr("10.0.1.11"), Answered: 1},   // works
				{Client: addr("2001:db8:1::20"), Target: addr("2001:db8:1::11"), Unanswered: 4},
			}
			return f
		},
		want: []Finding{
			{
				Severity: Warning, What: "1 flows from 10.0.1.20 to its neighbour 10.0.1.11, none of them answered",
				Advice: `client_ip: hairpin_snat for 10.0.1.11, with colocated: ["10.0.1.20/32"], or hairpin_subnet: true if all its subnet may call`,
			},
			{
				Severity: Warning, What: "4 flows from 2001:db8:1::20 to its neighbour 2001:db8:1::11, none of them answered",
				Advice: `client_ip: hairpin_snat for 2001:db8:1::11, with colocated: ["2001:db8:1::20/128"], or hairpin_subnet: true if all its subnet may call`,
			},
		},
	},
}

func TestDiagnose(t *testing.T) {
	for _, m := range pureMistakes {
		t.Run(strings.TrimSuffix(m.id+"/"+m.name, "/"), func(t *testing.T) {
			facts := m.facts()
			got := Diagnose(facts)
			for i, f := range got {
				if f.Consequence == "" {
					t.Errorf("%s has no consequence", f.Check)
				}
				got[i].Consequence = ""
			}
			for i := range m.want {
				m.want[i].Check = m.id
				m.want[i].Cure = append([]Command{}, m.want[i].Cure...)
			}
			if d := cmp.Diff(m.want, got); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
			roundTrip(t, facts)
		})
	}
	if d := cmp.Diff([]Finding(nil), Diagnose(healthyFacts(nil))); d != "" {
		t.Errorf("a healthy host: %s", d)
	}
}

func TestFindingsAreSortedBySeverity(t *testing.T) {
	f := healthyFacts(nil)
	f.Sysctls[keyCTLiberal], f.Sysctls[keyCTAccounts], f.Sysctls[keyCTCount] = "1", "0", "1000"
	want := []string{"conntrack-full", "conntrack-accounting", "conntrack-liberal"}
	var got []string
	for _, finding := range Diagnose(f) {
		got = append(got, finding.Check)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// TestEveryCheckIsTested compares the list of checks with the mistakes of all
// tests.
func TestEveryCheckIsTested(t *testing.T) {
	tested := map[string]bool{"vip-duplicate": true} // TestProbeFindsAnotherHostWithTheVIP
	for _, m := range slices.Concat(balancerMistakes, targetMistakes) {
		tested[m.id] = true
	}
	for _, m := range pureMistakes {
		tested[m.id] = true
	}
	seen := map[string]bool{}
	for _, c := range Checks() {
		if seen[c.ID] {
			t.Errorf("there are two checks %s", c.ID)
		}
		seen[c.ID] = true
		if !tested[c.ID] {
			t.Errorf("no test makes the mistake that %s looks for", c.ID)
		}
		if !strings.HasSuffix(c.Consequence, ".") || strings.Count(c.Consequence, ". ") > 0 {
			t.Errorf("the consequence of %s is not one sentence: %s", c.ID, c.Consequence)
		}
	}
	for id := range tested {
		if !seen[id] {
			t.Errorf("there is no check %s", id)
		}
	}
}

func TestCommandsAreQuotedForAShell(t *testing.T) {
	for _, c := range []Command{
		{"a", "b=1", "net.ipv4.conf.eth0/100.rp_filter=2", "10.0.0.0/8", "2001:db8::1"},
		{"a", "", "b c", "d'e", `f"g`, "$(h)", "`i`", "j;k", "l\nm", "*", "~", "#", "ö"},
	} {
		out, err := exec.Command("sh", "-c", `printf '%s\0' `+c.String()).Output()
		if err != nil {
			t.Fatalf("%s: %v", c, err)
		}
		if d := cmp.Diff(strings.Join(c, "\x00")+"\x00", string(out)); d != "" {
			t.Errorf("%s: %s", c, d)
		}
	}
}

func TestScript(t *testing.T) {
	reboot := Finding{Check: "a", What: "one\nreboot", Advice: "two\rreboot", Cure: []Command{{"true", "x y"}}}
	reboot.Recipe = Command{"mend", "a\nb"}
	want := "#!/bin/sh\nset -e\n\n# a: one?reboot\n# by hand: two?reboot\n# recipe of deploy/target: mend 'a?b'\ntrue 'x y'\n"
	if d := cmp.Diff(want, Script([]Finding{reboot})); d != "" {
		t.Error(d)
	}
	twice := []Finding{reboot, {Cure: []Command{{"true", "x y"}, {"false"}}}}
	if d := cmp.Diff([]Command{{"true", "x y"}, {"false"}}, Cures(twice)); d != "" {
		t.Error(d)
	}
}

// TestDocsListTheChecks holds docs/doctor.md to the list that the program has.
func TestDocsListTheChecks(t *testing.T) {
	const page, begin, end = "../../docs/doctor.md", "<!-- checks: go test ./balancer/doctor -update -->\n", "<!-- end of checks -->\n"
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok1 := strings.Cut(string(text), begin)
	_, after, ok2 := strings.Cut(rest, end)
	if !ok1 || !ok2 {
		t.Fatalf("%s lacks %q or %q", page, begin, end)
	}
	golden.CheckFile(t, page, before+begin+checksTable()+end+after)
}

func checksTable() string {
	var b strings.Builder
	for _, role := range []Role{Balancer, Target} {
		fmt.Fprintf(&b, "\nOn a %s:\n\n| check | severity | found when | consequence | cure |\n|---|---|---|---|---|\n", role)
		for _, c := range Checks() {
			if c.Role == role {
				fmt.Fprintf(&b, "| `%s` | %s | %s | %s | %s |\n", c.ID, c.Severity, c.Seeks, c.Consequence, c.Cure)
			}
		}
	}
	return b.String() + "\n"
}
