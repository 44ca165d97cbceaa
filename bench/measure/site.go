package measure

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"nlb/bench/lab"
)

// What the sites have in common, so that they differ in what is measured alone.
const (
	Port      = 80   // of the VIP and of the targets; scripts that are expanded have it in their text
	ProbePort = 8080 // of the targets, for health checks
)

// A Site is a network and what is in it: the program on the balancer's node, if
// there is one, with a folder for its files. The zero Site is empty.
type Site struct {
	*lab.Topology
	Balancer Daemon
	dir      string
}

// Build makes a routed network and the folder. After an error too, the site is
// to be closed.
func (s *Site) Build(o lab.Options) (err error) {
	if s.Topology, err = lab.Routed(o); err != nil {
		return fmt.Errorf("needs network namespaces and veth links: %w", err)
	}
	s.dir, err = os.MkdirTemp("", "nlb-bench-")
	return err
}

// ManyConnections prepares the nodes for many short connections, as one does:
// whoever closes first keeps the port for a minute, and may use it again after a
// second (ip-sysctl, tcp_tw_reuse).
func (s *Site) ManyConnections() error {
	for _, n := range s.Nodes() {
		err := errors.Join(
			n.Sysctl("net.ipv4.ip_local_port_range", "1024 65535"),
			n.Sysctl("net.ipv4.tcp_tw_reuse", "1"),
		)
		if err != nil {
			return err
		}
	}
	return nil
}

// Close removes the network and all in it, complete or not.
func (s *Site) Close() error {
	var errs []error
	if s.Topology != nil {
		errs = append(errs, s.Topology.Close()) // ends the balancer too
	}
	s.Balancer.Join()
	if s.dir != "" {
		errs = append(errs, os.RemoveAll(s.dir))
	}
	return errors.Join(errs...)
}

// Start starts a command as the balancer, which prints to a file in the site's
// folder. The errors are os's and exec's.
func (s *Site) Start(cmd *exec.Cmd) error { return s.Balancer.Start(cmd, s.Path("balancer.log")) }

// Path is a file's in the site's folder; of "", the folder's own.
func (s *Site) Path(name string) string { return filepath.Join(s.dir, name) }

// Write makes a file in the site's folder, which its owner alone may read.
func (s *Site) Write(name, text string) (path string, err error) {
	path = s.Path(name)
	return path, os.WriteFile(path, []byte(text), 0o600)
}

// Expand writes this network's addresses for VIP, T0, T1 and so on, which are
// the targets. More than ten have no such names.
func (s *Site) Expand(text string) string {
	names := []string{"VIP", lab.VIP4.String()}
	for i, t := range s.Targets {
		names = append(names, fmt.Sprint("T", i), t.Addr4.String())
	}
	return strings.NewReplacer(names...).Replace(text)
}
