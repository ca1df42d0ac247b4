package tailnet

import (
	"context"
	"errors"
	"net"
	"net/netip"

	"github.com/google/uuid"

	"github.com/berthd/berth/wire/tailnetpb"
)

// Node is one address on the network.
type Node struct{}

var errSkeleton = errors.New("cannot run: the tailnet node is being written")

// New makes a node.
func New(cfg Config) (*Node, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	return nil, errSkeleton
}

// Stream is one coordination stream, seen from a node.
// A dRPC coordinate client satisfies it.
type Stream interface {
	Send(*tailnetpb.CoordinateRequest) error
	Recv() (*tailnetpb.CoordinateResponse, error)
	CloseSend() error
	Close() error
}

// Close stops the node.
func (n *Node) Close() error { return errSkeleton }

// SetDERPMap replaces the relay map.
func (n *Node) SetDERPMap(*tailnetpb.DERPMap) error { return errSkeleton }

// SetRelayOnly switches direct paths off or on.
func (n *Node) SetRelayOnly(bool) {}

// Listen accepts TCP connections to a port of the node's addresses.
func (n *Node) Listen(port uint16) (net.Listener, error) { return nil, errSkeleton }

// DialTCP connects to a peer.
func (n *Node) DialTCP(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	return nil, errSkeleton
}

// DialUDP connects to a peer.
func (n *Node) DialUDP(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	return nil, errSkeleton
}

// Ping measures the way to a peer.
func (n *Node) Ping(ctx context.Context, to netip.Addr) (Ping, error) { return Ping{}, errSkeleton }

// AwaitReachable waits until packets reach a peer and come back.
func (n *Node) AwaitReachable(ctx context.Context, to netip.Addr) error { return errSkeleton }

// Self is what the node publishes.
func (n *Node) Self() *tailnetpb.Node { return nil }

// Peers lists the peers.
func (n *Node) Peers() []PeerStatus { return nil }

// Home is the relay region the node can be reached through, zero for none yet.
func (n *Node) Home() int { return 0 }

// Stats counts traffic since the call before.
func (n *Node) Stats() Stats { return Stats{} }

// CoordinateAgent serves a coordination stream as an agent.
func (n *Node) CoordinateAgent(ctx context.Context, s Stream) error { return errSkeleton }

// CoordinateClient serves a coordination stream as a client of destinations.
func (n *Node) CoordinateClient(ctx context.Context, s Stream, destinations ...uuid.UUID) error {
	return errSkeleton
}
