package control

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// metrics count what happens, by names and labels that are all known beforehand.
type metrics struct {
	mu     sync.Mutex
	counts map[string]uint64
}

// count adds one to a series, such as name{label="value"}.
func (m *metrics) count(series string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.counts == nil {
		m.counts = map[string]uint64{}
	}
	m.counts[series]++
}

// Names of metrics, and what they are.
const (
	metricExchanges = "berth_identity_exchanges_total"
	metricExpiry    = "berth_identity_pin_expiry_days"
)

func exchangeSeries(provider, result string) string {
	return fmt.Sprintf("%s{provider=%q,result=%q}", metricExchanges, provider, result)
}

// getMetrics writes the metrics in the text format of Prometheus.
func (s *Server) getMetrics(w http.ResponseWriter, _ *http.Request) {
	var b strings.Builder
	fmt.Fprintf(&b, "# HELP %s Machines that proved their identity or tried to, by cloud and result.\n# TYPE %[1]s counter\n", metricExchanges)
	s.metrics.mu.Lock()
	counts := maps.Clone(s.metrics.counts)
	s.metrics.mu.Unlock()
	for _, series := range slices.Sorted(maps.Keys(counts)) {
		fmt.Fprintf(&b, "%s %d\n", series, counts[series])
	}
	fmt.Fprintf(&b, "# HELP %s Days until the first of the certificates that prove machines ends, by cloud.\n# TYPE %[1]s gauge\n", metricExpiry)
	pins := s.identity.Load().pins()
	for _, provider := range slices.Sorted(maps.Keys(pins)) {
		if len(pins[provider]) == 0 {
			continue
		}
		first := pins[provider][0].Ends
		for _, p := range pins[provider] {
			if p.Ends.Before(first) {
				first = p.Ends
			}
		}
		fmt.Fprintf(&b, "%s{provider=%q} %d\n", metricExpiry, provider, days(time.Until(first)))
	}
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	_, _ = w.Write([]byte(b.String())) // a caller that left misses it
}
