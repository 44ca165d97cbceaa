package main

import (
	"context"
	"errors"

	"go.uber.org/zap"

	"nlb/balancer"
	"nlb/balancer/host"
	"nlb/balancer/nft"
	"nlb/balancer/vip"
)

// A kernel is what of the kernel we keep, and how we ask about the rest.
type kernel struct {
	parts  []balancer.Part
	router balancer.Router
	close  func() error
}

// openKernel lists the Parts in the order in which they must change: a VIP
// leaves its interface while the rules still guard it, forwarding is turned on
// behind those rules, and a VIP is announced when all that serves it is there.
func openKernel(stateDir string, log *zap.Logger) (*kernel, error) {
	dataplane, err := nft.New(log.Named("nft"))
	if err != nil {
		return nil, err
	}
	return &kernel{
		parts: []balancer.Part{
			vip.NewWithdrawer(log.Named("vip")),
			dataplane,
			host.NewSysctls(stateDir, log.Named("host")),
			vip.NewAnnouncer(log.Named("vip")),
		},
		router: host.NewRouter(),
		close:  dataplane.Close,
	}, nil
}

// counters asks the Part that counts.
func (k *kernel) counters(ctx context.Context) (map[balancer.TargetKey]balancer.Counters, error) {
	for _, p := range k.parts {
		if c, ok := p.(balancer.Counter); ok {
			return c.Counters(ctx)
		}
	}
	return nil, errors.New("the dataplane does not count")
}
