package traps

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"nlb/internal/golden"
)

func hop(from, to, src, dst, what, note string) Hop {
	end := func(s string) netip.AddrPort {
		if a, err := netip.ParseAddr(s); err == nil {
			return netip.AddrPortFrom(a, 0)
		}
		return netip.MustParseAddrPort(s)
	}
	return Hop{From: from, To: to, Src: end(src), Dst: end(dst), What: what, Note: note, Times: 1}
}

func station(name, addr string, more ...string) Station {
	first := netip.MustParseAddr(addr)
	s := Station{Name: name, Own: map[netip.Addr]string{first: "eth0"}}
	for _, text := range more {
		s.Own[netip.MustParseAddr(text)] = "lo"
	}
	if first.Is4() {
		s.Addr4 = first
	} else {
		s.Addr6 = first
	}
	return s
}

// drawn are walks that have, together, all that a drawing can show.
var drawn = []Walk{
	{
		Name: "hairpin", Title: "a hairpin: t1 calls the VIP, and is its target",
		Parts: []Part{{
			Name: "naive", SetUp: "lb rewrites the destination", Why: "No host believes that its own address comes from outside.",
			Finding: Finding{
				Evidence: "the caller: timeout",
				Stations: []Station{station("t1", "10.0.1.11"), station("lb", "10.0.1.1")},
				Path: []Hop{
					hop("t1", "lb", "10.0.1.11:40001", "198.51.100.10:80", "SYN", ""),
					hop("lb", "t1", "10.0.1.11:40001", "10.0.1.11:8080", "SYN", "lb rewrote the destination"),
				},
			},
		}, {
			Name: "cure", SetUp: "lb rewrites both ends",
			Finding: Finding{
				Works: true, Evidence: "t1 answered, and saw 10.0.1.1",
				Stations: []Station{station("t1", "10.0.1.11"), station("lb", "10.0.1.1", "198.51.100.10")},
				Path: []Hop{
					hop("t1", "lb", "10.0.1.11:40001", "198.51.100.10:80", "SYN", ""),
					hop("lb", "t1", "10.0.1.1:40001", "10.0.1.11:8080", "SYN", "lb rewrote both"),
					hop("t1", "lb", "10.0.1.11:8080", "10.0.1.1:40001", "SYN+ACK", ""),
					hop("lb", "t1", "198.51.100.10:80", "10.0.1.11:40001", "SYN+ACK", "lb rewrote both"),
				},
			},
		}},
	},
	{
		Name: "stranger", Title: "an answer that goes past lb",
		Parts: []Part{{Name: "naive", SetUp: "one segment", Finding: Finding{Path: []Hop{
			hop("i1", "lb", "10.0.1.101:40001", "198.51.100.10:80", "SYN", ""),
			hop("lb", "t1", "10.0.1.101:40001", "10.0.1.11:8080", "SYN", "lb rewrote the destination"),
			hop("t1", "i1", "10.0.1.11:8080", "10.0.1.101:40001", "SYN+ACK", ""),
			hop("i1", "t1", "10.0.1.101:40001", "10.0.1.11:8080", "RST", ""),
		}}}},
	},
	{
		Name: "loss", Title: "a packet that nothing comes of, and one that was not seen to arrive",
		Parts: []Part{{Name: "naive", SetUp: "lb drops", Finding: Finding{Path: []Hop{
			hop("c1", "lb", "203.0.113.9:40001", "198.51.100.10:80", "SYN", ""),
			{From: "lb", Src: netip.MustParseAddrPort("10.0.1.1:40002"), Dst: netip.MustParseAddrPort("10.0.1.11:8080"), What: "SYN", Times: 3},
			hop("", "lb", "192.0.2.1", "10.0.1.1", "icmp host unreachable", ""),
		}}}},
	},
	{
		Name: "loop", Title: "a node that has the VIP",
		Parts: []Part{{Name: "naive", SetUp: "t2 calls itself", Finding: Finding{
			Stations: []Station{station("t2", "10.0.1.12", "198.51.100.10")},
			Path: []Hop{
				hop("t2", "t2", "198.51.100.10:40001", "198.51.100.10:80", "SYN", ""),
				hop("t2", "t2", "198.51.100.10:80", "198.51.100.10:40001", "RST", ""),
			},
		}}},
	},
	{
		Name: "udp6", Title: "UDP over IPv6, with addresses as long as they get",
		Parts: []Part{{Name: "case", SetUp: "both ends are rewritten on both ways", Finding: Finding{
			Works: true, Evidence: "t1 answered",
			Stations: []Station{
				station("c1", "2001:db8:9999:9999:9999:9999:9999:9999"),
				station("lb", "2001:db8:1111:1111:1111:1111:1111:1111", "2001:db8:77::10"),
				station("t1", "2001:db8:1111:1111:1111:1111:1111:1112"),
			},
			Path: []Hop{
				hop("c1", "lb", "[2001:db8:9999:9999:9999:9999:9999:9999]:40001", "[2001:db8:77::10]:53", "udp", ""),
				hop("lb", "t1", "[2001:db8:1111:1111:1111:1111:1111:1111]:40001", "[2001:db8:1111:1111:1111:1111:1111:1112]:5353", "udp", "lb rewrote both"),
				hop("t1", "lb", "[2001:db8:1111:1111:1111:1111:1111:1112]:5353", "[2001:db8:1111:1111:1111:1111:1111:1111]:40001", "udp", ""),
				hop("lb", "c1", "[2001:db8:77::10]:53", "[2001:db8:9999:9999:9999:9999:9999:9999]:40001", "udp", "lb rewrote both"),
			},
		}}},
	},
	{
		Name: "hostile", Title: `</title><script>alert("1")</script>&amp;`,
		Parts: []Part{{Name: `<"&>`, SetUp: "]]> \x00 <!--", Why: "<&\">'", Finding: Finding{
			Evidence: `<image href="http://192.0.2.1/">`,
			Path:     []Hop{hop(`<a&"`, `"b>&`, "203.0.113.9:40001", "198.51.100.10:80", `<SYN>`, `"><g onload="x">`)},
		}}},
	},
	{Name: "nothing", Title: "no packets", Parts: []Part{{Name: "naive", SetUp: "silence"}}},
}

func TestSVG(t *testing.T) {
	for _, w := range drawn {
		t.Run(w.Name, func(t *testing.T) {
			compareDrawing(t, filepath.Join("testdata", "svg"), w)
			for _, fault := range faults(w) {
				t.Error(fault)
			}
		})
	}
}

// compareDrawing compares a file with what a walk looks like, or rewrites it.
func compareDrawing(t *testing.T, dir string, w Walk) {
	t.Helper()
	got, err := w.SVG()
	if err != nil {
		t.Fatal(err)
	}
	golden.CheckFile(t, filepath.Join(dir, w.Name+".svg"), string(got))
}

// faults are the reasons why a drawing could not be read: by a parser, as it is no
// XML or has elements that a drawing has no use for, or by people, as texts
// overlap or leave it.
func faults(w Walk) []string {
	text, err := w.SVG()
	if err != nil {
		return []string{err.Error()}
	}
	found := strayElements(text)
	c := w.layout()
	for i, a := range c.boxes {
		if a.X < 0 || a.Y < 0 || a.X+a.Width > svgWidth || a.Y+a.Height > c.y {
			found = append(found, fmt.Sprintf("%q leaves the drawing: %+v", c.texts[i].Spans, a))
		}
		for j, b := range c.boxes[:i] {
			if a.X < b.X+b.Width && b.X < a.X+a.Width && a.Y < b.Y+b.Height && b.Y < a.Y+a.Height {
				found = append(found, fmt.Sprintf("%q overlaps %q", c.texts[i].Spans, c.texts[j].Spans))
			}
		}
	}
	return found
}

func strayElements(text []byte) []string {
	known := map[string]bool{
		"svg": true, "title": true, "desc": true, "style": true, "rect": true, "path": true, "circle": true, "text": true, "tspan": true,
	}
	var found []string
	for d := xml.NewDecoder(bytes.NewReader(text)); ; {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return found
		}
		if err != nil {
			return append(found, err.Error())
		}
		switch token := token.(type) {
		case xml.StartElement:
			if !known[token.Name.Local] {
				found = append(found, "an element "+token.Name.Local)
			}
			for _, a := range token.Attr {
				if strings.HasPrefix(a.Name.Local, "on") || strings.HasSuffix(a.Name.Local, "href") {
					found = append(found, "an attribute "+a.Name.Local)
				}
			}
		case xml.Comment, xml.ProcInst, xml.Directive:
			found = append(found, fmt.Sprintf("a %T", token))
		}
	}
}

// TestHostileText comes back from the drawing as it went in.
func TestHostileText(t *testing.T) {
	w := drawn[5]
	text, err := w.SVG()
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		Title string `xml:"title"`
		Texts []struct {
			Spans []string `xml:"tspan"`
		} `xml:"text"`
	}
	if err := xml.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, line := range got.Texts {
		lines = append(lines, strings.Join(line.Spans, ""))
	}
	all := strings.Join(lines, "\n")
	p := w.Parts[0]
	for _, want := range []string{w.Title, p.Name, "]]> \ufffd <!--", p.Why, p.Finding.Evidence, `<a&"`, `"b>&`, "<SYN>", p.Finding.Path[0].Note} {
		if !strings.Contains(all, want) {
			t.Errorf("no text says %q:\n%s", want, all)
		}
	}
	if got.Title != w.Title {
		t.Errorf("title %q", got.Title)
	}
}

// TestAnyWalk draws walks that no network would have: none is illegible.
func TestAnyWalk(t *testing.T) {
	node := rapid.SampledFrom([]string{"", "c1", "rt", "lb", "gw", "n1", "p1x1", "abcdefghijklmno"})
	address := rapid.SampledFrom([]string{
		"203.0.113.9:40001", "198.51.100.10:80", "10.0.1.11:8080", "10.0.1.1", "[2001:db8:1111:2222:3333:4444:5555:6666]:65535", "198.51.100.10",
	})
	line := rapid.StringMatching(`[ -~]{0,300}`)
	rapid.Check(t, func(t *rapid.T) {
		one := rapid.Custom(func(t *rapid.T) Hop {
			h := hop(node.Draw(t, "from"), node.Draw(t, "to"), address.Draw(t, "src"), address.Draw(t, "dst"),
				rapid.SampledFrom([]string{"SYN", "SYN+ACK", "RST", "udp", "icmp type 11 code 0"}).Draw(t, "what"),
				rapid.SampledFrom([]string{"", "lb rewrote both", "the header names [2001:db8:1111:2222:3333:4444:5555:6666]:65535"}).Draw(t, "note"))
			if h.From == "" && h.To == "" {
				h.From = "c1" // somebody saw it
			}
			h.Times = rapid.IntRange(1, 3).Draw(t, "times")
			return h
		})
		part := rapid.Custom(func(t *rapid.T) Part {
			return Part{Name: "naive", SetUp: line.Draw(t, "set-up"), Why: line.Draw(t, "why"), Finding: Finding{
				Works: rapid.Bool().Draw(t, "works"), Evidence: line.Draw(t, "evidence"),
				Path:     rapid.SliceOfN(one, 0, 12).Draw(t, "path"),
				Stations: []Station{station("lb", "2001:db8:1111:1111:1111:1111:1111:1111", "198.51.100.10", "2001:db8:77::10")},
			}}
		})
		w := Walk{Name: "any", Title: line.Draw(t, "title"), Parts: rapid.SliceOfN(part, 1, 2).Draw(t, "parts")}
		for _, fault := range faults(w) {
			t.Error(fault)
		}
	})
}

// TestLost tells packets that nothing came of from those that arrived for good.
func TestLost(t *testing.T) {
	for _, tc := range []struct {
		name string
		path []Hop
		want []bool
	}{
		{"a call that is answered", drawn[0].Parts[1].Finding.Path, []bool{false, false, false, false}},
		{"a martian", drawn[0].Parts[0].Finding.Path, []bool{false, true}},
		{"a stranger's answer", drawn[1].Parts[0].Finding.Path, []bool{false, false, false, false}},
		{"a refusal by oneself", drawn[3].Parts[0].Finding.Path, []bool{false, false}},
		{"a drop, and a packet to nobody knows where", drawn[2].Parts[0].Finding.Path, []bool{true, false, false}},
		{"another call goes on", []Hop{
			hop("c1", "lb", "203.0.113.9:40001", "198.51.100.10:22", "SYN", ""),
			hop("c1", "lb", "203.0.113.9:40002", "198.51.100.10:80", "SYN", ""),
			hop("lb", "t1", "203.0.113.9:40002", "10.0.1.11:8080", "SYN", "lb rewrote the destination"),
			hop("t1", "lb", "10.0.1.11:8080", "203.0.113.9:40002", "SYN+ACK", ""),
		}, []bool{true, false, false, true}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var got []bool
			for i := range tc.path {
				got = append(got, lost(tc.path, i))
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// TestRemarks: who is said to be a stranger really is one.
func TestRemarks(t *testing.T) {
	stale := []Hop{
		hop("c1", "t1", "203.0.113.9:40001", "10.0.1.11:8080", "udp", ""),
		hop("t1", "c1", "10.0.1.11:8080", "203.0.113.9:40001", "udp", ""),
		hop("t1", "c1", "10.0.1.11", "203.0.113.9", "icmp port unreachable", ""),
	}
	masked := []Hop{
		hop("c1", "lb", "203.0.113.9:40001", "198.51.100.10:80", "udp", ""),
		hop("gw", "c1", "10.0.3.2:8080", "203.0.113.9:40001", "udp", ""),
		hop("c1", "gw", "203.0.113.9", "10.0.3.2", "icmp port unreachable", ""),
	}
	for _, tc := range []struct {
		name, want string
		path       []Hop
	}{
		{"a target that has left", "", stale},
		{"an answer from elsewhere", "c1 never called 10.0.3.2:8080", masked},
		{"a reset of an answer from elsewhere", "i1 never called 10.0.1.11:8080", drawn[1].Parts[0].Finding.Path},
		{"a refusal", "t2 refuses the call", drawn[3].Parts[0].Finding.Path},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := (Part{Finding: Finding{Path: tc.path}}).remark(len(tc.path) - 1); got != tc.want {
				t.Errorf("%q, want %q", got, tc.want)
			}
		})
	}
}

// TestSave makes the folder, replaces the file, leaves nothing else, and says what
// is in the way.
func TestSave(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	for _, w := range []Walk{drawn[0], {Name: "hairpin", Title: "new"}} {
		if err := w.Save(dir); err != nil {
			t.Fatal(err)
		}
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 1 || files[0].Name() != "hairpin.svg" {
		t.Errorf("%v, %v", files, err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "hairpin.svg"))
	if err != nil || !strings.Contains(string(text), ">new</title>") {
		t.Errorf("%s, %v", text, err)
	}
	info, err := os.Stat(filepath.Join(dir, "hairpin.svg"))
	if err != nil || info.Mode().Perm() != 0o644 {
		t.Errorf("%v, %v", info, err)
	}
	inTheWay := filepath.Join(dir, "hairpin.svg")
	if err := drawn[0].Save(inTheWay); err == nil || !strings.Contains(err.Error(), inTheWay) {
		t.Errorf("%v", err)
	}
	if err := os.Mkdir(filepath.Join(dir, "loop.svg"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := drawn[3].Save(dir); err == nil || !strings.Contains(err.Error(), "loop.svg") {
		t.Errorf("%v", err)
	}
	if files, err := os.ReadDir(dir); err != nil || len(files) != 2 {
		t.Errorf("%v, %v", files, err)
	}
}
