package balancer

import (
	"errors"
	"fmt"
)

// ErrUnsupported is wrapped by every error that says: valid, but not built into
// this program.
var ErrUnsupported = errors.New("not built into this version")

// Unsupported lists what spec asks for and no dataplane here can do. It is
// asked before anything in the kernel is touched.
func Unsupported(spec *Spec) []error {
	var errs []error
	for _, g := range spec.TargetGroups {
		if g.ClientIP == ProxyProtocolV2 {
			errs = append(errs, fmt.Errorf("target group %s: client_ip %s is %w; use %s, %s or %s",
				g.Name, g.ClientIP, ErrUnsupported, Preserve, HairpinSNAT, SNAT))
		}
	}
	return errs
}
