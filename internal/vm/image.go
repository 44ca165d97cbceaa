package vm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// baseTools are in every guest. Busybox stands in for the rest of coreutils;
// dash is the shell, since busybox's own prefers its own ip, which knows no
// network namespaces.
var baseTools = []string{"dash", "ip", "ss", "tc", "nstat", "nft", "ipvsadm", "conntrack", "sysctl"}

// A base is an initramfs with all that doesn't change from run to run.
type base struct {
	file    string   // the archive, in the cache
	modules []string // to load, in order, by their path in the guest
}

// buildBase returns the base for a kernel and tools, from the cache if one of
// the same content is there.
func buildBase(ctx context.Context, k *Kernel, tools []string) (*base, error) {
	tree, err := system(ctx, tools)
	if err != nil {
		return nil, err
	}
	known, err := k.modules()
	if err != nil {
		return nil, err
	}
	names := slices.Concat(wanted, slices.DeleteFunc(slices.Clone(former), func(name string) bool { return !known.Have(name) }))
	files, err := known.Order(names)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", k.Release, err)
	}
	b := &base{}
	for _, f := range files {
		b.modules = append(b.modules, "/vm/modules/"+moduleName(f)+".ko")
	}
	cache, err := cacheFolder("images")
	if err != nil {
		return nil, err
	}
	key, err := baseKey(tree, k, files)
	if err != nil {
		return nil, err
	}
	b.file = filepath.Join(cache, key+".cpio")
	now := time.Now()
	if os.Chtimes(b.file, now, now) == nil {
		return b, nil
	}
	for i, f := range files {
		content, err := k.module(ctx, f)
		if err != nil {
			return nil, err
		}
		tree.File(b.modules[i], 0o644, content)
	}
	prune(cache, now.Add(-7*24*time.Hour))
	return b, writeAtomically(b.file, tree)
}

// baseKey is the hash of what goes into a base.
func baseKey(tree Tree, k *Kernel, modules []string) (string, error) {
	hash := sha256.New()
	if err := tree.Encode(hash); err != nil {
		return "", err
	}
	for _, f := range modules {
		content, err := os.ReadFile(filepath.Join(k.Modules, f))
		if err != nil {
			return "", err
		}
		fmt.Fprintf(hash, "%s %d\n", f, len(content))
		_, _ = hash.Write(content)
	}
	return hex.EncodeToString(hash.Sum(nil)), nil
}

// prune removes the images that nobody used since.
func prune(cache string, since time.Time) {
	images, _ := filepath.Glob(filepath.Join(cache, "*.cpio*"))
	for _, image := range images {
		if info, err := os.Stat(image); err == nil && info.ModTime().Before(since) {
			_ = os.Remove(image)
		}
	}
}

// writeAtomically writes a tree's archive to a file that is complete as soon as
// it has its name.
func writeAtomically(name string, tree Tree) error {
	var archive bytes.Buffer
	if err := tree.Encode(&archive); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(name), filepath.Base(name)+"-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(archive.Bytes())
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}

// system is a small Debian: folders, programs with their libraries, and the
// tables that they look names up in.
func system(ctx context.Context, tools []string) (Tree, error) {
	tree := make(Tree)
	for _, dir := range merged {
		tree.Link("/"+dir, "usr/"+dir)
		tree.Dir("/usr/"+dir, 0o755)
	}
	for _, dir := range []string{"/dev", "/proc", "/sys", "/run", "/root", "/var/log", "/var/lib"} {
		tree.Dir(dir, 0o755)
	}
	tree.Dir("/tmp", 0o1777)
	tree.Dir("/var/tmp", 0o1777)
	tree.Link("/var/run", "/run")
	// The kernel opens it for init before devtmpfs is mounted.
	tree.Char("/dev/console", 0o600, 5, 1)

	tree.File("/etc/passwd", 0o644, []byte("root:x:0:0::/root:/bin/sh\nwww-data:x:33:33::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n"))
	tree.File("/etc/group", 0o644, []byte("root:x:0:\nwww-data:x:33:\nnogroup:x:65534:\n"))
	tree.File("/etc/hosts", 0o644, []byte("127.0.0.1 localhost\n::1 localhost\n"))
	tree.File("/etc/nsswitch.conf", 0o644, []byte("hosts: files\n"))
	for _, table := range []string{"/etc/protocols", "/etc/services"} {
		if content, err := os.ReadFile(table); err == nil {
			tree.File(table, 0o644, content)
		} else {
			return nil, fmt.Errorf("%w: the Debian package netbase has it", err)
		}
	}

	all := append(slices.Clone(baseTools), tools...)
	slices.Sort(all)
	for _, tool := range slices.Compact(all) {
		if err := addProgram(ctx, tree, tool); err != nil {
			return nil, err
		}
	}
	tree.Link("/bin/sh", "dash")
	return tree, addBusybox(ctx, tree)
}

// addProgram adds a program of the host, which is found in PATH, and the shared
// libraries that it is linked with.
func addProgram(ctx context.Context, tree Tree, name string) error {
	file, err := exec.LookPath(name)
	if err != nil {
		return fmt.Errorf("%w: deploy/packages names the Debian package", err)
	}
	content, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	tree.File("/usr/bin/"+filepath.Base(name), 0o755, content)
	// Some are called by the path that they have on Debian.
	tree.Link("/usr/sbin/"+filepath.Base(name), "../bin/"+filepath.Base(name))

	if bytes.HasPrefix(content, []byte("#!")) {
		return nil // what interprets a script is a program of its own
	}
	needs, err := dynamic(content)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	if !needs {
		return nil
	}
	out, err := run(ctx, "", "ldd", file)
	if err != nil {
		return err
	}
	libraries, err := parseLdd(out)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	for _, library := range libraries {
		if content, err = os.ReadFile(library); err != nil {
			return err
		}
		tree.File(library, 0o755, content)
	}
	return nil
}

// parseLdd lists the files that ldd(1) names, the dynamic linker among them.
func parseLdd(out string) ([]string, error) {
	var files []string
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line)
		if strings.HasSuffix(line, "not found") {
			return nil, fmt.Errorf("a library is missing: %s", line)
		}
		if _, target, ok := strings.Cut(line, " => "); ok {
			line = target
		}
		file, _, ok := strings.Cut(line, " (0x")
		if ok && strings.HasPrefix(file, "/") { // the vDSO has no file
			files = append(files, file)
		}
	}
	return files, nil
}

// addBusybox adds busybox, with a link for each of its programs that the tree
// doesn't have yet.
func addBusybox(ctx context.Context, tree Tree) error {
	if err := addProgram(ctx, tree, "busybox"); err != nil {
		return err
	}
	applets, err := run(ctx, "", "busybox", "--list")
	if err != nil {
		return err
	}
	for _, applet := range strings.Fields(applets) {
		if _, have := tree[clean("/bin/"+applet)]; !have {
			tree.Link("/bin/"+applet, "busybox")
		}
	}
	return nil
}
