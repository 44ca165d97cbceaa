// Command synflood measures what a flood of SYNs does to honest clients, with nlb's SYN
// proxy and without, in one network on one machine.
//
//	make bench-synflood
//
// It doubles the rate of a flood at a listener without a proxy until fewer than 99.9 % of
// honest connections succeed meanwhile, and then sends five times that rate to one with a
// proxy. Each rate is kept up for the same time, against targets with empty queues and an
// empty conntrack table. Two kinds of targets are asked: those that answer with SYN
// cookies when they have too many handshakes (net.ipv4.tcp_syncookies=1, the kernel's
// default), and those that have none. It exits with 0 if it could measure, whatever came
// of it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"time"

	"nlb/balancer/control"
	"nlb/bench/flood"
	"nlb/bench/lab"
	"nlb/bench/measure"
)

func main() {
	lab.MaybeRunAgent()
	var o options
	flag.StringVar(&o.program, "nlb", "bin/nlb", "the nlb to measure")
	flag.DurationVar(&o.window, "window", 5*time.Second, "how long each rate is kept up")
	flag.IntVar(&o.first, "first", 250, "the rate to begin with, in SYNs per second")
	flag.IntVar(&o.most, "most", 256000, "the rate to end with, if nothing breaks before")
	flag.StringVar(&o.format, "o", "table", "output: table or json")
	flag.Parse()
	if flag.NArg() > 0 || o.window <= 0 || o.first <= 0 || o.format != "table" && o.format != "json" {
		flag.Usage()
		os.Exit(2)
	}
	ctx := measure.UntilSignal()
	os.Exit(measure.ExitCode(ctx, run(ctx, o, os.Stdout, os.Stderr), os.Stderr))
}

type options struct {
	program     string
	window      time.Duration
	first, most int
	format      string
}

// What is listened on, and how much better than broken a listener is that holds.
const (
	openPort, proxiedPort = measure.Port, measure.Port + 1
	enough                = 0.999
	times                 = 5
)

// A Report is all that was measured.
type Report struct {
	Window time.Duration `json:"window_ns"`
	Rows   []Row         `json:"rows"`
}

// A Row is a flood at a listener, and what it did.
type Row struct {
	Cookies bool `json:"target_has_cookies"`
	Proxied bool `json:"syn_proxy"`
	// Asked and Sent are SYNs per second.
	Asked int     `json:"asked_per_second"`
	Sent  float64 `json:"sent_per_second"`
	// Honest connections, of those that ended within the window or a second later.
	Honest    int `json:"honest"`
	Succeeded int `json:"succeeded"`
	// Flows are those in conntrack at the window's end.
	Flows uint64 `json:"flows"`
}

func (r Row) share() float64 { return float64(r.Succeeded) / float64(max(r.Honest, 1)) }

// Table writes the report for people.
func (r Report) Table(w io.Writer) error {
	rows := [][]string{{"TARGET", "LISTENER", "SYN/S", "SENT/S", "HONEST", "SUCCEED", "CONNTRACK"}}
	for _, row := range r.Rows {
		target, listener := "no SYN cookies", "open"
		if row.Cookies {
			target = "SYN cookies"
		}
		if row.Proxied {
			listener = "SYN proxy"
		}
		rows = append(rows, []string{
			target, listener, fmt.Sprint(row.Asked), fmt.Sprintf("%.0f", row.Sent),
			fmt.Sprint(row.Honest), fmt.Sprintf("%.2f %%", 100*row.share()), fmt.Sprint(row.Flows),
		})
	}
	_, err := io.WriteString(w, measure.Columns(rows))
	return err
}

// run measures both kinds of targets, and writes the report.
func run(ctx context.Context, o options, stdout, stderr io.Writer) (err error) {
	var s site
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.build(ctx, o.program); err != nil {
		return err
	}
	r := Report{Window: o.window}
	for _, cookies := range []bool{false, true} {
		if err := s.Targets[0].Sysctl("net.ipv4.tcp_syncookies", map[bool]string{true: "1", false: "0"}[cookies]); err != nil {
			return err
		}
		rate, broken := o.first, false
		for ; rate <= o.most && !broken; rate *= 2 {
			row, err := s.measure(ctx, openPort, rate, o.window)
			if err != nil {
				return err
			}
			row.Cookies, broken = cookies, row.share() < enough
			r.Rows = append(r.Rows, row)
			fmt.Fprintf(stderr, "%d SYN/s, open: %.2f %%\n", rate, 100*row.share())
			if broken {
				break
			}
		}
		row, err := s.measure(ctx, proxiedPort, times*min(rate, o.most), o.window)
		if err != nil {
			return err
		}
		row.Cookies, row.Proxied = cookies, true
		r.Rows = append(r.Rows, row)
	}
	return measure.Write(stdout, o.format, r)
}

// A site is a network with an attacker, an honest client, nlb and a target.
type site struct {
	measure.Site
	flood *flood.Flood
}

const config = `source_addresses: [%[1]s]
vips: [{address: %[2]s, interface: lo}]
metrics: {address: ""}
listeners:
  - {name: open, vip: %[2]s, protocol: TCP, port: %[3]d, forward: [{target_group: web}]}
  - {name: proxied, vip: %[2]s, protocol: TCP, port: %[4]d, forward: [{target_group: web}], syn_proxy: {enabled: true}}
target_groups:
  - {name: web, protocol: TCP, port: %[3]d, client_ip: preserve, health_check: {port: %[5]d, interval: 300s, healthy_threshold: 1}, targets: [{address: %[6]s}]}
`

func (s *site) build(ctx context.Context, program string) error {
	if err := s.Build(lab.Options{Clients: 2, Targets: 1}); err != nil {
		return err
	}
	if err := s.ManyConnections(); err != nil {
		return err
	}
	// A target without cookies keeps a quarter of its queue for clients that it remembers.
	// Here there is one client, who is to stand for many: it remembers none.
	if err := s.Targets[0].Sysctl("net.ipv4.tcp_no_metrics_save", "1"); err != nil {
		return err
	}
	if _, err := s.Targets[0].Agent().Serve(ctx, lab.Serve{Ports: []uint16{measure.ProbePort}, Networks: []string{"tcp"}}); err != nil {
		return err
	}
	text := fmt.Sprintf(config, s.LB.Addr4, lab.VIP4, openPort, proxiedPort, measure.ProbePort, s.Targets[0].Addr4)
	if err := s.StartNLB(ctx, program, text, 20*time.Second); err != nil {
		return err
	}
	var err error
	s.flood, err = flood.Open(s.Clients[0], s.LB, 1)
	return err
}

func (s *site) close() error {
	var err error
	if s.flood != nil {
		err = s.flood.Close()
	}
	return errors.Join(err, s.Close())
}

// measure keeps up a rate while an honest client makes connections.
func (s *site) measure(ctx context.Context, port uint16, rate int, window time.Duration) (row Row, err error) {
	// The queue of a listening socket ends with it.
	listeners, err := s.Targets[0].Agent().Serve(ctx, lab.Serve{Ports: []uint16{measure.Port}, Networks: []string{"tcp"}})
	if err != nil {
		return row, err
	}
	defer func() { err = errors.Join(err, listeners.Close()) }()
	if err := s.LB.Command(ctx, "conntrack", "-F").Run(); err != nil {
		return row, fmt.Errorf("conntrack -F: %w", err)
	}
	to := netip.AddrPortFrom(lab.VIP4, port)
	honest, err := s.Clients[1].Agent().Churn(ctx, lab.Churn{Call: lab.Call{Network: "tcp", Dst: to, Parallel: 8, Timeout: time.Second}})
	if err != nil {
		return row, err
	}
	flooding, cancel := context.WithTimeout(ctx, window)
	defer cancel()
	began := time.Now()
	sent, err := s.flood.Run(flooding, to, rate, int(float64(rate)*window.Seconds()))
	took := time.Since(began)
	status, asked := s.Status(ctx)
	load, stopped := honest.Stop(ctx)
	if err := errors.Join(err, asked, stopped, ctx.Err()); err != nil {
		return row, err
	}
	return Row{
		Proxied: port == proxiedPort, Asked: rate, Sent: float64(sent) / took.Seconds(),
		Honest: load.OK + load.Failed, Succeeded: load.OK, Flows: flows(status),
	}, nil
}

// flows is how many conntrack has; 0 where it does not say.
func flows(s *control.Status) uint64 {
	if s.Conntrack == nil {
		return 0
	}
	return s.Conntrack.Count
}
