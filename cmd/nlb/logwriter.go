package main

import (
	"bytes"
	"errors"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// pipeBuf is how much a pipe takes at once if it takes anything (pipe(7)).
	pipeBuf = 4096
	// logRoom is how many bytes of the log wait for a reader. Some thousand lines.
	logRoom = 1 << 20
	// lastWords is for how long a process that ends waits for its log's reader.
	lastWords = time.Second
)

// A logWriter writes a log's lines, and never waits for who reads them: a pipe that
// nobody empties, or a journal whose disk is stuck, must not hold up a verdict. As
// long as there is room, a line is written when Write returns. Otherwise it waits in
// memory, and when there is no room either it is lost, and counted.
type logWriter struct {
	w io.Writer
	// takes reports whether w takes so many bytes without waiting.
	takes func(n int) bool
	// lost is told how many lines were. It may log.
	lost func(lines int)

	mu      sync.Mutex
	waiting [][]byte      // mu
	bytes   int           // mu: of waiting
	dropped int           // mu: lines, since lost was last told
	done    chan struct{} // mu: nil unless a goroutine writes what waits; closed when it has
}

func newLogWriter(w io.Writer, lost func(lines int)) *logWriter {
	return &logWriter{w: w, takes: roomIn(w), lost: lost}
}

// roomIn is logWriter.takes. Memory always does, and so does a file: what is written
// to it does not wait for its disk.
func roomIn(w io.Writer) func(int) bool {
	always := func(int) bool { return true }
	f, is := w.(*os.File)
	if !is {
		return always
	}
	info, err := f.Stat()
	if err != nil || info.Mode().IsRegular() {
		return always
	}
	conn, err := f.SyscallConn()
	if err != nil {
		return always
	}
	return func(n int) (takes bool) {
		if n > pipeBuf {
			return false
		}
		err := conn.Control(func(fd uintptr) {
			poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
			ready, err := unix.Poll(poll, 0)
			// One that nobody can read any more says so when it is written to.
			takes = err == nil && ready > 0
		})
		return takes || err != nil
	}
}

// Write implements io.Writer. Of what waits, nobody learns that it failed.
func (l *logWriter) Write(line []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.done == nil && l.takes(len(line)) {
		return l.w.Write(line)
	}
	if l.bytes+len(line) > logRoom {
		l.dropped++
		return len(line), nil
	}
	l.waiting = append(l.waiting, bytes.Clone(line))
	l.bytes += len(line)
	if l.done == nil {
		l.done = make(chan struct{})
		go l.drain()
	}
	return len(line), nil
}

// drain writes what waits until nothing does.
func (l *logWriter) drain() {
	for {
		lines, dropped := l.take()
		if lines == nil && dropped == 0 {
			return
		}
		for _, line := range lines {
			_, _ = l.w.Write(line) // there is no other place to say it
		}
		if dropped > 0 {
			l.lost(dropped)
		}
	}
}

// take takes what waits. Nothing ends the writing.
func (l *logWriter) take() (lines [][]byte, dropped int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	lines, dropped = l.waiting, l.dropped
	l.waiting, l.bytes, l.dropped = nil, 0, 0
	if lines == nil && dropped == 0 {
		close(l.done)
		l.done = nil
	}
	return lines, dropped
}

// Sync implements zapcore.WriteSyncer. It waits for the reader, though not for long.
func (l *logWriter) Sync() error {
	l.mu.Lock()
	done := l.done
	l.mu.Unlock()
	if done == nil {
		return nil
	}
	select {
	case <-done:
		return nil
	case <-time.After(lastWords):
		return errors.New("nobody reads the log")
	}
}
