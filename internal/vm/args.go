package vm

import (
	"path/filepath"
	"strings"
)

// OutDir is the folder of the guest whose files come out after a run.
const OutDir = "/out"

// written are the flags of a test binary whose value is a file that it writes
// (go help testflag).
var written = map[string]bool{
	"coverprofile": true, "cpuprofile": true, "memprofile": true,
	"blockprofile": true, "mutexprofile": true, "trace": true,
}

// Arguments are a test binary's arguments for the guest, and what has to be done
// with the files that come out.
type Arguments struct {
	Args    []string
	Files   map[string]string // name below OutDir → file on the host
	Folders map[string]string // name of a folder below OutDir → folder on the host
}

// Rewrite prepares the arguments that go test passes to a test binary: what is
// written goes to OutDir and from there to where it was meant to go. The log of
// opened files, by which go test decides what may be cached, is left out: the
// guest's files aren't the host's. Dir is the working directory.
func Rewrite(args []string, dir string) Arguments {
	a := Arguments{Files: make(map[string]string), Folders: make(map[string]string)}
	base := dir
	flags := args
	for i, arg := range args {
		if arg == "--" || !strings.HasPrefix(arg, "-") {
			flags = args[:i] // the rest are the test's own
			break
		}
		if value, ok := strings.CutPrefix(arg, "-test.outputdir="); ok {
			base = absolute(dir, value)
		}
	}
	for _, arg := range flags {
		name, value, _ := strings.Cut(strings.TrimPrefix(arg, "-test."), "=")
		switch {
		case !strings.HasPrefix(arg, "-test."):
			a.Args = append(a.Args, arg)
		case name == "testlogfile" || name == "outputdir":
		case written[name] && value != "":
			a.Files[name] = absolute(base, value)
			a.Args = append(a.Args, "-test."+name+"="+OutDir+"/"+name)
		case name == "gocoverdir" && value != "":
			a.Folders[name] = absolute(dir, value)
			a.Args = append(a.Args, "-test."+name+"="+OutDir+"/"+name)
		default:
			a.Args = append(a.Args, arg)
		}
	}
	a.Args = append(a.Args, args[len(flags):]...)
	return a
}

// Host is where a file that came out belongs. False: nobody asked for it.
func (a *Arguments) Host(name string) (string, bool) {
	if file, ok := a.Files[name]; ok {
		return file, true
	}
	folder, rest, _ := strings.Cut(name, "/")
	if to, ok := a.Folders[folder]; ok && rest != "" {
		return filepath.Join(to, rest), true
	}
	return "", false
}

func absolute(dir, name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(dir, name)
}
