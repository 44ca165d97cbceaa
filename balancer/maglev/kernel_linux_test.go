package maglev

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// The kernel is asked where it would send a flow: a dynamic set collects each
// packet's source port and slot. The set's key order is as nft prints it.
const kernelRules = `
table inet maglev {
	set seen { type inet_proto . inet_service . mark; flags dynamic; size 65535; }
	chain output {
		type filter hook output priority 0;
		ip daddr 127.0.0.1 udp dport 4000 meta mark set jhash ip saddr . udp sport . ip daddr . udp dport mod 1021 seed 0x5eed0001 add @seen { ip protocol . udp sport . meta mark }
		ip daddr 127.0.0.1 udp dport 4001 meta mark set jhash ip saddr . udp sport mod 4096 seed 0xfedcba98 add @seen { ip protocol . udp sport . meta mark }
		ip6 daddr ::1 udp dport 4002 meta mark set jhash ip6 saddr . udp sport . ip6 daddr . udp dport mod 32768 seed 0x1 add @seen { ip6 nexthdr . udp sport . meta mark }
	}
}
`

func TestKernelAgrees(t *testing.T) {
	field := func(a netip.Addr) []byte { return a.AsSlice() }
	port := func(p uint16) []byte { return binary.BigEndian.AppendUint16(nil, p) }
	key := func(fields ...[]byte) (k []byte) {
		for _, f := range fields {
			k = append(k, f...)
			for len(k)%4 != 0 {
				k = append(k, 0)
			}
		}
		return k
	}
	tests := []struct {
		to   string
		size int
		seed uint32
		key  func(from, to netip.AddrPort) []byte
	}{
		{"127.0.0.1:4000", 1021, 0x5eed0001, func(from, to netip.AddrPort) []byte {
			return key(field(from.Addr()), port(from.Port()), field(to.Addr()), port(to.Port()))
		}},
		{"127.0.0.1:4001", 4096, 0xfedcba98, func(from, _ netip.AddrPort) []byte {
			return key(field(from.Addr()), port(from.Port()))
		}},
		{"[::1]:4002", 32768, 1, func(from, to netip.AddrPort) []byte {
			return key(field(from.Addr()), port(from.Port()), field(to.Addr()), port(to.Port()))
		}},
	}
	want := map[string]bool{}
	got, err := inNewNamespace(func() (map[string]bool, error) {
		if err := run("ip link set lo up", ""); err != nil {
			return nil, err
		}
		if err := run("nft -f -", kernelRules); err != nil {
			return nil, err
		}
		for i, tt := range tests {
			to := netip.MustParseAddrPort(tt.to)
			for n := range 300 {
				from := netip.AddrPortFrom(to.Addr(), uint16(20000+1000*i+n))
				conn, err := net.DialUDP("udp", net.UDPAddrFromAddrPort(from), net.UDPAddrFromAddrPort(to))
				if err != nil {
					return nil, err
				}
				_, err = conn.Write([]byte("x"))
				conn.Close()
				if err != nil {
					return nil, err
				}
				want[fmt.Sprintf("%d %d", from.Port(), Slot(JHash(tt.key(from, to), tt.seed), tt.size))] = true
			}
		}
		return seenByKernel()
	})
	if err != nil {
		t.Fatal(err)
	}
	for flow := range want {
		if !got[flow] {
			t.Errorf("the kernel did not map port and slot %s", flow)
		}
	}
	if len(got) != len(want) {
		t.Errorf("the kernel saw %d flows, want %d", len(got), len(want))
	}
}

// inNewNamespace runs f in a network namespace that ends with the call: the
// thread that holds it is never unlocked and so ends with its goroutine.
func inNewNamespace[T any](f func() (T, error)) (result T, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if err = unix.Unshare(unix.CLONE_NEWNET); err == nil {
			result, err = f()
		}
	}()
	<-done
	return result, err
}

func run(command, stdin string) error {
	args := strings.Fields(command)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin = strings.NewReader(stdin)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", command, err, out)
	}
	return nil
}

// seenByKernel reads the set back as "port slot".
func seenByKernel() (map[string]bool, error) {
	out, err := exec.Command("nft", "-j", "list", "set", "inet", "maglev", "seen").Output()
	if err != nil {
		return nil, fmt.Errorf("nft list set: %w", err)
	}
	var listing struct {
		Nftables []struct {
			Set struct {
				Elem []struct {
					Concat []any `json:"concat"`
				} `json:"elem"`
			} `json:"set"`
		} `json:"nftables"`
	}
	if err := json.Unmarshal(out, &listing); err != nil {
		return nil, fmt.Errorf("nft list set: %w", err)
	}
	seen := map[string]bool{}
	for _, object := range listing.Nftables {
		for _, e := range object.Set.Elem {
			if len(e.Concat) == 3 {
				seen[fmt.Sprintf("%v %v", e.Concat[1], e.Concat[2])] = true
			}
		}
	}
	return seen, nil
}
