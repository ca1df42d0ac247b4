package tailnet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"

	"github.com/berthd/berth/wire/tailnetpb"
)

// Stream is one coordination stream, seen from a node; a dRPC coordinate client
// satisfies it. Send and Recv may run at the same time, and Close ends both.
type Stream interface {
	Send(*tailnetpb.CoordinateRequest) error
	Recv() (*tailnetpb.CoordinateResponse, error)
	CloseSend() error
	Close() error
}

// goodbyeTimeout bounds how long a stream is kept for the server to take in
// that we leave.
const goodbyeTimeout = time.Second

// notReadyPrefix begins the error with which a coordinator turns down an
// acknowledgement; it changes nothing.
const notReadyPrefix = "ready for handshake error"

// CoordinateAgent serves one coordination stream as an agent: it publishes the
// node, installs whoever the coordinator names, and tells each that it is
// installed. It blocks until the stream ends, which is an error, or ctx is
// done, which is none. Peers outlive the stream, up to 15 minutes past their
// last handshake.
func (n *Node) CoordinateAgent(ctx context.Context, s Stream) error {
	return n.coordinate(ctx, s, &coordination{node: n, stream: s, acks: true})
}

// CoordinateClient serves one coordination stream as a client: it asks for a
// tunnel to each destination and publishes the node. A destination can be
// reached once it says that it knows this node, or after five seconds. It
// blocks and ends as [Node.CoordinateAgent] does; several streams may run at once.
func (n *Node) CoordinateClient(ctx context.Context, s Stream, destinations ...uuid.UUID) error {
	c := &coordination{node: n, stream: s}
	for _, d := range destinations {
		n.peers.wish(d)
		defer n.peers.unwish(d)
		add := &tailnetpb.CoordinateRequest{AddTunnel: &tailnetpb.CoordinateRequest_Tunnel{Id: d[:]}}
		if err := c.send(add); err != nil {
			s.Close()
			return fmt.Errorf("cannot ask for a tunnel to %s: %w", d, err)
		}
	}
	return n.coordinate(ctx, s, c)
}

// coordination is one run over one stream.
type coordination struct {
	node   *Node
	stream Stream
	acks   bool

	sendMu sync.Mutex
	seen   map[uuid.UUID]struct{} // of the receiving goroutine until it ends
}

func (c *coordination) send(r *tailnetpb.CoordinateRequest) error {
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	return c.stream.Send(r)
}

func (n *Node) coordinate(ctx context.Context, s Stream, c *coordination) error {
	c.seen = make(map[uuid.UUID]struct{})
	ended := make(chan error, 1)
	go func() { ended <- c.receive() }()
	publish := make(chan error, 1)
	stop := make(chan struct{})
	go func() { publish <- c.publish(stop) }()

	var err error
	var received bool
	select {
	case <-ctx.Done():
		received = c.leave(ended)
	case <-n.ctx.Done():
		received = c.leave(ended)
	case err = <-ended:
		received = true
	case err = <-publish:
		publish <- nil
	}
	close(stop)
	s.Close() // unblocks what still sends or receives
	<-publish
	if !received {
		<-ended
	}
	for _, id := range slices.Collect(maps.Keys(c.seen)) {
		n.peers.lose(id)
	}
	if ctx.Err() != nil || n.ctx.Err() != nil {
		return nil
	}
	if errors.Is(err, io.EOF) || err == nil {
		err = errors.New("the server ended the stream")
	}
	return fmt.Errorf("cannot go on coordinating: %w", err)
}

// leave says goodbye and gives the server a moment to hear it. It reports
// whether the receiving goroutine has ended.
func (c *coordination) leave(ended <-chan error) bool {
	limit := time.NewTimer(goodbyeTimeout)
	defer limit.Stop()
	sent := make(chan error, 1)
	go func() {
		sent <- c.send(&tailnetpb.CoordinateRequest{Disconnect: &tailnetpb.CoordinateRequest_Disconnect{}})
	}()
	select {
	case err := <-sent:
		if err != nil {
			return false
		}
	case <-limit.C:
		return false
	}
	select {
	case <-ended:
		return true
	case <-limit.C:
		return false
	}
}

// publish sends the node now and at each change, while it has a home.
func (c *coordination) publish(stop <-chan struct{}) error {
	var last *tailnetpb.Node
	for {
		changed := c.node.wait()
		self := c.node.Self()
		if self.PreferredDerp != 0 && !sameNode(last, self) {
			last = self
			err := c.send(&tailnetpb.CoordinateRequest{UpdateSelf: &tailnetpb.CoordinateRequest_UpdateSelf{Node: self}})
			if err != nil {
				return fmt.Errorf("cannot publish the node: %w", err)
			}
		}
		select {
		case <-stop:
			return nil
		case <-changed:
		}
	}
}

// sameNode compares what peers act on: the time and the latencies of the day
// are not worth an update of their own.
func sameNode(a, b *tailnetpb.Node) bool {
	if a == nil {
		return false
	}
	a, b = proto.CloneOf(a), proto.CloneOf(b)
	a.AsOf, a.DerpLatency = b.AsOf, b.DerpLatency
	return proto.Equal(a, b)
}

// receive applies peer updates until the stream ends.
func (c *coordination) receive() error {
	for {
		resp, err := c.stream.Recv()
		if err != nil {
			return err
		}
		if e := resp.GetError(); strings.HasPrefix(e, notReadyPrefix) {
			c.node.log.Warn("coordinator turned down an acknowledgement", "err", e)
		} else if e != "" {
			// If it is fatal the stream ends next.
			c.node.log.Error("coordinator reported an error", "err", e)
		}
		var installed []*tailnetpb.CoordinateRequest_ReadyForHandshake
		for _, u := range resp.GetPeerUpdates() {
			if c.apply(u) {
				installed = append(installed, &tailnetpb.CoordinateRequest_ReadyForHandshake{Id: u.GetId()})
			}
		}
		if c.acks && len(installed) > 0 {
			if err := c.send(&tailnetpb.CoordinateRequest{ReadyForHandshake: installed}); err != nil {
				return fmt.Errorf("cannot acknowledge peers: %w", err)
			}
		}
	}
}

// apply takes in one update. It reports whether it is to be acknowledged: each
// node is, even one that is of no use yet, or its owner would wait in vain.
func (c *coordination) apply(u *tailnetpb.CoordinateResponse_PeerUpdate) bool {
	id, err := uuid.FromBytes(u.GetId())
	if err != nil {
		c.node.log.Warn("cannot read a peer update", "err", err)
		return false
	}
	log := c.node.log.With("peer", id)
	switch u.GetKind() {
	case tailnetpb.CoordinateResponse_PeerUpdate_NODE:
		d, err := decodeNode(u.GetNode())
		if err == nil {
			err = c.node.accepts(d)
		}
		if err != nil {
			if !errors.Is(err, errNoHome) {
				log.Warn("cannot use a peer's node", "err", err)
			}
			return true
		}
		log.Debug("peer updated", "reason", u.GetReason(), "home", d.home, "endpoints", len(d.endpoints))
		c.seen[id] = struct{}{}
		c.node.peers.update(id, d)
		return true
	case tailnetpb.CoordinateResponse_PeerUpdate_READY_FOR_HANDSHAKE:
		c.node.peers.ready(id)
	case tailnetpb.CoordinateResponse_PeerUpdate_LOST:
		log.Debug("peer lost", "reason", u.GetReason())
		c.node.peers.lose(id)
	case tailnetpb.CoordinateResponse_PeerUpdate_DISCONNECTED:
		log.Debug("peer left", "reason", u.GetReason())
		delete(c.seen, id)
		c.node.peers.remove(id)
	default:
		log.Warn("peer update of an unknown kind", "kind", int32(u.GetKind()))
	}
	return false
}

// accepts refuses a peer that claims to be this node.
func (n *Node) accepts(d *decodedNode) error {
	if d.key == n.key.Public() {
		return errors.New("it has this node's key")
	}
	if overlap(d.route, n.cfg.Prefixes) {
		return errors.New("it has this node's address")
	}
	return nil
}
