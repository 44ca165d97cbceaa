package e2e

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	goproxy "github.com/pires/go-proxyproto"
	"golang.org/x/sys/unix"

	"nlb/bench/lab"
	"nlb/internal/wait"
)

// long reports whether the tests that can be are long ones.
func long() bool { return os.Getenv("NLB_LONG") == "1" }

// relayed is a group whose targets get headers.
func relayed(name string, port uint16, of []target) group {
	return pool(name, "TCP", "proxy_protocol_v2", port, of)
}

// relaying is a configuration of one relayed group, on a port of both VIPs.
func relaying(top *lab.Topology, port uint16, g group) config {
	return config{Sources: sources(top), VIPs: both(), Listeners: listen(g.Name, "TCP", port, g.Name), Groups: []group{g}}
}

// serveHeaders makes nodes read a header first, for TCP. UDP is as ever.
func serveHeaders(t *testing.T, nodes []*lab.Node, ports ...uint16) map[string]*lab.Listeners {
	t.Helper()
	all := map[string]*lab.Listeners{}
	for _, n := range nodes {
		all[n.Name] = serveOn(t, n, lab.Serve{Ports: ports, Networks: []string{"tcp"}, Proxy: true})
	}
	return all
}

// named fails the test unless all calls succeeded, the targets saw the balancer,
// and a header named the caller's own end of the connection.
func named(t *testing.T, what string, got []lab.Reply, peers ...netip.Addr) {
	t.Helper()
	for _, r := range got {
		if r.Err != "" || r.Client != r.From || !slices.Contains(peers, r.Peer) {
			t.Errorf("%s: %s was told %v by %v, and %v called: %q", what, r.Who, r.Client, r.Peer, r.From, r.Err)
			return
		}
	}
}

// A headed is a connection at a target whose header has been read.
type headed struct {
	*net.TCPConn
	in       *bufio.Reader // what follows the header
	raw      []byte        // the header
	from, to netip.AddrPort
	peer     netip.Addr
}

// beginHeaded reads the header by the rules of a receiver that wants one.
func beginHeaded(c *net.TCPConn) (*headed, error) { return readHeaded(c, bufio.NewReader(c)) }

// readHeaded is beginHeaded where somebody has begun to read.
func readHeaded(c *net.TCPConn, in *bufio.Reader) (*headed, error) {
	h := &headed{TCPConn: c, in: in, raw: make([]byte, 16)}
	h.peer = c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
	if _, err := io.ReadFull(h.in, h.raw); err != nil {
		return nil, err
	}
	h.raw = append(h.raw, make([]byte, binary.BigEndian.Uint16(h.raw[14:]))...)
	if _, err := io.ReadFull(h.in, h.raw[16:]); err != nil {
		return nil, err
	}
	parsed, err := goproxy.Read(bufio.NewReader(bytes.NewReader(h.raw)))
	if err != nil {
		return nil, err
	}
	from, ok := parsed.SourceAddr.(*net.TCPAddr)
	to, isTCP := parsed.DestinationAddr.(*net.TCPAddr)
	if parsed.Version != 2 || parsed.Command != goproxy.PROXY || !ok || !isTCP {
		return nil, fmt.Errorf("an unexpected header: %+v", parsed)
	}
	h.from, h.to = from.AddrPort(), to.AddrPort()
	return h, nil
}

// tlvs are the header's by their type.
func (h *headed) tlvs() (map[byte][]byte, error) {
	size := map[byte]int{0x11: 12, 0x21: 36}[h.raw[13]]
	found := map[byte][]byte{}
	for rest := h.raw[16+size:]; len(rest) > 0; {
		if len(rest) < 3 || len(rest) < 3+int(binary.BigEndian.Uint16(rest[1:])) {
			return nil, fmt.Errorf("a TLV is cut off: % x", rest)
		}
		n := 3 + int(binary.BigEndian.Uint16(rest[1:]))
		found[rest[0]], rest = rest[3:n], rest[n:]
	}
	return found, nil
}

// checksum verifies the header's CRC32C, which the library does not.
func (h *headed) checksum() error {
	all, err := h.tlvs()
	if err != nil {
		return err
	}
	const crc = 0x03
	sum := all[crc]
	if len(sum) != 4 {
		return fmt.Errorf("the checksum has %d bytes", len(sum))
	}
	said := binary.BigEndian.Uint32(sum)
	clear(sum) // it is part of raw, and counts as zeros
	is := crc32.Checksum(h.raw, crc32.MakeTable(crc32.Castagnoli))
	binary.BigEndian.PutUint32(sum, said)
	if is != said {
		return fmt.Errorf("the checksum is %08x, and %08x is said", is, said)
	}
	return nil
}

// answerHeaded has a function for each connection to a port of a node that
// begins with a header; health checks have none and are hung up on. It ends with
// the test, which waits for the functions.
func answerHeaded(t *testing.T, n *lab.Node, port uint16, answer func(*headed)) {
	t.Helper()
	var l net.Listener
	err := n.Do(func() (err error) {
		l, err = (&net.ListenConfig{KeepAlive: -1}).Listen(t.Context(), "tcp", fmt.Sprint(":", port))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var (
		all  sync.WaitGroup
		mu   sync.Mutex
		open = map[net.Conn]bool{}
	)
	all.Go(func() {
		for {
			c, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				continue
			}
			mu.Lock()
			open[c] = true
			mu.Unlock()
			all.Go(func() {
				defer func() {
					_ = c.Close()
					mu.Lock()
					delete(open, c)
					mu.Unlock()
				}()
				_ = c.SetDeadline(time.Now().Add(2 * limit))
				if h, err := beginHeaded(c.(*net.TCPConn)); err == nil {
					answer(h)
				} else if !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, net.ErrClosed) {
					t.Errorf("%s got no header: %v", n.Name, err)
				}
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		for c := range open {
			_ = c.Close()
		}
		mu.Unlock()
		all.Wait()
	})
}

// connect opens a connection from a node to a port of its VIP.
func connect(t *testing.T, n *lab.Node, f family, port uint16) *net.TCPConn {
	t.Helper()
	c, err := dialFrom(t, n, netip.AddrPortFrom(f.addr(n), 0), f.at(port))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// local is a connection's own end.
func local(c net.Conn) netip.AddrPort {
	a := c.LocalAddr().(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// relayPID is the process that answers at the relay's socket: that which listens
// (SO_PEERCRED, unix(7)).
func (d *daemon) relayPID() (int, error) {
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: d.relaySocket(), Net: "unix"})
	if err != nil {
		return 0, err
	}
	defer c.Close()
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	controlErr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(controlErr, err); err != nil {
		return 0, err
	}
	return int(cred.Pid), nil
}

// relay is relayPID where there must be one.
func (d *daemon) relay() int {
	d.t.Helper()
	pid, err := d.relayPID()
	if err != nil {
		d.t.Fatal(err)
	}
	return pid
}

// relays are the processes that are relays of the daemon's, whether they accept
// or retire.
func (d *daemon) relays() []int {
	d.t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		d.t.Fatal(err)
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		argv, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err == nil && bytes.Contains(argv, []byte("\x00relay\x00")) && bytes.Contains(argv, []byte(d.relaySocket()+"\x00")) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// processStatus is a line of a process's status file (proc_pid_status(5)).
func processStatus(t *testing.T, pid int, key string) string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if name, value, ok := strings.Cut(line, ":"); ok && name == key {
			return strings.Join(strings.Fields(value), " ")
		}
	}
	t.Fatalf("process %d has no %s", pid, key)
	return ""
}

// startRelay starts nlb relay by hand, with a command before it if there is one,
// and waits until it has taken over. It ends with the test.
func (d *daemon) startRelay(before []string, options ...string) int {
	d.t.Helper()
	argv := slices.Concat(before, []string{program, "relay", "--socket", d.relaySocket()}, options)
	cmd := d.node.Command(d.t.Context(), argv[0], argv[1:]...)
	out := d.log.open(d.t)
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	pid := cmd.Process.Pid
	d.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-ended
	})
	wait.For(d.t, limit, "another relay takes over", func() error {
		select {
		case err := <-ended:
			ended <- err
			d.t.Fatalf("nlb relay ended: %v\n%s", err, d.log)
		default:
		}
		now, err := d.relayPID()
		if err == nil && now != pid {
			err = fmt.Errorf("%d answers, not %d", now, pid)
		}
		return err
	})
	return pid
}
