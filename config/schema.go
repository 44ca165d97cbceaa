package config

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"strconv"
	"strings"

	"github.com/invopop/jsonschema"
)

// Schema returns the JSON Schema (draft 2020-12) of the file, for editors. It
// says what a value can say by itself; what holds between values is up to Parse.
func Schema() ([]byte, error) {
	reflector := jsonschema.Reflector{
		FieldNameTag:               "yaml",
		RequiredFromJSONSchemaTags: true,
		Anonymous:                  true,
		Namer:                      definitionName,
		Mapper:                     leafSchema,
	}
	schema := reflector.Reflect(&rawFile{})
	schema.Title = "nlb configuration"
	if err := describe(schema.Definitions, reflect.TypeFor[rawFile]()); err != nil {
		return nil, err
	}
	var out bytes.Buffer
	enc := json.NewEncoder(&out)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(schema); err != nil {
		return nil, fmt.Errorf("encode schema: %w", err)
	}
	return out.Bytes(), nil
}

// definitionName drops the "raw" that readers of the schema have no use for.
func definitionName(t reflect.Type) string { return strings.TrimPrefix(t.Name(), "raw") }

// leafSchema keeps the reflector out of the insides of leaves. What their tags
// say, describe adds.
func leafSchema(t reflect.Type) *jsonschema.Schema {
	if l, ok := reflect.New(t).Interface().(leaf); ok {
		return l.schema("")
	}
	return nil
}

// describe adds what the tags of the raw struct t say to its definition, and to
// those of the structs in it.
func describe(defs jsonschema.Definitions, t reflect.Type) error {
	def, ok := defs[definitionName(t)]
	if !ok {
		return fmt.Errorf("the schema lacks %s", t.Name())
	}
	for _, f := range fieldsOf(t) {
		node, ok := def.Properties.Get(f.key)
		if !ok {
			return fmt.Errorf("the schema of %s lacks %s", t.Name(), f.key)
		}
		if f.tag.Get("required") != "" {
			def.Required = append(def.Required, f.key)
		}
		inner := t.Field(f.index).Type
		if l, ok := reflect.New(inner).Interface().(leaf); ok {
			node = describeLeaf(l, f.tag)
		} else if inner.Kind() == reflect.Slice {
			describeList(node, inner.Elem(), f.tag)
		}
		node.Description = f.tag.Get("doc")
		def.Properties.Set(f.key, node)
		if s, ok := structIn(inner); ok {
			if err := describe(defs, s); err != nil {
				return err
			}
		}
	}
	return nil
}

// structIn returns the raw struct that a field or the items of a list have.
func structIn(t reflect.Type) (reflect.Type, bool) {
	if t.Kind() == reflect.Slice {
		t = t.Elem()
	}
	_, isLeaf := reflect.New(t).Interface().(leaf)
	return t, t.Kind() == reflect.Struct && !isLeaf
}

func describeLeaf(l leaf, tag reflect.StructTag) *jsonschema.Schema {
	node := l.schema(tag)
	if text, ok := tag.Lookup("default"); ok {
		node.Default = typed(node.Type, text)
	}
	return node
}

func describeList(node *jsonschema.Schema, elem reflect.Type, tag reflect.StructTag) {
	if tag.Get("least") != "" {
		one := uint64(1)
		node.MinItems = &one
	}
	if l, ok := reflect.New(elem).Interface().(leaf); ok {
		node.Items = l.schema(tag)
	}
	if text, ok := tag.Lookup("default"); ok {
		node.Default = strings.Fields(text)
	}
}

// typed turns the text of a default into a value of the schema's type.
func typed(kind, text string) any {
	switch kind {
	case "integer":
		return json.Number(text)
	case "boolean":
		b, err := strconv.ParseBool(text)
		if err == nil {
			return b
		}
	}
	return text
}
