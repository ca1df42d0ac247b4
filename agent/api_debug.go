package agent

import (
	"fmt"
	"io"
	"net/http"
	"runtime"
	"runtime/metrics"
	"strconv"
	"time"

	"github.com/berthd/berth/wire"
)

// routeDebug adds what helps to find out what is wrong.
func (a *api) routeDebug(mux *http.ServeMux) {
	mux.HandleFunc("GET /debug/logs", a.debugLogs)
	mux.HandleFunc("GET /debug/magicsock", a.debugMesh)
	mux.HandleFunc("GET /debug/magicsock/debug-logging/{state}", a.debugMeshLogging)
	mux.HandleFunc("GET /debug/manifest", a.debugManifest)
}

// debugLogs shows the agent's own log; with after, in RFC 3339, what was written since then.
func (a *api) debugLogs(w http.ResponseWriter, r *http.Request) {
	if !onlyQuery(w, r, "after") {
		return
	}
	var after time.Time
	if text := r.URL.Query().Get("after"); text != "" {
		var err error
		if after, err = time.Parse(time.RFC3339Nano, text); err != nil {
			writeBadQuery(w, wire.Validation{Field: "after", Detail: fmt.Sprintf("Query param \"after\" must be a time such as 2006-01-02T15:04:05Z: %v", err)})
			return
		}
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	// A peer that left is no trouble of ours.
	_ = a.logs.WriteSince(w, after)
}

func (a *api) debugMesh(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	a.mesh(w)
}

// debugMeshLogging switches whether the mesh logs all it does.
func (a *api) debugMeshLogging(w http.ResponseWriter, r *http.Request) {
	on, err := strconv.ParseBool(r.PathValue("state"))
	if err != nil {
		http.Error(w, fmt.Sprintf("invalid state %q, must be a boolean", r.PathValue("state")), http.StatusBadRequest)
		return
	}
	a.meshDebug.Store(on)
	a.log.Info("verbose logs of the mesh were switched", "on", on)
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	fmt.Fprintf(w, "updated magicsock debug logging to %v", on)
}

func (a *api) prometheus(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	a.metrics(w)
	processMetrics(w)
}

// processMetrics writes what the Go runtime knows about this process.
func processMetrics(w io.Writer) {
	sample := []metrics.Sample{{Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}}
	metrics.Read(sample)
	writeMetric(w, "gauge", "go_goroutines", "Goroutines that exist.", float64(runtime.NumGoroutine()))
	writeMetric(w, "gauge", "go_memory_mapped_bytes", "Memory the Go runtime holds, without what it gave back.",
		float64(sample[0].Value.Uint64()-sample[1].Value.Uint64()))
}

// writeMetric writes one metric without labels in the Prometheus text format.
func writeMetric(w io.Writer, kind, name, help string, value float64) {
	fmt.Fprintf(w, "# HELP %s %s\n# TYPE %s %s\n%s %g\n", name, help, name, kind, name, value)
}
