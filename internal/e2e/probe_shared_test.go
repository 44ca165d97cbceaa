package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"nlb/bench/lab"
)

// TestProbesAreShared has groups of several kinds with the same targets. Those that
// ask the same question share its answer, however many there are and whoever of
// them comes or goes.
func TestProbesAreShared(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Targets: 1})
	serveTargets(t, top, targetPort)
	groups := func(checks ...map[string]any) config {
		c := config{Sources: sources(top), VIPs: both()}
		for i, check := range checks {
			name := fmt.Sprint("g", i)
			g := pool(name, "TCP", []string{"preserve", "snat", "hairpin_snat"}[i%3], targetPort, targets(top.Targets...))
			g.HealthCheck = check
			c.Groups = append(c.Groups, g)
			c.Listeners = append(c.Listeners, listen(name, "TCP", uint16(webPort+i), name)...)
		}
		return c
	}
	spelled := quick() // the same, in more words
	spelled["protocol"], spelled["port"], spelled["proxy_protocol"], spelled["source"] = "TCP", targetPort, "none", ""
	other, web := quick(), quick()
	other["healthy_threshold"] = 3
	web["protocol"] = "HTTP"

	seen := capture(t, top.Targets[0], "eth0")
	d := serving(t, top, groups(quick(), quick(), spelled))
	for _, step := range []struct {
		name string
		c    config
		want int // probes in an interval, of each family
	}{
		{"three alike", groups(quick(), quick(), spelled), 1},
		{"one less", groups(quick(), quick()), 1},
		{"one more, another threshold", groups(quick(), quick(), other), 2},
		{"one more, another protocol", groups(quick(), quick(), other, web), 3},
		{"one is left", groups(quick()), 1},
	} {
		t.Run(step.name, func(t *testing.T) {
			if err := d.reload(step.c.String()); err != nil {
				t.Fatal(err)
			}
			d.waitAllHealthy()
			probeRate(t, top, seen, step.want)
		})
	}
}

// probeRate counts a target's probes for some intervals.
func probeRate(t *testing.T, top *lab.Topology, seen *lab.Capture, want int) {
	t.Helper()
	const intervals = 4
	begin := time.Now()
	end := begin.Add(intervals * time.Second)
	_, err := seen.Wait(soon(t), func(p lab.Packet) bool { return probeOpens(p) && p.Time.After(end) })
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		got := len(packets(t, seen, func(p lab.Packet) bool {
			return probeOpens(p) && p.Src == f.addr(top.LB) && p.Time.After(begin) && !p.Time.After(end)
		}))
		// A probe at either end may be on the one side or the other.
		if got < want*(intervals-1) || got > want*(intervals+1) {
			t.Errorf("IPv%s: %d probes in %d intervals, want %d", f.name, got, intervals, want*intervals)
		}
		t.Logf("IPv%s: %d probes in %d intervals", f.name, got, intervals)
	}
}

// TestFailOpenIsSaid has groups that differ in when they stop to trust their health
// checks, and looks for who says so while targets die and come back.
func TestFailOpenIsSaid(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{})
	open := make([]*lab.Listeners, len(top.Targets))
	for i, n := range top.Targets {
		open[i] = serveOn(t, n, lab.Serve{Ports: []uint16{targetPort}})
	}
	limits := []struct {
		name     string
		failOpen map[string]any
		after    int // how many of the two have to die; 3: it never fails open
	}{
		{"count", nil, 2}, // the default
		{"share", map[string]any{"minimum_healthy_percentage": 60}, 1},
		{"exact", map[string]any{"minimum_healthy_percentage": 50}, 2},
		{"never", map[string]any{"minimum_healthy_count": 0}, 3},
	}
	c := config{Sources: sources(top), VIPs: both()}
	for i, l := range limits {
		g := pool(l.name, "TCP", "preserve", targetPort, targets(top.Targets...))
		g.FailOpen = l.failOpen
		c.Groups = append(c.Groups, g)
		c.Listeners = append(c.Listeners, listen(l.name, "TCP", uint16(webPort+i), l.name)...)
	}
	d := serving(t, top, c)
	begun, ended := map[string]int{}, map[string]int{}
	look := func(dead int) {
		t.Helper()
		for i, l := range limits {
			d.waitHealthy(l.name, len(families)*(len(top.Targets)-dead))
			want := dead >= l.after
			if got := d.group(l.name).FailOpen; got != want {
				t.Errorf("%d dead: fail_open of %s is %v in the status", dead, l.name, got)
			}
			_, table, _ := strings.Cut(d.run("status").stdout, "target group "+l.name+",")
			table, _, _ = strings.Cut(table, "\n\n")
			if got := strings.Contains(table, "FAIL OPEN"); got != want {
				t.Errorf("%d dead: nlb status says of %s:\n%s", dead, l.name, table)
			}
			for _, line := range []struct {
				level, text string
				want        int
			}{
				{"WARN", "target group fails open", begun[l.name]},
				{"INFO", "target group no longer fails open", ended[l.name]},
			} {
				if got := probeLines(d, line.level, line.text, l.name); got != line.want {
					t.Errorf("%d dead: %d lines %q of %s, want %d", dead, got, line.text, l.name, line.want)
				}
			}
			for _, f := range families {
				got := call(t, top.Clients[0], lab.Call{Network: "tcp", Dst: f.at(uint16(webPort + i)), N: 20, Parallel: 20, Timeout: briefly})
				switch {
				case dead == 0 || dead == 1 && !want:
					if got.OK != 20 {
						t.Errorf("%d dead: %s, IPv%s: %v", dead, l.name, f.name, got)
					}
				case want: // the dead ones refuse: they were asked
					if got.ByErr[lab.Refused] == 0 || dead == 1 && got.OK == 0 || got.ByErr[lab.Timeout] > 0 {
						t.Errorf("%d dead: %s, IPv%s does not go to all: %v", dead, l.name, f.name, got)
					}
				default:
					allFail(t, fmt.Sprintf("%d dead: %s, IPv%s", dead, l.name, f.name), got, lab.Timeout)
				}
			}
		}
	}
	look(0)
	for _, dead := range []int{1, 2} {
		if err := open[dead-1].Close(); err != nil {
			t.Fatal(err)
		}
		for _, l := range limits {
			if dead == l.after {
				begun[l.name]++
			}
		}
		look(dead)
	}
	for dead := 1; dead >= 0; dead-- {
		serveOn(t, top.Targets[dead], lab.Serve{Ports: []uint16{targetPort}})
		for _, l := range limits {
			if dead == l.after-1 {
				ended[l.name]++
			}
		}
		look(dead)
	}
}

// probeLines counts lines of the log with a text of a target group.
func probeLines(d *daemon, level, text, group string) (n int) {
	for line := range strings.Lines(d.log.String()) {
		if strings.Contains(line, level) && strings.Contains(line, text) && strings.Contains(line, fmt.Sprintf(`"target_group": %q`, group)) {
			n++
		}
	}
	return n
}
