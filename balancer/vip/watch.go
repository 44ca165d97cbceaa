package vip

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/mdlayher/netlink"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"nlb/balancer/events"
)

// Watch implements balancer.Watcher: it calls changed when an address that is a
// VIP was removed, a link came up, or events were lost. It also repeats the
// announcements that Apply began, and announces our addresses again on a link
// that got its carrier back, for the neighbours may be others now.
func (a *Announcer) Watch(ctx context.Context, changed func()) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return a.listen(ctx, changed) })
	g.Go(func() error { a.repeat(ctx); return nil })
	return g.Wait()
}

// repeat sends what the schedule says until ctx ends.
func (a *Announcer) repeat(ctx context.Context) {
	for {
		var timer <-chan time.Time
		if wait, ok := a.schedule.next(time.Now()); ok {
			timer = time.After(wait)
		}
		select {
		case <-ctx.Done():
			return
		case <-a.schedule.wake:
		case <-timer:
		}
		if due := a.schedule.take(time.Now()); len(due) > 0 {
			a.announceBound(due)
		}
	}
}

// announceBound announces those addresses that are still bound.
func (a *Announcer) announceBound(as []Address) {
	k, err := dial()
	if err != nil {
		a.log.Warn("VIPs are not announced", events.VIPNotAnnounced.Field(), zap.Error(err))
		return
	}
	defer k.close()
	links, have, err := k.observe()
	if err != nil {
		a.log.Warn("VIPs are not announced", events.VIPNotAnnounced.Field(), zap.Error(err))
		return
	}
	gone := func(addr Address) bool { return !slices.Contains(have, addr) }
	a.announce(byName(links), slices.DeleteFunc(as, gone))
}

// groups are the rtnetlink multicast groups that tell what Watch wants to know,
// as the bit mask that netlink(7) wants.
const groups = 1<<(unix.RTNLGRP_LINK-1) | 1<<(unix.RTNLGRP_IPV4_IFADDR-1) | 1<<(unix.RTNLGRP_IPV6_IFADDR-1)

// listen reads the kernel's notifications until ctx ends.
func (a *Announcer) listen(ctx context.Context, changed func()) error {
	conn, err := netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{Groups: groups})
	if err != nil {
		return fmt.Errorf("watch addresses: %w", err)
	}
	defer func() { _ = conn.Close() }()
	// A deadline in the past ends the Receive that is under way.
	defer context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })()

	return a.follow(ctx, conn, changed)
}

// follow is listen on a connection that has the subscriptions. It lists the
// links only now, so that nothing falls in between.
func (a *Announcer) follow(ctx context.Context, conn *netlink.Conn, changed func()) error {
	links, err := listLinks()
	if err != nil {
		return err
	}
	for {
		msgs, err := conn.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			// Notifications were lost, so everything may have changed.
			if links, err = listLinks(); err != nil {
				return err
			}
			changed()
			continue
		case err != nil:
			return fmt.Errorf("watch addresses: %w", err)
		}
		matters := false
		for _, m := range msgs {
			if a.matters(links, m) {
				matters = true
			}
		}
		if matters {
			changed()
		}
	}
}

// matters reports whether a notification may call for another Plan, and keeps
// links up to date with it. A message that cannot be read may mean anything.
func (a *Announcer) matters(links map[int]link, m netlink.Message) bool {
	if len(m.Data) > 0 && m.Data[0] == unix.AF_BRIDGE {
		return false // a bridge port, which comes and goes while the link stays
	}
	switch m.Header.Type {
	case unix.RTM_DELADDR:
		addr, _, err := parseAddress(m.Data)
		return err != nil || a.wants(addr.Prefix.Addr())
	case unix.RTM_DELLINK:
		if l, err := parseLink(m.Data); err == nil {
			delete(links, l.index)
		}
		return false // its addresses are reported one by one
	case unix.RTM_NEWLINK:
		l, err := parseLink(m.Data)
		if err != nil {
			return true
		}
		before := links[l.index]
		links[l.index] = l
		if l.carrier() && (!before.carrier() || l.carriers != before.carriers) {
			a.announceAgain(l)
		}
		return l.name != before.name || l.up() && !before.up()
	}
	return false
}

// announceAgain schedules what is ours on l.
func (a *Announcer) announceAgain(l link) {
	if !l.announces() {
		return
	}
	have, err := addresses()
	if err != nil {
		a.log.Warn("VIPs are not announced", events.VIPNotAnnounced.Field(), zap.String("interface", l.name), zap.Error(err))
		return
	}
	mine := slices.DeleteFunc(have, func(addr Address) bool { return !addr.Ours || addr.Interface != l.name })
	a.schedule.add(mine, transmissions, time.Now())
}

func listLinks() (map[int]link, error) {
	k, err := dial()
	if err != nil {
		return nil, err
	}
	defer k.close()
	return k.links()
}
