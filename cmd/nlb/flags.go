package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"nlb/balancer/control"
)

// An output is how a command prints a state.
type output string

const (
	table    output = "table"
	jsonText output = "json"
)

// String, Set and Type make output a pflag.Value.
func (o *output) String() string { return string(*o) }
func (*output) Type() string     { return "table|json" }
func (o *output) Set(s string) error {
	switch output(s) {
	case table, jsonText:
		*o = output(s)
		return nil
	}
	return errors.New("must be table or json")
}

func addOutput(cmd *cobra.Command, o *output) {
	*o = table
	cmd.Flags().VarP(o, "output", "o", "how to print")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(
		[]cobra.Completion{string(table), string(jsonText)}, cobra.ShellCompDirectiveNoFileComp)) // fails only for an unknown flag
}

func addSocket(fs *pflag.FlagSet, socket *string) {
	fs.StringVar(socket, "socket", control.DefaultSocket, "the daemon's Unix socket")
}

// addConfig adds the flags that lay over the file, under the names that
// config.Load looks for.
func addConfig(fs *pflag.FlagSet) {
	fs.StringP("config", "c", "", "configuration file (or NLB_CONFIG)")
	fs.String("dataplane", "", "overrides dataplane of the file")
	fs.String("state-dir", "", "overrides state_dir of the file")
}

// configFile is the file that the command line or the environment names.
func configFile(fs *pflag.FlagSet) (string, error) {
	path, err := fs.GetString("config")
	if err != nil {
		return "", err
	}
	if path == "" {
		path = os.Getenv("NLB_CONFIG")
	}
	if path == "" {
		return "", usageError{errors.New("which file? Name it with -c FILE or in NLB_CONFIG")}
	}
	return path, nil
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	if err := e.Encode(v); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
}
