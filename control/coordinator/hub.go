package coordinator

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/tailnetpb"
)

// Limits. A node of today has 1 to 2 KiB and one or two addresses.
const (
	maxNode      = 64 << 10 // bytes
	maxAddresses = 32
	// maxPending events wait for NATS; beyond that a restatement takes their place.
	maxPending = 16 << 10
)

// Why a stream was ended by the coordinator.
var (
	// ErrOverwritten: a newer stream of the same peer took its place.
	ErrOverwritten = errors.New("peer ID overwritten by new connection")
	// ErrClosed: the coordinator stopped.
	ErrClosed = errors.New("coordinator closed")
	// ErrSlow: the peer did not take its responses.
	ErrSlow = errors.New("response queue full")
)

// hub is the state machine: every peer of every replica, and who has been told what. It has no
// goroutine and does no I/O.
type hub struct {
	self string // this replica's name
	log  *slog.Logger
	wake chan struct{} // holds a value while there is something to publish

	mu     sync.Mutex // protects the following
	closed bool
	peers  map[uuid.UUID]*peer
	// sources is the reverse of peer.tunnels.
	sources map[uuid.UUID]map[uuid.UUID]struct{}
	// owners of addresses: an agent of those that follow from its id, a client of what it announced.
	owners map[netip.Addr]*peer
	// keys counts the peers whose latest node has a key: a client may come back before its old stream
	// was found dead.
	keys map[[32]byte]int
	// doomed peers are removed once the event at hand has been applied.
	doomed []doom

	replicas map[string]*replica
	pending  []event
	restate  bool            // everything owned is to be published
	asking   map[string]bool // replicas to be asked to restate; "" is all
}

// peer is an id with a stream, here or on another replica.
type peer struct {
	id    uuid.UUID
	agent bool
	epoch epoch
	node  *tailnetpb.Node // never changed in place; nil until published
	addrs []netip.Addr    // those it owns
	// tunnels to destinations, each with the round of the owner's restatement that confirmed it.
	tunnels map[uuid.UUID]uint64
	round   uint64
	link    *link // nil when the stream is on another replica
}

// link is the stream of a peer of this replica.
type link struct {
	auth  Auth
	keeps map[uuid.UUID]bool            // which tunnels of an older stream this one may have
	sent  map[uuid.UUID]*tailnetpb.Node // the last node the peer was given of each other
	queue chan *tailnetpb.CoordinateResponse
	over  bool  // queue is closed
	cause error // why, when the coordinator ended it
}

type doom struct {
	*peer
	kind   kind
	reason string
	cause  error
}

func newHub(self string, log *slog.Logger) *hub {
	return &hub{
		self: self, log: log, wake: make(chan struct{}, 1),
		peers:    map[uuid.UUID]*peer{},
		sources:  map[uuid.UUID]map[uuid.UUID]struct{}{},
		owners:   map[netip.Addr]*peer{},
		keys:     map[[32]byte]int{},
		replicas: map[string]*replica{},
		asking:   map[string]bool{},
	}
}

// do runs f on the state, then removes those that f doomed, which may doom others.
func (h *hub) do(f func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f()
	for len(h.doomed) > 0 {
		d := h.doomed[0]
		h.doomed = h.doomed[1:]
		h.remove(d.peer, d.kind, d.reason, d.cause)
	}
	if len(h.pending) > 0 || h.restate || len(h.asking) > 0 {
		select {
		case h.wake <- struct{}{}:
		default:
		}
	}
}

// emit applies an event of this replica and tells the others.
func (h *hub) emit(ev event) {
	h.record(ev)
	h.apply(ev, nil)
}

// record keeps an event for the other replicas.
func (h *hub) record(ev event) {
	if len(h.pending) >= maxPending {
		h.pending, h.restate = nil, true
	}
	h.pending = append(h.pending, ev)
}

// join admits a stream. The peer's queue is closed when it is to end.
func (h *hub) join(p Peer) (joined *peer, err error) {
	if p.ID == uuid.Nil || p.Auth.isAgent() && p.Auth.agent != p.ID {
		return nil, fmt.Errorf("cannot coordinate: peer %s does not fit its authorisation", p.ID)
	}
	keeps := h.keeps(p)
	h.do(func() {
		if h.closed {
			err = ErrClosed
			return
		}
		now := epoch{At: time.Now().UnixNano(), Replica: h.self}
		if old := h.peers[p.ID]; old != nil {
			if old.agent != p.Auth.isAgent() {
				err = fmt.Errorf("cannot coordinate: id %s is in use by a peer of another kind", p.ID)
				return
			}
			now.At = max(now.At, old.epoch.At+1)
		}
		l := &link{
			auth:  p.Auth,
			keeps: keeps,
			sent:  map[uuid.UUID]*tailnetpb.Node{},
			queue: make(chan *tailnetpb.CoordinateResponse, wire.MaxPeerQueue),
		}
		ev := event{Op: opJoin, Peer: p.ID, Epoch: now, Agent: p.Auth.isAgent()}
		h.record(ev)
		h.apply(ev, l)
		joined = h.peers[p.ID]
		// Tunnels of an older stream stay, unless this one was admitted for less.
		for to := range joined.tunnels {
			if !keeps[to] {
				h.emit(event{Op: opUntunnel, Peer: p.ID, Epoch: now, To: to})
			}
		}
		h.log.Debug("peer joined", "peer", p.ID, "agent", joined.agent)
	})
	return joined, err
}

// keeps returns which tunnels of an older stream a new one of the same peer may have. The lock is not
// held while that is asked: the answer may come from far.
func (h *hub) keeps(p Peer) map[uuid.UUID]bool {
	h.mu.Lock()
	var open []uuid.UUID
	if old := h.peers[p.ID]; old != nil {
		open = slices.Collect(maps.Keys(old.tunnels))
	}
	h.mu.Unlock()
	keeps := make(map[uuid.UUID]bool, len(open))
	for _, to := range open {
		keeps[to] = p.Auth.mayTunnel(to) == nil
	}
	return keeps
}

// leave ends the stream of p unless it has ended already.
func (h *hub) leave(p *peer, how kind, reason string, cause error) {
	h.do(func() { h.remove(p, how, reason, cause) })
}

func (h *hub) remove(p *peer, how kind, reason string, cause error) {
	if h.peers[p.id] != p {
		return
	}
	p.link.end(cause)
	h.emit(event{Op: opLeave, Peer: p.id, Epoch: p.epoch, Kind: how, Reason: reason})
	h.log.Debug("peer left", "peer", p.id, "reason", reason, "cause", cause)
}

// end closes the queue, behind the error when there is one and room for it.
func (l *link) end(cause error) {
	if l.over {
		return
	}
	if cause != nil {
		select {
		case l.queue <- &tailnetpb.CoordinateResponse{Error: cause.Error()}:
		default:
		}
	}
	l.over, l.cause = true, cause
	close(l.queue)
}

// node returns a copy of the latest node of a peer.
func (h *hub) node(id uuid.UUID) *tailnetpb.Node {
	h.mu.Lock()
	defer h.mu.Unlock()
	if p := h.peers[id]; p != nil && p.node != nil {
		return proto.CloneOf(p.node)
	}
	return nil
}

// hasKey tells whether a peer has published a node with that key.
func (h *hub) hasKey(key [32]byte) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.keys[key] > 0
}

// countKey adds to the count of a node's key, if it has a proper one.
func (h *hub) countKey(n *tailnetpb.Node, by int) {
	raw, ok := bytes.CutPrefix(n.GetKey(), []byte(wire.NodeKeyPrefix))
	if !ok || len(raw) != 32 {
		return
	}
	key := [32]byte(raw)
	if h.keys[key] += by; h.keys[key] == 0 {
		delete(h.keys, key)
	}
}

// close ends every stream and admits no more.
func (h *hub) close() {
	h.do(func() {
		h.closed = true
		for _, p := range h.peers {
			if p.link == nil || p.link.over {
				continue
			}
			var lost []*update
			for id := range p.link.sent {
				lost = append(lost, &update{Id: id[:], Kind: kindLost, Reason: ErrClosed.Error()})
			}
			h.send(p, lost...)
			p.link.end(ErrClosed)
		}
		h.doomed = nil // all are
	})
}

// apply makes an event of any replica true. l is the stream of a peer that joins here.
func (h *hub) apply(ev event, l *link) {
	p := h.peers[ev.Peer]
	if ev.Op == opJoin {
		h.applyJoin(ev, p, l)
		return
	}
	if p == nil || p.epoch != ev.Epoch {
		return // of a stream that is over, or one not yet heard of
	}
	switch ev.Op {
	case opNode:
		h.applyNode(p, ev.Node.Node)
	case opTunnel:
		h.applyTunnel(p, ev.To)
	case opUntunnel:
		h.applyUntunnel(p, ev.To)
	case opReady:
		if to := h.peers[ev.To]; to != nil {
			h.send(to, &update{Id: p.id[:], Kind: kindReady})
		}
	case opLeave:
		h.applyLeave(p, ev.Kind, ev.Reason)
	}
}

func (h *hub) applyJoin(ev event, old *peer, l *link) {
	round := h.round(ev.Epoch.Replica)
	if old != nil && !ev.Epoch.newer(old.epoch) {
		if ev.Epoch == old.epoch {
			old.round = round
		}
		return
	}
	p := &peer{id: ev.Peer, agent: ev.Agent, epoch: ev.Epoch, round: round, tunnels: map[uuid.UUID]uint64{}, link: l}
	if old != nil {
		// The others keep what they know of the old stream until the new one publishes a node or ends.
		for to := range old.tunnels {
			p.tunnels[to] = round
		}
		h.disown(old)
		h.countKey(old.node, -1)
		if old.link != nil {
			old.link.end(ErrOverwritten)
		}
	}
	h.peers[p.id] = p
	if p.agent {
		for _, prefix := range wire.AgentPrefixes(p.id) {
			h.own(p, prefix.Addr(), nil)
		}
	}
	if l != nil {
		var batch []*update
		for _, other := range h.linked(p) {
			if _, ours := p.tunnels[other.id]; ours && !l.keeps[other.id] {
				continue // the tunnel ends with the old stream
			}
			batch = append(batch, introduce(p, other, "init")...)
		}
		h.send(p, batch...)
	}
}

func (h *hub) applyNode(p *peer, n *tailnetpb.Node) {
	// Also what another replica has let pass: the two may have admitted the same address at once.
	if !p.agent {
		addrs, err := Auth{}.addresses(n)
		if err != nil || !h.prevails(p, n, addrs) {
			return
		}
		h.disown(p)
		for _, addr := range addrs {
			h.own(p, addr, n)
		}
	}
	h.countKey(p.node, -1)
	h.countKey(n, 1)
	p.node = n
	for _, other := range h.linked(p) {
		h.send(other, introduce(other, p, "node update")...)
	}
}

func (h *hub) applyTunnel(p *peer, to uuid.UUID) {
	p.tunnels[to] = h.round(p.epoch.Replica)
	if h.sources[to] == nil {
		h.sources[to] = map[uuid.UUID]struct{}{}
	}
	h.sources[to][p.id] = struct{}{}
	if other := h.peers[to]; other != nil && other != p {
		h.send(p, introduce(p, other, "add tunnel")...)
		h.send(other, introduce(other, p, "add tunnel")...)
	}
}

func (h *hub) applyUntunnel(p *peer, to uuid.UUID) {
	if _, ok := p.tunnels[to]; !ok {
		return
	}
	h.cut(p, to)
	if other := h.peers[to]; other != nil {
		h.retract(p, to, kindDisconnected, "remove tunnel")
		h.retract(other, p.id, kindDisconnected, "remove tunnel")
	}
}

func (h *hub) applyLeave(p *peer, how kind, reason string) {
	for _, other := range h.linked(p) {
		h.retract(other, p.id, how, reason)
	}
	for to := range p.tunnels {
		h.cut(p, to)
	}
	h.disown(p)
	h.countKey(p.node, -1)
	delete(h.peers, p.id)
}

// cut deletes a tunnel without telling anyone.
func (h *hub) cut(p *peer, to uuid.UUID) {
	delete(p.tunnels, to)
	delete(h.sources[to], p.id)
	if len(h.sources[to]) == 0 {
		delete(h.sources, to)
	}
}

// linked returns the connected peers that share a tunnel with p, in either direction.
func (h *hub) linked(p *peer) []*peer {
	var all []*peer
	for id := range p.tunnels {
		if other := h.peers[id]; other != nil && other != p {
			all = append(all, other)
		}
	}
	for id := range h.sources[p.id] {
		_, both := p.tunnels[id]
		if other := h.peers[id]; other != nil && other != p && !both {
			all = append(all, other)
		}
	}
	return all
}

type update = tailnetpb.CoordinateResponse_PeerUpdate

// introduce returns the update that gives of's node to a peer of this replica, none when it has it.
func introduce(to, of *peer, reason string) []*update {
	if to.link == nil || of.node == nil {
		return nil
	}
	if last := to.link.sent[of.id]; last == of.node || last != nil && proto.Equal(last, of.node) {
		return nil
	}
	to.link.sent[of.id] = of.node
	return []*update{{Id: of.id[:], Node: of.node, Kind: kindNode, Reason: reason}}
}

// retract tells a peer that another is gone, if it ever knew.
func (h *hub) retract(from *peer, id uuid.UUID, how kind, reason string) {
	if from.link == nil || from.link.sent[id] == nil {
		return
	}
	delete(from.link.sent, id)
	h.send(from, &update{Id: id[:], Kind: how, Reason: reason})
}

// send queues updates for a peer, if it is of this replica.
func (h *hub) send(p *peer, updates ...*update) {
	for len(updates) > 0 {
		n := min(len(updates), wire.MaxPeerUpdates)
		h.respond(p, &tailnetpb.CoordinateResponse{PeerUpdates: updates[:n:n]})
		updates = updates[n:]
	}
}

// respond never waits: a peer that does not take its responses is removed.
func (h *hub) respond(p *peer, resp *tailnetpb.CoordinateResponse) {
	if p.link == nil || p.link.over {
		return
	}
	select {
	case p.link.queue <- resp:
	default:
		h.doom(p, kindDisconnected, "response queue full", ErrSlow)
	}
}

// doom ends a stream of this replica at once and has the peer removed when the event at hand is done.
func (h *hub) doom(p *peer, how kind, reason string, cause error) {
	if p.link == nil || p.link.over {
		return // another replica's to do, or done
	}
	p.link.end(cause)
	h.doomed = append(h.doomed, doom{p, how, reason, cause})
}

// own gives an address to p, which announced it with n, and dooms a client that had it.
func (h *hub) own(p *peer, addr netip.Addr, n *tailnetpb.Node) {
	if old := h.owners[addr]; old != nil && !old.agent && !sameKey(old, n) {
		h.doom(old, kindLost, "lost", taken(addr))
	}
	h.owners[addr] = p
	p.addrs = append(p.addrs, addr)
}

func (h *hub) disown(p *peer) {
	for _, addr := range p.addrs {
		if h.owners[addr] == p {
			delete(h.owners, addr)
		}
	}
	p.addrs = nil
}

func taken(addr netip.Addr) error {
	return fmt.Errorf("authorization: address %s is another peer's", addr)
}

// sameKey tells whether p holds the WireGuard key of n. Then both are one node under two ids: a
// client that came back before its old stream was found dead.
func sameKey(p *peer, n *tailnetpb.Node) bool {
	return len(n.GetKey()) > 0 && bytes.Equal(p.node.GetKey(), n.GetKey())
}

// rival returns the peer that owns one of the addresses, if it is not p itself.
func (h *hub) rival(p *peer, n *tailnetpb.Node, addrs []netip.Addr) (*peer, netip.Addr) {
	for _, addr := range addrs {
		if o := h.owners[addr]; o != nil && o != p && (o.agent || !sameKey(o, n)) {
			return o, addr
		}
	}
	return nil, netip.Addr{}
}

// prevails settles who keeps an address that two replicas admitted at once, the same way on each:
// an agent before a client, then the older stream.
func (h *hub) prevails(p *peer, n *tailnetpb.Node, addrs []netip.Addr) bool {
	for _, addr := range addrs {
		o, _ := h.rival(p, n, []netip.Addr{addr})
		if o != nil && (o.agent || p.epoch.newer(o.epoch)) {
			h.doom(p, kindLost, "lost", taken(addr))
			return false
		}
	}
	return true
}
