package relay

import (
	"fmt"

	"golang.org/x/sys/unix"
)

const (
	// reservedFiles are not for connections: the runtime's, logs, the control
	// socket, listeners, and what is open when a limit is reached.
	reservedFiles = 64
	// loopFiles are each loop's: epoll, the wake-up, the reserve.
	loopFiles = 3
	// loopPipes is how many pipes a loop has at most, of two files each: as many
	// directions splice at the same time.
	loopPipes = 256
)

// A budget says what the descriptors of the process are for.
type budget struct {
	connections int // at the same time
	pipes       int // of each loop
}

// share divides files among connections and the pipes of loops. Pipes get an
// eighth at most, for connections without one still work.
func shareFiles(files, loops, most int) (budget, error) {
	b := budget{pipes: min(loopPipes, files/8/2/loops)}
	b.connections = (files - reservedFiles - loops*(loopFiles+2*b.pipes)) / 2
	if b.connections < 1 {
		return budget{}, fmt.Errorf("%d files may be open, too few for a single connection (raise LimitNOFILE)", files)
	}
	if most > 0 {
		b.connections = min(b.connections, most)
	}
	return b, nil
}

// raiseFiles raises the number of files that may be open to what is permitted,
// and returns it.
func raiseFiles() (int, error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0, fmt.Errorf("read the limit of open files: %w", err)
	}
	if limit.Cur < limit.Max {
		limit.Cur = limit.Max
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
			return 0, fmt.Errorf("raise the limit of open files to %d: %w", limit.Max, err)
		}
	}
	return int(min(limit.Cur, 1<<30)), nil
}
