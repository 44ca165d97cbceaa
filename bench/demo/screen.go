package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"nlb/bench/lab"
)

// A screen prints lines of up to 100 columns, in colour on a terminal.
type screen struct {
	w      io.Writer
	colour bool
}

func newScreen(w io.Writer) *screen {
	f, ok := w.(*os.File)
	if !ok || os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" {
		return &screen{w: w}
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return &screen{w, err == nil}
}

// line prints a line. When it cannot be written nobody reads on, so that is no
// error.
func (s *screen) line(format string, args ...any) {
	fmt.Fprintf(s.w, format+"\n", args...)
}

// paint colours text (ECMA-48, SGR).
func (s *screen) paint(code, text string) string {
	if !s.colour || text == "" {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

func (s *screen) good(text string) string { return s.paint("32", text) }
func (s *screen) bad(text string) string  { return s.paint("1;31", text) }
func (s *screen) dim(text string) string  { return s.paint("2", text) }

// heading begins an act.
func (s *screen) heading(title, how string) {
	s.line("")
	s.line("%s  %s", s.paint("1", title), s.dim(how))
}

// cell is text of a width, in the colour of its verdict.
func (s *screen) cell(width int, text string, ok bool) string {
	padded := fmt.Sprintf("%-*s", width, text)
	if ok {
		return s.good(padded)
	}
	return s.bad(padded)
}

// opening draws the network.
func (s *screen) opening(sc *scene) {
	s.line("%s real packets through the real nlb, between network namespaces of this machine.", s.paint("1", "nlb demo:"))
	s.line("")
	c, lb := sc.Clients[0], sc.LB
	left := []string{
		fmt.Sprintf("c1 %-14s ─── lb %-13s ───┬─", c.Addr4, lb.Addr4),
		fmt.Sprintf("   %-14s        %-13s    ├─", c.Addr6, lb.Addr6),
		fmt.Sprintf("   %-14s    VIP %-13s    ├─", "", lab.VIP4),
		fmt.Sprintf("   %-14s    VIP %-15s  └─", "", lab.VIP6),
	}
	for i, t := range sc.Targets {
		s.line("   %s %s %-10s %s", left[i], t.Name, t.Addr4, t.Addr6)
	}
}

// bar is n of most in a width of blocks, to an eighth of a block.
func bar(n, most, width int) string {
	eighths := n * width * 8 / max(most, 1)
	text := strings.Repeat("█", eighths/8)
	if rest := eighths % 8; rest > 0 {
		text += string([]rune(" ▏▎▍▌▋▊▉")[rest])
	}
	return text
}
