package control

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

func (s *Server) getBerthStatus(w http.ResponseWriter, r *http.Request, a store.Agent) {
	report, err := s.statusReport(r.Context(), a)
	if err != nil {
		writeError(w, internalError(err))
		return
	}
	writeJSON(w, http.StatusOK, report)
}

// statusReport is all that an agent told of its workspace.
func (s *Server) statusReport(ctx context.Context, a store.Agent) (report wire.StatusReport, err error) {
	if report.Agent, err = s.viewAgent(ctx, a); err != nil {
		return report, err
	}
	st, err := s.store.State(ctx, a.ID)
	if err != nil {
		return report, err
	}
	report.Notes = st.Notes
	// Latencies that an agent has spoiled shall not hide the rest.
	if report.Latency, err = s.latency(s.coordinator.Node(a.ID)); err != nil {
		s.log.Debug("a status leaves the latencies out", "agent", a.ID, "err", err)
	}
	metadata, err := s.metadata(ctx, a.ID)
	if err != nil {
		return report, err
	}
	report.Metadata = aged(metadata, time.Now())
	stats, at, err := s.store.Stats(ctx, a.ID)
	if err != nil {
		return report, err
	}
	report.Traffic = traffic(stats, at)
	usage, err := s.store.Resources(ctx, a.ID)
	if err != nil {
		return report, err
	}
	report.Usage = newestUsage(usage)
	report.Sessions, err = s.store.Sessions(ctx, a.ID)
	return report, err
}

// traffic is nil before the first report.
func traffic(stats *agentpb.Stats, at time.Time) *wire.Traffic {
	if stats == nil {
		return nil
	}
	return &wire.Traffic{
		ReportedAt: at, Connections: stats.GetConnectionCount(), RxBytes: stats.GetRxBytes(), TxBytes: stats.GetTxBytes(),
		LatencyMS: stats.GetConnectionMedianLatencyMs(), SSH: stats.GetSessionCountSsh(), Terminals: stats.GetSessionCountReconnectingPty(),
		VSCode: stats.GetSessionCountVscode(), JetBrains: stats.GetSessionCountJetbrains(),
	}
}

// newestUsage is the last point of a window, nil if there is none.
func newestUsage(window *agentpb.PushResourcesMonitoringUsageRequest) *wire.Usage {
	points := window.GetDatapoints()
	if len(points) == 0 {
		return nil
	}
	point := points[len(points)-1]
	usage := &wire.Usage{CollectedAt: point.GetCollectedAt().AsTime(), Volumes: []wire.VolumeUsage{}}
	if m := point.GetMemory(); m != nil {
		usage.Memory = &wire.Used{Used: m.GetUsed(), Total: m.GetTotal()}
	}
	for _, v := range point.GetVolumes() {
		usage.Volumes = append(usage.Volumes, wire.VolumeUsage{Path: v.GetVolume(), Used: wire.Used{Used: v.GetUsed(), Total: v.GetTotal()}})
	}
	return usage
}

// getBerthAppStatuses answers with what an app said of itself, as far back as that is kept.
func (s *Server) getBerthAppStatuses(w http.ResponseWriter, r *http.Request, a store.Agent) {
	slug := r.URL.Query().Get(wire.QueryApp)
	i := slices.IndexFunc(a.Apps, func(app store.App) bool { return app.Slug == slug })
	if i < 0 {
		writeError(w, &wire.Error{StatusCode: http.StatusNotFound, Message: fmt.Sprintf("Agent %q has no app %q.", a.Name, short(slug))})
		return
	}
	statuses, err := s.store.AppStatuses(r.Context(), a.ID, a.Apps[i].ID)
	if err != nil {
		writeError(w, internalError(err))
		return
	}
	writeJSON(w, http.StatusOK, statuses)
}
