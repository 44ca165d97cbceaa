package main

import (
	"github.com/spf13/pflag"

	"nlb/config"
)

// dataplaneAuto leaves the choice of the dataplane to us.
const dataplaneAuto = "auto"

// load reads the configuration, and settles what it leaves open.
func load(path string, flags *pflag.FlagSet) (*config.Config, error) {
	cfg, err := config.Load(path, flags)
	if err != nil {
		return nil, err
	}
	// nftables does all that a file can ask for, and IPVS needs it too: there is
	// no kernel that has only the other.
	if cfg.Dataplane != dataplaneAuto {
		if err := cfg.Spec.Dataplane.UnmarshalText([]byte(cfg.Dataplane)); err != nil {
			return nil, err
		}
	}
	return cfg, nil
}
