package metrics

import (
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"nlb/healthcheck"
)

// probeBounds are the upper bounds of the probes' duration in seconds, inclusive:
// from a target in the same rack to one that a timeout of 10 s, the default,
// barely spares.
var probeBounds = []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}

// Probes count how health checks end. They are the one thing that is counted
// when it happens: nobody else remembers each probe. Their methods may be called
// from many goroutines.
type Probes struct {
	took     *prometheus.HistogramVec
	failures *prometheus.CounterVec
}

// NewProbes returns Probes that have seen none.
func NewProbes() *Probes {
	return &Probes{
		took: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: probeDuration.Name, Help: probeDuration.Help, Buckets: probeBounds,
		}, probeDuration.Labels),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: probeFailures.Name, Help: probeFailures.Help,
		}, probeFailures.Labels),
	}
}

// Observe counts a probe that was made for a target group.
func (p *Probes) Observe(group string, r healthcheck.Result) {
	if r.OK() {
		p.took.WithLabelValues(group).Observe(r.Latency.Seconds())
		return
	}
	p.failures.WithLabelValues(group, reasonOf(r.Kind)).Inc()
}

// Forget drops what was counted for a target group that is gone.
func (p *Probes) Forget(group string) {
	gone := prometheus.Labels{"target_group": group}
	p.took.DeletePartialMatch(gone)
	p.failures.DeletePartialMatch(gone)
}

// reasonOf is a Kind as a label: "code mismatch" is code_mismatch.
func reasonOf(k healthcheck.Kind) string {
	return strings.ReplaceAll(strings.ToLower(k.String()), " ", "_")
}
