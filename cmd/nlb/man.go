package main

import (
	"bytes"
	_ "embed"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/cpuguy83/go-md2man/v2/md2man"
	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
	"go.yaml.in/yaml/v3"

	"nlb/config"
)

var (
	//go:embed man/nlb.yaml.5.md
	filePage string
	//go:embed man/nlb.8.md
	daemonPage string
)

// newMan is for whoever makes packages: users have the pages.
func newMan() *cobra.Command {
	return &cobra.Command{
		Use:    "man FOLDER",
		Short:  "Write the manual pages into a folder",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			date, err := pageDate()
			if err != nil {
				return err
			}
			preformat(cmd.Root())
			header := &doc.GenManHeader{Section: "1", Source: "nlb " + version(), Manual: "nlb", Date: &date}
			if err := doc.GenManTree(cmd.Root(), header, args[0]); err != nil {
				return fmt.Errorf("write the pages of commands: %w", err)
			}
			keys, err := describeKeys()
			if err != nil {
				return err
			}
			file := strings.NewReplacer("@KEYS@", keys, "@REFERENCE@", indent(string(config.Reference()))).Replace(filePage)
			if err := writePage(args[0], "nlb.yaml", "5", date, file); err != nil {
				return err
			}
			return writePage(args[0], "nlb", "8", date, daemonPage)
		},
	}
}

// pageDate is the date of the pages. One that the build asks for makes them the
// same each time (https://reproducible-builds.org/specs/source-date-epoch/).
func pageDate() (time.Time, error) {
	epoch := os.Getenv("SOURCE_DATE_EPOCH")
	if epoch == "" {
		return time.Now(), nil
	}
	seconds, err := strconv.ParseInt(epoch, 10, 64)
	if err != nil {
		return time.Time{}, fmt.Errorf("SOURCE_DATE_EPOCH: %w", err)
	}
	return time.Unix(seconds, 0).UTC(), nil
}

// preformat makes Markdown keep the lines of tables and lists, which help texts
// indent by two.
func preformat(cmd *cobra.Command) {
	cmd.DisableAutoGenTag = true
	lines := strings.Split(cmd.Long, "\n")
	for i, l := range lines {
		if strings.HasPrefix(l, "  ") {
			lines[i] = "  " + l
		}
	}
	cmd.Long = strings.Join(lines, "\n")
	for _, c := range cmd.Commands() {
		preformat(c)
	}
}

// writePage turns Markdown into a manual page (man-pages(7)).
func writePage(folder, name, section string, date time.Time, markdown string) error {
	title := fmt.Sprintf("%% %q %q %q %q %q\n", strings.ToUpper(name), section, date.Format("Jan 2006"), "nlb "+version(), "nlb")
	path := filepath.Join(folder, name+"."+section)
	if err := os.WriteFile(path, md2man.Render([]byte(title+markdown)), 0o644); err != nil {
		return fmt.Errorf("write a page: %w", err)
	}
	return nil
}

func indent(text string) string {
	return "    " + strings.ReplaceAll(strings.TrimRight(text, "\n"), "\n", "\n    ")
}

// describeKeys lists the keys of the file as the JSON Schema has them, in its
// order, which a Go map would lose: JSON is YAML.
func describeKeys() (string, error) {
	text, err := config.Schema()
	if err != nil {
		return "", err
	}
	var parsed yaml.Node
	if err := yaml.Unmarshal(text, &parsed); err != nil {
		return "", fmt.Errorf("read the schema: %w", err)
	}
	s := schemaNode{parsed.Content[0]}
	k := keyList{definitions: s.at("$defs")}
	k.describe("", k.resolve(s))
	return k.out.String(), nil
}

// A keyList is Markdown about keys.
type keyList struct {
	definitions schemaNode
	out         bytes.Buffer
}

// describe lists the properties of an object and of those in it.
func (k *keyList) describe(path string, object schemaNode) {
	required := object.at("required").items()
	properties := object.at("properties")
	for i := 0; properties.Node != nil && i < len(properties.Content); i += 2 {
		name, property := properties.Content[i].Value, schemaNode{properties.Content[i+1]}
		key := strings.TrimPrefix(path+"."+name, ".")
		inner := k.resolve(property)
		if items := property.at("items"); items.Node != nil {
			key, inner = key+"[]", k.resolve(items)
		}
		fmt.Fprintf(&k.out, "**%s**%s\n: %s\n\n", escape(key), qualities(property, required[name]), escape(property.text("description")))
		k.describe(key, inner)
	}
}

// resolve follows a reference to a definition.
func (k *keyList) resolve(s schemaNode) schemaNode {
	if name, ok := strings.CutPrefix(s.text("$ref"), "#/$defs/"); ok {
		return k.definitions.at(name)
	}
	return s
}

// qualities are what may be said of a key in brackets.
func qualities(property schemaNode, required bool) string {
	var all []string
	if required {
		all = append(all, "required")
	}
	if d := property.at("default"); d.Node != nil && d.Kind == yaml.ScalarNode {
		value := d.Value
		if value == "" {
			value = `""`
		}
		all = append(all, "default "+escape(value))
	}
	if values := property.at("enum"); values.Node != nil {
		var words []string
		for _, v := range values.Content {
			words = append(words, escape(v.Value))
		}
		all = append(all, strings.Join(words, " | "))
	}
	if len(all) == 0 {
		return ""
	}
	return " (" + strings.Join(all, "; ") + ")"
}

// escape keeps Markdown from reading marks into names.
func escape(text string) string {
	return strings.NewReplacer("_", `\_`, "*", `\*`, "[", `\[`, "]", `\]`, "<", `\<`).Replace(text)
}

// A schemaNode is a value in a JSON Schema; the zero value is one that is not
// there.
type schemaNode struct{ *yaml.Node }

func (s schemaNode) at(key string) schemaNode {
	if s.Node == nil {
		return schemaNode{}
	}
	for i := 0; s.Kind == yaml.MappingNode && i < len(s.Content); i += 2 {
		if s.Content[i].Value == key {
			return schemaNode{s.Content[i+1]}
		}
	}
	return schemaNode{}
}

func (s schemaNode) text(key string) string {
	if n := s.at(key); n.Node != nil {
		return n.Value
	}
	return ""
}

func (s schemaNode) items() map[string]bool {
	all := make(map[string]bool)
	if s.Node != nil {
		for _, c := range s.Content {
			all[c.Value] = true
		}
	}
	return all
}
