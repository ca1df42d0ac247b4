package rpc

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/yamux"
	"go.uber.org/goleak"
	"storj.io/drpc/drpcerr"
	"storj.io/drpc/drpcmux"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
	"github.com/berthd/berth/wire/tailnetpb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type agentService struct {
	agentpb.DRPCAgentUnimplementedServer
	stats atomic.Int32 // calls of UpdateStats, which it does not have
}

func (s *agentService) UpdateStats(context.Context, *agentpb.UpdateStatsRequest) (*agentpb.UpdateStatsResponse, error) {
	s.stats.Add(1)
	return nil, drpcerr.WithCode(errors.New("Unimplemented"), wire.CodeUnimplemented)
}

func (*agentService) GetManifest(context.Context, *agentpb.GetManifestRequest) (*agentpb.Manifest, error) {
	return &agentpb.Manifest{AgentName: "demo"}, nil
}

func (*agentService) UpdateStartup(context.Context, *agentpb.UpdateStartupRequest) (*agentpb.Startup, error) {
	return nil, errors.New("invalid agent semver version \"x\"")
}

// slowService holds what it is given until it is let go.
type slowService struct {
	agentpb.DRPCAgentUnimplementedServer
	holding chan struct{} // gets a value for each
	release chan struct{}
}

func (s *slowService) BatchCreateLogs(context.Context, *agentpb.BatchCreateLogsRequest) (*agentpb.BatchCreateLogsResponse, error) {
	s.holding <- struct{}{}
	<-s.release
	return &agentpb.BatchCreateLogsResponse{}, nil
}

func (*slowService) GetManifest(context.Context, *agentpb.GetManifestRequest) (*agentpb.Manifest, error) {
	return &agentpb.Manifest{AgentName: "demo"}, nil
}

type tailnetService struct {
	gaveUp  chan error
	serving atomic.Int32 // calls of Coordinate
	tailnetpb.DRPCTailnetUnimplementedServer
}

// StreamDERPMaps sends until the caller is found to be gone.
func (s *tailnetService) StreamDERPMaps(_ *tailnetpb.StreamDERPMapsRequest, stream tailnetpb.DRPCTailnet_StreamDERPMapsStream) error {
	m := &tailnetpb.DERPMap{Regions: map[int64]*tailnetpb.DERPMap_Region{1: {RegionName: strings.Repeat("x", 1000)}}}
	for {
		if err := stream.Send(m); err != nil {
			s.gaveUp <- err
			return err
		}
	}
}

func (t *tailnetService) Coordinate(s tailnetpb.DRPCTailnet_CoordinateStream) error {
	t.serving.Add(1)
	defer t.serving.Add(-1)
	for {
		req, err := s.Recv()
		if err != nil {
			return nil
		}
		if err := s.Send(&tailnetpb.CoordinateResponse{Error: string(req.GetAddTunnel().GetId())}); err != nil {
			return err
		}
	}
}

// session returns a client and what Serve returned for it, over a real socket.
func session(t *testing.T, opts ServeOptions) (*Client, <-chan error) {
	t.Helper()
	return serve(t, &tailnetService{gaveUp: make(chan error, 1)}, opts)
}

func serve(t *testing.T, service *tailnetService, opts ServeOptions) (*Client, <-chan error) {
	t.Helper()
	return serveBoth(t, &agentService{}, service, opts)
}

func serveBoth(t *testing.T, agent agentpb.DRPCAgentServer, service *tailnetService, opts ServeOptions) (*Client, <-chan error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	mux := drpcmux.New()
	if err := agentpb.DRPCRegisterAgent(mux, agent); err != nil {
		t.Fatal(err)
	}
	if err := tailnetpb.DRPCRegisterTailnet(mux, service); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			served <- err
			return
		}
		served <- Serve(ctx, conn, mux, opts)
	}()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c, err := NewClient(conn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cancel(); c.Close() })
	return c, served
}

func TestCalls(t *testing.T) {
	c, served := session(t, ServeOptions{})
	ctx := context.Background()
	agent := agentpb.NewDRPCAgentClient(c)

	m, err := agent.GetManifest(ctx, &agentpb.GetManifestRequest{})
	if err != nil || m.AgentName != "demo" {
		t.Fatalf("GetManifest = %v, %v", m, err)
	}
	_, err = agent.UpdateStartup(ctx, &agentpb.UpdateStartupRequest{})
	if err == nil || !strings.Contains(err.Error(), "invalid agent semver") || Unimplemented(err) {
		t.Errorf("UpdateStartup error = %v, want the handler's", err)
	}
	_, err = agent.PushContextState(ctx, &agentpb.PushContextStateRequest{})
	if !Unimplemented(err) {
		t.Errorf("PushContextState error = %v, want unimplemented", err)
	}

	stream, err := tailnetpb.NewDRPCTailnetClient(c).Coordinate(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"a", "b"} {
		if err := stream.Send(&tailnetpb.CoordinateRequest{AddTunnel: &tailnetpb.CoordinateRequest_Tunnel{Id: []byte(id)}}); err != nil {
			t.Fatal(err)
		}
		resp, err := stream.Recv()
		if err != nil || resp.Error != id {
			t.Fatalf("Recv = %v, %v; want %q", resp, err, id)
		}
	}
	if err := stream.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Ping(); err != nil {
		t.Errorf("Ping: %v", err)
	}
	c.Close()
	if err := <-served; err != nil {
		t.Errorf("Serve = %v, want nil when the caller leaves", err)
	}
}

func TestCanceledStreamEndsAlone(t *testing.T) {
	c, _ := session(t, ServeOptions{})
	ctx, cancel := context.WithCancel(context.Background())
	stream, err := tailnetpb.NewDRPCTailnetClient(c).Coordinate(ctx)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := stream.Recv(); err == nil {
		t.Error("Recv after cancel succeeded")
	}
	if _, err := agentpb.NewDRPCAgentClient(c).GetManifest(context.Background(), &agentpb.GetManifestRequest{}); err != nil {
		t.Errorf("another call after a canceled one: %v", err)
	}
}

// A caller that keeps the session alive but never reads a stream does not hold its handler for ever.
func TestCallerThatNeverReads(t *testing.T) {
	service := &tailnetService{gaveUp: make(chan error, 1)}
	c, _ := serve(t, service, ServeOptions{WriteTimeout: 50 * time.Millisecond})
	if _, err := tailnetpb.NewDRPCTailnetClient(c).StreamDERPMaps(t.Context(), &tailnetpb.StreamDERPMapsRequest{}); err != nil {
		t.Fatal(err)
	}
	if err := <-service.gaveUp; !errors.Is(err, yamux.ErrTimeout) {
		t.Errorf("the handler's stream ended with %v, want a timeout", err)
	}
	if m, err := agentpb.NewDRPCAgentClient(c).GetManifest(t.Context(), &agentpb.GetManifestRequest{}); err != nil || m.AgentName != "demo" {
		t.Errorf("another call: %v, %v", m, err)
	}
}

// A caller that opens call after call and ends none holds no more than its share, gets its probes
// answered, and is served again when it ends some.
func TestTooManyCalls(t *testing.T) {
	service := &tailnetService{}
	c, _ := serve(t, service, ServeOptions{})
	tailnet := tailnetpb.NewDRPCTailnetClient(c)
	request := &tailnetpb.CoordinateRequest{AddTunnel: &tailnetpb.CoordinateRequest_Tunnel{Id: []byte("x")}}
	var open []tailnetpb.DRPCTailnet_CoordinateClient
	for range maxCalls + 10 {
		stream, err := tailnet.Coordinate(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(request); err != nil {
			t.Fatal(err)
		}
		open = append(open, stream)
	}
	for _, stream := range open[:maxCalls] {
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Ping(); err != nil {
		t.Error(err)
	}
	if n := service.serving.Load(); n != maxCalls {
		t.Errorf("%d calls are served, want %d", n, maxCalls)
	}
	for _, stream := range open[:10] {
		if err := stream.Close(); err != nil {
			t.Error(err)
		}
	}
	for _, stream := range open[maxCalls:] {
		if _, err := stream.Recv(); err != nil {
			t.Error(err)
		}
	}
}

// A caller that takes everything and answers nothing is given up when its time is over, though a single
// ping may wait longer.
func TestDeadCaller(t *testing.T) {
	client, server := net.Pipe()
	defer client.Close()
	go io.Copy(io.Discard, client)
	const patience = 200 * time.Millisecond
	begin := time.Now()
	err := Serve(t.Context(), server, drpcmux.New(), ServeOptions{PingInterval: time.Millisecond, PingTimeout: patience})
	if !errors.Is(err, ErrDead) {
		t.Errorf("Serve = %v, want ErrDead", err)
	}
	if took := time.Since(begin); took < patience || took > config().ConnectionWriteTimeout {
		t.Errorf("given up after %v", took)
	}
}

// A caller that answers is never given up, however long it has nothing to say.
func TestQuietCaller(t *testing.T) {
	alive := make(chan struct{})
	c, served := session(t, ServeOptions{PingInterval: time.Millisecond, PingTimeout: time.Minute, Alive: func() { alive <- struct{}{} }})
	for range 50 {
		select {
		case <-alive:
		case err := <-served:
			t.Fatalf("ended with %v", err)
		}
	}
	go func() {
		for range alive { // what is on its way
		}
	}()
	c.Close()
	if err := <-served; err != nil {
		t.Errorf("Serve = %v", err)
	}
	close(alive)
}

// failing is a connection that keeps why it was failed.
type failing struct {
	net.Conn
	reason chan string
}

func (f failing) Fail(reason string) error {
	f.reason <- reason
	return f.Conn.Close()
}

// What is no session ends at once, and is told why.
func TestNoSession(t *testing.T) {
	for name, text := range map[string]string{
		"HTTP":                "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
		"newer yamux":         "\x01\x00\x00\x01\x00\x00\x00\x01\x00\x00\x00\x00",
		"unknown frame":       "\x00\x09\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
		"more than a window":  "\x00\x00\x00\x01\x00\x00\x00\x01\x00\x10\x00\x00",
		"stream opened twice": "\x00\x01\x00\x01\x00\x00\x00\x01\x00\x00\x00\x00\x00\x01\x00\x01\x00\x00\x00\x01\x00\x00\x00\x00",
	} {
		t.Run(name, func(t *testing.T) {
			near, far := net.Pipe()
			defer near.Close()
			conn := failing{far, make(chan string, 1)}
			served := make(chan error, 1)
			go func() { served <- Serve(t.Context(), conn, drpcmux.New(), ServeOptions{}) }()
			go io.Copy(io.Discard, near)
			if _, err := io.WriteString(near, text); err != nil {
				t.Logf("write: %v", err) // it may be refused before it is all read
			}
			if err := <-served; !errors.Is(err, ErrProtocol) {
				t.Errorf("Serve = %v, want ErrProtocol", err)
			}
			select {
			case <-conn.reason:
			default:
				t.Error("not told")
			}
		})
	}
}

// A caller holds only so many large requests at a time; small ones are served meanwhile, and the others
// have their turn.
func TestLargeRequests(t *testing.T) {
	const calls = 3 * maxLarge
	slow := &slowService{holding: make(chan struct{}, calls), release: make(chan struct{})}
	c, _ := serveBoth(t, slow, &tailnetService{}, ServeOptions{})
	agent := agentpb.NewDRPCAgentClient(c)
	request := &agentpb.BatchCreateLogsRequest{Logs: []*agentpb.Log{{Output: strings.Repeat("x", wire.MaxMessage/2)}}}
	answers := make(chan error, calls)
	for range calls {
		go func() {
			_, err := agent.BatchCreateLogs(t.Context(), request)
			answers <- err
		}()
	}
	for range maxLarge {
		<-slow.holding
	}
	for range 10 { // time enough for one more, if one more got in
		if m, err := agent.GetManifest(t.Context(), &agentpb.GetManifestRequest{}); err != nil || m.AgentName != "demo" {
			t.Fatalf("a small request: %v, %v", m, err)
		}
	}
	if n := len(slow.holding); n != 0 {
		t.Errorf("%d large requests more than %d", n, maxLarge)
	}
	close(slow.release)
	for range calls {
		if err := <-answers; err != nil {
			t.Error(err)
		}
	}
}

// A message that is too long fails its own call and nothing else.
func TestOverlongMessage(t *testing.T) {
	c, _ := session(t, ServeOptions{})
	agent := agentpb.NewDRPCAgentClient(c)
	_, err := agent.UpdateStartup(t.Context(), &agentpb.UpdateStartupRequest{Startup: &agentpb.Startup{Version: strings.Repeat("x", wire.MaxMessage)}})
	if err == nil || strings.Contains(err.Error(), "semver") {
		t.Errorf("an overlong message was handled: %v", err)
	}
	if m, err := agent.GetManifest(t.Context(), &agentpb.GetManifestRequest{}); err != nil || m.AgentName != "demo" {
		t.Errorf("another call: %v, %v", m, err)
	}
}

// TestAbsentMethodIsAskedForOnce: a server says that it lacks a method by code 12, or, if it was never
// told of the method, by a text without a code. The session goes on without it.
func TestAbsentMethodIsAskedForOnce(t *testing.T) {
	agents := &agentService{}
	mux := drpcmux.New()
	if err := agentpb.DRPCRegisterAgent(mux, agents); err != nil {
		t.Fatal(err)
	}
	server, conn := net.Pipe()
	served := make(chan error, 1)
	go func() { served <- Serve(t.Context(), server, mux, ServeOptions{}) }()
	c, err := NewClient(conn)
	if err != nil {
		t.Fatal(err)
	}
	agent, tailnet := agentpb.NewDRPCAgentClient(c), tailnetpb.NewDRPCTailnetClient(c)
	for range 3 {
		if _, err := agent.UpdateStats(t.Context(), &agentpb.UpdateStatsRequest{}); !Unimplemented(err) || Code(err) != wire.CodeUnimplemented {
			t.Errorf("UpdateStats: %v", err)
		}
		if _, err := tailnet.RefreshResumeToken(t.Context(), &tailnetpb.RefreshResumeTokenRequest{}); !Unimplemented(err) || Code(err) != 0 {
			t.Errorf("RefreshResumeToken: %v", err)
		}
		if _, err := agent.UpdateStartup(t.Context(), &agentpb.UpdateStartupRequest{}); err == nil || Unimplemented(err) {
			t.Errorf("UpdateStartup: %v", err)
		}
	}
	if n := agents.stats.Load(); n != 1 {
		t.Errorf("asked %d times for a method that is not there, want once", n)
	}
	if _, err := agent.GetManifest(t.Context(), &agentpb.GetManifestRequest{}); err != nil {
		t.Errorf("the session did not go on: %v", err)
	}
	c.Close()
	if err := <-served; err != nil {
		t.Error(err)
	}
}
