package traps

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"nlb/bench/lab"
)

// martian is what the kernel does with a packet from outside whose source is one
// of its own addresses (Linux, fib_validate_source): it drops it, whatever
// rp_filter and accept_local say of others. No counter of the namespace has it.
const martian = "dropped as a martian"

// A kernelLog is the end of the kernel's log, from when it was opened.
type kernelLog struct{ fd int }

// kernelLog makes a node log martians and reads the log from now on. The log
// is the machine's, and reading it may be forbidden, as it is in a container:
// then there is no log, and it has no lines.
func (s *site) kernelLog(n *lab.Node) (kernelLog, error) {
	if err := n.Sysctl("net.ipv4.conf.all.log_martians", "1"); err != nil {
		return kernelLog{}, err
	}
	fd, err := unix.Open("/dev/kmsg", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, os.ErrPermission) {
		return kernelLog{-1}, nil
	}
	if err != nil {
		return kernelLog{}, fmt.Errorf("/dev/kmsg: %w", err)
	}
	if _, err := unix.Seek(fd, 0, unix.SEEK_END); err != nil {
		return kernelLog{}, errors.Join(fmt.Errorf("/dev/kmsg: %w", err), unix.Close(fd))
	}
	log := kernelLog{fd}
	s.later(log.close)
	return log, nil
}

// martian is the kernel's line about a packet, or "": the kernel limits the rate
// of these lines.
func (l kernelLog) martian(to, from netip.Addr) string {
	if l.fd < 0 {
		return ""
	}
	want := fmt.Sprintf("martian source %v from %v", to, from)
	record := make([]byte, 8192) // longer than any, so that none is refused (kernel, dev-kmsg)
	for {
		n, err := unix.Read(l.fd, record)
		if errors.Is(err, unix.EPIPE) {
			continue // lines were overwritten before we read them
		}
		if err != nil {
			return "" // EAGAIN: the end
		}
		if strings.Contains(string(record[:n]), want) {
			return want
		}
	}
}

func (l kernelLog) close() error {
	if l.fd < 0 {
		return nil
	}
	return unix.Close(l.fd)
}
