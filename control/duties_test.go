package control

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

const dutiesConfig = `
banners:
  - {message: Closed on Friday, color: "#b45309"}
  - {message: Be kind}
agents:
  - name: demo
    vscode_port_proxy: https://{{port}}--demo.example.com
    resources: {memory: true, volumes: [/, /home]}
    devcontainers:
      - {name: api, workspace_folder: /src/api, config_path: /src/api/.devcontainer.json}
    secrets:
      - {env: TOKEN, value: planted-secret-1}
      - {file: ~/.key, value_file: %q}
`

// dutiful starts a server with the agent of dutiesConfig, and its link.
func dutiful(t *testing.T) (*site, uuid.UUID, *agentLink) {
	t.Helper()
	dir := t.TempDir()
	secret := filepath.Join(dir, "secret")
	writeConfig(t, secret, "planted-secret-2\n")
	config := filepath.Join(dir, "berth.yaml")
	writeConfig(t, config, fmt.Sprintf(dutiesConfig, secret))
	x := serve(t, Config{ConfigFile: config})
	id, token := x.declared("demo")
	return x, id, x.connect(token)
}

// TestDuties reads what an agent is told beside what TestManifest reads.
func TestDuties(t *testing.T) {
	x, id, l := dutiful(t)
	m, err := l.agent.GetManifest(t.Context(), &agentpb.GetManifestRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if got := m.GetVsCodePortProxyUri(); got != "https://{{port}}--demo.example.com" {
		t.Errorf("port proxy %q", got)
	}
	wantSecrets := []*agentpb.WorkspaceSecret{
		{EnvName: "TOKEN", Value: []byte("planted-secret-1")}, {FilePath: "~/.key", Value: []byte("planted-secret-2")},
	}
	if diff := cmp.Diff(wantSecrets, m.GetSecrets(), protocmp.Transform()); diff != "" {
		t.Errorf("secrets (-want +got):\n%s", diff)
	}
	dev := m.GetDevcontainers()[0]
	wantDev := &agentpb.WorkspaceAgentDevcontainer{Id: dev.GetId(), Name: "api", WorkspaceFolder: "/src/api", ConfigPath: "/src/api/.devcontainer.json"}
	if diff := cmp.Diff(wantDev, dev, protocmp.Transform()); diff != "" || len(dev.GetId()) != 16 {
		t.Errorf("dev container (-want +got):\n%s", diff)
	}
	// Its companion script has its id, and is of this agent.
	if s := m.GetScripts()[0]; string(s.GetId()) != string(dev.GetId()) || len(s.GetLogSourceId()) != 16 || s.GetRunOnStart() || s.GetScript() != "" {
		t.Errorf("companion script %v", s)
	}
	now := timestamppb.Now()
	if _, err := l.agent.ScriptCompleted(t.Context(), &agentpb.WorkspaceAgentScriptCompletedRequest{Timing: &agentpb.Timing{ScriptId: dev.GetId(), Start: now, End: now}}); err != nil {
		t.Errorf("companion script: %v", err)
	}

	resources, err := l.agent.GetResourcesMonitoringConfiguration(t.Context(), &agentpb.GetResourcesMonitoringConfigurationRequest{})
	want := &agentpb.GetResourcesMonitoringConfigurationResponse{
		Config: &agentpb.GetResourcesMonitoringConfigurationResponse_Config{NumDatapoints: 20, CollectionIntervalSeconds: 10},
		Memory: &agentpb.GetResourcesMonitoringConfigurationResponse_Memory{Enabled: true},
		Volumes: []*agentpb.GetResourcesMonitoringConfigurationResponse_Volume{
			{Enabled: true, Path: "/"}, {Enabled: true, Path: "/home"},
		},
	}
	if diff := cmp.Diff(want, resources, protocmp.Transform()); diff != "" || err != nil {
		t.Errorf("resources (-want +got):\n%s%v", diff, err)
	}

	banners, err := l.agent.GetAnnouncementBanners(t.Context(), &agentpb.GetAnnouncementBannersRequest{})
	wantBanners := &agentpb.GetAnnouncementBannersResponse{AnnouncementBanners: []*agentpb.BannerConfig{
		{Enabled: true, Message: "Closed on Friday", BackgroundColor: "#b45309"}, {Enabled: true, Message: "Be kind"},
	}}
	if diff := cmp.Diff(wantBanners, banners, protocmp.Transform()); diff != "" || err != nil {
		t.Errorf("banners (-want +got):\n%s%v", diff, err)
	}
	service, err := l.agent.GetServiceBanner(t.Context(), &agentpb.GetServiceBannerRequest{})
	if err != nil || !service.GetEnabled() || service.GetMessage() != "Closed on Friday" || service.GetBackgroundColor() != "#b45309" {
		t.Errorf("service banner %v, %v", service, err)
	}

	var view json.RawMessage
	x.get("/api/v2/workspaceagents/"+id.String(), &view)
	agent, err := x.store.Agent(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"view": string(view), "log": x.log.String(), "print": fmt.Sprintf("%v %+v %#v", agent, agent, agent)} {
		if strings.Contains(text, "planted-secret") {
			t.Errorf("the %s shows a secret", name)
		}
	}
}

// An agent of which nothing is declared is told the pace nevertheless, and no banner.
func TestNoDuties(t *testing.T) {
	x := serve(t, Config{})
	_, token := x.create("demo")
	l := x.connect(token)
	resources, err := l.agent.GetResourcesMonitoringConfiguration(t.Context(), &agentpb.GetResourcesMonitoringConfigurationRequest{})
	if err != nil || resources.GetConfig().GetNumDatapoints() != 20 || resources.GetConfig().GetCollectionIntervalSeconds() != 10 ||
		resources.Memory != nil || len(resources.GetVolumes()) != 0 {
		t.Errorf("resources %v, %v", resources, err)
	}
	if _, err := l.agent.PushResourcesMonitoringUsage(t.Context(), &agentpb.PushResourcesMonitoringUsageRequest{
		Datapoints: []*agentpb.PushResourcesMonitoringUsageRequest_Datapoint{{}}}); err != nil {
		t.Error(err)
	}
	banners, err := l.agent.GetAnnouncementBanners(t.Context(), &agentpb.GetAnnouncementBannersRequest{})
	if err != nil || len(banners.GetAnnouncementBanners()) != 0 {
		t.Errorf("banners %v, %v", banners, err)
	}
	service, err := l.agent.GetServiceBanner(t.Context(), &agentpb.GetServiceBannerRequest{})
	if err != nil || service.GetEnabled() {
		t.Errorf("service banner %v, %v", service, err)
	}
}

// A secret whose file cannot be read, or is too long, changes nothing.
func TestSecretFiles(t *testing.T) {
	x, id, _ := dutiful(t)
	dir := t.TempDir()
	long := filepath.Join(dir, "long")
	if err := os.WriteFile(long, make([]byte, maxSecret+1), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{filepath.Join(dir, "none"): "no such file", long: "longer than 64 KiB"} {
		writeConfig(t, x.config.ConfigFile, fmt.Sprintf("agents:\n  - {name: demo, secrets: [{env: A, value_file: %q}]}\n", path))
		if err := x.Reload(t.Context()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	if a, err := x.store.Agent(t.Context(), id); err != nil || len(a.Secrets) != 2 {
		t.Errorf("secrets %d, %v", len(a.Secrets), err)
	}
}

// Of measurements what was asked for is kept, the newest window of it.
func TestUsage(t *testing.T) {
	_, _, l := dutiful(t)
	type (
		datapoint = agentpb.PushResourcesMonitoringUsageRequest_Datapoint
		volume    = agentpb.PushResourcesMonitoringUsageRequest_Datapoint_VolumeUsage
		memory    = agentpb.PushResourcesMonitoringUsageRequest_Datapoint_MemoryUsage
	)
	begin := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	req := &agentpb.PushResourcesMonitoringUsageRequest{}
	for i := range 30 {
		req.Datapoints = append(req.Datapoints, &datapoint{
			CollectedAt: timestamppb.New(begin.Add(time.Duration(i) * 10 * time.Second)),
			Memory:      &memory{Used: int64(i), Total: 100},
			Volumes:     []*volume{{Volume: "/elsewhere", Used: 1}, {Volume: "/home", Used: int64(i), Total: 7}},
		})
	}
	if _, err := l.agent.PushResourcesMonitoringUsage(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	asked := &store.Resources{Memory: true, Volumes: []string{"/", "/home"}}
	kept := measured(req, asked)
	if n := len(kept.GetDatapoints()); n != wire.ResourcesWindow {
		t.Fatalf("%d datapoints", n)
	}
	want := proto.CloneOf(req.Datapoints[10])
	want.Volumes = want.Volumes[1:]
	if diff := cmp.Diff(want, kept.GetDatapoints()[0], protocmp.Transform()); diff != "" {
		t.Errorf("oldest kept (-want +got):\n%s", diff)
	}
	// Neither a time that is none nor a value that cannot be costs the link.
	odd := &datapoint{CollectedAt: &timestamppb.Timestamp{Nanos: -1}, Memory: &memory{Used: -5}}
	if _, err := l.agent.PushResourcesMonitoringUsage(t.Context(), &agentpb.PushResourcesMonitoringUsageRequest{Datapoints: []*datapoint{odd, nil}}); err != nil {
		t.Error(err)
	}
	for _, nothing := range []*agentpb.PushResourcesMonitoringUsageRequest{measured(req, nil), measured(&agentpb.PushResourcesMonitoringUsageRequest{}, asked)} {
		if nothing != nil {
			t.Errorf("kept what nobody asked for, or said: %v", nothing)
		}
	}
}

func instruction(source string, size int) *agentpb.ContextResource {
	return &agentpb.ContextResource{Source: source, Status: agentpb.ContextResource_OK,
		Body: &agentpb.ContextResource_InstructionFile{InstructionFile: &agentpb.InstructionFileBody{Content: make([]byte, size)}}}
}

// TestContext holds snapshots to the limits and to the order of their versions.
func TestContext(t *testing.T) {
	x, id, l := dutiful(t)
	push := func(req *agentpb.PushContextStateRequest) (bool, error) {
		resp, err := l.agent.PushContextState(t.Context(), req)
		return resp.GetAccepted(), err
	}
	for i, tt := range []struct {
		version  uint64
		initial  bool
		accepted bool
	}{
		{5, false, true}, {5, false, false}, {4, false, false}, {6, false, true}, {2, true, true}, {2, false, false}, {3, false, true}, {0, false, false},
	} {
		if ok, err := push(&agentpb.PushContextStateRequest{Version: tt.version, Initial: tt.initial, AggregateHash: []byte{1}, Resources: []*agentpb.ContextResource{
			instruction("AGENTS.md", 3),
			{Source: "cfg", Status: agentpb.ContextResource_INVALID, Body: &agentpb.ContextResource_McpConfig{McpConfig: &agentpb.MCPConfigBody{}}},
		}}); ok != tt.accepted || err != nil {
			t.Errorf("push %d, version %d: %v, %v", i, tt.version, ok, err)
		}
	}
	var kept store.ContextState
	if err := x.store.UpdateContext(t.Context(), id, func(c *store.ContextState) error { kept = *c; return nil }); err != nil {
		t.Fatal(err)
	}
	if kept.Version != 3 || kept.Resources != 2 {
		t.Errorf("kept %+v", kept)
	}

	with := func(change func(*agentpb.ContextResource)) []*agentpb.ContextResource {
		r := instruction("a", 1)
		change(r)
		return []*agentpb.ContextResource{r}
	}
	type resource = agentpb.ContextResource
	var many, large []*resource
	for i := range wire.MaxContextResources + 1 {
		many = append(many, instruction(fmt.Sprint(i), 0))
	}
	for i := range 17 {
		large = append(large, instruction(fmt.Sprint(i), wire.MaxContextBody))
	}
	for name, tt := range map[string]struct {
		req  *agentpb.PushContextStateRequest
		want string // empty: good
	}{
		"as many as may be":   {&agentpb.PushContextStateRequest{Resources: many[1:]}, ""},
		"one too many":        {&agentpb.PushContextStateRequest{Resources: many}, "1001 resources exceed 1000"},
		"as long as may be":   {&agentpb.PushContextStateRequest{Resources: large[1:]}, ""},
		"too long together":   {&agentpb.PushContextStateRequest{Resources: large}, "exceed 4194304 bytes"},
		"a body too long":     {&agentpb.PushContextStateRequest{Resources: []*resource{instruction("a", wire.MaxContextBody+1)}}, "body of 262145 bytes"},
		"no source":           {&agentpb.PushContextStateRequest{Resources: []*resource{instruction("", 1)}}, "source is required"},
		"longest source":      {&agentpb.PushContextStateRequest{Resources: []*resource{instruction(strings.Repeat("s", 1024), 1)}}, ""},
		"long source":         {&agentpb.PushContextStateRequest{Resources: []*resource{instruction(strings.Repeat("s", 1025), 1)}}, "source of 1025 bytes"},
		"source twice":        {&agentpb.PushContextStateRequest{Resources: []*resource{instruction("a", 1), instruction("a", 1)}}, "twice"},
		"longest error":       {&agentpb.PushContextStateRequest{Resources: with(func(r *resource) { r.Error = strings.Repeat("e", 4096) })}, ""},
		"long error":          {&agentpb.PushContextStateRequest{Resources: with(func(r *resource) { r.Error = strings.Repeat("e", 4097) })}, "error of 4097 bytes"},
		"longest hash":        {&agentpb.PushContextStateRequest{Resources: with(func(r *resource) { r.ContentHash = make([]byte, 64) })}, ""},
		"long hash":           {&agentpb.PushContextStateRequest{Resources: with(func(r *resource) { r.ContentHash = make([]byte, 65) })}, "content_hash of 65 bytes"},
		"long aggregate hash": {&agentpb.PushContextStateRequest{AggregateHash: make([]byte, 65)}, "aggregate_hash of 65 bytes"},
		"no status":           {&agentpb.PushContextStateRequest{Resources: with(func(r *resource) { r.Status = 0 })}, "status is required"},
		"no body":             {&agentpb.PushContextStateRequest{Resources: with(func(r *resource) { r.Body = nil })}, "body is required"},
		"empty skill":         {&agentpb.PushContextStateRequest{Resources: with(func(r *resource) { r.Body = &agentpb.ContextResource_Skill{Skill: &agentpb.SkillMetaBody{}} })}, ""},
		"empty server":        {&agentpb.PushContextStateRequest{Resources: with(func(r *resource) { r.Body = &agentpb.ContextResource_McpServer{McpServer: &agentpb.MCPServerBody{}} })}, ""},
		"long server": {&agentpb.PushContextStateRequest{Resources: with(func(r *resource) {
			r.Body = &agentpb.ContextResource_McpServer{McpServer: &agentpb.MCPServerBody{Description: strings.Repeat("d", wire.MaxContextBody)}}
		})}, "body of "},
		"no resource": {&agentpb.PushContextStateRequest{Resources: []*resource{nil}}, "source is required"},
	} {
		if err := checkContext(tt.req); (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
	if _, err := push(&agentpb.PushContextStateRequest{Version: 9, Resources: []*resource{{}}}); err == nil {
		t.Error("a bad snapshot over the link passed")
	}
	if ok, err := push(&agentpb.PushContextStateRequest{Version: 4}); !ok || err != nil {
		t.Errorf("after a bad snapshot: %v, %v", ok, err)
	}
}

// TestBoundaryLogs writes what confined programs asked for, and no credential that was in it.
func TestBoundaryLogs(t *testing.T) {
	x, _, l := dutiful(t)
	session := uuid.NewString()
	request := &agentpb.BoundaryLog_HttpRequest{Method: "GET", MatchedRule: "domain=example.com",
		Url: "https://me:planted-secret@example.com/path?key=planted-secret#planted-secret"}
	logs := []*agentpb.BoundaryLog{
		{Allowed: true, Time: timestamppb.Now(), SequenceNumber: 7, Resource: &agentpb.BoundaryLog_HttpRequest_{HttpRequest: request}},
		{}, // of a kind that is not known here
		{Resource: &agentpb.BoundaryLog_HttpRequest_{HttpRequest: &agentpb.BoundaryLog_HttpRequest{Method: "G\x1b]0;x\aET", Url: "mailto:planted-secret"}}},
	}
	if _, err := l.agent.ReportBoundaryLogs(t.Context(), &agentpb.ReportBoundaryLogsRequest{Logs: logs, SessionId: session, ConfinedProcessName: "curl"}); err != nil {
		t.Fatal(err)
	}
	text := x.log.String()
	if !strings.Contains(text, "url=https://example.com/path ") || !strings.Contains(text, "session="+session) || !strings.Contains(text, "process=curl") ||
		!strings.Contains(text, "method=GET") || !strings.Contains(text, "sequence=7") {
		t.Errorf("the log lacks the request:\n%s", text)
	}
	if strings.Contains(text, "planted-secret") {
		t.Error("the log holds a credential")
	}
	most := &agentpb.ReportBoundaryLogsRequest{SessionId: "no UUID", Logs: make([]*agentpb.BoundaryLog, wire.MaxBoundaryLogs)}
	for i := range most.Logs {
		most.Logs[i] = &agentpb.BoundaryLog{}
	}
	if _, err := l.agent.ReportBoundaryLogs(t.Context(), most); err != nil {
		t.Errorf("as many as may be: %v", err)
	}
	most.Logs = append(most.Logs, &agentpb.BoundaryLog{})
	if _, err := l.agent.ReportBoundaryLogs(t.Context(), most); err == nil || !strings.Contains(err.Error(), "1001 boundary logs exceed 1000") {
		t.Errorf("one too many: %v", err)
	}
}

// However much is reported, only so much is written.
func TestBoundaryLogsAreBounded(t *testing.T) {
	var b boundary
	now := time.Now()
	for i, tt := range []struct {
		after   time.Duration
		n, want int
	}{{0, 600, 600}, {0, 600, 400}, {time.Second, 5, 0}, {boundaryPause, 5, 5}} {
		now = now.Add(tt.after)
		if got := b.take(tt.n, now); got != tt.want {
			t.Errorf("take %d: %d, want %d", i, got, tt.want)
		}
	}
}

// FuzzAgentCalls sends what an agent might send, as bytes, to each of the calls that take something. None
// may panic; what is refused is refused by an error.
func FuzzAgentCalls(f *testing.F) {
	calls := []struct {
		message func() proto.Message
		call    func(*agentService, proto.Message) error
	}{
		{func() proto.Message { return &agentpb.PushContextStateRequest{} }, func(_ *agentService, m proto.Message) error {
			return checkContext(m.(*agentpb.PushContextStateRequest))
		}},
		{func() proto.Message { return &agentpb.CreateSubAgentRequest{} }, func(_ *agentService, m proto.Message) error {
			req := m.(*agentpb.CreateSubAgentRequest)
			if err := checkSubAgent(store.Agent{Name: "parent"}, req); err != nil {
				return err
			}
			if _, err := displayAppsOf(req); err != nil {
				return err
			}
			apps, failed := subAgentApps(req)
			if len(apps)+len(failed) != len(req.GetApps()) {
				panic("an app got lost")
			}
			child := store.Agent{ID: uuid.New(), Name: req.GetName(), Spec: store.Spec{Apps: apps}}
			_, err := json.Marshal(child)
			return err
		}},
		{func() proto.Message { return &agentpb.ReportBoundaryLogsRequest{} }, func(a *agentService, m proto.Message) error {
			_, err := a.ReportBoundaryLogs(context.Background(), m.(*agentpb.ReportBoundaryLogsRequest))
			return err
		}},
		{func() proto.Message { return &agentpb.PushResourcesMonitoringUsageRequest{} }, func(_ *agentService, m proto.Message) error {
			usage := measured(m.(*agentpb.PushResourcesMonitoringUsageRequest), &store.Resources{Memory: true, Volumes: []string{"/"}})
			_, err := protojson.Marshal(usage)
			if err != nil {
				panic(err) // what passed can be stored
			}
			return nil
		}},
	}
	for i, seed := range []proto.Message{
		&agentpb.PushContextStateRequest{Version: 1, Resources: []*agentpb.ContextResource{instruction("a", 3)}},
		&agentpb.CreateSubAgentRequest{Name: "dev", Apps: []*subApp{{Slug: "web", Share: agentpb.CreateSubAgentRequest_App_PUBLIC.Enum()}}},
		&agentpb.ReportBoundaryLogsRequest{Logs: []*agentpb.BoundaryLog{{Resource: &agentpb.BoundaryLog_HttpRequest_{HttpRequest: &agentpb.BoundaryLog_HttpRequest{Url: "http://x/?a"}}}}},
		&agentpb.PushResourcesMonitoringUsageRequest{Datapoints: []*agentpb.PushResourcesMonitoringUsageRequest_Datapoint{{CollectedAt: &timestamppb.Timestamp{Seconds: 1 << 60}}}},
	} {
		b, err := proto.Marshal(seed)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(byte(i), b)
		f.Add(byte(i), []byte{})
		f.Add(byte(i), append(b, 0xfa, 0x3f, 0x01, 'x')) // an unknown field
	}
	a := &agentService{Server: &Server{log: slog.New(slog.DiscardHandler)}, id: uuid.New()}
	f.Fuzz(func(t *testing.T, which byte, b []byte) {
		c := calls[int(which)%len(calls)]
		m := c.message()
		if proto.Unmarshal(b, m) != nil {
			return
		}
		_ = c.call(a, m)
	})
}

// A metadata interval is whole seconds in the place of nanoseconds.
func TestSecondsAsNanos(t *testing.T) {
	for in, want := range map[time.Duration]time.Duration{0: 0, time.Millisecond: 1, time.Second: 1, 90 * time.Second: 90} {
		if got := secondsAsNanos(in); !proto.Equal(got, durationpb.New(want)) {
			t.Errorf("%v: %v, want %v", in, got.AsDuration(), want)
		}
	}
}
