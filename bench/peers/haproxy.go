package peers

import (
	"fmt"
	"strings"
	"time"
)

// HAProxy is a load balancer in mode tcp.
type HAProxy struct {
	Listeners []Listener
	// SendProxy announces clients to servers with a PROXY header, version 2.
	SendProxy bool
	// Splice lets the kernel move the bytes of both directions.
	Splice bool
	// Check probes servers; without it they are all taken for alive.
	Check *Check
	// Connect is how long a server may take to accept; 0 is 5 seconds, the value
	// of the manual's examples.
	Connect time.Duration
	// Socket is the path of the one by which a new process takes over the
	// listening sockets of its predecessor, so that a reload refuses nobody
	// (management guide, "expose-fd listeners"); empty for none.
	Socket string
}

// connections are what a process takes at a time. It bounds descriptors, of which
// a spliced connection needs six, by the usual limit.
const connections = 3000

// Config is the configuration file. A connection that a server refuses, or does
// not accept in time, goes to another one at the next attempt (option redispatch 1).
func (h HAProxy) Config() string {
	var b strings.Builder
	fmt.Fprintf(&b, "global\n    nbthread 1\n    maxconn %d\n", connections)
	if h.Socket != "" {
		fmt.Fprintf(&b, "    stats socket %s mode 600 level admin expose-fd listeners\n", h.Socket)
	}
	connect := h.Connect
	if connect == 0 {
		connect = 5 * time.Second
	}
	fmt.Fprintf(&b, "defaults\n    mode tcp\n    timeout connect %dms\n    timeout client 60s\n    timeout server 60s\n    option redispatch 1\n", connect.Milliseconds())
	if h.Splice {
		b.WriteString("    option splice-request\n    option splice-response\n")
	}
	server := h.server(&b)
	for i, l := range h.Listeners {
		fmt.Fprintf(&b, "listen bench-%d\n    bind %s\n", i, l.At)
		for n, s := range l.Servers {
			fmt.Fprintf(&b, "    server t%d %s%s\n", n, s, server)
		}
	}
	return b.String()
}

// server writes the defaults of servers and returns the words that each has.
func (h HAProxy) server(b *strings.Builder) (words string) {
	if h.SendProxy {
		words = " send-proxy-v2"
	}
	if c := h.Check; c != nil {
		fmt.Fprintf(b, "    timeout check %dms\n    default-server inter %dms fall %d rise %d port %d\n",
			c.Timeout.Milliseconds(), c.Interval.Milliseconds(), c.Fall, c.Rise, c.Port)
		words += " check"
	}
	return words
}

// Command is a command line that runs the program with a configuration file.
// SIGUSR2 to the process reloads the file.
func (HAProxy) Command(program, file string) []string {
	return []string{program, "-W", "-db", "-f", file}
}
