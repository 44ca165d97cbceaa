package packaging_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"nlb/internal/wait"
)

// echo is a target: what comes goes back, a PROXY header too.
func echo(address string) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			_, _ = io.Copy(c, c) // until the client has enough
			_ = c.Close()
		}()
	}
}

// talk keeps one connection to address busy, and opens others beside it, until
// standard input ends. It says "talking" when all works and what it did at the
// end; the first failure is an error.
func talk(address string, in io.Reader, out io.Writer) error {
	long, err := call(address)
	if err != nil {
		return err
	}
	enough := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, in)
		close(enough)
	}()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for n := 0; ; n++ {
		if err := long.exchange(n); err != nil {
			return fmt.Errorf("the long connection, exchange %d: %w", n, err)
		}
		short, err := call(address)
		if err == nil {
			err = errors.Join(short.exchange(n), short.Close())
		}
		if err != nil {
			return fmt.Errorf("connection %d: %w", n, err)
		}
		if n == 0 {
			fmt.Fprintln(out, "talking")
		}
		select {
		case <-enough:
			_, err := fmt.Fprintf(out, "%d exchanges\n", n+1)
			return err
		case <-tick.C:
		}
	}
}

// A conversation is a connection to an echo.
type conversation struct {
	net.Conn
	lines *bufio.Reader
}

// within is far more than a lost SYN takes to be sent again.
const within = 5 * time.Second

func call(address string) (conversation, error) {
	c, err := net.DialTimeout("tcp", address, within)
	if err != nil {
		return conversation{}, err
	}
	return conversation{c, bufio.NewReader(c)}, nil
}

// exchange sends a line and waits until it is back. A PROXY header may come before
// it, whose last bytes are no line of their own.
func (c conversation) exchange(n int) error {
	if err := c.SetDeadline(time.Now().Add(within)); err != nil {
		return err
	}
	said := fmt.Sprintf("line %d\n", n)
	if _, err := io.WriteString(c, said); err != nil {
		return err
	}
	for {
		heard, err := c.lines.ReadString('\n')
		if err != nil {
			return err
		}
		if strings.HasSuffix(heard, said) {
			return nil
		}
	}
}

// echo starts a target on port 7 of a namespace of the machine.
func (m machine) echo(t *testing.T, program, namespace string) {
	t.Helper()
	m.run(t, "systemd-run", "--quiet", "--unit=echo-"+namespace, "--setenv="+act+"=echo", "ip", "netns", "exec", namespace, program, ":7")
	wait.For(t, patience, "the target to listen", func() error {
		listening, err := m.try("ip", "netns", "exec", namespace, "ss", "--listening", "--tcp", "--numeric", "--no-header", "sport = 7")
		if err == nil && listening == "" {
			err = errors.New("it does not")
		}
		return err
	})
}

// A talker is a client that talks.
type talker struct {
	what  string
	stdin io.Closer
	done  chan error
	said  *bytes.Buffer // after done
}

// talker starts a client in the machine's namespace client.
func (m machine) talker(t *testing.T, program, what, address string) talker {
	t.Helper()
	cmd := m.command("ip", "netns", "exec", "client", "env", act+"=talk", program, address)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	reading, writing, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	said := new(bytes.Buffer)
	cmd.Stdout, cmd.Stderr = writing, writing
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = writing.Close() // ours: the client has its own
	lines := bufio.NewReader(reading)
	first, _ := lines.ReadString('\n') // without one, it failed
	w := talker{what, stdin, make(chan error, 1), said}
	go func() {
		_, _ = io.Copy(said, lines)
		_ = reading.Close()
		w.done <- cmd.Wait()
	}()
	t.Cleanup(func() { _ = stdin.Close() })
	if first != "talking\n" {
		t.Fatalf("%s: %s%s: %v", what, first, said, <-w.done)
	}
	return w
}

// finish ends a talker, none of whose connections may have failed.
func (w talker) finish(t *testing.T) {
	t.Helper()
	_ = w.stdin.Close()
	if err := <-w.done; err != nil {
		t.Errorf("%s: %v: %s", w.what, err, w.said)
		return
	}
	t.Logf("%s: %s", w.what, strings.TrimSpace(w.said.String()))
}
