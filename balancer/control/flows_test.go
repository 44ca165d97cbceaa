package control

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"nlb/balancer"
	"nlb/balancer/explain"
)

var sameAddresses = cmpopts.EquateComparable(netip.AddrPort{}, netip.Prefix{})

func someFlows() []Flow {
	left, age, n := 4.0, 2.5, uint64(100)
	at := netip.MustParseAddrPort
	return []Flow{
		{Protocol: "TCP", Client: at("203.0.113.9:40112"), VIP: at("198.51.100.10:80"), Listener: "web", TargetGroup: "web",
			Target: at("10.0.1.11:8080"), ClientIP: "preserve", TargetSees: at("203.0.113.9:40112"), State: "established",
			Dataplane: "nftables", IdleLeftSeconds: &left, Bytes: &n, Packets: &n},
		{Protocol: "UDP", Client: at("[2001:db8:99::9]:40112"), VIP: at("[2001:db8:77::10]:53"), Listener: "dns", TargetGroup: "dns",
			Target: at("[2001:db8:1::11]:53"), ClientIP: "hairpin_snat", Hairpin: true, TargetSees: at("[2001:db8:1::1]:40112"),
			State: "unreplied", Dataplane: "ipvs", IdleLeftSeconds: &left},
		{Protocol: "TCP", Client: at("203.0.113.9:40113"), VIP: at("198.51.100.10:81"), Listener: "relayed", TargetGroup: "relayed",
			Target: at("10.0.1.11:8081"), ClientIP: "proxy_protocol_v2", State: "dialing", Dataplane: "relay", AgeSeconds: &age, Bytes: &n},
	}
}

// What the daemon shows is what a client is shown, if its filter chooses it.
func TestFlows(t *testing.T) {
	all := someFlows()
	path, _ := serve(t, &fakeDaemon{flows: all})
	for _, c := range []struct {
		name   string
		filter FlowFilter
		want   []Flow
	}{
		{"all", FlowFilter{}, all},
		{"group", FlowFilter{Group: "web"}, all[:1]},
		{"listener", FlowFilter{Listener: "dns"}, all[1:2]},
		{"target", FlowFilter{Target: netip.MustParseAddrPort("10.0.1.11:8081")}, all[2:]},
		{"every port of a target", FlowFilter{Target: netip.MustParseAddrPort("10.0.1.11:0")}, []Flow{all[0], all[2]}},
		{"client", FlowFilter{Client: netip.MustParsePrefix("2001:db8:99::/64")}, all[1:2]},
		{"several", FlowFilter{Client: netip.MustParsePrefix("203.0.113.0/24"), Group: "relayed"}, all[2:]},
		{"nobody", FlowFilter{Group: "web", Listener: "dns"}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got []Flow
			err := NewClient(path).Flows(t.Context(), c.filter, func(f *Flow) error { got = append(got, *f); return nil })
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, got, sameAddresses); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// An error in the middle of the list is the client's, and so is one of its own.
func TestFlowsFail(t *testing.T) {
	path, _ := serve(t, &fakeDaemon{flows: someFlows(), refuse: errors.New("conntrack is gone")})
	shown := 0
	err := NewClient(path).Flows(t.Context(), FlowFilter{}, func(*Flow) error { shown++; return nil })
	if err == nil || err.Error() != "conntrack is gone" || shown != 3 {
		t.Errorf("%d flows and %v", shown, err)
	}
	enough := errors.New("enough")
	if err := NewClient(path).Flows(t.Context(), FlowFilter{}, func(*Flow) error { return enough }); !errors.Is(err, enough) {
		t.Error(err)
	}
}

// An endless daemon never stops to show the same flow.
type endless struct {
	fakeDaemon
	ended chan error
}

func (d *endless) Flows(_ context.Context, show func(*Flow) error) error {
	for {
		f := someFlows()[0]
		if err := show(&f); err != nil {
			d.ended <- err
			return err
		}
	}
}

// Nobody gathers flows: a list without end can be read, and given up.
func TestFlowsAreStreamed(t *testing.T) {
	d := &endless{ended: make(chan error, 1)}
	path, _ := serve(t, d)
	enough, shown := errors.New("enough"), 0
	err := NewClient(path).Flows(t.Context(), FlowFilter{}, func(*Flow) error {
		if shown++; shown == 50_000 {
			return enough
		}
		return nil
	})
	if !errors.Is(err, enough) {
		t.Error(err)
	}
	if err := <-d.ended; err == nil {
		t.Error("the daemon was not told that nobody reads")
	}
}

func TestExplain(t *testing.T) {
	d := &fakeDaemon{}
	path, _ := serve(t, d)
	q := explain.Question{
		Protocol: balancer.ProtoUDP,
		Client:   netip.MustParseAddrPort("[2001:db8::9]:0"), Destination: netip.MustParseAddrPort("[2001:db8:77::10]:53"),
	}
	a, err := NewClient(path).Explain(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	want := &explain.Answer{Outcome: explain.Outcome{Verdict: explain.Drop, Reason: explain.ReasonHairpin}}
	if diff := cmp.Diff(want, a); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"explain 17 [2001:db8::9]:0 [2001:db8:77::10]:53"}, d.changes); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	d.refuse = errors.New("the daemon stops")
	if _, err := NewClient(path).Explain(t.Context(), q); err == nil || err.Error() != "the daemon stops" {
		t.Error(err)
	}
	q.Destination = netip.MustParseAddrPort("198.51.100.10:53")
	if _, err := NewClient(path).Explain(t.Context(), q); err == nil || err.Error() != "2001:db8::9 and 198.51.100.10 are not of one address family" {
		t.Error(err)
	}
}

// What a question or a filter says is read back as it was meant, or refused.
func FuzzQuery(f *testing.F) {
	f.Add("protocol=6&client=203.0.113.9:1&destination=198.51.100.10:80")
	f.Add("group=web&listener=l&target=10.0.1.11:0&client=203.0.113.0/24")
	f.Add("protocol=300&client=x&destination=[::]:")
	f.Fuzz(func(t *testing.T, text string) {
		query, err := url.ParseQuery(text)
		if err != nil {
			return
		}
		if q, err := parseQuestion(query); err == nil && q.Client.Addr().BitLen() != q.Destination.Addr().BitLen() {
			t.Errorf("%q: %v", text, q)
		}
		filter, err := parseFlowFilter(query)
		if err != nil {
			return
		}
		again, err := parseFlowFilter(filter.query())
		if err != nil || fmt.Sprint(again) != fmt.Sprint(filter) {
			t.Errorf("%q: %v and %v, %v", text, filter, again, err)
		}
	})
}
