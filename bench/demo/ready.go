package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"

	"go.uber.org/zap"

	"nlb/balancer/nft"
)

// ready says what the demo needs and does not find.
func ready(program string) error {
	if os.Geteuid() != 0 {
		return errors.New("needs root, because it makes network namespaces: sudo make demo")
	}
	if _, err := os.Stat("/proc/self/ns/net"); errors.Is(err, fs.ErrNotExist) {
		return errors.New("needs a kernel with network namespaces (CONFIG_NET_NS)")
	}
	dataplane, err := nft.New(zap.NewNop(), "")
	if err != nil {
		return fmt.Errorf("needs nftables in the kernel: %w", err)
	}
	if err := dataplane.Close(); err != nil {
		return err
	}
	if _, err := exec.LookPath("nft"); err != nil {
		return fmt.Errorf("needs nft(8), which reads nlb's counters: apt-get install nftables: %w", err)
	}
	if _, err := exec.LookPath(program); err != nil {
		return fmt.Errorf("needs nlb itself: make build: %w", err)
	}
	return nil
}
