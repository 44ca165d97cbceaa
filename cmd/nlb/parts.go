package main

import (
	"errors"
	"slices"

	"go.uber.org/zap"

	"nlb/balancer"
	"nlb/balancer/conntrack"
	"nlb/balancer/host"
	"nlb/balancer/ipvs"
	"nlb/balancer/nft"
	"nlb/balancer/prompt"
	"nlb/balancer/vip"
	"nlb/config"
	"nlb/proxyproto/worker"
)

// A kernel is what of the kernel we keep, and how we ask about the rest.
type kernel struct {
	parts  []balancer.Part
	router balancer.Router
	tally  tally
	flows  flowTable
	relay  *worker.Manager
	nft    *nft.Dataplane
	ipvs   *ipvs.Dataplane
	close  func() error
}

// openKernel lists the Parts in the order in which they must change: a VIP
// leaves its interface while the rules still guard it, the relay listens before
// rules lead to it and until none does, IPVS has a service before the guard lets
// its packets pass, and sends them only where the rules know of, forwarding is
// turned on behind those rules, and a VIP is announced when all that serves it is there.
func openKernel(stateDir, socket string, settings config.LogSettings, log *zap.Logger) (*kernel, error) {
	relay, err := newRelayManager(socket, settings, log)
	if err != nil {
		return nil, err
	}
	dataplane, err := nft.New(log.Named("nft"), stateDir)
	if err != nil {
		return nil, err
	}
	flows, err := conntrack.New(conntrack.Options{
		Log: log.Named("conntrack"), Mask: nft.TargetMask, Uncounted: nft.RelayedTarget,
	})
	if err != nil {
		return nil, errors.Join(err, dataplane.Close())
	}
	prompter, err := prompt.New()
	if err != nil {
		return nil, errors.Join(err, dataplane.Close())
	}
	virtual := ipvs.New(stateDir, log.Named("ipvs"))
	return &kernel{
		parts: []balancer.Part{
			vip.NewWithdrawer(log.Named("vip")),
			relay.Opener(),
			virtual.Opener(),
			dataplane,
			virtual.Closer(),
			relay.Closer(),
			host.NewSysctls(stateDir, log.Named("host")),
			vip.NewAnnouncer(log.Named("vip")),
		},
		router: host.NewRouter(),
		tally:  tally{dataplane, flows, relay},
		relay:  relay,
		nft:    dataplane,
		ipvs:   virtual,
		flows:  flowTable{dataplane, flows, prompter},
		close: func() error {
			flows.Close()
			return errors.Join(prompter.Close(), virtual.Close(), dataplane.Close())
		},
	}, nil
}

// supports says what the kernel lacks of what a Spec needs.
func (k *kernel) supports(spec *balancer.Spec) error {
	if spec.Dataplane == balancer.IPVS {
		return errors.Join(k.ipvs.Probe(), k.protects(spec))
	}
	if spec.Flowtable {
		return errors.Join(k.nft.ProbeFastPath(), keepsEstablished(establishedKey), k.protects(spec))
	}
	return k.protects(spec)
}

// protects says what the kernel lacks to protect the listeners.
func (k *kernel) protects(spec *balancer.Spec) error {
	var errs []error
	if slices.ContainsFunc(spec.Listeners, func(l balancer.Listener) bool { return l.SYNProxy.On() }) {
		errs = append(errs, k.nft.ProbeSYNProxy())
	}
	if slices.ContainsFunc(spec.Listeners, func(l balancer.Listener) bool { return l.SourceLimit.On() }) {
		errs = append(errs, k.nft.ProbeSourceLimit())
	}
	return errors.Join(errs...)
}
