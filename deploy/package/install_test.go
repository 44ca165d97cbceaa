package packaging_test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"nlb/internal/wait"
)

// observed is what of the kernel's state purging has to restore.
func (m machine) observed(t *testing.T) []string {
	t.Helper()
	var all []string
	for _, words := range [][]string{
		{"nft", "list", "ruleset"},
		{"ip", "-brief", "address"},
		{"ip", "rule"}, {"ip", "-6", "rule"},
		{"ip", "route", "show", "table", "all"},
		{"sysctl", "--all", "--pattern", `^net\.(ipv[46]\.(conf|ip_)|netfilter|ipv4\.vs)`},
	} {
		for line := range strings.Lines(m.run(t, words...)) {
			if !strings.Contains(line, "nf_conntrack_count") && !strings.HasPrefix(line, "sysctl: ") {
				all = append(all, strings.Join(words[:2], " ")+": "+strings.TrimSpace(line))
			}
		}
	}
	return all
}

// echoes are two listeners more: one that the kernel forwards, on a VIP that is
// announced, and one that is relayed.
const echoes = `
vips:
  - {address: 198.51.100.10, interface: lo}
  - {address: 203.0.113.10, interface: to-client}
listeners:
  - {name: web, vip: 198.51.100.10, protocol: TCP, port: 80, forward: [{target_group: web}]}
  - {name: kernel, vip: 203.0.113.10, protocol: TCP, port: 7, forward: [{target_group: kernel}]}
  - {name: relayed, vip: 198.51.100.10, protocol: TCP, port: 70, forward: [{target_group: relayed}]}
`

const echoGroup = `
  - name: %s
    protocol: TCP
    port: 7
    client_ip: %s
    targets: [{address: 10.0.1.11}, {address: 10.0.1.12}]
`

// denied matches what programs say of EPERM, EACCES and EROFS.
var denied = regexp.MustCompile(`(?i)not permitted|permission denied|read-only file system|bad system call`)

// answered is how often a target answered, as uniq(1) counts it.
var answered = regexp.MustCompile(`(?m)^ +(\d+) hello from t[12]$`)

// TestLifeOfAPackage takes one machine through all of it.
func TestLifeOfAPackage(t *testing.T) {
	old, upgrade := packages(t, older), packages(t, newer)
	m := boot(t)
	oldDeb, newDeb := m.take(t, filepath.Join(old, debOf(older))), m.take(t, filepath.Join(upgrade, debOf(newer)))
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program := m.take(t, self)
	dpkg := func(t *testing.T, words ...string) string {
		return m.run(t, append([]string{"dpkg", "--no-triggers", "--force-confold"}, words...)...)
	}

	t.Run("a broken configuration starts nothing", func(t *testing.T) {
		m.write(t, "/etc/nlb/nlb.yaml", []byte("vips: [{address: somewhere}]\n"), 0o644)
		said := dpkg(t, "--install", oldDeb)
		if !strings.Contains(said, "/etc/nlb/nlb.yaml:1:18: vips[0].address") || !strings.Contains(said, "not started") {
			t.Errorf("it said\n%s", said)
		}
		for _, unit := range []string{"nlb", "nlb-relay"} {
			if got := m.property(t, unit, "ActiveState"); got != "inactive" {
				t.Errorf("%s is %s", unit, got)
			}
		}
		dpkg(t, "--purge", "nlb")
		if _, err := os.Lstat(m.path("/etc/nlb")); !os.IsNotExist(err) {
			t.Errorf("/etc/nlb after purging: %v", err)
		}
	})

	walk := m.take(t, "walk")
	m.run(t, walk, "network")
	before := m.observed(t)
	t.Run("from the package to the first request", func(t *testing.T) {
		walked := m.run(t, walk, oldDeb)
		answers := 0
		for _, m := range answered.FindAllStringSubmatch(walked, -1) {
			n, err := strconv.Atoi(m[1])
			if err != nil {
				t.Fatal(err)
			}
			answers += n
		}
		if want := "10.0.1.12:8080  1       healthy"; answers != 12 || !strings.Contains(walked, want) {
			t.Errorf("%d of 12 calls were answered, and %q should be there:\n%s", answers, want, walked)
		}
	})
	if t.Failed() {
		return
	}

	t.Run("a wrong file fails a reload and changes nothing", func(t *testing.T) {
		good := readFile(t, m.path("/etc/nlb/nlb.yaml"))
		m.write(t, "/etc/nlb/nlb.yaml", []byte("vips: 1\n"), 0o644)
		if said, err := m.try("systemctl", "reload", "nlb"); err == nil {
			t.Errorf("the reload succeeded: %s", said)
		}
		if got := m.property(t, "nlb", "ActiveState"); got != "active" {
			t.Errorf("the daemon is %s", got)
		}
		if got := m.run(t, "nlb", "status"); !strings.Contains(got, "10.0.1.11:8080") {
			t.Errorf("status is\n%s", got)
		}
		text := string(good) + fmt.Sprintf(echoGroup, "kernel", "preserve") + fmt.Sprintf(echoGroup, "relayed", "proxy_protocol_v2")
		_, groups, _ := strings.Cut(text, "target_groups:")
		m.write(t, "/etc/nlb/nlb.yaml", []byte(echoes+"target_groups:"+groups), 0o644)
		for _, ns := range []string{"t1", "t2"} {
			m.echo(t, program, ns)
		}
		m.run(t, "systemctl", "reload", "nlb")
	})

	t.Run("sandbox", func(t *testing.T) { inSandbox(t, m) })

	t.Run("an upgrade disturbs nobody", func(t *testing.T) {
		talkers := []talker{
			m.talker(t, program, "forwarded by the kernel", "203.0.113.10:7"),
			m.talker(t, program, "relayed", "198.51.100.10:70"),
		}
		daemon, relay := m.property(t, "nlb", "MainPID"), m.property(t, "nlb-relay", "MainPID")
		dpkg(t, "--install", newDeb)
		wait.For(t, patience, "the new relay to take over", func() error {
			if now := m.property(t, "nlb-relay", "MainPID"); now == relay {
				return fmt.Errorf("the relay is still %s", now)
			}
			return nil
		})
		if now := m.property(t, "nlb", "MainPID"); now == daemon || now == "0" {
			t.Errorf("the daemon was %s and is %s", daemon, now)
		}
		for _, unit := range []string{"nlb", "nlb-relay"} {
			if got := m.property(t, unit, "ActiveState"); got != "active" {
				t.Errorf("%s is %s", unit, got)
			}
			exe := m.run(t, "readlink", "/proc/"+m.property(t, unit, "MainPID")+"/exe")
			if exe != "/usr/bin/nlb\n" {
				t.Errorf("%s runs %s", unit, exe)
			}
		}
		m.run(t, "grep", "-q", "nlb", "/proc/"+relay+"/comm") // it has connections still
		for _, w := range talkers {
			w.finish(t)
		}
		inSandbox(t, m)
	})

	t.Run("an upgrade that the configuration is wrong for leaves alone what runs", func(t *testing.T) {
		good, daemon := readFile(t, m.path("/etc/nlb/nlb.yaml")), m.property(t, "nlb", "MainPID")
		m.write(t, "/etc/nlb/nlb.yaml", []byte("vips: 1\n"), 0o644)
		if said := dpkg(t, "--install", newDeb); !strings.Contains(said, "what runs is left alone") {
			t.Errorf("it said\n%s", said)
		}
		if now := m.property(t, "nlb", "MainPID"); now != daemon {
			t.Errorf("the daemon was %s and is %s", daemon, now)
		}
		m.write(t, "/etc/nlb/nlb.yaml", good, 0o644)
	})

	t.Run("a relay that is killed is started again", func(t *testing.T) {
		relay := m.property(t, "nlb-relay", "MainPID")
		m.run(t, "kill", "-KILL", relay)
		wait.For(t, patience, "another relay", func() error {
			if now := m.property(t, "nlb-relay", "MainPID"); now == relay || now == "0" {
				return fmt.Errorf("the relay is %s", now)
			}
			return nil
		})
		w := m.talker(t, program, "relayed by another", "198.51.100.10:70")
		w.finish(t)
	})

	t.Run("stopping leaves the kernel forwarding", func(t *testing.T) {
		w := m.talker(t, program, "forwarded by the kernel", "203.0.113.10:7")
		m.run(t, "systemctl", "stop", "nlb")
		w.finish(t)
		m.run(t, "systemctl", "start", "nlb")
	})

	t.Run("nothing was denied", func(t *testing.T) {
		journal := m.run(t, "journalctl", "--no-pager", "-u", "nlb", "-u", "nlb-relay")
		if !strings.Contains(journal, "nlb starts") {
			t.Errorf("there is no journal, but\n%s", journal)
		}
		for line := range strings.Lines(journal) {
			if denied.MatchString(line) {
				t.Error(line)
			}
		}
	})

	t.Run("removing ends forwarding and keeps the configuration", func(t *testing.T) {
		dpkg(t, "--remove", "nlb")
		if diff := cmp.Diff(before, m.observed(t)); diff != "" {
			t.Errorf("in the kernel (-before +after):\n%s", diff)
		}
		if _, err := os.Stat(m.path("/etc/nlb/nlb.yaml")); err != nil {
			t.Error(err)
		}
		for _, unit := range []string{"nlb", "nlb-relay"} {
			if got := m.property(t, unit, "ActiveState"); got != "inactive" {
				t.Errorf("%s is %s", unit, got)
			}
		}
	})

	t.Run("purging leaves nothing", func(t *testing.T) {
		dpkg(t, "--purge", "nlb")
		for _, path := range []string{"/etc/nlb", "/var/lib/nlb", "/run/nlb", "/usr/bin/nlb"} {
			if _, err := os.Lstat(m.path(path)); !os.IsNotExist(err) {
				t.Errorf("%s: %v", path, err)
			}
		}
		links, err := filepath.Glob(m.path("/etc/systemd/system/*/nlb*"))
		if err != nil || len(links) > 0 {
			t.Errorf("links of units: %q, %v", links, err)
		}
	})
}

// inSandbox looks at what the kernel says of both processes, and at what they may
// do.
func inSandbox(t *testing.T, m machine) {
	t.Helper()
	type process struct{ User, Effective, Bounding, NoNewPrivileges, Seccomp string }
	uid := strings.TrimSpace(m.run(t, "id", "-u", "nlb"))
	user := strings.Join(slices.Repeat([]string{uid}, 4), " ")
	for unit, caps := range map[string]string{"nlb": daemonCapabilities, "nlb-relay": capabilities()} {
		want := process{user, caps, caps, "1", "2"} // 2: by filter
		got := process{
			m.status(t, unit, "Uid"), m.status(t, unit, "CapEff"), m.status(t, unit, "CapBnd"),
			m.status(t, unit, "NoNewPrivs"), m.status(t, unit, "Seccomp"),
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", unit, diff)
		}
		for path, writable := range map[string]bool{
			"/proc/sys/net/ipv4/ip_forward": unit == "nlb", "/proc/sys/kernel/core_pattern": false,
			"/etc": false, "/var/lib/nlb": unit == "nlb", "/run/nlb": true, "/usr/bin": false,
		} {
			// The process's own view of its mounts, through its root folder.
			var at unix.Statfs_t
			err := unix.Statfs(m.path("/proc/"+m.property(t, unit, "MainPID")+"/root"+path), &at)
			if err != nil {
				t.Errorf("%s: %s: %v", unit, path, err)
				continue
			}
			if got := at.Flags&unix.ST_RDONLY == 0; got != writable {
				t.Errorf("%s: %s is mounted writable: %t, want %t", unit, path, got, writable)
			}
		}
	}
}
