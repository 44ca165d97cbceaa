package traps

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/bench/lab"
	"nlb/internal/vm"
)

// program is the nlb that the scenarios run.
var program string

func TestMain(m *testing.M) {
	lab.MaybeRunAgent()
	os.Exit(testMain(m))
}

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "nlb-traps-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	program = filepath.Join(dir, "nlb")
	named := os.Getenv("NLB_BINARY")
	if named == "" && os.Getenv(vm.EnvKernel) != "" {
		named = "bin/nlb-static" // goes along to emulated machines, where there is no Go
	}
	if named != "" {
		// Tests run in their package's folder, the name is meant from the module's.
		if program = named; !filepath.IsAbs(named) {
			program, err = filepath.Abs(filepath.Join("..", "..", named))
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	} else if out, err := exec.Command("go", "build", "-o", program, "nlb/cmd/nlb").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build nlb: %v\n%s", err, out)
		return 1
	}
	// Scenarios wait, mostly, for calls that hang. In an emulated machine they work.
	parallel := "6"
	if os.Getenv(vm.EnvKernel) != "" {
		parallel = "3"
	}
	flag.Parse()
	if flag.Lookup("test.parallel").Value.String() == strconv.Itoa(runtime.GOMAXPROCS(0)) {
		if err := flag.Set("test.parallel", parallel); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	code := m.Run()
	if err := goleak.Find(); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

func soon(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	return ctx
}

// TestScenarios has every naive set-up fail for its reason, and every cure work.
func TestScenarios(t *testing.T) {
	for _, sc := range All() {
		t.Run(sc.Name, func(t *testing.T) {
			t.Parallel()
			r, err := Run(soon(t), sc, Options{Program: program})
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%.2f s\nnaive: %+v\ncure: %+v", r.Seconds, r.Naive, r.Cure)
			if r.Verdict != Pass {
				t.Errorf("verdict %q, want %q", r.Verdict, Pass)
			}
			if len(r.Naive.Path) == 0 || len(r.Cure.Path) == 0 {
				t.Error("no packet was shown")
			}
			w := NewWalk(sc, r)
			for _, fault := range faults(w) {
				t.Error(fault)
			}
			compareDrawing(t, walksFolder, steady(w))
		})
	}
}

// needIPVS skips where the kernel has none. Emulated machines have it.
func needIPVS(t *testing.T) {
	t.Helper()
	if err := Probe(balancer.IPVS); err != nil {
		t.Skip(err)
	}
}

// TestScenariosIPVS is the same with IPVS. What does not apply to it says so.
func TestScenariosIPVS(t *testing.T) {
	needIPVS(t)
	for _, sc := range All() {
		t.Run(sc.Name, func(t *testing.T) {
			t.Parallel()
			r, err := Run(soon(t), sc, Options{Program: program, Dataplane: balancer.IPVS})
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%.2f s\nnaive: %+v\ncure: %+v", r.Seconds, r.Naive, r.Cure)
			want := Pass
			if notByIPVS[sc.Name] != "" {
				want = Inapplicable
			}
			if r.Verdict != want || r.Dataplane != balancer.IPVS {
				t.Errorf("verdict %q with %v, want %q", r.Verdict, r.Dataplane, want)
			}
			if sc.Name == vipOnDummyRefused.Name || sc.Name == healthCheckVIPSource.Name {
				namesDevice(t, r)
			}
		})
	}
}

// namesDevice fails if the evidence does not say what device has the target's VIP, or
// if that is not a dummy where there are any.
func namesDevice(t *testing.T, r Result) {
	t.Helper()
	const has = "has the VIP on "
	onLo := strings.Contains(r.Naive.Evidence, has+"lo") && os.Getenv(vm.EnvKernel) == ""
	if !strings.Contains(r.Naive.Evidence, has+dummy) && !onLo {
		t.Errorf("%s: which device has the VIP? %q", r.Scenario, r.Naive.Evidence)
	}
}

// TestOnDummy has the scenarios that are about the VIP on a target use a dummy
// device, where the kernel has them, and say so. Those of emulated machines have.
func TestOnDummy(t *testing.T) {
	t.Parallel()
	for _, sc := range []Scenario{vipOnDummyRefused, healthCheckVIPSource} {
		t.Run(sc.Name, func(t *testing.T) {
			t.Parallel()
			r, err := Run(soon(t), sc, Options{Program: program})
			if err != nil {
				t.Fatal(err)
			}
			if r.Verdict != Pass {
				t.Errorf("%s: %+v", r.Verdict, r.Naive)
			}
			namesDevice(t, r)
		})
	}
}

// TestScenariosWithoutCure leaves out of each what its cure is about. What still
// passed would show nothing.
func TestScenariosWithoutCure(t *testing.T) {
	for _, sc := range All() {
		t.Run(sc.Name, func(t *testing.T) {
			t.Parallel()
			r, err := Run(soon(t), sc, Options{Program: program, WithoutCure: true})
			if err != nil {
				t.Fatal(err)
			}
			if r.Verdict != Broken || r.Cure.Works || r.Naive.Evidence == "" {
				t.Errorf("%+v", r)
			}
		})
	}
}

// TestUnsupported is a kernel that lacks something: no failure of anybody's, and
// no success.
func TestUnsupported(t *testing.T) {
	sc := hairpinSelf
	sc.naive = func(context.Context, *site) (Finding, error) {
		return Finding{}, fmt.Errorf("table ip naive: %w", unix.EOPNOTSUPP)
	}
	r, err := Run(soon(t), sc, Options{Program: program})
	if err != nil {
		t.Fatal(err)
	}
	if r.Supported || r.Verdict != Unsupported || !strings.Contains(r.Missing, "not supported") {
		t.Errorf("%+v", r)
	}
	if text := Text(sc, r, 0); !strings.Contains(text, "not supported by this kernel: ") {
		t.Errorf("%q", text)
	}
}

// TestInapplicable is what IPVS has no cure for: nothing is run, whatever the kernel,
// and nlb refuses the cure.
func TestInapplicable(t *testing.T) {
	for name, reason := range notByIPVS {
		i := slices.IndexFunc(All(), func(sc Scenario) bool { return sc.Name == name })
		r, err := Run(soon(t), All()[i], Options{Program: "/nowhere", Dataplane: balancer.IPVS})
		if err != nil {
			t.Fatal(err)
		}
		if r.Supported || r.Verdict != Inapplicable || r.Missing != reason || r.Dataplane != balancer.IPVS {
			t.Errorf("%+v", r)
		}
		if text := Text(All()[i], r, 0); !strings.Contains(text, "does not apply to dataplane ipvs: ") {
			t.Errorf("%q", text)
		}
	}
	file := filepath.Join(t.TempDir(), "nlb.yaml")
	text := config(netip.MustParseAddr("10.0.1.1"), "client_ip: preserve, avoid_self: true", "{address: 10.0.1.11}")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(soon(t), program, "validate", "-c", file, "--dataplane", "ipvs").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "avoid_self: true, but IPVS cannot") {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestKeepAndCaptures has the command leave a lab, its packets and their drawing,
// and nothing once they are removed.
func TestKeepAndCaptures(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	drawings := filepath.Join(dir, "not", "there")
	out, err := exec.CommandContext(soon(t), program, "lab", "run", "hairpin-self", "--keep", "--pcap", dir, "--svg", drawings, "-o", "json").Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var results []Result
	if err := json.Unmarshal(out, &results); err != nil {
		t.Fatal(err)
	}
	kept := results[0].Namespaces
	for _, name := range kept {
		if _, err := os.Stat(filepath.Join("/run/netns", name)); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"hairpin-self-naive-t1.pcap", "hairpin-self-cure-lb.pcap"} {
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || len(text) <= 24 || binary.LittleEndian.Uint32(text) != 0xa1b23c4d {
			t.Errorf("%s: %d bytes, %v", name, len(text), err)
		}
	}
	drawing, err := os.ReadFile(filepath.Join(drawings, "hairpin-self.svg"))
	if err != nil || !bytes.Contains(drawing, []byte("198.51.100.10:80")) {
		t.Errorf("%s, %v", drawing, err)
	}
	removed, err := RemoveKept()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range kept {
		if !slices.Contains(removed, name) {
			t.Errorf("%s was not removed", name)
		}
	}
	prefix := kept[0][:strings.LastIndexByte(kept[0], '-')+1]
	if _, err := os.Stat(files(prefix)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("its files are left: %v", err)
	}
}

// TestInterrupt ends the command in the middle: it removes everything.
func TestInterrupt(t *testing.T) {
	t.Parallel()
	cmd := exec.CommandContext(soon(t), program, "lab", "run", "hairpin-self")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	mine := func() []string {
		found, _ := filepath.Glob(fmt.Sprintf("/run/netns/nlb-%d-*", cmd.Process.Pid))
		more, _ := filepath.Glob(filepath.Join(os.TempDir(), fmt.Sprintf("nlb-%d-*", cmd.Process.Pid)))
		return append(found, more...)
	}
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for ctx := soon(t); len(mine()) == 0; {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("it never made a namespace: %s", &stderr)
		}
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if left := mine(); len(left) > 0 || cmd.ProcessState.ExitCode() != 1 {
		t.Errorf("%v, left %v\n%s", cmd.ProcessState, left, &stderr)
	}
}

var addressInDrawing = regexp.MustCompile(`\d+\.\d+\.\d+\.\d+`)

// TestDrawings holds the drawings to the networks that are built.
func TestDrawings(t *testing.T) {
	for _, sc := range All() {
		t.Run(sc.Name, func(t *testing.T) {
			for line := range strings.Lines(sc.Drawing) {
				if n := len([]rune(strings.TrimRight(line, "\n"))); n > 78 {
					t.Errorf("%d columns wide: %s", n, line)
				}
			}
			top, err := sc.build(sc.options)
			if err != nil {
				t.Fatal(err)
			}
			defer top.Close()
			there := map[string]bool{
				lab.VIP4.String(): true, "0.0.0.0": true, "10.0.1.0": true,
				"10.0.2.11": sc.Drawing == multiHomedDrawing, // second addresses
			}
			for _, n := range top.Nodes() {
				there[n.Addr4.String()] = true
			}
			for _, a := range addressInDrawing.FindAllString(sc.Drawing, -1) {
				if !there[a] {
					t.Errorf("no node has %s", a)
				}
			}
		})
	}
}

func TestCounterIn(t *testing.T) {
	text := []byte("TcpExt: SyncookiesSent IPReversePathFilter\nTcpExt: 0 7\nIpExt: InNoRoutes\nIpExt: 3\n")
	for name, want := range map[string]uint64{"TcpExtIPReversePathFilter": 7, "IpExtInNoRoutes": 3} {
		if got, err := counterIn(text, name); err != nil || got != want {
			t.Errorf("%s = %d, %v; want %d", name, got, err, want)
		}
	}
	if _, err := counterIn(text, "TcpExtNothing"); err == nil {
		t.Error("a counter that is not there was found")
	}
}

// TestHops pairs what was sent with what arrived, and tells what a node rewrote.
func TestHops(t *testing.T) {
	at := func(node, iface string, out bool, from, to string, flags lab.Flags, ms int) sighting {
		f, d := netip.MustParseAddrPort(from), netip.MustParseAddrPort(to)
		return sighting{lab.Packet{
			Time: time.Unix(0, int64(ms)*1e6), Iface: iface, Out: out, Proto: 6,
			Src: f.Addr(), SrcPort: f.Port(), Dst: d.Addr(), DstPort: d.Port(), Flags: flags,
		}, node}
	}
	const client, service, target = "203.0.113.9:40112", "198.51.100.10:80", "10.0.1.11:8080"
	got := hops([]sighting{
		at("c1", "eth0", true, client, service, lab.SYN, 1),
		at("lb", "c1", false, client, service, lab.SYN, 2),
		at("lb", "t1", true, client, target, lab.SYN, 3),
		at("c1", "eth0", true, client, service, lab.SYN, 4), // once more
		at("lb", "c1", false, client, service, lab.SYN, 5),
	})
	want := []string{
		"c1 > lb 203.0.113.9:40112 > 198.51.100.10:80 SYN x2 ",
		"lb >  203.0.113.9:40112 > 10.0.1.11:8080 SYN x1 lb rewrote the destination",
	}
	for i, h := range got {
		line := fmt.Sprintf("%s > %s %v > %v %s x%d %s", h.From, h.To, h.Src, h.Dst, h.What, h.Times, h.Note)
		if i >= len(want) || line != want[i] {
			t.Errorf("hop %d: %s", i, line)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d hops, want %d", len(got), len(want))
	}
}

// TestHopsNameTheClient of a PROXY header, where it is sent first.
func TestHopsNameTheClient(t *testing.T) {
	header := "\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\xcb\x00\x71\x09\xc6\x33\x64\x0a\x9c\xb0\x00\x50"
	at := func(node string, out bool, ms int) sighting {
		return sighting{lab.Packet{
			Time: time.Unix(0, int64(ms)*1e6), Iface: "eth0", Out: out, Proto: unix.IPPROTO_TCP, Flags: lab.PSH | lab.ACK, Data: []byte(header),
			Src: netip.MustParseAddr("10.0.1.1"), SrcPort: 51514, Dst: netip.MustParseAddr("10.244.1.11"), DstPort: 8080,
		}, node}
	}
	want := []Hop{
		hop("lb", "n1", "10.0.1.1:51514", "10.244.1.11:8080", "PROXY header", "the header names 203.0.113.9:40112"),
		hop("n1", "p1x1", "10.0.1.1:51514", "10.244.1.11:8080", "PROXY header", ""),
	}
	got := hops([]sighting{at("lb", true, 1), at("n1", false, 2), at("n1", true, 3), at("p1x1", false, 4)})
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestWhat(t *testing.T) {
	for want, p := range map[string]lab.Packet{
		"SYN+ACK":                {Proto: unix.IPPROTO_TCP, Flags: lab.SYN | lab.ACK},
		"RST":                    {Proto: unix.IPPROTO_TCP, Flags: lab.RST | lab.ACK},
		"data":                   {Proto: unix.IPPROTO_TCP, Flags: lab.PSH | lab.ACK},
		"udp":                    {Proto: unix.IPPROTO_UDP},
		"icmp host unreachable":  {Proto: unix.IPPROTO_ICMP, ICMPType: 3, ICMPCode: 1},
		"icmp type 3 code 4":     {Proto: unix.IPPROTO_ICMP, ICMPType: 3, ICMPCode: 4},
		"icmp6 port unreachable": {Proto: unix.IPPROTO_ICMPV6, ICMPType: 1, ICMPCode: 4},
		"icmp6 type 2 code 0":    {Proto: unix.IPPROTO_ICMPV6, ICMPType: 2},
		"protocol 132":           {Proto: 132},
	} {
		if got := what(p); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
