package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"nlb/config"
)

// pipedLog logs to a pipe that holds a page.
func pipedLog(t *testing.T) (log *zap.Logger, reader *os.File, hangUp func()) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	if _, err := unix.FcntlInt(w.Fd(), unix.F_SETPIPE_SZ, pipeBuf); err != nil {
		t.Fatal(err)
	}
	log, _, err = newLogger(config.LogSettings{Level: "info", Format: "json"}, w)
	if err != nil {
		t.Fatal(err)
	}
	return log, r, func() { w.Close() }
}

// Nothing waits for a reader who does not read. When he does, the lines are there in
// their order, and so is how many are not.
func TestLogWaitsForNobody(t *testing.T) {
	log, r, hangUp := pipedLog(t)
	const lines = 30_000
	padding := strings.Repeat("x", 100)
	for i := range lines {
		log.Info("line", zap.Int("n", i), zap.String("padding", padding))
	}
	log.Info(strings.Repeat("longer than a pipe ", pipeBuf))
	go func() {
		for log.Sync() != nil { // as long as it is being read
		}
		log.Info("the last")
		for log.Sync() != nil {
		}
		hangUp()
	}()
	next, lost := 0, 0
	last := ""
	for s := bufio.NewReader(r); ; {
		text, err := s.ReadString('\n')
		if err == io.EOF {
			break
		}
		var line struct {
			Message string `json:"msg"`
			Event   string
			N       int
			Lines   int
		}
		if err := json.Unmarshal([]byte(text), &line); err != nil {
			t.Fatalf("%v: %.200s", err, text)
		}
		switch last = line.Message; {
		case line.Event == "log.lost":
			lost += line.Lines
		case line.Message == "line":
			if line.N != next {
				t.Fatalf("line %d follows line %d", line.N, next-1)
			}
			next++
		}
	}
	if got := next + lost; got != lines+1 { // the long one is lost
		t.Errorf("%d lines came and %d were lost, of %d", next, lost, lines+1)
	}
	if next < logRoom/400 {
		t.Errorf("only %d lines were kept", next)
	}
	if last != "the last" {
		t.Errorf("the last line is %q", last)
	}
}

// A process that ends does not wait for ever.
func TestLogIsGivenUpAtTheEnd(t *testing.T) {
	log, r, _ := pipedLog(t)
	for range 1000 {
		log.Info("line")
	}
	if err := log.Sync(); err == nil {
		t.Error("a log that nobody reads was written to its end")
	}
	// Lets the writing goroutine end.
	go func() { _, _ = io.Copy(io.Discard, r) }()
	for log.Sync() != nil {
	}
}

// As long as there is room, a line is there when it is logged: the next moment may
// be that of a crash.
func TestLogIsWrittenAtOnce(t *testing.T) {
	file, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	var memory strings.Builder
	for name, to := range map[string]io.Writer{"file": file, "pipe": w, "memory": &memory} {
		log, _, err := newLogger(config.LogSettings{Level: "info", Format: "console"}, to)
		if err != nil {
			t.Fatal(err)
		}
		for i := range 10 {
			log.Info(fmt.Sprintf("line %d", i))
		}
		var text string
		switch to {
		case file:
			content, err := os.ReadFile(file.Name())
			if err != nil {
				t.Fatal(err)
			}
			text = string(content)
		case w:
			there, err := unix.IoctlGetInt(int(r.Fd()), unix.TIOCINQ)
			if err != nil {
				t.Fatal(err)
			}
			b := make([]byte, there)
			if _, err := io.ReadFull(r, b); err != nil {
				t.Fatal(err)
			}
			text = string(b)
		default:
			text = memory.String()
		}
		if strings.Count(text, "\n") != 10 || !strings.Contains(text, "line 9") {
			t.Errorf("%s: %q", name, text)
		}
	}
}
