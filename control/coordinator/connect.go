package coordinator

import (
	"context"
	"io"
	"sync"

	"google.golang.org/protobuf/proto"

	"github.com/berthd/berth/wire/tailnetpb"
)

// Connect joins a node of this process as p. The stream lives until ctx is done, it is closed, or
// the coordinator ends it.
func (c *Coordinator) Connect(ctx context.Context, p Peer) *ClientStream {
	ctx, cancel := context.WithCancel(ctx)
	s := &ClientStream{
		ctx: ctx, cancel: cancel,
		requests:  make(chan *tailnetpb.CoordinateRequest),
		responses: make(chan *tailnetpb.CoordinateResponse),
		sent:      make(chan struct{}),
		ended:     make(chan struct{}),
		served:    make(chan struct{}),
	}
	go func() {
		defer close(s.served)
		defer cancel()
		// The peer reads the cause as the error of the last response.
		_ = c.Serve(ctx, p, &serverEnd{ClientStream: s})
	}()
	return s
}

// ClientStream is the client's end of a stream within this process. Messages are copied, as they
// would be on a network. Send and Recv may run at the same time.
type ClientStream struct {
	ctx       context.Context
	cancel    context.CancelFunc
	requests  chan *tailnetpb.CoordinateRequest
	responses chan *tailnetpb.CoordinateResponse
	sent      chan struct{} // closed when no requests will follow
	closeSend sync.Once
	ended     chan struct{} // closed when no responses will follow
	served    chan struct{} // closed when the coordinator is done with the stream
}

// Send gives a request to the coordinator; io.EOF when the stream is over.
func (s *ClientStream) Send(req *tailnetpb.CoordinateRequest) error {
	select {
	case s.requests <- proto.CloneOf(req):
		return nil
	case <-s.sent:
	case <-s.ended:
	case <-s.ctx.Done():
	}
	return io.EOF
}

// Recv returns the next response; io.EOF when the stream is over.
func (s *ClientStream) Recv() (*tailnetpb.CoordinateResponse, error) {
	select {
	case resp := <-s.responses:
		return proto.CloneOf(resp), nil
	case <-s.ended:
	case <-s.ctx.Done():
	}
	return nil, io.EOF
}

// CloseSend says that no requests will follow.
func (s *ClientStream) CloseSend() error {
	s.closeSend.Do(func() { close(s.sent) })
	return nil
}

// Close ends the stream and waits until the coordinator is done with it.
func (s *ClientStream) Close() error {
	s.cancel()
	<-s.served
	return nil
}

// serverEnd is the coordinator's end.
type serverEnd struct {
	*ClientStream
	close sync.Once
}

func (s *serverEnd) Send(resp *tailnetpb.CoordinateResponse) error {
	select {
	case s.responses <- resp:
		return nil
	case <-s.ctx.Done():
		return s.ctx.Err()
	}
}

func (s *serverEnd) Recv() (*tailnetpb.CoordinateRequest, error) {
	select {
	case req := <-s.requests:
		return req, nil
	case <-s.sent:
	case <-s.ended:
	case <-s.ctx.Done():
	}
	return nil, io.EOF
}

func (s *serverEnd) Close() error {
	s.close.Do(func() { close(s.ended) })
	return nil
}
