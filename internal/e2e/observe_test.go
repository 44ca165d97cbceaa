package e2e

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"nlb/bench/lab"
)

// serving is a daemon that has found every target healthy.
func serving(t *testing.T, top *lab.Topology, c config) *daemon {
	t.Helper()
	d := start(t, top, c.String())
	d.waitAllHealthy()
	return d
}

// allSeenAs fails the test unless all calls succeeded and the targets saw this
// one address.
func allSeenAs(t *testing.T, what string, got lab.Tally, peer netip.Addr) {
	t.Helper()
	if diff := cmp.Diff(map[string]int{peer.String(): got.OK + got.Failed}, got.ByPeer); diff != "" {
		t.Errorf("%s: peers that targets saw (-want +got):\n%s%v", what, diff, got)
	}
}

// allFail fails the test unless all calls failed for this one reason.
func allFail(t *testing.T, what string, got lab.Tally, reason string) {
	t.Helper()
	if diff := cmp.Diff(map[string]int{reason: got.OK + got.Failed}, got.ByErr); diff != "" {
		t.Errorf("%s: failures (-want +got):\n%s%v", what, diff, got)
	}
}

// counter is a counter of our table, in packets. It asks the kernel, as nft would
// read all of the table first, and take half a second for it.
func (d *daemon) counter(name string) int {
	d.t.Helper()
	var packets uint64
	err := d.node.Do(func() (err error) {
		packets, err = readCounter("nlb", name)
		return err
	})
	if err != nil {
		d.t.Fatalf("counter %s: %v", name, err)
	}
	return int(packets)
}

// readCounter reads a named counter of an inet table in the thread's namespace.
func readCounter(table, name string) (packets uint64, err error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	attributes := netlink.NewAttributeEncoder()
	attributes.ByteOrder = binary.BigEndian
	attributes.String(unix.NFTA_OBJ_TABLE, table)
	attributes.String(unix.NFTA_OBJ_NAME, name)
	attributes.Uint32(unix.NFTA_OBJ_TYPE, unix.NFT_OBJECT_COUNTER)
	encoded, err := attributes.Encode()
	if err != nil {
		return 0, err
	}
	const header = 4 // struct nfgenmsg: family, version, resource
	answers, err := conn.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETOBJ, Flags: netlink.Request},
		Data:   append([]byte{unix.NFPROTO_INET, 0, 0, 0}, encoded...),
	})
	if err != nil {
		return 0, err
	}
	if len(answers) != 1 {
		return 0, fmt.Errorf("%d answers", len(answers))
	}
	object, err := netlink.NewAttributeDecoder(answers[0].Data[header:])
	if err != nil {
		return 0, err
	}
	object.ByteOrder = binary.BigEndian
	for object.Next() {
		if object.Type() != unix.NFTA_OBJ_DATA {
			continue
		}
		object.Nested(func(counter *netlink.AttributeDecoder) error {
			for counter.Next() {
				if counter.Type() == unix.NFTA_COUNTER_PACKETS {
					packets = counter.Uint64()
				}
			}
			return nil
		})
	}
	return packets, object.Err()
}

// An entry is a flow that the balancer's conntrack knows.
type entry struct {
	protocol string
	timeout  int    // seconds
	state    string // of TCP
	mark     uint32
	from, to netip.AddrPort // as the client sent
	text     string
}

// entries are the flows to an address and port, usually a VIP's.
func (d *daemon) entries(to netip.AddrPort) []entry {
	d.t.Helper()
	return d.tracked(func(e entry) bool { return e.to == to })
}

// tracked are the flows of both families that are to be kept.
func (d *daemon) tracked(keep func(entry) bool) (found []entry) {
	d.t.Helper()
	for _, f := range families {
		for line := range strings.Lines(must(d.t, d.node, "conntrack", "-L", "-f", f.version())) {
			e, err := parseEntry(line)
			if err != nil {
				d.t.Fatalf("conntrack: %v: %q", err, line)
			}
			if keep(e) {
				found = append(found, e)
			}
		}
	}
	return found
}

// forget removes the flows to a port from conntrack.
func (d *daemon) forget(protocol string, port uint16) {
	d.t.Helper()
	for _, f := range families {
		// It fails when there is nothing to remove.
		_, _ = d.tool("conntrack", "-D", "-f", f.version(), "-p", protocol, "--orig-port-dst", fmt.Sprint(port))
	}
}

// parseEntry reads a line of conntrack -L, such as
//
//	tcp      6 59 ESTABLISHED src=203.0.113.9 dst=198.51.100.10 sport=40112 dport=80 src=… mark=5 use=1
//
// The first address and port of each kind are the client's direction.
func parseEntry(line string) (entry, error) {
	words := strings.Fields(line)
	if len(words) < 4 {
		return entry{}, fmt.Errorf("%d words", len(words))
	}
	e := entry{protocol: words[0], text: strings.TrimSpace(line)}
	var err error
	if e.timeout, err = strconv.Atoi(words[2]); err != nil {
		return entry{}, err
	}
	if !strings.Contains(words[3], "=") {
		e.state = words[3]
	}
	first := map[string]string{}
	for _, w := range words {
		if key, value, ok := strings.Cut(w, "="); ok && first[key] == "" {
			first[key] = value
		}
	}
	if e.protocol != "tcp" && e.protocol != "udp" {
		return e, nil
	}
	if e.from, err = addrPort(first["src"], first["sport"]); err != nil {
		return entry{}, err
	}
	if e.to, err = addrPort(first["dst"], first["dport"]); err != nil {
		return entry{}, err
	}
	mark, err := strconv.ParseUint(first["mark"], 10, 32)
	e.mark = uint32(mark)
	return e, err
}

func addrPort(addr, port string) (netip.AddrPort, error) {
	a, err := netip.ParseAddr(addr)
	if err != nil {
		return netip.AddrPort{}, err
	}
	p, err := strconv.ParseUint(port, 10, 16)
	return netip.AddrPortFrom(a, uint16(p)), err
}

// held opens TCP connections that stay open until the test ends.
func held(t *testing.T, n *lab.Node, c lab.Call) *lab.Flows {
	t.Helper()
	flows, err := n.Agent().Hold(soon(t), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = flows.Close() }) // the lab may be gone with it
	if got := lab.Count(flows.Opened); got.Failed > 0 {
		t.Fatalf("hold: %v", got)
	}
	return flows
}

// capture records what an interface of a node sees.
func capture(t *testing.T, n *lab.Node, iface string) *lab.Capture {
	t.Helper()
	c, err := n.Agent().Capture(soon(t), iface)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func packets(t *testing.T, c *lab.Capture, keep func(lab.Packet) bool) []lab.Packet {
	t.Helper()
	found, err := c.Packets(soon(t), keep)
	if err != nil {
		t.Fatal(err)
	}
	return found
}
