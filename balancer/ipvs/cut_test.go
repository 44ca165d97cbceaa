package ipvs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"nlb/balancer"
)

// anyTable draws a table of a few services over a few pools, so that two in turn
// have much in common.
func anyTable(r *rand.Rand) *balancer.Table {
	if r.IntN(20) == 0 {
		return nil
	}
	var pools []balancer.Pool
	for _, name := range []string{"a", "b", "c"} {
		p := pool(name)
		for host := range 4 {
			d := dest(fmt.Sprintf("10.0.1.%d:8080", 11+host), r.IntN(4))
			if r.IntN(3) == 0 {
				d = dest(fmt.Sprintf("[2001:db8:1::%d]:8080", 11+host), r.IntN(4))
			}
			if r.IntN(3) == 0 {
				continue
			}
			if name == "c" && r.IntN(2) == 0 {
				d.ClientIP = balancer.ProxyProtocolV2
			}
			d.Leaves = d.Weight == 0 && r.IntN(2) == 0
			p.Destinations = append(p.Destinations, d)
		}
		p.Sticky = r.IntN(4) == 0
		pools = append(pools, p)
	}
	var services []balancer.VirtualService
	for _, vip := range []string{"198.51.100.10:80", "198.51.100.10:53", "198.51.100.11:80", "[2001:db8:77::10]:80"} {
		if r.IntN(4) == 0 {
			continue
		}
		protos := [][]uint8{{6}, {17}, {6, 17}}[r.IntN(3)]
		shares := make(map[string]int)
		for _, name := range []string{"a", "b", "c"}[r.IntN(3):] {
			shares[name] = r.IntN(3)
		}
		services = append(services, listener(vip, shares, protos...))
	}
	t := table(services, pools...)
	if r.IntN(5) == 0 {
		t.Dataplane = balancer.NFTables
	}
	return t
}

// usable says of which services new flows find somebody, as far as IPVS has to do
// with it: a destination with a weight, or the relay where IPVS has no service.
func usable(f *fake, relays map[serviceKey]bool, all []serviceKey) map[serviceKey]bool {
	ok := make(map[serviceKey]bool)
	for _, k := range all {
		s := f.services[k]
		ok[k] = s == nil && relays[k] || s != nil && slices.ContainsFunc(s.destinations, func(d destination) bool { return d.weight > 0 })
	}
	return ok
}

// connect gives destinations connections, or ends them.
func connect(r *rand.Rand, f *fake) {
	keys := slices.SortedFunc(maps.Keys(f.services), serviceKey.compare)
	for _, k := range keys {
		s := f.services[k]
		for i := range s.destinations {
			s.destinations[i].active = 0
			if s.key.proto == balancer.ProtoTCP && r.IntN(2) == 0 {
				s.destinations[i].active = 1 + r.IntN(9)
			}
		}
	}
}

func (f *fake) clone() *fake {
	c := newFake()
	c.file = f.file
	for k, s := range f.services {
		copied := *s
		copied.destinations = slices.Clone(s.destinations)
		c.services[k] = &copied
	}
	for name, v := range f.settings {
		c.settings[name] = v
	}
	return c
}

// Each of 500 changes is cut after each of its writes. Nothing that had a usable
// destination before and has one after the whole is without one in between, and a
// process that starts after the cut gets where the first one was going.
func TestCutAnywhere(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	f := newFake()
	dir := quickDir(t)
	var from *balancer.Table
	cuts := 0
	for n := range 500 {
		to := anyTable(r)
		connect(r, f)
		whole := attempt(t, f.clone(), dir, to, -1, nil)
		all, relays := keysOf(from, to), relayedBy(from, to)
		before, after := usable(f, relays, all), usable(whole, relays, all)
		for quota := range whole.writes {
			cut := attempt(t, f.clone(), dir, to, quota, []error{errKilled, unix.EBUSY}[r.IntN(2)])
			cuts++
			now := usable(cut, relays, all)
			for _, k := range all {
				if before[k] && after[k] && !now[k] && !beginning(f, cut, k) {
					t.Fatalf("change %d, cut after %d of %d writes: %v is stranded:\n%s", n, quota, whole.writes, k, cmp.Diff(f.all(), cut.all()))
				}
			}
			again := attempt(t, cut, dir, to, -1, nil)
			if diff := cmp.Diff(whole.all(), again.all()); diff != "" {
				t.Fatalf("change %d, cut after %d writes, does not converge:\n%s", n, quota, diff)
			}
			if diff := cmp.Diff(whole.settings, again.settings); diff != "" {
				t.Fatalf("change %d, cut after %d writes, settings:\n%s", n, quota, diff)
			}
		}
		if diff := cmp.Diff([]string(nil), planLines(t, whole, dir, to)); diff != "" {
			t.Fatalf("change %d is not over:\n%s", n, diff)
		}
		f, from = whole, to
	}
	t.Logf("%d cuts", cuts)
	last := attempt(t, f, dir, nil, -1, nil)
	if diff := cmp.Diff(newFake().settings, last.settings); diff != "" || len(last.services) > 0 {
		t.Errorf("after all was cleared there are %q, and settings differ:\n%s", last.all(), diff)
	}
}

// quickDir is in memory: the state file is written to disk thousands of times.
func quickDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "ipvs")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// beginning reports whether a service of the relay's has just been made and its
// first destination has not: the kernel takes them one by one.
func beginning(before, now *fake, k serviceKey) bool {
	return before.services[k] == nil && now.services[k] != nil && len(now.services[k].destinations) == 0
}

// attempt makes f hold the table, and fails after so many writes (-1: never). The
// state folder goes with f.
func attempt(t *testing.T, f *fake, dir string, to *balancer.Table, quota int, broken error) *fake {
	t.Helper()
	f.quota, f.broken, f.writes = quota, broken, 0
	if err := f.restoreFile(dir); err != nil {
		t.Fatal(err)
	}
	d := New(dir, zap.NewNop())
	d.kernel, d.local = f, func(netip.Addr) bool { return true }
	err := balancer.Converge(context.Background(), []balancer.Part{d.Opener(), d.Closer()}, desired(to), func(balancer.PartPlan) {})
	if !errors.Is(err, broken) {
		t.Fatalf("%v instead of %v", err, broken)
	}
	f.quota = -1
	f.file, err = os.ReadFile(filepath.Join(dir, savedFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return f
}

func (f *fake) restoreFile(dir string) error {
	path := filepath.Join(dir, savedFile)
	if f.file != nil {
		return os.WriteFile(path, f.file, 0o600)
	}
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func planLines(t *testing.T, f *fake, dir string, to *balancer.Table) (lines []string) {
	t.Helper()
	if err := f.restoreFile(dir); err != nil {
		t.Fatal(err)
	}
	d := New(dir, zap.NewNop())
	d.kernel, d.local = f, func(netip.Addr) bool { return true }
	plans, err := balancer.PlanAll(t.Context(), []balancer.Part{d.Opener(), d.Closer()}, desired(to))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range plans {
		lines = append(lines, p.Plan.Lines()...)
	}
	return lines
}

func keysOf(tables ...*balancer.Table) (keys []serviceKey) {
	seen := make(map[serviceKey]bool)
	for _, t := range tables {
		if t == nil {
			continue
		}
		for _, s := range t.Services {
			for _, proto := range s.Protocols {
				k := serviceKey{proto, netip.AddrPortFrom(s.Address, s.Port)}
				if !seen[k] {
					seen[k] = true
					keys = append(keys, k)
				}
			}
		}
	}
	return keys
}

// relayedBy has the services that the relay takes connections of, before and after.
func relayedBy(from, to *balancer.Table) map[serviceKey]bool {
	both := make(map[serviceKey]bool)
	if from == nil || to == nil {
		return both
	}
	before, after := wanted(from).relayed, wanted(to).relayed
	for k := range before {
		both[k] = before[k] && after[k]
	}
	return both
}
