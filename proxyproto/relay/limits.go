package relay

import (
	"fmt"

	"golang.org/x/sys/unix"
)

const (
	// reservedFiles are not for connections: the runtime's, logs, the control
	// socket, and what is open when a limit is reached.
	reservedFiles = 64
	// listenerFiles are each listener's: the relay's, whoever's it is, and one on
	// its way to another process.
	listenerFiles = 3
	// loopFiles are each loop's: epoll, the wake-up, the reserve.
	loopFiles = 3
	// loopPipes is how many pipes a loop has at most, of two files each: as many
	// directions splice at the same time.
	loopPipes = 256
)

// A budget says what the descriptors of the process are for.
type budget struct {
	limit      int // RLIMIT_NOFILE
	free       int // for connections and listeners
	pipes      int // of each loop
	configured int // connections at most; 0: as many as there is room for
}

// shareFiles divides as many files as may be open among the pipes of loops and all
// else. Pipes get an eighth at most, for connections without one still work.
func shareFiles(limit, loops, configured int) budget {
	b := budget{limit: limit, configured: configured, pipes: min(loopPipes, limit/8/2/loops)}
	b.free = limit - reservedFiles - loops*(loopFiles+2*b.pipes)
	return b
}

// connections is how many there may be at the same time, beside so many
// listeners.
func (b budget) connections(listeners int) (int, error) {
	n := (b.free - listeners*listenerFiles) / 2
	switch {
	case n < 1 && listeners == 0:
		return 0, fmt.Errorf("%d files may be open, too few for a single connection (raise LimitNOFILE)", b.limit)
	case n < 1:
		return 0, fmt.Errorf("%d files may be open, too few for %d services and a single connection (raise LimitNOFILE)", b.limit, listeners)
	case b.configured > 0:
		n = min(n, b.configured)
	}
	return n, nil
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
