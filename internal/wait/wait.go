// Package wait is how a test waits for what nobody tells it of: a carrier, a
// verdict, a socket. It looks again and again, and never sleeps for a time that
// happened to be enough.
package wait

import (
	"errors"
	"os"
	"testing"
	"time"

	"nlb/internal/vm"
)

// pause is the time between two looks. In an emulated machine looking often would
// keep it from what is waited for.
var pause = func() time.Duration {
	if os.Getenv(vm.EnvKernel) != "" {
		return 300 * time.Millisecond
	}
	return 20 * time.Millisecond
}()

// For looks until check returns nil, and fails the test with its last error if
// that takes longer than limit.
func For(t testing.TB, limit time.Duration, what string, check func() error) {
	t.Helper()
	if err := Try(limit, check); err != nil {
		t.Fatalf("%s: not within %v: %v", what, limit, err)
	}
}

// Until looks until holds is true, and fails the test if that takes longer than
// limit. Then it says what each state returns.
func Until(t testing.TB, limit time.Duration, what string, holds func() bool, state ...func() string) {
	t.Helper()
	err := Try(limit, func() error {
		if holds() {
			return nil
		}
		return errNot
	})
	if err == nil {
		return
	}
	text := ""
	for _, s := range state {
		text += "\n" + s()
	}
	t.Fatalf("%s: not within %v%s", what, limit, text)
}

var errNot = errors.New("it does not hold")

// Try looks until check returns nil, for as long as limit, and returns its last
// error. It looks at least once, and once more when the time is over.
func Try(limit time.Duration, check func() error) error {
	end := time.Now().Add(limit)
	for {
		late := time.Now().After(end)
		err := check()
		if err == nil || late {
			return err
		}
		time.Sleep(pause)
	}
}
