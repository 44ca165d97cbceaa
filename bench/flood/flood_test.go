package flood

import (
	"context"
	"net/netip"
	"os"
	"testing"
	"time"

	"nlb/bench/lab"
)

func TestMain(m *testing.M) {
	lab.MaybeRunAgent()
	os.Exit(m.Run())
}

// TestFloodArrives sends to a node that captures: each frame is a SYN that TCP takes for
// right, from where it says.
func TestFloodArrives(t *testing.T) {
	top, err := lab.Routed(lab.Options{Targets: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := top.Close(); err != nil {
			t.Error(err)
		}
	})
	f, err := Open(top.Clients[0], top.LB, 1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	seen, err := top.Targets[0].Agent().Capture(ctx, "eth0")
	if err != nil {
		t.Fatal(err)
	}
	to := netip.AddrPortFrom(top.Targets[0].Addr4, 80)
	if err := f.Send(to, 3*batchSize+1); err != nil {
		t.Fatal(err)
	}
	if sent, err := f.Run(ctx, to, 10000, 100); err != nil || sent != 100 {
		t.Fatalf("sent %d of 100: %v", sent, err)
	}
	from := netip.MustParseAddrPort("203.0.113.130:9")
	if err := f.SendFrom(from, to); err != nil {
		t.Fatal(err)
	}
	const want = 3*batchSize + 1 + 100 + 1
	sources := make(map[netip.AddrPort]bool)
	found, err := seen.Packets(ctx, func(p lab.Packet) bool { return !p.Out && p.DstPort == 80 && p.Flags == lab.SYN })
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range found {
		sources[p.From()] = true
		if !Sources.Contains(p.Src) {
			t.Errorf("%v is from nowhere", p)
		}
	}
	if len(found) != want || len(sources) < want*9/10 || !sources[from] {
		t.Errorf("%d SYNs from %d sources arrived, want %d", len(found), len(sources), want)
	}
	// Whom the target takes for a client it answers: a reset, since nobody listens.
	resets, err := seen.Packets(ctx, func(p lab.Packet) bool { return p.Out && p.SrcPort == 80 && p.Flags&lab.RST != 0 })
	if err != nil {
		t.Fatal(err)
	}
	if len(resets) == 0 {
		t.Error("the target answers no SYN: their checksums may be wrong")
	}
}
