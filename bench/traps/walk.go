package traps

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"nlb/bench/lab"
)

// A Walk is the way of packets, to be drawn: one part for each set-up.
type Walk struct {
	Name  string // of the file, without its ending
	Title string
	Parts []Part
}

// A Part is what one set-up made of the packets.
type Part struct {
	Name    string // a word, such as "naive"
	SetUp   string
	Why     string // why it fails; "" if it works, or nobody said
	Finding Finding
}

// A Station is a node that packets meet.
type Station struct {
	Name string
	// Addr4 and Addr6 are those that it is known by, and Own all that it had, with
	// their interfaces.
	Addr4, Addr6 netip.Addr
	Own          map[netip.Addr]string
}

// stations are the watched nodes, as they are now.
func (s *site) stations() ([]Station, error) {
	var all []Station
	for _, w := range s.watched {
		n := Station{Name: w.node.Name, Addr4: w.node.Addr4, Addr6: w.node.Addr6}
		err := w.node.Do(func() (err error) { n.Own, err = ownAddresses(); return err })
		if err != nil {
			return nil, fmt.Errorf("addresses of %s: %w", w.node.Name, err)
		}
		all = append(all, n)
	}
	return all, nil
}

// ownAddresses are those of the calling thread's namespace, with their interfaces.
func ownAddresses() (map[netip.Addr]string, error) {
	links, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	own := make(map[netip.Addr]string)
	for _, l := range links {
		addrs, err := l.Addrs()
		if err != nil {
			return nil, err
		}
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil {
				own[p.Addr()] = l.Name
			}
		}
	}
	return own, nil
}

// NewWalk is a scenario's walk: the naive set-up's, and below it the cure's.
func NewWalk(sc Scenario, r Result) Walk {
	naive, cure := r.Naive, r.Cure
	naive.Stations, cure.Stations = known(naive.Stations, cure.Stations), known(cure.Stations, naive.Stations)
	return Walk{Name: sc.Name, Title: sc.Name + ": " + sc.Title, Parts: []Part{
		{Name: "naive", SetUp: sc.Naive, Why: sc.Why, Finding: naive},
		{Name: "cure", SetUp: sc.Cure, Finding: cure},
	}}
}

// known adds to the nodes of one set-up those that only another one met, by the
// addresses that no set-up changes.
func known(here, elsewhere []Station) []Station {
	all := slices.Clone(here)
	for _, n := range elsewhere {
		if !slices.ContainsFunc(here, func(s Station) bool { return s.Name == n.Name }) {
			all = append(all, Station{Name: n.Name, Addr4: n.Addr4, Addr6: n.Addr6})
		}
	}
	return all
}

// Walks are those of all calls that were made, if Options.Walks was set.
func (c Comparison) Walks() []Walk {
	var all []Walk
	for _, done := range c.Cases {
		for _, cell := range done.Cells {
			if len(cell.walked.Path) > 0 {
				all = append(all, done.walk(cell))
			}
		}
	}
	return all
}

// slug makes file names of the names of cases and modes.
var slug = strings.NewReplacer(", ", "-", " ", "-", "_", "-")

func (c Case) walk(cell Cell) Walk {
	f := cell.walked
	f.Works = cell.Works
	switch {
	case !cell.Works:
		f.Evidence += "the caller: " + cell.Error
	case cell.Header.IsValid():
		f.Evidence = fmt.Sprintf("the target answered; it saw %v, and %v in the header", cell.Sees, cell.Header)
	default:
		f.Evidence = fmt.Sprintf("the target answered, and saw %v", cell.Sees)
	}
	return Walk{
		Name:  strings.ToLower(slug.Replace(c.Name + "-" + cell.Mode)),
		Title: fmt.Sprintf("client_ip: %s · %s", cell.Mode, c.Name),
		Parts: []Part{{Name: "case", SetUp: c.Title, Finding: f}},
	}
}

// walk is cell with the packets' way.
func (c comparedCase) walk(ctx context.Context, s *site, mode int) (cell Cell, err error) {
	// Not sw: it passes on what is not for it.
	hosts := slices.Concat(s.Clients, s.Inside, s.Targets, s.Hosts, []*lab.Node{s.LB, s.Router, s.Gateway})
	hosts = slices.DeleteFunc(hosts, func(n *lab.Node) bool { return n == nil })
	defer func() { err = errors.Join(err, s.unwatch()) }()
	if err := s.watch(ctx, hosts...); err != nil {
		return cell, err
	}
	before, err := s.daemon.api.Status(ctx)
	if err != nil {
		return cell, err
	}
	if cell, err = c.cell(ctx, s, mode); err != nil {
		return cell, err
	}
	after, err := s.daemon.api.Status(ctx)
	if err != nil {
		return cell, err
	}
	for _, name := range slices.Sorted(maps.Keys(after.Totals)) {
		if strings.HasSuffix(name, "_drops") && after.Totals[name] > before.Totals[name] {
			cell.walked.Evidence += "nlb dropped the packet, and counted it in " + name + "; "
		}
	}
	if cell.walked.Path, err = s.path(ctx); err != nil {
		return cell, err
	}
	cell.walked.Stations, err = s.stations()
	return cell, err
}

// Save draws the walk into a file of a folder, which is made if it is missing.
// Who reads it meanwhile has the old file or the new one, never a part.
func (w Walk) Save(dir string) (err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	drawing, err := w.SVG()
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, "."+w.Name+"-*.svg")
	if err != nil {
		return err
	}
	_, err = f.Write(drawing)
	if err = errors.Join(err, f.Chmod(0o644), f.Close()); err == nil {
		err = os.Rename(f.Name(), filepath.Join(dir, w.Name+".svg"))
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

// columns are the nodes that packets met, in the order in which they first did.
func (w Walk) columns() []string {
	var names []string
	for _, p := range w.Parts {
		for _, h := range p.Finding.Path {
			for _, name := range []string{h.From, h.To} {
				if name != "" && !slices.Contains(names, name) {
					names = append(names, name)
				}
			}
		}
	}
	return names
}

// continues holds if later is the packet of h, sent on by the node that had
// received it. A node that rewrites both ends keeps the client's port.
func continues(h, later Hop) bool {
	return later.From == h.To && later.From != later.To && later.What == h.What &&
		(later.Src == h.Src || later.Dst == h.Dst ||
			h.Src.Port() != 0 && (later.Src.Port() == h.Src.Port() || later.Dst.Port() == h.Dst.Port()))
}

// answers holds if a packet that a node sent answers one that it had received.
// ICMP has no ports, and may come from any address.
func answers(h, later Hop) bool {
	if later.From != h.To {
		return false
	}
	if later.Src.Port() == 0 {
		return later.Dst.Addr() == h.Src.Addr()
	}
	return later.Src == h.Dst && later.Dst == h.Src
}

// cameAs is the hop that brought the packet to the node which sent it as path[i],
// or -1 if that node made it.
func cameAs(path []Hop, i int) int {
	for j := i - 1; j >= 0; j-- {
		if continues(path[j], path[i]) && path[j].From != path[j].To {
			return j
		}
	}
	return -1
}

// lost holds if nothing came of a packet where it arrived: it was not sent on,
// was not answered, and did not answer anything itself.
func lost(path []Hop, i int) bool {
	h := path[i]
	if h.To == "" {
		return false // nobody knows
	}
	for _, later := range path[i+1:] {
		if continues(h, later) || answers(h, later) {
			return false
		}
	}
	for j, before := range path[:i] {
		// A repetition stands where it was first seen.
		if before.Times > 1 && (continues(h, before) || answers(h, before)) {
			return false
		}
		own := before.From == h.To && before.Src.Addr() == h.Dst.Addr() && cameAs(path, j) < 0
		if own && (h.Dst.Port() == 0 || before.Src.Port() == h.Dst.Port()) {
			return false
		}
	}
	return true
}

// remark says what the captures tell of a hop beyond the packet itself, or "".
func (p Part) remark(i int) string {
	path := p.Finding.Path
	h := path[i]
	if lost(path, i) {
		text := h.To + " neither answers it nor passes it on"
		if p.station(h.To).Own[h.Src.Addr()] != "" {
			text += ": its source is an address of " + h.To + " itself"
		}
		return text
	}
	if cameAs(path, i) >= 0 {
		return ""
	}
	for _, before := range path[:i] {
		if before.To != h.From || !answers(before, h) {
			continue
		}
		switch {
		case h.What == "RST" && before.What == "SYN":
			return h.From + " refuses the call"
		case (h.What == "RST" || h.Src.Port() == 0) && stranger(path[:i], before):
			return fmt.Sprintf("%s never called %v", h.From, before.Src)
		}
	}
	return ""
}

// stranger holds if a packet came to an end that calls, from somebody whom it had
// not called.
func stranger(path []Hop, came Hop) bool {
	calls := false
	for _, h := range path {
		switch {
		case h.From == came.To && h.Src == came.Dst:
			if h.Dst == came.Src {
				return false
			}
			calls = true
		case h.To == came.To && h.Dst == came.Dst && h != came && !calls:
			return false // it is called
		}
	}
	return calls
}

func (p Part) station(name string) Station {
	i := slices.IndexFunc(p.Finding.Stations, func(s Station) bool { return s.Name == name })
	if i < 0 {
		return Station{Name: name}
	}
	return p.Finding.Stations[i]
}

// addresses are the lines below a node's name: the address that it is known by,
// and the VIP where it is bound, or where what is sent to it ends.
func (p Part) addresses(name string) []string {
	s, path := p.station(name), p.Finding.Path
	known, service := s.Addr4, lab.VIP4
	if len(path) > 0 && path[0].Src.Addr().Is6() {
		known, service = s.Addr6, lab.VIP6
	}
	var lines []string
	if known.IsValid() {
		lines = append(lines, known.String())
	}
	device := s.Own[service]
	if device != "" || endsAt(path, name, service) {
		lines = append(lines, "VIP "+service.String())
	}
	if device != "" {
		lines = append(lines, "on "+device)
	}
	return lines
}

// endsAt holds if a node received something for an address and did not send it on
// as it was.
func endsAt(path []Hop, node string, a netip.Addr) bool {
	for i, h := range path {
		if h.To != node || h.Dst.Addr() != a || h.Src.Addr() == a {
			continue
		}
		if !slices.ContainsFunc(path[i:], func(later Hop) bool { return continues(h, later) && later.Dst == h.Dst }) {
			return true
		}
	}
	return false
}

// describe is a walk in words, for who cannot see it.
func (w Walk) describe() string {
	var b strings.Builder
	for _, p := range w.Parts {
		fmt.Fprintf(&b, "%s: %s.", p.Name, strings.TrimSuffix(p.SetUp, "."))
		for i, h := range p.Finding.Path {
			fmt.Fprintf(&b, " %d: %s, %s > %s, %s", i+1, way(h), ends(h.Src), ends(h.Dst), kind(h))
			for _, more := range []string{h.Note, p.remark(i)} {
				if more != "" {
					b.WriteString("; " + more)
				}
			}
			b.WriteString(".")
		}
		fmt.Fprintf(&b, " It %s: %s.", outcome(p.Finding), strings.TrimSuffix(p.Finding.proof(), "."))
		if p.Why != "" {
			b.WriteString(" " + p.Why)
		}
		b.WriteString("\n")
	}
	return b.String()
}

// kind is what a packet is, and whether it was repeated. How often depends on the
// time.
func kind(h Hop) string {
	if h.Times > 1 {
		return h.What + ", repeated"
	}
	return h.What
}
