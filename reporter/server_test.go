package reporter

import (
	"context"
	"errors"
	"net"
	"os"
	"slices"
	"sync"
	"testing"

	"github.com/google/uuid"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/types/known/emptypb"
	"storj.io/drpc/drpcmux"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
	"github.com/berthd/berth/wire/rpc"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(childDir); dir != "" {
		if kept := os.Getenv(childKept); kept != "" {
			takeUntilKilled(dir, os.Getenv(childServer), kept)
		}
		writeUntilKilled(dir, os.Getenv(childServer), os.Getenv(childRound))
		return
	}
	goleak.VerifyTestMain(m)
}

// server is a control server: it stores what it is sent, and log lines only once.
type server struct {
	agentpb.DRPCAgentUnimplementedServer
	addr string

	mu          sync.Mutex
	cond        *sync.Cond
	links       []net.Conn
	lines       map[uuid.UUID][]string
	levels      map[uuid.UUID][]agentpb.Log_Level
	last        map[stream]uint64
	batches     int
	lifecycle   []agentpb.Lifecycle_State
	statuses    []string
	metadata    []*agentpb.Metadata
	health      [][]agentpb.AppHealth
	windows     [][]*agentpb.PushResourcesMonitoringUsageRequest_Datapoint
	timings     int
	connections int

	// beforeLogs and afterLogs may fail a call before or after its lines are stored.
	beforeLogs, afterLogs func() error
	limit                 int // of batches; 0: none
	lifecycleErr          error
	statusErr             error
	connectionErr         error
	metadataErr           error

	lifecycleRefused, metadataRefused int
}

func newServer(t *testing.T) *server {
	t.Helper()
	s := &server{lines: map[uuid.UUID][]string{}, levels: map[uuid.UUID][]agentpb.Log_Level{}, last: map[stream]uint64{}}
	s.cond = sync.NewCond(&s.mu)
	mux := drpcmux.New()
	if err := agentpb.DRPCRegisterAgent(mux, s); err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.addr = listener.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	all.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			s.mu.Lock()
			s.links = append(s.links, conn)
			s.mu.Unlock()
			all.Go(func() { _ = rpc.Serve(ctx, conn, mux, rpc.ServeOptions{}) })
		}
	})
	t.Cleanup(func() { cancel(); listener.Close(); all.Wait() })
	return s
}

// cut ends all links.
func (s *server) cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, conn := range s.links {
		conn.Close()
	}
	s.links = nil
}

// await waits until what was stored satisfies done; the test's own deadline bounds it.
func (s *server) await(done func() bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for !done() {
		s.cond.Wait()
	}
}

func (s *server) locked(f func() error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer s.cond.Broadcast()
	return f()
}

func (s *server) BatchCreateLogs(_ context.Context, req *agentpb.BatchCreateLogsRequest) (*agentpb.BatchCreateLogsResponse, error) {
	response := &agentpb.BatchCreateLogsResponse{}
	return response, s.locked(func() error {
		if s.beforeLogs != nil {
			if err := s.beforeLogs(); err != nil {
				return err
			}
		}
		source, err := uuid.FromBytes(req.GetLogSourceId())
		if err != nil {
			return err
		}
		spool, err := uuid.FromBytes(req.GetBerthSpoolId())
		if err != nil {
			return err
		}
		s.batches++
		if s.limit > 0 && s.batches > s.limit {
			response.LogLimitExceeded = true
			return nil
		}
		key, size := stream{spool, source}, 0
		for i, l := range req.GetLogs() {
			size += len(l.GetOutput()) + wire.LogEntryOverhead
			sequence := req.GetBerthFirstSequence() + uint64(i)
			if sequence <= s.last[key] {
				continue
			}
			s.last[key] = sequence
			s.lines[source] = append(s.lines[source], l.GetOutput())
			s.levels[source] = append(s.levels[source], l.GetLevel())
		}
		if size > wire.MaxLogBatch {
			return errors.New("batch too large")
		}
		if s.afterLogs != nil {
			return s.afterLogs()
		}
		return nil
	})
}

func (s *server) UpdateLifecycle(_ context.Context, req *agentpb.UpdateLifecycleRequest) (*agentpb.Lifecycle, error) {
	return req.GetLifecycle(), s.locked(func() error {
		if s.lifecycleErr != nil {
			s.lifecycleRefused++
			return s.lifecycleErr
		}
		s.lifecycle = append(s.lifecycle, req.GetLifecycle().GetState())
		return nil
	})
}

func (s *server) UpdateAppStatus(_ context.Context, req *agentpb.UpdateAppStatusRequest) (*agentpb.UpdateAppStatusResponse, error) {
	return &agentpb.UpdateAppStatusResponse{}, s.locked(func() error {
		if s.statusErr != nil {
			return s.statusErr
		}
		s.statuses = append(s.statuses, req.GetSlug()+":"+req.GetMessage())
		return nil
	})
}

func (s *server) BatchUpdateMetadata(_ context.Context, req *agentpb.BatchUpdateMetadataRequest) (*agentpb.BatchUpdateMetadataResponse, error) {
	return &agentpb.BatchUpdateMetadataResponse{}, s.locked(func() error {
		if s.metadataErr != nil {
			s.metadataRefused++
			return s.metadataErr
		}
		s.metadata = append(s.metadata, req.GetMetadata()...)
		return nil
	})
}

func (s *server) BatchUpdateAppHealths(_ context.Context, req *agentpb.BatchUpdateAppHealthRequest) (*agentpb.BatchUpdateAppHealthResponse, error) {
	return &agentpb.BatchUpdateAppHealthResponse{}, s.locked(func() error {
		var all []agentpb.AppHealth
		for _, u := range req.GetUpdates() {
			all = append(all, u.GetHealth())
		}
		s.health = append(s.health, all)
		return nil
	})
}

func (s *server) PushResourcesMonitoringUsage(_ context.Context, req *agentpb.PushResourcesMonitoringUsageRequest) (*agentpb.PushResourcesMonitoringUsageResponse, error) {
	return &agentpb.PushResourcesMonitoringUsageResponse{}, s.locked(func() error {
		s.windows = append(s.windows, req.GetDatapoints())
		return nil
	})
}

func (s *server) ScriptCompleted(context.Context, *agentpb.WorkspaceAgentScriptCompletedRequest) (*agentpb.WorkspaceAgentScriptCompletedResponse, error) {
	return &agentpb.WorkspaceAgentScriptCompletedResponse{}, s.locked(func() error { s.timings++; return nil })
}

func (s *server) ReportConnection(context.Context, *agentpb.ReportConnectionRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, s.locked(func() error {
		s.connections++
		return s.connectionErr
	})
}

// stored returns the lines of a source.
func (s *server) stored(source uuid.UUID) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.lines[source])
}

// dial opens a link to the server at addr.
func dial(addr string) (*rpc.Client, error) {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		return nil, err
	}
	return rpc.NewClient(conn)
}

// linked keeps a link up for r, redialling when it ends, until stop is called.
func linked(r *Reporter, addr string, version wire.Version) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	all.Go(func() {
		for ctx.Err() == nil {
			client, err := dial(addr)
			if err != nil {
				continue
			}
			linkCtx, linkCancel := context.WithCancel(ctx)
			unwatch := context.AfterFunc(ctx, func() { client.Close() })
			all.Go(func() { <-client.Closed(); linkCancel() })
			r.Deliver(linkCtx, agentpb.NewDRPCAgentClient(client), version)
			unwatch()
			client.Close()
		}
	})
	return func() { cancel(); all.Wait() }
}

func link1(t *testing.T, r *Reporter, s *server, version wire.Version) {
	t.Helper()
	t.Cleanup(linked(r, s.addr, version))
}

func open(t *testing.T, cfg Config) *Reporter {
	t.Helper()
	r, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}
