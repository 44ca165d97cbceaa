package ipvs

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"nlb/balancer"
)

const vip = "198.51.100.10:80"

func web(ds ...balancer.Destination) *balancer.Table {
	return table(list(listener(vip, map[string]int{"web": 1})), pool("web", ds...))
}

// What the lines of a life are: made, changed, cleared.
func TestLife(t *testing.T) {
	d, f, _ := rig(t)
	made := []string{
		"sysctl -w net.ipv4.vs.conntrack=1",
		"sysctl -w net.ipv4.vs.expire_nodest_conn=1",
		"sysctl -w net.ipv4.vs.sloppy_tcp=1",
		"ipvsadm --set 350 0 120",
		"ipvsadm -A -t 198.51.100.10:80 -s mh -b mh-fallback,mh-port",
		"ipvsadm -a -t 198.51.100.10:80 -r 10.0.1.11:8080 -m -w 1",
		"ipvsadm -a -t 198.51.100.10:80 -r 10.0.1.12:8080 -m -w 0",
	}
	cleared := []string{
		"ipvsadm -D -t 198.51.100.10:80",
		"sysctl -w net.ipv4.vs.conntrack=0",
		"sysctl -w net.ipv4.vs.expire_nodest_conn=0",
		"sysctl -w net.ipv4.vs.sloppy_tcp=0",
		"ipvsadm --set 900 0 300",
	}
	before := newFake().settings
	to := web(dest("10.0.1.11:8080", 1), dest("10.0.1.12:8080", 0))
	if diff := cmp.Diff(made, converge(t, d, to)); diff != "" {
		t.Error(diff)
	}
	if lines := converge(t, d, to); lines != nil {
		t.Errorf("nothing to do, and yet: %q", lines)
	}
	restarted := New(d.records.Dir, d.log)
	restarted.kernel, restarted.local = f, d.local
	if diff := cmp.Diff(cleared, converge(t, restarted, nil)); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(before, f.settings); diff != "" {
		t.Error(diff)
	}
	if _, err := os.Stat(filepath.Join(d.records.Dir, savedFile)); !os.IsNotExist(err) {
		t.Errorf("%s is still there: %v", savedFile, err)
	}
}

// Until the rules of nftables know a destination, nothing of an existing service
// changes; all of it does afterwards.
func TestWhatIsNewComesFirstAndTheRestLast(t *testing.T) {
	d, _, _ := rig(t)
	converge(t, d, web(dest("10.0.1.11:8080", 1), dest("10.0.1.12:8080", 1)))
	to := table(list(listener(vip, map[string]int{"web": 1}), listener("198.51.100.10:81", map[string]int{"web": 1})),
		pool("web", dest("10.0.1.12:8080", 1), dest("10.0.1.13:8080", 1)))
	plans, err := balancer.PlanAll(t.Context(), []balancer.Part{d.Opener(), d.Closer()}, desired(to))
	if err != nil {
		t.Fatal(err)
	}
	got := [][]string{plans[0].Plan.Lines(), plans[1].Plan.Lines()}
	want := [][]string{{
		"ipvsadm -A -t 198.51.100.10:81 -s mh -b mh-fallback,mh-port",
		"ipvsadm -a -t 198.51.100.10:81 -r 10.0.1.12:8080 -m -w 1",
		"ipvsadm -a -t 198.51.100.10:81 -r 10.0.1.13:8080 -m -w 1",
	}, {
		"ipvsadm -a -t 198.51.100.10:80 -r 10.0.1.13:8080 -m -w 1",
		"ipvsadm -d -t 198.51.100.10:80 -r 10.0.1.11:8080",
	}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestOwnership(t *testing.T) {
	d, f, _ := rig(t)
	theirs := service{key: serviceKey{6, at("192.0.2.1:80")}, scheduler: "rr", netmask: 0xffffffff}
	onVIP := service{key: serviceKey{17, at("198.51.100.10:53")}, scheduler: "rr", netmask: 0xffffffff}
	orphan := newService(serviceKey{6, at("198.51.100.99:80")}, false)
	for _, s := range []service{theirs, onVIP, orphan} {
		f.services[s.key] = &s
	}
	converge(t, d, web(dest("10.0.1.11:8080", 1)))
	want := []string{
		"-A -t 192.0.2.1:80 -s rr",
		"-A -t 198.51.100.10:80 -s mh -b mh-fallback,mh-port",
		"-a -t 198.51.100.10:80 -r 10.0.1.11:8080 -m -w 1",
	}
	got := f.all()
	slices.Sort(want[1:])
	slices.Sort(got[1:])
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	converge(t, d, nil)
	if diff := cmp.Diff(want[:1], f.all()); diff != "" {
		t.Error(diff)
	}
}

func TestLingeringEnds(t *testing.T) {
	d, f, _ := rig(t)
	converge(t, d, web(dest("10.0.1.11:8080", 1)))
	f.services[serviceKey{6, at(vip)}].destinations[0].active = 1
	other := web(dest("10.0.1.11:8080", 1))
	other.Dataplane = balancer.NFTables
	if diff := cmp.Diff([]string{"ipvsadm -e -t 198.51.100.10:80 -r 10.0.1.11:8080 -m -w 0"}, converge(t, d, other)); diff != "" {
		t.Error(diff)
	}
	f.services[serviceKey{6, at(vip)}].destinations[0].active = 0
	converge(t, d, other)
	if diff := cmp.Diff([]string(nil), f.all()); diff != "" {
		t.Error(diff)
	}
	if f.settings[settingConntrack] != 0 || f.settings[timeoutTCP] != 900 {
		t.Errorf("settings were not restored: %v", f.settings)
	}
}

func TestSettingsOfOthersStay(t *testing.T) {
	d, f, _ := rig(t)
	converge(t, d, web(dest("10.0.1.11:8080", 1)))
	f.settings[settingSloppy], f.settings[timeoutUDP] = 0, 77
	// What we need is set again, and what it was is from now on what they made of it.
	if diff := cmp.Diff([]string{"sysctl -w net.ipv4.vs.sloppy_tcp=1", "ipvsadm --set 0 0 120"},
		converge(t, d, web(dest("10.0.1.11:8080", 1)))); diff != "" {
		t.Error(diff)
	}
	f.settings[timeoutTCP] = 1234
	lines := converge(t, d, nil)
	if !slices.Contains(lines, "# timeout of tcp was changed by somebody since we set it to 350: left alone") {
		t.Errorf("%q", lines)
	}
	want := map[string]int{
		settingConntrack: 0, settingExpire: 0, settingSloppy: 0, settingReuse: 1, timeoutTCP: 1234, timeoutUDP: 77,
	}
	if diff := cmp.Diff(want, f.settings); diff != "" {
		t.Error(diff)
	}
}

// Where there is a relay, no connection is taken up in its middle: it may be the
// relay's.
func TestRelayKeepsItsConnections(t *testing.T) {
	d, f, _ := rig(t)
	for _, c := range []struct {
		ds     []balancer.Destination
		sloppy int
	}{
		{[]balancer.Destination{dest("10.0.1.11:8080", 1)}, 1},
		{[]balancer.Destination{dest("10.0.1.11:8080", 1), relayed("10.0.1.12:8080", 1)}, 0},
		{[]balancer.Destination{dest("10.0.1.11:8080", 1), relayed("10.0.1.12:8080", 0)}, 0},
		{[]balancer.Destination{dest("10.0.1.11:8080", 1)}, 1},
	} {
		converge(t, d, web(c.ds...))
		if got := f.settings[settingSloppy]; got != c.sloppy {
			t.Errorf("%s is %d", settingSloppy, got)
		}
	}
}

// A timeout that follows the listeners is given back to what it was at first, even
// if the process was killed between noting the change and making it.
func TestChangedTimeoutIsRestored(t *testing.T) {
	d, f, _ := rig(t)
	converge(t, d, web(dest("10.0.1.11:8080", 1)))
	longer := web(dest("10.0.1.11:8080", 1))
	longer.Services[0].IdleTimeout *= 2
	p, err := d.Opener().Plan(t.Context(), desired(longer))
	if err != nil {
		t.Fatal(err)
	}
	f.quota = 0
	if err := d.Opener().Apply(t.Context(), p); !errors.Is(err, errKilled) {
		t.Fatal(err)
	}
	f.quota = -1
	if diff := cmp.Diff([]string{"ipvsadm --set 700 0 0"}, converge(t, d, longer)); diff != "" {
		t.Error(diff)
	}
	converge(t, d, nil)
	if diff := cmp.Diff(newFake().settings, f.settings); diff != "" {
		t.Error(diff)
	}
}

// However often a write fails, the file says the same, and is not written again.
func TestFileDoesNotGrow(t *testing.T) {
	d, f, _ := rig(t)
	converge(t, d, web(dest("10.0.1.11:8080", 1)))
	longer := web(dest("10.0.1.11:8080", 1))
	longer.Services[0].IdleTimeout *= 2
	for _, c := range []struct {
		what  string
		table *balancer.Table
		part  balancer.Part
	}{
		{"another value", longer, d.Opener()},
		{"restored", nil, d.Closer()},
	} {
		var want []byte
		var file os.FileInfo
		for range 3 {
			f.quota, f.broken = 0, unix.EBUSY
			err := balancer.Converge(t.Context(), []balancer.Part{c.part}, desired(c.table), func(balancer.PartPlan) {})
			if !errors.Is(err, unix.EBUSY) {
				t.Fatal(err)
			}
			f.quota = -1
			path := filepath.Join(d.records.Dir, savedFile)
			got, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			is, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			if want == nil {
				want, file = got, is
			}
			if diff := cmp.Diff(string(want), string(got)); diff != "" || !os.SameFile(file, is) {
				t.Errorf("%s: the file was written again, and differs:\n%s", c.what, diff)
			}
		}
	}
	converge(t, d, nil)
	if diff := cmp.Diff(newFake().settings, f.settings); diff != "" {
		t.Error(diff)
	}
}

func TestDamagedFileStopsNothing(t *testing.T) {
	d, _, logs := rig(t)
	if err := os.WriteFile(filepath.Join(d.records.Dir, savedFile), []byte(`{"settings":[{"name":"net.ipv4.vs.conntrack"}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if lines := converge(t, d, web(dest("10.0.1.11:8080", 1))); len(lines) == 0 {
		t.Error("nothing was made")
	}
	if n := logs.Len(); n != 1 {
		t.Errorf("%d warnings", n)
	}
}

func TestMissingPart(t *testing.T) {
	for _, missing := range []error{ErrNoIPVS, ErrNoScheduler, ErrNoConntrack} {
		d, f, _ := rig(t)
		f.missing = missing
		if err := d.Probe(); !errors.Is(err, missing) {
			t.Errorf("probe: %v", err)
		}
		_, err := balancer.PlanAll(t.Context(), []balancer.Part{d.Opener()}, desired(web(dest("10.0.1.11:8080", 1))))
		if !errors.Is(err, missing) {
			t.Errorf("%v instead of %v", err, missing)
		}
		nftables := web(dest("10.0.1.11:8080", 1))
		nftables.Dataplane = balancer.NFTables
		for _, idle := range []*balancer.Table{nil, nftables, table(nil)} {
			if lines := converge(t, d, idle); lines != nil {
				t.Errorf("%v: %q", missing, lines)
			}
		}
	}
}

func TestOvertaken(t *testing.T) {
	s := step{op: addDestination, of: newService(serviceKey{6, at(vip)}, false), dest: destination{at: at("10.0.1.11:80"), weight: 1}}
	for _, c := range []struct {
		op   operation
		err  error
		want error
	}{
		{addDestination, unix.EEXIST, balancer.ErrOvertaken},
		{editDestination, unix.ENOENT, balancer.ErrOvertaken},
		{removeService, unix.ESRCH, balancer.ErrOvertaken},
		{addService, unix.ENOENT, ErrNoScheduler},
		{addService, unix.EPERM, unix.EPERM},
	} {
		s.op = c.op
		if err := explain(s, c.err); !errors.Is(err, c.want) || c.want != balancer.ErrOvertaken && errors.Is(err, balancer.ErrOvertaken) {
			t.Errorf("%v of operation %d: %v", c.err, c.op, err)
		}
	}
}

func TestWarnsOncePerChangeOfRemoteVIPs(t *testing.T) {
	d, _, logs := rig(t)
	d.local = func(a netip.Addr) bool { return a == netip.MustParseAddr("198.51.100.11") }
	to := table(list(listener(vip, map[string]int{"web": 1}), listener("198.51.100.11:80", map[string]int{"web": 1})),
		pool("web", dest("10.0.1.11:8080", 1)))
	converge(t, d, to)
	converge(t, d, to)
	if n := logs.Len(); n != 1 {
		t.Errorf("%d warnings: %v", n, logs.All())
	}
	want := desired(to)
	want.Bound = []balancer.VIP{{Address: netip.MustParseAddr("198.51.100.10"), Interface: "lo"}}
	if _, err := d.Opener().Plan(t.Context(), want); err != nil {
		t.Fatal(err)
	}
	converge(t, d, to)
	if n := logs.Len(); n != 2 {
		t.Errorf("%d warnings after the VIP was bound and unbound", n)
	}
}

// A connection that begins after the Opener's look is seen before its destination is
// removed.
func TestCloserLooksBeforeItActs(t *testing.T) {
	d, f, _ := rig(t)
	converge(t, d, web(dest("10.0.1.11:8080", 1), dest("10.0.1.12:8080", 1)))
	want := desired(web(dest("10.0.1.11:8080", 1)))
	if p, err := d.Opener().Plan(t.Context(), want); err != nil || !p.Empty() {
		t.Fatalf("the Opener: %v, %v", p, err)
	}
	f.services[serviceKey{6, at(vip)}].find(at("10.0.1.12:8080")).active = 1
	p, err := d.Closer().Plan(t.Context(), want)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"ipvsadm -e -t 198.51.100.10:80 -r 10.0.1.12:8080 -m -w 0"}, p.Lines()); diff != "" {
		t.Error(diff)
	}
}

// Nobody looks at IPVS on each pass where it is not used; a new process does once,
// since there may be something left. Where it is used, one look shows that there is
// nothing to do.
func TestUnusedIsNotLookedAt(t *testing.T) {
	d, f, _ := rig(t)
	unused := web(dest("10.0.1.11:8080", 1))
	unused.Dataplane = balancer.NFTables
	looks := func(what string, table *balancer.Table, want int) {
		t.Helper()
		before := f.looks
		converge(t, d, table)
		if got := f.looks - before; got != want {
			t.Errorf("%s: looked %d times, not %d", what, got, want)
		}
	}
	looks("first", unused, 1)
	looks("then", unused, 0)
	looks("used", web(dest("10.0.1.11:8080", 1)), 2)
	looks("still", web(dest("10.0.1.11:8080", 1)), 1)
	looks("more for the Closer", web(dest("10.0.1.11:8080", 1), dest("10.0.1.12:8080", 1)), 2)
	looks("gone", unused, 2)
	looks("then again", unused, 1)
	looks("and then", unused, 0)
}
