package packaging_test

import (
	"bytes"
	"debug/elf"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"nlb/config"
)

// built has the packages of a version, which all tests share.
var built = struct {
	sync.Mutex
	source  string
	folders map[string]string
}{folders: make(map[string]string)}

// packages returns the folder with the packages of a version. They stay for the
// process's other tests.
func packages(t *testing.T, version string) string {
	t.Helper()
	built.Lock()
	defer built.Unlock()
	if built.folders[version] == "" {
		folder := build(t, root, version)
		kept, err := os.MkdirTemp("", "nlb-packages-")
		if err == nil {
			err = os.CopyFS(kept, os.DirFS(folder))
		}
		if err != nil {
			t.Fatal(err)
		}
		built.folders[version] = kept
	}
	return built.folders[version]
}

func debOf(version string) string { return "nlb_" + version + "_amd64.deb" }

func TestTwoBuildsAreTheSame(t *testing.T) {
	one, other := packages(t, older), build(t, copySource(t), older)
	names := []string{debOf(older), "nlb-" + older + "-1.x86_64.rpm", "nlb_" + older + ".cdx.json"}
	for _, name := range names {
		a, b := readFile(t, filepath.Join(one, name)), readFile(t, filepath.Join(other, name))
		if !bytes.Equal(a, b) {
			t.Errorf("%s of two folders differs", name)
		}
	}
}

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

// unpacked is the folder tree of the .deb.
func unpacked(t *testing.T) string {
	t.Helper()
	to := t.TempDir()
	run(t, "dpkg-deb", "--raw-extract", filepath.Join(packages(t, older), debOf(older)), to)
	return to
}

// commonFiles are in both packages, apart from pages of commands.
var commonFiles = []string{
	"/etc/nlb/nlb.yaml",
	"/usr/bin/nlb",
	"/usr/lib/modules-load.d/nlb.conf",
	"/usr/lib/sysctl.d/60-nlb.conf",
	"/usr/lib/sysusers.d/nlb.conf",
	"/usr/lib/tmpfiles.d/nlb.conf",
	"/usr/share/bash-completion/completions/nlb",
	"/usr/share/doc/nlb/sbom.cdx.json",
	"/usr/share/fish/vendor_completions.d/nlb.fish",
	"/usr/share/man/man5/nlb.yaml.5.gz",
	"/usr/share/man/man8/nlb.8.gz",
}

var commandPage = regexp.MustCompile(`^/usr/share/man/man1/nlb[a-z-]*\.1\.gz$`)

// listed sorts files and leaves out folders and pages of commands, of which there
// have to be some.
func listed(t *testing.T, files []string) []string {
	t.Helper()
	all := len(files)
	files = slices.DeleteFunc(files, func(f string) bool { return f == "" || commandPage.MatchString(f) })
	if all-len(files) < 15 {
		t.Errorf("only %d pages of commands", all-len(files))
	}
	slices.Sort(files)
	return files
}

func TestFilesOfTheDeb(t *testing.T) {
	var files []string
	for line := range strings.Lines(run(t, "dpkg-deb", "--contents", filepath.Join(packages(t, older), debOf(older)))) {
		fields := strings.Fields(line)
		if mode := fields[0]; !strings.HasPrefix(mode, "d") {
			files = append(files, strings.TrimPrefix(fields[5], "."))
			if strings.Contains(mode[4:], "w") {
				t.Errorf("others than root may write: %s", line)
			}
		}
	}
	want := append(slices.Clone(commonFiles),
		"/lib/systemd/system/nlb-relay.service",
		"/lib/systemd/system/nlb.service",
		"/usr/share/doc/nlb/changelog.Debian.gz",
		"/usr/share/doc/nlb/copyright",
		"/usr/share/zsh/vendor-completions/_nlb",
	)
	slices.Sort(want)
	if diff := cmp.Diff(want, listed(t, files)); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
}

func TestFilesOfTheRPM(t *testing.T) {
	file := filepath.Join(packages(t, older), "nlb-"+older+"-1.x86_64.rpm")
	want := append(slices.Clone(commonFiles),
		"/usr/lib/systemd/system/nlb-relay.service",
		"/usr/lib/systemd/system/nlb.service",
		"/usr/share/licenses/nlb/LICENSE",
		"/usr/share/zsh/site-functions/_nlb",
	)
	slices.Sort(want)
	got := listed(t, strings.Split(run(t, "rpm", "-qpl", file), "\n"))
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
	if got := run(t, "rpm", "-qpc", file); got != "/etc/nlb/nlb.yaml\n" {
		t.Errorf("configuration files are %q", got)
	}
	for _, tag := range []string{"POSTIN", "PREUN", "POSTUN"} {
		script := filepath.Join(t.TempDir(), tag)
		if err := os.WriteFile(script, []byte(run(t, "rpm", "-qp", "--qf", "%{"+tag+"}", file)), 0o600); err != nil {
			t.Fatal(err)
		}
		run(t, "shellcheck", "--shell=sh", script)
	}
}

func TestProgramIsStaticAndSaysItsVersion(t *testing.T) {
	program := filepath.Join(unpacked(t), "usr/bin/nlb")
	f, err := elf.Open(program)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if libraries, err := f.ImportedLibraries(); err != nil || len(libraries) > 0 {
		t.Errorf("it needs %q: %v", libraries, err)
	}
	if got := run(t, program, "version"); !strings.HasPrefix(got, "nlb "+older+" ") {
		t.Errorf("version is %q", got)
	}
}

func TestConfigurationOfThePackageIsValid(t *testing.T) {
	c, err := config.Parse("nlb.yaml", readFile(t, "nlb.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Spec.VIPs)+len(c.Spec.Listeners) > 0 {
		t.Error("a fresh installation would balance something")
	}
	// What is commented out is right as well.
	_, keys, _ := strings.Cut(string(readFile(t, "nlb.yaml")), "\n\n")
	lines := strings.Split(keys, "\n")
	for i, l := range lines {
		lines[i] = strings.TrimSuffix(strings.Replace(l, "#  ", "  ", 1), " []")
	}
	if c, err = config.Parse("nlb.yaml", []byte(strings.Join(lines, "\n"))); err != nil {
		t.Fatal(err)
	}
	if len(c.Spec.VIPs) != 1 || len(c.Spec.Listeners) != 1 || len(c.Spec.TargetGroups) != 1 {
		t.Errorf("uncommented, it has %d VIPs, %d listeners, %d groups", len(c.Spec.VIPs), len(c.Spec.Listeners), len(c.Spec.TargetGroups))
	}
}

func TestManualPagesRead(t *testing.T) {
	folder := filepath.Join(unpacked(t), "usr/share/man")
	pages, err := filepath.Glob(filepath.Join(folder, "man?", "*.gz"))
	if err != nil || len(pages) < 20 {
		t.Fatalf("%d pages, %v", len(pages), err)
	}
	// All at once: man(1) takes a tenth of a second for each.
	if warnings := run(t, append([]string{"sh", "-c", `for page; do zcat "$page" | LC_ALL=C.UTF-8 groff -man -Tutf8 -ww -z 2>&1; done`, "groff"}, pages...)...); warnings != "" {
		t.Errorf("groff complains:\n%s", warnings)
	}
	// Whichever way man(1) fills its lines.
	text := strings.Join(strings.Fields(run(t, "man", "--local-file", filepath.Join(folder, "man5/nlb.yaml.5.gz"))), " ")
	for _, want := range []string{"NLB.YAML(5)", "target_groups[].client_ip (required; preserve |", "listeners[].port (required)"} {
		if !strings.Contains(text, want) {
			t.Errorf("nlb.yaml(5) lacks %q", want)
		}
	}
}

// A bill is what these tests read of a CycloneDX document.
type bill struct {
	SpecVersion string `json:"specVersion"`
	Metadata    struct {
		Component struct{ Name, Version string } `json:"component"`
	} `json:"metadata"`
	Components []struct {
		Name, Version string
		Hashes        []struct{ Alg, Content string }
	} `json:"components"`
}

func TestBillOfMaterialsNamesEveryModule(t *testing.T) {
	program := filepath.Join(unpacked(t), "usr/bin/nlb")
	var b bill
	if err := json.Unmarshal(readFile(t, filepath.Join(unpacked(t), "usr/share/doc/nlb/sbom.cdx.json")), &b); err != nil {
		t.Fatal(err)
	}
	if b.SpecVersion != "1.5" || b.Metadata.Component.Name != "nlb" || b.Metadata.Component.Version != older {
		t.Errorf("it is a bill of %+v, CycloneDX %s", b.Metadata.Component, b.SpecVersion)
	}
	got := make(map[string]string)
	for _, c := range b.Components {
		got[c.Name] = c.Version
		if c.Name != "std" && (len(c.Hashes) != 1 || len(c.Hashes[0].Content) != 64) {
			t.Errorf("%s has no SHA-256 but %v", c.Name, c.Hashes)
		}
	}
	want := make(map[string]string)
	for line := range strings.Lines(run(t, "go", "version", "-m", program)) {
		switch f := strings.Fields(line); f[0] {
		case program + ":":
			want["std"] = f[1]
		case "dep":
			want[f[1]] = f[2]
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("modules (-go version -m +bill):\n%s", diff)
	}
}

// TestExposure holds the sandboxes to what systemd makes of them.
func TestExposure(t *testing.T) {
	for _, unit := range []string{"nlb", "nlb-relay"} {
		// Tenths. What is above fails.
		run(t, "systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold=20", "systemd/"+unit+".service")
	}
}

// TestUnitsAreRight lets systemd read them. The program is not installed here.
func TestUnitsAreRight(t *testing.T) {
	for _, unit := range []string{"nlb.service", "nlb-relay.service"} {
		text := strings.ReplaceAll(string(readFile(t, filepath.Join("systemd", unit))), "/usr/bin/nlb", "/bin/true")
		path := filepath.Join(t.TempDir(), unit)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if said, err := exec.Command("systemd-analyze", "verify", "--man=no", "--recursive-errors=no", path).CombinedOutput(); err != nil || len(said) > 0 {
			t.Errorf("%s: %v\n%s", unit, err, said)
		}
	}
}
