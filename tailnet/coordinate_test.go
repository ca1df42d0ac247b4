package tailnet

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/tailnetpb"
)

// scripted is a coordination stream whose other end is the test.
type scripted struct {
	*hubStream
	sent chan *tailnetpb.CoordinateRequest
}

func newScripted() *scripted {
	return &scripted{hubStream: newHub().join(uuid.New()), sent: make(chan *tailnetpb.CoordinateRequest, 64)}
}

func (s *scripted) Send(r *tailnetpb.CoordinateRequest) error {
	s.sent <- r
	if r.GetDisconnect() != nil {
		s.Close()
	}
	return nil
}

func (s *scripted) next(t *testing.T, what string) *tailnetpb.CoordinateRequest {
	t.Helper()
	select {
	case r := <-s.sent:
		return r
	case <-time.After(5 * time.Second):
		t.Fatalf("the node never sent %s", what)
		return nil
	}
}

func bareNode(t *testing.T) *testNode {
	t.Helper()
	id := uuid.New()
	n, err := New(Config{Prefixes: wire.AgentPrefixes(id), Log: testLog(t, "bare")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return &testNode{Node: n, id: id}
}

const (
	kindNode  = tailnetpb.CoordinateResponse_PeerUpdate_NODE
	kindLost  = tailnetpb.CoordinateResponse_PeerUpdate_LOST
	kindGone  = tailnetpb.CoordinateResponse_PeerUpdate_DISCONNECTED
	kindReady = tailnetpb.CoordinateResponse_PeerUpdate_READY_FOR_HANDSHAKE
)

func TestAgentAcknowledgesEveryNode(t *testing.T) {
	n := bareNode(t)
	s := newScripted()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- n.CoordinateAgent(ctx, s) }()

	homeless, broken, mine := goodNode(), goodNode(), goodNode()
	homeless.PreferredDerp = 0
	broken.Key = []byte("np")
	mine.AllowedIps = []string{n.cfg.Prefixes[0].String()}
	good := goodNode()
	m := new(tailnetpb.CoordinateResponse)
	ids := make([]uuid.UUID, 4)
	for i, node := range []*tailnetpb.Node{good, homeless, broken, mine} {
		ids[i] = uuid.New()
		m.PeerUpdates = append(m.PeerUpdates, update(ids[i], kindNode, node).PeerUpdates...)
	}
	m.PeerUpdates = append(m.PeerUpdates, &tailnetpb.CoordinateResponse_PeerUpdate{Id: []byte("short"), Kind: kindNode, Node: goodNode()})
	m.Error = "an error beside the updates does not void them"
	s.out <- m
	acks := s.next(t, "an acknowledgement").GetReadyForHandshake()
	if len(acks) != len(ids) {
		t.Fatalf("%d acknowledgements, want %d", len(acks), len(ids))
	}
	for i, ack := range acks {
		if uuid.UUID(ack.GetId()) != ids[i] {
			t.Errorf("acknowledgement %d is for %x", i, ack.GetId())
		}
	}
	if p := n.Peers(); len(p) != 1 || p[0].ID != ids[0] {
		t.Errorf("installed %+v", p)
	}
	s.out <- update(ids[0], kindNode, good) // again
	if acks := s.next(t, "an acknowledgement").GetReadyForHandshake(); len(acks) != 1 {
		t.Errorf("a repeated node was acknowledged %d times", len(acks))
	}

	cancel()
	if s.next(t, "a goodbye").GetDisconnect() == nil {
		t.Error("the node left without a goodbye")
	}
	if err := <-ended; err != nil {
		t.Errorf("cancelled coordination: %v", err)
	}
}

func TestPeerLifeCycle(t *testing.T) {
	n := bareNode(t)
	s := newScripted()
	ended := make(chan error, 1)
	go func() { ended <- n.CoordinateAgent(context.Background(), s) }()
	a, b, c := uuid.New(), uuid.New(), uuid.New()
	first := goodNode()
	one := func(addr string) *tailnetpb.Node {
		m := goodNode()
		m.AllowedIps = []string{addr}
		return m
	}
	s.out <- update(a, kindNode, first)
	s.out <- update(b, kindNode, one("fd7a:115c:a1e0::b/128"))
	awaitPeers(t, n, 2)

	s.out <- update(b, kindGone, nil)
	awaitPeers(t, n, 1)

	// Never a handshake: lost is gone.
	s.out <- update(a, kindLost, nil)
	awaitPeers(t, n, 0)

	// The same node under another id replaces the old one.
	s.out <- update(a, kindNode, first)
	awaitPeers(t, n, 1)
	s.out <- update(c, kindNode, first)
	awaitTable(t, n, func(*peerIndex) bool { p := n.Peers(); return len(p) == 1 && p[0].ID == c })

	// So does a new key at the same id.
	s.out <- update(c, kindNode, goodNode())
	awaitTable(t, n, func(i *peerIndex) bool {
		d, err := decodeNode(first)
		if err != nil {
			t.Fatal(err)
		}
		_, old := i.byKey[d.key]
		return len(i.byKey) == 1 && !old
	})

	// A stream that ends unexpectedly loses everyone it named.
	s.Close()
	if err := <-ended; err == nil || !strings.Contains(err.Error(), "ended the stream") {
		t.Errorf("a broken stream ended with %v", err)
	}
	awaitPeers(t, n, 0)
}

func TestClientHoldsBackUntilReady(t *testing.T) {
	n := bareNode(t)
	s := newScripted()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ended := make(chan error, 1)
	agent := uuid.New()
	go func() { ended <- n.CoordinateClient(ctx, s, agent) }()
	if tunnel := s.next(t, "a tunnel").GetAddTunnel(); tunnel == nil || uuid.UUID(tunnel.GetId()) != agent {
		t.Fatalf("asked for %v", tunnel)
	}
	other := goodNode()
	other.AllowedIps = []string{"fd7a:115c:a1e0::c/128"}
	s.out <- update(agent, kindNode, goodNode())
	s.out <- update(uuid.New(), kindNode, other)
	awaitPeers(t, n, 1) // the other one, which nobody waits for
	if p := n.Peers(); p[0].ID == agent {
		t.Error("a destination was installed before it was ready")
	}
	s.out <- update(agent, kindReady, nil)
	awaitPeers(t, n, 2)

	// Once ready, always ready.
	s.out <- update(agent, kindNode, goodNode())
	s.out <- update(uuid.New(), kindLost, nil)
	awaitPeers(t, n, 2)
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestClientGivesUpWaitingForReady(t *testing.T) {
	n := bareNode(t)
	s := newScripted()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ended := make(chan error, 1)
	agent := uuid.New()
	start := time.Now()
	go func() { ended <- n.CoordinateClient(ctx, s, agent) }()
	s.out <- update(agent, kindNode, goodNode())
	awaitPeers(t, n, 1)
	if d := time.Since(start); d < readyWithin {
		t.Errorf("installed after %v without an acknowledgement", d)
	}
	cancel()
	<-ended
}

// TestWishOutlivesATakenAddress: another peer may claim a destination's address, and the destination is still wanted.
func TestWishOutlivesATakenAddress(t *testing.T) {
	n := bareNode(t)
	wanted, other := uuid.New(), uuid.New()
	n.peers.wish(wanted)
	for _, id := range []uuid.UUID{wanted, other, wanted} {
		d, err := decodeNode(goodNode())
		if err != nil {
			t.Fatal(err)
		}
		n.peers.update(id, d)
	}
	n.peers.mu.Lock()
	defer n.peers.mu.Unlock()
	if p := n.peers.byID[wanted]; p == nil || !p.destination || !p.held {
		t.Errorf("the destination is %+v after its address was taken and given back", p)
	}
}
