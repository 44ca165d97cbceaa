package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"nlb/bench/lab"
	"nlb/internal/wait"
)

// nginxConfig answers every request and logs whom it saw. %[1]s is a folder of its own.
const nginxConfig = `
daemon off;
master_process off;
pid %[1]s/pid;
error_log stderr;
events {}
http {
	log_format seen '$uri $remote_addr';
	access_log %[1]s/access.log seen;
	client_body_temp_path %[1]s/body;
	proxy_temp_path %[1]s/proxy;
	fastcgi_temp_path %[1]s/fastcgi;
	uwsgi_temp_path %[1]s/uwsgi;
	scgi_temp_path %[1]s/scgi;
	server {
		listen 8080;
		listen [::]:8080;
		location / { return 200 "hello\n"; }
	}
}
`

// TestNginx has nginx for a target, checked by HTTP, and curl for a client: its
// access log has whom it saw.
func TestNginx(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Targets: 1})
	client, target := top.Clients[0], top.Targets[0]
	dir := t.TempDir()
	file := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(file, fmt.Appendf(nil, nginxConfig, dir), 0o600); err != nil {
		t.Fatal(err)
	}
	daemonize(t, target, "nginx", "-p", dir, "-c", file)
	modes := map[string]func(family) netip.Addr{
		"preserve": func(f family) netip.Addr { return f.addr(client) },
		"snat":     func(f family) netip.Addr { return f.addr(top.LB) },
	}
	ports := map[string]uint16{"preserve": 81, "snat": 82}
	c := config{Sources: sources(top), VIPs: both()}
	for mode := range modes {
		g := pool(mode, "TCP", mode, 8080, targets(target))
		g.HealthCheck["protocol"], g.HealthCheck["path"] = "HTTP", "/health"
		c.Groups = append(c.Groups, g)
		c.Listeners = append(c.Listeners, listen(mode, "TCP", ports[mode], mode)...)
	}
	serving(t, top, c)

	var want []string
	for mode, sees := range modes {
		for _, f := range families {
			url := fmt.Sprintf("http://%v/%s%s", f.at(ports[mode]), mode, f.name)
			if got := must(t, client, "curl", "--silent", "--show-error", "--fail", "--max-time", "10", "--globoff", url); got != "hello\n" {
				t.Errorf("%s: %q", url, got)
			}
			want = append(want, fmt.Sprintf("/%s%s %v", mode, f.name, sees(f)))
		}
	}
	slices.Sort(want)
	wait.For(t, limit, "nginx's log", func() error {
		text, err := os.ReadFile(filepath.Join(dir, "access.log"))
		if err != nil {
			return err
		}
		got := slices.DeleteFunc(strings.Split(strings.TrimSpace(string(text)), "\n"), func(line string) bool {
			return strings.HasPrefix(line, "/health ")
		})
		slices.Sort(got)
		if !slices.Equal(got, want) {
			return fmt.Errorf("got %q, want %q", got, want)
		}
		return nil
	})
}

// TestBulk moves some hundred megabytes in each direction, with clients preserved.
func TestBulk(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Targets: 1})
	target := top.Targets[0]
	iperf(t, target)
	// iperf3 serves one client at a time, and would take a probe for one.
	serveTargets(t, top, 8080)
	g := pool("bulk", "TCP", "preserve", iperfPort, targets(target))
	g.HealthCheck["port"] = 8080
	serving(t, top, config{Sources: sources(top), VIPs: both(), Listeners: listen("bulk", "TCP", 81, "bulk"), Groups: []group{g}})
	for _, f := range families {
		transfer(t, top.Clients[0], f, 81, "256M")
	}
}

const iperfPort = 5201

// iperf runs an iperf3 server on a node until the test ends.
func iperf(t *testing.T, n *lab.Node) {
	t.Helper()
	daemonize(t, n, "iperf3", "-s", "-p", fmt.Sprint(iperfPort))
	wait.For(t, limit, "iperf3", func() error {
		listening, err := tool(t, n, "ss", "-Hltn", fmt.Sprint("sport = ", iperfPort))
		if err == nil && listening == "" {
			err = fmt.Errorf("nobody listens on %d", iperfPort)
		}
		return err
	})
}

// transfer moves so many bytes to the VIP's port with iperf3, and then from it.
func transfer(t *testing.T, client *lab.Node, f family, port uint16, bytes string) {
	t.Helper()
	upload := []string{"iperf3", "-" + f.name, "-c", f.vip.String(), "-p", fmt.Sprint(port), "--connect-timeout", "3000", "-n", bytes}
	must(t, client, upload...)
	must(t, client, append(upload, "--reverse")...)
}

// daemonize runs a program on a node until the test ends, and shows what it said
// if the test failed.
func daemonize(t *testing.T, n *lab.Node, argv ...string) {
	t.Helper()
	var out logBuffer
	cmd := n.Command(t.Context(), argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // it was killed
		if t.Failed() {
			t.Logf("%s:\n%s", argv[0], &out)
		}
	})
}
