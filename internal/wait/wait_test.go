package wait

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// A failing is a test that notes how it failed.
type failing struct {
	testing.TB
	text string
}

func (f *failing) Helper() {}

func (f *failing) Fatalf(format string, args ...any) { f.text = fmt.Sprintf(format, args...) }

func TestItComes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		looks := 0
		Until(t, time.Minute, "a second", func() bool { looks++; return time.Since(begin) >= time.Second })
		if took := time.Since(begin); took > time.Second+pause {
			t.Errorf("seen after %v", took)
		}
		if most := 10 + int(time.Second/pause); looks > most {
			t.Errorf("it looked %d times, want at most %d", looks, most)
		}
	})
}

func TestItNeverComes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		f := &failing{TB: t}
		For(f, time.Second, "the end", func() error { return fmt.Errorf("look at %v", time.Since(begin) > time.Second) })
		if want := "the end: not within 1s: look at true"; f.text != want {
			t.Errorf("it says %q, want %q", f.text, want)
		}
		if took := time.Since(begin); took < time.Second || took > time.Second+pause {
			t.Errorf("given up after %v", took)
		}
		Until(f, time.Second, "the end", func() bool { return false }, func() string { return "one" }, func() string { return "two" })
		if want := "the end: not within 1s\none\ntwo"; f.text != want {
			t.Errorf("it says %q, want %q", f.text, want)
		}
	})
}

func TestOneLookIsCertain(t *testing.T) {
	if err := Try(0, func() error { return nil }); err != nil {
		t.Error(err)
	}
	synctest.Test(t, func(t *testing.T) {
		if err := Try(0, func() error { return errors.New("no") }); err == nil || !strings.Contains(err.Error(), "no") {
			t.Errorf("got %v", err)
		}
	})
}
