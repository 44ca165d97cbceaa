package config

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"regexp"
	"strings"
	"testing"
)

// sound reports what is wrong with the answer of Parse to data itself.
func sound(data []byte) error {
	c, err := Parse("f.yml", data)
	if err == nil {
		if c.Spec == nil || c.File != "f.yml" {
			return fmt.Errorf("incomplete: %+v", c)
		}
		return nil
	}
	if c != nil {
		return errors.New("both a Config and an error")
	}
	var all Problems
	if !errors.As(err, &all) || len(all) == 0 {
		return fmt.Errorf("%T is not Problems", err)
	}
	lines := max(1, bytes.Count(data, []byte("\n"))+1)
	if bytes.HasSuffix(data, []byte("\n")) {
		lines = max(1, lines-1)
	}
	for i, p := range all {
		switch {
		case p.Line < 1 || p.Line > lines || p.Column < 1:
			return fmt.Errorf("position %d:%d in %d lines: %v", p.Line, p.Column, lines, p)
		case p.What == "" || strings.ContainsAny(p.Error(), "\n\r"):
			return fmt.Errorf("not one line: %q", p.Error())
		case i > 0 && all[i-1].Line > p.Line:
			return fmt.Errorf("not sorted: %v", err)
		}
	}
	return nil
}

var keyLine = regexp.MustCompile(`^(\s*(?:- )?)([a-z][a-z0-9_]*):( |$)`)

// A mutation is a damaged reference file. If line is not 0, the damage is one
// mistyped key, and all that may be reported.
type mutation struct {
	what         string
	text         string
	line, column int
	key          string
}

// values are put in place of the reference file's.
var values = []string{
	"", "~", "0", "-1", "080", "70000", "99999999999999999999", "1.5", "0x50", "true", "no", "x", `""`, `"80"`, "30", "30s", "5 min", "-1s", "9999h",
	"[]", "{}", "[a, b]", "{a: 1}", "[[[[]]]]", "*a", "&a x", "!!int x", "<<", "|", ">", `"unclosed`, "'", "@", "%", "`", "- x", "? x", "a: b", "127.0.0.1", "::1",
	"fe80::1%eth0", "10.0.0.0/8", "198.51.100.10", "web", "TCP", "tcp", "SCTP", "preserve", "\t", "\x00", "\xff", "\u2028", "é", strings.Repeat("x", 5000),
}

func mutate(r *rand.Rand, keys map[string]bool) mutation {
	lines := strings.Split(strings.TrimSuffix(string(Reference()), "\n"), "\n")
	i := r.IntN(len(lines))
	for keyLine.FindString(lines[i]) == "" {
		i = r.IntN(len(lines))
	}
	m := keyLine.FindStringSubmatch(lines[i])
	rest := lines[i][len(m[0]):]
	out := mutation{}
	switch r.IntN(6) {
	case 0:
		out.what = "delete a line"
		lines = append(lines[:i], lines[i+1:]...)
	case 1:
		out.what = "change a value"
		lines[i] = strings.TrimRight(m[0], " ") + " " + values[r.IntN(len(values))]
	case 2:
		out.what = "change the indentation"
		lines[i] = strings.Repeat([]string{" ", "  ", "\t"}[r.IntN(3)], r.IntN(5)) + strings.TrimSpace(lines[i])
	case 3:
		out.what = "repeat a line"
		j := r.IntN(len(lines))
		lines[j] += "\n" + lines[i]
	default:
		out.what = "mistype a key"
		wrong := mistype(r, m[2])
		for keys[wrong] {
			wrong = mistype(r, m[2])
		}
		lines[i] = m[1] + wrong + ":" + m[3] + rest
		out.line, out.column, out.key = i+1, len(m[1])+1, m[2]
	}
	out.text = strings.Join(lines, "\n") + "\n"
	out.what = fmt.Sprintf("line %d: %s", i+1, out.what)
	return out
}

// mistype drops, doubles, replaces or swaps one character.
func mistype(r *rand.Rand, key string) string {
	i := r.IntN(len(key) - 1)
	switch r.IntN(4) {
	case 0:
		return key[:i] + key[i+1:]
	case 1:
		return key[:i+1] + key[i:]
	case 2:
		return key[:i] + string(rune('a'+r.IntN(26))) + key[i+1:]
	}
	return key[:i] + key[i+1:i+2] + key[i:i+1] + key[i+2:]
}

func TestMutations(t *testing.T) {
	keys := make(map[string]bool)
	for _, k := range keysOf(reflect.TypeFor[rawFile](), "") {
		keys[k.path[strings.LastIndex(k.path, ".")+1:]] = true
	}
	r := rand.New(rand.NewPCG(1, 2)) // the same thousand each time
	for range 1000 {
		m := mutate(r, keys)
		if err := sound([]byte(m.text)); err != nil {
			t.Errorf("%s: %v", m.what, err)
		}
		if m.line == 0 {
			continue
		}
		_, err := Parse("f.yml", []byte(m.text))
		var all Problems
		if !errors.As(err, &all) || len(all) != 1 || all[0].Line != m.line || all[0].Column != m.column || all[0].Want != fmt.Sprintf("did you mean %q?", m.key) {
			t.Errorf("%s: want one problem at %d:%d about %s, got:\n%v", m.what, m.line, m.column, m.key, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(Reference())
	for _, suffix := range []string{".good.yml", ".bad.yml"} {
		for _, data := range fixtures(f, suffix) {
			f.Add(data)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := sound(data); err != nil {
			t.Error(err)
		}
	})
}
