// Package part has what the parts of the race share (bench/race): whom they
// measure, what they are asked for, and how they say what came of it.
//
// A part measures some metrics of those contestants that can take them. It makes
// its networks when it is opened, measures everybody once in each round, in an
// order that changes, and leaves nothing behind when it is closed.
package part

import (
	"context"
	"fmt"
	"os/exec"
	"slices"
	"time"

	"nlb/bench/report"
)

// A Contestant is one way from a client to a target.
type Contestant struct {
	Name string
	// Key is what the command line calls it: a mode of nlb's, a peer, or what both
	// make use of. Several may have the same.
	Key  string
	Role report.Role
	Job  string
	// Program is what it needs beside the kernel; empty for nothing.
	Program Program
}

// A Program is a name of Programs.
type Program string

const (
	NLB     Program = "nlb"
	HAProxy Program = "haproxy"
	Nginx   Program = "nginx"
	NFT     Program = "nft"
	IPVSAdm Program = "ipvsadm"
)

// What contestants do, by what a target knows of the client. Those that do the
// same are peers.
const (
	KeepsClient = "the target sees the client"
	HidesClient = "the target sees the balancer"
	TellsClient = "the target is told the client"
)

// Names of contestants.
const (
	Direct       = "direct routing"
	MinimalDNAT  = "nftables DNAT"
	MinimalAgain = "nftables DNAT, again"
	KubeProxy    = "nftables as kube-proxy"
	Preserve     = "nlb preserve"
	Hairpin      = "nlb hairpin_snat"
	MinimalSNAT  = "nftables DNAT + masquerade"
	SNAT         = "nlb snat"
	PlainHAProxy = "HAProxy"
	PlainNginx   = "nginx stream"
	Relay        = "nlb proxy_protocol_v2"
	Untracked    = "nlb proxy_protocol_v2, untracked"
	SendProxy    = "HAProxy send-proxy-v2"
	Spliced      = "HAProxy send-proxy-v2, splice"
	NginxProxy   = "nginx stream, proxy_protocol v1"
	MinimalFast  = "nftables DNAT + flowtable"
	PreserveFast = "nlb preserve with flowtable"
	IPVS         = "IPVS mh"
	TrackedIPVS  = "IPVS mh + conntrack"
	PreserveIPVS = "nlb preserve on IPVS"
	SNATIPVS     = "nlb snat on IPVS"
)

// Contestants are all, in the order in which they are shown. The first is what
// the others are measured by: the same network, with a router in the balancer's
// place. MinimalAgain is the same ruleset in another network; it shows how much
// two equal things differ.
var Contestants = []Contestant{
	{Name: Direct, Key: "direct", Role: report.Baseline, Job: KeepsClient},

	{Name: MinimalDNAT, Key: "nftables", Role: report.Peer, Job: KeepsClient, Program: NFT},
	{Name: MinimalAgain, Key: "nftables", Role: report.Peer, Job: KeepsClient, Program: NFT},
	{Name: KubeProxy, Key: "kube-proxy", Role: report.Peer, Job: KeepsClient, Program: NFT},
	{Name: Preserve, Key: "preserve", Role: report.NLB, Job: KeepsClient, Program: NLB},
	{Name: Hairpin, Key: "hairpin_snat", Role: report.NLB, Job: KeepsClient, Program: NLB},

	{Name: MinimalSNAT, Key: "nftables", Role: report.Peer, Job: HidesClient, Program: NFT},
	{Name: SNAT, Key: "snat", Role: report.NLB, Job: HidesClient, Program: NLB},
	{Name: PlainHAProxy, Key: "haproxy", Role: report.Peer, Job: HidesClient, Program: HAProxy},
	{Name: PlainNginx, Key: "nginx", Role: report.Peer, Job: HidesClient, Program: Nginx},

	{Name: Relay, Key: "proxy_protocol_v2", Role: report.NLB, Job: TellsClient, Program: NLB},
	{Name: Untracked, Key: "proxy_protocol_v2", Role: report.NLB, Job: TellsClient, Program: NLB},
	{Name: SendProxy, Key: "haproxy", Role: report.Peer, Job: TellsClient, Program: HAProxy},
	{Name: Spliced, Key: "haproxy", Role: report.Peer, Job: TellsClient, Program: HAProxy},
	{Name: NginxProxy, Key: "nginx", Role: report.Peer, Job: TellsClient, Program: Nginx},

	// For these, the kernel needs modules: they are measured in emulated machines.
	{Name: MinimalFast, Key: "flowtable", Role: report.Peer, Job: KeepsClient, Program: NFT},
	{Name: PreserveFast, Key: "flowtable", Role: report.NLB, Job: KeepsClient, Program: NLB},
	{Name: IPVS, Key: "ipvs", Role: report.Peer, Job: KeepsClient, Program: IPVSAdm},
	{Name: TrackedIPVS, Key: "ipvs", Role: report.Peer, Job: KeepsClient, Program: IPVSAdm},
	{Name: PreserveIPVS, Key: "ipvs", Role: report.NLB, Job: KeepsClient, Program: NLB},
	{Name: SNATIPVS, Key: "ipvs", Role: report.NLB, Job: HidesClient, Program: NLB},
}

// Programs are paths of what is measured, by name.
type Programs map[Program]string

// remedies are how to come by programs.
var remedies = map[Program]string{
	NLB:     "make build-static",
	HAProxy: "apt-get install haproxy",
	Nginx:   "apt-get install nginx-light libnginx-mod-stream",
	NFT:     "apt-get install nftables",
	IPVSAdm: "apt-get install ipvsadm",
}

// Ready says what to do about a program that is not there. No program always is.
func (p Programs) Ready(name Program) error {
	if name == "" {
		return nil
	}
	if _, err := exec.LookPath(p[name]); err != nil {
		return fmt.Errorf("needs %s: %s: %w", name, remedies[name], err)
	}
	return nil
}

// Options are what a part is asked for.
type Options struct {
	Programs Programs
	Core     int // the one that everything runs on
	// Quick is for a look at whether all works: the same, with shorter turns.
	Quick bool
	// Contestants and Metrics are the names of those that are wanted. There may be
	// some that the part does not have.
	Contestants, Metrics []string
}

// Wants says whether a metric is wanted of a contestant, both by name.
func (o *Options) Wants(metric, contestant string) bool {
	return slices.Contains(o.Metrics, metric) && slices.Contains(o.Contestants, contestant)
}

// A Metric is what a part can measure.
type Metric struct {
	report.Metric
	// Key is what the command line calls it. Several may have the same.
	Key string
}

// A Setup is what makes a contestant of a program: the command lines, and what the
// program is given to read, a ruleset or a file. The lab's addresses have names
// there, as in measure.Site.Expand.
type Setup struct {
	Commands []string
	Config   string
}

// A Part measures.
type Part struct {
	Name    string
	Metrics []Metric // in the order in which they are shown
	// Contestants are the names of those that it can measure; not every metric is
	// for all of them.
	Contestants []string
	// Goals are what nlb is to reach.
	Goals []report.Goal
	// Setups are by contestant.
	Setups map[string]Setup
	// Rounds is how many a full and a quick run have.
	Rounds, QuickRounds int
	// Estimate is how long a round takes, and opening and closing together.
	Estimate func(Options) (round, around time.Duration)
	// Open makes what the rounds need. After an error there is nothing to close.
	Open func(context.Context, Options) (Runner, error)
}

// A Runner is a part that is open.
type Runner interface {
	// Round measures everybody once; rounds are counted from 1.
	Round(ctx context.Context, n int, out Recorder) error
	// Close removes all that Open made. It is called once, also after errors.
	Close() error
}

// A Recorder keeps what is measured: report.Writer is one.
type Recorder interface {
	Measure(report.Measurement) error
	Note(report.Note) error
}
