package packaging_test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// image builds the container's image and returns a copy of its root folder. No
// registry is asked, and nothing of it stays.
func image(t *testing.T) string {
	t.Helper()
	store, root := t.TempDir(), t.TempDir()
	buildah := func(words ...string) string {
		// vfs copies files, where others need file systems below that can stack.
		all := append([]string{"buildah", "--root", filepath.Join(store, "root"), "--runroot", filepath.Join(store, "run"), "--storage-driver", "vfs"}, words...)
		return strings.TrimSpace(run(t, all...))
	}
	id := buildah("bud", "--quiet", "--isolation", "chroot", filepath.Join(packages(t, older), "image"))
	container := buildah("from", "--pull-never", id)
	at := buildah("mount", container)
	err := os.CopyFS(root, os.DirFS(at))
	buildah("umount", container)
	if err != nil {
		t.Fatal(err)
	}
	return root
}

// TestContainer runs what the image has, with the rights that the documentation
// says, as a container's engine would: in its own root folder, and with read-only
// sysctls.
func TestContainer(t *testing.T) {
	root := image(t)
	var files []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			files = append(files, strings.TrimPrefix(path, root))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(files)
	want := []string{"/etc/nlb/nlb.yaml", "/etc/passwd", "/usr/bin/nlb"}
	if diff := cmp.Diff(want, files); diff != "" {
		t.Fatalf("files (-want +got):\n%s", diff)
	}

	m := boot(t)
	m.run(t, m.take(t, "walk"), "network")
	for _, f := range files {
		m.write(t, "/srv/image"+f, readFile(t, root+f), 0o755)
	}
	m.write(t, "/srv/image/etc/nlb/nlb.yaml", []byte(`
state_dir: /var/lib/nlb
vips: [{address: 198.51.100.10, interface: lo}]
listeners:
  - {name: web, vip: 198.51.100.10, protocol: TCP, port: 80, forward: [{target_group: web}]}
  - {name: relayed, vip: 198.51.100.10, protocol: TCP, port: 7, forward: [{target_group: relayed}]}
target_groups:
  - {name: web, protocol: TCP, port: 8080, client_ip: hairpin_snat, targets: [{address: 10.0.1.11}]}
  - {name: relayed, protocol: TCP, port: 7, client_ip: proxy_protocol_v2, targets: [{address: 10.0.1.11}]}
`), 0o644)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program := m.take(t, self)
	m.echo(t, program, "t1")
	// The host's to set, as the documentation says.
	m.run(t, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.netfilter.nf_conntrack_acct=1",
		"net.ipv4.conf.all.send_redirects=0", "net.ipv4.conf.targets.send_redirects=0")
	m.run(t, "systemd-run", "--quiet", "--unit=container", "--service-type=notify",
		"-p", "RootDirectory=/srv/image", "-p", "MountAPIVFS=yes", "-p", "ProtectKernelTunables=yes", "-p", "NoNewPrivileges=yes",
		"-p", "CapabilityBoundingSet=CAP_NET_ADMIN CAP_NET_RAW CAP_NET_BIND_SERVICE CAP_SETUID CAP_SETGID",
		"/usr/bin/nlb", "serve", "-c", "/etc/nlb/nlb.yaml")
	if got := m.run(t, "ip", "netns", "exec", "client", "curl", "-sS", "--max-time", "5", "http://198.51.100.10/"); got != "hello from t1\n" {
		t.Errorf("the answer is %q", got)
	}
	m.talker(t, program, "relayed", "198.51.100.10:7").finish(t)
	// It gave up root.
	relay := m.run(t, "pgrep", "--exact", "nlb-relay")
	if uid := m.run(t, "stat", "--format=%u", "/proc/"+strings.TrimSpace(relay)); uid != fmt.Sprintln(65534) {
		t.Errorf("the relay is user %s", uid)
	}
}
