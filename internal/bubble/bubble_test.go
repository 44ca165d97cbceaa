package bubble

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestPass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		var rang atomic.Bool // that time passed orders nothing by itself
		time.AfterFunc(time.Hour, func() { rang.Store(true) })
		if Pass(time.Hour - 1); rang.Load() {
			t.Error("it rang early")
		}
		if Pass(1); !rang.Load() || time.Since(begin) != time.Hour {
			t.Errorf("it rang: %v, after %v", rang.Load(), time.Since(begin))
		}
	})
}
