package docs_test

import (
	"bufio"
	stdcmp "cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"nlb/internal/wait"
)

// programs is the folder that nlb is built into.
var programs string

func TestMain(m *testing.M) {
	moreAtOnce()
	code, err := withPrograms(m.Run)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// moreAtOnce lets twice as many pages run at the same time as there are cores,
// unless -parallel has said how many: most of them wait, for packets that get no
// answer or for the first probe.
func moreAtOnce() {
	flag.Parse()
	atOnce, cores := flag.Lookup("test.parallel"), runtime.GOMAXPROCS(0)
	if atOnce.Value.String() == strconv.Itoa(cores) {
		_ = atOnce.Value.Set(strconv.Itoa(2 * cores)) // a number
	}
}

func withPrograms(run func() int) (code int, err error) {
	if programs, err = os.MkdirTemp("", "nlb-docs-"); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(programs)) }()
	// The relay's user has to get at it.
	if err := os.Chmod(programs, 0o755); err != nil {
		return 0, err
	}
	build := exec.Command("go", "build", "-o", filepath.Join(programs, "nlb"), "nlb/cmd/nlb")
	if out, err := build.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("build nlb: %w\n%s", err, out)
	}
	return run(), nil
}

// Limits: of a page, and of a command until it prints what the page says.
const (
	pageTime       = 2 * time.Minute
	eventuallyTime = 20 * time.Second
)

// TestPagesRun types what the pages say, as a reader would: the blocks of a page
// one after the other, in a shell with network namespaces, mounts and processes of
// its own, and compares what is printed.
func TestPagesRun(t *testing.T) {
	all := pages(t)
	todo := make(map[string][]block)
	for name := range all {
		if found := sessionBlocks(t, all, name); slices.ContainsFunc(found, block.runs) {
			todo[name] = found
		}
	}
	if len(todo) < 10 {
		t.Errorf("only %d pages have commands", len(todo))
	}
	// The longest first, so that the others run beside it.
	names := slices.SortedFunc(maps.Keys(todo), func(a, b string) int {
		return stdcmp.Or(len(todo[b])-len(todo[a]), strings.Compare(a, b))
	})
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			begin(t).page(t, todo[name])
		})
	}
}

// begins names the sections whose blocks come before a page's own.
var begins = regexp.MustCompile(`(?m)^<!-- begins with: (.*) -->$`)

func sessionBlocks(t *testing.T, all map[string]string, name string) (todo []block) {
	t.Helper()
	if m := begins.FindStringSubmatch(all[name]); m != nil {
		for word := range strings.FieldsSeq(m[1]) {
			file, anchor, _ := strings.Cut(word, "#")
			file = filepath.ToSlash(filepath.Join(filepath.Dir(name), file))
			before := blocks(section(all[file], anchor))
			if len(before) == 0 {
				t.Fatalf("%s begins with %s, which has no blocks", name, word)
			}
			todo = append(todo, before...)
		}
	}
	return append(todo, blocks(all[name])...)
}

// A session is a shell that reads commands one at a time. Everything that it
// starts ends with it, since it is the first process of its namespace.
type session struct {
	dir    string
	stdin  io.Writer
	status *bufio.Reader // a line with the exit code of each command
	count  int
}

// furnish gives the session's namespaces what a host has, and hides what the host
// has: pages use the places that are the default. The working folder is like this
// repository's.
const furnish = `set -e
mount --make-rslave /
mount -t proc proc /proc
mount -t sysfs sysfs /sys
for folder in /run /var/lib /var/log; do mount -t tmpfs -o mode=755 tmpfs $folder; done
mkdir /run/netns /var/lib/nginx
ip link set lo up
set +e
`

// begin starts a session that ends with the test.
func begin(t *testing.T) *session {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("network namespaces need root")
	}
	s := &session{dir: t.TempDir()}
	here, err := filepath.Abs(root)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(
		os.Chmod(filepath.Dir(s.dir), 0o755), os.Chmod(s.dir, 0o755), // for servers that leave root
		os.Symlink(programs, filepath.Join(s.dir, "bin")),
		os.Symlink(filepath.Join(here, "deploy"), filepath.Join(s.dir, "deploy")),
	); err != nil {
		t.Fatal(err)
	}
	s.start(t)
	if out, code, err := s.run(furnish); err != nil || code != 0 {
		t.Fatalf("furnish the namespaces: exit code %d, %v\n%s", code, err, out)
	}
	return s
}

func (s *session) start(t *testing.T) {
	t.Helper()
	codes, theirs, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), pageTime)
	cmd := exec.CommandContext(ctx, "bash", "--noprofile", "--norc", "-s")
	cmd.Dir = s.dir
	cmd.Env = append(os.Environ(), "LC_ALL=C", "PATH="+programs+":"+os.Getenv("PATH")+":/usr/sbin:/sbin")
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID,
		Pdeathsig:  unix.SIGKILL,
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	// PR_SET_PDEATHSIG fires when the thread that forked ends.
	runtime.LockOSThread()
	if err := cmd.Start(); err != nil {
		t.Fatalf("start a shell in new namespaces: %v", err)
	}
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait() // it was killed
		runtime.UnlockOSThread()
		_ = codes.Close()
	})
	if err := theirs.Close(); err != nil {
		t.Fatal(err)
	}
	s.stdin, s.status = stdin, bufio.NewReader(codes)
}

// run has the shell run a script, and returns what was printed and the exit code.
func (s *session) run(script string) (printed string, code int, err error) {
	s.count++
	name := filepath.Join(s.dir, fmt.Sprintf(".%d", s.count))
	if err := os.WriteFile(name, []byte(script), 0o600); err != nil {
		return "", 0, err
	}
	if _, err := fmt.Fprintf(s.stdin, ". %s </dev/null >%[1]s.out 2>&1; echo $? >&3\n", name); err != nil {
		return "", 0, err
	}
	line, ended := s.status.ReadString('\n')
	out, err := os.ReadFile(name + ".out")
	if ended != nil {
		return string(out), 0, errors.Join(err, errors.New("a command failed, or took too long"))
	}
	if err == nil {
		code, err = strconv.Atoi(strings.TrimSpace(line))
	}
	return string(out), code, err
}

// page goes through the blocks.
func (s *session) page(t *testing.T, todo []block) {
	for _, b := range todo {
		switch file := b.value("file"); {
		case file != "":
			if err := os.WriteFile(filepath.Join(s.dir, file), []byte(b.text), 0o644); err != nil {
				t.Fatal(err)
			}
		case !b.runs():
		case b.language() == "sh":
			if out, code, err := s.run("set -e\n" + b.text + "set +e\n"); err != nil || code != 0 {
				t.Fatalf("exit code %d, %v:\n%s\nprinted\n%s", code, err, b.text, out)
			}
		default:
			for _, c := range b.commands() {
				s.console(t, b, c)
			}
		}
	}
}

// console runs one line, again and again if that is the block's way, and compares
// what it prints.
func (s *session) console(t *testing.T, b block, c command) {
	t.Helper()
	as := func() error {
		out, code, err := s.run(c.line + "\n")
		if err != nil {
			t.Fatalf("%s: %v\n%s", c.line, err, out) // there is no shell to ask again
		}
		if (code != 0) == b.has("fails") && like(c.prints, out) {
			return nil
		}
		return fmt.Errorf("exit code %d, and it printed (-the page +the command):\n%s", code, cmp.Diff(lines(c.prints), lines(out)))
	}
	var err error
	if b.has("eventually") {
		err = wait.Try(eventuallyTime, as)
	} else {
		err = as()
	}
	if err != nil {
		t.Fatalf("%s: %v", c.line, err)
	}
}

// like says whether what was printed is what the page has. In the page … is
// anything within a line, and a line of it any lines.
func like(page, printed string) bool {
	var b strings.Builder
	b.WriteString(`\A`)
	for _, line := range lines(page) {
		if line == "…" {
			b.WriteString(`(?:.*\n)*?`)
			continue
		}
		for i, part := range strings.Split(line, "…") {
			if i > 0 {
				b.WriteString(".*")
			}
			b.WriteString(regexp.QuoteMeta(part))
		}
		b.WriteString(`\n`)
	}
	b.WriteString(`\z`)
	text := strings.Join(lines(printed), "\n") + "\n"
	if len(lines(printed)) == 0 {
		text = ""
	}
	return regexp.MustCompile(b.String()).MatchString(text)
}

var (
	spaces = regexp.MustCompile(`[ \t]+`)
	// ephemeral are ports that the kernel chose (net.ipv4.ip_local_port_range).
	ephemeral = regexp.MustCompile(`([.:=])(3276[89]|327[7-9]\d|32[89]\d\d|3[3-9]\d\d\d|[45]\d\d\d\d|60\d\d\d)\b`)
)

// lines are those of a text without what differs between two runs: the width of
// columns, and ports that the kernel chose, which are numbered in the order in
// which they appear.
func lines(text string) []string {
	ports := make(map[string]string)
	text = ephemeral.ReplaceAllStringFunc(text, func(end string) string {
		port := end[1:]
		if ports[port] == "" {
			ports[port] = fmt.Sprint("PORT", len(ports)+1)
		}
		return end[:1] + ports[port]
	})
	var all []string
	for line := range strings.Lines(text) {
		all = append(all, strings.TrimRight(spaces.ReplaceAllString(line, " "), " \n"))
	}
	return all
}

// TestLike has what a page may leave open, and what not.
func TestLike(t *testing.T) {
	for _, c := range []struct {
		page, printed string
		want          bool
	}{
		{"", "", true},
		{"", "x\n", false},
		{"x\n", "", false},
		{"a  b\n", "a      b  \n", true},
		{"a\n", "a\nb\n", false},
		{"a\n…\n", "a\nb\nc\n", true},
		{"…\nc\n", "a\nb\nc\n", true},
		{"since …s ago\n", "since 12s ago\n", true},
		{"since …s ago\n", "since 12m\n", false},
		{"1.2.3.4.40001 > 5:40001\n", "1.2.3.4.50505 > 5:50505\n", true},
		{"1.2.3.4.40001 > 5:40001\n", "1.2.3.4.50505 > 5:50506\n", false},
		{"port 8080 (a+b)\n", "port 8080 (a+b)\n", true},
		{"1.2.3.4:8080\n", "1.2.3.4:8081\n", false},
	} {
		if got := like(c.page, c.printed); got != c.want {
			t.Errorf("%q like %q: %v", c.printed, c.page, got)
		}
	}
}
