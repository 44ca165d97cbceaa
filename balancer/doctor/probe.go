package doctor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/mdlayher/arp"
)

// Probe asks by ARP whether another host has one of the IPv4 VIPs, on every
// interface of f that clients or targets are on, and adds to f.Duplicates. It
// waits for answers, altogether, for wait on each interface. The question names
// no sender (RFC 5227, section 2.1.1), so that it changes nobody's tables.
func Probe(ctx context.Context, f *Facts, wait time.Duration) error {
	names := f.crossed(false)
	for _, a := range f.vipAddrs() {
		for _, l := range f.holders(a) {
			names = append(names, l.Name)
		}
	}
	slices.Sort(names)
	for _, ifname := range slices.Compact(names) {
		if l, ok := f.link(ifname); !ok || l.Loopback || !l.Up {
			continue
		}
		if err := f.ask(ctx, ifname, wait); err != nil {
			return fmt.Errorf("ask by ARP on %s: %w", ifname, err)
		}
	}
	return nil
}

func (f *Facts) ask(ctx context.Context, ifname string, wait time.Duration) error {
	ifi, err := net.InterfaceByName(ifname)
	if err != nil || len(ifi.HardwareAddr) != 6 {
		return err // without such an address the link speaks no ARP
	}
	c, err := arp.Dial(ifi)
	if err != nil {
		return err
	}
	defer c.Close()
	var asked []netip.Addr
	for _, vip := range f.vipAddrs() {
		if !vip.Is4() {
			continue
		}
		p, err := arp.NewPacket(arp.OperationRequest, ifi.HardwareAddr, netip.IPv4Unspecified(), net.HardwareAddr{0, 0, 0, 0, 0, 0}, vip)
		if err != nil {
			return err
		}
		if err := c.WriteTo(p, net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}); err != nil {
			return err
		}
		asked = append(asked, vip)
	}
	return f.listen(ctx, c, ifi, asked, wait)
}

// listen takes answers until time is up.
func (f *Facts) listen(ctx context.Context, c *arp.Client, ifi *net.Interface, asked []netip.Addr, wait time.Duration) error {
	if err := c.SetReadDeadline(time.Now().Add(wait)); err != nil {
		return err
	}
	for ctx.Err() == nil {
		p, _, err := c.Read()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		if err != nil {
			return err
		}
		d := Duplicate{VIP: p.SenderIP, Interface: ifi.Name, HardwareAddr: p.SenderHardwareAddr.String()}
		if slices.Contains(asked, p.SenderIP) && !f.own(d.HardwareAddr) && !slices.Contains(f.Duplicates, d) {
			f.Duplicates = append(f.Duplicates, d)
		}
	}
	return ctx.Err()
}

// own reports that an interface of this host has the hardware address: two of
// them may be on one link.
func (f *Facts) own(hardware string) bool {
	return slices.ContainsFunc(f.Links, func(l Link) bool { return l.HardwareAddr == hardware })
}
