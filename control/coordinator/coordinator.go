package coordinator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go"
	"golang.org/x/sync/errgroup"

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

var _ Stream = tailnetpb.DRPCTailnet_CoordinateStream(nil)

// Options of a [Coordinator]; the zero value is ready for use.
type Options struct {
	// Subject is where the replicas of one control server meet; empty means "berth.coordination".
	Subject string
	// Log gets peers that come and go and requests that are refused; nil discards.
	Log *slog.Logger
}

// Coordinator serves the coordination streams of one replica of a control server. Its methods may
// run at the same time.
type Coordinator struct {
	hub     *hub
	nc      *nats.Conn
	subject string
	seq     uint64 // of the last frame published; Run's
}

// New returns a coordinator that meets its replicas over nc, which it does not close.
func New(nc *nats.Conn, opts Options) (*Coordinator, error) {
	if nc == nil {
		return nil, errors.New("cannot coordinate: no NATS connection")
	}
	if opts.Subject == "" {
		opts.Subject = "berth.coordination"
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	// The name is of this process, not of this machine: after a restart its peers are new.
	return &Coordinator{hub: newHub(uuid.NewString(), opts.Log), nc: nc, subject: opts.Subject}, nil
}

// Node returns a copy of the latest node of a connected peer, on whichever replica; nil when there is none.
func (c *Coordinator) Node(id uuid.UUID) *tailnetpb.Node { return c.hub.node(id) }

// HasKey tells whether a node key is that of a connected peer, on whichever replica.
func (c *Coordinator) HasKey(key [32]byte) bool { return c.hub.hasKey(key) }

// Serve runs the stream of p until the peer leaves, is removed, or ctx is done. It closes the
// stream and returns when nothing uses it any more. The error says why the coordinator ended it,
// such as [ErrOverwritten]; it is nil when the peer left or ctx is done.
func (c *Coordinator) Serve(ctx context.Context, p Peer, s Stream) error {
	joined, err := c.hub.join(p)
	if err != nil {
		sendErr := s.Send(&tailnetpb.CoordinateResponse{Error: err.Error()})
		return errors.Join(err, sendErr, s.Close())
	}
	lost := func() { c.hub.leave(joined, kindLost, "lost", nil) }
	stop := context.AfterFunc(ctx, lost)
	defer stop()
	read := make(chan struct{})
	go func() {
		defer close(read)
		for {
			req, err := s.Recv()
			if err != nil {
				lost()
				return
			}
			if !c.hub.handle(joined, req) {
				return
			}
		}
	}()
	for resp := range joined.link.queue {
		if s.Send(resp) != nil {
			lost()
			break
		}
	}
	// A stream that cannot be closed properly is broken, and so closed.
	_ = s.Close()
	<-read
	return joined.link.cause
}

// How much may wait to be applied before NATS drops the newest, which a restatement then makes up for.
const (
	maxWaiting      = 64 << 10 // frames
	maxWaitingBytes = 64 << 20
)

// farewell bounds the last words to the other replicas.
const farewell = 2 * time.Second

// Run exchanges events with the other replicas until ctx is done, then ends all streams and
// returns nil. It is called once. Streams may be served before and while it runs.
func (c *Coordinator) Run(ctx context.Context) error {
	defer c.hub.close()
	sub, err := c.nc.SubscribeSync(c.subject)
	if err != nil {
		return fmt.Errorf("cannot meet the other replicas: %w", err)
	}
	defer sub.Unsubscribe()
	if err := sub.SetPendingLimits(maxWaiting, maxWaitingBytes); err != nil {
		return fmt.Errorf("cannot meet the other replicas: %w", err)
	}
	c.hub.announce()
	group, groupCtx := errgroup.WithContext(ctx)
	group.Go(func() error { return c.receive(groupCtx, sub) })
	group.Go(func() error { return c.publish(groupCtx) })
	if err := group.Wait(); ctx.Err() == nil {
		return err
	}
	c.hub.close()
	c.send(frame{Bye: true})
	if err := c.nc.FlushTimeout(farewell); err != nil {
		c.hub.log.Warn("cannot take leave of the other replicas", "error", err)
	}
	return nil
}

func (c *Coordinator) receive(ctx context.Context, sub *nats.Subscription) error {
	for {
		msg, err := sub.NextMsgWithContext(ctx)
		switch {
		case errors.Is(err, nats.ErrSlowConsumer):
			continue // the gap shows in the next frame
		case err != nil:
			return fmt.Errorf("cannot hear the other replicas: %w", err)
		}
		f, events, err := unpack(msg.Data)
		if err != nil {
			c.hub.log.Warn("frame of another replica ignored", "error", err)
			continue
		}
		c.hub.receive(f, events, time.Now())
	}
}

func (c *Coordinator) publish(ctx context.Context) error {
	ticker := time.NewTicker(heartbeat)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-c.hub.wake:
		case now := <-ticker.C:
			c.hub.tick(now, c.nc.IsConnected())
			c.send(frame{})
		}
		asking, events := c.hub.outgoing()
		for _, to := range asking {
			c.send(frame{Hello: true, To: to})
		}
		if len(events) == 0 {
			continue
		}
		frames, err := pack(events)
		if err != nil {
			return err
		}
		for _, f := range frames {
			c.send(f)
		}
	}
}

// send publishes a frame. One that is lost leaves a gap in the numbers, which the others notice.
func (c *Coordinator) send(f frame) {
	c.seq++
	f.From, f.Seq = c.hub.self, c.seq
	text, err := json.Marshal(f)
	if err == nil {
		err = c.nc.Publish(c.subject, text)
	}
	if err != nil {
		c.hub.log.Warn("cannot tell the other replicas", "error", err)
	}
}
