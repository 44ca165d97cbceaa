// Package bubble moves the clock of a test that runs in a bubble of testing/synctest,
// where no time is spent by that.
package bubble

import (
	"testing/synctest"
	"time"
)

// Pass lets d go by, and all that is due by then happen. Only one goroutine of a
// bubble may call it at a time.
func Pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}
