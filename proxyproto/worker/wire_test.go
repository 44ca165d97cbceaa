package worker

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/internal/bubble"
	"nlb/internal/wait"
	"nlb/proxyproto/relay"
)

// pair is both ends of a control connection.
func pair(tb testing.TB) (a, b link) {
	tb.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	ends := make([]link, 2)
	for i, fd := range fds {
		if ends[i], err = linkOf(fd); err != nil {
			tb.Fatal(err)
		}
	}
	tb.Cleanup(func() { ends[0].close(); ends[1].close() })
	return ends[0], ends[1]
}

// full is a table with every field set, and some twice.
func full() *balancer.Table {
	prefix := netip.MustParsePrefix
	return &balancer.Table{
		Key: balancer.HashKey{0, 255, 7}, VIPs: []netip.Addr{vip, vip6}, Sources: []netip.Addr{source, netip.MustParseAddr("2001:db8:1::2")},
		Services: []balancer.VirtualService{{
			Name: `web <"&é`, Address: vip6, Protocols: []uint8{6, 17}, Port: 65535, IdleTimeout: 350*time.Second + 1,
			Allow: []netip.Prefix{prefix("2001:db8::/32"), prefix("::/0")}, Sticky: true,
			Pools: []balancer.WeightedPool{{Pool: "a", Weight: 999}, {Pool: "b"}},
		}, {Name: "bare", Allow: []netip.Prefix{}}},
		Pools: []balancer.Pool{{
			Name: "a", Protocols: []uint8{6}, ClientIP: balancer.ProxyProtocolV2, AvoidSelf: true, Sticky: true, Observed: true,
			ProxyProtocol: balancer.ProxyProtocol{UniqueID: true, CRC32C: true},
			Destinations: []balancer.Destination{{
				Address: target.Addr(), Port: 8080, Weight: 256, Terminate: true, Domain: []netip.Prefix{prefix("10.0.1.0/24")}, Source: source,
			}, {Address: netip.MustParseAddr("fe80::1%eth0")}},
		}, {Name: "b", ClientIP: balancer.Preserve}, {Name: "c", ClientIP: balancer.HairpinSNAT}, {Name: "d", ClientIP: balancer.SNAT}},
	}
}

func TestTableRoundTrip(t *testing.T) {
	want := full()
	raw, err := encodeTable(want)
	if err != nil {
		t.Fatal(err)
	}
	got, err := decodeTable(raw)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got, values); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	again, err := encodeTable(got)
	if err != nil || string(again) != string(raw) {
		t.Errorf("encoded again, error %v:\n%s\n%s", err, raw, again)
	}
}

func TestStatsRoundTrip(t *testing.T) {
	key := balancer.TargetKey{Group: "web", AddrPort: target}
	want := Stats{
		Targets:     map[balancer.TargetKey]relay.TargetStats{key: {Active: 1, New: 2, Failed: 3, Answered: 4, Bytes: 1 << 63}},
		Connections: 5, MaxConnections: 6, OpenFiles: 14, MaxFiles: 15, Accepted: 7, Refused: 8, Failed: 9, NoTarget: 10, IdleTimeouts: 11, Exhausted: 12, NoPort: 13,
	}
	a, b := pair(t)
	if err := a.send(frame{Stats: toWire(want)}, nil, nil); err != nil {
		t.Fatal(err)
	}
	m, err := b.receive(patience)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, m.Stats.stats(), values); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	twice := sum(want, want)
	if s := twice.Targets[key]; twice.Connections != 10 || twice.NoPort != 26 || twice.MaxConnections != 6 || twice.OpenFiles != 28 || twice.MaxFiles != 15 || s.Active != 2 || s.Bytes != 0 || s.New != 4 {
		t.Errorf("twice %+v", twice)
	}
	if gone := past(want); gone.Connections != 0 || gone.OpenFiles != 0 || gone.Targets[key].Active != 0 || gone.Targets[key].New != 2 || want.Targets[key].Active != 1 {
		t.Errorf("past %+v of %+v", gone, want)
	}
	if m := merge(Stats{}, want); m.Targets[key] != want.Targets[key] {
		t.Errorf("merged %+v", m)
	}
}

// TestMessage: a thousand services and their sockets, and many flows, arrive.
func TestMessage(t *testing.T) {
	const n = 1000
	table := web()
	files := make(sockets)
	defer files.close()
	for i := range n {
		at := netip.AddrPortFrom(vip, uint16(i+1))
		table.Services = append(table.Services, service(at, "web"))
		fd, err := unix.Eventfd(uint(i), unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		if err != nil {
			t.Fatal(err)
		}
		files[at] = fd
	}
	raw, err := encodeTable(table)
	if err != nil {
		t.Fatal(err)
	}
	flows := make([]Flow, 2*flowsPerFrame+1)
	for i := range flows {
		flows[i].Bytes = uint64(i)
	}
	a, b := pair(t)
	sent := make(chan error, 1)
	go func() { sent <- a.send(frame{Op: opConfigure, Table: raw, Flows: flows}, files, []link{a}) }()
	if _, err := b.receive(patience); err == nil || !strings.Contains(err.Error(), "names") {
		t.Errorf("a link without an elder: %v", err)
	}
	<-sent

	a, b = pair(t)
	go func() {
		sent <- a.send(frame{Op: opConfigure, Table: raw, Flows: flows, Elders: []elderInfo{{PID: 7}}}, files, []link{a})
	}()
	m, err := b.receive(patience)
	if err := errors.Join(err, <-sent); err != nil {
		t.Fatal(err)
	}
	defer m.close()
	if len(m.files) != n || len(m.Flows) != len(flows) || len(m.links) != 1 || m.Elders[0].PID != 7 || hash(m.Table) != hash(raw) {
		t.Fatalf("%d files, %d flows, %d links", len(m.files), len(m.Flows), len(m.links))
	}
	for at, fd := range m.files {
		var count [8]byte
		if _, err := unix.Read(fd, count[:]); err != nil && at.Port() != 1 {
			t.Fatalf("%s: %v", at, err)
		}
		if got := binary.NativeEndian.Uint64(count[:]); got != uint64(at.Port()-1) {
			t.Fatalf("%s came with the file of number %d", at, got)
		}
	}
	if flags, err := unix.FcntlInt(uintptr(m.links[0]), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("flags %x, error %v", flags, err)
	}
}

// packet is a frame as bytes.
func packet(body string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...)
}

// TestMalformed: what no worker sends is an error, and leaves no file open.
func TestMalformed(t *testing.T) {
	file := func(n int) []byte {
		fds := make([]int, n)
		for i := range fds {
			fds[i] = int(os.Stderr.Fd())
		}
		return unix.UnixRights(fds...)
	}
	tests := []struct {
		name, want string
		sent       []byte
		rights     []byte
	}{
		{"nothing", "EOF", nil, nil},
		{"half a length", "unexpected EOF", []byte{0, 0}, nil},
		{"half a length with a file", "unexpected EOF", []byte{0}, file(1)},
		{"half a frame", "unexpected EOF", packet(`{"op":"hello"}`)[:9], file(3)},
		{"no body", "unexpected EOF", []byte{0, 0, 0, 1}, nil},
		{"too long", "a frame of 67108865 bytes: more than 67108864", []byte{4, 0, 0, 1}, file(1)},
		{"longest, and half", "unexpected EOF", []byte{4, 0, 0, 0, '{'}, nil},
		{"no JSON", "malformed frame: invalid character 'h' looking for beginning of value", packet("hello"), file(2)},
		{"another type", "malformed frame: json: cannot unmarshal number into Go struct field frame.op of type string", packet(`{"op":1}`), nil},
		{"file without a name", "a frame with 1 files names 0", packet(`{}`), file(1)},
		{"most files", "a frame with 253 files names 0", packet(`{}`), file(scmMaxFD)},
		{"name without a file", "a frame with 0 files names 1", packet(`{"files":["198.51.100.10:80"]}`), nil},
		{"two names", "two files for 198.51.100.10:80", packet(`{"files":["198.51.100.10:80","198.51.100.10:80"]}`), file(2)},
		{"no address", "malformed frame: a file for no address", packet(`{"files":[""]}`), file(1)},
		{"more to come", "EOF", packet(`{"more":true,"files":["198.51.100.10:80"]}`), file(1)},
		{"elders in between", "malformed frame: elders before the last one", packet(`{"more":true,"elders":[{}]}`), file(1)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a, b := pair(t)
			if len(tt.sent) > 0 {
				if _, _, err := a.conn.WriteMsgUnix(tt.sent, tt.rights, nil); err != nil {
					t.Fatal(err)
				}
			}
			a.close()
			before := openFiles(t, os.Getpid())
			m, err := b.receive(patience)
			if err == nil || err.Error() != tt.want {
				t.Errorf("error %v, want %s", err, tt.want)
			}
			if m.files != nil || m.links != nil {
				t.Errorf("it came with files: %+v", m)
			}
			if now := openFiles(t, os.Getpid()); now != before {
				t.Errorf("%d open files, %d before", now, before)
			}
		})
	}
}

func FuzzReceive(f *testing.F) {
	f.Add(packet(`{"op":"hello"}`), uint8(0))
	f.Add(packet(`{"files":["198.51.100.10:80"]}`), uint8(1))
	f.Add(append(packet(`{"more":true}`), packet(`{"stats":{"Targets":[{"Group":"a"}]},"elders":[{"pid":1}]}`)...), uint8(1))
	raw, err := json.Marshal(frame{Op: opConfigure, Table: json.RawMessage(`{}`), Flows: []Flow{{Bytes: 1}}, Until: time.Unix(1, 0)})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(packet(string(raw)), uint8(2))
	f.Fuzz(func(t *testing.T, data []byte, files uint8) {
		if len(data) == 0 || len(data) > 32<<10 { // more would wait for a reader
			return
		}
		var rights []byte
		if n := int(files) % scmMaxFD; n > 0 {
			fds := make([]int, n)
			for i := range fds {
				fds[i] = 2
			}
			rights = unix.UnixRights(fds...)
		}
		var before, now int
		var err error
		for range 3 { // files of an earlier test may be closed meanwhile, but not each time
			a, b := pair(t)
			if _, _, err := a.conn.WriteMsgUnix(data, rights, nil); err != nil {
				t.Fatal(err)
			}
			a.close()
			before = openFiles(t, os.Getpid())
			var m message
			if m, err = b.receive(patience); err == nil {
				_, _ = decodeTable(m.Table)
				m.close()
			}
			if now = openFiles(t, os.Getpid()); now == before {
				return
			}
		}
		t.Errorf("%d open files, %d before, error %v", now, before, err)
	})
}

// briefly is how long elders in tests are waited for that do not answer.
const briefly = time.Millisecond

// TestSilentElder: one that does not answer is not asked again, and what it
// counted counts on.
func TestSilentElder(t *testing.T) {
	ours, _ := pair(t)
	es := elders{waits: elderWaits{answer: briefly, counts: briefly, lost: briefly}, log: zap.NewNop()}
	es.add(newElder(ours, 7, Stats{Accepted: 3, Connections: 2}))
	es.configure(frame{Generation: 1})
	es.wait()
	if s := es.stats(); s.Accepted != 3 || s.Connections != 0 || len(es.list()) != 0 {
		t.Errorf("stats %+v, %d elders", s, len(es.list()))
	}
}

// TestSlowElder: nobody waits for long for one that is slow to answer, but it
// follows, to the latest table, and counts.
func TestSlowElder(t *testing.T) {
	ours, theirs := pair(t)
	es := elders{waits: elderWaits{counts: briefly, answer: briefly, lost: waitAtMost}, log: zap.NewNop()}
	es.add(newElder(ours, 7, Stats{Accepted: 3, Connections: 2}))
	hears := func(op string, generation uint64) {
		t.Helper()
		m, err := theirs.receive(waitAtMost)
		if err != nil || m.Op != op || m.Generation != generation {
			t.Fatalf("it was asked for %q of generation %d, error %v; want %q, %d", m.Op, m.Generation, err, op, generation)
		}
	}
	says := func(f frame) {
		t.Helper()
		if err := theirs.send(f, nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	counts := func(when string, accepted, connections uint64, all int) {
		t.Helper()
		if s := es.stats(); s.Accepted != accepted || s.Connections != connections || len(es.list()) != all {
			t.Errorf("%s: stats %+v, %d elders", when, s, len(es.list()))
		}
	}

	es.configure(frame{Generation: 1})
	hears(opConfigure, 1)
	counts("it is slow", 3, 2, 1)
	es.configure(frame{Generation: 2})
	es.configure(frame{Generation: 3})
	if infos, links := es.handOver(); len(infos)+len(links) > 0 || len(es.list()) != 1 {
		t.Errorf("with an answer on its way it was handed over: %+v", infos)
	}
	says(frame{})
	hears(opConfigure, 3)
	says(frame{Error: "too few files"})
	es.wait()

	es.waits.counts = waitAtMost
	answered := make(chan error, 1)
	go func() {
		_, err := theirs.receive(waitAtMost)
		answered <- errors.Join(err, theirs.send(frame{Stats: toWire(Stats{Accepted: 5, Connections: 1})}, nil, nil))
	}()
	counts("it refused a table", 5, 1, 1)
	if err := <-answered; err != nil {
		t.Error(err)
	}
	theirs.close()
	counts("it is gone", 5, 0, 0)
}

// A crowdedLock says when somebody has to wait for it.
type crowdedLock struct {
	sync.Mutex
	waits chan struct{}
}

func (l *crowdedLock) Lock() {
	if l.TryLock() {
		return
	}
	l.waits <- struct{}{}
	l.Mutex.Lock()
}

// TestBequeath: a successor that comes while a table is taken over gets that one,
// with its sockets.
func TestBequeath(t *testing.T) {
	e := &fakeEngine{}
	w := newWorker(WorkerOptions{Log: zap.NewNop()}, e)
	t.Cleanup(func() { w.sockets.close() })
	changing := &crowdedLock{waits: make(chan struct{}, 1)}
	w.changing = changing
	answers := make(chan answer, 1)
	e.configured = func() {
		go func() {
			a, err := w.act(link{}, message{frame: frame{Op: opTakeover}})
			if err != nil {
				t.Error(err)
			}
			answers <- a
		}()
		select {
		case a := <-answers:
			t.Error("the successor was answered in the middle of a change")
			answers <- a
		case <-changing.waits:
		}
	}
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	want := mustEncode(t, web(80))
	if err := w.configure(message{frame: frame{Table: want}, files: sockets{netip.AddrPortFrom(vip, 80): fd}}); err != nil {
		t.Fatal(err)
	}
	a := <-answers
	defer a.close()
	if string(a.Table) != string(want) || len(a.files) != 1 {
		t.Errorf("the successor got the table %q and %d sockets", a.Table, len(a.files))
	}
}

// A fakeEngine has as many connections as it is told.
type fakeEngine struct {
	connections uint64
	done        chan struct{}
	configured  func() // if not nil
}

func (e *fakeEngine) Run(ctx context.Context) error { <-ctx.Done(); return nil }
func (e *fakeEngine) Configure(_ *balancer.Table, files map[netip.AddrPort]*os.File) error {
	for _, f := range files {
		_ = f.Close()
	}
	if e.configured != nil {
		e.configured()
	}
	return nil
}
func (e *fakeEngine) Retire(time.Time)      { close(e.done) }
func (e *fakeEngine) Done() <-chan struct{} { return e.done }
func (e *fakeEngine) Stats() relay.Stats    { return relay.Stats{Connections: e.connections} }
func (e *fakeEngine) Flows() []relay.Flow   { return nil }

// TestIdle: ten seconds without a service and without a connection are enough.
func TestIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := &fakeEngine{connections: 1, done: make(chan struct{})}
		w := newWorker(WorkerOptions{Log: zap.NewNop()}, e)
		ctx, cancel := context.WithCancel(t.Context())
		w.end = cancel
		begun := time.Now()
		ended := make(chan time.Duration, 1)
		go func() { w.watchIdle(ctx); ended <- time.Since(begun) }()
		lives := func(when string) {
			t.Helper()
			synctest.Wait()
			if ctx.Err() != nil {
				t.Errorf("%s: it ended", when)
			}
		}
		bubble.Pass(time.Minute)
		lives("with a connection")
		e.connections = 0
		if err := w.configure(message{frame: frame{Table: mustEncode(t, web(80))}}); err != nil {
			t.Fatal(err)
		}
		bubble.Pass(time.Minute)
		lives("with a service")
		if err := w.configure(message{frame: frame{Table: mustEncode(t, web())}}); err != nil {
			t.Fatal(err)
		}
		bubble.Pass(idleFor - time.Second)
		lives("not long enough")
		if after := <-ended; after != 2*time.Minute+idleFor {
			t.Errorf("it ended after %v", after)
		}
		if a := w.answer(link{new(net.UnixConn)}, message{frame: frame{Op: opConfigure}}); !a.Leaving {
			t.Errorf("a late request: %+v", a)
		}
	})
}

func mustEncode(t *testing.T, table *balancer.Table) []byte {
	t.Helper()
	raw, err := encodeTable(table)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// TestHostile: a worker survives any peer, and lets in only whom it should.
func TestHostile(t *testing.T) {
	r := newRig(t)
	serveTarget(t)
	converge(t, r.Manager, web(80))
	pid := r.hello().PID
	before := openFiles(t, pid)

	send := func(data []byte, fds ...int) link {
		t.Helper()
		l, err := dial(t.Context(), r.socket)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(l.close)
		if _, _, err := l.conn.WriteMsgUnix(data, unix.UnixRights(fds...), nil); err != nil {
			t.Fatal(err)
		}
		return l
	}
	stderr := int(os.Stderr.Fd())
	send([]byte{0, 0}, stderr).close()
	send(packet(`{"op":"hello"}`)[:7], stderr).close()
	send([]byte{255, 255, 255, 255, 1})
	send(packet("nonsense"), stderr)
	send(packet(`{"op":"configure","files":["198.51.100.10:81"]}`), stderr, stderr)
	slow := send([]byte{0, 0, 0, 9, '{'}, stderr) // and no more

	refused := map[string]string{
		`{"op":"dance"}`: `unknown request "dance"`,
		`{"op":"configure","table":{"Services":7}}`:                                      `table: json: cannot unmarshal number into Go struct field Table.Services of type []balancer.VirtualService`,
		`{"op":"configure","table":{"Pools":[{"ClientIP":"magic"}]}}`:                    `table: "magic" is not one of preserve, hairpin_snat, snat or proxy_protocol_v2`,
		`{"op":"configure","table":` + string(mustEncode(t, web(81))) + `}`:              `relay: no listener for 198.51.100.10:81`,
		`{"op":"configure","files":["198.51.100.10:81"],"table":` + tableOf(t, 81) + `}`: `relay: listener for 198.51.100.10:81: socket operation on non-socket`,
	}
	for request, want := range refused {
		var fds []int
		if strings.Contains(request, `"files"`) {
			fds = []int{eventfd(t)}
		}
		l := send(packet(request), fds...)
		m, err := l.receive(patience)
		if err != nil || !strings.Contains(m.Error, want) {
			t.Errorf("%s: answer %q, error %v, want %q", request, m.Error, err, want)
		}
		l.close()
	}
	if err := visit(t.Context(), 80); err != nil {
		t.Error(err)
	}
	slow.close()
	wait.Until(t, waitAtMost, "as many open files as before", func() bool { return openFiles(t, pid) <= before })

	// Even where the file's mode lets everybody in, the worker does not.
	if err := errors.Join(os.Chmod(r.socket, 0o666), chmodAll(r.socket)); err != nil {
		t.Fatal(err)
	}
	knock := exec.CommandContext(t.Context(), "/proc/self/exe", "knock", r.socket)
	knock.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if out, err := knock.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("nobody: %s, error %v", out, err)
	}
	wait.Until(t, waitAtMost, "a word about it", func() bool {
		said, err := os.ReadFile(r.output.Name())
		return err == nil && strings.Contains(string(said), "may not control the relay")
	})
	if r.hello().PID != pid {
		t.Error("it is another worker")
	}
}

func tableOf(t *testing.T, ports ...uint16) string { return string(mustEncode(t, web(ports...))) }

func eventfd(t *testing.T) int {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

// chmodAll lets everybody walk to a file in a temporary folder.
func chmodAll(path string) error {
	var errs []error
	for dir := path[:strings.LastIndexByte(path, '/')]; dir != os.TempDir(); dir = dir[:strings.LastIndexByte(dir, '/')] {
		errs = append(errs, os.Chmod(dir, 0o755))
	}
	return errors.Join(errs...)
}

// TestBind says in words why nobody can listen.
func TestBind(t *testing.T) {
	r := newRig(t)
	l, err := net.Listen("tcp4", "0.0.0.0:80")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	comm, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		t.Fatal(err)
	}
	program := fmt.Sprintf("%s, pid %d", strings.TrimSpace(string(comm)), os.Getpid())
	want := fmt.Sprintf("198.51.100.10:80: a program on this host listens on 0.0.0.0:80 (%s): address already in use", program)
	table := web(80, 81)
	if _, err := r.Opener().Plan(t.Context(), &balancer.Desired{Table: table}); err == nil || err.Error() != want {
		t.Errorf("plan: error %v\nwant %s", err, want)
	}
	if _, err := r.open(table); err == nil || err.Error() != want || len(r.sockets) != 0 {
		t.Errorf("open: error %v, sockets %v\nwant %s", err, r.sockets, want)
	}

	// Nobody has this address, nor need anybody; IPv4 and IPv6 do not meet.
	six := netip.AddrPortFrom(vip6, 80)
	fd, err := listen(six)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(fd) }()
	want = fmt.Sprintf("[2001:db8::10]:80: a program on this host listens on [2001:db8::10]:80 (%s): address already in use", program)
	if err := bindable(six); err == nil || err.Error() != want {
		t.Errorf("error %v\nwant %s", err, want)
	}
	options := []struct{ level, option, want int }{
		{unix.SOL_SOCKET, unix.SO_PROTOCOL, unix.IPPROTO_TCP}, {unix.SOL_SOCKET, unix.SO_ACCEPTCONN, 1},
		{unix.SOL_SOCKET, unix.SO_REUSEADDR, 1}, {unix.SOL_IPV6, unix.IPV6_V6ONLY, 1}, {unix.SOL_IPV6, unix.IPV6_FREEBIND, 1},
	}
	for _, o := range options {
		if got, err := unix.GetsockoptInt(fd, o.level, o.option); err != nil || got != o.want {
			t.Errorf("option %d of level %d is %d, error %v", o.option, o.level, got, err)
		}
	}
	if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK == 0 {
		t.Errorf("flags %x, error %v", flags, err)
	}
}

func FuzzParseListener(f *testing.F) {
	f.Add("   0: 0100007F:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0000000000000000 100 0 0 10 0")
	f.Add("   0: B80D0120000000000000000010000000:0050 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 12")
	f.Fuzz(func(t *testing.T, line string) {
		if l, ok := parseListener(line); ok && !l.at.IsValid() {
			t.Errorf("%q is %v", line, l)
		}
	})
}
