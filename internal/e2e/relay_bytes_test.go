package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nlb/bench/lab"
	"nlb/internal/wait"
)

// A noise is an endless stream that a seed determines.
func noise(seed uint64) io.Reader {
	var key [32]byte
	for i := range 8 {
		key[i] = byte(seed >> (8 * i))
	}
	return rand.NewChaCha8(key)
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// pour writes so many bytes of noise and a FIN, and returns their checksum.
func pour(c *net.TCPConn, seed uint64, size int64) (uint32, error) {
	sum := crc32.New(castagnoli)
	if _, err := io.CopyBuffer(struct{ io.Writer }{io.MultiWriter(c, sum)}, struct{ io.Reader }{io.LimitReader(noise(seed), size)}, make([]byte, 256<<10)); err != nil {
		return 0, err
	}
	return sum.Sum32(), c.CloseWrite()
}

// drain reads to the FIN and returns how much that was, and the checksum.
func drain(r io.Reader) (int64, uint32, error) {
	sum := crc32.New(castagnoli)
	n, err := io.CopyBuffer(struct{ io.Writer }{sum}, struct{ io.Reader }{r}, make([]byte, 256<<10))
	return n, sum.Sum32(), err
}

// A half is what one end of a connection saw of it.
type half struct {
	n         int64  // bytes that arrived
	got, sent uint32 // checksums
	err       error
}

func (h half) String() string {
	return fmt.Sprintf("got %d bytes (%08x), sent %08x: %v", h.n, h.got, h.sent, h.err)
}

// TestRelayBulk has connections that carry a hundred megabytes each, in both
// directions at the same time. It runs alone, for it leaves no time to others.
func TestRelayBulk(t *testing.T) {
	const streams, size = 8, 100_000_000
	top := routed(t, lab.Options{Targets: 1})
	client, server := top.Clients[0], top.Targets[0]
	var (
		mu   sync.Mutex
		ends = map[netip.AddrPort]half{} // guarded by mu; what the target saw, by the client
		over sync.WaitGroup
	)
	// transfer moves both directions of one end.
	transfer := func(c *net.TCPConn, in io.Reader, seed uint64) (h half) {
		var sending sync.WaitGroup
		var failed error
		sending.Go(func() { h.sent, failed = pour(c, seed, size) })
		n, got, err := drain(in)
		sending.Wait()
		h.n, h.got, h.err = n, got, errors.Join(err, failed)
		return h
	}
	answerHeaded(t, server, targetPort, func(h *headed) {
		_ = h.SetDeadline(time.Now().Add(5 * limit))
		end := transfer(h.TCPConn, h.in, uint64(h.from.Port())<<8)
		mu.Lock()
		defer mu.Unlock()
		ends[h.from] = end
	})
	serving(t, top, relaying(top, webPort, relayed("bulk", targetPort, targets(server))))

	begun := time.Now()
	mine := map[netip.AddrPort]half{} // guarded by mu
	for i := range streams {
		f := families[i%len(families)]
		conn := connect(t, client, f, webPort)
		if err := conn.SetDeadline(time.Now().Add(5 * limit)); err != nil {
			t.Fatal(err)
		}
		over.Go(func() {
			end := transfer(conn, conn, uint64(local(conn).Port()))
			mu.Lock()
			defer mu.Unlock()
			mine[local(conn)] = end
		})
	}
	over.Wait()
	took := time.Since(begun)
	t.Logf("%d connections with %d MB each way: %v, %.1f Gbit/s", streams, size/1_000_000, took.Round(time.Millisecond),
		float64(2*streams*size*8)/took.Seconds()/1e9)
	wait.For(t, limit, "targets come to an end", func() error {
		mu.Lock()
		defer mu.Unlock()
		if len(ends) < streams {
			return fmt.Errorf("%d of them", len(ends))
		}
		return nil
	})
	mu.Lock()
	defer mu.Unlock()
	for from, x := range mine {
		y := ends[from]
		if x.err != nil || y.err != nil || x.n != size || y.n != size || x.sent != y.got || y.sent != x.got {
			t.Errorf("%v: client %v, target %v", from, x, y)
		}
	}
}

// TestRelayServerSpeaksFirst has servers whose clients wait for a banner, and
// connections that end in all ways there are.
func TestRelayServerSpeaksFirst(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Targets: 1})
	client, server := top.Clients[0], top.Targets[0]
	const greetPort, sshPort, smtpPort, oddPort = 8080, 8022, 8025, 8081
	serveOn(t, server, lab.Serve{Ports: []uint16{greetPort}, Networks: []string{"tcp"}, Greet: true, Proxy: true})
	banners := map[uint16]string{sshPort: "SSH-2.0-OpenSSH_9.9\r\n", smtpPort: "220 mail.example ESMTP\r\n"}
	arrived := make(chan *headed)
	for port, banner := range banners {
		answerHeaded(t, server, port, func(h *headed) { _, _ = io.WriteString(h, fmt.Sprint(h.from, " ", banner)) })
	}
	// Who connects here does with the connection what it likes.
	done := make(chan struct{})
	answerHeaded(t, server, oddPort, func(h *headed) {
		select {
		case arrived <- h:
			<-done
		case <-t.Context().Done():
		}
	})
	c := config{Sources: sources(top), VIPs: both()}
	for i, port := range []uint16{greetPort, sshPort, smtpPort, oddPort} {
		g := relayed(fmt.Sprint("g", port), port, targets(server))
		c.Groups = append(c.Groups, g)
		c.Listeners = append(c.Listeners, listen(g.Name, "TCP", uint16(80+i), g.Name)...)
	}
	serving(t, top, c)
	atClient, atServer := capture(t, client, "eth0"), capture(t, server, "eth0")
	for _, f := range families {
		got := replies(t, client, lab.Call{Network: "tcp", Dst: f.at(80), N: 20, Parallel: 5, Silent: true})
		named(t, "greeting, IPv"+f.name, got, f.addr(top.LB))
		for port, banner := range map[uint16]string{81: banners[sshPort], 82: banners[smtpPort]} {
			begun := time.Now()
			conn := connect(t, client, f, port)
			got, err := io.ReadAll(conn)
			t.Logf("IPv%s: %q after %v", f.name, got, time.Since(begun))
			if want := fmt.Sprint(local(conn), " ", banner); err != nil || string(got) != want {
				t.Errorf("port %d: got %q, want %q: %v", port, got, want, err)
			}
		}

		// pair is a connection by both of its ends.
		pair := func() (*net.TCPConn, *headed) {
			conn := connect(t, client, f, 83)
			select {
			case h := <-arrived:
				if h.from != local(conn) {
					t.Fatalf("the header named %v, and %v called", h.from, local(conn))
				}
				return conn, h
			case <-time.After(limit):
				t.Fatal("the connection does not reach the target")
				return nil, nil
			}
		}
		// ends hears a FIN after the text, and nothing else.
		ends := func(what string, from io.Reader, text string) {
			got, err := io.ReadAll(from)
			if err != nil || string(got) != text {
				t.Errorf("IPv%s, %s: got %q: %v", f.name, what, got, err)
			}
		}
		say := func(to io.Writer, text string) {
			if _, err := io.WriteString(to, text); err != nil {
				t.Errorf("IPv%s: %v", f.name, err)
			}
		}

		conn, h := pair()
		say(conn, "question")
		_ = conn.CloseWrite()
		ends("the client has finished", h.in, "question")
		say(h, "answer")
		_ = h.CloseWrite()
		ends("the client had finished", conn, "answer")

		conn, h = pair()
		say(h, "all I say")
		_ = h.CloseWrite()
		ends("the target has finished", conn, "all I say")
		say(conn, "and more")
		_ = conn.CloseWrite()
		ends("the target had finished", h.in, "and more")

		// A reset of one end is one of the other.
		aborted := func(what string, from, to *net.TCPConn, at *lab.Capture) {
			end := path{from: netip.AddrPortFrom(f.vip, 83), to: local(to)}
			if to != conn {
				end.from = to.RemoteAddr().(*net.TCPAddr).AddrPort()
				end.from = netip.AddrPortFrom(end.from.Addr().Unmap(), end.from.Port())
			}
			_ = from.SetLinger(0)
			_ = from.Close()
			_, err := at.Wait(soon(t), func(p lab.Packet) bool {
				return !p.Out && p.Flags&lab.RST != 0 && p.From() == end.from && p.To() == end.to
			})
			if err != nil {
				t.Errorf("IPv%s, %s: no reset: %v", f.name, what, err)
			}
			if _, err := io.ReadAll(to); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("IPv%s, %s: the other end is told %v", f.name, what, err)
			}
		}
		conn, h = pair()
		aborted("the client aborts", conn, h.TCPConn, atServer)
		conn, h = pair()
		aborted("the target aborts", h.TCPConn, conn, atClient)
	}
	close(done)
	// What ended in peace was not reset.
	resets := resetsBeforeEnd(packets(t, atClient, func(p lab.Packet) bool { return p.Flags&(lab.FIN|lab.RST) != 0 }))
	if len(resets) != 2*len(families) {
		t.Errorf("%d resets at the client: %v", len(resets), resets)
	}
}

// resetsBeforeEnd are the resets of connections of which not both ends had sent their
// FIN yet. A later one answers a segment that was sent again while the machine was
// busy, and finds the connection gone (RFC 9293, 3.10.7.1).
func resetsBeforeEnd(all []lab.Packet) []lab.Packet {
	finished := map[path]bool{}
	var resets []lab.Packet
	for _, p := range all {
		there, back := path{p.From(), p.To()}, path{p.To(), p.From()}
		switch {
		case p.Flags&lab.FIN != 0:
			finished[there] = true
		case !finished[there] || !finished[back]:
			resets = append(resets, p)
		}
	}
	return resets
}

func TestResetsBeforeEnd(t *testing.T) {
	segment := func(from, to string, flags lab.Flags) lab.Packet {
		a, b := netip.MustParseAddrPort(from), netip.MustParseAddrPort(to)
		return lab.Packet{Src: a.Addr(), SrcPort: a.Port(), Dst: b.Addr(), DstPort: b.Port(), Flags: flags}
	}
	const vip, one, two, three = "198.51.100.10:80", "203.0.113.9:1", "203.0.113.9:2", "203.0.113.9:3"
	all := []lab.Packet{
		segment(one, vip, lab.FIN|lab.ACK), segment(vip, one, lab.FIN|lab.ACK), segment(vip, one, lab.RST),
		segment(two, vip, lab.FIN|lab.ACK), segment(vip, two, lab.RST|lab.ACK),
		segment(three, vip, lab.RST),
	}
	if got, want := fmt.Sprint(resetsBeforeEnd(all)), fmt.Sprint(all[4:]); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// openings are what clients say first to be taken for somebody else.
func openings() [][]byte {
	const signature = "\r\n\r\n\x00\r\nQUIT\n"
	four := []byte(signature + "\x21\x11\x00\x0c\x0a\x09\x09\x09\x0a\x09\x09\x0a\x12\x34\x00\x50")
	six := append([]byte(signature+"\x21\x21\x00\x24"), bytes.Repeat([]byte{0x20, 1, 0xd, 0xb8}, 9)...)
	return [][]byte{
		nil,
		[]byte("PROXY TCP4 10.9.9.9 10.9.9.10 4660 80\r\n"),
		[]byte("PROXY TCP6 2001:db8::bad 2001:db8::1 4660 80\r\n"),
		[]byte("PROXY UNKNOWN\r\n"),
		[]byte("PROXY"),
		four, six, slices.Concat(four, four, six),
		four[:1], four[:12], four[:15], six[:16], six[:40],
		[]byte(signature + "\x20\x00\x00\x00"),             // LOCAL
		[]byte(signature + "\x21\x11\xff\xff"),             // longer than it is
		[]byte(signature + "\x31\x11\x00\x0c"),             // of another version
		[]byte("GET / HTTP/1.1\r\nForwarded: for=x\r\n\r"), // no header at all
		{0}, {0x16, 3, 1, 2, 0},
		bytes.Repeat([]byte(signature), 3000),
	}
}

// opening is one that was changed, or not, by chance.
func opening(r *rand.Rand) []byte {
	all := openings()
	b := slices.Clone(all[r.IntN(len(all))])
	switch r.IntN(4) {
	case 0:
		for range 1 + r.IntN(3) {
			if len(b) > 0 {
				b[r.IntN(len(b))] = byte(r.Uint32())
			}
		}
	case 1:
		b = append(b, all[r.IntN(len(all))]...)
	case 2:
		n := r.IntN(3000)
		for range n {
			b = append(b, byte(r.Uint32()))
		}
	}
	return b
}

// TestRelayFirstHeaderIsOurs has clients that begin with headers of their own, or
// with anything else, in pieces or not. The target gets our header first, and
// then what the client said.
func TestRelayFirstHeaderIsOurs(t *testing.T) {
	t.Parallel()
	const workers = 8
	tries := 1000
	if long() {
		tries = 10_000
	}
	top := routed(t, lab.Options{Targets: 1})
	client, server := top.Clients[0], top.Targets[0]
	// The answer is the header's word for the client and all that followed.
	answerHeaded(t, server, targetPort, func(h *headed) {
		said, err := io.ReadAll(h.in)
		if err == nil {
			_, err = fmt.Fprintf(h, "%v %v %d\n%s", h.from, h.to, len(h.raw), said)
		}
		if err != nil {
			t.Errorf("%v: %v", h.from, err)
		}
	})
	serving(t, top, relaying(top, webPort, relayed("web", targetPort, targets(server))))
	r := chance(t)
	seeds := make(chan uint64, tries)
	for range tries {
		seeds <- r.Uint64()
	}
	close(seeds)
	var all sync.WaitGroup
	for range workers {
		all.Go(func() {
			for seed := range seeds {
				if err := open(t, client, seed); err != nil {
					t.Errorf("opening %#x: %v", seed, err)
					return
				}
			}
		})
	}
	all.Wait()
	t.Logf("%d openings: the first header of each was ours", tries)
}

// open says an opening and checks what arrived of it.
func open(t *testing.T, client *lab.Node, seed uint64) error {
	r := rand.New(rand.NewPCG(seed, 0))
	f, said := families[r.IntN(len(families))], opening(r)
	conn, err := dialFrom(t, client, netip.AddrPortFrom(f.addr(client), 0), f.at(webPort))
	if err != nil {
		return err
	}
	defer conn.Close()
	for rest := said; len(rest) > 0; {
		n := len(rest)
		if r.IntN(2) == 0 {
			n = 1 + r.IntN(n)
		}
		if _, err := conn.Write(rest[:n]); err != nil {
			return err
		}
		rest = rest[n:]
	}
	if err := conn.CloseWrite(); err != nil {
		return err
	}
	got, err := io.ReadAll(conn)
	if err != nil {
		return err
	}
	const plain4, plain6 = 16 + 12, 16 + 36
	size := plain4
	if f.vip.Is6() {
		size = plain6
	}
	if want := fmt.Sprintf("%v %v %d\n%s", local(conn), f.at(webPort), size, said); string(got) != want {
		return fmt.Errorf("arrived: %.200q, want %.200q", got, want)
	}
	return nil
}
