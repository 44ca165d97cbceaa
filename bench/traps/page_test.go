package traps

import (
	stdcmp "cmp"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"nlb/balancer"
	"nlb/internal/golden"
	"nlb/internal/vm"
)

// labPage has a table of the scenarios.
const labPage = "../../docs/lab.md"

// TestPage holds the page's table to the scenarios.
func TestPage(t *testing.T) {
	var rows strings.Builder
	for _, sc := range All() {
		fmt.Fprintf(&rows, "| [`%s`](walks/%[1]s.svg) | %s: %s | %s | %s |\n", sc.Name, sc.Title, sc.Naive, sc.Why, sc.Cure)
	}
	compareTable(t, labPage, "| scenario |", rows.String())
}

// TestPageIPVS holds the page's other table to what is said of them with IPVS.
func TestPageIPVS(t *testing.T) {
	var rows strings.Builder
	for _, sc := range All() {
		switch {
		case notByIPVS[sc.Name] != "":
			fmt.Fprintf(&rows, "| `%s` | does not apply: %s |\n", sc.Name, notByIPVS[sc.Name])
		case besidesIPVS[sc.Name] != "":
			fmt.Fprintf(&rows, "| `%s` | makes no difference: %s |\n", sc.Name, besidesIPVS[sc.Name])
		}
	}
	if n := strings.Count(rows.String(), "\n"); n != len(notByIPVS)+len(besidesIPVS) {
		t.Errorf("%d scenarios, of which something is said of %d", n, len(notByIPVS)+len(besidesIPVS))
	}
	compareTable(t, labPage, "| with IPVS |", rows.String())
}

// compareTable compares the rows of the table whose heading begins a certain way,
// or rewrites them.
func compareTable(t *testing.T, page, heading, want string) {
	t.Helper()
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, found := strings.Cut(string(text), "\n"+heading)
	if !found {
		t.Fatalf("%s has no table %q", page, heading)
	}
	titles, rest, _ := strings.Cut(rest, "\n")
	rule, rest, _ := strings.Cut(rest, "\n")
	got, after := rest, ""
	if end := strings.Index(rest, "\n\n"); end >= 0 {
		got, after = rest[:end+1], rest[end+1:]
	}
	if golden.Update() {
		text := head + "\n" + heading + titles + "\n" + rule + "\n" + want + after
		golden.Write(t, page, text)
		return
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s is not what it shows: run the test with -update (-want +got):\n%s", page, diff)
	}
}

// comparePage has the table of nlb lab compare.
const comparePage = "../../docs/compare.md"

// TestCompare holds the page to what the modes really do, and TestCompareIPVS to what
// they do with the other dataplane: nothing else.
func TestCompare(t *testing.T) {
	t.Parallel()
	compared(t, balancer.NFTables)
}

// It has the machine to itself, which is mostly an emulated one.
func TestCompareIPVS(t *testing.T) {
	needIPVS(t)
	compared(t, balancer.IPVS)
}

func compared(t *testing.T, d balancer.Dataplane) {
	t.Helper()
	o := Options{Program: program, Dataplane: d, Walks: d == balancer.NFTables}
	if os.Getenv(vm.EnvKernel) != "" {
		o.callTime = 2 * compareTime // calls that are answered take ten times longer there
	}
	c, err := Compare(soon(t), o)
	if err != nil {
		t.Fatal(err)
	}
	var rows strings.Builder
	for _, done := range c.Cases {
		fmt.Fprintf(&rows, "| %s: %s |", done.Name, done.Title)
		for _, cell := range done.Cells {
			says := cell.Says
			if name := done.walk(cell).Name; slices.Contains(shownCells(), name) {
				says = fmt.Sprintf("[%s](walks/%s.svg)", says, name)
			}
			fmt.Fprintf(&rows, " %s |", says)
		}
		rows.WriteString("\n")
	}
	if c.Dataplane != d {
		t.Errorf("it says dataplane %v, want %v", c.Dataplane, d)
	}
	if len(c.Cases) != len(caseOrder) {
		t.Errorf("%d cases, want %d", len(c.Cases), len(caseOrder))
	}
	compareTable(t, comparePage, "| case |", rows.String())
	if d == balancer.NFTables {
		compareDrawings(t, c.Walks())
	}
	for line := range strings.Lines(ComparisonText(c)) {
		if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > MinWidth {
			t.Errorf("%d columns wide: %s", n, line)
		}
	}
}

func compareDrawings(t *testing.T, walks []Walk) {
	t.Helper()
	for _, w := range walks {
		for _, fault := range faults(w) {
			t.Errorf("%s: %s", w.Name, fault)
		}
		if slices.Contains(shownCells(), w.Name) {
			compareDrawing(t, walksFolder, steady(w))
		}
	}
}

// walksFolder has the drawings that the documentation shows.
const walksFolder = "../../docs/walks"

// shownCells are the names of the compared calls that are drawn there.
func shownCells() []string {
	var names []string
	for _, c := range []string{"outside client", "hairpin, self", "same subnet"} {
		for _, mode := range Modes {
			names = append(names, slug.Replace(c+"-"+mode))
		}
	}
	return names
}

// TestWalksFolder has each drawing there, and none that nothing is compared with.
func TestWalksFolder(t *testing.T) {
	if golden.Update() {
		return // others are about to write there
	}
	var want []string
	for _, name := range shownCells() {
		want = append(want, name+".svg")
	}
	for _, sc := range All() {
		want = append(want, sc.Name+".svg")
	}
	slices.Sort(want)
	files, err := os.ReadDir(walksFolder)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range files {
		got = append(got, f.Name())
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", walksFolder, diff)
	}
}

var (
	aPort       = regexp.MustCompile(`([0-9a-f.\]]:)(\d+)\b`)
	aCount      = regexp.MustCompile(`(drops (?:is|was)|rose by) \d+`)
	logsMartian = regexp.MustCompile(`^the kernel of \w+: "martian source [^"]*"`)
)

// repeating are the scenarios that are about packets that are repeated.
var repeating = []string{emptyBackends.Name, staleUDP.Name}

// steady is a walk without what differs between two runs of it:
//
//   - The kernel chooses the ports of those who call. They are counted from 40001,
//     in the order in which they appear in a set-up.
//   - On a slow machine a packet may be repeated before its answer comes, and what
//     counts packets counts it twice. Only scenarios that are about repetitions
//     show them.
//   - The kernel does not log every martian, and not everybody may read its log.
//     What a capture has of it is always there.
//   - Where the kernel has dummy devices, targets have the VIP on one of these.
//   - With fail-open, the caller's port decides which target has the call. It is
//     called t1.
//   - With stale-udp, nlb needs a moment to remove the flow: what is sent until then
//     is still refused by the kernel of the target that has left.
func steady(w Walk) Walk {
	w.Parts = slices.Clone(w.Parts)
	switch w.Name {
	case failOpen.Name:
		w.Parts[1].Finding = chosenFirst(w.Parts[1].Finding)
	case staleUDP.Name:
		w.Parts[1].Finding.Path = withoutRefusals(w.Parts[1].Finding.Path)
	}
	for i := range w.Parts {
		f := &w.Parts[i].Finding
		f.Stations = withoutDummies(f.Stations)
		f.Path = slices.Clone(f.Path)
		if end := len(f.Path) - 1; end >= 0 {
			last := f.Path[end]
			f.Evidence = logsMartian.ReplaceAllLiteralString(f.Evidence, martianWords(last.Src, last.Dst, last.To))
		}
		f.Evidence = aCount.ReplaceAllString(f.Evidence, "$1 1")
		f.Evidence = strings.ReplaceAll(f.Evidence, dummy, "lo")
		ports := make(map[string]string)
		named := func(text string) string {
			return aPort.ReplaceAllStringFunc(text, func(end string) string {
				m := aPort.FindStringSubmatch(end)
				return m[1] + stdcmp.Or(ports[m[2]], m[2])
			})
		}
		for j := range f.Path {
			h := &f.Path[j]
			if !slices.Contains(repeating, w.Name) {
				h.Times = 1
			}
			h.Src, h.Dst = steadyEnd(ports, h.Src), steadyEnd(ports, h.Dst)
			h.Note = named(h.Note)
		}
		f.Evidence = named(f.Evidence)
	}
	return w
}

// withoutDummies has on lo what is on a dummy device.
func withoutDummies(stations []Station) []Station {
	stations = slices.Clone(stations)
	for i, s := range stations {
		own := maps.Clone(s.Own)
		for addr, iface := range own {
			if iface == dummy {
				own[addr] = "lo"
			}
		}
		stations[i].Own = own
	}
	return stations
}

// chosenFirst calls t2 t1.
func chosenFirst(f Finding) Finding {
	rename := strings.NewReplacer("t2", "t1", "10.0.1.12", "10.0.1.11")
	f.Path, f.Evidence = slices.Clone(f.Path), rename.Replace(f.Evidence)
	for i := range f.Path {
		h := &f.Path[i]
		h.From, h.To = rename.Replace(h.From), rename.Replace(h.To)
		h.Src, h.Dst = netip.MustParseAddrPort(rename.Replace(h.Src.String())), netip.MustParseAddrPort(rename.Replace(h.Dst.String()))
	}
	return f
}

// withoutRefusals leaves out what a target that has left refused, and the packets
// that it refused.
func withoutRefusals(path []Hop) []Hop {
	path = slices.DeleteFunc(slices.Clone(path), func(h Hop) bool { return strings.HasPrefix(h.What, "icmp") })
	for i := range path {
		if path[i].To == "t1" {
			path[i].Times = 1
		}
	}
	return path
}

// steadyEnd counts ports of the range that the kernel chooses from, of which the
// lab's servers have none.
func steadyEnd(ports map[string]string, a netip.AddrPort) netip.AddrPort {
	const first = 32768 // net.ipv4.ip_local_port_range
	if a.Port() < first {
		return a
	}
	was := fmt.Sprint(a.Port())
	if ports[was] == "" {
		ports[was] = fmt.Sprint(40001 + len(ports))
	}
	return netip.MustParseAddrPort(strings.TrimSuffix(a.String(), was) + ports[was])
}

// TestMeasureRates measures; what comes out is the machine's affair.
func TestMeasureRates(t *testing.T) {
	t.Parallel()
	rates, err := MeasureRates(soon(t), Options{Program: program}, 1)
	if err != nil {
		t.Fatal(err)
	}
	for i, r := range rates {
		if r.Mode != Modes[i] || r.Relative <= 0 {
			t.Errorf("%+v", r)
		}
	}
	if len(rates) != len(Modes) {
		t.Errorf("%d rates for %d modes", len(rates), len(Modes))
	}
}

// TestText has no line that is wider than was asked for, whatever happened.
func TestText(t *testing.T) {
	long := Finding{Evidence: strings.Repeat("evidence ", 30), Path: []Hop{
		{From: "p1x2", To: "n1", Src: netip.MustParseAddrPort("198.51.100.10:65535"), Dst: netip.MustParseAddrPort("203.0.113.109:65535"), What: "SYN+ACK", Times: 12, Note: "p1x2 rewrote the destination"},
	}}
	for _, sc := range All() {
		for _, width := range []int{0, 80, 120} {
			for line := range strings.Lines(Text(sc, Result{Naive: long, Cure: long, Verdict: Broken}, width)) {
				if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > max(width, MinWidth) {
					t.Errorf("%s at %d: %d columns: %s", sc.Name, width, n, line)
				}
			}
		}
	}
}
