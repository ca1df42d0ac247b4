package rpc

import (
	"context"
	"io"
	"net"
	"testing"
	"time"

	"storj.io/drpc/drpcmux"

	"github.com/berthd/berth/wire/tailnetpb"
)

// slowToClose is a connection that takes its time to close, as a WebSocket does when its other side is
// gone. Until then nothing comes over it.
type slowToClose struct {
	net.Conn
	closing chan struct{}
	closed  chan struct{}
}

func (c *slowToClose) Close() error {
	close(c.closing)
	<-c.closed
	return c.Conn.Close()
}

// Calls end with their session, on either side, and not only when its connection is closed at last.
func TestCallsEndBeforeTheConnectionIsClosed(t *testing.T) {
	for _, side := range []string{"caller", "server"} {
		t.Run(side, func(t *testing.T) {
			here, there := net.Pipe()
			slow := &slowToClose{there, make(chan struct{}), make(chan struct{})}
			service := &tailnetService{}
			mux := drpcmux.New()
			if err := tailnetpb.DRPCRegisterTailnet(mux, service); err != nil {
				t.Fatal(err)
			}
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			mine, theirs := net.Conn(here), net.Conn(slow)
			if side == "caller" {
				mine, theirs = slow, here
			}
			served := make(chan error, 1)
			go func() { served <- Serve(ctx, theirs, mux, ServeOptions{}) }()
			c, err := NewClient(mine)
			if err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 10)
			for range cap(ended) {
				s, err := tailnetpb.NewDRPCTailnetClient(c).Coordinate(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if err := s.Send(&tailnetpb.CoordinateRequest{AddTunnel: &tailnetpb.CoordinateRequest_Tunnel{Id: []byte("x")}}); err != nil {
					t.Fatal(err)
				}
				if _, err := s.Recv(); err != nil {
					t.Fatal(err)
				}
				go func() { _, err := s.Recv(); ended <- err }()
			}
			eventually(t, "all calls are served", func() bool { return int(service.serving.Load()) == cap(ended) })
			if side == "caller" {
				go c.Close()
			} else {
				go stop()
			}
			<-slow.closing
			if side == "caller" {
				for range cap(ended) {
					if err := <-ended; err == nil {
						t.Error("a call went on")
					}
				}
			} else {
				eventually(t, "all calls have ended", func() bool { return service.serving.Load() == 0 })
			}
			close(slow.closed)
			c.Close()
			if err := <-served; err != nil {
				t.Error(err)
			}
			io.Copy(io.Discard, here)
		})
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for limit := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("%s: not in %v", what, patience)
		}
	}
}
