// Package peers has what nlb is compared with, beside rulesets: HAProxy and
// nginx's stream module, as an operator sets them up for TCP. Options come in,
// configuration files and command lines go out; to run them is the caller's.
//
// Both are given one thread or worker, because everything that is measured runs
// on one core, and no log. Both run under a master process, so that they can be
// reloaded, and stay in the foreground.
package peers

import (
	"net/netip"
	"time"
)

// A Listener is an address and port that clients connect to, and the servers
// among which their connections are shared in turn. It has one server at least.
type Listener struct {
	At      netip.AddrPort
	Servers []netip.AddrPort
}

// A Check is how a server is found dead or alive.
type Check struct {
	Port              uint16        // that is connected to
	Interval, Timeout time.Duration // whole milliseconds
	// Fall and Rise are how many probes in a row have to fail or succeed.
	Fall, Rise int
}
