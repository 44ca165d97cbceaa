package e2e

import (
	"regexp"
	"strings"
	"testing"

	"nlb/bench/lab"
)

// broken are changes to a good file, each of which makes a bad one.
var broken = []struct{ old, new string }{
	// Syntax.
	{"listeners:", "listeners"},
	{"listeners:", "listeners: ["},
	{"listeners:", "\tlisteners:"},
	{"listeners:", "listeners: !!map"},
	{"vip: 198.51.100.10\n", "vip: 198.51.100.10\n      vip: 198.51.100.10\n"},
	{"vips:", "vips: []\nvips:"},
	{"listeners:", "---\nlisteners:"},
	{"target_groups:", "target_groups: \x00"},
	{"target_groups:", "target_groups: \xff\xfe"},
	{"name: web4", "name: \"web4"},
	{"name: web4", "name: 'web4"},
	{"name: web4", "name: *nobody"},
	{"name: web4", "name: !!binary web4"},
	// Words that are none.
	{"listeners:", "listner:"},
	{"target_groups:", "targetgroups:"},
	{"targets:", "tragets:"},
	{"forward:", "forwards:"},
	{"client_ip:", "clientip:"},
	{"vips:", "extra: 1\nvips:"},
	{"health_check:", "healthcheck:"},
	{"interval:", "intervall:"},
	// Kinds.
	{"port: 80\n", "port: eighty\n"},
	{"port: 80\n", "port: [80]\n"},
	{"port: 80\n", "port: {a: 1}\n"},
	{"port: 80\n", "port: 80.5\n"},
	{"port: 80\n", "port: 080\n"},
	{"port: 80\n", "port: true\n"},
	{"port: 80\n", "port:\n"},
	{"weight: 1\n", "weight: one\n"},
	{"name: web4", "name: [web4]"},
	{"vip: 198.51.100.10\n", "vip: 3325256714\n"},
	// Ranges.
	{"port: 80\n", "port: 0\n"},
	{"port: 80\n", "port: -1\n"},
	{"port: 80\n", "port: 65536\n"},
	{"port: 80\n", "port: 18446744073709551616\n"},
	{"weight: 1\n", "weight: -1\n"},
	{"weight: 1\n", "weight: 1000\n"},
	{"interval: 1s", "interval: 0s"},
	{"interval: 1s", "interval: 301s"},
	{"interval: 1s", "interval: -5s"},
	{"interval: 1s", "interval: 1"},
	{"interval: 1s", "interval: soon"},
	{"timeout: 1s", "timeout: 2s"},
	{"unhealthy_threshold: 2", "unhealthy_threshold: 0"},
	{"unhealthy_threshold: 2", "unhealthy_threshold: 11"},
	// Names.
	{"name: web4", "name: \"\""},
	{"name: web4", "name: web four"},
	{"name: web4", "name: web_four"},
	{"name: web4", "name: " + strings.Repeat("w", 33)},
	{"name: web4", "name: web6"},
	{"target_group: web", "target_group: wbe"},
	{"protocol: TCP", "protocol: SCTP"},
	{"protocol: TCP", "protocol: UDP"},
	{"client_ip: hairpin_snat", "client_ip: hairpin"},
	{"client_ip: hairpin_snat", "client_ip: proxy_protocol_v2\n      avoid_self: true"},
	// Addresses.
	{"vip: 198.51.100.10\n", "vip: 198.51.100.300\n"},
	{"vip: 198.51.100.10\n", "vip: 198.51.100.99\n"},
	{"vip: 198.51.100.10\n", "vip: example.net\n"},
	{"address: 198.51.100.10\n", "address: 198.51.100.10/24\n"},
	{"address: 10.0.1.11\n", "address: 198.51.100.10\n"},
	{"address: 10.0.1.11\n", "address: 10.0.1.12\n"},
	{"- 10.0.1.1\n", "- 198.51.100.10\n"},
	{"- 10.0.1.1\n", "- fe80::1%eth0\n"},
	// What is missing.
	{"port: 80\n", "\n"},
	{"client_ip: hairpin_snat\n", "\n"},
	{"protocol: TCP\n", "\n"},
	{"name: web4", "tcp_idle_timeout: 350s"},
}

// However a file is broken: validate, plan and reload say where, end in 1, touch
// nothing, and what was in force stays in force.
func TestBrokenFilesChangeNothing(t *testing.T) {
	top, d := served(t, lab.Options{Targets: 2}, 2)
	good := read(d.config)
	if len(broken) < 60 {
		t.Errorf("%d broken files only", len(broken))
	}
	where := regexp.MustCompile(`^(nlb: )?` + regexp.QuoteMeta(d.config) + `:\d+:\d+: \S`)
	p := press(t, top)
	s := listenForSilence(t, top.LB)
	for _, b := range broken {
		if strings.Count(good, b.old) == 0 {
			t.Fatalf("the good file has no %q", b.old)
		}
		d.write(strings.Replace(good, b.old, b.new, 1))
		for _, args := range [][]string{
			{"validate", "-c", d.config},
			{"plan", "-c", d.config, "--state-dir", d.state("")},
			{"reload"},
		} {
			out := d.run(args...)
			if out.code != 1 || out.stdout != "" || !where.MatchString(out.stderr) {
				t.Errorf("%q for %q: nlb %s: exit %d, stdout %q, stderr %q", b.new, b.old, args[0], out.code, out.stdout, out.stderr)
			}
		}
	}
	for name, text := range map[string]string{"empty": "", "blank": "\n\n", "a comment": "# nothing\n", "a word": "listeners", "a list": "- 1\n"} {
		d.write(text)
		if err := d.reload(text); err == nil || !strings.Contains(err.Error(), d.config) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if heard := s.heard(); heard != "" {
		t.Errorf("the kernel was written to:\n%.2000s", heard)
	}
	now := d.status()
	if now.Apply.Generation != 1 || now.Apply.Error != "" || len(now.Listeners) != 4 || len(now.TargetGroups) != 2 {
		t.Errorf("in force now: %+v", now)
	}
	p.end()
	d.write(good)
	if err := d.planned(); err != nil {
		t.Error(err)
	}
	if out := d.run("reload"); out != (output{}) {
		t.Errorf("reload of the good file: %+v", out)
	}
	if got := d.status().Apply.Generation; got != 2 {
		t.Errorf("configuration %d", got)
	}
}
