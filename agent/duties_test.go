package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"
	"storj.io/drpc"
	"storj.io/drpc/drpcerr"

	"github.com/berthd/berth/client"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
	"github.com/berthd/berth/wire/tailnetpb"
)

// gate counts the calls of a server and fails those that the test wants to fail.
type gate struct {
	*server
	next drpc.Handler
}

func (g gate) HandleRPC(stream drpc.Stream, rpc string) error {
	var err error
	g.use(func() {
		g.calls[path.Base(rpc)]++
		err = g.fail[path.Base(rpc)]
	})
	if err != nil {
		return err
	}
	return g.next.HandleRPC(stream, rpc)
}

// accepts refuses a version above the server's as stock servers do.
func (s *server) accepts(w http.ResponseWriter, version string) bool {
	asked, err := wire.ParseVersion(version)
	var minor int
	s.use(func() {
		s.calls["version "+version]++
		minor = s.minor
	})
	if err == nil && asked.Minor <= minor {
		return true
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(http.StatusBadRequest)
	fmt.Fprintf(w, `{"message":"Unknown or unsupported API version","validations":[{"field":"version","detail":"server is at version 2.%d, behind requested minor version %s"}]}`, minor, version)
	return false
}

func (s *server) patchAppStatus(w http.ResponseWriter, r *http.Request) {
	var status wire.PatchAppStatus
	if err := json.NewDecoder(r.Body).Decode(&status); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	s.use(func() { s.patched = append(s.patched, status) })
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	fmt.Fprintln(w, "null")
}

func (s *server) BatchUpdateMetadata(_ context.Context, r *agentpb.BatchUpdateMetadataRequest) (*agentpb.BatchUpdateMetadataResponse, error) {
	s.use(func() {
		for _, m := range r.GetMetadata() {
			s.metadata[m.GetKey()] = m.GetResult().GetValue()
		}
	})
	return &agentpb.BatchUpdateMetadataResponse{}, nil
}

func (s *server) BatchUpdateAppHealths(_ context.Context, r *agentpb.BatchUpdateAppHealthRequest) (*agentpb.BatchUpdateAppHealthResponse, error) {
	var all []agentpb.AppHealth
	for _, u := range r.GetUpdates() {
		all = append(all, u.GetHealth())
	}
	s.use(func() { s.healths = append(s.healths, all) })
	return &agentpb.BatchUpdateAppHealthResponse{}, nil
}

func (s *server) GetResourcesMonitoringConfiguration(context.Context, *agentpb.GetResourcesMonitoringConfigurationRequest) (*agentpb.GetResourcesMonitoringConfigurationResponse, error) {
	return &agentpb.GetResourcesMonitoringConfigurationResponse{
		Config:  &agentpb.GetResourcesMonitoringConfigurationResponse_Config{NumDatapoints: 1, CollectionIntervalSeconds: 1},
		Memory:  &agentpb.GetResourcesMonitoringConfigurationResponse_Memory{Enabled: true},
		Volumes: []*agentpb.GetResourcesMonitoringConfigurationResponse_Volume{{Enabled: true, Path: "/"}},
	}, nil
}

func (s *server) PushResourcesMonitoringUsage(_ context.Context, r *agentpb.PushResourcesMonitoringUsageRequest) (*agentpb.PushResourcesMonitoringUsageResponse, error) {
	if p := r.GetDatapoints(); len(p) != 1 || p[0].GetMemory().GetTotal() == 0 || len(p[0].GetVolumes()) != 1 || p[0].GetVolumes()[0].GetTotal() == 0 {
		return nil, fmt.Errorf("window %v", p)
	}
	return &agentpb.PushResourcesMonitoringUsageResponse{}, nil
}

func (s *server) GetServiceBanner(context.Context, *agentpb.GetServiceBannerRequest) (*agentpb.ServiceBanner, error) {
	return &agentpb.ServiceBanner{Enabled: true, Message: "one"}, nil
}

func (s *server) GetAnnouncementBanners(context.Context, *agentpb.GetAnnouncementBannersRequest) (*agentpb.GetAnnouncementBannersResponse, error) {
	return &agentpb.GetAnnouncementBannersResponse{}, nil
}

func (s *server) ScriptCompleted(context.Context, *agentpb.WorkspaceAgentScriptCompletedRequest) (*agentpb.WorkspaceAgentScriptCompletedResponse, error) {
	return &agentpb.WorkspaceAgentScriptCompletedResponse{}, nil
}

func (s *server) ReportConnection(context.Context, *agentpb.ReportConnectionRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}

func (s *server) UpdateAppStatus(context.Context, *agentpb.UpdateAppStatusRequest) (*agentpb.UpdateAppStatusResponse, error) {
	return &agentpb.UpdateAppStatusResponse{}, nil
}

// await polls what the server was told, under its lock, until done.
func (s *server) await(t *testing.T, what string, done func() bool) {
	t.Helper()
	eventually(t, what, func() (ok bool) { s.use(func() { ok = done() }); return ok })
}

// lost fails the test if the link was lost since the last look.
func (r *runner) lost() {
	r.t.Helper()
	for len(r.events) > 0 {
		if e := <-r.events; e.Step == StepLost || e.Step == StepTrouble {
			r.t.Errorf("the link was lost: %s%s", e.Detail, e.Cause)
		}
	}
}

// busy is a workspace with every duty.
func busy(dir string) *agentpb.Manifest {
	m := workspace(dir)
	m.Metadata = []*agentpb.WorkspaceAgentMetadata_Description{{Key: "k", Script: "echo value", Interval: &durationpb.Duration{Nanos: 1}}}
	id := uuid.New()
	m.Apps = []*agentpb.WorkspaceApp{{
		Id: id[:], Slug: "gone", Health: agentpb.WorkspaceApp_INITIALIZING, SharingLevel: agentpb.WorkspaceApp_OWNER,
		Healthcheck: &agentpb.WorkspaceApp_Healthcheck{Url: "http://127.0.0.1:1/", Interval: durationpb.New(time.Second), Threshold: 1},
	}}
	return m
}

// TestServersOfEveryVersion: an agent works with each, and calls nothing that the version lacks.
func TestServersOfEveryVersion(t *testing.T) {
	since := map[string]int{
		"GetAnnouncementBanners": 1, "ScriptCompleted": 3, "GetResourcesMonitoringConfiguration": 4,
		"PushResourcesMonitoringUsage": 4, "ReportConnection": 4, "UpdateAppStatus": 8,
	}
	for _, minor := range []int{0, 1, 2, 3, 4, 6, 7, 8, 9, 10} {
		t.Run(fmt.Sprintf("2.%d", minor), func(t *testing.T) {
			t.Parallel()
			dir := shortDir(t)
			s := newServer(t, busy(dir))
			s.minor = minor
			r := run(t, s, filepath.Join(dir, "s"))
			r.await(StepReady)
			socket, err := SocketPath(r.state.dir, LocalSocket)
			if err != nil {
				t.Fatal(err)
			}
			if err := ReportAppStatus(t.Context(), socket, wire.PatchAppStatus{AppSlug: "gone", State: "idle", Message: "m", URI: "u"}); err != nil {
				t.Fatal(err)
			}
			s.await(t, "all duties", func() bool {
				told := s.metadata["k"] == "value" && len(s.healths) > 0 && s.stats > 0 && s.calls["UpdateAppStatus"]+len(s.patched) > 0
				return told && (minor < 4 || s.calls["PushResourcesMonitoringUsage"] > 0)
			})
			r.lost()
			s.use(func() { s.drop() })
			r.await(StepLinked)
			r.end()
			s.use(func() {
				for method, from := range since {
					if called := s.calls[method] > 0; called != (minor >= from) && method != "ReportConnection" {
						t.Errorf("%s called %d times", method, s.calls[method])
					}
				}
				var patched []wire.PatchAppStatus
				if minor < 8 {
					patched = []wire.PatchAppStatus{{AppSlug: "gone", State: "idle", Message: "m", URI: "u"}}
				}
				if diff := cmp.Diff(patched, s.patched); diff != "" {
					t.Errorf("patched (-want +got):\n%s", diff)
				}
				if n, want := strings.Count(r.log.String(), "speaks an older version"), min(1, 10-minor); n != want {
					t.Errorf("told %d times that the server is older, want %d", n, want)
				}
				if s.calls["version 2.10"] != 1+minor/10 || minor != 10 && s.calls[fmt.Sprintf("version 2.%d", minor)] != 2 {
					t.Errorf("versions asked for: %v", s.calls)
				}
			})
		})
	}
}

// TestServerWithoutOptionalMethods: whatever version it claims to have and however it says that it lacks
// a method, the link lives on, and it is asked once.
func TestServerWithoutOptionalMethods(t *testing.T) {
	answers := map[string]func(method string) error{
		"code 12":     func(string) error { return drpcerr.WithCode(errors.New("Unimplemented"), wire.CodeUnimplemented) },
		"unknown rpc": func(m string) error { return fmt.Errorf("protocol error: unknown rpc: %q", "/coder.agent.v2.Agent/"+m) },
	}
	methods := []string{
		"UpdateStartup", "UpdateStats", "UpdateLifecycle", "BatchCreateLogs", "BatchUpdateMetadata", "BatchUpdateAppHealths",
		"GetAnnouncementBanners", "GetServiceBanner", "ScriptCompleted", "GetResourcesMonitoringConfiguration", "StreamDERPMaps",
	}
	for name, answer := range answers {
		t.Run(name, func(t *testing.T) {
			dir := shortDir(t)
			s := newServer(t, busy(dir))
			for _, m := range methods {
				s.fail[m] = answer(m)
			}
			r := run(t, s, filepath.Join(dir, "s"))
			r.await(StepReady)
			s.await(t, "every method", func() bool {
				return !slices.ContainsFunc(methods, func(m string) bool { return s.calls[m] == 0 })
			})
			r.lost()
			r.end()
			s.use(func() {
				for _, m := range methods {
					if s.calls[m] != 1 {
						t.Errorf("%s was called %d times", m, s.calls[m])
					}
				}
			})
		})
	}
}

// TestServerThatFails: an error of an optional duty neither ends the link nor the duty.
func TestServerThatFails(t *testing.T) {
	dir := shortDir(t)
	s := newServer(t, busy(dir))
	methods := []string{
		"UpdateStartup", "UpdateStats", "UpdateLifecycle", "BatchCreateLogs", "BatchUpdateMetadata", "BatchUpdateAppHealths",
		"GetAnnouncementBanners", "ScriptCompleted", "GetResourcesMonitoringConfiguration", "PushResourcesMonitoringUsage",
	}
	for _, m := range methods {
		s.fail[m] = errors.New("database is away")
	}
	r := run(t, s, filepath.Join(dir, "s"))
	r.await(StepReady)
	s.await(t, "second attempts", func() bool {
		return s.calls["UpdateStartup"] > 1 && s.calls["UpdateStats"] > 1 && s.calls["UpdateLifecycle"] > 1 &&
			s.calls["BatchCreateLogs"] > 1 && s.calls["BatchUpdateMetadata"] > 1 && s.calls["GetResourcesMonitoringConfiguration"] > 1 &&
			s.calls["BatchUpdateAppHealths"] > 0 && s.calls["GetAnnouncementBanners"] > 0 && s.calls["ScriptCompleted"] > 0
	})
	s.use(func() { clear(s.fail) })
	s.await(t, "everything told after all", func() bool {
		return len(s.startups) == 1 && s.stats > 0 && slices.Equal(s.states, []string{"starting", "ready"}) &&
			slices.Equal(s.logs, []string{"started"}) && s.metadata["k"] == "value" && s.calls["PushResourcesMonitoringUsage"] > 0
	})
	r.lost()
	r.end()
}

// TestManifestWithHoles: what is missing or makes no sense in a manifest costs that duty and no more.
func TestManifestWithHoles(t *testing.T) {
	dir := shortDir(t)
	m := workspace(dir)
	m.WorkspaceId, m.ParentId, m.DerpMap = []byte("short"), []byte("short"), nil
	m.Apps = []*agentpb.WorkspaceApp{
		{}, {Health: 77, SharingLevel: 99}, nil,
		{Id: []byte("x"), Healthcheck: &agentpb.WorkspaceApp_Healthcheck{Url: "::", Threshold: -1}},
		{Id: m.AgentId, Healthcheck: &agentpb.WorkspaceApp_Healthcheck{Url: "::", Threshold: 1, Interval: &durationpb.Duration{Nanos: 1}}},
	}
	m.Metadata = []*agentpb.WorkspaceAgentMetadata_Description{
		{}, nil,
		{Key: "negative", Script: "echo 1", Interval: &durationpb.Duration{Nanos: -5}, Timeout: &durationpb.Duration{Seconds: -1}},
		{Key: "true duration", Script: "echo 2", Interval: &durationpb.Duration{Seconds: 1 << 60}},
		{Key: string(make([]byte, wire.MaxMetadataKeys+1)), Script: "echo 3"},
	}
	m.Scripts = append(m.Scripts, nil, &agentpb.WorkspaceAgentScript{RunOnStart: true, Script: "exit 0"}, &agentpb.WorkspaceAgentScript{Cron: "?"})
	m.Devcontainers = []*agentpb.WorkspaceAgentDevcontainer{nil, {}}
	m.Secrets = []*agentpb.WorkspaceSecret{nil, {}, {EnvName: "=", FilePath: "/proc/nowhere/x"}}
	s := newServer(t, m)
	r := run(t, s, filepath.Join(dir, "s"))
	if e := r.await(StepReady); e.Detail != "ready" {
		t.Errorf("ready as %q", e.Detail)
	}
	s.await(t, "the good metadata", func() bool { return s.metadata["negative"] == "1" && s.metadata["true duration"] == "2" })
	r.lost()
	r.end()
}

// TestManifestChangesOnALaterLink: what a person sees of another manifest for the same agent.
func TestManifestChangesOnALaterLink(t *testing.T) {
	dir := shortDir(t)
	first := workspace(dir)
	first.EnvironmentVariables = map[string]string{"PLANET": "earth"}
	first.Metadata = []*agentpb.WorkspaceAgentMetadata_Description{{Key: "k", Script: "echo $PLANET"}}
	s := newServer(t, first)
	r := run(t, s, filepath.Join(dir, "s"))
	r.await(StepReady)
	s.await(t, "earth", func() bool { return s.metadata["k"] == "earth" })

	next := workspace(dir)
	next.AgentId, next.EnvironmentVariables, next.Metadata = first.AgentId, map[string]string{"PLANET": "mars"}, first.Metadata
	next.Secrets = []*agentpb.WorkspaceSecret{{FilePath: filepath.Join(dir, "secret"), Value: []byte("v")}}
	s.use(func() { s.manifest = next; s.drop() })
	s.await(t, "mars", func() bool { return s.metadata["k"] == "mars" })
	if got, err := os.ReadFile(filepath.Join(dir, "secret")); err != nil || string(got) != "v" {
		t.Errorf("the new secret's file holds %q, %v", got, err)
	}
	r.end()
	if n := lines(filepath.Join(dir, "starts")); n != 1 {
		t.Errorf("start scripts ran %d times, want once", n)
	}
}

// TestRelayMapChanges: the node takes the map of a later manifest and each that the server streams, and
// keeps what it has where one cannot be used.
func TestRelayMapChanges(t *testing.T) {
	dir := shortDir(t)
	first := workspace(dir)
	region := func(id int64) *tailnetpb.DERPMap {
		return &tailnetpb.DERPMap{Regions: map[int64]*tailnetpb.DERPMap_Region{id: {
			RegionId: id, RegionCode: "x", RegionName: "X", EmbeddedRelay: true, Nodes: first.DerpMap.Regions[1].Nodes,
		}}}
	}
	s := newServer(t, first)
	s.relays = true
	r := run(t, s, filepath.Join(dir, "s"))
	r.await(StepTailnet)
	home := func(want int32) {
		t.Helper()
		eventually(t, fmt.Sprintf("home %d", want), func() bool {
			for len(s.tailnet.told) > 0 {
				if n := (<-s.tailnet.told).GetUpdateSelf().GetNode(); n.GetPreferredDerp() == want {
					return true
				}
			}
			return false
		})
	}
	home(1)
	next := workspace(dir)
	next.AgentId, next.DerpMap = first.AgentId, region(7)
	s.use(func() { s.manifest = next; s.drop() })
	home(7)
	for _, m := range []*tailnetpb.DERPMap{
		{}, region(-1), {Regions: map[int64]*tailnetpb.DERPMap_Region{5: {RegionId: 5}}}, region(9),
	} {
		s.tailnet.maps <- m
	}
	home(9)
	last := workspace(dir)
	last.AgentId, last.DerpMap = first.AgentId, nil
	s.use(func() { s.manifest = last; s.drop() })
	home(9)
	r.end()
}

// TestClaimedWorkspaceStartsAnew: with stop and start scripts, a new node and the states from the start;
// the second time the server tells of the same owner, and is not asked again.
func TestClaimedWorkspaceStartsAnew(t *testing.T) {
	dir := shortDir(t)
	s := newServer(t, workspace(dir))
	claim := make(chan struct{})
	owner := uuid.NewString()
	s.reinit = func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("wait") != "true" {
			t.Errorf("asked with %s", r.URL.RawQuery)
		}
		w.Header().Set("Content-Type", "text/event-stream")
		io.WriteString(w, "event: ping\n\n")
		http.NewResponseController(w).Flush()
		select {
		case <-claim:
			fmt.Fprintf(w, "event: data\ndata: {\"workspace_id\":%q,\"reason\":\"prebuild_claimed\",\"owner_id\":%q}\n\n", uuid.NewString(), owner)
		case <-r.Context().Done():
		}
	}
	s.relays = true
	r := run(t, s, filepath.Join(dir, "s"))
	ready := func(times int) {
		r.await(StepTailnet)
		s.await(t, "ready", func() bool {
			return len(slices.DeleteFunc(slices.Clone(s.states), func(state string) bool { return state != "ready" })) >= times
		})
	}
	ready(1)
	claim <- struct{}{}
	ready(2)
	claim <- struct{}{} // the owner that it has
	s.use(func() { s.drop() })
	r.await(StepLinked)
	r.end()
	s.use(func() {
		want := []string{"starting", "ready", "shutting_down", "off", "starting", "ready", "shutting_down", "off"}
		if diff := cmp.Diff(want, slices.Compact(s.states)); diff != "" {
			t.Errorf("lifecycle (-want +got):\n%s", diff)
		}
		if s.calls["reinit"] != 2 {
			t.Errorf("asked %d times for an owner, want twice", s.calls["reinit"])
		}
	})
	keys := map[string]bool{}
	for len(s.tailnet.told) > 0 {
		if n := (<-s.tailnet.told).GetUpdateSelf().GetNode(); n != nil {
			keys[string(n.GetKey())] = true
		}
	}
	if len(keys) != 2 {
		t.Errorf("%d node keys, want one for each start", len(keys))
	}
	if starts, stops := lines(filepath.Join(dir, "starts")), lines(filepath.Join(dir, "stops")); starts != 2 || stops != 2 {
		t.Errorf("start scripts ran %d times and stop scripts %d times, want twice each", starts, stops)
	}
}

// TestReinitIsAskedForAgain: until the server says that there is no use in it, and whatever else it says.
func TestReinitIsAskedForAgain(t *testing.T) {
	dir := shortDir(t)
	s := newServer(t, workspace(dir))
	s.reinit = func(w http.ResponseWriter, _ *http.Request) {
		var asked int
		s.use(func() { asked = s.calls["reinit"] })
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		if asked < 3 {
			w.WriteHeader(http.StatusInternalServerError)
			fmt.Fprint(w, `{"message":"An internal server error occurred."}`)
			return
		}
		w.WriteHeader(http.StatusConflict)
		fmt.Fprint(w, `{"message":"Workspace is not a prebuilt workspace waiting to be claimed."}`)
	}
	r := run(t, s, filepath.Join(dir, "s"))
	r.await(StepReady)
	s.await(t, "three questions", func() bool { return s.calls["reinit"] == 3 })
	s.use(func() { s.drop() })
	r.await(StepLinked)
	r.end()
	s.use(func() {
		if s.calls["reinit"] != 3 {
			t.Errorf("asked %d times, want no more after 409", s.calls["reinit"])
		}
	})
}

func TestOldBannerBesideNewerServer(t *testing.T) {
	link := func(fail ...string) *client.Link {
		s := newServer(t, workspace("/"))
		for _, m := range fail {
			s.fail[m] = drpcerr.WithCode(errors.New("Unimplemented"), wire.CodeUnimplemented)
		}
		h, err := client.NewHTTP(client.HTTPConfig{})
		if err != nil {
			t.Fatal(err)
		}
		c, err := client.New(client.Config{URL: s.url, HTTP: h})
		if err != nil {
			t.Fatal(err)
		}
		up, err := c.ConnectAgent(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { up.Close(); h.CloseIdleConnections() })
		return up
	}
	tests := map[string]struct {
		fail  []string
		minor int
		want  []string
	}{
		"2.0":         {nil, 0, []string{"one"}},
		"2.10":        {nil, 10, nil},
		"code 12":     {[]string{"GetAnnouncementBanners"}, 10, []string{"one"}},
		"neither":     {[]string{"GetAnnouncementBanners", "GetServiceBanner"}, 10, nil},
		"2.0, absent": {[]string{"GetServiceBanner"}, 0, nil},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := fetchBanners(t.Context(), link(tt.fail...).Agent, wire.Version{Major: 2, Minor: tt.minor})
			if diff := cmp.Diff(tt.want, got); diff != "" || err != nil {
				t.Errorf("%v (-want +got):\n%s", err, diff)
			}
		})
	}
}

// TestShutdownTellsPeersBeforeScriptsEnd: a stop script may take its time; peers need not wait for it, and
// the final state does.
func TestShutdownTellsPeersBeforeScriptsEnd(t *testing.T) {
	dir := shortDir(t)
	m := workspace(dir)
	m.Scripts[1].Script = "until [ -e " + filepath.Join(dir, "go") + " ]; do sleep 0.05; done; echo stopped"
	s := newServer(t, m)
	r := run(t, s, filepath.Join(dir, "s"))
	r.await(StepReady)
	// An agent that never coordinated has nobody to take leave of.
	s.await(t, "coordination", func() bool { return s.calls["Coordinate"] > 0 })
	r.stop(nil)
	s.await(t, "the leave", func() bool {
		for len(s.tailnet.told) > 0 {
			if (<-s.tailnet.told).GetDisconnect() != nil {
				return true
			}
		}
		return false
	})
	s.await(t, "shutting down", func() bool { return slices.Equal(s.states, []string{"starting", "ready", "shutting_down"}) })
	if err := os.WriteFile(filepath.Join(dir, "go"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r.end()
	s.use(func() {
		if last := s.states[len(s.states)-1]; last != "off" || !slices.Contains(s.logs, "stopped") {
			t.Errorf("ended as %q with logs %q", last, s.logs)
		}
	})
}
