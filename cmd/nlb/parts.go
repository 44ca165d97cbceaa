package main

import (
	"errors"

	"go.uber.org/zap"

	"nlb/balancer"
	"nlb/balancer/conntrack"
	"nlb/balancer/host"
	"nlb/balancer/nft"
	"nlb/balancer/prompt"
	"nlb/balancer/vip"
)

// A kernel is what of the kernel we keep, and how we ask about the rest.
type kernel struct {
	parts  []balancer.Part
	router balancer.Router
	tally  tally
	flows  flowTable
	close  func() error
}

// openKernel lists the Parts in the order in which they must change: a VIP
// leaves its interface while the rules still guard it, forwarding is turned on
// behind those rules, and a VIP is announced when all that serves it is there.
func openKernel(stateDir string, log *zap.Logger) (*kernel, error) {
	dataplane, err := nft.New(log.Named("nft"), stateDir)
	if err != nil {
		return nil, err
	}
	flows, err := conntrack.New(conntrack.Options{Log: log.Named("conntrack"), Mask: nft.TargetMask})
	if err != nil {
		return nil, errors.Join(err, dataplane.Close())
	}
	prompter, err := prompt.New()
	if err != nil {
		return nil, errors.Join(err, dataplane.Close())
	}
	return &kernel{
		parts: []balancer.Part{
			vip.NewWithdrawer(log.Named("vip")),
			dataplane,
			host.NewSysctls(stateDir, log.Named("host")),
			vip.NewAnnouncer(log.Named("vip")),
		},
		router: host.NewRouter(),
		tally:  tally{dataplane, flows},
		flows:  flowTable{dataplane, flows, prompter},
		close:  func() error { return errors.Join(prompter.Close(), dataplane.Close()) },
	}, nil
}
