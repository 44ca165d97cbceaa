package vm

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"
)

// A Kernel is an unpacked Debian kernel package.
type Kernel struct {
	Series  string // as asked for: "6.12"
	Release string // as uname -r has it
	Image   string // the kernel's file
	Modules string // the folder that modules.dep is in
}

// FindKernel returns the newest kernel of a series, such as "6.12", that is in
// the cache, and fetches the newest that apt offers if there is none. Nothing is
// installed. A series with a slash is a folder of an unpacked package instead.
func FindKernel(ctx context.Context, series string) (*Kernel, error) {
	if strings.Contains(series, "/") {
		return openKernel(series, series)
	}
	cache, err := cacheFolder("kernels")
	if err != nil {
		return nil, err
	}
	unlock, err := lock(cache)
	if err != nil {
		return nil, err
	}
	defer unlock()
	entries, err := os.ReadDir(cache)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	name := newest(names, series)
	if name == "" {
		if name, err = fetchKernel(ctx, cache, series); err != nil {
			return nil, fmt.Errorf("fetch a kernel %s: %w", series, err)
		}
	}
	return openKernel(filepath.Join(cache, name), series)
}

// newest is the package of a series with the highest version among names, ""
// if there is none. Apart from the cloud kernels, the archive has larger ones,
// unsigned ones and debug symbols.
func newest(names []string, series string) string {
	of := regexp.MustCompile(`^linux-image-` + regexp.QuoteMeta(series) + `\.[0-9][0-9A-Za-z.+~-]*-cloud-amd64$`)
	best := ""
	for _, name := range names {
		if of.MatchString(name) && (best == "" || naturalLess(best, name)) {
			best = name
		}
	}
	return best
}

var digits = regexp.MustCompile(`[0-9]+|[^0-9]+`)

// naturalLess compares strings with the numbers in them as numbers.
func naturalLess(a, b string) bool {
	as, bs := digits.FindAllString(a, -1), digits.FindAllString(b, -1)
	for i := range min(len(as), len(bs)) {
		x, y := as[i], bs[i]
		if x == y {
			continue
		}
		if isDigit(x[0]) && isDigit(y[0]) {
			x, y = strings.TrimLeft(x, "0"), strings.TrimLeft(y, "0")
			if len(x) != len(y) {
				return len(x) < len(y)
			}
		}
		return x < y
	}
	return len(as) < len(bs)
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }

// fetchKernel adds a kernel to the cache and returns its package's name. The
// folder gets that name when it is complete, and not before.
func fetchKernel(ctx context.Context, cache, series string) (string, error) {
	// Whoever began these is gone: we hold the lock.
	begun, _ := filepath.Glob(filepath.Join(cache, "partial-*"))
	for _, dir := range begun {
		_ = os.RemoveAll(dir)
	}
	partial, err := os.MkdirTemp(cache, "partial-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(partial)

	name, err := download(ctx, partial, series)
	if err != nil {
		// Old packages disappear from the archive, and some systems come
		// without any lists: ask for new ones, once.
		if _, e := run(ctx, partial, "apt-get", "-qq", "update"); e != nil {
			return "", errors.Join(err, e)
		}
		if name, err = download(ctx, partial, series); err != nil {
			return "", err
		}
	}
	packages, err := filepath.Glob(filepath.Join(partial, "*.deb"))
	if err != nil || len(packages) != 1 {
		return "", fmt.Errorf("apt-get download %s: %d packages (%v)", name, len(packages), err)
	}
	root := filepath.Join(partial, "root")
	if _, err := run(ctx, partial, "dpkg", "-x", packages[0], root); err != nil {
		return "", err
	}
	k, err := openImage(root, series)
	if err != nil {
		return "", err
	}
	// The package's own installation would do this.
	if _, err := run(ctx, partial, "depmod", "-b", root, k.Release); err != nil {
		return "", err
	}
	if err := os.Chmod(root, 0o755); err != nil {
		return "", err
	}
	return name, os.Rename(root, filepath.Join(cache, name))
}

func download(ctx context.Context, dir, series string) (string, error) {
	out, err := run(ctx, dir, "apt-cache", "pkgnames", "linux-image-"+series+".")
	if err != nil {
		return "", err
	}
	name := newest(strings.Fields(out), series)
	if name == "" {
		return "", fmt.Errorf("apt knows no package linux-image-%s.*-cloud-amd64", series)
	}
	_, err = run(ctx, dir, "apt-get", "-qq", "download", name)
	return name, err
}

func openKernel(root, series string) (*Kernel, error) {
	k, err := openImage(root, series)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(k.Modules, "modules.dep")); err != nil {
		return nil, fmt.Errorf("%w (depmod -b %s %s makes it)", err, root, k.Release)
	}
	return k, nil
}

func openImage(root, series string) (*Kernel, error) {
	images, err := filepath.Glob(filepath.Join(root, "boot", "vmlinuz-*"))
	if err != nil || len(images) != 1 {
		return nil, fmt.Errorf("%s: there are %d kernels in boot/ and not one", root, len(images))
	}
	release := strings.TrimPrefix(filepath.Base(images[0]), "vmlinuz-")
	return &Kernel{
		Series: series, Release: release, Image: images[0],
		Modules: filepath.Join(root, "lib", "modules", release),
	}, nil
}

// module returns the content of a module's file, without its signature:
// to check them takes an emulated processor a second for all of them. Debian
// compresses modules from 6.12 on; not every kernel could unpack them itself.
func (k *Kernel) module(ctx context.Context, file string) ([]byte, error) {
	file = filepath.Join(k.Modules, file)
	if !strings.HasSuffix(file, ".xz") {
		content, err := os.ReadFile(file)
		return unsigned(content), err
	}
	out, err := run(ctx, "", "xz", "-dc", file)
	return unsigned([]byte(out)), err
}

// signatureEnd is what a signed module ends with
// (https://docs.kernel.org/admin-guide/module-signing.html).
const signatureEnd = "~Module signature appended~\n"

// unsigned cuts off a module's signature: the data, twelve bytes that end with
// the data's length, and the end mark (struct module_signature).
func unsigned(module []byte) []byte {
	rest, signed := bytes.CutSuffix(module, []byte(signatureEnd))
	if !signed || len(rest) < 12 {
		return module
	}
	length := uint64(binary.BigEndian.Uint32(rest[len(rest)-4:])) + 12
	if length > uint64(len(rest)) {
		return module
	}
	return rest[:uint64(len(rest))-length]
}

// modules reads what depmod says of the kernel's modules.
func (k *Kernel) modules() (*Modules, error) {
	read := func(name string) (io.Reader, error) {
		text, err := os.ReadFile(filepath.Join(k.Modules, name))
		return bytes.NewReader(text), err
	}
	dep, err := read("modules.dep")
	if err != nil {
		return nil, err
	}
	builtin, err := read("modules.builtin")
	if err != nil {
		return nil, err
	}
	return ParseModules(dep, builtin)
}

// run returns what a program writes to its standard output. The error has what
// it said.
func run(ctx context.Context, dir, name string, args ...string) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &stdout, &stderr
	if err := cmd.Run(); err != nil {
		if errors.Is(err, exec.ErrNotFound) {
			return "", fmt.Errorf("%w: deploy/packages names the Debian package", err)
		}
		return "", fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.String(), nil
}

// cacheFolder makes a folder of ours below the user's cache.
func cacheFolder(name string) (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		// Neither $XDG_CACHE_HOME nor $HOME, as under a service manager.
		cache = "/var/cache"
	}
	dir := filepath.Join(cache, "nlb", name)
	return dir, os.MkdirAll(dir, 0o755)
}

// lock takes the folder's lock; others wait.
func lock(dir string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(dir, ".lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return func() { _ = f.Close() }, nil
}
