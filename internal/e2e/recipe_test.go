package e2e

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nlb/bench/lab"
)

// recipes has the scripts that targets run, whose examples have the addresses of
// the lab.
const recipes = "../../deploy/target"

// A recipe is a script of recipes on a node.
type recipe struct {
	t    *testing.T
	node *lab.Node
	name string
	// example is the arguments of apply that its README has.
	example []string
}

func recipeOn(t *testing.T, n *lab.Node, name string) recipe {
	t.Helper()
	m := regexp.MustCompile(`(?m)^` + name + ` apply (.*)$`).FindStringSubmatch(read(filepath.Join(recipes, "README.md")))
	if m == nil {
		t.Fatalf("the README has no example of %s", name)
	}
	return recipe{t, n, name, strings.Fields(m[1])}
}

// run runs the script with a subcommand and its arguments.
func (r recipe) run(args ...string) output {
	r.t.Helper()
	return finish(r.t, r.node.Command(soon(r.t), filepath.Join(recipes, r.name), args...))
}

// apply runs the example with further arguments, which has to succeed and say
// nothing but what is expected.
func (r recipe) apply(says string, more ...string) {
	r.t.Helper()
	args := append([]string{"apply"}, append(r.example, more...)...)
	if out := r.run(args...); out.code != 0 || !strings.Contains(out.stderr, says) || says == "" && out.stderr != "" {
		r.t.Fatalf("%s %v: exit %d, %q, want 0 and %q", r.name, args, out.code, out.stderr, says)
	}
}

// state is all that a recipe may change on its node. It is one command, as each
// begins with this binary, which is slow with the race detector.
func (r recipe) state() string {
	r.t.Helper()
	return must(r.t, r.node, "sh", "-ec", `
		ip -4 rule; ip -6 rule; ip -4 route show table all; ip -6 route show table all
		nft list ruleset; sysctl net.ipv4.conf.all.rp_filter net.ipv4.conf.eth0.rp_filter`)
}

// same fails the test unless the node's state is an earlier one.
func (r recipe) same(when, want string) {
	r.t.Helper()
	if diff := cmp.Diff(want, r.state()); diff != "" {
		r.t.Errorf("%s (-want +got):\n%s", when, diff)
	}
}

// refuses has the script refuse arguments, with an exit code and a reason, and
// change nothing.
func (r recipe) refuses(tests []refusal) {
	before := r.state()
	for _, tt := range tests {
		r.t.Run("refuses/"+tt.args, func(t *testing.T) {
			out := finish(t, r.node.Command(soon(t), filepath.Join(recipes, r.name), strings.Fields(tt.args)...))
			if out.code != tt.code || !strings.HasPrefix(out.stderr, r.name+": ") || !strings.Contains(out.stderr, tt.says) {
				t.Errorf("exit %d, %q; want %d and %q", out.code, out.stderr, tt.code, tt.says)
			}
		})
	}
	r.t.Run("refuses/without tools", func(t *testing.T) {
		cmd := r.node.Command(soon(t), "/bin/bash", filepath.Join(recipes, r.name), "status")
		cmd.Env = []string{"PATH=/nonexistent"}
		if out := finish(t, cmd); out.code != 1 || !strings.Contains(out.stderr, "needs ip, Debian's package iproute2") {
			t.Errorf("%+v", out)
		}
	})
	// Somebody who may not be able to read our folder gets the script by a pipe.
	r.t.Run("refuses/without root", func(t *testing.T) {
		cmd := exec.CommandContext(soon(t), "bash", "-s", "--", "remove")
		cmd.Stdin, cmd.Dir = strings.NewReader(read(filepath.Join(recipes, r.name))), "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		if out := finish(t, cmd); out.code != 1 || !strings.Contains(out.stderr, "needs root") {
			t.Errorf("%+v", out)
		}
	})
	r.same("after what was refused", before)
}

// A refusal is a command line, and how it ends.
type refusal struct {
	args string
	code int
	says string
}

// wrongWords are mistakes that each recipe finds by itself, with what it cannot do
// without.
func wrongWords(rest string) []refusal {
	return []refusal{
		{"frob", 2, "not apply, remove or status"},
		{"apply --frob 1", 2, "no such option"},
		{"apply --dev", 2, "has no value"},
		{"apply --dev eth0 " + rest, 2, "--lb is missing"},
		{"remove --table x", 2, "not a number from 1 to 4294967295"},
		{"status", 1, "not applied"},
		// Refused by the kernel, with the balancer's route there already.
		{"apply --spare 10.0.9.1/24 --lb 10.0.1.1 --dev eth0 " + rest, 1, "ip -4 route replace throw 10.0.9.1/24"},
	}
}

// wrongRouting are mistakes that are found by what both recipes share.
func wrongRouting(rest string) []refusal {
	const good = " --lb 10.0.1.1 --dev eth0"
	return []refusal{
		{"apply --lb 10.0.1.1 " + rest, 2, "--dev is missing"},
		{"apply --lb 10.0.1 --dev eth0 " + rest, 2, "not an IP address"}, // 10.0.1.0 to ip(8)
		{"apply --lb 10.0.1.1/32 --dev eth0 " + rest, 2, "not an IP address"},
		{"apply --lb 2001:db8::1::1 --dev eth0 " + rest, 2, "not an IP address"},
		{"apply --lb 10.0.1.1 --lb 10.0.1.2 --dev eth0 " + rest, 2, "more than one --lb for IPv4"},
		{"apply --lb 10.0.1.1 --dev eth7 " + rest, 1, "there is no interface eth7"},
		{"apply --lb 127.0.0.1 --dev eth0 " + rest, 1, "is an address of this host"},
		{"apply --lb 10.99.0.1 --dev eth0 " + rest, 1, "Nexthop has invalid gateway"},
		{"apply --spare 10.0.0.0/33 " + rest + good, 2, "not an IP prefix"},
		{"apply --spare 0.0.0.0/0 " + rest + good, 2, "not an IP prefix"},
		{"apply --table 254 " + rest + good, 2, "one of the system's own"},
		{"apply --priority 32766 " + rest + good, 2, "not a number from 1 to 32765"},
	}
}

// everyWay calls the ports of both VIPs from outside, all at once, by TCP and UDP,
// and has patience with each. It says what the target saw, or why there was no
// answer.
func everyWay(t *testing.T, top *lab.Topology, ports []uint16, patience func(way string) time.Duration) map[string]string {
	t.Helper()
	var wg sync.WaitGroup
	var mu sync.Mutex
	found := map[string]string{}
	ctx := soon(t)
	for _, f := range families {
		for _, network := range networks {
			for _, port := range ports {
				way := way(network, f, port)
				wg.Go(func() {
					c := lab.Call{Network: network, Dst: f.at(port), Timeout: patience(way)}
					replies, err := top.Clients[0].Agent().Call(ctx, c)
					said := fmt.Sprint(err)
					if err == nil {
						if said = replies[0].Err; said == "" {
							said = replies[0].Peer.String()
						}
					}
					mu.Lock()
					defer mu.Unlock()
					found[way] = said
				})
			}
		}
	}
	wg.Wait()
	return found
}

func way(network string, f family, port uint16) string { return fmt.Sprint(network, f.name, " ", port) }

// answered fails the test unless the targets see the client in every way, but for
// those in which the call is to time out.
func answered(t *testing.T, when string, top *lab.Topology, ports []uint16, but ...string) {
	t.Helper()
	want := map[string]string{}
	for _, f := range families {
		for _, network := range networks {
			for _, port := range ports {
				want[way(network, f, port)] = f.addr(top.Clients[0]).String()
			}
		}
	}
	for _, way := range but {
		want[way] = lab.Timeout
	}
	got := everyWay(t, top, ports, func(way string) time.Duration {
		if slices.Contains(but, way) {
			return briefly
		}
		return limit / 4
	})
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", when, diff)
	}
}

// unanswered fails the test unless every call times out.
func unanswered(t *testing.T, when string, top *lab.Topology, ports []uint16) {
	t.Helper()
	got := everyWay(t, top, ports, func(string) time.Duration { return briefly })
	for way, said := range got {
		if said != lab.Timeout {
			t.Errorf("%s: %s: %s, want a timeout", when, way, said)
		}
	}
}

// TestReturnRoute has a target with two interfaces and a strict rp_filter, whose
// default route is not the balancer's.
func TestReturnRoute(t *testing.T) {
	t.Parallel()
	top := made(t, lab.MultiHomed, lab.Options{Targets: 1})
	target := top.Targets[0]
	if err := target.Sysctl("net.ipv4.conf.all.rp_filter", "1"); err != nil {
		t.Fatal(err)
	}
	serveTargets(t, top, 8080)
	serving(t, top, config{
		Sources: sources(top), VIPs: both(),
		Listeners: listen("web", "TCP_UDP", 80, "web"),
		Groups:    []group{pool("web", "TCP_UDP", "preserve", 8080, targets(target))},
	})
	ports := []uint16{80}

	r := recipeOn(t, target, "return-route")
	const source = "--source 10.0.1.11"
	r.refuses(slices.Concat(wrongWords(source), wrongRouting(source), []refusal{
		{"apply --lb 10.0.1.1 --dev eth0", 2, "--source is missing"},
		{"apply --source 10.0.1.12 --lb 10.0.1.1 --dev eth0", 1, "10.0.1.12 is no address of this host"},
		{"apply --source 10.0.1.11 --lb 2001:db8:1::1 --dev eth0", 2, "no --lb for the IPv4 --source"},
		{"apply --source 10.0.1.11 --lb 10.0.1.1 --lb 2001:db8:1::1 --dev eth0", 2, "no --source for the IPv6 --lb"},
	}))
	unanswered(t, "without the recipe", top, ports)
	before := r.state()
	example := strings.Join(append([]string{r.name, "apply"}, r.example...), " ")
	if diff := cmp.Diff([]string{
		"target-return-path: " + example, "target-return-path: " + example, "target-rp-filter: " + example,
	}, diagnosed(t, target)); diff != "" {
		t.Errorf("what nlb doctor finds, and the recipe it names (-want +got):\n%s", diff)
	}

	r.apply("")
	answered(t, "with the recipe", top, ports)
	if filter := must(t, target, "sysctl", "-n", "net.ipv4.conf.all.rp_filter"); filter != "1\n" {
		t.Errorf("the filter is no longer strict: %s", filter)
	}
	if found := diagnosed(t, target); len(found) > 0 {
		t.Errorf("nlb doctor still finds %q", found)
	}
	applied := r.state()
	status := regexp.MustCompile(`(?:rule|route) .*(?:lookup 4700|via \S+)`).FindAllString(r.run("status").stdout, -1)
	if diff := cmp.Diff(networkd(t), status); diff != "" {
		t.Errorf("return-route.conf (-) and the script (+) differ:\n%s", diff)
	}
	r.apply("")
	r.same("applied twice", applied)
	r.apply("", "--table", "4800", "--priority", "98")
	if out := r.run("remove", "--table", "4800"); out.code != 0 {
		t.Errorf("remove a second table: %+v", out)
	}
	r.same("with a second table, removed", applied)
	r.apply("", "--source", "10.0.2.11", "--priority", "99", "--spare", "10.0.3.0/24", "--spare", "2001:DB8:3:0::/64")
	answered(t, "with other options", top, ports)
	for to, iface := range map[string]string{"10.0.3.9": "eth1", "10.0.4.9": "eth0", "2001:db8:3::9": "eth1", "2001:db8:4::9": "eth0"} {
		from := "10.0.1.11"
		if strings.Contains(to, ":") {
			from = "2001:db8:1::11"
		}
		if route := must(t, target, "ip", "route", "get", to, "from", from); !strings.Contains(route, " dev "+iface+" ") {
			t.Errorf("the way to %s is not %s: %s", to, iface, route)
		}
	}
	if status := r.run("status").stdout; !strings.Contains(status, "priority 99 from 10.0.2.11 lookup 4700") {
		t.Errorf("status: %s", status)
	}
	r.apply("")
	r.same("applied again, with fewer options", applied)

	if out := r.run("remove"); out.code != 0 {
		t.Errorf("remove: %+v", out)
	}
	r.same("removed", before)
	unanswered(t, "removed", top, ports)
	if out := r.run("remove"); out.code != 0 || out.stderr != "" {
		t.Errorf("removed twice: %+v", out)
	}
	// The unit's own example.
	m := regexp.MustCompile(`OPTIONS=([^']*)'`).FindStringSubmatch(read(filepath.Join(recipes, "nlb-return@.service")))
	if out := r.run(append([]string{"apply"}, strings.Fields(m[1])...)...); out.code != 0 {
		t.Errorf("the options of the unit: %+v", out)
	}
	if out := r.run(append([]string{"remove"}, strings.Fields(m[1])...)...); out.code != 0 {
		t.Errorf("the options of the unit: %+v", out)
	}
	r.same("removed with the unit's options", before)

	// What nlb doctor does by itself is what the recipe does, which takes it over.
	if out := onTarget(t, target, "--fix", "--apply"); out.code != 0 {
		t.Errorf("nlb doctor --fix --apply: %+v", out)
	}
	again := regexp.MustCompile(`(?:rule|route) .*(?:lookup 4700|via \S+)`).FindAllString(r.run("status").stdout, -1)
	if diff := cmp.Diff(status, again); diff != "" {
		t.Errorf("the recipe (-) and the cure of nlb doctor (+) differ:\n%s", diff)
	}
	r.apply("")
	if out := r.run("remove"); out.code != 0 {
		t.Errorf("remove: %+v", out)
	}
	if out := r.run("status"); out.code != 1 {
		t.Errorf("of the cures of nlb doctor, the recipe left: %+v", out)
	}
}

// onTarget runs nlb doctor on a target of a lab.
func onTarget(t *testing.T, n *lab.Node, args ...string) output {
	t.Helper()
	args = append([]string{"doctor", "--target", "--lb", "10.0.1.1", "--lb", "2001:db8:1::1"}, args...)
	return finish(t, n.Command(soon(t), program, args...))
}

// diagnosed is what nlb doctor finds on a target, with the recipes it names.
func diagnosed(t *testing.T, n *lab.Node) (all []string) {
	t.Helper()
	out := onTarget(t, n, "-o", "json")
	var report struct {
		Findings []struct{ ID, Recipe string }
	}
	if err := json.Unmarshal([]byte(out.stdout), &report); err != nil {
		t.Fatalf("nlb doctor: %v: %+v", err, out)
	}
	for _, f := range report.Findings {
		all = append(all, f.ID+": "+f.Recipe)
	}
	return all
}

// networkd is what return-route.conf asks systemd-networkd for, in the words of
// return-route's status.
func networkd(t *testing.T) (lines []string) {
	t.Helper()
	for section := range strings.SplitSeq(read(filepath.Join(recipes, "return-route.conf")), "\n[") {
		name, body, _ := strings.Cut(section, "]\n")
		keys := map[string]string{}
		for line := range strings.Lines(body) {
			if key, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
				keys[key] = value
			}
		}
		switch name {
		case "RoutingPolicyRule":
			lines = append(lines, fmt.Sprintf("rule priority %s from %s lookup %s", keys["Priority"], keys["From"], keys["Table"]))
		case "Route":
			if keys["Table"] != "4700" {
				t.Errorf("a route in table %s", keys["Table"])
			}
			lines = append(lines, "route default via "+keys["Gateway"])
		}
	}
	return lines
}

// TestReturnConnmark has a pod and its node for targets, whose way out is a gateway
// that masquerades, and a strict rp_filter on the node.
func TestReturnConnmark(t *testing.T) {
	t.Parallel()
	top := made(t, lab.Egress, lab.Options{})
	client, node, pod := top.Clients[0], top.Hosts[0], top.Targets[0]
	strict := func(value string) {
		t.Helper()
		if err := node.Sysctl("net.ipv4.conf.all.rp_filter", value); err != nil {
			t.Fatal(err)
		}
	}
	strict("1")
	must(t, top.Gateway, "nft", "add table inet nat; "+
		"add chain inet nat out { type nat hook postrouting priority srcnat; }; "+
		`add rule inet nat out oifname "rt" masquerade`)
	serveTargets(t, top, 8080)
	serveOn(t, node, lab.Serve{Ports: []uint16{8080}})
	serveOn(t, client, lab.Serve{Ports: []uint16{7000}})
	c := config{
		Sources: sources(top), VIPs: both(),
		Listeners: append(listen("pod", "TCP_UDP", 80, "pod"), listen("node", "TCP_UDP", 81, "node")...),
		Groups: []group{
			pool("pod", "TCP_UDP", "preserve", 8080, targets(pod)),
			pool("node", "TCP_UDP", "preserve", 8080, targets(node)),
		},
	}
	for i := range c.Groups {
		c.Groups[i].HealthCheck = patient() // for a while the pod's answers do not arrive
	}
	serving(t, top, c)
	ports := []uint16{80, 81}
	gateway := map[string]netip.Addr{"4": netip.MustParseAddr("10.0.3.2"), "6": netip.MustParseAddr("2001:db8:3::2")}
	ownCalls := func(when string) {
		t.Helper()
		for _, f := range families {
			got := call(t, pod, lab.Call{Network: "tcp", Dst: netip.AddrPortFrom(f.addr(client), 7000)})
			allSeenAs(t, when+": the pod's own call, IPv"+f.name, got, gateway[f.name])
		}
	}

	r := recipeOn(t, node, "return-connmark")
	r.refuses(append(wrongWords(""), []refusal{
		{"apply --lb 10.0.1.1 --dev eth0 --mac 02:00", 2, "neither a MAC nor the word neighbour"},
		{"apply --lb 10.0.1.1 --dev eth0 --mark 0x", 2, "--mark 0x: not a number"},
		{"apply --lb 10.0.1.1 --dev eth0 --mark 0x0", 2, "not from 1 to 0xfffffffe"},
		{"apply --lb 10.0.3.1 --dev eth0 --mac neighbour", 1, "not known on eth0"},
	}...))
	unanswered(t, "without the recipe", top, ports)
	ownCalls("without the recipe")
	before := r.state()

	r.apply("")
	answered(t, "with the recipe", top, ports)
	ownCalls("with the recipe")
	applied := r.state()
	r.apply("")
	r.same("applied twice", applied)
	if out := r.run("status"); out.code != 0 || !strings.Contains(out.stdout, "table inet nlb_return") || !strings.Contains(out.stdout, "fwmark 0x80/0x80") {
		t.Errorf("status: %+v", out)
	}

	// Only what has the balancer's link address is answered that way.
	r.apply("", "--mac", "02:00:00:00:00:01", "--mark", "0x100")
	unanswered(t, "with another host's MAC", top, ports)
	r.apply("", "--mac", "neighbour", "--mark", "0x100")
	answered(t, "with the balancer's MAC", top, ports)

	// A filter that goes by the mark takes a pod's reply for one of the balancer's.
	if err := node.Sysctl("net.ipv4.conf.all.src_valid_mark", "1"); err != nil {
		t.Fatal(err)
	}
	r.apply("--spare the addresses of pods")
	answered(t, "with src_valid_mark=1", top, ports, "tcp4 80", "udp4 80")
	r.apply("", "--spare", "10.244.1.0/24", "--spare", "2001:db8:244:1::/64")
	answered(t, "with src_valid_mark=1, and pods spared", top, ports)
	r.apply("--spare the addresses of pods")
	r.same("applied again, with fewer options", applied)

	if out := r.run("remove"); out.code != 0 {
		t.Errorf("remove: %+v", out)
	}
	r.same("removed", before)
	strict("0") // so that the gateway alone is in the way
	unanswered(t, "removed", top, ports)
	if out := r.run("remove"); out.code != 0 || out.stderr != "" {
		t.Errorf("removed twice: %+v", out)
	}
}

// TestRecipesShare holds what both recipes have to be the same.
func TestRecipesShare(t *testing.T) {
	shared := func(name string) string {
		_, rest, ok1 := strings.Cut(read(filepath.Join(recipes, name)), "# What follows is the same in both recipes")
		text, _, ok2 := strings.Cut(rest, "# This is the end of what is the same.")
		if !ok1 || !ok2 {
			t.Fatalf("%s does not say what it shares", name)
		}
		return text
	}
	if diff := cmp.Diff(shared("return-route"), shared("return-connmark")); diff != "" {
		t.Errorf("return-route (-) and return-connmark (+) differ:\n%s", diff)
	}
}
