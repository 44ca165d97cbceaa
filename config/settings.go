package config

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"

	"github.com/spf13/pflag"
	"github.com/spf13/viper"
)

const envPrefix = "NLB"

// fileKey names the file itself: --config or NLB_CONFIG. It is no key of the file.
const fileKey = "config"

// A setting is a value that flags and the environment may override.
type setting struct {
	key   string // its path in the file
	value *string
	leaf  leaf
	tag   reflect.StructTag
	// written says that the file has it.
	written bool
}

func (s setting) flag() string { return strings.NewReplacer(".", "-", "_", "-").Replace(s.key) }

func (s setting) env() string {
	return envPrefix + "_" + strings.ToUpper(strings.ReplaceAll(s.key, ".", "_"))
}

// settingsOf lists the process settings of f.
func (f *rawFile) settingsOf() []setting {
	return []setting{
		settingOf("dataplane", &f.Dataplane, tagOf(f, "dataplane")),
		settingOf("state_dir", &f.StateDir, tagOf(f, "state_dir")),
		settingOf("log.level", &f.Log.Level, tagOf(f.Log, "level")),
		settingOf("log.format", &f.Log.Format, tagOf(f.Log, "format")),
		settingOf("metrics.address", &f.Metrics.Address, tagOf(f.Metrics, "address")),
	}
}

func settingOf[F format[string]](key string, v *value[string, F], tag reflect.StructTag) setting {
	return setting{key: key, value: &v.V, leaf: v, tag: tag, written: v.Written && v.OK}
}

// tagOf returns the tags of a key of a raw struct.
func tagOf(raw any, key string) reflect.StructTag {
	t := reflect.TypeOf(raw)
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	for _, f := range fieldsOf(t) {
		if f.key == key {
			return f.tag
		}
	}
	panic("config: " + t.Name() + " has no key " + key)
}

func (f *rawFile) settings() Settings {
	return Settings{
		Dataplane: f.Dataplane.V,
		StateDir:  f.StateDir.V,
		Log:       LogSettings{Level: f.Log.Level.V, Format: f.Log.Format.V},
		Metrics:   MetricsSettings{Address: f.Metrics.Address.V},
	}
}

// An overlay is what flags and the environment say, by the rules of viper:
// flag, environment, file, default.
type overlay struct {
	viper *viper.Viper
	flags *pflag.FlagSet // may be nil
}

func newOverlay(flags *pflag.FlagSet) (*overlay, error) {
	v := viper.New()
	v.SetEnvPrefix(envPrefix)
	v.SetEnvKeyReplacer(strings.NewReplacer(".", "_"))
	v.AllowEmptyEnv(true)
	v.SetDefault(fileKey, DefaultFile)
	o := &overlay{v, flags}
	if err := o.bind(setting{key: fileKey}); err != nil {
		return nil, err
	}
	for _, s := range new(rawFile).settingsOf() {
		v.SetDefault(s.key, s.tag.Get("default"))
		if err := o.bind(s); err != nil {
			return nil, err
		}
	}
	return o, nil
}

func (o *overlay) bind(s setting) error {
	if err := o.viper.BindEnv(s.key); err != nil {
		return err
	}
	if o.flags == nil || o.flags.Lookup(s.flag()) == nil {
		return nil
	}
	return o.viper.BindPFlag(s.key, o.flags.Lookup(s.flag()))
}

// file is the path of the file when the caller named none.
func (o *overlay) file() string { return o.viper.GetString(fileKey) }

// apply lays the overlay over what the file says.
func (o *overlay) apply(f *rawFile, r *report) error {
	settings := f.settingsOf()
	written := make(map[string]any)
	for _, s := range settings {
		if s.written {
			nest(written, strings.Split(s.key, "."), *s.value)
		}
	}
	if err := o.viper.MergeConfigMap(written); err != nil {
		return fmt.Errorf("merge settings: %w", err)
	}
	for _, s := range settings {
		origin, fromFlag := o.origin(s)
		if origin == "" {
			continue
		}
		text := o.viper.GetString(s.key)
		if fromFlag && s.key == "state_dir" && text != "" {
			// A flag is typed by somebody who stands in a folder.
			abs, err := filepath.Abs(text)
			if err != nil {
				return fmt.Errorf("%s %s: %w", origin, text, err)
			}
			text = abs
		}
		s.leaf.override(r, text, place{File: origin, Path: s.key}, s.tag)
	}
	return nil
}

// origin names the flag or variable that decides a setting, or "" for the file.
func (o *overlay) origin(s setting) (name string, fromFlag bool) {
	if o.flags != nil && o.flags.Changed(s.flag()) {
		return "--" + s.flag(), true
	}
	if _, ok := os.LookupEnv(s.env()); ok {
		return s.env(), false
	}
	return "", false
}

// nest stores v in m under a path of keys.
func nest(m map[string]any, path []string, v any) {
	for _, key := range path[:len(path)-1] {
		inner, ok := m[key].(map[string]any)
		if !ok {
			inner = make(map[string]any)
			m[key] = inner
		}
		m = inner
	}
	m[path[len(path)-1]] = v
}
