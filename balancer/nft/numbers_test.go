package nft

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"nlb/balancer"
)

// pool is a table with one group of the targets 10.0.1.N:8080.
func pool(hosts ...byte) *balancer.Desired {
	p := balancer.Pool{Name: "web", Protocols: []uint8{balancer.ProtoTCP}, ClientIP: balancer.Preserve}
	for _, h := range hosts {
		p.Destinations = append(p.Destinations, dest(host(h).Addr().String(), 8080, 1))
	}
	return &balancer.Desired{Table: &balancer.Table{Pools: []balancer.Pool{p}}}
}

func host(h byte) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 1, h}), 8080)
}

// daemon is one life of a daemon with a state folder.
func daemon(t *testing.T, dir string, want *balancer.Desired) *Dataplane {
	t.Helper()
	d, err := New(zaptest.NewLogger(t), dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	converge(t, d, want)
	return d
}

func wantNumbers(t *testing.T, d *Dataplane, want map[byte]uint16) {
	t.Helper()
	got := map[byte]uint16{}
	for key, num := range d.numbers.byKey {
		got[key.AddrPort.Addr().As4()[3]] = num
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func wantLast(t *testing.T, dir, want string) {
	t.Helper()
	got, err := os.ReadFile(filepath.Join(dir, lastFile))
	if err != nil || string(got) != want {
		t.Errorf("%s has %q, %v, want %q", lastFile, got, err, want)
	}
}

// A number that a target had is not given to the next one, whatever happened in
// between.
func TestNumbersSurvive(t *testing.T) {
	newDataplane(t) // removes the table at the end
	dir := filepath.Join(t.TempDir(), "state")
	first := daemon(t, dir, pool(1, 2, 3))
	wantLast(t, dir, "3\n")
	converge(t, first, pool(1))

	restarted := daemon(t, dir, pool(1, 4))
	wantNumbers(t, restarted, map[byte]uint16{1: 1, 4: 4})
	wantLast(t, dir, "4\n")

	daemon(t, dir, nil) // as clear does
	wantLast(t, dir, "4\n")
	wantNumbers(t, daemon(t, dir, pool(1, 4)), map[byte]uint16{1: 5, 4: 6})

	daemon(t, dir, pool(1))
	if err := os.WriteFile(filepath.Join(dir, lastFile), []byte("65532\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	// What comes after the end is kept, too, although the highest is installed.
	wantNumbers(t, daemon(t, dir, pool(1, 2, 3, 4)), map[byte]uint16{1: 5, 2: 65533, 3: 1, 4: 2})
	wantLast(t, dir, "2\n")
	wantNumbers(t, daemon(t, dir, pool(2, 5)), map[byte]uint16{2: 65533, 5: 3})
	wantLast(t, dir, "3\n")
}

// A plan gives the numbers that a daemon would give, and keeps nothing.
func TestPlanKeepsNoNumbers(t *testing.T) {
	newDataplane(t)
	dir := t.TempDir()
	daemon(t, dir, pool(1, 2))
	daemon(t, dir, pool(1))
	d, err := New(zaptest.NewLogger(t), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	p, err := d.Plan(t.Context(), pool(1, 3))
	if err != nil {
		t.Fatal(err)
	}
	if lines := strings.Join(p.Lines(), "\n"); !strings.Contains(lines, "add chain inet nlb t3.web") {
		t.Errorf("the plan is\n%s", lines)
	}
	wantLast(t, dir, "2\n")
}

// A file that makes no sense is said to, and the highest installed number counts.
// The next one given is written again.
func TestDamagedLastNumber(t *testing.T) {
	for _, content := range []string{"", "seven\n", "0\n", "65536\n", "-1\n", "7\n8\n"} {
		t.Run(content, func(t *testing.T) {
			newDataplane(t)
			dir := t.TempDir()
			daemon(t, dir, pool(1, 2, 3))
			if err := os.WriteFile(filepath.Join(dir, lastFile), []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			core, logs := observer.New(zap.WarnLevel)
			d, err := New(zap.New(core), dir)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			if n := logs.Len(); n != 1 {
				t.Errorf("%d warnings", n)
			}
			converge(t, d, pool(1, 2, 3, 4))
			wantNumbers(t, d, map[byte]uint16{1: 1, 2: 2, 3: 3, 4: 4})
			wantLast(t, dir, "4\n")
		})
	}
}

// Targets get their flows even if the number cannot be kept.
func TestLastNumberCannotBeKept(t *testing.T) {
	newDataplane(t)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := New(zap.NewNop(), file) // no folder
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := balancer.Converge(t.Context(), []balancer.Part{d}, pool(1), func(balancer.PartPlan) {}); err != nil {
		t.Fatal(err)
	}
	wantNumbers(t, d, map[byte]uint16{1: 1})
	for range 2 {
		if err := d.Keep(); !errors.Is(err, unix.ENOTDIR) {
			t.Errorf("it was kept: %v", err)
		}
	}
}

func TestBehind(t *testing.T) {
	for _, tt := range []struct {
		last, installed uint16
		want            bool
	}{
		{0, 0, false}, {0, 1, true}, {0, 65533, true},
		{7, 7, false}, {7, 8, true}, {8, 7, false}, {65533, 1, false},
		{3, 65533, false}, {7, 7 + 32766, true}, {7, 7 + 32767, false},
	} {
		if got := behind(tt.last, tt.installed); got != tt.want {
			t.Errorf("behind(%d, %d) is %v", tt.last, tt.installed, got)
		}
	}
}

// The numbers of the relay, of IPVS and of nobody are no target's, whatever somebody
// calls a chain.
func TestReservedNumbersAreNotAdopted(t *testing.T) {
	for num, want := range map[int]bool{
		0: false, 1: true, maxTargets: true, awaiting: false, relayed: false, 1 << 16: false,
	} {
		key := balancer.TargetKey{Group: "web", AddrPort: host(1)}
		have := newRuleset()
		have.addChain(&Chain{Name: fmt.Sprintf("t%d.web", num), Comment: targetChainComment(key)})
		if _, got := newNumbers().adopt(have).byKey[key]; got != want {
			t.Errorf("%d is adopted: %v", num, got)
		}
	}
}
