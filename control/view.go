package control

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/tailnetpb"
)

const (
	// connectTimeout is how long after its making an agent that never came counts as late.
	connectTimeout = 2 * time.Minute
	// inactive is how long ago an agent may have answered a probe and still count as connected:
	// two of them.
	inactive = 2 * wire.PingInterval
)

// Lifecycle states by the names that clients know.
const (
	stateCreated      = "created"
	stateReady        = "ready"
	stateStarting     = "starting"
	stateStartTimeout = "start_timeout"
	stateStartError   = "start_error"
)

// status tells whether an agent is connected, from what its links last wrote.
func status(a store.Agent, st store.State, now time.Time) wire.AgentStatus {
	switch {
	case st.FirstConnectedAt == nil && now.Sub(a.CreatedAt) > connectTimeout:
		return wire.AgentTimeout
	case st.FirstConnectedAt == nil:
		return wire.AgentConnecting
	case st.DisconnectedAt != nil && !st.DisconnectedAt.Before(*st.LastConnectedAt):
		return wire.AgentDisconnected
	case now.Sub(*st.LastConnectedAt) > inactive:
		return wire.AgentDisconnected
	}
	return wire.AgentConnected
}

// health words what is wrong with an agent, the more basic trouble first.
func health(status wire.AgentStatus, lifecycle string) wire.AgentHealth {
	reason := ""
	switch {
	case status == wire.AgentConnecting:
		reason = "agent has not yet connected"
	case status == wire.AgentTimeout:
		reason = "agent is taking too long to connect"
	case lifecycle == "off":
		reason = "agent is not running"
	case status == wire.AgentDisconnected:
		reason = "agent has lost connection"
	case lifecycle == stateStartError:
		reason = "agent startup script exited with an error"
	case lifecycle == "shutting_down", lifecycle == "shutdown_timeout", lifecycle == "shutdown_error":
		reason = "agent is shutting down"
	}
	return wire.AgentHealth{Healthy: reason == "", Reason: reason}
}

func lifecycle(st store.State) string { return cmp.Or(st.Lifecycle, stateCreated) }

// viewAgent is what is known of an agent, as GET {id} answers it. Its latencies, which an agent can
// spoil, are not in it: one shall not hide the others of a list.
func (s *Server) viewAgent(ctx context.Context, a store.Agent) (wire.Agent, error) {
	st, err := s.store.State(ctx, a.ID)
	if err != nil {
		return wire.Agent{}, err
	}
	st = s.links.seen(a.ID, st)
	workspace, err := s.workspaceOf(ctx, a)
	if err != nil {
		return wire.Agent{}, err
	}
	sources, err := s.logSources(ctx, a)
	if err != nil {
		return wire.Agent{}, err
	}
	length, err := s.store.LogsLength(ctx, a.ID)
	if err != nil {
		return wire.Agent{}, err
	}
	status := status(a, st, time.Now())
	view := wire.Agent{
		ID: a.ID, ParentID: uuid.NullUUID{UUID: a.ParentID, Valid: a.IsSubAgent()}, ResourceID: a.WorkspaceID(), CreatedAt: a.CreatedAt, UpdatedAt: a.UpdatedAt,
		FirstConnectedAt: st.FirstConnectedAt, LastConnectedAt: st.LastConnectedAt, DisconnectedAt: st.DisconnectedAt,
		StartedAt: st.StartedAt, ReadyAt: st.ReadyAt,
		Status: status, LifecycleState: lifecycle(st), Health: health(status, lifecycle(st)),
		Name: a.Name, Architecture: cmp.Or(a.Arch, "amd64"), OperatingSystem: cmp.Or(a.OS, "linux"),
		EnvironmentVariables: a.Environment,
		LogsLength:           int32(min(length, math.MaxInt32)), LogsOverflowed: st.LogsOverflowed,
		Directory: a.Directory, ExpandedDirectory: st.ExpandedDirectory,
		Version: st.Version, APIVersion: st.APIVersion,
		ConnectionTimeoutSeconds: int32(connectTimeout / time.Second),
		Apps:                     []wire.App{},
		Subsystems:               append([]string{}, st.Subsystems...),
		DisplayApps:              displayApps(a),
		LogSources: slices.SortedFunc(maps.Values(sources), func(x, y wire.LogSource) int {
			return cmp.Or(x.CreatedAt.Compare(y.CreatedAt), strings.Compare(x.ID.String(), y.ID.String()))
		}),
		Scripts:               []wire.Script{},
		StartupScriptBehavior: "non-blocking",
	}
	if view.LogSources == nil {
		view.LogSources = []wire.LogSource{}
	}
	if a.Instance != nil {
		view.InstanceID = a.Instance.ID
	}
	for _, app := range a.Apps {
		statuses, err := s.store.NewestStatuses(ctx, a.ID, app.ID)
		if err != nil {
			return wire.Agent{}, err
		}
		view.Apps = append(view.Apps, wire.App{
			ID: app.ID, URL: app.URL, External: app.External, Slug: app.Slug, DisplayName: app.DisplayName,
			Command: app.Command, Icon: app.Icon, Subdomain: app.Subdomain, SharingLevel: string(sharedWith(app, workspace)), Group: app.Group,
			Healthcheck: wire.Healthcheck{URL: app.HealthURL, Interval: int32(app.HealthInterval / time.Second), Threshold: app.HealthThreshold},
			Health:      appHealth(app, st), Hidden: app.Hidden, OpenIn: cmp.Or(app.OpenIn, openInSlimWindow), Statuses: statuses,
		})
	}
	for _, script := range a.Scripts {
		v := wire.Script{
			ID: script.ID, LogSourceID: script.LogSourceID, LogPath: script.LogPath, Script: script.Script, Cron: script.Cron,
			RunOnStart: script.RunOnStart, RunOnStop: script.RunOnStop, StartBlocksLogin: script.StartBlocksLogin,
			Timeout: script.Timeout, DisplayName: script.DisplayName,
		}
		if script.RunOnStart && script.StartBlocksLogin {
			view.StartupScriptBehavior = "blocking"
		}
		if last, ok := st.Scripts[script.ID]; ok {
			v.ExitCode, v.Status = &last.ExitCode, last.Status
		}
		view.Scripts = append(view.Scripts, v)
	}
	return view, nil
}

// workspaceOf is the agent that the workspace of another is named after, and whose limits hold in it: the
// agent itself, or the parent of a sub-agent.
func (s *Server) workspaceOf(ctx context.Context, a store.Agent) (store.Agent, error) {
	if !a.IsSubAgent() {
		return a, nil
	}
	parent, err := s.store.Agent(ctx, a.ParentID)
	if err != nil {
		return store.Agent{}, fmt.Errorf("cannot read the parent of a sub-agent: %w", err)
	}
	return parent, nil
}

// sharedWith says who may open an app. What is allowed now counts, not what was when the app was made.
func sharedWith(app store.App, workspace store.Agent) store.Share {
	return cmp.Or(app.Share, store.ShareOwner).Within(workspace.MaxShare)
}

// Where apps open, by the names that clients know.
const (
	openInSlimWindow = "slim-window"
	openInTab        = "tab"
)

// displayApps are the built-in apps that are shown for an agent.
func displayApps(a store.Agent) []string {
	if a.IsSubAgent() {
		return append([]string{}, a.DisplayApps...)
	}
	return []string{"web_terminal", "ssh_helper", "port_forwarding_helper"}
}

// Health of apps by the names that clients know.
const (
	appDisabled     = "disabled"
	appInitializing = "initializing"
	appHealthy      = "healthy"
	appUnhealthy    = "unhealthy"
)

// appHealth is what the agent last said of an app, if anybody asked it to look.
func appHealth(app store.App, st store.State) string {
	if app.HealthURL == "" {
		return appDisabled
	}
	return cmp.Or(st.AppHealth[app.ID], appInitializing)
}

// latency names the regions a node measured.
func (s *Server) latency(node *tailnetpb.Node) (map[string]wire.Latency, error) {
	latencies := make(map[string]wire.Latency, len(node.GetDerpLatency()))
	for key, seconds := range node.GetDerpLatency() {
		number, _, _ := strings.Cut(key, "-")
		id, err := strconv.ParseInt(number, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("cannot read the relay latencies of the agent: key %q does not begin with a region", key)
		}
		name := fmt.Sprintf("Unnamed %d", id)
		if region := s.relayMap.Regions[id]; region != nil {
			name = region.RegionName
		}
		ms := seconds * 1000
		if math.IsNaN(ms) || math.IsInf(ms, 0) {
			continue // JSON has no word for it
		}
		if known, ok := latencies[name]; ok && known.Milliseconds <= ms {
			continue // over IPv4 and IPv6: the faster one counts
		}
		latencies[name] = wire.Latency{Preferred: node.GetPreferredDerp() == int32(id), Milliseconds: ms}
	}
	return latencies, nil
}

// ownerID is the user that all workspaces belong to.
func (s *Server) ownerID() uuid.UUID { return uuid.NewSHA1(s.id, []byte("user:"+owner)) }
