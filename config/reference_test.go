package config

import (
	"encoding/json"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
)

// A key is one key of the contract: its path without indexes, and its tags.
type key struct {
	path string
	leaf bool
	tag  reflect.StructTag
}

// keysOf lists the keys of a raw struct and of those in it.
func keysOf(t reflect.Type, path string) []key {
	var keys []key
	for _, f := range fieldsOf(t) {
		here := strings.TrimPrefix(path+"."+f.key, ".")
		inner := t.Field(f.index).Type
		s, isStruct := structIn(inner)
		keys = append(keys, key{here, !isStruct && inner.Kind() != reflect.Slice, f.tag})
		if isStruct {
			keys = append(keys, keysOf(s, here)...)
		}
	}
	return keys
}

// written lists the keys of a node, by path without indexes. The comment of a
// key is the one on its line.
func written(n *yaml.Node, path string, visit func(path string, k, v *yaml.Node)) {
	switch n.Kind {
	case yaml.DocumentNode, yaml.SequenceNode:
		for _, c := range n.Content {
			written(c, path, visit)
		}
	case yaml.MappingNode:
		for i := 0; i < len(n.Content); i += 2 {
			here := strings.TrimPrefix(path+"."+n.Content[i].Value, ".")
			visit(here, n.Content[i], n.Content[i+1])
			written(n.Content[i+1], here, visit)
		}
	}
}

func referenceNode(t *testing.T) *yaml.Node {
	t.Helper()
	var doc yaml.Node
	if err := yaml.Unmarshal(Reference(), &doc); err != nil {
		t.Fatal(err)
	}
	return &doc
}

func TestReferenceParses(t *testing.T) {
	if _, err := Parse("reference.yml", Reference()); err != nil {
		t.Error(err)
	}
}

func TestReferenceHasEveryKey(t *testing.T) {
	found := make(map[string]bool)
	written(referenceNode(t), "", func(path string, _, _ *yaml.Node) { found[path] = true })
	for _, k := range keysOf(reflect.TypeFor[rawFile](), "") {
		if !found[k.path] {
			t.Errorf("reference.yml lacks %s", k.path)
		}
	}
}

var defaultComment = regexp.MustCompile(`# Default: (\S+?)\.?(\s|$)`)

// TestReferenceDefaults compares three things for each leaf: the value in the
// reference file, the comment beside it, and the default of the decoder.
func TestReferenceDefaults(t *testing.T) {
	tags := make(map[string]key)
	for _, k := range keysOf(reflect.TypeFor[rawFile](), "") {
		tags[k.path] = k
	}
	lines := strings.Split(string(Reference()), "\n")
	written(referenceNode(t), "", func(path string, k, v *yaml.Node) {
		line := lines[k.Line-1]
		if !strings.Contains(line, "#") && !strings.HasPrefix(strings.TrimSpace(lines[k.Line]), "-") && tags[path].leaf {
			t.Errorf("%s has no comment", path)
		}
		want, hasDefault := tags[path].tag.Lookup("default")
		m := defaultComment.FindStringSubmatch(line)
		switch {
		case !tags[path].leaf:
		case hasDefault != (m != nil):
			t.Errorf("line %d: %s: has a default: %v; its comment says so: %v", k.Line, path, hasDefault, m != nil)
		case hasDefault && (v.Value != want || strings.Trim(m[1], `"`) != want):
			t.Errorf("line %d: %s: value %q, comment %q, default %q", k.Line, path, v.Value, m[1], want)
		}
		if required := tags[path].tag.Get("required") != ""; required != strings.Contains(line, "# Required.") {
			t.Errorf("line %d: %s: required: %v, and the comment says otherwise", k.Line, path, required)
		}
	})
}

// TestReferenceIsAllDefaults drops every line that says it is the default: the
// result is the same.
func TestReferenceIsAllDefaults(t *testing.T) {
	full, err := Parse("reference.yml", Reference())
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for line := range strings.Lines(string(Reference())) {
		if !defaultComment.MatchString(line) {
			lines = append(lines, line)
		}
	}
	short, err := Parse("reference.yml", []byte(strings.Join(lines, "")))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(full, short, addresses); diff != "" {
		t.Errorf("(-written +left out):\n%s", diff)
	}
}

// TestTags finds slips in the tags of the raw structs.
func TestTags(t *testing.T) {
	known := []string{"yaml", "required", "default", "range", "step", "enum", "least", "meaning", "optional", "doc"}
	name := regexp.MustCompile(`([a-z]+):"`)
	for _, k := range keysOf(reflect.TypeFor[rawFile](), "") {
		if k.tag.Get("doc") == "" {
			t.Errorf("%s has no description", k.path)
		}
		if _, ok := k.tag.Lookup("default"); ok && k.tag.Get("required") != "" {
			t.Errorf("%s is required and has a default", k.path)
		}
		for _, m := range name.FindAllStringSubmatch(string(k.tag), -1) {
			if _, ok := k.tag.Lookup(m[1]); ok && !slices.Contains(known, m[1]) {
				t.Errorf("%s has the unknown tag %s", k.path, m[1])
			}
		}
	}
}

// ---- the schema ----

func schema(t *testing.T) map[string]any {
	t.Helper()
	text, err := Schema()
	if err != nil {
		t.Fatal(err)
	}
	var s map[string]any
	if err := json.Unmarshal(text, &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// follow resolves a reference into $defs.
func follow(root, node map[string]any) map[string]any {
	ref, ok := node["$ref"].(string)
	if !ok {
		return node
	}
	return root["$defs"].(map[string]any)[strings.TrimPrefix(ref, "#/$defs/")].(map[string]any)
}

func TestSchemaHasEveryKey(t *testing.T) {
	root := schema(t)
	if got := root["$schema"]; got != "https://json-schema.org/draft/2020-12/schema" {
		t.Errorf("$schema is %v", got)
	}
	written(referenceNode(t), "", func(path string, _, _ *yaml.Node) {
		node := root
		for part := range strings.SplitSeq(path, ".") {
			node = follow(root, node)
			if items, ok := node["items"].(map[string]any); ok {
				node = follow(root, items)
			}
			if node["additionalProperties"] != false {
				t.Errorf("%s: additionalProperties is not false", path)
			}
			next, ok := node["properties"].(map[string]any)[part].(map[string]any)
			if !ok {
				t.Fatalf("the schema lacks %s", path)
			}
			node = next
		}
		if node["description"] == "" || node["description"] == nil {
			t.Errorf("the schema does not describe %s", path)
		}
	})
}

// validate checks a value against the part of JSON Schema that ours uses; any
// other keyword is an error, so that it cannot be passed over.
func validate(root, node map[string]any, v any, path string) error {
	node = follow(root, node)
	for keyword, want := range node {
		if err := validateKeyword(root, node, keyword, want, v, path); err != nil {
			return err
		}
	}
	return nil
}

func validateKeyword(root, node map[string]any, keyword string, want, v any, path string) error {
	fail := func(format string, args ...any) error {
		return fmt.Errorf("%s: %s: "+format, append([]any{path, keyword}, args...)...)
	}
	text, isText := v.(string)
	number, isNumber := v.(int)
	items, _ := v.([]any)
	object, _ := v.(map[string]any)
	switch keyword {
	case "description", "default", "title", "$schema", "$defs", "properties", "$ref":
	case "type":
		_, isBool := v.(bool)
		if got := map[string]bool{"string": isText, "integer": isNumber, "boolean": isBool, "array": items != nil, "object": object != nil}; !got[want.(string)] {
			return fail("%v is not %v", v, want)
		}
	case "enum":
		if !slices.Contains(want.([]any), v) {
			return fail("%v", v)
		}
	case "pattern":
		if !regexp.MustCompile(want.(string)).MatchString(text) {
			return fail("%q", text)
		}
	case "minimum", "maximum":
		if limit := int(want.(float64)); keyword == "minimum" && number < limit || keyword == "maximum" && number > limit {
			return fail("%d", number)
		}
	case "minItems":
		if len(items) < int(want.(float64)) {
			return fail("%d items", len(items))
		}
	case "items":
		for i, item := range items {
			if err := validate(root, want.(map[string]any), item, fmt.Sprintf("%s[%d]", path, i)); err != nil {
				return err
			}
		}
	case "required":
		for _, k := range want.([]any) {
			if _, ok := object[k.(string)]; !ok {
				return fail("%v", k)
			}
		}
	case "additionalProperties":
		for k, inner := range object {
			property, ok := node["properties"].(map[string]any)[k].(map[string]any)
			if !ok {
				return fail("%s", k)
			}
			if err := validate(root, property, inner, path+"."+k); err != nil {
				return err
			}
		}
	case "anyOf":
		for _, choice := range want.([]any) {
			if validate(root, choice.(map[string]any), v, path) == nil {
				return nil
			}
		}
		return fail("%v", v)
	default:
		return fail("the test does not know this keyword")
	}
	return nil
}

func TestSchemaAcceptsWhatParseAccepts(t *testing.T) {
	files := fixtures(t, ".good.yml")
	delete(files, "nulls.good.yml") // an editor may well point at an empty list
	files["reference.yml"] = Reference()
	root := schema(t)
	for name, data := range files {
		var v map[string]any
		if err := yaml.Unmarshal(data, &v); err != nil {
			t.Fatal(err)
		}
		if err := validate(root, root, v, name); err != nil {
			t.Error(err)
		}
	}
}

func TestSchemaRefuses(t *testing.T) {
	root := schema(t)
	for _, name := range []string{"unknown-keys", "settings", "kinds", "missing", "numbers", "names", "enums", "allow", "forward", "health-check", "tls", "passive"} {
		file := name + ".bad.yml"
		var v any
		if err := yaml.Unmarshal(fixtures(t, file)[file], &v); err != nil {
			continue // YAML that the library itself refuses to turn into values
		}
		if err := validate(root, root, v, file); err == nil {
			t.Errorf("the schema accepts %s", file)
		}
	}
}
