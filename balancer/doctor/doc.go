// Package doctor finds what is wrong with a host that balances, or with a
// target, before or after it costs somebody an outage.
//
//	kernel ──Read──► Facts ──Diagnose──► []Finding ──Script──► what cures them
//
// [Facts] hold all that was read, as plain values that survive JSON, so that a
// report of a bug can bring them along. [Diagnose] is pure: the same Facts give
// the same findings on any machine. [Read] asks the kernel, by netlink and
// /proc, and runs no program. Nothing here changes anything; [Command.Run], on
// request, runs a cure.
//
// A check is one entry of the list that [Checks] returns: what it looks for,
// what follows from it, how severe that is. docs/doctor.md is that list.
//
// # Foreign rules
//
// Other tables of nf_tables are read to see what becomes of one packet of each
// kind of ours in their base chains ([Packet]). What cannot be known of the
// packet (the client's address), and what is not read of the rules (maps, large
// sets, most matches of iptables), makes the outcome doubtful, and the finding a warning.
package doctor
