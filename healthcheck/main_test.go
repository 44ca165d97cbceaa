package healthcheck

import (
	"net"
	"os"
	"testing"

	"go.uber.org/goleak"
)

// asTarget in the environment makes the test binary a target: it says where it
// listens on standard output, accepts until its standard input ends, and
// closes what it accepted after the other side has.
const asTarget = "HEALTHCHECK_TEST_TARGET"

func TestMain(m *testing.M) {
	if os.Getenv(asTarget) != "" {
		beTarget()
		return
	}
	goleak.VerifyTestMain(m)
}

func beTarget() {
	l, err := net.Listen("tcp4", "0.0.0.0:0")
	if err != nil {
		os.Exit(1)
	}
	go func() {
		for conn, err := l.Accept(); err == nil; conn, err = l.Accept() {
			go func() {
				conn.Read(make([]byte, 1))
				conn.Close()
			}()
		}
	}()
	os.Stdout.WriteString(l.Addr().String() + "\n")
	os.Stdin.Read(make([]byte, 1))
}
