package relay

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/pires/go-proxyproto"
	"github.com/vishvananda/netlink"

	"nlb/balancer"
	"nlb/internal/nstest"
)

func TestMain(m *testing.M) { os.Exit(nstest.Main(m)) }

// Everything is on the loopback of the test's namespace. Addresses show roles.
var (
	vip4, vip6 = netip.MustParseAddrPort("198.51.100.10:80"), netip.MustParseAddrPort("[2001:db8:100::10]:80")
	client4    = netip.MustParseAddr("203.0.113.9")
	client6    = netip.MustParseAddr("2001:db8:113::9")
	source4    = netip.MustParseAddr("10.0.0.2")
	source6    = netip.MustParseAddr("2001:db8::2")
	target4    = netip.MustParseAddr("10.0.1.11")
	other4     = netip.MustParseAddr("10.0.1.12")
	target6    = netip.MustParseAddr("2001:db8:1::11")
)

var address = sync.OnceValue(func() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	for _, a := range []netip.Addr{vip4.Addr(), vip6.Addr(), client4, client6, source4, source6, target4, other4, target6} {
		bits := a.BitLen()
		err := netlink.AddrReplace(lo, &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(bits, bits)}, Flags: 2 /* IFA_F_NODAD */})
		if err != nil {
			return err
		}
	}
	return nil
})

// everybody is who a service allows unless a test says otherwise.
var everybody = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}

// destinations have equal weights.
func destinations(at ...netip.AddrPort) (out []balancer.Destination) {
	for _, a := range at {
		out = append(out, balancer.Destination{Address: a.Addr(), Port: a.Port(), Weight: 1})
	}
	return out
}

// tableOf has a service at each VIP, all with the same pool "web".
func tableOf(to []balancer.Destination, vips ...netip.AddrPort) *balancer.Table {
	t := &balancer.Table{
		Key: balancer.HashKey{1, 2, 3}, Sources: []netip.Addr{source4, source6},
		Pools: []balancer.Pool{{Name: "web", Protocols: []uint8{balancer.ProtoTCP}, ClientIP: balancer.ProxyProtocolV2, Destinations: to}},
	}
	for _, v := range vips {
		t.Services = append(t.Services, balancer.VirtualService{
			Name: v.String(), Address: v.Addr(), Port: v.Port(), Protocols: []uint8{balancer.ProtoTCP},
			IdleTimeout: 350 * time.Second, Allow: everybody,
			Pools: []balancer.WeightedPool{{Pool: "web", Weight: 1}},
		})
	}
	return t
}

func listen(t testing.TB, at netip.AddrPort) *net.TCPListener {
	t.Helper()
	if err := address(); err != nil {
		t.Fatal(err)
	}
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(t.Context(), "tcp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

// listenersFor opens what a table's services need.
func listenersFor(t testing.TB, table *balancer.Table) map[netip.AddrPort]*os.File {
	t.Helper()
	files := make(map[netip.AddrPort]*os.File)
	for _, s := range table.Services {
		at := netip.AddrPortFrom(s.Address, s.Port)
		l := listen(t, at)
		f, err := l.File()
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
		files[at] = f
	}
	return files
}

// startRelay runs a relay for a table until the test ends.
func startRelay(t testing.TB, o Options, table *balancer.Table) *Relay {
	t.Helper()
	r, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if n := r.Stats().Connections; n != 0 {
			t.Errorf("%d connections are left after Run", n)
		}
	})
	if err := r.Configure(table, listenersFor(t, table)); err != nil {
		t.Fatal(err)
	}
	return r
}

// A greeted is a connection as a target got it, behind the header.
type greeted struct {
	*net.TCPConn
	r      *bufio.Reader
	header *proxyproto.Header
}

func (g *greeted) Read(p []byte) (int, error) { return g.r.Read(p) }

// serveTarget serves connections that begin with a PROXY v2 header and reports
// any other.
func serveTarget(t testing.TB, at netip.AddrPort, serve func(*greeted)) *net.TCPListener {
	t.Helper()
	l := listen(t, at)
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			conns.Go(func() {
				defer c.Close()
				g := &greeted{TCPConn: c, r: bufio.NewReaderSize(c, 64<<10)}
				c.SetReadDeadline(time.Now().Add(30 * time.Second))
				h, err := proxyproto.Read(g.r)
				if err != nil || h.Version != 2 || h.Command != proxyproto.PROXY {
					t.Errorf("target %s: header %+v: %v", at, h, err)
					return
				}
				c.SetReadDeadline(time.Time{})
				g.header = h
				serve(g)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		conns.Wait()
	})
	return l
}

// echo answers what it reads, and a FIN with a FIN. It hides what it copies
// between, or io.Copy would hold a pipe for each connection.
func echo(g *greeted) { _, _ = io.Copy(struct{ io.Writer }{g.TCPConn}, struct{ io.Reader }{g.r}) }

// call connects a client of the VIP's family to it.
func call(t testing.TB, vip netip.AddrPort) *net.TCPConn {
	t.Helper()
	c, err := tryCall(vip)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func tryCall(vip netip.AddrPort) (*net.TCPConn, error) {
	from := client4
	if vip.Addr().Is6() {
		from = client6
	}
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0)), Timeout: 30 * time.Second}
	c, err := d.Dial("tcp", vip.String())
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(60 * time.Second))
	return c.(*net.TCPConn), nil
}

func port(a netip.Addr, p uint16) netip.AddrPort { return netip.AddrPortFrom(a, p) }

// waitAtMost bounds the waits for the kernel.
const waitAtMost = 20 * time.Second
