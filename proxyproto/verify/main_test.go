package verify

import (
	"os"
	"testing"

	"nlb/internal/nstest"
)

// The servers' ports are fixed: the namespace is the tests' own.
func TestMain(m *testing.M) { os.Exit(nstest.Main(m)) }
