package measure

import (
	"bytes"
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestUntilSignal would end with all tests if signals did what they do unasked.
func TestUntilSignal(t *testing.T) {
	for _, s := range []unix.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP} {
		ctx := UntilSignal()
		if err := unix.Kill(os.Getpid(), unix.SIGPIPE); err != nil || ctx.Err() != nil {
			t.Errorf("%v, %v", err, ctx.Err())
		}
		if err := unix.Kill(os.Getpid(), s); err != nil {
			t.Fatal(err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(10 * time.Second):
			t.Errorf("%v ends nothing", s)
		}
	}
}

func TestExitCode(t *testing.T) {
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	failed := errors.New("no luck")
	for _, c := range []struct {
		name string
		ctx  context.Context
		err  error
		code int
		said string
	}{
		{"fine", t.Context(), nil, 0, ""},
		{"failed", t.Context(), failed, 1, "nlb bench: no luck\n"},
		{"interrupted", ended, failed, Interrupted, "nlb bench: interrupted, everything was removed\n"},
		{"interrupted at the end", ended, nil, Interrupted, "nlb bench: interrupted, everything was removed\n"},
	} {
		var stderr bytes.Buffer
		if code := ExitCode(c.ctx, c.err, &stderr); code != c.code || stderr.String() != c.said {
			t.Errorf("%s: exit %d, said %q", c.name, code, &stderr)
		}
	}
}
