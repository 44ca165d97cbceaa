package balancer

import (
	"errors"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Here names this boot and this network namespace. The namespace's cookie
// (SO_NETNS_COOKIE, Linux 5.14) is never used twice in one boot, unlike its
// inode number; older kernels have only the latter. What a state file says of the
// kernel holds there and nowhere else.
func Here() (boot, netns string, err error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", "", err
	}
	boot = strings.TrimSpace(string(b))
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", "", err
	}
	defer func() { _ = unix.Close(fd) }()
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if errors.Is(err, unix.ENOPROTOOPT) {
		netns, err = os.Readlink("/proc/self/ns/net")
		return boot, netns, err
	}
	return boot, "cookie:" + strconv.FormatUint(cookie, 10), err
}
