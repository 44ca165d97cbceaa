package main

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/spf13/cobra"

	"nlb/balancer/control"
)

func newDrain() *cobra.Command {
	return targetCommand("drain", "Deregister a target: no new flows, the others live on for the delay",
		`drain takes a target out of its group until nlb undrain, and returns when it takes no
new flows. Its flows live on for the group's deregistration_delay, and are ended then if
the delay has connection_termination. A reload and a restart change neither. The port
may be left out where the group has one target at the address.`,
		(*control.Client).Drain)
}

func newUndrain() *cobra.Command {
	return targetCommand("undrain", "Register a drained target again",
		`undrain puts a target back that nlb drain took out. It takes new flows as soon as it is
healthy; its health was checked meanwhile. The port may be left out where the group has
one target at the address.`,
		(*control.Client).Undrain)
}

func targetCommand(name, short, long string, do func(*control.Client, context.Context, control.TargetName) error) *cobra.Command {
	var socket string
	cmd := &cobra.Command{
		Use:     name + " GROUP ADDR[:PORT]",
		Short:   short,
		Long:    long,
		Example: "  nlb " + name + " web 10.0.1.11\n  nlb " + name + " web '[2001:db8::11]:8080'",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usageError{fmt.Errorf("%s wants a target group and a target, such as: nlb %s web 10.0.1.11:8080", name, name)}
			}
			_, err := parseTarget(args[0], args[1])
			return err
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			target, err := parseTarget(args[0], args[1])
			if err != nil {
				return err
			}
			return do(control.NewClient(socket), cmd.Context(), target)
		},
	}
	addSocket(cmd.Flags(), &socket)
	return cmd
}

// parseTarget reads ADDR or ADDR:PORT; an IPv6 address with a port needs brackets.
func parseTarget(group, text string) (control.TargetName, error) {
	if addr, err := netip.ParseAddr(text); err == nil {
		return control.TargetName{Group: group, Address: addr.Unmap()}, nil
	}
	ap, err := netip.ParseAddrPort(text)
	if err != nil || ap.Port() == 0 {
		return control.TargetName{}, usageError{fmt.Errorf("%q is no target: want ADDR or ADDR:PORT, such as 10.0.1.11:8080 or [2001:db8::11]:8080", text)}
	}
	return control.TargetName{Group: group, Address: ap.Addr().Unmap(), Port: ap.Port()}, nil
}
