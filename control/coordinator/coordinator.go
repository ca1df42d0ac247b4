package coordinator

import (
	"context"
	"errors"
	"log/slog"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go"

	"github.com/berthd/berth/wire/tailnetpb"
)

// Peer is the authenticated end of a coordination stream.
type Peer struct {
	// ID is the agent's id, or the random id of a client. It never comes from the peer itself.
	ID uuid.UUID
	// Auth says what the peer may do.
	Auth Auth
}

// Stream is the server's end of a coordination stream; [tailnetpb.DRPCTailnet_CoordinateStream] is one.
// Send must fail within bounded time when the peer does not read. Close must make Recv return.
type Stream interface {
	Send(*tailnetpb.CoordinateResponse) error
	Recv() (*tailnetpb.CoordinateRequest, error)
	Close() error
}

// Options of a [Coordinator]; the zero value is ready for use.
type Options struct {
	// Subject is where replicas of one control server meet; empty means "berth.coordination".
	Subject string
	// Log gets peers that come and go and requests that are refused; nil discards.
	Log *slog.Logger
}

// Coordinator serves the coordination streams of one replica of a control server.
type Coordinator struct{}

// ErrClosed is returned to streams that meet a coordinator that stopped.
var ErrClosed = errors.New("coordinator closed")

// New returns a coordinator that meets its replicas over nc, which it does not close.
func New(nc *nats.Conn, opts Options) (*Coordinator, error) {
	return nil, errors.New("cannot coordinate yet")
}

// Run exchanges events with the other replicas until ctx is done, then ends all streams and
// returns nil. It is called once.
func (c *Coordinator) Run(ctx context.Context) error { return ErrClosed }

// Serve runs the stream of p until the peer leaves, is removed, or ctx is done. It closes the
// stream before it returns. The error says why the coordinator ended it; nil when the peer left.
func (c *Coordinator) Serve(ctx context.Context, p Peer, s Stream) error { return ErrClosed }

// Connect joins a node of this process as p. The stream ends with ctx or by its Close.
func (c *Coordinator) Connect(ctx context.Context, p Peer) *ClientStream { return nil }

// Node returns a copy of the latest node of a connected peer, on whichever replica; nil when there is none.
func (c *Coordinator) Node(id uuid.UUID) *tailnetpb.Node { return nil }

// ClientStream is the client's end of a stream within this process.
type ClientStream struct{}

// Send gives a request to the coordinator.
func (*ClientStream) Send(*tailnetpb.CoordinateRequest) error { return ErrClosed }

// Recv returns the next response, io.EOF when the coordinator ended the stream.
func (*ClientStream) Recv() (*tailnetpb.CoordinateResponse, error) { return nil, ErrClosed }

// CloseSend says that no requests will follow.
func (*ClientStream) CloseSend() error { return nil }

// Close ends the stream.
func (*ClientStream) Close() error { return nil }
