package relay

import (
	"net/netip"

	"golang.org/x/sys/unix"
)

// A kernel is what a machine needs of the system. No call waits. Errors are
// bare numbers, 0 for none: they are compared, seldom shown, and never
// allocated. A call that moves bytes moved none if it returns one. EINTR does not
// come out.
type kernel interface {
	// watch reports events of a socket under a token, edge-triggered, until it
	// is closed.
	watch(fd int32, t token) unix.Errno
	// dial opens a socket, bound to source if that is valid, begins to connect
	// it, and watches it. After an error there is no socket. The ACK that ends the
	// handshake waits for what is written first, to be one segment with it.
	dial(to netip.AddrPort, source netip.Addr, t token) (int32, unix.Errno)
	// acknowledge has a dialed socket send its ACKs at once from now on. Call it
	// after the first write.
	acknowledge(fd int32)
	// outcome returns a socket's pending error, and clears it.
	outcome(fd int32) unix.Errno

	// read returns 0 and no error at the end of the stream.
	read(fd int32, p []byte) (int, unix.Errno)
	write(fd int32, p []byte) (int, unix.Errno)
	// splice moves at most n bytes between a socket and a pipe.
	splice(from, to int32, n int) (int, unix.Errno)

	// inline leaves urgent bytes in the stream.
	inline(fd int32)
	// finish sends a FIN and leaves the other direction open.
	finish(fd int32) unix.Errno
	// close ends a socket whose directions both ended, or that never was
	// connected.
	close(fd int32)
	// reset sends a RST, drops what was not sent yet, and closes.
	reset(fd int32)

	// openPipe returns a pipe's ends and how many bytes it holds.
	openPipe() (r, w int32, size int, err unix.Errno)
	closePipe(r, w int32)
}

// A token is what an event is reported under: which end of which connection.
type token struct {
	id         int32 // twice the connection's index, and 1 for the target's end
	generation int32 // an index is used again; an event may be older than its present use
}

// Events that sockets are watched for. RDHUP says that a FIN came, PRI that
// there are urgent bytes; ERR and HUP always come.
const watched = unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLPRI | unix.EPOLLET
