package top

import (
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func TestNumber(t *testing.T) {
	for n, want := range map[float64]string{
		0: "0", 0.004: "<0.1", 0.5: "0.5", 3: "3", 9.94: "9.9", 9.96: "10", 12.4: "12", 999: "999", 999.4: "999", 999.6: "1.0k",
		1000: "1.0k", 1560: "1.6k", 9960: "10k", 123456: "123k", 999_600: "1.0M", 3.2e9: "3.2G", 7e12: "7.0T", 1.8e19: "18E",
	} {
		if got := number(n); got != want || len(got) > numberWidth {
			t.Errorf("%v is %q, want %q", n, got, want)
		}
	}
}

func TestDurations(t *testing.T) {
	const day = 24 * time.Hour
	for _, c := range []struct {
		d          time.Duration
		span, tiny string
	}{
		{-time.Second, "0s", "0s"}, {59 * time.Second, "59s", "59s"}, {61 * time.Second, "1m01s", "1m01s"},
		{10*time.Minute + time.Second, "10m01s", "10m"}, {59 * time.Minute, "59m00s", "59m"}, {3 * time.Hour, "3h00m", "3h00m"},
		{23*time.Hour + 59*time.Minute, "23h59m", "23h"}, {26 * time.Hour, "1d02h", "1d02h"}, {9*day + 23*time.Hour, "9d23h", "9d23h"},
		{10 * day, "10d00h", "10d"}, {9999 * day, "9999d00h", "9999d"},
	} {
		if a, b := Elapsed(c.d), short(c.d); a != c.span || b != c.tiny || len(b) > numberWidth {
			t.Errorf("%v is %q and %q, want %q and %q", c.d, a, b, c.span, c.tiny)
		}
	}
}

func TestSqueeze(t *testing.T) {
	for _, c := range []struct {
		text  string
		cells int
		want  string
	}{
		{"web", 3, "web"}, {"[2001:db8::11]:8080", 11, "[2001…:8080"}, {"abcdef", 5, "ab…ef"}, {"abcdef", 4, "ab…f"},
		{"abcdef", 2, "a…"}, {"abcdef", 1, "…"}, {"abcdef", 0, ""}, {"", 0, ""},
	} {
		if got := squeeze(c.text, c.cells); got != c.want {
			t.Errorf("%q in %d cells is %q, want %q", c.text, c.cells, got, c.want)
		}
	}
}

func TestWrap(t *testing.T) {
	for _, c := range []struct {
		text         string
		cells, lines int
		want         string
	}{
		{"one two three", 7, 3, "one two|three"}, {"one two three four", 8, 2, "one two|three f…"}, {"", 8, 2, ""}, {"one", 8, 0, ""},
	} {
		if got := strings.Join(wrap(c.text, c.cells, c.lines), "|"); got != c.want {
			t.Errorf("%q is %q, want %q", c.text, got, c.want)
		}
	}
}

// What targets answered is on the screen, and must not steer the terminal.
func FuzzText(f *testing.F) {
	for _, s := range []string{"", "web", "\x1b[2J\x1b]0;title\a", "a\tb\r\nc", "日本語", "e\u0301\u202e\u200d", "\xff\xfe", "👩‍👩‍👧", "\u009b31m"} {
		f.Add(s, 5)
	}
	f.Fuzz(func(t *testing.T, s string, cells int) {
		cells = max(0, min(cells, 200))
		clean := printable(s)
		if !utf8.ValidString(clean) || strings.ContainsFunc(clean, func(r rune) bool { return r < ' ' || r >= 0x7f && r < 0xa0 }) {
			t.Fatalf("%q is left of %q", clean, s)
		}
		for name, got := range map[string]string{"cut": cut(clean, cells), "squeeze": squeeze(clean, cells)} {
			if width(got) > cells {
				t.Errorf("%s: %q takes %d cells of %d", name, got, width(got), cells)
			}
		}
		for name, got := range map[string]string{"left": left(clean, cells), "right": right(clean, cells)} {
			if width(got) != cells {
				t.Errorf("%s: %q takes %d cells of %d", name, got, width(got), cells)
			}
		}
		for _, l := range wrap(clean, cells, 3) {
			if width(l) > cells && cells > 1 {
				t.Errorf("wrap: %q takes %d cells of %d", l, width(l), cells)
			}
		}
	})
}
