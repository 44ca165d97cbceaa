package doctor

import (
	"fmt"
	"strconv"
	"strings"

	"nlb/balancer"
)

// Limits of the checks below.
const (
	// fullSoon and full are how much of the conntrack table may be in use, in
	// percent, before flows of a burst are refused, and flows of every day.
	fullSoon, full = 80, 95
	// chainLength is how many flows may share a bucket of conntrack's hash in a
	// full table. The kernel's own choice is 1 (4 before 5.15).
	chainLength = 8
	// fewPorts is how many source ports the relay should have towards one
	// target: half of the kernel's default range.
	fewPorts = 14000
	// shortBacklog is how many connections should be able to wait for the relay;
	// the kernel's default was 128 before 5.4, and is 4096 since.
	shortBacklog = 1024
)

func always(*Facts) bool { return true }

func conntrackChecks() []Check {
	return []Check{
		{
			ID: "nf-tables-missing", Role: Balancer, Severity: Error,
			Seeks:       "the kernel has no nf_tables, or its module is not loaded",
			Consequence: "nlb serve can put nothing in force.",
			Cure:        "modprobe nf_tables",
			look: missing(func(f *Facts) bool { return !f.NFTables },
				"the kernel has no nf_tables", "modprobe", "nf_tables"),
		},
		{
			ID: "conntrack-missing", Role: Balancer, Severity: Error,
			Seeks:       "the kernel has no connection tracking, or its module is not loaded",
			Consequence: "Nothing can be rewritten, so that no flow is balanced.",
			Cure:        "modprobe nf_conntrack",
			look: missing(func(f *Facts) bool { return !f.Conntrack },
				"the kernel has no connection tracking", "modprobe", "nf_conntrack"),
		},
		{
			ID: "ipvs-missing", Role: Balancer, Severity: Error,
			Seeks:       "the configuration says dataplane: ipvs, and the kernel has no IPVS, or its module is not loaded",
			Consequence: "nlb serve can put nothing in force.",
			Cure:        "modprobe -a ip_vs ip_vs_mh, or dataplane: nftables",
			look: missing(func(f *Facts) bool { return f.Spec != nil && f.Spec.Dataplane == balancer.IPVS && !f.IPVS },
				"dataplane: ipvs, and the kernel has no IPVS", "modprobe", "-a", "ip_vs", "ip_vs_mh"),
		},
		{
			ID: "conntrack-full", Role: Balancer, Severity: Error,
			Seeks:       "80 % of the conntrack table are in use (a warning), or 95 %",
			Consequence: "New flows are dropped when the table is full, whoever they belong to.",
			Cure:        "sysctl -w net.netfilter.nf_conntrack_max=N, where N is twice what it is",
			look:        conntrackFull,
		},
		{
			ID: "conntrack-buckets", Role: Balancer, Severity: Warning,
			Seeks:       "the conntrack table holds more than 8 flows for each bucket of its hash when it is full",
			Consequence: "Each packet is compared with many flows, so that the rate of packets falls as flows grow.",
			Cure:        "sysctl -w net.netfilter.nf_conntrack_buckets=N, where N is nf_conntrack_max",
			look:        conntrackBuckets,
		},
		{
			ID: "conntrack-accounting", Role: Balancer, Severity: Warning,
			Seeks:       "connection tracking does not count bytes",
			Consequence: "Bytes of targets are not known for flows that begin now.",
			Cure:        "sysctl -w net.netfilter.nf_conntrack_acct=1 (nlb serve sets it)",
			look:        wrong(keyCTAccounts, "0", "1", always),
		},
		{
			ID: "conntrack-events", Role: Balancer, Severity: Warning,
			Seeks:       "connection tracking tells nobody about flows that end",
			Consequence: "Flows that begin and end between two readings are counted nowhere.",
			Cure:        "sysctl -w net.netfilter.nf_conntrack_events=1",
			look:        wrong(keyCTEvents, "0", "1", always),
		},
		{
			ID: "conntrack-loose", Role: Balancer, Severity: Warning,
			Seeks:       "connection tracking does not pick up TCP flows in their middle",
			Consequence: "Flows that come from another balancer, or outlive a lost conntrack table, are reset and not carried on.",
			Cure:        "sysctl -w net.netfilter.nf_conntrack_tcp_loose=1",
			look:        wrong(keyCTLoose, "0", "1", always),
		},
		{
			ID: "conntrack-liberal", Role: Balancer, Severity: Notice,
			Seeks:       "connection tracking takes TCP segments outside the window for valid",
			Consequence: "Forged segments, resets among them, reach targets and clients.",
			Cure:        "sysctl -w net.netfilter.nf_conntrack_tcp_be_liberal=0",
			look:        wrong(keyCTLiberal, "1", "0", always),
		},
		{
			ID: "port-range", Role: Balancer, Severity: Warning,
			Seeks:       "there are relayed targets, and fewer than 14000 local ports",
			Consequence: "The relay runs out of source ports towards one target with that many connections.",
			Cure:        "sysctl -w net.ipv4.ip_local_port_range='1024 65535'",
			look:        portRange,
		},
		{
			ID: "listen-backlog", Role: Balancer, Severity: Warning,
			Seeks:       "there are relayed targets, and fewer than 1024 connections may wait for the relay",
			Consequence: "A burst of new connections is dropped, and retried by clients a second later.",
			Cure:        "sysctl -w net.core.somaxconn=4096, and restart the relay",
			look:        listenBacklog,
		},
	}
}

func missing(is func(*Facts) bool, what string, cure ...string) func(*Facts) []symptom {
	return func(f *Facts) []symptom {
		if !is(f) {
			return nil
		}
		return []symptom{found(what, cure)}
	}
}

func conntrackFull(f *Facts) []symptom {
	count, ok1 := f.number(keyCTCount)
	most, ok2 := f.number(keyCTMax)
	if !ok1 || !ok2 || most == 0 || count*100 < most*fullSoon {
		return nil
	}
	s := found(fmt.Sprintf("%d of %d flows, %d %%", count, most, count*100/most), set(keyCTMax, strconv.Itoa(2*most)))
	s.doubtful = count*100 < most*full
	return []symptom{s}
}

func conntrackBuckets(f *Facts) []symptom {
	buckets, ok1 := f.number(keyCTBuckets)
	most, ok2 := f.number(keyCTMax)
	if !ok1 || !ok2 || most <= buckets*chainLength {
		return nil
	}
	return []symptom{found(fmt.Sprintf("%s, %s", f.says(keyCTMax), f.says(keyCTBuckets)), set(keyCTBuckets, strconv.Itoa(most)))}
}

func portRange(f *Facts) []symptom {
	bounds := strings.Fields(f.Sysctls[keyPortRange])
	if !f.relays() || len(bounds) != 2 {
		return nil
	}
	first, err1 := strconv.Atoi(bounds[0])
	last, err2 := strconv.Atoi(bounds[1])
	if err1 != nil || err2 != nil || last-first+1 >= fewPorts {
		return nil
	}
	what := fmt.Sprintf("%s = %d %d: %d ports", dotted(keyPortRange), first, last, last-first+1)
	return []symptom{found(what, set(keyPortRange, "1024 65535"))}
}

func listenBacklog(f *Facts) []symptom {
	if n, ok := f.number(keyBacklog); !f.relays() || !ok || n >= shortBacklog {
		return nil
	}
	return []symptom{found(f.says(keyBacklog), set(keyBacklog, "4096"))}
}
