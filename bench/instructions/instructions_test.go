package main

import (
	"bytes"
	"encoding/json"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"nlb/bench/lab"
	"nlb/bench/measure"
	"nlb/config"
)

func TestMain(m *testing.M) {
	lab.MaybeRunAgent()
	os.Exit(m.Run())
}

// TestLoads runs each load for a few rounds over a router in namespaces of this
// host: all that is sent must arrive, in every run.
func TestLoads(t *testing.T) {
	for _, w := range ways[:router+1] {
		s, err := newSite(t.Context(), w, "")
		if err != nil {
			t.Fatalf("%s: %v", w.name, err)
		}
		t.Cleanup(func() {
			if err := s.close(); err != nil {
				t.Error(err)
			}
		})
		for _, m := range metrics {
			m.batches, m.runs = 3, 2
			var n float64
			err := s.Clients[0].Do(func() (err error) {
				n, err = m.count(s)
				return err
			})
			if err != nil || n <= 0 {
				t.Errorf("%s, %s: %g, %v", w.name, m.name, n, err)
			}
		}
	}
}

// TestFrame adds up a frame as a receiver would. That kernels take it is TestLoads.
func TestFrame(t *testing.T) {
	src, dst := net.HardwareAddr{2, 0, 0, 0, 0, 1}, net.HardwareAddr{2, 0, 0, 0, 0, 2}
	b := bytes.Repeat([]byte{0xff}, frameSize) // whatever was there before
	putFrame(b, src, dst, netip.MustParseAddrPort("203.0.113.9:10000"), netip.MustParseAddrPort("198.51.100.10:80"))
	if b[0] != 1 || b[6] != ethernet+ipv4 || b[8] != 6 {
		t.Errorf("virtio header %x", b[:vnetHeader])
	}
	b = b[vnetHeader:]
	if diff := cmp.Diff([]byte{2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0}, b[:ethernet]); diff != "" {
		t.Error(diff)
	}
	ip := b[ethernet:]
	if got := sum(ip[:ipv4], 0); got != 0xffff {
		t.Errorf("the IPv4 header adds up to %#x (RFC 1071: all ones)", got)
	}
	// What completes the checksum is the complement of the sum of all of UDP,
	// the partial sum in its place included; then the packet adds up to ones.
	u := ip[ipv4:]
	sent := ^sum(u, 0)
	u[6], u[7] = byte(sent>>8), byte(sent)
	if got := sum(u, uint32(sum(ip[12:20], 17+udp+payload))); got != 0xffff {
		t.Errorf("UDP adds up to %#x", got)
	}
	if got := netip.AddrFrom4([4]byte(ip[16:20])); got != lab.VIP4 {
		t.Errorf("to %v", got)
	}
	if u[0] != 10000>>8 || u[1] != 10000&0xff || u[3] != 80 || len(u) != udp+payload {
		t.Errorf("UDP header %x of %d bytes", u[:udp], len(u))
	}
}

func TestPacketSocketSaysWhy(t *testing.T) {
	if fd, err := packetSocket(1 << 30); err == nil || !strings.Contains(err.Error(), unix.ENODEV.Error()) {
		t.Errorf("%d, %v", fd, err)
	}
}

// TestConfigsAreValid has nlb's own parser read the configuration of each way.
func TestConfigsAreValid(t *testing.T) {
	node := func(a string) *lab.Node { return &lab.Node{Addr4: netip.MustParseAddr(a)} }
	for _, w := range ways {
		if w.dataplane == "" {
			continue
		}
		s := site{way: w, Site: measure.Site{Topology: &lab.Topology{LB: node("10.0.1.1"), Targets: []*lab.Node{node("10.0.1.11"), node("10.0.1.12")}}}}
		c, err := config.Parse("nlb.yaml", []byte(s.config()))
		if err != nil {
			t.Errorf("%s: %v", w.name, err)
			continue
		}
		if got := len(c.Spec.Listeners); got < w.listeners {
			t.Errorf("%s: %d listeners", w.name, got)
		}
	}
}

func TestWaysAreComparedWithOthers(t *testing.T) {
	if ways[router].name != direct {
		t.Errorf("all are compared with %q", ways[router].name)
	}
	seen := map[string]bool{"": true}
	for _, w := range ways {
		if !seen[w.against] {
			t.Errorf("%s is compared with %q, which isn't among the ways before it", w.name, w.against)
		}
		seen[w.name] = true
	}
}

// testBoot has 1000 instructions for the router's and 100 more for each next way.
func testBoot(more float64) boot {
	b := make(boot, len(metrics))
	for m := range b {
		for w := range ways {
			b[m] = append(b[m], 1000+more+100*float64(w-router))
		}
	}
	return b
}

func TestParseBoot(t *testing.T) {
	text, err := json.Marshal(testBoot(0))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := parseBoot(text); err != nil || !cmp.Equal(testBoot(0), got) {
		t.Errorf("%v, %v", got, err)
	}
	for bad, want := range map[string]string{
		"":                      "the guest's results: ",
		"[[1]]":                 "the guest's results have 1 metrics, not 3",
		"[[1],[1],[1]]":         metrics[0].name + ": the guest's results have 1 ways, not ",
		zero(t, testBoot(0), 2): metrics[2].name + ", " + here + ": the guest counted 0 instructions",
	} {
		if _, err := parseBoot([]byte(bad)); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s: %v, want %s", bad, err, want)
		}
	}
}

// zero is the text of a boot with a count that cannot be.
func zero(t *testing.T, b boot, metric int) string {
	t.Helper()
	b[metric][0] = 0
	text, err := json.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestNewReport(t *testing.T) {
	r := newReport([]boot{testBoot(0), testBoot(1000)})
	if len(r.Metrics) != len(metrics) || r.Boots != 2 {
		t.Fatalf("%d metrics, %d boots", len(r.Metrics), r.Boots)
	}
	want := wayReport{
		Name:         ways[router+2].name,
		Instructions: measure.Summary{Median: 1700, Min: 1200, Max: 2200},
		Added:        measure.Summary{Median: 200, Min: 200, Max: 200},
		Ratio:        measure.Summary{Median: 1.15, Min: 1.1, Max: 1.2},
		Against:      minimalDNAT,
		Beyond:       &measure.Summary{Median: 100, Min: 100, Max: 100},
	}
	if diff := cmp.Diff(want, r.Metrics[0].Ways[router+2]); diff != "" {
		t.Error(diff)
	}
}

func TestTable(t *testing.T) {
	same := func(v float64) measure.Summary { return measure.Summary{Median: v, Min: v, Max: v} }
	r := report{Kernel: "6.12", QEMU: "7.2", Commit: "0123456789ab", Boots: 2, Metrics: []metricReport{{"packet", []wayReport{
		{Name: "sockets", Instructions: same(700)},
		{Name: "router", Instructions: measure.Summary{Median: 1000, Min: 998, Max: 1002}},
		{Name: "minimal", Instructions: same(1500), Added: same(500), Ratio: same(1.5)},
		{Name: "nlb", Instructions: same(1600), Added: measure.Summary{Median: 600, Min: 590, Max: 610},
			Ratio: measure.Summary{Median: 1.6, Min: 1.598, Max: 1.602}, Against: "minimal", Beyond: new(same(100))},
	}}}}
	const want = `Linux 6.12, QEMU 7.2, nlb 0123456789ab, 2 boots. Instructions, the sender's and the receiver's included; ± is half of what the boots differ by.

packet
           instructions  ±  added  ±   ratio  ±      beyond the minimum
  sockets  700           0
  router   1000          2
  minimal  1500          0  +500   0   1.500  0.000
  nlb      1600          0  +600   10  1.600  0.002  +100
`
	var b bytes.Buffer
	if err := measure.Write(&b, "table", &r); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Error(diff)
	}
	b.Reset()
	var back report
	if err := measure.Write(&b, "json", &r); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b.Bytes(), &back); err != nil || !cmp.Equal(r, back) {
		t.Errorf("%v\n%s", err, cmp.Diff(r, back))
	}
}

func TestDescribe(t *testing.T) {
	for _, c := range []struct{ revision, modified, want string }{
		{"", "", "unknown"},
		{"0123456789abcdef", "false", "0123456789ab"},
		{"0123456789abcdef", "true", "0123456789ab, modified"},
	} {
		if got := describe(map[string]string{"vcs.revision": c.revision, "vcs.modified": c.modified}); got != c.want {
			t.Errorf("%+v: %q", c, got)
		}
	}
}

func TestWhatIsMissingIsSaid(t *testing.T) {
	var stdout, stderr bytes.Buffer
	o := options{program: filepath.Join(t.TempDir(), "nlb"), kernel: "6.12", boots: 1, format: "table"}
	err := run(t.Context(), o, &stdout, &stderr)
	if err == nil || !strings.HasPrefix(err.Error(), "needs nlb itself: make bench-instructions builds it: ") {
		t.Error(err)
	}
}
