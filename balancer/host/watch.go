package host

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// routeGroups are the rtnetlink multicast groups that tell of anything a route
// lookup depends on.
var routeGroups = mask(
	unix.RTNLGRP_LINK,
	unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
	unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE,
	unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE,
)

// netconfGroups tell of changes to forwarding and of new interfaces' settings.
// The kernel tells nobody of the other sysctls.
var netconfGroups = mask(unix.RTNLGRP_IPV4_NETCONF, unix.RTNLGRP_IPV6_NETCONF)

// mask is the bit mask that binds a socket to groups (netlink(7)).
func mask(groups ...int) uint32 {
	var m uint32
	for _, g := range groups {
		m |= 1 << (g - 1)
	}
	return m
}

// Watch implements balancer.Watcher: it calls changed when links, addresses,
// routes or rules changed, or may have. The caller decides how often to look.
func (*Router) Watch(ctx context.Context, changed func()) error {
	return watch(ctx, routeGroups, changed)
}

// Watch implements balancer.Watcher: it calls changed when the forwarding of
// the host or of an interface changed, or may have. The other settings are
// compared whenever the caller plans.
func (*Sysctls) Watch(ctx context.Context, changed func()) error {
	return watch(ctx, netconfGroups, changed)
}

func watch(ctx context.Context, groups uint32, changed func()) error {
	conn, err := netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{Groups: groups})
	if err != nil {
		return fmt.Errorf("rtnetlink: %w", err)
	}
	defer func() { _ = conn.Close() }()
	// A deadline in the past ends the Receive that is under way.
	defer context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })()
	return follow(ctx, conn, changed)
}

// follow reads notifications until ctx ends.
func follow(ctx context.Context, conn *netlink.Conn, changed func()) error {
	for {
		msgs, err := conn.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS): // notifications were lost
			changed()
		case err != nil:
			return fmt.Errorf("rtnetlink: %w", err)
		case matters(msgs):
			changed()
		}
	}
}

// matters reports whether a message tells more than that the kernel cached a
// route.
func matters(msgs []netlink.Message) bool {
	for _, m := range msgs {
		route := m.Header.Type == unix.RTM_NEWROUTE || m.Header.Type == unix.RTM_DELROUTE
		if !route || len(m.Data) < unix.SizeofRtMsg || binary.NativeEndian.Uint32(m.Data[8:])&unix.RTM_F_CLONED == 0 {
			return true
		}
	}
	return false
}
