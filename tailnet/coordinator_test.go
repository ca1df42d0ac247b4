package tailnet

import (
	"io"
	"maps"
	"slices"
	"sync"

	"github.com/google/uuid"

	"github.com/berthd/berth/wire/tailnetpb"
)

// hub is the least coordinator that two nodes need: everyone sees everyone,
// and acknowledgements are passed on.
type hub struct {
	mu    sync.Mutex
	peers map[uuid.UUID]*hubStream
	nodes map[uuid.UUID]*tailnetpb.Node
}

func newHub() *hub {
	return &hub{peers: make(map[uuid.UUID]*hubStream), nodes: make(map[uuid.UUID]*tailnetpb.Node)}
}

// hubStream is a node's end of a stream to the hub.
type hubStream struct {
	hub  *hub
	id   uuid.UUID
	out  chan *tailnetpb.CoordinateResponse
	done chan struct{}
	once sync.Once
}

func (h *hub) join(id uuid.UUID) *hubStream {
	s := &hubStream{hub: h, id: id, out: make(chan *tailnetpb.CoordinateResponse, 512), done: make(chan struct{})}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.peers[id] = s
	for _, other := range slices.Collect(maps.Keys(h.nodes)) {
		if other != id {
			s.out <- nodeUpdate(other, h.nodes[other])
		}
	}
	return s
}

func nodeUpdate(id uuid.UUID, n *tailnetpb.Node) *tailnetpb.CoordinateResponse {
	return update(id, tailnetpb.CoordinateResponse_PeerUpdate_NODE, n)
}

func update(id uuid.UUID, kind tailnetpb.CoordinateResponse_PeerUpdate_Kind, n *tailnetpb.Node) *tailnetpb.CoordinateResponse {
	return &tailnetpb.CoordinateResponse{PeerUpdates: []*tailnetpb.CoordinateResponse_PeerUpdate{{Id: id[:], Kind: kind, Node: n}}}
}

func (h *hub) broadcast(from uuid.UUID, m *tailnetpb.CoordinateResponse) {
	for id, p := range h.peers {
		if id != from {
			p.out <- m
		}
	}
}

func (s *hubStream) Send(r *tailnetpb.CoordinateRequest) error {
	select {
	case <-s.done:
		return io.ErrClosedPipe
	default:
	}
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	if u := r.GetUpdateSelf(); u != nil {
		s.hub.nodes[s.id] = u.GetNode()
		s.hub.broadcast(s.id, nodeUpdate(s.id, u.GetNode()))
	}
	if r.GetDisconnect() != nil {
		delete(s.hub.nodes, s.id)
		delete(s.hub.peers, s.id)
		s.hub.broadcast(s.id, update(s.id, tailnetpb.CoordinateResponse_PeerUpdate_DISCONNECTED, nil))
		s.Close()
	}
	for _, ready := range r.GetReadyForHandshake() {
		if p := s.hub.peers[uuid.UUID(ready.GetId())]; p != nil {
			p.out <- update(s.id, tailnetpb.CoordinateResponse_PeerUpdate_READY_FOR_HANDSHAKE, nil)
		}
	}
	return nil
}

func (s *hubStream) Recv() (*tailnetpb.CoordinateResponse, error) {
	select {
	case m := <-s.out:
		return m, nil
	case <-s.done:
		return nil, io.EOF
	}
}

func (s *hubStream) CloseSend() error { return nil }

func (s *hubStream) Close() error {
	s.once.Do(func() { close(s.done) })
	return nil
}

var _ Stream = tailnetpb.DRPCTailnet_CoordinateClient(nil)
