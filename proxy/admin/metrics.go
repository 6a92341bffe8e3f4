package admin

import (
	"context"
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/mod/sumdb/tlog"

	"tidemark/audit"
	"tidemark/cache"
)

// Metrics are the series of /metrics, in a registry of their own. What rooms
// count themselves is read when it is asked for.
type Metrics struct {
	reg          *prometheus.Registry
	requests     *prometheus.CounterVec
	seconds      *prometheus.HistogramVec
	served       *prometheus.CounterVec
	upstreamAsks *prometheus.CounterVec
	moves        *prometheus.CounterVec
	events       *prometheus.CounterVec
}

// NewMetrics returns metrics without sources; Watch adds them.
func NewMetrics() *Metrics {
	m := &Metrics{
		reg: prometheus.NewRegistry(),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tidemark_requests_total", Help: "Requests to the registry, by what was asked, of whom, and where the answer came from (hit, join, fill, pass, stale) or the class of its error.",
		}, []string{"kind", "upstream", "result"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "tidemark_request_seconds", Help: "Time from a request's head to the end of its answer.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300},
		}, []string{"kind"}),
		served: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tidemark_served_bytes_total", Help: "Bytes of bodies sent to clients, by where they came from.",
		}, []string{"source"}),
		upstreamAsks: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tidemark_upstream_requests_total", Help: "Responses of upstreams by status; code 0 is no response.",
		}, []string{"upstream", "code"}),
		moves: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tidemark_tag_moves_total", Help: "Moves of tags recorded, by class and by the mode of the rule that applied.",
		}, []string{"class", "mode"}),
		events: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tidemark_events_total", Help: "Entries of the ledger recorded, by type and severity.",
		}, []string{"type", "severity"}),
	}
	m.reg.MustRegister(m.requests, m.seconds, m.served, m.upstreamAsks, m.moves, m.events,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// Request counts an answer of the registry. source is "" when there was none to
// be had; then the status tells why.
func (m *Metrics) Request(kind, upstream, source string, status int, bytes int64, took time.Duration) {
	result := source
	switch {
	case result != "" && status < 400:
	case status == 0:
		result = "aborted"
	default:
		result = strconv.Itoa(status)
	}
	m.requests.WithLabelValues(kind, upstream, result).Inc()
	m.seconds.WithLabelValues(kind).Observe(took.Seconds())
	if bytes > 0 && source != "" {
		m.served.WithLabelValues(source).Add(float64(bytes))
	}
}

// Upstream counts a response of an upstream, or none with status 0.
func (m *Metrics) Upstream(name string, status int) {
	m.upstreamAsks.WithLabelValues(name, strconv.Itoa(status)).Inc()
}

// Recorded counts an event.
func (m *Metrics) Recorded(e audit.Event) {
	m.events.WithLabelValues(string(e.Type), e.Severity().String()).Inc()
	if e.Type.Moves() && e.Type != audit.FirstSeen {
		m.moves.WithLabelValues(string(e.Class), string(e.Policy.Mode)).Inc()
	}
}

func (m *Metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.reg, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError})
}

// Sources are what Watch reads.
type Sources struct {
	Cache         func() cache.Stats
	Upstreams     func() []UpstreamStatus
	Tree          func(context.Context) (tlog.Tree, error)
	UnsignedSince func() time.Time
	HeldRefs      func(context.Context) (int64, error)
	Lag           func() time.Duration
	Outbox        func(context.Context) ([]audit.OutboxCount, error)
	Alerts        func(context.Context) (map[audit.Type]int64, error)
}

// Watch adds the series that others count.
func (m *Metrics) Watch(s Sources) { m.reg.MustRegister(watched{s}) }

// watched collects from Sources.
type watched struct{ Sources }

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("tidemark_"+name, help, labels, nil)
}

var (
	cacheBytes   = desc("cache_bytes", "Bytes of stored content.")
	cacheBlobs   = desc("cache_blobs", "Pieces of stored content.")
	cacheEvicted = desc("cache_evicted_bytes_total", "Bytes evicted to make room.")
	cacheOldest  = desc("cache_oldest_seconds", "Time since the last use of what would be evicted next.")
	fillsActive  = desc("fills_active", "Downloads under way.")
	fillFailures = desc("fill_failures_total", "Downloads that did not end with stored content.", "reason")
	rateLimit    = desc("upstream_ratelimit_remaining", "What an upstream said is left of its rate limit.", "upstream")
	heldRefs     = desc("held_refs", "Tags of which something is held back, by a rule or by hand.")
	lag          = desc("observation_lag_seconds", "Time by which the most overdue question about a watched tag is late.")
	outbox       = desc("notify_outbox", "Events that a sink is still to be told of (pending), or never took (dead).", "sink", "state")
	alertsOpen   = desc("alerts_open", "Alerts that nothing has ended yet, by the type of the event that opened them.", "type")
	logSize      = desc("log_size", "Entries of the ledger.")
	logUnsigned  = desc("log_unsigned_seconds", "Time since the ledger grew beyond its last checkpoint, 0 if it did not.")
)

// Describe implements prometheus.Collector.
func (w watched) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{cacheBytes, cacheBlobs, cacheEvicted, cacheOldest, fillsActive, fillFailures, rateLimit, heldRefs, lag, outbox, alertsOpen, logSize, logUnsigned} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (w watched) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v int64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	c := w.Cache()
	gauge(cacheBytes, float64(c.Bytes))
	gauge(cacheBlobs, float64(c.Blobs))
	counter(cacheEvicted, c.EvictedBytes)
	gauge(cacheOldest, since(c.Oldest))
	gauge(fillsActive, float64(len(c.Fills)))
	for reason, n := range c.Failures {
		counter(fillFailures, n, reason)
	}
	for _, u := range w.Upstreams() {
		if u.RateLimitRemaining != nil {
			gauge(rateLimit, float64(*u.RateLimitRemaining), u.Name)
		}
	}
	if held, err := w.HeldRefs(context.Background()); err != nil {
		ch <- prometheus.NewInvalidMetric(heldRefs, err)
	} else {
		gauge(heldRefs, float64(held))
	}
	if tree, err := w.Tree(context.Background()); err != nil {
		ch <- prometheus.NewInvalidMetric(logSize, err)
	} else {
		gauge(logSize, float64(tree.N))
	}
	if counts, err := w.Outbox(context.Background()); err != nil {
		ch <- prometheus.NewInvalidMetric(outbox, err)
	} else {
		for _, c := range counts {
			gauge(outbox, float64(c.N), c.Sink, c.State)
		}
	}
	if counts, err := w.Alerts(context.Background()); err != nil {
		ch <- prometheus.NewInvalidMetric(alertsOpen, err)
	} else {
		for kind, n := range counts {
			gauge(alertsOpen, float64(n), string(kind))
		}
	}
	gauge(lag, w.Lag().Seconds())
	gauge(logUnsigned, since(w.UnsignedSince()))
}

func since(t time.Time) float64 {
	if t.IsZero() {
		return 0
	}
	return time.Since(t).Seconds()
}
