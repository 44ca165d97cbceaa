package balancer

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var compareKeys = cmp.Options{
	cmp.Comparer(func(a, b TargetKey) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
}

func TestDrainsFollowTheSpec(t *testing.T) {
	now := time.Date(2026, 1, 2, 15, 4, 5, 0, time.UTC)
	two := webSpec(2)
	two.TargetGroups[0].DeregistrationDelay = DeregistrationDelay{Timeout: time.Minute, ConnectionTermination: true}
	one := webSpec(1)
	one.TargetGroups[0].DeregistrationDelay = DeregistrationDelay{Timeout: time.Hour}
	none := &Spec{}
	unused := webSpec(2)
	unused.Listeners = nil
	gone := webKey("10.0.1.12")
	byOperator := Drain{Since: now.Add(-time.Second), Until: now.Add(time.Second)}
	finished := Drain{Since: now.Add(-time.Hour), Until: now.Add(-time.Minute), Done: true}
	asRemoved := func(d Drain, from *Spec) Drain {
		d.describe(from, gone)
		return d
	}
	for _, c := range []struct {
		name     string
		before   Drains
		old, new *Spec
		want     Drains
	}{
		{"nothing leaves", Drains{}, two, two, Drains{}},
		{"one leaves, under the delay of now", Drains{}, two, one,
			Drains{gone: asRemoved(Drain{Since: now, Until: now.Add(time.Hour)}, two)}},
		{"a drained one leaves and keeps its deadline", Drains{gone: byOperator}, two, one, Drains{gone: asRemoved(byOperator, two)}},
		{"one comes back", Drains{gone: asRemoved(byOperator, two)}, one, two, Drains{}},
		{"a drained one stays", Drains{gone: byOperator}, two, two, Drains{gone: byOperator}},
		{"nobody used the group", Drains{}, unused, one, Drains{}},
		{"a start keeps what left", Drains{gone: asRemoved(byOperator, two)}, nil, one, Drains{gone: asRemoved(byOperator, two)}},
		{"a start without the target", Drains{gone: byOperator}, nil, one, Drains{}},
		{"a start that knows others", Drains{gone: byOperator}, Registered(one), one, Drains{}},
		{"a start that knows no group", Drains{gone: byOperator}, Registered(unused), one, Drains{}},
		{"a start that knows it", Drains{gone: byOperator}, Registered(two), one, Drains{gone: asRemoved(byOperator, two)}},
		{"a drained one leaves when all is over", Drains{gone: finished}, two, one, Drains{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if diff := cmp.Diff(c.want, c.before.Follow(c.old, c.new, now), compareKeys); diff != "" {
				t.Error(diff)
			}
		})
	}
	if got := (Drains{}).Follow(two, none, now); len(got) != 2 || got[gone].Until != now.Add(time.Minute) || !got[gone].Terminate {
		t.Errorf("the group leaves: %+v", got)
	}
}

func TestDrainsAreKept(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made")
	if got, err := LoadDrains(dir); err != nil || len(got) != 0 {
		t.Fatalf("without a file: %v, %v", got, err)
	}
	now := time.Date(2026, 1, 2, 15, 4, 5, 678, time.UTC)
	want := Drains{
		webKey("10.0.1.11"): {Since: now, Until: now.Add(time.Minute), Terminate: true},
		webKey("10.0.1.12"): {Since: now, Until: now.Add(time.Hour), Removed: true, Protocol: TCP, ClientIP: SNAT,
			Target: Target{Address: addr("10.0.1.12"), Port: 8080, Weight: 7, ClientIP: ProxyProtocolV2}},
		webKey("2001:db8::13"): {Since: now, Until: now, Done: true},
	}
	if err := want.Save(dir); err != nil {
		t.Fatal(err)
	}
	got, err := LoadDrains(dir)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, compareKeys); diff != "" {
		t.Error(diff)
	}
	if err := os.WriteFile(filepath.Join(dir, drainsFile), []byte(`[{"target_group"`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadDrains(dir); err == nil || !strings.Contains(err.Error(), drainsFile) {
		t.Errorf("half a file: %v", err)
	}
}

// What a file says of targets that left would be put into the kernel.
func TestDamagedDrains(t *testing.T) {
	record := func(group, target, removed string) string {
		return `[{"target_group":"` + group + `","target":"` + target + `","since":"2026-01-02T15:04:05Z","until":"2026-01-02T15:05:05Z",` +
			`"connection_termination":true,"removed":` + removed + `}]`
	}
	const at, as = "10.0.1.11:8080", `{"protocol":"TCP","client_ip":"snat","weight":1}`
	for _, c := range []struct{ content, says string }{
		{record("web", at, as), ""},
		{record("web", at, "null"), ""},
		{record("", at, as), `target group "": a name, a protocol or a client_ip is missing`},
		{record("web", at, `{"client_ip":"snat","weight":1}`), "is missing"},
		{record("web", at, `{"protocol":"TCP","weight":1}`), "is missing"},
		{record("web", at, `{"protocol":"TCP","client_ip":"tunnel"}`), "tunnel"},
		{record("web", at, `{"protocol":"TCP","client_ip":"snat","weight":257}`), "257 is no weight"},
		{record("web", "127.0.0.1:80", as), "127.0.0.1:80 is no target"},
		{record("web", "10.0.1.11:0", as), "10.0.1.11:0 is no target"},
		{record("web", "", as), "is no target"},
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, drainsFile), []byte(c.content), 0o600); err != nil {
			t.Fatal(err)
		}
		drains, err := LoadDrains(dir)
		switch {
		case c.says == "" && (err != nil || len(drains) != 1):
			t.Errorf("%s: %v, %v", c.content, drains, err)
		case c.says != "" && (drains != nil || err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), drainsFile)):
			t.Errorf("%s: %v, want %s", c.content, err, c.says)
		}
	}
}

func FuzzDecodeDrains(f *testing.F) {
	f.Add([]byte(`[{"target_group":"web","target":"10.0.1.11:8080","until":"2026-01-02T15:05:05Z","removed":{"protocol":"TCP","client_ip":"snat"}}]`))
	f.Fuzz(func(t *testing.T, content []byte) {
		drains, err := decodeDrains(content)
		if err != nil {
			return
		}
		// Nothing that it says upsets the pure step.
		Forward(webSpec(1), View{Drains: drains, Now: time.Date(2026, 1, 2, 15, 4, 5, 0, time.UTC)})
	})
}

// A daemon that was away ends now what should have ended meanwhile.
func TestDrainsOfARestart(t *testing.T) {
	now := time.Date(2026, 1, 2, 15, 4, 5, 0, time.UTC)
	one, two, three := webKey("10.0.1.11"), webKey("10.0.1.12"), webKey("10.0.1.13")
	before := Drains{
		one: {Since: now.Add(-time.Hour), Until: now.Add(-time.Minute), Terminate: true},
		two: {Since: now.Add(-time.Hour), Until: now.Add(-time.Minute), Terminate: true, Done: true},
	}
	want := Drains{
		one: {Since: now.Add(-time.Hour), Until: now, Terminate: true},
		two: before[two],
		three: {Since: now, Until: now.Add(time.Minute), Terminate: true,
			Removed: true, Target: target("10.0.1.13"), Protocol: TCP, ClientIP: HairpinSNAT},
	}
	spec := minuteSpec(2)
	got := before.Restart(Registered(minuteSpec(3)), spec, now)
	if diff := cmp.Diff(want, got, compareKeys); diff != "" {
		t.Error(diff)
	}
	for _, d := range Forward(spec, View{Drains: got, Now: now}).Table.Pools[0].Destinations {
		if d.AddrPort() == one.AddrPort && !d.Terminate {
			t.Errorf("its flows are not ended: %+v", d)
		}
	}
	addrs := []netip.Addr{addr("10.0.1.11"), addr("10.0.1.12"), addr("10.0.1.13")}
	if diff := cmp.Diff(addrs, RoutedAddrs(spec, got), compareKeys); diff != "" {
		t.Errorf("whose routes are wanted: %s", diff)
	}
}

func TestFindTarget(t *testing.T) {
	spec := webSpec(2)
	g := &spec.TargetGroups[0]
	g.Targets = append(g.Targets, Target{Address: addr("10.0.1.12"), Port: 9090, Weight: 1})
	for _, c := range []struct {
		group, addr string
		port        uint16
		want        string // a key, or part of an error
	}{
		{"web", "10.0.1.11", 0, "web/10.0.1.11:8080"},
		{"web", "10.0.1.12", 9090, "web/10.0.1.12:9090"},
		{"web", "10.0.1.12", 0, "name one of 10.0.1.12:8080, 10.0.1.12:9090"},
		{"web", "10.0.1.11", 1, "has no target 10.0.1.11:1"},
		{"web", "10.0.9.9", 0, "has no target 10.0.9.9"},
		{"wbe", "10.0.1.11", 0, `no target group "wbe"; there are: web`},
	} {
		key, err := findTarget(spec, c.group, addr(c.addr), c.port)
		got := key.String()
		if err != nil {
			got = err.Error()
		}
		if !strings.HasSuffix(got, c.want) && !strings.Contains(got, c.want) {
			t.Errorf("%s %s %d: %s", c.group, c.addr, c.port, got)
		}
	}
}
