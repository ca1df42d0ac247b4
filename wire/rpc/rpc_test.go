package rpc

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"storj.io/drpc/drpcmux"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
	"github.com/berthd/berth/wire/tailnetpb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type agentService struct {
	agentpb.DRPCAgentUnimplementedServer
}

func (*agentService) GetManifest(context.Context, *agentpb.GetManifestRequest) (*agentpb.Manifest, error) {
	return &agentpb.Manifest{AgentName: "demo"}, nil
}

func (*agentService) UpdateStartup(context.Context, *agentpb.UpdateStartupRequest) (*agentpb.Startup, error) {
	return nil, errors.New("invalid agent semver version \"x\"")
}

type tailnetService struct {
	tailnetpb.DRPCTailnetUnimplementedServer
}

func (*tailnetService) Coordinate(s tailnetpb.DRPCTailnet_CoordinateStream) error {
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
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	mux := drpcmux.New()
	if err := agentpb.DRPCRegisterAgent(mux, &agentService{}); err != nil {
		t.Fatal(err)
	}
	if err := tailnetpb.DRPCRegisterTailnet(mux, &tailnetService{}); err != nil {
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

// A caller that takes everything and answers nothing is given up within the two limits together.
func TestDeadCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server := net.Pipe()
		go io.Copy(io.Discard, client)
		start := time.Now()
		err := Serve(t.Context(), server, drpcmux.New(), ServeOptions{PingInterval: wire.PingInterval, PingTimeout: wire.PingTimeout})
		if err != nil && !errors.Is(err, ErrDead) {
			t.Errorf("Serve = %v, want ErrDead", err)
		}
		if d := time.Since(start); d > wire.PingInterval+wire.PingTimeout {
			t.Errorf("gave up after %v", d)
		}
		client.Close()
	})
}
