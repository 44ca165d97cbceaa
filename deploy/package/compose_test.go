package packaging_test

import (
	"cmp"
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// A composition is what of a compose file its test brings about without an engine.
type composition struct {
	Services map[string]struct {
		Image, Hostname string
		Build           string
		Command         []string
		Volumes         []string
		Networks        map[string]struct {
			Address netip.Addr `yaml:"ipv4_address"`
		}
	}
	Networks map[string]struct {
		IPAM struct {
			Config []struct{ Subnet netip.Prefix }
		} `yaml:"ipam"`
	}
}

// TestCompose runs the composition as an engine would: each network is a bridge,
// each service has a host name, interfaces, files and a command of its own. The
// programs are this machine's and nlb the image's, and the client sees what the
// page of the packages says.
func TestCompose(t *testing.T) {
	folder := filepath.Join(packages(t, older), "image")
	file := filepath.Join(folder, "compose.yaml")
	if out, err := exec.Command("docker-compose", "-f", file, "config", "--quiet").CombinedOutput(); err != nil || len(out) > 0 {
		t.Fatalf("docker-compose config: %v\n%s", err, out)
	}
	var c composition
	if err := yaml.Unmarshal(readFile(t, file), &c); err != nil {
		t.Fatal(err)
	}
	if build := c.Services["nlb"].Build; build != "." {
		t.Fatalf("nlb is built from %q", build)
	}
	m := boot(t)
	m.write(t, "/usr/bin/nlb", readFile(t, filepath.Join(folder, "nlb")), 0o755)
	c.wire(t, m)
	// No two services have different files in one place.
	for _, s := range c.Services {
		for _, v := range s.Volumes {
			words := strings.Split(v, ":")
			m.write(t, words[1], readFile(t, filepath.Join(folder, words[0])), 0o644)
		}
	}
	m.write(t, "/etc/nginx/nginx.conf", []byte("events {} http { include conf.d/*.conf; }"), 0o644) // as the image of nginx does
	c.run(t, m, "nlb", "--no-block", "nlb", "serve", "-c", "/etc/nlb/nlb.yaml")
	for _, name := range []string{"one", "two"} {
		c.run(t, m, name, "--no-block", c.Services[name].Command...)
	}
	said := c.run(t, m, "client", "--pipe", c.Services["client"].Command...)
	page := string(readFile(t, filepath.Join(root, "docs", "packages.md")))
	// Which of the two it is depends on the installation's key.
	either := regexp.MustCompile(`\b(one|two) was`)
	if got := either.ReplaceAllString(said, "one was"); !strings.Contains(either.ReplaceAllString(page, "one was"), got) || strings.Count(got, "\n") != 3 {
		t.Errorf("the client sees what docs/packages.md does not say:\n%s", said)
	}
}

// wire makes the networks and the services' hosts.
func (c *composition) wire(t *testing.T, m machine) {
	t.Helper()
	for name := range c.Networks {
		m.run(t, "ip", "link", "add", name, "type", "bridge")
		m.run(t, "ip", "link", "set", name, "up")
	}
	for name, s := range c.Services {
		m.run(t, "ip", "netns", "add", name)
		m.run(t, "ip", "-n", name, "link", "set", "lo", "up")
		i := 0
		for network, at := range s.Networks {
			inside, outside := fmt.Sprintf("eth%d", i), fmt.Sprintf("%s-%d", name, i)
			i++
			m.run(t, "ip", "link", "add", outside, "type", "veth", "peer", "name", inside, "netns", name)
			m.run(t, "ip", "link", "set", outside, "master", network, "up")
			m.run(t, "ip", "-n", name, "link", "set", inside, "up")
			bits := c.Networks[network].IPAM.Config[0].Subnet.Bits()
			m.run(t, "ip", "-n", name, "address", "add", netip.PrefixFrom(at.Address, bits).String(), "dev", inside)
		}
	}
}

// run runs a command as a service, in its namespace and with its host name, as the
// flag of systemd-run says: to its end with --pipe.
func (c *composition) run(t *testing.T, m machine, name, flag string, command ...string) string {
	t.Helper()
	words := []string{
		"systemd-run", "--quiet", "--unit=compose-" + name, "--collect", flag, "ip", "netns", "exec", name,
		"unshare", "--uts", "sh", "-c", `hostname "$1"; shift; exec "$@"`, "sh", cmp.Or(c.Services[name].Hostname, name),
	}
	for _, w := range command {
		words = append(words, strings.ReplaceAll(w, "$$", "$")) // as compose does
	}
	return m.run(t, words...)
}
