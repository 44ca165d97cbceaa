package vm

import "time"

// Paths in the guest.
const (
	initPath = "/init"
	jobPath  = "/vm/job.json"
	portName = "results" // of the virtio port
)

// EnvKernel is the environment variable by which a test knows that it runs in a
// guest: the kernel that was asked for, such as "6.12".
const EnvKernel = "NLB_VM_KERNEL"

// A job is what the guest is to do.
type job struct {
	Time    time.Time // the guest's clock starts here
	Modules []string  // files to load, in order
	Env     []string
	Runs    []guestRun
}

// A guestRun is one program to run.
type guestRun struct {
	Path, Dir string
	Args      []string
	Folders   []string // to be made below OutDir beforehand
}
