package agent

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/durationpb"
	"storj.io/drpc/drpcmux"

	"github.com/berthd/berth/client"
	"github.com/berthd/berth/identity"
	"github.com/berthd/berth/ptyhost"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
	"github.com/berthd/berth/wire/rpc"
	"github.com/berthd/berth/wire/tailnetpb"
)

// server is a control server over real HTTP, WebSocket, yamux and dRPC that keeps what one agent
// tells it. Calls that it does not have answer "unimplemented", as old servers do.
type server struct {
	agentpb.DRPCAgentUnimplementedServer
	tailnet coordinator
	url     *url.URL
	http    *httptest.Server

	mu       sync.Mutex
	minor    int               // of the newest version it speaks, 10 by default
	fail     map[string]error  // what a method answers instead
	calls    map[string]int    // by method
	metadata map[string]string // newest value of each key
	healths  [][]agentpb.AppHealth
	patched  []wire.PatchAppStatus
	reinit   http.HandlerFunc // nil: not found
	manifest *agentpb.Manifest
	startups []*agentpb.Startup
	states   []string
	logs     []string
	stats    int
	drop     context.CancelFunc // ends the present link
	relays   bool               // its relay can be measured
}

// coordinator is the server's other service.
type coordinator struct {
	tailnetpb.DRPCTailnetUnimplementedServer
	told chan *tailnetpb.CoordinateRequest
	maps chan *tailnetpb.DERPMap // sent to the agent as they come
}

func newServer(t *testing.T, m *agentpb.Manifest) *server {
	t.Helper()
	s := &server{
		manifest: m, tailnet: coordinator{told: make(chan *tailnetpb.CoordinateRequest, 1000), maps: make(chan *tailnetpb.DERPMap)},
		minor: 10, fail: map[string]error{}, calls: map[string]int{}, metadata: map[string]string{},
	}
	mux := drpcmux.New()
	if err := errors.Join(agentpb.DRPCRegisterAgent(mux, s), tailnetpb.DRPCRegisterTailnet(mux, &s.tailnet)); err != nil {
		t.Fatal(err)
	}
	h := http.NewServeMux()
	h.HandleFunc("PATCH /api/v2/workspaceagents/me/app-status", s.patchAppStatus)
	h.HandleFunc("GET /api/v2/workspaceagents/me/reinit", func(w http.ResponseWriter, r *http.Request) {
		handle := http.NotFound
		s.use(func() {
			s.calls["reinit"]++
			if s.reinit != nil {
				handle = s.reinit
			}
		})
		handle(w, r)
	})
	h.HandleFunc("GET /api/v2/workspaceagents/me/rpc", func(w http.ResponseWriter, r *http.Request) {
		if !s.accepts(w, r.URL.Query().Get("version")) {
			return
		}
		ws, err := websocket.Accept(w, r, nil)
		if err != nil {
			return
		}
		ws.SetReadLimit(-1)
		ctx, cancel := context.WithCancel(r.Context())
		defer cancel()
		s.mu.Lock()
		s.drop = cancel
		s.mu.Unlock()
		_ = rpc.Serve(ctx, websocket.NetConn(ctx, ws, websocket.MessageBinary), gate{s, mux}, rpc.ServeOptions{})
	})
	h.HandleFunc("GET /derp/latency-check", func(w http.ResponseWriter, _ *http.Request) {
		s.use(func() {
			if !s.relays {
				w.WriteHeader(http.StatusServiceUnavailable)
			}
		})
	})
	s.http = httptest.NewServer(h)
	t.Cleanup(s.http.Close)
	s.url, _ = url.Parse(s.http.URL)
	return s
}

func (s *server) GetManifest(context.Context, *agentpb.GetManifestRequest) (*agentpb.Manifest, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.manifest, nil
}

func (s *server) UpdateStartup(_ context.Context, r *agentpb.UpdateStartupRequest) (*agentpb.Startup, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.startups = append(s.startups, r.GetStartup())
	return r.GetStartup(), nil
}

func (s *server) UpdateLifecycle(_ context.Context, r *agentpb.UpdateLifecycleRequest) (*agentpb.Lifecycle, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.states = append(s.states, stateName(r.GetLifecycle().GetState()))
	return r.GetLifecycle(), nil
}

func (s *server) UpdateStats(_ context.Context, r *agentpb.UpdateStatsRequest) (*agentpb.UpdateStatsResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.GetStats() != nil {
		s.stats++
	}
	return &agentpb.UpdateStatsResponse{ReportInterval: durationpb.New(time.Second)}, nil
}

func (s *server) BatchCreateLogs(_ context.Context, r *agentpb.BatchCreateLogsRequest) (*agentpb.BatchCreateLogsResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range r.GetLogs() {
		s.logs = append(s.logs, l.GetOutput())
	}
	return &agentpb.BatchCreateLogsResponse{}, nil
}

func (c *coordinator) Coordinate(stream tailnetpb.DRPCTailnet_CoordinateStream) error {
	for {
		r, err := stream.Recv()
		if err != nil {
			return nil
		}
		c.told <- r
		if r.GetDisconnect() != nil {
			return nil
		}
	}
}

func (c *coordinator) StreamDERPMaps(_ *tailnetpb.StreamDERPMapsRequest, stream tailnetpb.DRPCTailnet_StreamDERPMapsStream) error {
	for {
		select {
		case m := <-c.maps:
			if err := stream.Send(m); err != nil {
				return err
			}
		case <-stream.Context().Done():
			return nil
		}
	}
}

// use runs f under the server's lock.
func (s *server) use(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

// runner is an agent under test.
type runner struct {
	t      *testing.T
	events chan Event
	stop   context.CancelCauseFunc
	done   chan error
	state  *State
	log    *lockedBuffer
}

// run starts an agent with a terminal host in this process.
func run(t *testing.T, s *server, stateDir string) *runner {
	t.Helper()
	return runWith(t, s, stateDir, Services{})
}

func runWith(t *testing.T, s *server, stateDir string, services Services) *runner {
	t.Helper()
	state, err := OpenState(stateDir)
	if err != nil {
		t.Fatal(err)
	}
	reach, err := client.NewHTTP(client.HTTPConfig{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancelCause(context.Background())
	r := &runner{t: t, events: make(chan Event, 1000), stop: stop, done: make(chan error, 1), state: state, log: &lockedBuffer{}}
	var hosts sync.WaitGroup
	go func() {
		err := Run(ctx, Config{
			Server:   Server{URL: s.url, HTTP: reach},
			Identity: identity.Token("token"),
			State:    state,
			Services: services,
			Log:      slog.New(slog.NewTextHandler(r.log, nil)),
			Event:    func(e Event) { r.events <- e },
			StartTerminals: func(socket string) error {
				l, err := ptyhost.Listen(socket)
				if err != nil {
					return err
				}
				hosts.Go(func() { _ = ptyhost.NewHost(ptyhost.HostConfig{}).Serve(context.WithoutCancel(ctx), l) })
				return nil
			},
		})
		hosts.Wait()
		reach.CloseIdleConnections()
		r.done <- errors.Join(err, state.Close())
	}()
	t.Cleanup(func() { stop(nil) })
	return r
}

// await returns the next event of a step.
func (r *runner) await(step Step) Event {
	r.t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		select {
		case e := <-r.events:
			if e.Step == step {
				return e
			}
		case <-deadline:
			r.t.Fatalf("no event %q", step)
		}
	}
}

// end stops the agent and waits for it.
func (r *runner) end() {
	r.t.Helper()
	r.stop(nil)
	select {
	case err := <-r.done:
		if err != nil {
			r.t.Errorf("Run: %v", err)
		}
	case <-time.After(30 * time.Second):
		r.t.Fatal("Run does not end")
	}
}

// restart has the agent leave to be started again, and ends its terminal host, which would live on.
func (r *runner) restart() {
	r.t.Helper()
	socket, err := SocketPath(r.state.dir, "ptyhost.sock")
	if err != nil {
		r.t.Fatal(err)
	}
	r.stop(ErrRestart)
	r.await(StepStopped)
	if _, err := ptyhost.Dial(socket).List(r.t.Context()); err != nil {
		r.t.Errorf("the terminals' process is gone after a restart: %v", err)
	}
	if err := ptyhost.Dial(socket).Shutdown(r.t.Context()); err != nil {
		r.t.Error(err)
	}
	r.end()
}

// shortDir is short enough for a socket in it.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ba")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// workspace returns a manifest whose scripts write into dir.
func workspace(dir string) *agentpb.Manifest {
	id, source, ws := uuid.New(), uuid.New(), uuid.New()
	start, stop := uuid.New(), uuid.New()
	return &agentpb.Manifest{
		AgentId: id[:], AgentName: "demo", WorkspaceId: ws[:], Directory: dir,
		DerpMap: &tailnetpb.DERPMap{
			HomeParams: &tailnetpb.DERPMap_HomeParams{},
			Regions: map[int64]*tailnetpb.DERPMap_Region{1: {
				RegionId: 1, RegionCode: "x", RegionName: "X", EmbeddedRelay: true,
				Nodes: []*tailnetpb.DERPMap_Region_Node{{Name: "1a", RegionId: 1, HostName: "127.0.0.1", StunPort: -1, DerpPort: 1}},
			}},
		},
		Scripts: []*agentpb.WorkspaceAgentScript{
			{Id: start[:], LogSourceId: source[:], RunOnStart: true, Script: "echo started; echo x >> " + filepath.Join(dir, "starts")},
			{Id: stop[:], LogSourceId: source[:], RunOnStop: true, Script: "echo stopped; echo x >> " + filepath.Join(dir, "stops")},
		},
	}
}

// lines counts the lines of a file; none if it is not there.
func lines(path string) int {
	data, _ := os.ReadFile(path)
	return strings.Count(string(data), "\n")
}

func TestAgentFromStartToStop(t *testing.T) {
	dir := shortDir(t)
	s := newServer(t, workspace(dir))
	r := run(t, s, filepath.Join(dir, "s"))
	linked := r.await(StepLinked)
	ready := r.await(StepReady)
	if linked.AgentName != "demo" || ready.Detail != "ready" {
		t.Errorf("linked %+v, ready %+v", linked, ready)
	}
	r.end()

	s.use(func() {
		if diff := cmp.Diff([]string{"starting", "ready", "shutting_down", "off"}, s.states); diff != "" {
			t.Errorf("lifecycle (-want +got):\n%s", diff)
		}
		if diff := cmp.Diff([]string{"started", "stopped"}, s.logs); diff != "" {
			t.Errorf("logs (-want +got):\n%s", diff)
		}
		if len(s.startups) != 1 || s.startups[0].GetExpandedDirectory() != dir || !strings.HasPrefix(s.startups[0].GetVersion(), "v") {
			t.Errorf("startups %v", s.startups)
		}
	})
	left := false
	for len(s.tailnet.told) > 0 {
		left = left || (<-s.tailnet.told).GetDisconnect() != nil
	}
	if !left {
		t.Error("the coordinator was not told that the agent leaves")
	}
}

// TestAgentRestart: what a person sees over a restart of berthd within one boot.
func TestAgentRestart(t *testing.T) {
	if bootID() == "" {
		t.Skip("this system does not tell one boot from another")
	}
	dir := shortDir(t)
	s := newServer(t, workspace(dir))
	r := run(t, s, filepath.Join(dir, "s"))
	r.await(StepReady)
	r.restart()
	if n := lines(filepath.Join(dir, "stops")); n != 0 {
		t.Errorf("stop scripts ran %d times for a restart", n)
	}

	again := run(t, s, filepath.Join(dir, "s"))
	again.await(StepReady)
	again.end()
	if n := lines(filepath.Join(dir, "starts")); n != 1 {
		t.Errorf("start scripts ran %d times in one boot, want once", n)
	}
	if n := lines(filepath.Join(dir, "stops")); n != 1 {
		t.Errorf("stop scripts ran %d times, want once", n)
	}

	third := run(t, s, filepath.Join(dir, "s"))
	third.await(StepReady)
	third.end()
	if n := lines(filepath.Join(dir, "starts")); n != 2 {
		t.Errorf("start scripts ran %d times, want again after a stop", n)
	}
}

// TestAgentRelinks: a lost link comes back by itself, and nothing is started a second time.
func TestAgentRelinks(t *testing.T) {
	dir := shortDir(t)
	s := newServer(t, workspace(dir))
	r := run(t, s, filepath.Join(dir, "s"))
	r.await(StepReady)
	for range 3 {
		s.use(func() { s.drop() })
		r.await(StepLost)
		r.await(StepLinked)
	}
	r.end()
	s.use(func() {
		// A report whose answer was lost with its link is made again.
		if diff := cmp.Diff([]string{"starting", "ready", "shutting_down", "off"}, slices.Compact(s.states)); diff != "" {
			t.Errorf("lifecycle (-want +got):\n%s", diff)
		}
	})
	if n := lines(filepath.Join(dir, "starts")); n != 1 {
		t.Errorf("start scripts ran %d times, want once", n)
	}
}

// TestAgentJoinsOnALaterLink: a relay that comes only after a link was lost is told of all the same.
func TestAgentJoinsOnALaterLink(t *testing.T) {
	dir := shortDir(t)
	s := newServer(t, workspace(dir))
	r := run(t, s, filepath.Join(dir, "s"))
	r.await(StepReady)
	s.use(func() { s.drop() })
	r.await(StepLinked)
	s.use(func() { s.relays = true })
	r.await(StepTailnet)
	r.end()
}

// TestAgentBecomesAnother: after a rebuild the same machine is another agent, with other addresses.
func TestAgentBecomesAnother(t *testing.T) {
	dir := shortDir(t)
	s := newServer(t, workspace(dir))
	r := run(t, s, filepath.Join(dir, "s"))
	first := r.await(StepLinked)
	r.await(StepReady)
	next := workspace(dir)
	s.use(func() { s.manifest = next; s.drop() })
	second := r.await(StepLinked)
	r.await(StepReady)
	if id, _ := uuid.FromBytes(next.AgentId); second.AgentID != id.String() || second.AgentID == first.AgentID {
		t.Errorf("linked as %s, then %s; want %s", first.AgentID, second.AgentID, id)
	}
	r.end()
	if n := lines(filepath.Join(dir, "starts")); n != 2 {
		t.Errorf("start scripts ran %d times, want once for each agent", n)
	}
}

func TestAgentReportsStats(t *testing.T) {
	dir := shortDir(t)
	s := newServer(t, workspace(dir))
	r := run(t, s, filepath.Join(dir, "s"))
	r.await(StepReady)
	reports := func() (n int) { s.use(func() { n = s.stats }); return n }
	deadline := time.After(20 * time.Second)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for reports() < 2 {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("%d reports", reports())
		}
	}
	r.end()
}

func TestManifestWithoutAgentID(t *testing.T) {
	s := newServer(t, &agentpb.Manifest{AgentId: []byte("short")})
	r := run(t, s, filepath.Join(shortDir(t), "s"))
	if e := r.await(StepLost); !strings.Contains(e.Detail, "agent id") {
		t.Errorf("lost for %q, want the agent id named", e.Detail)
	}
	r.end()
}

func TestConfigIsChecked(t *testing.T) {
	u := &url.URL{Scheme: "http", Host: "h"}
	for name, cfg := range map[string]Config{
		"no url":      {Identity: identity.Token("x"), State: &State{}},
		"no identity": {Server: Server{URL: u}, State: &State{}},
		"no state":    {Server: Server{URL: u}, Identity: identity.Token("x")},
	} {
		if err := Run(t.Context(), cfg); err == nil {
			t.Errorf("%s: Run = nil", name)
		}
	}
}

func TestMedian(t *testing.T) {
	tests := map[string]struct {
		in   []float64
		want float64
	}{
		"none": {nil, unknownLatency},
		"one":  {[]float64{3}, 3},
		"odd":  {[]float64{9, 1, 4}, 4},
		"even": {[]float64{4, 1, 2, 9}, 3},
	}
	for name, tt := range tests {
		if got := medianOf(slices.Clone(tt.in)); got != tt.want {
			t.Errorf("%s: %g, want %g", name, got, tt.want)
		}
	}
}

// TestNodeID: the number that stock agents derive, for ids on both sides of zero.
func TestNodeID(t *testing.T) {
	for id, want := range map[string]int64{
		"00000000-0000-0000-0000-000000000007": 7,
		"00000000-0000-0000-ffff-ffffffffffff": 1,
	} {
		if got := nodeID(uuid.MustParse(id)); got != want {
			t.Errorf("nodeID(%s) = %d, want %d", id, got, want)
		}
	}
}

func TestHostOf(t *testing.T) {
	addr := net.TCPAddrFromAddrPort(netip.MustParseAddrPort("[fd7a::1]:4242"))
	if got := hostOf(addr); got != "fd7a::1" {
		t.Errorf("hostOf = %q", got)
	}
	if got := hostOf(&net.UnixAddr{Name: "pipe", Net: "unix"}); got != "pipe" {
		t.Errorf("hostOf = %q", got)
	}
}
