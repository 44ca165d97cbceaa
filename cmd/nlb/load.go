package main

import (
	"fmt"

	"github.com/spf13/pflag"

	"nlb/config"
)

// The dataplanes of the configuration file.
const (
	dataplaneNFTables = "nftables"
	dataplaneAuto     = "auto"
)

// load reads the configuration and refuses what is not built in.
func load(path string, flags *pflag.FlagSet) (*config.Config, error) {
	cfg, err := config.Load(path, flags)
	if err != nil {
		return nil, err
	}
	switch cfg.Dataplane {
	case dataplaneNFTables, dataplaneAuto:
		return cfg, nil
	}
	return nil, fmt.Errorf("%s: dataplane %s is not built into this version; use %s or %s",
		path, cfg.Dataplane, dataplaneNFTables, dataplaneAuto)
}
