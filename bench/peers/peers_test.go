package peers

import (
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nlb/internal/nstest"
)

// Not on the host: nginx opens its sockets even to check a file.
func TestMain(m *testing.M) { os.Exit(nstest.Main(m)) }

var (
	listeners = []Listener{
		{netip.MustParseAddrPort("198.51.100.10:80"), []netip.AddrPort{netip.MustParseAddrPort("10.1.0.1:8080"), netip.MustParseAddrPort("10.1.0.2:8080")}},
		{netip.MustParseAddrPort("[2001:db8:77::10]:81"), []netip.AddrPort{netip.MustParseAddrPort("[2001:db8:1::11]:8080")}},
	}
	check = &Check{Port: 9000, Interval: time.Second, Timeout: 500 * time.Millisecond, Fall: 1, Rise: 2}
)

const haproxyHead = `global
    nbthread 1
    maxconn 3000
    stats socket SOCKET mode 600 level admin expose-fd listeners
defaults
    mode tcp
`

const haproxyPlain = haproxyHead + `    timeout connect 5000ms
    timeout client 60s
    timeout server 60s
    option redispatch 1
listen bench-0
    bind 198.51.100.10:80
    server t0 10.1.0.1:8080
    server t1 10.1.0.2:8080
listen bench-1
    bind [2001:db8:77::10]:81
    server t0 [2001:db8:1::11]:8080
`

const haproxyAll = haproxyHead + `    timeout connect 1000ms
    timeout client 60s
    timeout server 60s
    option redispatch 1
    option splice-request
    option splice-response
    timeout check 500ms
    default-server inter 1000ms fall 1 rise 2 port 9000
listen bench-0
    bind 198.51.100.10:80
    server t0 10.1.0.1:8080 send-proxy-v2 check
    server t1 10.1.0.2:8080 send-proxy-v2 check
`

const nginxHead = `load_module MODULE;
daemon off;
user root;
worker_processes 1;
worker_rlimit_nofile 16384;
error_log stderr;
pid PIDFILE;
events { worker_connections 8192; }
stream {
    access_log off;
`

const nginxPlain = nginxHead + `    upstream bench-0 {
        server 10.1.0.1:8080 max_fails=1 fail_timeout=10s;
        server 10.1.0.2:8080 max_fails=1 fail_timeout=10s;
    }
    server { listen 198.51.100.10:80 backlog=4096; proxy_pass bench-0; }
    upstream bench-1 {
        server [2001:db8:1::11]:8080 max_fails=1 fail_timeout=10s;
    }
    server { listen [2001:db8:77::10]:81 backlog=4096; proxy_pass bench-1; }
}
`

const nginxAll = nginxHead + `    proxy_connect_timeout 1000ms;
    proxy_protocol on;
    upstream bench-0 {
        server 10.1.0.1:8080 max_fails=1 fail_timeout=10s;
        server 10.1.0.2:8080 max_fails=1 fail_timeout=10s;
    }
    server { listen 198.51.100.10:80 backlog=4096; proxy_pass bench-0; }
}
`

func TestConfig(t *testing.T) {
	for _, c := range []struct{ name, got, want string }{
		{"HAProxy", HAProxy{Listeners: listeners, Socket: "SOCKET"}.Config(), haproxyPlain},
		{"HAProxy with all", HAProxy{Listeners: listeners[:1], SendProxy: true, Splice: true, Check: check, Connect: time.Second, Socket: "SOCKET"}.Config(), haproxyAll},
		{"nginx", Nginx{Listeners: listeners, Module: "MODULE", PIDFile: "PIDFILE"}.Config(), nginxPlain},
		{"nginx with all", Nginx{Listeners: listeners[:1], SendProxy: true, Connect: time.Second, Module: "MODULE", PIDFile: "PIDFILE"}.Config(), nginxAll},
	} {
		if diff := cmp.Diff(c.want, c.got); diff != "" {
			t.Errorf("%s: %s", c.name, diff)
		}
	}
}

// TestProgramsUnderstand asks the programs themselves.
func TestProgramsUnderstand(t *testing.T) {
	for _, family := range []string{"ipv4", "ipv6"} { // so that the addresses may be missing
		if err := os.WriteFile("/proc/sys/net/"+family+"/ip_nonlocal_bind", []byte("1"), 0); err != nil {
			t.Fatal(err)
		}
	}
	module, err := StreamModule()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file, socket := filepath.Join(dir, "config"), filepath.Join(dir, "socket")
	for _, c := range []struct {
		name, config string
		command      []string
		dry          string // the option that only checks
	}{
		{"HAProxy", HAProxy{Listeners: listeners, Socket: socket}.Config(), HAProxy{}.Command("haproxy", file), "-c"},
		{"HAProxy with all", HAProxy{Listeners: listeners, SendProxy: true, Splice: true, Check: check, Connect: time.Second, Socket: socket}.Config(), HAProxy{}.Command("haproxy", file), "-c"},
		{"nginx", Nginx{Listeners: listeners, Module: module, PIDFile: filepath.Join(dir, "pid")}.Config(), Nginx{}.Command("nginx", file), "-t"},
		{"nginx with all", Nginx{Listeners: listeners, SendProxy: true, Connect: time.Second, Module: module, PIDFile: filepath.Join(dir, "pid")}.Config(), Nginx{}.Command("nginx", file), "-t"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := os.WriteFile(file, []byte(c.config), 0o600); err != nil {
				t.Fatal(err)
			}
			out, err := exec.CommandContext(t.Context(), c.command[0], append(c.command[1:], c.dry)...).CombinedOutput()
			if err != nil {
				t.Errorf("%v: %s\n%s", err, out, c.config)
			}
		})
	}
}
