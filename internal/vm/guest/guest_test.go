// Package guest asks a guest of vmrun whether it is what was promised. Outside
// of one there is nothing to ask: make test-vm runs it in both kernels.
package guest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"nlb/internal/nstest"
	"nlb/internal/vm"
)

func TestMain(m *testing.M) {
	if os.Getenv(vm.EnvKernel) == "" {
		fmt.Println("these tests are for a guest: make test-vm")
		return
	}
	os.Exit(nstest.Main(m))
}

func command(t *testing.T, stdin, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func TestKernel(t *testing.T) {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		t.Fatal(err)
	}
	release, series := unix.ByteSliceToString(uts.Release[:]), os.Getenv(vm.EnvKernel)
	if !strings.HasPrefix(release, series+".") {
		t.Errorf("the kernel is %s, and %s was asked for", release, series)
	}
}

func TestFamilies(t *testing.T) {
	for _, name := range []string{"IPVS"} {
		if _, err := netlink.GenlFamilyGet(name); err != nil {
			t.Errorf("generic netlink family %s: %v", name, err)
		}
	}
}

func TestVirtualServices(t *testing.T) {
	for _, scheduler := range []string{"rr", "wrr", "lc", "wlc", "sh", "mh"} {
		want := `-A -t 198.51.100.10:80 -s ` + scheduler + `
-a -t 198.51.100.10:80 -r 10.0.1.11:8080 -m -w 1
-A -t [2001:db8:77::10]:80 -s ` + scheduler + `
-a -t [2001:db8:77::10]:80 -r [2001:db8:1::11]:8080 -m -w 1
`
		command(t, want, "ipvsadm", "-R")
		if got := command(t, "", "ipvsadm", "-S", "-n"); !sameLines(want, got) {
			t.Errorf("installed:\n%sinstead of\n%s", got, want)
		}
		command(t, "", "ipvsadm", "-C")
	}
}

// sameLines ignores their order, which is the kernel's.
func sameLines(a, b string) bool {
	return slices.Equal(slices.Sorted(strings.Lines(a)), slices.Sorted(strings.Lines(b)))
}

func TestLinks(t *testing.T) {
	for _, link := range []netlink.Link{
		&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: "d0"}},
		&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "b0"}},
		&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "v0"}, PeerName: "v1"},
		&netlink.Vlan{LinkAttrs: netlink.LinkAttrs{Name: "vlan7", ParentIndex: 1}, VlanId: 7},
	} {
		if _, vlan := link.(*netlink.Vlan); vlan {
			parent, err := netlink.LinkByName("d0")
			if err != nil {
				t.Fatal(err)
			}
			link.Attrs().ParentIndex = parent.Attrs().Index
		}
		if err := netlink.LinkAdd(link); err != nil {
			t.Errorf("%s: %v", link.Type(), err)
		}
	}
	command(t, "", "tc", "qdisc", "add", "dev", "d0", "root", "netem", "delay", "10ms")
	if _, err := os.Stat("/proc/sys/net/bridge/bridge-nf-call-iptables"); err != nil {
		t.Errorf("br_netfilter: %v", err)
	}
	for _, name := range []string{"vlan7", "v0", "b0", "d0"} {
		command(t, "", "ip", "link", "del", name)
	}
}

func TestRuleset(t *testing.T) {
	command(t, `table inet t {
	ct timeout idle {
		protocol tcp
		l3proto ip
		policy = { established : 350 }
	}
	flowtable ft {
		hook ingress priority 0
		devices = { lo }
		counter
	}
	chain in {
		type nat hook prerouting priority -100
		meta l4proto tcp dnat ip to jhash ip saddr mod 2 map { 0 : 10.0.1.11, 1 : 10.0.1.12 }
	}
	chain out {
		type nat hook postrouting priority 100
		meta l4proto udp masquerade
	}
	chain through {
		type filter hook forward priority 0
		ct state established flow add @ft
		ct timeout set "idle"
		reject
	}
}`, "nft", "-f", "-")
	if rules := command(t, "", "nft", "list", "table", "inet", "t"); !strings.Contains(rules, "flow add @ft") || !strings.Contains(rules, "tcp") {
		t.Errorf("unexpected rules, or no names of protocols:\n%s", rules)
	}
	command(t, "", "nft", "delete", "table", "inet", "t")
}

func TestSystem(t *testing.T) {
	if got := command(t, "", "sh", "-c", "readlink /proc/$$/exe"); got != "/usr/bin/dash\n" {
		t.Errorf("the shell is %s", got)
	}
	if target, err := os.Readlink("/usr/bin/ip"); err == nil {
		t.Errorf("ip is %s", target)
	}
	self, err := os.Stat("guest_test.go")
	if err != nil {
		t.Fatalf("the package's own files: %v", err)
	}
	if self.Size() == 0 {
		t.Error("guest_test.go is empty")
	}
	if year := time.Now().Year(); year < 2024 {
		t.Errorf("the clock says %d", year)
	}
	if loaded, err := filepath.Glob("/sys/module/ip_vs*"); err != nil || len(loaded) < 7 {
		t.Errorf("modules loaded: %q (%v)", loaded, err)
	}
	// nstest makes its namespaces below the guest's own, where lo is up too.
	if state := command(t, "", "ip", "-br", "link", "show", "lo"); !strings.Contains(state, "LOOPBACK,UP") {
		t.Errorf("lo: %s", state)
	}
}
