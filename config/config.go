// Package config turns the text of a configuration file into typed values.
//
// The file is strict: unknown keys, duplicate keys, a second document and
// numbers with leading zeros are errors. All independent errors are found in one
// run, each with its file, line, column and field path, what is wrong and what
// would be right. The result is never modified; a reload makes another.
//
// raw.go is the one place that lists keys, defaults, ranges and descriptions.
// The decoder, the JSON Schema and the tests of reference.yml all read it by
// reflection, so they cannot disagree.
package config

import (
	_ "embed"
	"fmt"
	"io"
	"os"

	"github.com/spf13/pflag"

	"nlb/balancer"
)

// DefaultFile is what Load reads when neither its argument, the flag --config
// nor NLB_CONFIG names a file.
const DefaultFile = "/etc/nlb/nlb.yaml"

// maxFile bounds what is read and parsed, in bytes. A group of 1,000 targets
// takes about 60 KiB; the limit is there so that a wrong path (a device, a log)
// ends in an error and not in an exhausted host.
const maxFile = 16 << 20

// A Config is one configuration file, complete and valid.
type Config struct {
	Settings
	// File is the path the text came from, as the operator named it.
	File string
	// Spec keeps the order of the file.
	Spec *balancer.Spec
}

// Settings are the choices of the process, as opposed to the resources. Flags
// and the environment override them; see Load.
type Settings struct {
	Dataplane string // nftables, ipvs or auto
	StateDir  string // an absolute path
	Log       LogSettings
	Metrics   MetricsSettings
}

// LogSettings say what is logged and how.
type LogSettings struct {
	Level  string // debug, info, warn or error
	Format string // console or json
}

// MetricsSettings say where metrics are served.
type MetricsSettings struct {
	Address string // host:port; empty when metrics are off
}

//go:embed reference.yml
var reference []byte

// Reference returns the reference file: every key with its default and a
// comment. It is itself a valid configuration.
func Reference() []byte { return append([]byte(nil), reference...) }

// Load reads the file at path and lays the process settings of flags and of the
// environment over it. flags may be nil, and needs to hold only the flags that
// the command has. Precedence is flag, environment, file, default:
//
//	dataplane        --dataplane        NLB_DATAPLANE
//	state_dir        --state-dir        NLB_STATE_DIR
//	log.level        --log-level        NLB_LOG_LEVEL
//	log.format       --log-format       NLB_LOG_FORMAT
//	metrics.address  --metrics-address  NLB_METRICS_ADDRESS
//
// A variable that is set but empty counts, so that NLB_METRICS_ADDRESS= turns
// metrics off. An empty path stands for --config, NLB_CONFIG or DefaultFile, in
// that order. Certificates that the text names are read too. What the text has
// wrong, or a file that it names, comes back as Problems; other errors say that
// the file itself could not be read.
func Load(path string, flags *pflag.FlagSet) (*Config, error) {
	over, err := newOverlay(flags)
	if err != nil {
		return nil, fmt.Errorf("bind settings: %w", err)
	}
	if path == "" {
		path = over.file()
	}
	data, err := read(path)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	return parse(path, data, over)
}

// Parse checks data, the text of the file called name, and returns what it says.
// It looks at nothing but its arguments: the files that the text names are not
// read, and TrustedRoots stays empty. An error is always of type Problems.
func Parse(name string, data []byte) (*Config, error) {
	return parse(name, data, nil)
}

// parse lays over over the text, and reads the files that the text names, unless
// over is nil.
func parse(name string, data []byte, over *overlay) (*Config, error) {
	r := newReport(name, data)
	root := document(data, r)
	if root == nil {
		return nil, r.err()
	}
	var file rawFile
	newDecoder(r).root(root, &file)
	if over != nil {
		if err := over.apply(&file, r); err != nil {
			return nil, err
		}
	}
	file.check(r)
	if over != nil {
		file.readRoots(r)
	}
	if err := r.err(); err != nil {
		return nil, err
	}
	return &Config{Settings: file.settings(), File: name, Spec: file.spec()}, nil
}

// read returns at most one byte more than Parse accepts, whatever path is.
func read(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxFile+1))
}
