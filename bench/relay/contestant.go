package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"nlb/bench/lab"
	"nlb/bench/measure"
)

// A contestant is one way from the client to the target.
type contestant struct {
	name    string
	version version // of the header that the target gets
	// tracked says that the kernel is to track relayed connections in the balancer's
	// namespace, which nlb's table makes it do, and no other contestant must pay.
	tracked bool
	// start makes the balancer's command; nil where there is none.
	start func(*site, *options) (*exec.Cmd, error)
}

const (
	direct        = "no balancer, a router"
	nlb           = "nlb"
	nlbUntracked  = "nlb, untracked"
	engine        = "nlb's relay alone, no nft"
	haproxy       = "HAProxy"
	haproxySplice = "HAProxy, splice"
	nginx         = "nginx stream (v1)"
)

// The first one is without a balancer: the others are measured by it.
var contestants = []contestant{
	{name: direct},
	{name: nlb, version: v2, tracked: true, start: startNLB},
	{name: nlbUntracked, version: v2, start: startNLB},
	{name: engine, version: v2, start: startEngine},
	{name: haproxy, version: v2, start: func(s *site, o *options) (*exec.Cmd, error) { return startHAProxy(s, o, "") }},
	{name: haproxySplice, version: v2, start: func(s *site, o *options) (*exec.Cmd, error) {
		return startHAProxy(s, o, "    option splice-request\n    option splice-response\n")
	}},
	{name: nginx, version: v1, start: startNginx},
}

func startNLB(s *site, o *options) (*exec.Cmd, error) {
	config := s.Config(measure.Forwarding{Protocol: "TCP", ClientIP: "proxy_protocol_v2", Untracked: !s.tracked, Listeners: 1})
	cmd, err := s.NLB(o.nlb, config)
	if err != nil {
		return nil, err
	}
	return alone(cmd), nil
}

// startEngine has this program run nlb's relay, without the rest of nlb and so
// without its table: the difference is what the table costs.
func startEngine(s *site, _ *options) (*exec.Cmd, error) {
	if err := s.addVIP(); err != nil {
		return nil, err
	}
	cmd := s.command("/proc/self/exe")
	cmd.Env = append(os.Environ(), fmt.Sprint(engineVariable, "=", lab.VIP4, " ", s.Targets[0].Addr4, " ", s.LB.Addr4))
	return cmd, nil
}

// haproxyConfig is HAProxy as its documentation recommends for TCP: one process,
// no log, and more connections than there will be (bounded by the usual limit of
// descriptors, of which a spliced connection needs six).
const haproxyConfig = `global
    nbthread 1
    maxconn 3000
defaults
    mode tcp
    timeout connect 5s
    timeout client 60s
    timeout server 60s
OPTIONS
listen bench
    bind VIP:80
    server target T0:80 send-proxy-v2
`

func startHAProxy(s *site, o *options, splice string) (*exec.Cmd, error) {
	if err := s.addVIP(); err != nil {
		return nil, err
	}
	config, err := s.Write("haproxy.cfg", strings.Replace(s.Expand(haproxyConfig), "OPTIONS\n", splice, 1))
	if err != nil {
		return nil, err
	}
	return s.command(o.haproxy, "-db", "-f", config), nil
}

const nginxConfig = `load_module MODULE;
daemon off;
user root;
worker_processes 1;
error_log stderr;
pid PID;
events { worker_connections 8192; }
stream {
    access_log off;
    server {
        listen VIP:80 backlog=4096;
        proxy_pass T0:80;
        proxy_protocol on;
    }
}
`

// streamModules are where distributions put nginx's module.
var streamModules = []string{"/usr/lib/nginx/modules/ngx_stream_module.so", "/usr/lib64/nginx/modules/ngx_stream_module.so"}

func startNginx(s *site, o *options) (*exec.Cmd, error) {
	if err := s.addVIP(); err != nil {
		return nil, err
	}
	module, err := streamModule()
	if err != nil {
		return nil, err
	}
	text := strings.NewReplacer("MODULE", module, "PID", s.Path("nginx.pid")).Replace(s.Expand(nginxConfig))
	config, err := s.Write("nginx.conf", text)
	if err != nil {
		return nil, err
	}
	return s.command(o.nginx, "-p", s.Path(""), "-e", "stderr", "-c", config), nil
}

func streamModule() (string, error) {
	for _, path := range streamModules {
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("needs nginx's stream module: apt-get install libnginx-mod-stream: there is none of %s", strings.Join(streamModules, ", "))
}

func (s *site) addVIP() error { return s.LB.Address("lo", netip.PrefixFrom(lab.VIP4, 32)) }

// command is a program in the balancer's namespace. Its life is the network's:
// the site's close ends it.
func (s *site) command(name string, args ...string) *exec.Cmd {
	return alone(s.LB.Command(context.Background(), name, args...))
}

// alone gives a balancer a session of its own, as nlb's relay always has, since
// the scheduler shares the core among sessions.
func alone(cmd *exec.Cmd) *exec.Cmd {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return cmd
}
