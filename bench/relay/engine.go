package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/bench/measure"
	"nlb/proxyproto/relay"
)

// engineVariable is in the environment of a process that is nlb's relay alone.
// It has the VIP, the target and the source address.
const engineVariable = "NLB_BENCH_RELAY_ENGINE"

// maybeEngine becomes the relay if this process was started to be it.
func maybeEngine() {
	addresses, ok := os.LookupEnv(engineVariable)
	if !ok {
		return
	}
	err := runEngine(strings.Fields(addresses))
	fmt.Fprintln(os.Stderr, "relay:", err) // it is killed when it is not needed any more
	os.Exit(1)
}

func runEngine(words []string) error {
	var a [3]netip.Addr
	if len(words) != len(a) {
		return fmt.Errorf("%q are not three addresses", words)
	}
	for i := range a {
		var err error
		if a[i], err = netip.ParseAddr(words[i]); err != nil {
			return err
		}
	}
	r, err := relay.New(relay.Options{Log: zap.NewNop()})
	if err != nil {
		return err
	}
	failed := make(chan error, 1)
	go func() { failed <- r.Run(context.Background()) }()
	if err := configure(r, a[0], a[1], a[2]); err != nil {
		return err
	}
	return <-failed
}

// configure has the relay serve the VIP.
func configure(r *relay.Relay, vip, target, source netip.Addr) error {
	at := netip.AddrPortFrom(vip, measure.Port)
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // as nlb's listeners
	l, err := lc.Listen(context.Background(), "tcp", at.String())
	if err != nil {
		return err
	}
	defer l.Close() // the relay has a copy
	file, err := l.(*net.TCPListener).File()
	if err != nil {
		return err
	}
	return r.Configure(&balancer.Table{
		Sources: []netip.Addr{source},
		Services: []balancer.VirtualService{{
			Name: "bench", Address: vip, Protocols: []uint8{unix.IPPROTO_TCP}, Port: measure.Port, IdleTimeout: 350 * time.Second,
			Allow: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}, Pools: []balancer.WeightedPool{{Pool: "bench", Weight: 1}},
		}},
		Pools: []balancer.Pool{{
			Name: "bench", Protocols: []uint8{unix.IPPROTO_TCP}, ClientIP: balancer.ProxyProtocolV2,
			Destinations: []balancer.Destination{{Address: target, Port: measure.Port, Weight: 1}},
		}},
	}, map[netip.AddrPort]*os.File{at: file})
}
