package control

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
	"github.com/berthd/berth/wire/rpc"
)

// agentService answers the calls of one agent's link. Whatever a call names, it is about this agent:
// ids of apps and scripts are looked up among its own.
//
// An error makes most agents drop their link, so what a later report replaces anyway (stats,
// metadata, usage) is let go, with a word in the log, when it cannot be stored.
type agentService struct {
	*Server
	id        uuid.UUID
	workspace uuid.UUID
	version   wire.Version
	boundary  boundary
}

// Limits on what one agent may report in one call. They are far above what any agent does.
const (
	maxUpdates = 1000
	maxText    = 4096
)

func (a *agentService) GetManifest(ctx context.Context, _ *agentpb.GetManifestRequest) (*agentpb.Manifest, error) {
	agent, err := a.store.Agent(ctx, a.id)
	if err != nil {
		return nil, fmt.Errorf("cannot read the agent: %w", err)
	}
	workspace, err := a.workspaceOf(ctx, agent)
	if err != nil {
		return nil, err
	}
	st, err := a.store.State(ctx, a.id)
	if err != nil {
		return nil, fmt.Errorf("cannot read the agent's state: %w", err)
	}
	return a.manifest(agent, workspace, st), nil
}

// GetServiceBanner answers agents that know of one banner only: they get the first.
func (a *agentService) GetServiceBanner(context.Context, *agentpb.GetServiceBannerRequest) (*agentpb.ServiceBanner, error) {
	if banners := a.banners.Load(); banners != nil && len(*banners) > 0 {
		first := (*banners)[0]
		return &agentpb.ServiceBanner{Enabled: true, Message: first.Message, BackgroundColor: first.Color}, nil
	}
	return &agentpb.ServiceBanner{}, nil
}

func (a *agentService) GetAnnouncementBanners(context.Context, *agentpb.GetAnnouncementBannersRequest) (*agentpb.GetAnnouncementBannersResponse, error) {
	resp := &agentpb.GetAnnouncementBannersResponse{}
	if banners := a.banners.Load(); banners != nil {
		for _, b := range *banners {
			resp.AnnouncementBanners = append(resp.AnnouncementBanners, &agentpb.BannerConfig{
				Enabled: true, Message: b.Message, BackgroundColor: b.Color,
			})
		}
	}
	return resp, nil
}

// semver is a semantic version with its v. As stock servers do, it takes "v1" and "v1.2" for short.
var semver = regexp.MustCompile(`^v(0|[1-9]\d*)(\.(0|[1-9]\d*)(\.(0|[1-9]\d*)(-[0-9A-Za-z-]+(\.[0-9A-Za-z-]+)*)?(\+[0-9A-Za-z-]+(\.[0-9A-Za-z-]+)*)?)?)?$`)

var subsystems = map[agentpb.Startup_Subsystem]string{
	agentpb.Startup_ENVBOX:     "envbox",
	agentpb.Startup_ENVBUILDER: "envbuilder",
	agentpb.Startup_EXECTRACE:  "exectrace",
}

func (a *agentService) UpdateStartup(ctx context.Context, req *agentpb.UpdateStartupRequest) (*agentpb.Startup, error) {
	startup := req.GetStartup()
	if startup == nil {
		return nil, errors.New("startup is missing")
	}
	if version := startup.GetVersion(); len(version) > 256 || !semver.MatchString(version) {
		return nil, fmt.Errorf("invalid agent semver version %q", short(version))
	}
	if len(startup.GetExpandedDirectory()) > maxText {
		return nil, errors.New("expanded directory is too long")
	}
	known := make(map[string]bool)
	for _, sub := range startup.GetSubsystems() {
		name, ok := subsystems[sub]
		if !ok {
			return nil, fmt.Errorf("invalid agent subsystem %q", sub)
		}
		known[name] = true
	}
	names := slices.Sorted(maps.Keys(known))
	notes := shortNotes(startup.GetBerthNotes())
	err := a.store.UpdateState(ctx, a.id, func(st *store.State) error {
		st.Version, st.ExpandedDirectory, st.Subsystems = startup.GetVersion(), startup.GetExpandedDirectory(), names
		st.APIVersion, st.Notes = a.version.String(), notes
		return nil
	})
	return startup, err
}

// maxNotes bounds what an agent may tell of itself; each note is cut at maxText.
const maxNotes = 8

// shortNotes are the first of an agent's notes, each one short line.
func shortNotes(notes []string) (list []string) {
	for _, note := range notes[:min(len(notes), maxNotes)] {
		list = append(list, wire.Line(note[:min(len(note), maxText)]))
	}
	return list
}

var lifecycles = map[agentpb.Lifecycle_State]string{
	agentpb.Lifecycle_CREATED:          stateCreated,
	agentpb.Lifecycle_STARTING:         stateStarting,
	agentpb.Lifecycle_START_TIMEOUT:    stateStartTimeout,
	agentpb.Lifecycle_START_ERROR:      stateStartError,
	agentpb.Lifecycle_READY:            stateReady,
	agentpb.Lifecycle_SHUTTING_DOWN:    "shutting_down",
	agentpb.Lifecycle_SHUTDOWN_TIMEOUT: "shutdown_timeout",
	agentpb.Lifecycle_SHUTDOWN_ERROR:   "shutdown_error",
	agentpb.Lifecycle_OFF:              "off",
}

func (a *agentService) UpdateLifecycle(ctx context.Context, req *agentpb.UpdateLifecycleRequest) (*agentpb.Lifecycle, error) {
	l := req.GetLifecycle()
	if l == nil {
		return nil, errors.New("lifecycle is missing")
	}
	name, ok := lifecycles[l.GetState()]
	if !ok {
		return nil, fmt.Errorf("unknown lifecycle state %q", l.GetState())
	}
	at := l.GetChangedAt().AsTime() // absent is 1970-01-01
	if at.IsZero() || !storable(at) {
		at = time.Now().UTC()
		l.ChangedAt = timestamppb.New(at)
	}
	err := a.store.UpdateState(ctx, a.id, func(st *store.State) error {
		st.Lifecycle, st.LifecycleChangedAt = name, &at
		switch name {
		case stateStarting:
			st.StartedAt, st.ReadyAt = &at, nil
		case stateReady, stateStartTimeout, stateStartError:
			if st.StartedAt == nil {
				st.StartedAt = &at
			}
			st.ReadyAt = &at
		}
		return nil
	})
	if err == nil {
		a.log.Info("agent is "+name, "agent", a.id)
	}
	return l, err
}

// storable tells whether JSON has a form for a time.
func storable(t time.Time) bool { return t.Year() >= 0 && t.Year() <= 9999 }

func (a *agentService) UpdateStats(ctx context.Context, req *agentpb.UpdateStatsRequest) (*agentpb.UpdateStatsResponse, error) {
	resp := &agentpb.UpdateStatsResponse{ReportInterval: durationpb.New(wire.StatsInterval)}
	stats := req.GetStats()
	if stats == nil { // only asks for the interval
		return resp, nil
	}
	if len(stats.GetMetrics()) > maxUpdates || len(stats.GetConnectionsByProto()) > maxUpdates {
		return resp, nil
	}
	a.lenient("stats", a.store.PutStats(ctx, a.id, stats))
	if stats.GetConnectionCount() > 0 {
		a.lenient("use", a.noteUse(ctx, a.workspace))
	}
	return resp, nil
}

// lenient lets go of a report that cannot be stored: the next one replaces it.
func (a *agentService) lenient(what string, err error) {
	if err != nil && !errors.Is(err, context.Canceled) { // the agent left
		a.log.Warn("cannot store what an agent reports", "agent", a.id, "what", what, "err", err)
	}
}

var appHealths = map[agentpb.AppHealth]string{
	agentpb.AppHealth_DISABLED:     appDisabled,
	agentpb.AppHealth_INITIALIZING: appInitializing,
	agentpb.AppHealth_HEALTHY:      appHealthy,
	agentpb.AppHealth_UNHEALTHY:    appUnhealthy,
}

func (a *agentService) BatchUpdateAppHealths(ctx context.Context, req *agentpb.BatchUpdateAppHealthRequest) (*agentpb.BatchUpdateAppHealthResponse, error) {
	if len(req.GetUpdates()) == 0 {
		return &agentpb.BatchUpdateAppHealthResponse{}, nil
	}
	agent, err := a.store.Agent(ctx, a.id)
	if err != nil {
		return nil, fmt.Errorf("cannot read the agent: %w", err)
	}
	if len(req.GetUpdates()) > maxUpdates {
		return nil, errors.New("too many app health updates")
	}
	changed := make(map[uuid.UUID]string, len(req.GetUpdates()))
	for _, u := range req.GetUpdates() {
		id, err := uuid.FromBytes(u.GetId())
		if err != nil {
			return nil, fmt.Errorf("cannot read app id: %w", err)
		}
		i := slices.IndexFunc(agent.Apps, func(app store.App) bool { return app.ID == id })
		if i < 0 {
			return nil, fmt.Errorf("workspace app ID %q not found", id)
		}
		if agent.Apps[i].HealthURL == "" {
			return nil, fmt.Errorf("workspace app %q does not have healthchecks enabled", agent.Apps[i].Slug)
		}
		health, ok := appHealths[u.GetHealth()]
		if !ok {
			return nil, fmt.Errorf("unknown health status %q for app %q", u.GetHealth(), id)
		}
		changed[id] = health
	}
	err = a.store.UpdateState(ctx, a.id, func(st *store.State) error {
		if st.AppHealth == nil {
			st.AppHealth = make(map[uuid.UUID]string)
		}
		same := true
		for id, health := range changed {
			same = same && st.AppHealth[id] == health
			st.AppHealth[id] = health
		}
		if same {
			return errUnchanged
		}
		return nil
	})
	if err != nil && !errors.Is(err, errUnchanged) {
		return nil, err
	}
	return &agentpb.BatchUpdateAppHealthResponse{}, nil
}

// errUnchanged spares a write that would change nothing.
var errUnchanged = errors.New("nothing changed")

func (a *agentService) BatchUpdateMetadata(ctx context.Context, req *agentpb.BatchUpdateMetadataRequest) (*agentpb.BatchUpdateMetadataResponse, error) {
	agent, err := a.store.Agent(ctx, a.id)
	if err != nil {
		return nil, fmt.Errorf("cannot read the agent: %w", err)
	}
	declared := make(map[string]bool, len(agent.Metadata))
	for _, d := range agent.Metadata {
		declared[d.Key] = true
	}
	now := time.Now().UTC()
	values := make(map[string]store.MetadataValue)
	keyBytes := 0
	var tooMany error
	for _, m := range req.GetMetadata() {
		if m.GetResult() == nil {
			return nil, fmt.Errorf("metadata %q has no result", short(m.GetKey()))
		}
		if keyBytes += len(m.GetKey()); keyBytes > wire.MaxMetadataKeys {
			// What came before is stored; the rest has no place.
			tooMany = fmt.Errorf("metadata keys of %d bytes exceed %d bytes", keyBytes, wire.MaxMetadataKeys)
			break
		}
		if declared[m.GetKey()] {
			values[m.GetKey()] = metadataValue(m.GetResult(), now)
		}
	}
	if len(values) > 0 {
		a.lenient("metadata", a.store.PutMetadata(ctx, a.id, values))
	}
	return &agentpb.BatchUpdateMetadataResponse{}, tooMany
}

// metadataValue bounds a value and its error, and says so where a reader looks.
func metadataValue(r *agentpb.WorkspaceAgentMetadata_Result, now time.Time) store.MetadataValue {
	v := store.MetadataValue{CollectedAt: now, Value: strings.TrimSpace(r.GetValue()), Error: strings.TrimSpace(r.GetError())}
	if n := len(v.Error); n > wire.MaxMetadataValue {
		v.Error = fmt.Sprintf("error of %d bytes exceeded %d bytes", n, wire.MaxMetadataValue)
	}
	if n := len(v.Value); n > wire.MaxMetadataValue {
		v.Value = store.CutText(v.Value, wire.MaxMetadataValue)
		v.Error = fmt.Sprintf("value of %d bytes exceeded %d bytes", n, wire.MaxMetadataValue)
	}
	return v
}

func (a *agentService) BatchCreateLogs(ctx context.Context, req *agentpb.BatchCreateLogsRequest) (*agentpb.BatchCreateLogsResponse, error) {
	st, err := a.store.State(ctx, a.id)
	if err != nil {
		return nil, fmt.Errorf("cannot read the agent's state: %w", err)
	}
	if st.LogsOverflowed {
		return &agentpb.BatchCreateLogsResponse{LogLimitExceeded: true}, nil
	}
	if len(req.GetLogs()) == 0 {
		return &agentpb.BatchCreateLogsResponse{}, nil
	}
	b := store.LogBatch{First: req.GetBerthFirstSequence()}
	if b.Source, err = uuid.FromBytes(req.GetLogSourceId()); err != nil {
		return nil, fmt.Errorf("cannot read log source id: %w", err)
	}
	if id := req.GetBerthSpoolId(); len(id) > 0 {
		if b.Spool, err = uuid.FromBytes(id); err != nil {
			return nil, fmt.Errorf("cannot read spool id: %w", err)
		}
		// The last number must fit beside the first: numbers never come near this.
		if b.Spool == uuid.Nil || b.First == 0 || b.First > 1<<62 {
			return nil, errors.New("a spool needs an id, and a first sequence from 1")
		}
	}
	for _, l := range req.GetLogs() {
		b.Lines = append(b.Lines, store.LogLine{Output: logText(l.GetOutput()), Level: l.GetLevel()})
	}
	err = a.addLogs(ctx, a.id, b)
	if errors.Is(err, store.ErrLogLimit) {
		return &agentpb.BatchCreateLogsResponse{LogLimitExceeded: true}, nil
	}
	if err != nil {
		return nil, err
	}
	return &agentpb.BatchCreateLogsResponse{}, nil
}

var scriptStages = map[agentpb.Timing_Stage]string{
	agentpb.Timing_START: "start", agentpb.Timing_STOP: "stop", agentpb.Timing_CRON: "cron",
}

var scriptStatuses = map[agentpb.Timing_Status]string{
	agentpb.Timing_OK: "ok", agentpb.Timing_EXIT_FAILURE: "exit_failure",
	agentpb.Timing_TIMED_OUT: "timed_out", agentpb.Timing_PIPES_LEFT_OPEN: "pipes_left_open",
}

func (a *agentService) ScriptCompleted(ctx context.Context, req *agentpb.WorkspaceAgentScriptCompletedRequest) (*agentpb.WorkspaceAgentScriptCompletedResponse, error) {
	t := req.GetTiming()
	if t == nil {
		return nil, errors.New("timing is missing")
	}
	id, err := uuid.FromBytes(t.GetScriptId())
	if err != nil {
		return nil, fmt.Errorf("cannot read script id: %w", err)
	}
	run := store.ScriptRun{ScriptID: id, ExitCode: t.GetExitCode()}
	for _, f := range []struct {
		name string
		at   *timestamppb.Timestamp
		to   *time.Time
	}{{"start", t.GetStart(), &run.Start}, {"end", t.GetEnd(), &run.End}} {
		if f.at == nil || f.at.AsTime().IsZero() || !storable(f.at.AsTime()) {
			return nil, fmt.Errorf("script %s time is required and cannot be zero", f.name)
		}
		*f.to = f.at.AsTime()
	}
	if run.End.Before(run.Start) {
		return nil, errors.New("script end time cannot be before its start time")
	}
	var ok1, ok2 bool
	run.Stage, ok1 = scriptStages[t.GetStage()]
	run.Status, ok2 = scriptStatuses[t.GetStatus()]
	if !ok1 || !ok2 {
		return nil, fmt.Errorf("unknown stage %q or status %q", t.GetStage(), t.GetStatus())
	}
	agent, err := a.store.Agent(ctx, a.id)
	if err != nil {
		return nil, fmt.Errorf("cannot read the agent: %w", err)
	}
	if !slices.ContainsFunc(agent.Scripts, func(s store.Script) bool { return s.ID == id }) &&
		!slices.ContainsFunc(agent.Devcontainers, func(d store.Devcontainer) bool { return d.ID == id }) {
		return nil, fmt.Errorf("script %s is not one of this agent", id)
	}
	if err := a.store.AddScriptRun(ctx, a.id, run); err != nil {
		return nil, rpc.Unavailable(err)
	}
	err = a.store.UpdateState(ctx, a.id, func(st *store.State) error {
		if st.Scripts == nil {
			st.Scripts = make(map[uuid.UUID]store.ScriptResult)
		}
		if last, ok := st.Scripts[id]; !ok || !run.End.Before(last.End) {
			st.Scripts[id] = store.ScriptResult{ExitCode: run.ExitCode, Status: run.Status, End: run.End}
		}
		return nil
	})
	return &agentpb.WorkspaceAgentScriptCompletedResponse{}, err
}

// GetResourcesMonitoringConfiguration says what is declared to be measured. Stock agents want the pace
// also when that is nothing.
func (a *agentService) GetResourcesMonitoringConfiguration(ctx context.Context, _ *agentpb.GetResourcesMonitoringConfigurationRequest) (*agentpb.GetResourcesMonitoringConfigurationResponse, error) {
	agent, err := a.store.Agent(ctx, a.id)
	if err != nil {
		return nil, fmt.Errorf("cannot read the agent: %w", err)
	}
	resp := &agentpb.GetResourcesMonitoringConfigurationResponse{
		Config: &agentpb.GetResourcesMonitoringConfigurationResponse_Config{
			NumDatapoints: wire.ResourcesWindow, CollectionIntervalSeconds: int32(wire.ResourcesInterval / time.Second),
		},
	}
	if r := agent.Resources; r != nil {
		if r.Memory {
			resp.Memory = &agentpb.GetResourcesMonitoringConfigurationResponse_Memory{Enabled: true}
		}
		for _, path := range r.Volumes {
			resp.Volumes = append(resp.Volumes, &agentpb.GetResourcesMonitoringConfigurationResponse_Volume{Enabled: true, Path: path})
		}
	}
	return resp, nil
}

// PushResourcesMonitoringUsage keeps the newest window of what was asked for. What nobody asked for is
// dropped, like metadata of unknown keys.
func (a *agentService) PushResourcesMonitoringUsage(ctx context.Context, req *agentpb.PushResourcesMonitoringUsageRequest) (*agentpb.PushResourcesMonitoringUsageResponse, error) {
	agent, err := a.store.Agent(ctx, a.id)
	if err != nil {
		return nil, fmt.Errorf("cannot read the agent: %w", err)
	}
	if usage := measured(req, agent.Resources); usage != nil {
		a.lenient("usage", a.store.PutResources(ctx, a.id, usage))
	}
	return &agentpb.PushResourcesMonitoringUsageResponse{}, nil
}

// measured returns of a report what was asked for, nil if that is nothing.
func measured(req *agentpb.PushResourcesMonitoringUsageRequest, asked *store.Resources) *agentpb.PushResourcesMonitoringUsageRequest {
	points := req.GetDatapoints()
	if asked == nil || len(points) == 0 {
		return nil
	}
	usage := &agentpb.PushResourcesMonitoringUsageRequest{}
	for _, p := range points[max(0, len(points)-wire.ResourcesWindow):] {
		kept := &agentpb.PushResourcesMonitoringUsageRequest_Datapoint{CollectedAt: p.GetCollectedAt()}
		if !p.GetCollectedAt().IsValid() {
			kept.CollectedAt = timestamppb.Now()
		}
		if asked.Memory {
			kept.Memory = p.GetMemory()
		}
		for _, path := range asked.Volumes {
			i := slices.IndexFunc(p.GetVolumes(), func(v *agentpb.PushResourcesMonitoringUsageRequest_Datapoint_VolumeUsage) bool {
				return v.GetVolume() == path
			})
			if i >= 0 {
				kept.Volumes = append(kept.Volumes, p.GetVolumes()[i])
			}
		}
		usage.Datapoints = append(usage.Datapoints, kept)
	}
	return usage
}

// maxReason bounds why a session ended: a hundred of them are one record.
const maxReason = 512

var connectionTypes = map[agentpb.Connection_Type]string{
	agentpb.Connection_SSH: "ssh", agentpb.Connection_VSCODE: "vscode",
	agentpb.Connection_JETBRAINS: "jetbrains", agentpb.Connection_RECONNECTING_PTY: "reconnecting_pty",
}

func (a *agentService) ReportConnection(ctx context.Context, req *agentpb.ReportConnectionRequest) (*emptypb.Empty, error) {
	in := req.GetConnection()
	if in == nil {
		return nil, errors.New("connection is missing")
	}
	id, err := uuid.FromBytes(in.GetId())
	if err != nil {
		return nil, fmt.Errorf("cannot read connection id: %w", err)
	}
	kind, known := connectionTypes[in.GetType()]
	began := in.GetAction() == agentpb.Connection_CONNECT
	switch {
	case id == uuid.Nil:
		return nil, errors.New("connection id must not be nil")
	case !began && in.GetAction() != agentpb.Connection_DISCONNECT:
		return nil, fmt.Errorf("unknown connection action %q", in.GetAction())
	case !known:
		return nil, fmt.Errorf("unknown connection type %q", in.GetType())
	}
	at := time.Now().UTC()
	if told := in.GetTimestamp(); told != nil && storable(told.AsTime()) {
		at = told.AsTime()
	}
	ip := in.GetIp()
	if ip == "localhost" {
		ip = "127.0.0.1"
	}
	err = a.store.UpdateSession(ctx, a.id, id, func(session *wire.Session) {
		session.Type = kind
		if addr, err := netip.ParseAddr(ip); err == nil {
			session.IP = addr.String()
		}
		if began {
			session.BeganAt = &at
			return
		}
		session.EndedAt, session.ExitCode = &at, in.GetStatusCode()
		session.Reason = store.CutText(logText(in.GetReason()), maxReason)
	})
	if err != nil {
		return nil, rpc.Unavailable(err)
	}
	return &emptypb.Empty{}, nil
}

var appStates = map[agentpb.UpdateAppStatusRequest_AppStatusState]string{
	agentpb.UpdateAppStatusRequest_WORKING:  "working",
	agentpb.UpdateAppStatusRequest_IDLE:     "idle",
	agentpb.UpdateAppStatusRequest_COMPLETE: "complete",
	agentpb.UpdateAppStatusRequest_FAILURE:  "failure",
}

func (a *agentService) UpdateAppStatus(ctx context.Context, req *agentpb.UpdateAppStatusRequest) (*agentpb.UpdateAppStatusResponse, error) {
	state, ok := appStates[req.GetState()]
	agent, err := a.store.Agent(ctx, a.id)
	if err != nil {
		return nil, fmt.Errorf("cannot read the agent: %w", err)
	}
	e := a.addAppStatus(ctx, agent, wire.PatchAppStatus{
		AppSlug: req.GetSlug(), State: cmp.Or(state, req.GetState().String()), Message: req.GetMessage(), URI: req.GetUri(),
	}, ok)
	switch {
	case e == nil:
		return &agentpb.UpdateAppStatusResponse{}, nil
	case e.StatusCode >= http.StatusInternalServerError:
		return nil, rpc.Unavailable(e)
	}
	return nil, e
}

// short cuts a text that came from outside for an error message.
func short(s string) string { return store.CutText(strings.ToValidUTF8(s, "?"), 128) }
