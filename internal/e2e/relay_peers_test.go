package e2e

import (
	"bufio"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"nlb/balancer"
	"nlb/bench/lab"
	"nlb/internal/wait"
)

// headerNginxConfig says whom a header named. %[1]s is a folder of its own.
const headerNginxConfig = `
daemon off;
master_process off;
pid %[1]s/pid;
error_log stderr;
events {}
http {
	access_log off;
	client_body_temp_path %[1]s/body;
	proxy_temp_path %[1]s/proxy;
	fastcgi_temp_path %[1]s/fastcgi;
	uwsgi_temp_path %[1]s/uwsgi;
	scgi_temp_path %[1]s/scgi;
	server {
		listen 8080 proxy_protocol;
		listen [::]:8080 proxy_protocol;
		location / { return 200 "$proxy_protocol_addr $proxy_protocol_port\n"; }
	}
	server {
		listen 8090;
		listen [::]:8090;
		location / { return 200 "$remote_addr $remote_port\n"; }
	}
}
`

const headerHAProxyConfig = `
global
	log stderr local0
defaults
	mode http
	timeout client 20s
	timeout server 20s
	timeout connect 5s
frontend strict
	bind :8081 accept-proxy
	bind [::]:8081 v6only accept-proxy
	http-request return status 200 content-type text/plain lf-string "%[src] %[src_port]\n"
`

// httpPool is a relayed group of HTTP servers that want headers.
func httpPool(name string, port uint16, of []target) group {
	g := relayed(name, port, of)
	g.HealthCheck["protocol"], g.HealthCheck["path"], g.HealthCheck["proxy_protocol"] = "HTTP", "/", "local"
	return g
}

// runNginx and runHAProxy run on a node until the test ends.
func runNginx(t *testing.T, n *lab.Node) {
	t.Helper()
	dir := t.TempDir()
	daemonize(t, n, "nginx", "-p", dir, "-c", configured(t, dir, fmt.Sprintf(headerNginxConfig, dir)))
}

func runHAProxy(t *testing.T, n *lab.Node) {
	t.Helper()
	daemonize(t, n, "haproxy", "-db", "-f", configured(t, t.TempDir(), headerHAProxyConfig))
}

func configured(t *testing.T, dir, text string) string {
	t.Helper()
	file := filepath.Join(dir, "config")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// TestRelayPeers has servers that are not ours for targets, each of which says
// whom the header named: the client by its address and port, whatever the
// connection to the server looks like.
func TestRelayPeers(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Targets: 1})
	client, server := top.Clients[0], top.Targets[0]
	runNginx(t, server)
	runHAProxy(t, server)
	ids := &uniqueIDs{seen: map[string]bool{}}
	for _, port := range []uint16{8082, 8083} {
		answerHeaded(t, server, port, func(h *headed) { ids.answer(t, h) })
	}
	strict, four := relayed("strict", 8082, targets(server)), relayed("four", 8083, []target{{Address: server.Addr4}})
	for _, g := range []*group{&strict, &four} {
		g.Header = map[string]any{"crc32c": true, "unique_id": true}
	}
	c := config{Sources: sources(top), VIPs: both()}
	for i, g := range []group{httpPool("nginx", 8080, targets(server)), httpPool("haproxy", 8081, targets(server)), strict, four} {
		c.Groups = append(c.Groups, g)
		c.Listeners = append(c.Listeners, listen(g.Name, "TCP", uint16(80+i), g.Name)...)
	}
	serving(t, top, c)

	for _, f := range families {
		for port, name := range map[uint16]string{80: "nginx", 81: "haproxy"} {
			url := fmt.Sprintf("http://%v/", f.at(port))
			for range 3 {
				curled(t, client, name, url)
			}
			curled(t, client, name, url, url, url)
		}
		const calls = 20
		for port, peer := range map[uint16]netip.Addr{82: f.addr(top.LB), 83: top.LB.Addr4} {
			for range calls {
				conn := connect(t, client, f, port)
				got, err := bufio.NewReader(conn).ReadString('\n')
				if want := fmt.Sprintln(local(conn), f.at(port), peer); err != nil || got != want {
					t.Fatalf("port %d: got %q, want %q: %v", port, got, want, err)
				}
				_ = conn.Close()
			}
		}
		t.Logf("IPv%s: nginx and HAProxy named the client 6 times each, once and kept alive, go-proxyproto %d times, over IPv%s and over IPv4", f.name, calls, f.name)
	}
	if want := len(families) * 2 * 20; len(ids.seen) != want {
		t.Errorf("%d connections had %d different ids", want, len(ids.seen))
	}
}

// curled asks for each URL on one connection, and fails the test unless each
// answer names it.
func curled(t *testing.T, client *lab.Node, name string, urls ...string) {
	t.Helper()
	args := append([]string{"curl", "--silent", "--show-error", "--fail", "--max-time", "10", "--globoff",
		"--write-out", "%{local_ip} %{local_port}\n%{num_connects}\n"}, urls...)
	lines := strings.Split(strings.TrimSpace(must(t, client, args...)), "\n")
	for i := range urls {
		if len(lines) < 3*(i+1) {
			t.Fatalf("%s: %q", name, lines)
		}
		said, is, connects := lines[3*i], lines[3*i+1], lines[3*i+2]
		if said != is {
			t.Errorf("%s was told %s, and %s called", name, said, is)
		}
		if fresh := i == 0; connects != map[bool]string{true: "1", false: "0"}[fresh] {
			t.Errorf("%s: request %d made %s connections", name, i, connects)
		}
	}
}

// uniqueIDs are those that headers had.
type uniqueIDs struct {
	mu   sync.Mutex
	seen map[string]bool // guarded by mu
}

// answer says whom a header named, and who called.
func (u *uniqueIDs) answer(t *testing.T, h *headed) {
	if err := h.checksum(); err != nil {
		t.Error(err)
	}
	all, err := h.tlvs()
	if err != nil {
		t.Error(err)
	}
	const uniqueID = 0x05
	if id := all[uniqueID]; len(id) == 0 {
		t.Errorf("no id in % x", h.raw)
	} else {
		u.mu.Lock()
		u.seen[string(id)] = true
		u.mu.Unlock()
	}
	_, _ = fmt.Fprintln(h, h.from, h.to, h.peer) // the client looks what comes of it
}

// TestRelayHairpin has targets that are their own clients, and clients on the
// target's own node.
func TestRelayHairpin(t *testing.T) {
	t.Parallel()
	top := made(t, lab.PodNode, lab.Options{})
	serveHeaders(t, top.Targets, 8080)
	self, neighbour, node, stranger := top.Targets[0], top.Targets[1], top.Hosts[0], top.Targets[2]
	serving(t, top, relaying(top, 80, relayed("self", 8080, targets(self))))
	for _, f := range families {
		for _, from := range []*lab.Node{self, neighbour, node, stranger, top.Clients[0]} {
			got := replies(t, from, lab.Call{Network: "tcp", Dst: f.at(80), N: 10, Parallel: 5})
			named(t, fmt.Sprint("IPv", f.name, " from ", from.Name), got, f.addr(top.LB))
			t.Logf("IPv%s: %d connections of %s were served, and named", f.name, len(got), from.Name)
		}
	}
}

// TestRelayVerify asks nginx, with and without proxy_protocol, before the mode of
// its group is changed, and reads plan and status about it.
func TestRelayVerify(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Targets: 1})
	client, server := top.Clients[0], top.Targets[0]
	runNginx(t, server)
	plain := pool("plain", "TCP", "snat", 8090, targets(server))
	plain.HealthCheck["protocol"] = "HTTP"
	strict := httpPool("strict", 8080, targets(server))
	strict.ClientIP = "snat"
	nobody := pool("nobody", "TCP", "snat", 8099, targets(server))
	c := config{Sources: sources(top), VIPs: both(),
		Listeners: append(listen("strict", "TCP", 80, "strict"), listen("plain", "TCP", 81, "plain")...),
		Groups:    []group{plain, strict, nobody},
	}
	d := start(t, top, c.String())
	d.waitHealthy("strict", len(families))
	d.expect([]expectation{
		{"verify strict -c FILE", 0, `(?m)^10\.0\.1\.11:8080 +required`, ""},
		{"verify strict -c FILE -o json", 0, `"verdict": "required"`, ""},
		{"verify plain -c FILE", 1, `(?m)^\[2001:db8:1::11\]:8090 +refused`, ""},
		{"verify nobody -c FILE", 1, `(?m)^10\.0\.1\.11:8099 +unreachable`, ""},
		{"verify missing -c FILE", 1, "", `has no target group "missing"`},
		{"verify -c FILE", 2, "", `one target group`},
	}...)

	const note = `(?m)^# note: target group strict: 2 targets begin to get PROXY v2 headers`
	c.Groups[1].ClientIP = "proxy_protocol_v2"
	d.write(c.String())
	d.expect([]expectation{{"plan -c FILE --socket SOCKET --state-dir STATE", 2, note, ""}}...)
	if err := d.reload(c.String()); err != nil {
		t.Fatal(err)
	}
	d.expect([]expectation{{"plan -c FILE --socket SOCKET --state-dir STATE", 0, "", ""}}...)
	d.waitHealthy("strict", len(families))
	for _, f := range families {
		curled(t, client, "nginx", fmt.Sprintf("http://%v/", f.at(80)))
	}

	// Connections that stay are active flows; nothing but their bytes is counted.
	var request = []byte("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	before := d.group("strict")
	for _, f := range families {
		conn := connect(t, client, f, 80)
		answer := make([]byte, 12)
		if _, err := conn.Write(request); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Read(answer); err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 200") {
			t.Fatalf("%q: %v", answer, err)
		}
	}
	wait.For(t, limit, "counts of relayed flows", func() error {
		now := d.group("strict")
		if now.ClientIP != balancer.ProxyProtocolV2 {
			return fmt.Errorf("the mode is %v", now.ClientIP)
		}
		for i, x := range now.Targets {
			was := before.Targets[i]
			if x.ActiveFlows == nil || *x.ActiveFlows != 1 || *x.NewFlowsTotal != *was.NewFlowsTotal+1 ||
				*x.BytesTotal < *was.BytesTotal+uint64(len(request))+100 {
				return fmt.Errorf("%v has %v active, %v new and %v bytes, before %v and %v", x.AddrPort(),
					value(x.ActiveFlows), value(x.NewFlowsTotal), value(x.BytesTotal), value(was.NewFlowsTotal), value(was.BytesTotal))
			}
		}
		return nil
	})
}

func value(n *uint64) string {
	if n == nil {
		return "no"
	}
	return fmt.Sprint(*n)
}
