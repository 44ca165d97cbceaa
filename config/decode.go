package config

import (
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/invopop/jsonschema"
	"go.yaml.in/yaml/v3"
)

// A value is a scalar of the file: what it says and where it says so. F is how
// its text is read.
type value[T any, F format[T]] struct {
	place
	V       T
	Written bool // false: V is the default
	OK      bool // false: V is nothing, and the reason was reported
}

// A format reads scalars of one kind. Its methods get the tags of the field.
type format[T any] interface {
	parse(w word, tag reflect.StructTag) (T, *fault)
	// want says in a few words what would be right.
	want(tag reflect.StructTag) string
	schema(tag reflect.StructTag) *jsonschema.Schema
}

// A word is a scalar as it was written.
type word struct {
	text   string
	quoted bool
}

// A fault is why a word could not be read. An empty want stands for the
// format's.
type fault struct{ what, want string }

// A leaf is a value of any kind.
type leaf interface {
	decode(d *decoder, n *yaml.Node, at place, tag reflect.StructTag)
	override(r *report, text string, at place, tag reflect.StructTag)
	schema(tag reflect.StructTag) *jsonschema.Schema
}

func (v *value[T, F]) decode(d *decoder, n *yaml.Node, at place, tag reflect.StructTag) {
	var f F
	v.place = at
	switch {
	case n == nil:
		v.fallback(d, tag)
	case isNull(n):
		d.r.add(at, "has no value", f.want(tag))
	case n.Kind != yaml.ScalarNode:
		d.r.add(at, "is "+kindOf(n)+", not a single value", f.want(tag))
	default:
		quoted := n.Style&(yaml.DoubleQuotedStyle|yaml.SingleQuotedStyle|yaml.LiteralStyle|yaml.FoldedStyle) != 0
		v.set(d.r, word{n.Value, quoted}, tag)
	}
	v.Written = n != nil
}

// fallback is for a key that is not in the file.
func (v *value[T, F]) fallback(d *decoder, tag reflect.StructTag) {
	var f F
	if text, ok := tag.Lookup("default"); ok {
		v.set(d.r, word{text: text}, tag)
		return
	}
	if tag.Get("required") == "" {
		v.OK = true
		return
	}
	d.r.add(v.place, "missing", f.want(tag))
}

// override replaces what the file says by the text of a flag or variable.
func (v *value[T, F]) override(r *report, text string, at place, tag reflect.StructTag) {
	v.place, v.Written = at, true
	v.set(r, word{text: text}, tag)
}

func (v *value[T, F]) set(r *report, w word, tag reflect.StructTag) {
	var f F
	got, bad := f.parse(w, tag)
	if bad == nil {
		v.V, v.OK = got, true
		return
	}
	v.OK = false
	if bad.want == "" {
		bad.want = f.want(tag)
	}
	r.add(v.place, bad.what, bad.want)
}

func (v *value[T, F]) schema(tag reflect.StructTag) *jsonschema.Schema {
	var f F
	return f.schema(tag)
}

// A mapping is embedded in each raw struct and knows where its keys are.
type mapping struct {
	place
	keys   map[string]place // of the values that are written
	broken map[string]bool  // lists and mappings that could not be read
}

func (m *mapping) self() *mapping { return m }

// at is the position of the value of a key, or of the mapping that lacks it.
func (m *mapping) at(key string) place {
	if p, ok := m.keys[key]; ok {
		return p
	}
	return m.place.child(key)
}

// A decoder walks yaml nodes along the raw structs. It goes on after a problem,
// so that one run finds them all.
type decoder struct {
	r       *report
	fields  map[reflect.Type][]field
	inAlias int // aliases between the root and here
	aliased int // values decoded below aliases
}

// maxAliased bounds what aliases expand to. Nine lists of nine aliases each,
// nested nine deep, would otherwise be 387 million values ("billion laughs").
const maxAliased = 100_000

func newDecoder(r *report) *decoder {
	return &decoder{r: r, fields: make(map[reflect.Type][]field)}
}

func (d *decoder) root(n *yaml.Node, f *rawFile) {
	d.node(n, at(n, ""), reflect.ValueOf(f).Elem(), "")
}

// A field is a key of a mapping.
type field struct {
	index int
	key   string
	tag   reflect.StructTag
}

// fieldsOf lists the keys that a raw struct declares, in order.
func fieldsOf(t reflect.Type) []field {
	var fields []field
	for i := range t.NumField() {
		f := t.Field(i)
		if key := f.Tag.Get("yaml"); key != "" && key != "-" {
			fields = append(fields, field{i, key, f.Tag})
		}
	}
	return fields
}

func (d *decoder) fieldsOf(t reflect.Type) []field {
	fields, ok := d.fields[t]
	if !ok {
		fields = fieldsOf(t)
		d.fields[t] = fields
	}
	return fields
}

// node decodes n into v and reports whether n was of the right kind. A nil n
// stands for a missing key: v gets its defaults.
func (d *decoder) node(n *yaml.Node, at place, v reflect.Value, tag reflect.StructTag) bool {
	if n != nil && n.Kind == yaml.AliasNode {
		d.inAlias++
		defer func() { d.inAlias-- }()
		n = n.Alias
		if !isNull(n) {
			at.Line, at.Column = n.Line, n.Column
		}
	}
	if d.inAlias > 0 {
		if d.aliased++; d.aliased > maxAliased {
			if d.aliased == maxAliased+1 {
				d.r.add(at, "the aliases expand to too much", fmt.Sprintf("at most %d values", maxAliased))
			}
			return false
		}
	}
	if n != nil && n.Style&yaml.TaggedStyle != 0 {
		d.r.add(at, "has the tag "+quote(n.Tag), "no tags; the key says the type")
		return false
	}
	if l, ok := v.Addr().Interface().(leaf); ok {
		l.decode(d, n, at, tag)
		return true
	}
	if n != nil && isNull(n) {
		n = nil // an empty list or mapping is the default one
	}
	if v.Kind() == reflect.Slice {
		return d.sequence(n, at, v, tag)
	}
	return d.structure(n, at, v)
}

func (d *decoder) sequence(n *yaml.Node, at place, v reflect.Value, tag reflect.StructTag) bool {
	elem := v.Type().Elem()
	switch {
	case n == nil && tag.Get("required") != "":
		d.r.add(at, "missing", tag.Get("least"))
		return false
	case n == nil:
		for i, text := range strings.Fields(tag.Get("default")) {
			item := reflect.New(elem).Elem()
			d.node(&yaml.Node{Kind: yaml.ScalarNode, Value: text}, index(at, i), item, tag)
			v.Set(reflect.Append(v, item))
		}
		return true
	case n.Kind != yaml.SequenceNode:
		d.r.add(at, "is "+kindOf(n)+", not a list", `items that begin with "- "`)
		return false
	case len(n.Content) == 0 && tag.Get("least") != "":
		d.r.add(at, "is empty", tag.Get("least"))
		return false
	}
	for i, c := range n.Content {
		if d.r.full() {
			return true
		}
		here := index(at, i)
		here.Line, here.Column = c.Line, c.Column
		v.Set(reflect.Append(v, reflect.Zero(elem)))
		item := v.Index(i)
		if isNull(c) && item.Kind() == reflect.Struct && !isLeaf(item) {
			d.r.add(here, "has no value", "a mapping, or no item")
			continue
		}
		d.node(c, here, item, tag)
	}
	return true
}

func index(at place, i int) place {
	at.Path += "[" + strconv.Itoa(i) + "]"
	return at
}

func isLeaf(v reflect.Value) bool { _, ok := v.Addr().Interface().(leaf); return ok }

func (d *decoder) structure(n *yaml.Node, at place, v reflect.Value) bool {
	m := v.Addr().Interface().(interface{ self() *mapping }).self()
	m.place = at
	m.keys, m.broken = make(map[string]place), make(map[string]bool)
	fields := d.fieldsOf(v.Type())
	entries, right := map[string]entry(nil), true
	if n != nil {
		if entries, right = d.entries(n, at, fields); !right {
			return false
		}
	}
	for _, f := range fields {
		e, written := entries[f.key]
		here := at.child(f.key)
		if written {
			here.Line, here.Column = e.position()
			m.keys[f.key] = here
		}
		if !d.node(e.value, here, v.Field(f.index), f.tag) {
			m.broken[f.key] = true
		}
	}
	return true
}

// An entry is one key of a mapping in the file.
type entry struct{ key, value *yaml.Node }

// position is where the value is, or the key of an empty value: yaml puts those
// on whatever comes next.
func (e entry) position() (line, column int) {
	if isNull(e.value) {
		return e.key.Line, e.key.Column
	}
	return e.value.Line, e.value.Column
}

// entries returns what n has for each of the fields, and false when n is no
// mapping at all. An unknown key that looks like a mistyped field is reported
// and then taken for that field: one slip should not look like several.
func (d *decoder) entries(n *yaml.Node, at place, fields []field) (map[string]entry, bool) {
	if n.Kind != yaml.MappingNode {
		what := "is " + kindOf(n) + ", not a mapping"
		if at.Path == "" {
			what = "the file " + what
		}
		d.r.add(at, what, "keys such as "+fields[0].key+": ...")
		return nil, false
	}
	found := make(map[string]entry, len(fields))
	var unknown []entry
	seen := make(map[string]*yaml.Node, len(n.Content)/2)
	for i := 0; i+1 < len(n.Content) && !d.r.full(); i += 2 {
		e := entry{n.Content[i], n.Content[i+1]}
		if !d.plainKey(e.key, at) {
			continue
		}
		name := e.key.Value
		if first, ok := seen[name]; ok {
			d.r.add(keyPlace(e.key, at), "written twice", alreadyOn(place{Line: first.Line}))
			continue
		}
		seen[name] = e.key
		if slices.ContainsFunc(fields, func(f field) bool { return f.key == name }) {
			found[name] = e
		} else {
			unknown = append(unknown, e)
		}
	}
	for _, e := range unknown {
		if meant := d.unknownKey(e, at, fields, found); meant != "" {
			found[meant] = e
		}
	}
	return found, true
}

// unknownKey reports a key that is none of the fields, and returns the absent
// field that was probably meant.
func (d *decoder) unknownKey(e entry, at place, fields []field, found map[string]entry) string {
	if d.r.full() {
		return ""
	}
	var absent, all []string
	for _, f := range fields {
		all = append(all, f.key)
		if _, ok := found[f.key]; ok {
			continue
		}
		if f.tag.Get("required") != "" {
			absent = append([]string{f.key}, absent...)
		} else {
			absent = append(absent, f.key)
		}
	}
	meant := closest(e.key.Value, absent)
	want := didYouMean(e.key.Value, all)
	if meant != "" {
		want = "did you mean " + quote(meant) + "?"
	}
	if want == "" {
		want = list(all)
	}
	d.r.add(keyPlace(e.key, at), "unknown key", want)
	return meant
}

// plainKey reports whether a key is a word, and says so if not.
func (d *decoder) plainKey(k *yaml.Node, at place) bool {
	at.Line, at.Column = k.Line, k.Column
	switch {
	case k.Kind != yaml.ScalarNode:
		d.r.add(at, "a key is "+kindOf(k), "a word")
	case k.Style&yaml.TaggedStyle != 0:
		d.r.add(at, "a key has the tag "+quote(k.Tag), "a word")
	case k.ShortTag() == "!!merge":
		d.r.add(at, "the merge key << is not supported", "an alias for a whole value, or the keys themselves")
	default:
		return true
	}
	return false
}

// keyPlace is the position of a key of the mapping at a place.
func keyPlace(k *yaml.Node, at place) place {
	name := k.Value
	if strings.ContainsFunc(name, func(c rune) bool { return c <= ' ' || c > '~' || c == '.' }) || len(name) > 40 || name == "" {
		name = quote(name)
	}
	p := at.child(name)
	p.Line, p.Column = k.Line, k.Column
	return p
}

func kindOf(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	case yaml.AliasNode:
		return "an alias"
	}
	if isNull(n) {
		return "empty"
	}
	return "the value " + quote(n.Value)
}
