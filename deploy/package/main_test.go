// Package packaging_test builds the packages and lives through them: installing,
// upgrading under load, removing and purging, in a machine of its own where systemd
// is the first process.
package packaging_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// act makes this binary a peer in a test's network instead of a test.
const act = "NLB_PACKAGE_ACT"

func TestMain(m *testing.M) {
	switch os.Getenv(act) {
	case "":
		code := m.Run()
		for _, folder := range built.folders {
			_ = os.RemoveAll(folder) // below the folder for temporary files
		}
		os.Exit(code)
	case "echo":
		exitOn(echo(os.Args[1]))
	case "talk":
		exitOn(talk(os.Args[1], os.Stdin, os.Stdout))
	default:
		exitOn(fmt.Errorf("%s=%s means nothing", act, os.Getenv(act)))
	}
}

func exitOn(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

const (
	older, newer = "1.0.0", "1.1.0"
	epoch        = "1767323045" // 2 January 2026
)

// root is the module's folder.
const root = "../.."

// build builds the packages from the source in a folder, and returns where they are.
func build(t *testing.T, source, version string) string {
	t.Helper()
	out := t.TempDir()
	git, err := filepath.Abs(filepath.Join(root, ".git"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(source, "deploy/package/build"), out)
	// The copy has no history of its own.
	cmd.Env = append(os.Environ(), "VERSION="+version, "SOURCE_DATE_EPOCH="+epoch, "GIT_DIR="+git, "GIT_OPTIONAL_LOCKS=0")
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, said)
	}
	return out
}

// copySource copies what belongs to the project, as it is now, into a new folder.
func copySource(t *testing.T) string {
	t.Helper()
	to := t.TempDir()
	files := run(t, "git", "-C", root, "ls-files", "--cached", "--others", "--exclude-standard", "-z")
	for name := range strings.SplitSeq(strings.TrimSuffix(files, "\x00"), "\x00") {
		info, err := os.Stat(filepath.Join(root, name))
		if os.IsNotExist(err) {
			continue // removed, and not committed yet
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := os.ReadFile(filepath.Join(root, name))
		if err == nil {
			err = os.MkdirAll(filepath.Join(to, filepath.Dir(name)), 0o755)
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(to, name), content, info.Mode())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return to
}

// run returns what a command prints, which has to succeed.
func run(t *testing.T, words ...string) string {
	t.Helper()
	var complaints strings.Builder
	cmd := exec.Command(words[0], words[1:]...)
	cmd.Stderr = &complaints
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s%s", strings.Join(words, " "), err, out, complaints.String())
	}
	return string(out)
}
