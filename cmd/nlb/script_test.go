package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/vishvananda/netlink"

	"nlb/balancer"
	"nlb/bench/lab"
	"nlb/bench/traps"
	"nlb/internal/nstest"
	"nlb/internal/wait"
)

// The scripts run in a network namespace of their own, with nlb, listen and
// call as commands.
func TestMain(m *testing.M) {
	lab.MaybeRunAgent()
	testscript.Main(isolated{m}, map[string]func(){"nlb": main, "listen": listen, "call": call})
}

type isolated struct{ *testing.M }

func (m isolated) Run() int { return nstest.Main(m.M) }

// listen accepts connections on an address, greets and hangs up: a target.
func listen() {
	l, err := net.Listen("tcp", os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	for {
		c, err := l.Accept()
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Fprintln(c, "hello from", os.Args[1])
		_ = c.Close()
	}
}

// call connects from an address and port to another, and prints what it is told.
func call() {
	from, err := net.ResolveTCPAddr("tcp", os.Args[1])
	if err == nil {
		dialer := net.Dialer{LocalAddr: from, Timeout: 10 * time.Second}
		var c net.Conn
		if c, err = dialer.Dial("tcp", os.Args[2]); err == nil {
			_, err = io.Copy(os.Stdout, c)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func TestScripts(t *testing.T) {
	testscript.RunT(oneByOne{t}, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Cmds:                map[string]func(*testscript.TestScript, bool, []string){"await": await},
		Condition: func(name string) (bool, error) {
			switch name {
			case "flowtables":
				return missingFlowtables(t) == nil, nil
			case "ipvs":
				return traps.Probe(balancer.IPVS) == nil, nil
			}
			return false, fmt.Errorf("there is no condition %q", name)
		},
		Setup: func(env *testscript.Env) error {
			env.Defer(func() { emptyNamespace(t) })
			return nil
		},
	})
}

// oneByOne runs scripts one after the other: they share a namespace, of which each
// has all to itself.
type oneByOne struct{ *testing.T }

// Parallel does nothing.
func (oneByOne) Parallel() {}

// Run and Verbose make oneByOne a testscript.T.
func (o oneByOne) Run(name string, f func(testscript.T)) {
	o.T.Run(name, func(t *testing.T) { f(oneByOne{t}) })
}
func (oneByOne) Verbose() bool { return testing.Verbose() }

// emptyNamespace removes what a script left. VIPs have the scope host and a label.
func emptyNamespace(t *testing.T) {
	for _, argv := range [][]string{
		{"ip", "address", "flush", "dev", "lo", "scope", "global"},
		{"ip", "address", "flush", "dev", "lo", "label", "lo:nlb"},
		{"nft", "flush", "ruleset"},
	} {
		if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
			t.Errorf("%v: %v: %s", argv, err, out)
		}
	}
	if err := netlink.ConntrackTableFlush(netlink.ConntrackTable); err != nil {
		t.Error("flush the connections:", err)
	}
}

// await repeats a command until it succeeds, ! await until it fails.
func await(ts *testscript.TestScript, neg bool, args []string) {
	const limit = 20 * time.Second
	if len(args) == 0 {
		ts.Fatalf("usage: await command...")
	}
	err := wait.Try(limit, func() error {
		if err := ts.Exec(args[0], args[1:]...); (err != nil) != neg {
			return cmp.Or(err, errors.New("it succeeded"))
		}
		return nil
	})
	if err == nil {
		return
	}
	ts.Fatalf("%v: not within %v, last said:\n%s%s", args, limit, ts.ReadFile("stdout"), ts.ReadFile("stderr"))
}
