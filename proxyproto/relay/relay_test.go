package relay

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"nlb/balancer"
	"nlb/internal/wait"
)

func TestFamilies(t *testing.T) {
	tests := []struct {
		name string
		vip  netip.AddrPort
		to   netip.AddrPort
		from netip.Addr // as the target's socket sees it
	}{
		{"IPv4", vip4, port(target4, 8001), source4},
		{"IPv6", vip6, port(target6, 8001), source6},
		{"IPv4 clients of an IPv6 target", vip4, port(target6, 8002), source6},
		{"IPv6 clients of an IPv4 target", vip6, port(target4, 8002), source4},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			seen := make(chan [3]string, 1)
			serveTarget(t, tt.to, func(g *greeted) {
				peer := g.RemoteAddr().(*net.TCPAddr).AddrPort().Addr()
				seen <- [3]string{g.header.SourceAddr.String(), g.header.DestinationAddr.String(), peer.String()}
				echo(g)
			})
			startRelay(t, Options{Loops: 2}, tableOf(destinations(tt.to), tt.vip))
			c := call(t, tt.vip)
			want := [3]string{c.LocalAddr().String(), tt.vip.String(), tt.from.String()}
			if got := <-seen; got != want {
				t.Errorf("the target saw %v, want %v", got, want)
			}
			for i := range 20 { // keep-alive
				roundTrip(t, c, fmt.Sprintf("question %d", i))
			}
			c.CloseWrite()
			if rest, err := io.ReadAll(c); err != nil || len(rest) > 0 {
				t.Errorf("after the FIN: %q, %v", rest, err)
			}
		})
	}
}

func roundTrip(t testing.TB, c net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != text {
		t.Fatalf("got %q, %v, want %q", got, err, text)
	}
}

func TestServerSpeaksFirst(t *testing.T) {
	to := port(target4, 8003)
	serveTarget(t, to, func(g *greeted) { io.WriteString(g, "220 ready\r\n"); echo(g) })
	startRelay(t, Options{Loops: 1}, tableOf(destinations(to), vip4))
	c := call(t, vip4)
	got := make([]byte, 11)
	if _, err := io.ReadFull(c, got); err != nil || string(got) != "220 ready\r\n" {
		t.Fatalf("%q, %v", got, err)
	}
	roundTrip(t, c, "EHLO")
}

// TestBulk carries enough for splice(2), in both directions at once.
func TestBulk(t *testing.T) {
	const flows, size = 8, 20 << 20
	to := port(target4, 8004)
	serveTarget(t, to, echo)
	r := startRelay(t, Options{Loops: 2}, tableOf(destinations(to), vip4))
	var all errgroup.Group
	for i := range flows {
		c := call(t, vip4)
		all.Go(func() error { return bulk(c, size, uint64(i)) })
	}
	if err := all.Wait(); err != nil {
		t.Fatal(err)
	}
	wait.Until(t, waitAtMost, "the connections to end", func() bool { return r.Stats().Connections == 0 })
	got := r.Stats().Targets[balancer.TargetKey{Group: "web", AddrPort: to}]
	if want := (TargetStats{New: flows, Answered: flows, Bytes: 2 * flows * size}); got != want {
		t.Errorf("counted %+v, want %+v", got, want)
	}
	pipes := 0
	for _, l := range r.loops {
		l.mu.Lock()
		if pipes += l.machine.pipes.open; l.machine.pipes.open != len(l.machine.pipes.spare) {
			t.Error("a pipe was not given back")
		}
		l.mu.Unlock()
	}
	if pipes == 0 {
		t.Error("nothing was spliced")
	}
}

func bulk(c *net.TCPConn, size int64, seed uint64) error {
	random := rand.NewChaCha8([32]byte{byte(seed)})
	sent, got := sha256.New(), sha256.New()
	var both errgroup.Group
	both.Go(func() error {
		defer c.CloseWrite()
		_, err := io.Copy(io.MultiWriter(c, sent), io.LimitReader(random, size))
		return err
	})
	both.Go(func() error {
		_, err := io.Copy(got, c)
		return err
	})
	if err := both.Wait(); err != nil {
		return err
	}
	if !bytes.Equal(sent.Sum(nil), got.Sum(nil)) {
		return errors.New("what came back is not what was sent")
	}
	return nil
}

func TestHalfClose(t *testing.T) {
	t.Run("client first", func(t *testing.T) {
		to := port(target4, 8005)
		serveTarget(t, to, func(g *greeted) {
			asked, err := io.ReadAll(g)
			if err != nil {
				t.Error(err)
			}
			fmt.Fprintf(g.TCPConn, "all of %s", asked)
		})
		startRelay(t, Options{Loops: 1}, tableOf(destinations(to), vip4))
		c := call(t, vip4)
		io.WriteString(c, "it")
		c.CloseWrite()
		if got, err := io.ReadAll(c); err != nil || string(got) != "all of it" {
			t.Errorf("%q, %v", got, err)
		}
	})
	t.Run("target first", func(t *testing.T) {
		to := port(target4, 8006)
		heard := make(chan string, 1)
		serveTarget(t, to, func(g *greeted) {
			io.WriteString(g.TCPConn, "bye")
			g.CloseWrite()
			rest, _ := io.ReadAll(g)
			heard <- string(rest)
		})
		startRelay(t, Options{Loops: 1}, tableOf(destinations(to), vip4))
		c := call(t, vip4)
		if got, err := io.ReadAll(c); err != nil || string(got) != "bye" {
			t.Errorf("%q, %v", got, err)
		}
		io.WriteString(c, "one more thing")
		c.CloseWrite()
		if got := <-heard; got != "one more thing" {
			t.Errorf("the target heard %q", got)
		}
	})
}

func TestReset(t *testing.T) {
	t.Run("of the client", func(t *testing.T) {
		to := port(target4, 8007)
		failure := make(chan error, 1)
		serveTarget(t, to, func(g *greeted) {
			io.WriteString(g, "ready")
			_, err := io.ReadAll(g)
			failure <- err
		})
		startRelay(t, Options{Loops: 1}, tableOf(destinations(to), vip4))
		c := call(t, vip4)
		if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
			t.Fatal(err)
		}
		c.SetLinger(0)
		c.Close()
		if err := <-failure; !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the target's error is %v", err)
		}
	})
	t.Run("of the target", func(t *testing.T) {
		to := port(target4, 8008)
		serveTarget(t, to, func(g *greeted) { g.SetLinger(0) })
		startRelay(t, Options{Loops: 1}, tableOf(destinations(to), vip4))
		if _, err := io.ReadAll(call(t, vip4)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the client's error is %v", err)
		}
	})
}

// wantReset calls a VIP and wants a RST, which may come before connect(2)
// returns.
func wantReset(t *testing.T, vip netip.AddrPort) {
	t.Helper()
	c, err := tryCall(vip)
	if err == nil {
		_, err = io.ReadAll(c)
		c.Close()
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%s: the client's error is %v", vip, err)
	}
}

func TestDialRetry(t *testing.T) {
	alive, dead := port(target4, 8009), port(other4, 8009)
	serveTarget(t, alive, echo)
	r := startRelay(t, Options{Loops: 2}, tableOf(destinations(alive, dead), vip4))
	for range 100 {
		c := call(t, vip4)
		roundTrip(t, c, "hello")
		c.Close()
	}
	s := r.Stats()
	up, down := s.Targets[balancer.TargetKey{Group: "web", AddrPort: alive}], s.Targets[balancer.TargetKey{Group: "web", AddrPort: dead}]
	if up.Answered != 100 || up.Failed != 0 || down.Answered != 0 || down.Failed != down.New || down.Failed == 0 {
		t.Errorf("alive %+v, dead %+v", up, down)
	}
}

func TestNobodyAnswers(t *testing.T) {
	dead := port(target4, 8010)
	r := startRelay(t, Options{Loops: 1}, tableOf(destinations(dead), vip4))
	wantReset(t, vip4)
	if s := r.Stats(); s.Failed != 1 || s.Accepted != 1 {
		t.Errorf("%+v", s)
	}
}

func TestNoTargetAndNotAllowed(t *testing.T) {
	table := tableOf(nil, vip4, vip6)
	table.Services[1].Allow = []netip.Prefix{netip.MustParsePrefix("2001:db8:114::/48"), netip.MustParsePrefix("2001:db8:112::/48")}
	r := startRelay(t, Options{Loops: 1}, table)
	for _, vip := range []netip.AddrPort{vip4, vip6} {
		wantReset(t, vip)
	}
	if s := r.Stats(); s.NoTarget != 1 || s.Refused != 1 {
		t.Errorf("%+v", s)
	}
}

func TestTerminate(t *testing.T) {
	stays, goes, leaves := port(target4, 8011), port(target4, 8012), port(target4, 8013)
	for _, a := range []netip.AddrPort{stays, goes, leaves} {
		serveTarget(t, a, func(g *greeted) { fmt.Fprintf(g, "%s\n", a); echo(g) })
	}
	to := destinations(stays, goes, leaves)
	r := startRelay(t, Options{Loops: 2}, tableOf(to, vip4))
	at := make(map[string][]*net.TCPConn)
	for len(at[stays.String()]) < 3 || len(at[goes.String()]) < 3 || len(at[leaves.String()]) < 3 {
		c := call(t, vip4)
		name := make([]byte, len(stays.String())+1)
		if _, err := io.ReadFull(c, name); err != nil {
			t.Fatal(err)
		}
		at[string(name[:len(name)-1])] = append(at[string(name[:len(name)-1])], c)
	}
	flows := r.Flows()
	to[1].Weight, to[1].Terminate = 0, true
	if err := r.Configure(tableOf(to[:2], vip4), nil); err != nil {
		t.Fatal(err)
	}
	for name, conns := range at {
		for _, c := range conns {
			if name != goes.String() {
				roundTrip(t, c, "still here")
			} else if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("client of %s: %v", name, err)
			}
		}
	}
	// One that left the table, and comes back, has the connections that it had.
	for _, table := range [][]balancer.Destination{to[:2], to} {
		if err := r.Configure(tableOf(table, vip4), nil); err != nil {
			t.Fatal(err)
		}
		key := balancer.TargetKey{Group: "web", AddrPort: leaves}
		if got, want := r.Stats().Targets[key].Active, uint64(len(at[leaves.String()])); got != want {
			t.Errorf("%d connections of the target that left, want %d", got, want)
		}
	}
	for _, f := range flows {
		if f.VIP != vip4 || f.Client.Addr() != client4 || f.Source.Addr() != source4 || f.Source.Port() == 0 || f.Target != f.To.AddrPort || f.Since.IsZero() {
			t.Errorf("flow %+v", f)
		}
	}
}

func TestConfigureRefuses(t *testing.T) {
	r := startRelay(t, Options{Loops: 1}, tableOf(nil, vip4))
	err := r.Configure(tableOf(nil, vip4, vip6), nil)
	if want := "relay: no listener for [2001:db8:100::10]:80"; err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
	err = r.Configure(tableOf(nil, vip4, vip4), nil)
	if want := `relay: service "198.51.100.10:80": another one is at 198.51.100.10:80 too`; err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
	f, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Configure(tableOf(nil, vip4, vip6), map[netip.AddrPort]*os.File{vip6: f}); err == nil {
		t.Error("a file that does not listen was taken")
	}
	if f.Close() == nil {
		t.Error("the file was left open")
	}
}

func TestListenersComeAndGo(t *testing.T) {
	to := port(target4, 8014)
	serveTarget(t, to, echo)
	one, two := tableOf(destinations(to), vip4), tableOf(destinations(to), vip4, port(vip4.Addr(), 81))
	r := startRelay(t, Options{Loops: 2}, two)
	stays := call(t, port(vip4.Addr(), 81))
	roundTrip(t, stays, "before")
	if err := r.Configure(one, nil); err != nil {
		t.Fatal(err)
	}
	if c, err := tryCall(port(vip4.Addr(), 81)); err == nil {
		c.Close()
		t.Error("a listener is left")
	}
	roundTrip(t, stays, "after")
	if err := r.Configure(two, listenersFor(t, &balancer.Table{Services: two.Services[1:]})); err != nil {
		t.Fatal(err)
	}
	roundTrip(t, call(t, port(vip4.Addr(), 81)), "again")
}

func TestRetire(t *testing.T) {
	to := port(target4, 8015)
	serveTarget(t, to, echo)
	r := startRelay(t, Options{Loops: 2}, tableOf(destinations(to), vip4))
	first, second := call(t, vip4), call(t, vip4)
	roundTrip(t, first, "a")
	roundTrip(t, second, "b")
	r.Retire(time.Now().Add(time.Hour))
	if c, err := tryCall(vip4); err == nil {
		c.Close()
		t.Error("a retired relay accepts")
	}
	roundTrip(t, first, "c")
	first.Close()
	select {
	case <-r.Done():
		t.Error("done before the last connection")
	default:
	}
	r.Retire(time.Now())
	if _, err := second.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("at the end: %v", err)
	}
	<-r.Done()
}
