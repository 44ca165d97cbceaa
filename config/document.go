package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// document returns the root mapping of the one YAML document in data, or nil
// after it reported why there is none.
func document(data []byte, r *report) *yaml.Node {
	if !readable(data, r) {
		return nil
	}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc yaml.Node
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		r.add(place{}, "the file is empty", "a mapping; {} is the smallest")
		return nil
	case err != nil:
		syntax(data, err, r)
		return nil
	}
	root := doc.Content[0]
	if isNull(root) {
		r.add(at(root, ""), "the file is empty", "a mapping; {} is the smallest")
		return nil
	}
	var second yaml.Node
	switch err := dec.Decode(&second); {
	case errors.Is(err, io.EOF):
	case err != nil:
		syntax(data, err, r)
		return nil
	default:
		r.add(at(&second, ""), "a second YAML document begins here", "one document; remove the line ---")
	}
	return root
}

func at(n *yaml.Node, path string) place { return place{Line: n.Line, Column: n.Column, Path: path} }

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" }

// unreadable are the characters that are refused before yaml sees the text.
// YAML counts some of them as line breaks and editors do not: every line number
// after one would be wrong.
var unreadable = []struct{ text, what, want string }{
	{"\x00", "a NUL byte", "plain text"},
	{"\u0085", "the line separator U+0085", "a line feed"},
	{"\u2028", "the line separator U+2028", "a line feed"},
	{"\u2029", "the paragraph separator U+2029", "a line feed"},
}

// readable reports whether data is text of a sane size.
func readable(data []byte, r *report) bool {
	if len(data) > maxFile {
		r.add(place{}, "the file is too large", fmt.Sprintf("at most %d MiB", maxFile>>20))
		return false
	}
	before := len(r.problems)
	for _, u := range unreadable {
		if i := bytes.Index(data, []byte(u.text)); i >= 0 {
			r.add(offset(data, i), "the file has "+u.what, u.want)
		}
	}
	if i := invalidUTF8(data); i >= 0 {
		r.add(offset(data, i), fmt.Sprintf("the byte 0x%02x is not UTF-8", data[i]), "a file saved as UTF-8")
	}
	if i := loneCR(data); i >= 0 {
		r.add(offset(data, i), "the file has a carriage return without a line feed", "lines that end in LF or CR LF")
	}
	return len(r.problems) == before
}

func invalidUTF8(data []byte) int {
	for i := 0; i < len(data); {
		c, size := utf8.DecodeRune(data[i:])
		if c == utf8.RuneError && size == 1 {
			return i
		}
		i += size
	}
	return -1
}

func loneCR(data []byte) int {
	for i, c := range data {
		if c == '\r' && (i+1 == len(data) || data[i+1] != '\n') {
			return i
		}
	}
	return -1
}

// offset is the position of the byte at index i.
func offset(data []byte, i int) place {
	start := bytes.LastIndexByte(data[:i], '\n') + 1
	return place{Line: 1 + bytes.Count(data[:i], []byte("\n")), Column: 1 + utf8.RuneCount(data[start:i])}
}

var yamlError = regexp.MustCompile(`^yaml: (?:line (\d+): )?(.*)$`)

// syntax reports what yaml's scanner or parser did not like.
func syntax(data []byte, err error, r *report) {
	message, line := strings.ReplaceAll(err.Error(), "\n", " "), 0
	if m := yamlError.FindStringSubmatch(message); m != nil {
		message = m[2]
		line, _ = strconv.Atoi(m[1])
	}
	// The scanner names the right line when it names one. The parser names the
	// line before the one where the enclosing block began.
	if line == 0 || strings.HasPrefix(message, "did not find expected") {
		line = max(line, firstBadLine(data, err))
	}
	want := ""
	if strings.Contains(message, "tab character") || strings.Contains(lineAt(data, line), "\t") {
		want = "spaces; YAML forbids tabs in indentation"
	}
	text := lineAt(data, line)
	column := 1 + len(text) - len(strings.TrimLeft(text, " \t"))
	r.add(place{Line: line, Column: column}, "not YAML: "+message, want)
}

// firstBadLine finds the shortest run of lines that fails as the whole text
// does, which ends at the culprit.
func firstBadLine(data []byte, want error) int {
	const largest = 256 << 10 // the search parses about log2(lines) times
	if len(data) > largest {
		return 1
	}
	var ends []int
	for i, c := range data {
		if c == '\n' {
			ends = append(ends, i+1)
		}
	}
	ends = append(ends, len(data))
	low, high := 0, len(ends)-1
	for low < high {
		mid := (low + high) / 2
		if fails(data[:ends[mid]], want) {
			high = mid
		} else {
			low = mid + 1
		}
	}
	return low + 1
}

func fails(data []byte, want error) bool {
	dec := yaml.NewDecoder(bytes.NewReader(data))
	for {
		var n yaml.Node
		if err := dec.Decode(&n); err != nil {
			return err.Error() == want.Error()
		}
	}
}

func lineAt(data []byte, line int) string {
	for range line - 1 {
		_, rest, ok := bytes.Cut(data, []byte("\n"))
		if !ok {
			break
		}
		data = rest
	}
	text, _, _ := bytes.Cut(data, []byte("\n"))
	return string(text)
}
