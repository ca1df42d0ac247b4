package control

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
	"github.com/berthd/berth/wire/rpc"
	"github.com/berthd/berth/wire/tailnetpb"
)

const testConfig = `
agents:
  - name: demo
    directory: ~/src
    environment: {EDITOR: vim}
    motd: /etc/motd
    instance: {provider: aws, id: %s}
    apps:
      - slug: web
        display_name: Web
        url: http://localhost:8080
        healthcheck: {url: "http://localhost:8080/healthz", interval: 5s, threshold: 3}
      - slug: code
        url: http://localhost:9090
    scripts:
      - display_name: Start
        script: echo hello
        run_on_start: true
        timeout: 10m
        blocks_login: true
    metadata:
      - {key: load, display_name: Load, script: cat /proc/loadavg, interval: 10s, timeout: 2s}
`

// configured starts a server with the agent of testConfig.
func configured(t *testing.T, config Config) *site {
	t.Helper()
	config.ConfigFile = filepath.Join(t.TempDir(), "berth.yaml")
	writeConfig(t, config.ConfigFile, fmt.Sprintf(testConfig, "i-0123456789abcdef0"))
	return serve(t, config)
}

func writeConfig(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// declared returns the id of an agent and a token for it.
func (x *site) declared(name string) (uuid.UUID, wire.Secret) {
	x.t.Helper()
	a, err := x.store.AgentByName(x.t.Context(), name)
	if err != nil {
		x.t.Fatal(err)
	}
	status, body := x.call("POST", "/api/v2/berth/agents/"+a.ID.String()+"/token", "", x.asUser()...)
	token := between(body, `"token":"`, `"`)
	if status != http.StatusCreated || token == "" {
		x.t.Fatalf("token: %d %s", status, body)
	}
	return a.ID, wire.Secret(token)
}

func between(s, begin, end string) string {
	_, s, _ = strings.Cut(s, begin)
	s, _, _ = strings.Cut(s, end)
	return s
}

// eventually waits for a condition that other goroutines bring about.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	ticker := time.NewTicker(10 * time.Millisecond)
	defer ticker.Stop()
	for !ok() {
		select {
		case <-ctx.Done():
			t.Fatalf("never: %s", what)
		case <-ticker.C:
		}
	}
}

// TestManifest checks what crashes or misleads stock agents when it is wrong.
func TestManifest(t *testing.T) {
	x := configured(t, Config{})
	id, token := x.declared("demo")
	m, err := x.connect(token).agent.GetManifest(t.Context(), &agentpb.GetManifestRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := uuid.FromBytes(m.GetAgentId()); err != nil || got != id {
		t.Errorf("agent id %v, %v", got, err)
	}
	if _, err := uuid.FromBytes(m.GetWorkspaceId()); err != nil {
		t.Errorf("workspace id: %v", err)
	}
	if m.GetDerpMap().GetHomeParams() == nil || m.GetDerpMap().GetRegions()[999].GetNodes()[0].GetStunPort() != -1 {
		t.Errorf("relay map %v", m.GetDerpMap())
	}
	for _, app := range m.GetApps() {
		if len(app.GetId()) != 16 || app.GetHealthcheck() == nil || app.GetHealth() == 0 || app.GetSharingLevel() == 0 {
			t.Errorf("app %v", app)
		}
	}
	if h := m.GetApps()[0].GetHealth(); h != agentpb.WorkspaceApp_INITIALIZING {
		t.Errorf("health of an app with a check: %v", h)
	}
	if h := m.GetApps()[1].GetHealth(); h != agentpb.WorkspaceApp_DISABLED {
		t.Errorf("health of an app without a check: %v", h)
	}
	script := m.GetScripts()[0]
	if len(script.GetId()) != 16 || len(script.GetLogSourceId()) != 16 || script.GetTimeout().AsDuration() != 10*time.Minute {
		t.Errorf("script %v", script)
	}
	d := m.GetMetadata()[0]
	if d.GetInterval().AsDuration() != 10*time.Nanosecond || d.GetTimeout().AsDuration() != 2*time.Nanosecond {
		t.Errorf("metadata %v: seconds stand where nanoseconds belong", d)
	}
}

// TestTransports opens the link in every way that an agent does.
func TestTransports(t *testing.T) {
	x := serve(t, Config{})
	_, token := x.create("demo")
	for name, open := range map[string]func() *agentLink{
		"cookie of 2025": func() *agentLink {
			return x.link("/api/v2/workspaceagents/me/rpc?version=2.6", http.Header{"Cookie": {"coder_session_token=" + token.Reveal()}})
		},
		"cookie and another header": func() *agentLink {
			return x.link("/api/v2/workspaceagents/me/rpc?version=2.6", http.Header{"Cookie": {"a=b; coder_session_token=" + token.Reveal()}, wire.HeaderSessionToken: {"nonsense"}})
		},
		"query": func() *agentLink {
			return x.link("/api/v2/workspaceagents/me/rpc?version=2.9&coder_session_token="+token.Reveal(), nil)
		},
		"old query": func() *agentLink {
			return x.link("/api/v2/workspaceagents/me/rpc?version=2.1&access_token="+token.Reveal(), nil)
		},
		"header of 2026": func() *agentLink { return x.connect(token) },
		"oldest, no version": func() *agentLink {
			return x.link("/api/v2/workspaceagents/me/rpc", http.Header{"Authorization": {"Bearer " + strings.ToUpper(token.Reveal())}})
		},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := open().agent.GetManifest(t.Context(), &agentpb.GetManifestRequest{}); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestUnimplemented(t *testing.T) {
	x := serve(t, Config{})
	id, token := x.create("demo")
	agent := x.connect(token)
	client := x.link("/api/v2/workspaceagents/"+id.String()+"/coordinate?version=2.0", http.Header{wire.HeaderSessionToken: {x.key.Reveal()}})
	for name, call := range map[string]func() error{
		"agent: resume token": func() error {
			_, err := agent.tailnet.RefreshResumeToken(t.Context(), &tailnetpb.RefreshResumeTokenRequest{})
			return err
		},
		"agent: workspace updates": func() error {
			stream, err := agent.tailnet.WorkspaceUpdates(t.Context(), &tailnetpb.WorkspaceUpdatesRequest{})
			if err != nil {
				return err
			}
			_, err = stream.Recv()
			return err
		},
		"client: manifest": func() error {
			_, err := client.agent.GetManifest(t.Context(), &agentpb.GetManifestRequest{})
			return err
		},
	} {
		if err := call(); rpc.Code(err) != wire.CodeUnimplemented {
			t.Errorf("%s: %v, want code 12", name, err)
		}
	}
	if _, err := client.tailnet.PostTelemetry(t.Context(), &tailnetpb.TelemetryRequest{}); err != nil {
		t.Errorf("telemetry: %v", err)
	}
}

// TestReports sends each report once and reads what became of it.
func TestReports(t *testing.T) {
	x := configured(t, Config{})
	id, token := x.declared("demo")
	l := x.connect(token)
	ctx := t.Context()
	ok := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	m, err := l.agent.GetManifest(ctx, &agentpb.GetManifestRequest{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = l.agent.UpdateStartup(ctx, &agentpb.UpdateStartupRequest{Startup: &agentpb.Startup{
		Version: "v1.2.3-rc.1+abc", ExpandedDirectory: "/home/me/src",
		Subsystems: []agentpb.Startup_Subsystem{agentpb.Startup_EXECTRACE, agentpb.Startup_ENVBOX, agentpb.Startup_ENVBOX},
	}})
	ok("startup", err)
	begin := time.Now().Add(-time.Minute).UTC().Truncate(time.Second)
	_, err = l.agent.UpdateLifecycle(ctx, &agentpb.UpdateLifecycleRequest{Lifecycle: &agentpb.Lifecycle{State: agentpb.Lifecycle_STARTING, ChangedAt: timestamppb.New(begin)}})
	ok("starting", err)
	_, err = l.agent.UpdateLifecycle(ctx, &agentpb.UpdateLifecycleRequest{Lifecycle: &agentpb.Lifecycle{State: agentpb.Lifecycle_READY, ChangedAt: timestamppb.New(begin.Add(time.Second))}})
	ok("ready", err)
	stats, err := l.agent.UpdateStats(ctx, &agentpb.UpdateStatsRequest{Stats: &agentpb.Stats{ConnectionCount: 1}})
	ok("stats", err)
	if got := stats.GetReportInterval().AsDuration(); got != wire.StatsInterval {
		t.Errorf("report interval %v", got)
	}
	if st, err := x.store.State(ctx, id); err != nil || st.LastUsedAt == nil {
		t.Errorf("traffic is no use: %v, %v", st.LastUsedAt, err)
	}
	_, err = l.agent.BatchUpdateAppHealths(ctx, &agentpb.BatchUpdateAppHealthRequest{Updates: []*agentpb.BatchUpdateAppHealthRequest_HealthUpdate{
		{Id: m.GetApps()[0].GetId(), Health: agentpb.AppHealth_HEALTHY}}})
	ok("app health", err)
	_, err = l.agent.ScriptCompleted(ctx, &agentpb.WorkspaceAgentScriptCompletedRequest{Timing: &agentpb.Timing{
		ScriptId: m.GetScripts()[0].GetId(), Start: timestamppb.New(begin), End: timestamppb.New(begin.Add(time.Second)),
		ExitCode: 3, Status: agentpb.Timing_EXIT_FAILURE}})
	ok("script", err)
	_, err = l.agent.UpdateAppStatus(ctx, &agentpb.UpdateAppStatusRequest{Slug: "web", State: agentpb.UpdateAppStatusRequest_WORKING,
		Message: `<b>Bu\x69lding</b>  <<i>script>x\x1b]0;title\x07`, Uri: "javascript:alert(1)"})
	ok("app status", err)
	_, err = l.agent.BatchUpdateMetadata(ctx, &agentpb.BatchUpdateMetadataRequest{Metadata: []*agentpb.Metadata{
		{Key: "load", Result: &agentpb.WorkspaceAgentMetadata_Result{Value: " 0.1 \n" + strings.Repeat("é", 2000)}},
		{Key: "unknown", Result: &agentpb.WorkspaceAgentMetadata_Result{Value: "x"}}}})
	ok("metadata", err)
	_, err = l.agent.ReportConnection(ctx, &agentpb.ReportConnectionRequest{Connection: &agentpb.Connection{
		Id: m.GetAgentId(), Action: agentpb.Connection_CONNECT, Type: agentpb.Connection_SSH, Timestamp: timestamppb.Now(), Ip: "localhost"}})
	ok("connection", err)
	_, err = l.agent.ReportConnection(ctx, &agentpb.ReportConnectionRequest{Connection: &agentpb.Connection{
		Id: m.GetAgentId(), Action: agentpb.Connection_DISCONNECT, Type: agentpb.Connection_SSH, Timestamp: timestamppb.Now(), Ip: "localhost"}})
	ok("its end", err)

	var view wire.Agent
	x.get("/api/v2/workspaceagents/"+id.String(), &view)
	type seen struct {
		Status                        wire.AgentStatus
		Health                        wire.AgentHealth
		Lifecycle, Version, API, Dir  string
		Subsystems                    []string
		Started, Ready                time.Time
		AppHealth                     []string
		StatusText, StatusURI         string
		ScriptExit                    int32
		ScriptStatus, StartupBehavior string
	}
	want := seen{
		Status: wire.AgentConnected, Health: wire.AgentHealth{Healthy: true}, Lifecycle: "ready",
		Version: "v1.2.3-rc.1+abc", API: "2.10", Dir: "/home/me/src", Subsystems: []string{"envbox", "exectrace"},
		Started: begin, Ready: begin.Add(time.Second), AppHealth: []string{"healthy", "disabled"},
		StatusText: "Building x", ScriptExit: 3, ScriptStatus: "exit_failure", StartupBehavior: "blocking",
	}
	got := seen{
		Status: view.Status, Health: view.Health, Lifecycle: view.LifecycleState, Version: view.Version, API: view.APIVersion,
		Dir: view.ExpandedDirectory, Subsystems: view.Subsystems, AppHealth: []string{view.Apps[0].Health, view.Apps[1].Health},
		ScriptStatus: view.Scripts[0].Status, StartupBehavior: view.StartupScriptBehavior,
	}
	if view.StartedAt != nil && view.ReadyAt != nil && view.Scripts[0].ExitCode != nil && len(view.Apps[0].Statuses) == 1 {
		got.Started, got.Ready, got.ScriptExit = *view.StartedAt, *view.ReadyAt, *view.Scripts[0].ExitCode
		got.StatusText, got.StatusURI = view.Apps[0].Statuses[0].Message, view.Apps[0].Statuses[0].URI
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	values, err := x.store.Metadata(ctx, id)
	if err != nil || len(values) != 1 || len(values["load"].Value) > wire.MaxMetadataValue || values["load"].Error != "value of 4005 bytes exceeded 2048 bytes" {
		t.Errorf("metadata: %d values, %q, %v", len(values), values["load"].Error, err)
	}
	// Everything at once, as `berth status` asks for it.
	var report wire.StatusReport
	x.get(wire.PathBerth+"agents/"+id.String()+"/status", &report)
	if diff := cmp.Diff(view.Apps, report.Apps); diff != "" {
		t.Errorf("apps (-agent +status):\n%s", diff)
	}
	if len(report.Sessions) != 1 || report.Sessions[0].IP != "127.0.0.1" || report.Sessions[0].Type != "ssh" || report.Sessions[0].BeganAt == nil || report.Sessions[0].EndedAt == nil {
		t.Errorf("sessions %+v", report.Sessions)
	}
	if report.Traffic == nil || report.Traffic.Connections != 1 || len(report.Metadata) != 1 || report.Metadata[0].Result.Value == "" {
		t.Errorf("traffic %+v, metadata %+v", report.Traffic, report.Metadata)
	}
	var statuses []wire.AppStatus
	x.get(wire.PathBerth+"agents/"+id.String()+"/app-statuses?app=web", &statuses)
	if diff := cmp.Diff(view.Apps[0].Statuses, statuses); diff != "" {
		t.Errorf("history (-agent +statuses):\n%s", diff)
	}
	if status, body := x.call("GET", wire.PathBerth+"agents/"+id.String()+"/app-statuses?app=gone", "", x.asUser()...); status != 404 || !strings.Contains(body, "has no app") {
		t.Errorf("of an unknown app: %d %s", status, body)
	}
}

// TestBadReports sends what no agent should: each is refused and the link lives on.
func TestBadReports(t *testing.T) {
	x := configured(t, Config{})
	_, token := x.declared("demo")
	l := x.connect(token)
	ctx := t.Context()
	now := timestamppb.Now()
	m, err := l.agent.GetManifest(ctx, &agentpb.GetManifestRequest{})
	if err != nil {
		t.Fatal(err)
	}
	startup := func(s *agentpb.Startup) func() error {
		return func() error {
			_, err := l.agent.UpdateStartup(ctx, &agentpb.UpdateStartupRequest{Startup: s})
			return err
		}
	}
	lifecycle := func(s *agentpb.Lifecycle) func() error {
		return func() error {
			_, err := l.agent.UpdateLifecycle(ctx, &agentpb.UpdateLifecycleRequest{Lifecycle: s})
			return err
		}
	}
	health := func(id []byte, h agentpb.AppHealth) func() error {
		return func() error {
			_, err := l.agent.BatchUpdateAppHealths(ctx, &agentpb.BatchUpdateAppHealthRequest{
				Updates: []*agentpb.BatchUpdateAppHealthRequest_HealthUpdate{{Id: id, Health: h}}})
			return err
		}
	}
	script := func(timing *agentpb.Timing) func() error {
		return func() error {
			_, err := l.agent.ScriptCompleted(ctx, &agentpb.WorkspaceAgentScriptCompletedRequest{Timing: timing})
			return err
		}
	}
	connection := func(c *agentpb.Connection) func() error {
		return func() error {
			_, err := l.agent.ReportConnection(ctx, &agentpb.ReportConnectionRequest{Connection: c})
			return err
		}
	}
	logs := func(r *agentpb.BatchCreateLogsRequest) func() error {
		return func() error {
			r.Logs = []*agentpb.Log{{Output: "x"}}
			_, err := l.agent.BatchCreateLogs(ctx, r)
			return err
		}
	}
	metadata := func(m ...*agentpb.Metadata) func() error {
		return func() error {
			_, err := l.agent.BatchUpdateMetadata(ctx, &agentpb.BatchUpdateMetadataRequest{Metadata: m})
			return err
		}
	}
	zero := make([]byte, 16)
	scriptID, appID := m.GetScripts()[0].GetId(), m.GetApps()[0].GetId()
	for name, tt := range map[string]struct {
		call func() error
		want string
	}{
		"startup: absent":       {startup(nil), "missing"},
		"startup: no v":         {startup(&agentpb.Startup{Version: "1.2.3"}), `invalid agent semver version "1.2.3"`},
		"startup: subsystem":    {startup(&agentpb.Startup{Version: "v1.0.0", Subsystems: []agentpb.Startup_Subsystem{0}}), "subsystem"},
		"lifecycle: absent":     {lifecycle(nil), "missing"},
		"lifecycle: zero":       {lifecycle(&agentpb.Lifecycle{}), "unknown lifecycle state"},
		"lifecycle: unknown":    {lifecycle(&agentpb.Lifecycle{State: 77}), "unknown lifecycle state"},
		"health: id":            {health([]byte{1}, agentpb.AppHealth_HEALTHY), "cannot read app id"},
		"health: foreign":       {health(zero, agentpb.AppHealth_HEALTHY), "not found"},
		"health: zero":          {health(appID, 0), "unknown health"},
		"health: no check":      {health(m.GetApps()[1].GetId(), agentpb.AppHealth_HEALTHY), "does not have healthchecks"},
		"script: absent":        {script(nil), "missing"},
		"script: id":            {script(&agentpb.Timing{ScriptId: []byte("x"), Start: now, End: now}), "cannot read script id"},
		"script: no end":        {script(&agentpb.Timing{ScriptId: scriptID, Start: now}), "end time is required"},
		"script: backwards":     {script(&agentpb.Timing{ScriptId: scriptID, Start: now, End: timestamppb.New(time.Unix(1, 0))}), "before"},
		"script: stage":         {script(&agentpb.Timing{ScriptId: scriptID, Start: now, End: now, Stage: 9}), "unknown stage"},
		"script: foreign":       {script(&agentpb.Timing{ScriptId: zero, Start: now, End: now}), "not one of this agent"},
		"connection: absent":    {connection(nil), "missing"},
		"connection: nil id":    {connection(&agentpb.Connection{Id: zero, Action: 1, Type: 1}), "nil"},
		"connection: action":    {connection(&agentpb.Connection{Id: appID, Type: 1}), "action"},
		"connection: type":      {connection(&agentpb.Connection{Id: appID, Action: 1}), "type"},
		"logs: source":          {logs(&agentpb.BatchCreateLogsRequest{LogSourceId: []byte{1, 2}}), "cannot read log source id"},
		"logs: spool":           {logs(&agentpb.BatchCreateLogsRequest{LogSourceId: zero, BerthSpoolId: []byte{1}}), "cannot read spool id"},
		"logs: sequence":        {logs(&agentpb.BatchCreateLogsRequest{LogSourceId: zero, BerthSpoolId: appID}), "sequence from 1"},
		"logs: sequence is far": {logs(&agentpb.BatchCreateLogsRequest{LogSourceId: zero, BerthSpoolId: appID, BerthFirstSequence: 1 << 63}), "sequence from 1"},
		"metadata: no result":   {metadata(&agentpb.Metadata{Key: "load"}), "no result"},
		"metadata: keys":        {metadata(&agentpb.Metadata{Key: strings.Repeat("k", 7000), Result: &agentpb.WorkspaceAgentMetadata_Result{}}), "exceed"},
	} {
		if err := tt.call(); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
	if _, err := l.agent.GetManifest(ctx, &agentpb.GetManifestRequest{}); err != nil {
		t.Errorf("the link did not survive: %v", err)
	}
}

func TestRevokedTokenEndsTheLink(t *testing.T) {
	x := serve(t, Config{})
	id, token := x.create("demo")
	other, otherToken := x.create("other")
	l, bystander := x.connect(token), x.connect(otherToken)
	if _, err := l.agent.GetManifest(t.Context(), &agentpb.GetManifestRequest{}); err != nil {
		t.Fatal(err)
	}
	// The watch begins in the background; a token revoked before it is found at the next probe.
	if status, body := x.call("POST", "/api/v2/berth/agents/"+id.String()+"/revoke", "", x.asUser()...); status != http.StatusNoContent {
		t.Fatalf("revoke: %d %s", status, body)
	}
	select {
	case <-l.Closed():
	case <-time.After(wire.PingInterval + 5*time.Second):
		t.Fatal("the link is still open")
	}
	if status, _ := x.call("GET", "/api/v2/workspaceagents/me/rpc?version=2.10", "", as(token)...); status != http.StatusUnauthorized {
		t.Errorf("revoked token: %d", status)
	}
	if _, err := bystander.agent.GetManifest(t.Context(), &agentpb.GetManifestRequest{}); err != nil {
		t.Errorf("another agent %s: %v", other, err)
	}
	eventually(t, "the agent is disconnected", func() bool {
		var view wire.Agent
		x.get("/api/v2/workspaceagents/"+id.String(), &view)
		return view.Status == wire.AgentDisconnected
	})
}

func TestOlderLinkDoesNotEndTheNewer(t *testing.T) {
	x := serve(t, Config{})
	id, token := x.create("demo")
	old := x.connect(token)
	if _, err := old.agent.GetManifest(t.Context(), &agentpb.GetManifestRequest{}); err != nil {
		t.Fatal(err)
	}
	fresh := x.connect(token)
	if _, err := fresh.agent.GetManifest(t.Context(), &agentpb.GetManifestRequest{}); err != nil {
		t.Fatal(err)
	}
	old.Close()
	eventually(t, "the server saw the older link end", func() bool { return strings.Contains(x.log.String(), "agent disconnected") })
	var view wire.Agent
	x.get("/api/v2/workspaceagents/"+id.String(), &view)
	if view.Status != wire.AgentConnected {
		t.Errorf("the agent is %s", view.Status)
	}
}

// An agent whose link answers is connected, also while that cannot be written down.
func TestConnectedWithoutWriting(t *testing.T) {
	x := serve(t, Config{})
	id, token := x.create("demo")
	link := x.connect(token)
	eventually(t, "the link answers", func() bool {
		st := store.State{LastConnectedAt: new(time.Time)}
		return x.links.seen(id, st).LastConnectedAt.After(time.Now().Add(-inactive))
	})
	err := x.store.UpdateState(t.Context(), id, func(st *store.State) error {
		old := time.Now().Add(-time.Hour)
		st.LastConnectedAt, st.Link = &old, uuid.New()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	var agent wire.Agent
	x.get("/api/v2/workspaceagents/"+id.String(), &agent)
	var agents []wire.AgentSummary
	x.get("/api/v2/berth/agents", &agents)
	if agent.Status != wire.AgentConnected || len(agents) != 1 || agents[0].Status != wire.AgentConnected {
		t.Errorf("status %q, in the list %v", agent.Status, agents)
	}
	link.Close()
	eventually(t, "it counts as gone", func() bool {
		x.get("/api/v2/workspaceagents/"+id.String(), &agent)
		return agent.Status == wire.AgentDisconnected
	})
}

// A link that is not the agent's own leaves no trace in its state.
func TestUnmonitoredRole(t *testing.T) {
	x := serve(t, Config{})
	id, token := x.create("demo")
	l := x.link("/api/v2/workspaceagents/me/rpc?version=2.10&role=logstream", http.Header{wire.HeaderSessionToken: {token.Reveal()}})
	if _, err := l.agent.GetManifest(t.Context(), &agentpb.GetManifestRequest{}); err != nil {
		t.Fatal(err)
	}
	var view wire.Agent
	x.get("/api/v2/workspaceagents/"+id.String(), &view)
	if view.FirstConnectedAt != nil || view.Status != wire.AgentConnecting {
		t.Errorf("status %s, connected at %v", view.Status, view.FirstConnectedAt)
	}
}

// TestShutdownSaysSo: agents and clients are told to come back.
func TestShutdownSaysSo(t *testing.T) {
	x := serve(t, Config{})
	id, token := x.create("demo")
	conn, _, err := websocket.Dial(t.Context(), x.url+"/api/v2/workspaceagents/me/rpc?version=2.10",
		&websocket.DialOptions{HTTPClient: x.http, HTTPHeader: http.Header{wire.HeaderSessionToken: {token.Reveal()}}})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.CloseNow()
	follow, _, err := websocket.Dial(t.Context(), x.url+"/api/v2/workspaceagents/"+id.String()+"/logs?follow",
		&websocket.DialOptions{HTTPClient: x.http, HTTPHeader: http.Header{wire.HeaderSessionToken: {x.key.Reveal()}}})
	if err != nil {
		t.Fatal(err)
	}
	defer follow.CloseNow()
	go x.stop()
	for name, c := range map[string]*websocket.Conn{"link": conn, "follow": follow} {
		for err == nil {
			_, _, err = c.Read(t.Context())
		}
		if code := websocket.CloseStatus(err); code != websocket.StatusGoingAway {
			t.Errorf("%s: closed with %d: %v", name, code, err)
		}
		err = nil
	}
	x.stop()
}

func TestResumeTokens(t *testing.T) {
	x := serve(t, Config{})
	id, _ := x.create("demo")
	other, _ := x.create("other")
	header := http.Header{wire.HeaderSessionToken: {x.key.Reveal()}}
	path := "/api/v2/workspaceagents/" + id.String() + "/coordinate?version=2.0"
	l := x.link(path, header)
	fresh, err := l.tailnet.RefreshResumeToken(t.Context(), &tailnetpb.RefreshResumeTokenRequest{})
	if err != nil {
		t.Fatal(err)
	}
	peer, err := x.resume(fresh.GetToken(), id)
	if err != nil {
		t.Fatal(err)
	}
	again, err := x.link(path+"&resume_token="+fresh.GetToken(), header).tailnet.RefreshResumeToken(t.Context(), &tailnetpb.RefreshResumeTokenRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := x.resume(again.GetToken(), id); err != nil || got != peer {
		t.Errorf("came back as %v, want %v (%v)", got, peer, err)
	}
	if fresh.GetRefreshIn().AsDuration() <= 0 || !fresh.GetExpiresAt().AsTime().After(time.Now()) {
		t.Errorf("refresh in %v, expires %v", fresh.GetRefreshIn(), fresh.GetExpiresAt())
	}
	token := fresh.GetToken()
	flipped := token[:len(token)-2] + string(rune(token[len(token)-2])^1) + token[len(token)-1:]
	for name, bad := range map[string]string{
		"tampered": flipped, "cut": token[:len(token)/2], "long": strings.Repeat("x", 5000), "no parts": "x",
		"other algorithm": jwtEncode([]byte(`{"alg":"none","kid":"1"}`)) + "." + strings.SplitN(token, ".", 2)[1],
	} {
		if _, err := x.resume(bad, id); err == nil {
			t.Errorf("%s token is good", name)
		}
	}
	if _, err := x.resume(token, other); err == nil {
		t.Error("a token is good for another agent")
	}
	if got, err := x.resume(jwtEncode([]byte(`{"alg":"ES256"}`))+".e30.x", id); err != nil || got == peer {
		t.Errorf("a token without key id: %v, %v", got, err)
	}
}

func FuzzResume(f *testing.F) {
	s := &Server{resumeKey: []byte("fuzz")}
	agent := uuid.New()
	good, err := s.resumeToken(uuid.New(), agent)
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range []string{good.GetToken(), "", "a.b.c", "..", jwtEncode([]byte(`{"kid":"1","alg":"HS256"}`)) + ".e30."} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, token string) {
		peer, err := s.resume(token, agent)
		if err == nil && peer == uuid.Nil {
			t.Error("a token made nobody")
		}
	})
}

func TestReinitOfAnOldAgent(t *testing.T) {
	x := serve(t, Config{})
	_, token := x.create("demo")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", x.url+"/api/v2/workspaceagents/me/reinit", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Cookie", "coder_session_token="+token.Reveal())
	resp, err := x.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != "text/event-stream" {
		t.Errorf("%d %v", resp.StatusCode, resp.Header)
	}
	// It ends when the server does, and holds no event.
	go x.stop()
	text, err := io.ReadAll(bufio.NewReader(resp.Body))
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) || strings.Contains(string(text), "data") {
		t.Errorf("%q, %v", text, err)
	}
	x.stop()
}

func TestStreamDERPMaps(t *testing.T) {
	x := serve(t, Config{STUNAddr: "127.0.0.1:0"})
	_, token := x.create("demo")
	stream, err := x.connect(token).tailnet.StreamDERPMaps(t.Context(), &tailnetpb.StreamDERPMapsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	m, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	node := m.GetRegions()[999].GetNodes()[0]
	if m.GetHomeParams() == nil || !m.GetRegions()[999].GetEmbeddedRelay() || node.GetStunPort() <= 0 || !node.GetForceHttp() {
		t.Errorf("map %v", m)
	}
	ws, _, err := websocket.Dial(t.Context(), x.url+"/api/v2/derp-map", &websocket.DialOptions{HTTPClient: x.http})
	if err != nil {
		t.Fatal(err)
	}
	defer ws.CloseNow()
	kind, text, err := ws.Read(t.Context())
	if err != nil || kind != websocket.MessageBinary || !strings.Contains(string(text), `"HostName":"127.0.0.1"`) {
		t.Errorf("%v %s %v", kind, text, err)
	}
}

// TestNotesOfAnAgent: what berthd says of itself is kept, in bounds, and shown.
func TestNotesOfAnAgent(t *testing.T) {
	long := strings.Repeat("x", 2*maxText)
	if got := shortNotes(append([]string{"a\x1b[m\nb", long}, make([]string, 20)...)); len(got) != maxNotes || got[0] != "a [m b" || len(got[1]) != maxText {
		t.Errorf("%.40q", got)
	}
	if got := shortNotes(nil); got != nil {
		t.Errorf("%q", got)
	}
}
