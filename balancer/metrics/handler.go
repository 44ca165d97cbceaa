package metrics

import (
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.uber.org/zap"
)

// scrapeWithin is when a scrape that is stuck is answered with 503: before
// Prometheus gives up after its default of 10 s, and after readWithin.
const scrapeWithin = 9 * time.Second

// maxScrapes is how many scrapes may be under way. They share one reading.
const maxScrapes = 8

// NewHandler answers scrapes with what c collects, and with what the Go runtime
// and the kernel know of this process. What cannot be exposed is logged, and does
// not keep the rest from being.
func NewHandler(c *Collector, log *zap.Logger) http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(c, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		ErrorLog:            errorLog{log},
		ErrorHandling:       promhttp.ContinueOnError,
		MaxRequestsInFlight: maxScrapes,
		CoalesceGather:      true,
		Timeout:             scrapeWithin,
	})
}

// An errorLog is a promhttp.Logger.
type errorLog struct{ *zap.Logger }

func (l errorLog) Println(v ...any) {
	l.Error("a metric cannot be exposed", zap.String("error", strings.TrimSuffix(fmt.Sprintln(v...), "\n")))
}
