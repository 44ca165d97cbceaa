package relay

import (
	"testing"

	"golang.org/x/sys/unix"
)

// TestErrorsMoveNothing: the machine takes what a call returns for a number of
// bytes even if there was no room, or nothing to read.
func TestErrorsMoveNothing(t *testing.T) {
	var k linuxKernel
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(ends[0])
	defer unix.Close(ends[1])
	r, w, size, errno := k.openPipe()
	if errno != 0 || size < leastPipe {
		t.Fatal(size, errno)
	}
	defer k.closePipe(r, w)
	fd, buf := int32(ends[0]), make([]byte, 1<<10)
	wantAgain := func(what string, n int, err unix.Errno) {
		t.Helper()
		if n != 0 || err != unix.EAGAIN {
			t.Errorf("%s: %d, %v", what, n, err)
		}
	}
	n, errno := k.read(fd, buf)
	wantAgain("read", n, errno)
	n, errno = k.splice(r, fd, 100)
	wantAgain("splice from an empty pipe", n, errno)
	for errno = 0; errno == 0; {
		n, errno = k.write(fd, buf)
	}
	wantAgain("write", n, errno)
}
