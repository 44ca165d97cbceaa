package main

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"nlb/balancer"
	"nlb/balancer/explain"
)

func TestRenderAnswer(t *testing.T) {
	at := netip.MustParseAddrPort
	client, vip, target, source := at("203.0.113.9:40112"), at("198.51.100.10:80"), at("10.0.1.11:8080"), netip.MustParseAddrPort("10.0.0.2:0")
	end := func(a netip.AddrPort) *explain.Endpoint { return &explain.Endpoint{Address: a.Addr(), Port: a.Port()} }
	outcome := explain.Outcome{
		Verdict: explain.Forward, Listener: "web", TargetGroup: "web", Target: end(target), ClientIP: "preserve", TargetSees: "203.0.113.9",
		Avoided:  end(at("10.0.1.12:8080")),
		Rewrites: []explain.Rewrite{{By: explain.ByDNAT, SourceBefore: client, DestinationBefore: vip, SourceAfter: client, DestinationAfter: target}},
	}
	relayed := explain.Outcome{
		Verdict: explain.Forward, Listener: "web", TargetGroup: "web", Target: end(target), ClientIP: "proxy_protocol_v2",
		TargetSeesOneOf: []string{"10.0.0.2", "10.0.0.3"}, HeaderClient: "203.0.113.9:40112",
		Rewrites: []explain.Rewrite{{By: explain.ByRelay, SourceBefore: client, DestinationBefore: vip, DestinationAfter: target}},
	}
	hairpin := explain.Outcome{
		Verdict: explain.Drop, Reason: explain.ReasonHairpin, Listener: "web", TargetGroup: "web", Target: end(target),
		ClientIP: "preserve", Hairpin: true, HairpinKind: explain.Self,
	}
	about := explain.Answer{Protocol: "TCP", Client: client.String(), VIP: vip.String()}
	for _, c := range []struct {
		name   string
		change func(*explain.Answer)
		want   string
	}{
		{"kept from its own host, past a firewall", func(a *explain.Answer) {
			a.Outcome = outcome
			a.Foreign = []explain.Foreign{{Where: "inet fw c (forward, handle 2)", Does: "drop", Ends: true}, {Where: "ip nat POSTROUTING (postrouting, handle 9)", Does: "masquerade", Certain: true}}
			a.Notes = []string{"a note"}
		}, `TCP 203.0.113.9:40112 to 198.51.100.10:80: forward to 10.0.1.11:8080

listener      web
allow list    lets the client in
target group  web
target        10.0.1.11:8080
client_ip     preserve
avoided       10.0.1.12:8080, on the client's own host
hairpin       no
dnat          203.0.113.9:40112 > 198.51.100.10:80 becomes 203.0.113.9:40112 > 10.0.1.11:8080
target sees   203.0.113.9

inet fw c (forward, handle 2): may drop, if it matches, which cannot be told

ip nat POSTROUTING (postrouting, handle 9): masquerade

note: a note
`},
		{"relayed", func(a *explain.Answer) { a.Outcome = relayed }, `TCP 203.0.113.9:40112 to 198.51.100.10:80: forward to 10.0.1.11:8080

listener      web
allow list    lets the client in
target group  web
target        10.0.1.11:8080
client_ip     proxy_protocol_v2
hairpin       no
relay         203.0.113.9:40112 > 198.51.100.10:80 becomes * > 10.0.1.11:8080
target sees   one of 10.0.0.2, 10.0.0.3
header        203.0.113.9:40112
`},
		{"several outcomes", func(a *explain.Answer) {
			a.Client, a.Outcome, a.DependsOn = "10.0.1.11", hairpin, explain.DependsOnPort
			a.Possible = []explain.Possible{{Share: 0.75, Outcome: hairpin}, {Share: 0.25, Outcome: explain.Outcome{Verdict: explain.Drop, Reason: explain.ReasonNoTarget, Listener: "web"}}}
		}, `TCP 10.0.1.11 to 198.51.100.10:80: drop, hairpin

this is the likeliest of 2 outcomes: it depends on the source port

SHARE   VERDICT          TARGET GROUP  TARGET          HAIRPIN  TARGET SEES
75.00%  drop, hairpin    web           10.0.1.11:8080  self     -
25.00%  drop, no target  -             -               no       -
`},
		{"no VIP", func(a *explain.Answer) { a.Verdict = explain.None }, `TCP 203.0.113.9:40112 to 198.51.100.10:80: none, the address is no VIP

`},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := about
			c.change(&a)
			var b bytes.Buffer
			if err := renderAnswer(&b, &a); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, b.String()); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
	for a, want := range map[netip.AddrPort]string{
		{}: "*", source: "10.0.0.2:*", at("[2001:db8::1]:0"): "[2001:db8::1]:*", target: "10.0.1.11:8080",
	} {
		if got := portWords(a); got != want {
			t.Errorf("%v is %q, want %q", a, got, want)
		}
	}
}

func TestParseQuestion(t *testing.T) {
	at := netip.MustParseAddrPort
	for _, c := range []struct {
		client, to string
		want       explain.Question
		problem    string
	}{
		{"203.0.113.9:40112", "198.51.100.10:80", explain.Question{Protocol: balancer.ProtoTCP, Client: at("203.0.113.9:40112"), Destination: at("198.51.100.10:80")}, ""},
		{"2001:db8::9", "[2001:db8::10]:80", explain.Question{Protocol: balancer.ProtoTCP, Client: at("[2001:db8::9]:0"), Destination: at("[2001:db8::10]:80")}, ""},
		{"::ffff:203.0.113.9", "198.51.100.10:80", explain.Question{Protocol: balancer.ProtoTCP, Client: at("203.0.113.9:0"), Destination: at("198.51.100.10:80")}, ""},
		{"client", "198.51.100.10:80", explain.Question{}, `"client" is no client: want ADDR or ADDR:PORT, such as 203.0.113.9:40112 or [2001:db8::9]:40112`},
		{"203.0.113.9", "198.51.100.10:0", explain.Question{}, `"198.51.100.10:0" is no destination: want ADDR:PORT, such as 198.51.100.10:80 or [2001:db8::10]:80`},
		{"203.0.113.9", "[2001:db8::10]:80", explain.Question{}, "203.0.113.9 and 2001:db8::10 are not of one address family"},
	} {
		got, err := parseQuestion([]string{c.client, c.to}, ipProtocol(balancer.ProtoTCP))
		switch {
		case c.problem != "":
			if err == nil || err.Error() != c.problem {
				t.Errorf("%s %s: %v, want %q", c.client, c.to, err, c.problem)
			}
		case err != nil || got != c.want:
			t.Errorf("%s %s: %+v, %v", c.client, c.to, got, err)
		}
	}
}
