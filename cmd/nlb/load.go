package main

import (
	"errors"
	"fmt"

	"github.com/spf13/pflag"

	"nlb/balancer"
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
	errs := balancer.Unsupported(cfg.Spec)
	switch cfg.Dataplane {
	case dataplaneNFTables, dataplaneAuto:
	default:
		errs = append(errs, fmt.Errorf("dataplane %s is %w; use %s or %s",
			cfg.Dataplane, balancer.ErrUnsupported, dataplaneNFTables, dataplaneAuto))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return cfg, nil
}
