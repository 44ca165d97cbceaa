package worker

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// A frame is a length of 4 bytes, big-endian, and so many bytes of JSON. Open
// files travel with its first byte (unix(7), SCM_RIGHTS).
const (
	headerSize = 4
	// maxFrame has room for a table of some 100,000 destinations. What a peer
	// merely announces is not allocated.
	maxFrame = 64 << 20
	// maxFrames bounds a message.
	maxFrames = 4096
	// filesPerFrame stays below the kernel's limit for one sendmsg(2).
	filesPerFrame = 200
	scmMaxFD      = 253 // SCM_MAX_FD of include/net/scm.h
	flowsPerFrame = 10_000
)

// patience is how long a message may take from its first byte to its last.
const patience = 10 * time.Second

// A link is one end of a control connection.
type link struct{ conn *net.UnixConn }

func (l link) close() { _ = l.conn.Close() }

// A message is one frame or several: all but the last say that more come.
type message struct {
	frame
	// files are the listening sockets that came along, by what they listen on,
	// links the control connections, in the order of Elders. They belong to
	// whoever holds the message.
	files sockets
	links []int
}

func (m *message) close() {
	m.files.close()
	closeAll(m.links)
}

// send sends f, and with it, in as many frames as it takes, files and one link
// for each of f's Elders, of which there are no more than go with one frame.
func (l link) send(f frame, files sockets, links []link) error {
	if err := l.conn.SetWriteDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	for keys := range slices.Chunk(slices.SortedFunc(maps.Keys(files), netip.AddrPort.Compare), filesPerFrame) {
		fds := make([]int, len(keys))
		for i, k := range keys {
			fds[i] = files[k]
		}
		if err := l.sendFrame(frame{More: true, Files: keys}, fds); err != nil {
			return err
		}
	}
	for len(f.Flows) > flowsPerFrame {
		if err := l.sendFrame(frame{More: true, Flows: f.Flows[:flowsPerFrame]}, nil); err != nil {
			return err
		}
		f.Flows = f.Flows[flowsPerFrame:]
	}
	fds, err := descriptors(links)
	defer closeAll(fds)
	if err != nil {
		return err
	}
	return l.sendFrame(f, fds)
}

// descriptors returns copies of those of links.
func descriptors(links []link) ([]int, error) {
	fds := make([]int, 0, len(links))
	for _, l := range links {
		raw, err := l.conn.SyscallConn()
		if err != nil {
			return fds, err
		}
		fd := -1
		var failed error
		if err := raw.Control(func(old uintptr) { fd, failed = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) }); err != nil {
			return fds, err
		}
		if failed != nil {
			return fds, failed
		}
		fds = append(fds, fd)
	}
	return fds, nil
}

func (l link) sendFrame(f frame, fds []int) error {
	body, err := json.Marshal(f)
	if err != nil {
		return err
	}
	if len(body) > maxFrame {
		return fmt.Errorf("a frame of %d bytes: more than %d", len(body), maxFrame)
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	packet := append(binary.BigEndian.AppendUint32(make([]byte, 0, headerSize+len(body)), uint32(len(body))), body...)
	n, _, err := l.conn.WriteMsgUnix(packet, rights, nil)
	if err == nil && n < len(packet) {
		_, err = l.conn.Write(packet[n:])
	}
	return err
}

// receive waits for a message, for at most idle if that is not 0, and then for
// its end. After an error no file of it is left open.
func (l link) receive(idle time.Duration) (m message, err error) {
	var deadline time.Time
	if idle > 0 {
		deadline = time.Now().Add(idle)
	}
	if err := l.conn.SetReadDeadline(deadline); err != nil {
		return message{}, err
	}
	m.files = make(sockets)
	defer func() {
		if err != nil {
			m.close()
			m = message{}
		}
	}()
	var flows []Flow
	for range maxFrames {
		if err := l.receiveFrame(&m); err != nil {
			return m, err
		}
		flows = append(flows, m.Flows...)
		if !m.More {
			m.Flows = flows
			return m, nil
		}
		if len(m.Elders) > 0 {
			return m, errors.New("malformed frame: elders before the last one")
		}
	}
	return m, fmt.Errorf("a message of more than %d frames", maxFrames)
}

// receiveFrame puts a frame, and the files that come with it, into m.
func (l link) receiveFrame(m *message) error {
	var head [headerSize]byte
	n, fds, err := l.receiveHead(head[:])
	// Those that m gets are not in fds any more at the end.
	defer func() { closeAll(fds) }()
	if err == nil {
		if err = l.conn.SetReadDeadline(time.Now().Add(patience)); err == nil {
			_, err = io.ReadFull(l.conn, head[n:])
		}
	}
	if err != nil {
		return halfFrame(n, err)
	}
	length := int64(binary.BigEndian.Uint32(head[:]))
	if length > maxFrame {
		return fmt.Errorf("a frame of %d bytes: more than %d", length, maxFrame)
	}
	var body bytes.Buffer
	if _, err := io.CopyN(&body, l.conn, length); err != nil {
		return halfFrame(headerSize, err)
	}
	if m.frame, err = decode(body.Bytes()); err != nil {
		return err
	}
	if len(m.Files)+len(m.Elders) != len(fds) {
		return fmt.Errorf("a frame with %d files names %d", len(fds), len(m.Files)+len(m.Elders))
	}
	for i, a := range m.Files {
		if _, twice := m.files[a]; twice {
			return fmt.Errorf("two files for %s", a)
		}
		m.files[a], fds[i] = fds[i], -1
	}
	m.links, fds = fds[len(m.Files):], nil
	return nil
}

// halfFrame tells the end between frames, which is io.EOF, from one within.
func halfFrame(read int, err error) error {
	switch {
	case !errors.Is(err, io.EOF):
		return err
	case read > 0:
		return io.ErrUnexpectedEOF
	}
	return io.EOF
}

func decode(body []byte) (frame, error) {
	var f frame
	if err := json.Unmarshal(body, &f); err != nil {
		return frame{}, fmt.Errorf("malformed frame: %w", err)
	}
	for _, a := range f.Files {
		if !a.IsValid() {
			return frame{}, errors.New("malformed frame: a file for no address")
		}
	}
	return f, nil
}

// receiveHead reads the first bytes of a frame and the files that come with
// them. Files that come with any other byte are closed by the kernel, because
// nobody asks for them.
func (l link) receiveHead(head []byte) (n int, fds []int, err error) {
	control := make([]byte, unix.CmsgSpace(4*scmMaxFD))
	n, size, flags, _, err := l.conn.ReadMsgUnix(head, control) // with MSG_CMSG_CLOEXEC
	messages, parseErr := unix.ParseSocketControlMessage(control[:size])
	for i := range messages {
		if got, err := unix.ParseUnixRights(&messages[i]); err == nil {
			fds = append(fds, got...)
		}
	}
	switch {
	case err != nil:
	case parseErr != nil:
		err = fmt.Errorf("control message: %w", parseErr)
	case flags&unix.MSG_CTRUNC != 0:
		// The kernel gives as many as fit below RLIMIT_NOFILE.
		err = errors.New("not all files could be received: this process has too many open")
	}
	return n, fds, err
}

// sockets are listening sockets by what they listen on. They are kept as bare
// descriptors: an os.File would wake this process for every connection, because
// the runtime polls what does not block.
type sockets map[netip.AddrPort]int

func (s sockets) close() { closeAll(slices.Collect(maps.Values(s))) }

func closeAll(fds []int) {
	for _, fd := range fds {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}
