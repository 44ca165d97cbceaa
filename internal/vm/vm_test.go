package vm

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestOrder(t *testing.T) {
	const dep = `kernel/net/netfilter/nf_nat.ko.xz: kernel/net/netfilter/nf_conntrack.ko.xz kernel/lib/libcrc32c.ko.xz
kernel/net/netfilter/nf_conntrack.ko.xz: kernel/lib/libcrc32c.ko.xz
kernel/net/netfilter/nf-log.ko.xz:
kernel/lib/libcrc32c.ko.xz:
kernel/a.ko: kernel/b.ko
kernel/b.ko: kernel/a.ko
kernel/c.ko: kernel/gone.ko
`
	m, err := ParseModules(strings.NewReader(dep), strings.NewReader("kernel/drivers/virtio/virtio.ko\n"))
	if err != nil {
		t.Fatal(err)
	}
	const net = "kernel/net/netfilter/"
	for _, c := range []struct {
		names string
		want  []string
		err   string
	}{
		{"nf_nat", []string{"kernel/lib/libcrc32c.ko.xz", net + "nf_conntrack.ko.xz", net + "nf_nat.ko.xz"}, ""},
		{"libcrc32c nf_log nf_log", []string{"kernel/lib/libcrc32c.ko.xz", net + "nf-log.ko.xz"}, ""},
		{"virtio", nil, ""},
		{"ip_vs", nil, "this kernel has no module ip_vs"},
		{"c", nil, "this kernel has no module gone, which c needs"},
		{"a", nil, "module a needs itself"},
	} {
		got, err := m.Order(strings.Fields(c.names))
		if c.err != "" {
			if err == nil || err.Error() != c.err {
				t.Errorf("%s: %v, want %s", c.names, err, c.err)
			}
			continue
		}
		if diff := cmp.Diff(c.want, got); diff != "" || err != nil {
			t.Errorf("%s: %v (-want +got):\n%s", c.names, err, diff)
		}
	}
	if !m.Have("nf-log") || m.Have("virtio") {
		t.Error("only nf-log has a file")
	}
	if _, err := ParseModules(strings.NewReader("no colon"), strings.NewReader("")); err == nil {
		t.Error("a line without a colon was accepted")
	}
}

func TestNewest(t *testing.T) {
	names := []string{
		"linux-image-6.1.0-9-cloud-amd64", "linux-image-6.1.0-56-cloud-amd64", "linux-image-6.1.0-56-amd64",
		"linux-image-6.1.0-57-cloud-amd64-dbg", "linux-image-6.1.0-57-cloud-amd64-unsigned",
		"linux-image-6.12-cloud-amd64", "linux-image-6.12.107+deb12-cloud-amd64", "linux-image-6.12.99+deb12-cloud-amd64",
		"partial-6.12.200", ".lock",
	}
	for series, want := range map[string]string{
		"6.1": "linux-image-6.1.0-56-cloud-amd64", "6.12": "linux-image-6.12.107+deb12-cloud-amd64", "6.6": "",
	} {
		if got := newest(names, series); got != want {
			t.Errorf("%s: %q, want %q", series, got, want)
		}
	}
}

func TestUnsigned(t *testing.T) {
	signature := append(bytes.Repeat([]byte{7}, 20), make([]byte, 8)...)
	signature = binary.BigEndian.AppendUint32(signature, 20)
	tail := append(signature, signatureEnd...)
	lie := append(binary.BigEndian.AppendUint32(make([]byte, 8), 1<<31), signatureEnd...)
	for name, c := range map[string]struct{ in, want string }{
		"unsigned": {"module", "module"},
		"signed":   {"module" + string(tail), "module"},
		"too long": {string(lie), string(lie)},
		"mark":     {signatureEnd, signatureEnd},
	} {
		if got := string(unsigned([]byte(c.in))); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

func TestRewrite(t *testing.T) {
	for name, c := range map[string]struct {
		in   string
		want Arguments
	}{
		"as go test passes them": {
			"-test.testlogfile=/b/testlog.txt -test.paniconexit0 -test.timeout=10m0s -test.v=true -test.run=^TestX$",
			Arguments{Args: strings.Fields("-test.paniconexit0 -test.timeout=10m0s -test.v=true -test.run=^TestX$")},
		},
		"coverage": {
			"-test.coverprofile=/b/_cover_.out -test.gocoverdir=/b/gocoverdir",
			Arguments{
				Args:    strings.Fields("-test.coverprofile=/out/coverprofile -test.gocoverdir=/out/gocoverdir"),
				Files:   map[string]string{"coverprofile": "/b/_cover_.out"},
				Folders: map[string]string{"gocoverdir": "/b/gocoverdir"},
			},
		},
		"profiles": {
			"-test.cpuprofile=cpu.out -test.outputdir=/here",
			Arguments{Args: []string{"-test.cpuprofile=/out/cpuprofile"}, Files: map[string]string{"cpuprofile": "/here/cpu.out"}},
		},
		"relative to the package": {
			"-test.trace=t.out", Arguments{Args: []string{"-test.trace=/out/trace"}, Files: map[string]string{"trace": "/src/pkg/t.out"}},
		},
		"the test's own": {
			"-update word -test.trace=t.out", Arguments{Args: strings.Fields("-update word -test.trace=t.out")},
		},
	} {
		got := Rewrite(strings.Fields(c.in), "/src/pkg")
		if c.want.Files == nil {
			c.want.Files = map[string]string{}
		}
		if c.want.Folders == nil {
			c.want.Folders = map[string]string{}
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestParseLdd(t *testing.T) {
	got, err := parseLdd(`	linux-vdso.so.1 (0x00007ffd8c5f0000)
	libmnl.so.0 => /lib/x86_64-linux-gnu/libmnl.so.0 (0x00007f0e2c9a7000)
	/lib64/ld-linux-x86-64.so.2 (0x00007f0e2cb1c000)
`)
	want := []string{"/lib/x86_64-linux-gnu/libmnl.so.0", "/lib64/ld-linux-x86-64.so.2"}
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	if _, err := parseLdd("\tlibx.so => not found\n"); err == nil {
		t.Error("a missing library went unnoticed")
	}
}

// program is an ELF file with one segment and nothing in it.
func program(t *testing.T, segment elf.ProgType) []byte {
	t.Helper()
	header := elf.Header64{
		Ident: [elf.EI_NIDENT]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
		Type:  uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT),
	}
	header.Phoff, header.Phentsize, header.Phnum = uint64(binary.Size(header)), uint16(binary.Size(elf.Prog64{})), 1
	var b bytes.Buffer
	for _, part := range []any{header, elf.Prog64{Type: uint32(segment)}} {
		if err := binary.Write(&b, binary.LittleEndian, part); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

func TestDynamic(t *testing.T) {
	for name, c := range map[string]struct {
		in    []byte
		want  bool
		fails bool
	}{
		"static":  {in: program(t, elf.PT_LOAD)},
		"dynamic": {in: program(t, elf.PT_INTERP), want: true},
		"cut off": {in: program(t, elf.PT_INTERP)[:100], fails: true},
		"script":  {in: []byte("#!/bin/sh\n"), fails: true},
		"nothing": {fails: true},
	} {
		if got, err := dynamic(c.in); got != c.want || (err != nil) != c.fails {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

// TestProgramsWithoutLibraries takes them along without asking ldd(1), which
// isn't in this PATH.
func TestProgramsWithoutLibraries(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	for name, c := range map[string]struct {
		content []byte
		fails   string
	}{
		"static":  {content: program(t, elf.PT_LOAD)},
		"script":  {content: []byte("#!/bin/sh\n")},
		"dynamic": {program(t, elf.PT_INTERP), `"ldd": executable file not found`},
		"garbage": {[]byte("\x7fELF"), "/garbage: "},
	} {
		if err := os.WriteFile(filepath.Join(dir, name), c.content, 0o755); err != nil {
			t.Fatal(err)
		}
		err := addProgram(t.Context(), make(Tree), name)
		if (err != nil) != (c.fails != "") || err != nil && !strings.Contains(err.Error(), c.fails) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestTree reads an archive back as the kernel does: by the lengths in it.
func TestTree(t *testing.T) {
	tree := make(Tree)
	tree.File("/init", 0o755, []byte("program"))
	tree.File("/lib64/ld.so", 0o755, []byte("x"))
	tree.Link("/bin", "usr/bin")
	tree.Dir("/tmp", 0o1777)
	tree.Char("/dev/console", 0o600, 5, 1)
	var archive bytes.Buffer
	if err := tree.Encode(&archive); err != nil {
		t.Fatal(err)
	}
	if archive.Len()%512 != 0 {
		t.Errorf("%d bytes: not padded", archive.Len())
	}
	type file struct {
		Name, Content string
		Mode          uint32
		Major, Minor  uint32
	}
	var got []file
	rest := archive.Bytes()
	take := func(n, used int) string {
		s := string(rest[:n])
		rest = rest[n+(4-(used+n)%4)%4:]
		return s
	}
	for {
		var h struct{ inode, mode, uid, gid, links, mtime, size, major, minor, rmajor, rminor, name, check uint32 }
		fields := []*uint32{&h.inode, &h.mode, &h.uid, &h.gid, &h.links, &h.mtime, &h.size, &h.major, &h.minor, &h.rmajor, &h.rminor, &h.name, &h.check}
		if string(rest[:6]) != "070701" {
			t.Fatalf("no magic: %q", rest[:6])
		}
		for i, f := range fields {
			b := make([]byte, 4)
			if _, err := hex.Decode(b, rest[6+8*i:14+8*i]); err != nil {
				t.Fatal(err)
			}
			*f = binary.BigEndian.Uint32(b)
		}
		rest = rest[110:]
		name := strings.TrimSuffix(take(int(h.name), 110), "\x00")
		content := take(int(h.size), 0)
		if name == "TRAILER!!!" {
			break
		}
		got = append(got, file{name, content, h.mode, h.rmajor, h.rminor})
	}
	want := []file{
		{Name: "bin", Content: "usr/bin", Mode: 0o120777},
		{Name: "dev", Mode: 0o040755},
		{Name: "dev/console", Mode: 0o020600, Major: 5, Minor: 1},
		{Name: "init", Content: "program", Mode: 0o100755},
		{Name: "tmp", Mode: 0o041777},
		{Name: "usr", Mode: 0o040755},
		{Name: "usr/lib64", Mode: 0o040755},
		{Name: "usr/lib64/ld.so", Content: "x", Mode: 0o100755},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// A sent is what the guest sends in these tests.
type sent func(*FrameWriter)

func stream(t *testing.T, all ...sent) io.Reader {
	t.Helper()
	var b bytes.Buffer
	w := NewFrameWriter(&b)
	for _, s := range all {
		s(w)
	}
	return &b
}

func frame(k Kind, payload string) sent {
	return func(w *FrameWriter) { _ = w.Write(k, []byte(payload)) }
}

func TestReceive(t *testing.T) {
	const long = 200 << 10 // several frames
	output := func(w *FrameWriter) {
		_, _ = w.As(Stdout).Write([]byte("hello "))
		_, _ = w.As(Stderr).Write([]byte("oops"))
		_, _ = w.As(Stdout).Write(bytes.Repeat([]byte("x"), long))
	}
	for name, c := range map[string]struct {
		sent []sent
		ends []int
		err  string
	}{
		"two runs":         {[]sent{output, frame(Exit, "0"), frame(Exit, "7"), frame(Done, "")}, []int{0, 7}, ""},
		"nothing":          {nil, nil, ErrNoExit.Error()},
		"one of two":       {[]sent{output, frame(Exit, "0")}, []int{0}, ErrNoExit.Error()},
		"done too early":   {[]sent{frame(Exit, "0"), frame(Done, "")}, []int{0}, ErrNoExit.Error()},
		"one too many":     {[]sent{frame(Exit, "0"), frame(Exit, "0"), frame(Exit, "0")}, []int{0, 0}, "the guest went on after its last run"},
		"broken":           {[]sent{frame(Broken, "no such file")}, nil, ErrNoExit.Error() + ": no such file"},
		"no status":        {[]sent{frame(Exit, "256")}, nil, `the guest sent the exit status "256"`},
		"escaping":         {[]sent{frame(File, "../etc/passwd\x00x")}, nil, `the guest sent a file with the name "../etc/passwd"`},
		"file without end": {[]sent{frame(File, "x")}, nil, `the guest sent a file with the name "x"`},
		"unknown kind":     {[]sent{frame('?', "")}, nil, `the guest sent a frame of kind '?'`},
	} {
		t.Run(name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			var ends []int
			r := &receiver{arguments: make([]Arguments, 2), stdout: &stdout, stderr: &stderr,
				end: func(_ int, r Result) { ends = append(ends, r.Status) }}
			err := r.receive(stream(t, c.sent...))
			if c.err == "" && err != nil || c.err != "" && (err == nil || err.Error() != c.err) {
				t.Errorf("%v, want %q", err, c.err)
			}
			if diff := cmp.Diff(c.ends, ends); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if name == "two runs" && (stdout.Len() != 6+long || stderr.String() != "oops") {
				t.Errorf("%d bytes of output, and %q", stdout.Len(), &stderr)
			}
		})
	}
}

func TestReceiveFiles(t *testing.T) {
	dir := t.TempDir()
	profile, folder := filepath.Join(dir, "c.out"), filepath.Join(dir, "cover")
	if err := os.WriteFile(profile, []byte("what was there before, and was longer"), 0o644); err != nil {
		t.Fatal(err)
	}
	content := strings.Repeat("0123456789", 20_000)
	r := &receiver{end: func(int, Result) {}, arguments: []Arguments{{
		Files: map[string]string{"coverprofile": profile}, Folders: map[string]string{"gocoverdir": folder},
	}}}
	err := r.receive(stream(t, func(w *FrameWriter) {
		_, _ = w.File("coverprofile").Write([]byte(content))
		_, _ = w.File("gocoverdir/covmeta.1").Write(nil)
		_, _ = w.File("scratch").Write([]byte("nobody asked"))
	}, frame(Exit, "0"), frame(Done, "")))
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string]string)
	for _, name := range []string{profile, filepath.Join(folder, "covmeta.1")} {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		got[filepath.Base(name)] = string(text)
	}
	if diff := cmp.Diff(map[string]string{"c.out": content, "covmeta.1": ""}, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*")); len(left) != 2 {
		t.Errorf("files: %q", left)
	}
}

func FuzzReadFrame(f *testing.F) {
	f.Add([]byte("o\x00\x00\x00\x02hi"))
	f.Add([]byte("x\x00\x00\x00\x010z\x00\x00\x00\x00"))
	f.Add([]byte("o\xff\xff\xff\xff"))
	f.Add([]byte("f\x00\x00\x00\x05a\x00bcd"))
	f.Fuzz(func(t *testing.T, in []byte) {
		r := bytes.NewReader(in)
		kind, payload, err := ReadFrame(r)
		if err != nil {
			if errors.Is(err, io.EOF) && len(in) > 4 {
				t.Errorf("%q: the end inside a frame looks like one between two", in)
			}
			return
		}
		var again bytes.Buffer
		if err := NewFrameWriter(&again).Write(kind, payload); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(again.Bytes(), in[:len(in)-r.Len()]) {
			t.Errorf("%q was read, and written as %q", in, &again)
		}
	})
}

func TestCacheIsCompleteOrAbsent(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	cache, err := cacheFolder("images")
	if err != nil {
		t.Fatal(err)
	}
	old := filepath.Join(cache, "old.cpio")
	if err := os.WriteFile(old, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	long := time.Now().Add(-30 * 24 * time.Hour)
	if err := os.Chtimes(old, long, long); err != nil {
		t.Fatal(err)
	}
	tree := make(Tree)
	tree.File("/a", 0o644, []byte("a"))
	if err := writeAtomically(filepath.Join(cache, "new.cpio"), tree); err != nil {
		t.Fatal(err)
	}
	prune(cache, time.Now().Add(-time.Hour))
	left, err := filepath.Glob(filepath.Join(cache, "*"))
	if diff := cmp.Diff([]string{filepath.Join(cache, "new.cpio")}, left); diff != "" || err != nil {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
}

// Only a folder of an unpacked package will do, with one kernel.
func TestOpenKernel(t *testing.T) {
	root := t.TempDir()
	if _, err := FindKernel(t.Context(), root); err == nil || !strings.Contains(err.Error(), "0 kernels") {
		t.Errorf("an empty folder: %v", err)
	}
	write := func(name string) {
		name = filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("boot/vmlinuz-6.12.1-test")
	if _, err := FindKernel(t.Context(), root); err == nil || !strings.Contains(err.Error(), "depmod -b") {
		t.Errorf("without modules.dep: %v", err)
	}
	write("lib/modules/6.12.1-test/modules.dep")
	k, err := FindKernel(t.Context(), root)
	want := &Kernel{
		Series: root, Release: "6.12.1-test", Image: filepath.Join(root, "boot/vmlinuz-6.12.1-test"),
		Modules: filepath.Join(root, "lib/modules/6.12.1-test"),
	}
	if diff := cmp.Diff(want, k); diff != "" || err != nil {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
}

// TestDoSaysWhoEndedIt ends the context before anything has been booted: the
// image is being made then.
func TestDoSaysWhoEndedIt(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	cause := errors.New("killed after 4s")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	m := Machine{Kernel: &Kernel{}}
	err := m.Do(ctx, nil, io.Discard, io.Discard, nil)
	if !errors.Is(err, cause) || !strings.HasPrefix(err.Error(), "killed after 4s: make the initramfs: ") {
		t.Error(err)
	}
}

// TestCounting holds to the option's promise that time is instructions, and the
// default to what tests have always run with.
func TestCounting(t *testing.T) {
	for _, c := range []struct {
		counting       bool
		have, haveNone []string
	}{
		{false, []string{"tsc_early_khz=2000000", "clocksource=jiffies"}, []string{"-icount", "-cpu", "clocksource=tsc"}},
		{true, []string{"tsc_early_khz=1000000", "clocksource=tsc", "-icount", "shift=0,sleep=off"}, []string{"clocksource=jiffies"}},
	} {
		m := Machine{Kernel: &Kernel{Image: "vmlinuz"}, Counting: c.counting}
		var words []string
		for _, arg := range m.qemuArgs("initrd", "console") {
			words = append(words, strings.Fields(arg)...)
		}
		for _, w := range c.have {
			if !slices.Contains(words, w) {
				t.Errorf("counting %v: no %s in %q", c.counting, w, words)
			}
		}
		for _, w := range c.haveNone {
			if slices.Contains(words, w) {
				t.Errorf("counting %v: %s in %q", c.counting, w, words)
			}
		}
	}
}
