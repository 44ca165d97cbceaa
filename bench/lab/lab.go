package lab

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// A Lab owns a set of network namespaces. Its methods may be called by several
// goroutines, but two of them should not build at once.
type Lab struct {
	// Prefix begins the name of every namespace of this lab.
	Prefix string

	mu     sync.Mutex
	nodes  []*Node // guarded by mu
	links  []link  // guarded by mu, in the order they were made
	closed bool    // guarded by mu
}

type link struct{ a, b End }

// New makes an empty lab, after it swept up what dead processes left behind. It
// needs root.
func New() (*Lab, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("lab: network namespaces need root")
	}
	if err := prepareNames(); err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	if _, err := Sweep(); err != nil {
		return nil, fmt.Errorf("lab: sweep: %w", err)
	}
	random := make([]byte, 3)
	_, _ = rand.Read(random) // never fails (crypto/rand)
	return &Lab{Prefix: fmt.Sprintf("%s%d-%s-", namePrefix, os.Getpid(), hex.EncodeToString(random))}, nil
}

// Nodes are the nodes of the lab, in the order they were made.
func (l *Lab) Nodes() []*Node {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.nodes)
}

var nodeName = regexp.MustCompile(`^[a-z0-9]{1,12}$`)

// Node makes a namespace with its loopback up. The name is short, since it also
// names interfaces: up to 12 lower-case letters and digits.
func (l *Lab) Node(name string) (*Node, error) {
	if !nodeName.MatchString(name) {
		return nil, fmt.Errorf("lab: %q is not a node's name (1-12 of a-z, 0-9)", name)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, fmt.Errorf("lab: %w", errClosed)
	}
	if slices.ContainsFunc(l.nodes, func(n *Node) bool { return n.Name == name }) {
		return nil, fmt.Errorf("lab: node %s exists", name)
	}
	n, err := newNode(name, l.Prefix+name)
	if err != nil {
		return nil, fmt.Errorf("lab: node %s: %w", name, err)
	}
	l.nodes = append(l.nodes, n)
	return n, nil
}

// Close kills every process in the lab's namespaces, whoever started it, and
// removes the namespaces. It may be called again, and from another goroutine
// than the one that uses the lab.
func (l *Lab) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	nodes := l.nodes
	l.nodes, l.links = nil, nil
	if len(nodes) == 0 {
		return nil
	}
	names := make([]string, len(nodes))
	for i, n := range nodes {
		n.killAgents()
		names[i] = n.NS
	}
	errs := []error{removeNamespaces(names)}
	for _, n := range nodes {
		errs = append(errs, n.release())
	}
	return errors.Join(errs...)
}

// OnSignal makes SIGINT, SIGTERM and SIGHUP close the lab before they take their
// usual effect. The returned function ends that.
func (l *Lab) OnSignal() (stop func()) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	done := make(chan struct{})
	go func() {
		select {
		case <-done:
		case s := <-signals:
			if err := l.Close(); err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
			signal.Reset(s)
			_ = unix.Kill(os.Getpid(), s.(syscall.Signal))
		}
	}()
	return sync.OnceFunc(func() {
		signal.Stop(signals)
		close(done)
	})
}
