package measure

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

// Interrupted is the exit code of what a signal ended, as for a shell's ^C.
const Interrupted = 130

// UntilSignal is for main: what it returns ends by the first SIGINT, SIGTERM or
// SIGHUP, so that there is time to clean up. A second one kills. SIGPIPE does
// nothing: a reader that leaves (… | head) must not end us before that either.
func UntilSignal() context.Context {
	signal.Notify(make(chan os.Signal, 1), unix.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	context.AfterFunc(ctx, stop)
	return ctx
}

// ExitCode says why a benchmark failed, if it did, and is what to exit with: 0, 1,
// or Interrupted if ctx has ended, whatever the error.
func ExitCode(ctx context.Context, err error, stderr io.Writer) int {
	switch {
	case ctx.Err() != nil:
		fmt.Fprintln(stderr, "nlb bench: interrupted, everything was removed")
		return Interrupted
	case err != nil:
		fmt.Fprintf(stderr, "nlb bench: %v\n", err)
		return 1
	}
	return 0
}
