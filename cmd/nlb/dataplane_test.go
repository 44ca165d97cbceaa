package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nlb/balancer"
)

func TestDataplaneNotes(t *testing.T) {
	listeners := []balancer.Listener{
		{Name: "web", Protocol: balancer.TCP, TCPIdleTimeout: 350 * time.Second},
		{Name: "ssh", Protocol: balancer.TCP, TCPIdleTimeout: time.Hour},
		{Name: "dns", Protocol: balancer.UDP},
	}
	nftables := &balancer.Spec{Listeners: listeners}
	ipvs := &balancer.Spec{Dataplane: balancer.IPVS, Listeners: listeners}
	const idle = "listener web: tcp_idle_timeout is 5m50s, but IPVS has one for all and remembers flows for 1h0m0s, the longest"
	for _, c := range []struct {
		name            string
		inForce, wanted *balancer.Spec
		want            []string
	}{
		{"nothing to say", nftables, nftables, nil},
		{"nothing in force", nil, nftables, nil},
		{"idle timeouts differ", nil, ipvs, []string{idle}},
		{"only UDP", nil, &balancer.Spec{Dataplane: balancer.IPVS, Listeners: listeners[2:]}, nil},
		{"to IPVS", nftables, ipvs, []string{
			"the dataplane changes from nftables to ipvs, which takes new flows; established ones stay with nftables until they end", idle,
		}},
		{"back", ipvs, nftables, []string{
			"the dataplane changes from ipvs to nftables, which takes new flows; UDP flows choose anew; established TCP flows stay with ipvs until they end",
		}},
	} {
		if diff := cmp.Diff(c.want, dataplaneNotes(c.inForce, c.wanted)); diff != "" {
			t.Errorf("%s: -want +got\n%s", c.name, diff)
		}
	}
}

func TestKeepsEstablished(t *testing.T) {
	for _, c := range []struct{ content, want string }{
		{"432000\n", ""},
		{"9600\n", ""},
		{"9599\n", "nf_conntrack_tcp_timeout_established is 9599 (set it to 9600 at least"},
		{"\n", "invalid syntax"},
	} {
		path := filepath.Join(t.TempDir(), "established")
		if err := os.WriteFile(path, []byte(c.content), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := keepsEstablished(path); (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: %v, want %q", c.content, err, c.want)
		}
	}
	if err := keepsEstablished(filepath.Join(t.TempDir(), "none")); err == nil || !strings.Contains(err.Error(), "modprobe nf_conntrack") {
		t.Errorf("a missing file: %v", err)
	}
}
