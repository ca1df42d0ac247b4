package tailnet

import (
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"tailscale.com/ipn/ipnstate"
	"tailscale.com/tailcfg"
	"tailscale.com/types/ipproto"
	"tailscale.com/types/key"
	"tailscale.com/wgengine"
)

const (
	// lostFor is how long after its last handshake a peer is kept that the
	// coordinator has lost: it may well be alive with only its link broken.
	lostFor = 15 * time.Minute
	// readyWithin is how long the node of a destination is held back for the
	// destination to say that it knows us. Dialling before that loses the
	// first WireGuard message, and the next comes five seconds later.
	readyWithin = 5 * time.Second
)

// peer is what is known of one peer. Its fields belong to the table's lock,
// path apart.
type peer struct {
	id    uuid.UUID
	node  tailcfg.NodeView
	route []netip.Prefix // allowed source addresses
	all   []netip.AddrPort
	lost  bool
	// destination marks a peer this node asked for; ready, that the peer has
	// this node installed.
	destination, ready bool
	// held is set while a destination's node waits for ready.
	held  bool
	timer *time.Timer
	path  *path
}

// path tells how packets to a peer go. It outlives updates of the peer.
type path struct{ lastUDP atomic.Int64 }

// peerIndex is the immutable view that the packet path reads.
type peerIndex struct {
	byIP  map[netip.Addr]*installed
	byKey map[key.NodePublic]*installed
}

type installed struct {
	node  tailcfg.NodeView
	route []netip.Prefix
	path  *path
}

// peerTable holds the peers and keeps the engine in step with them.
type peerTable struct {
	n     *Node
	index atomic.Pointer[peerIndex]

	mu     sync.Mutex
	closed bool
	// changed is closed and replaced whenever the index is.
	changed chan struct{}
	byID    map[uuid.UUID]*peer
	// nodeIDs numbers the keys, for the library wants a number for each.
	nodeIDs map[key.NodePublic]tailcfg.NodeID
	lastID  tailcfg.NodeID
}

func newPeerTable(n *Node) *peerTable {
	t := &peerTable{
		n:       n,
		byID:    make(map[uuid.UUID]*peer),
		nodeIDs: make(map[key.NodePublic]tailcfg.NodeID),
		changed: make(chan struct{}),
		lastID:  1, // the node itself
	}
	t.index.Store(&peerIndex{})
	return t
}

func (t *peerTable) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	for _, p := range t.byID {
		p.stopTimer()
	}
}

func (p *peer) stopTimer() {
	if p.timer != nil {
		p.timer.Stop()
		p.timer = nil
	}
}

// wait returns a channel that is closed at the next change of the peers.
func (t *peerTable) wait() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.changed
}

func (t *peerTable) keyByIP(ip netip.Addr) (key.NodePublic, bool) {
	if p, ok := t.index.Load().byIP[ip]; ok {
		return p.node.Key(), true
	}
	return key.NodePublic{}, false
}

func (t *peerTable) allowedIPs(k key.NodePublic) ([]netip.Prefix, bool) {
	if p, ok := t.index.Load().byKey[k]; ok {
		return p.route, true
	}
	return nil, false
}

func (t *peerTable) nodeByIP(ip netip.Addr) (wgengine.PeerForIP, bool) {
	if p, ok := t.index.Load().byIP[ip]; ok {
		return wgengine.PeerForIP{Node: p.node, Route: netip.PrefixFrom(ip, ip.BitLen())}, true
	}
	if slices.ContainsFunc(t.n.cfg.Prefixes, func(p netip.Prefix) bool { return p.Addr() == ip }) {
		return wgengine.PeerForIP{Node: t.n.engine.self, IsSelf: true, Route: netip.PrefixFrom(ip, ip.BitLen())}, true
	}
	return wgengine.PeerForIP{}, false
}

// notePath records by which way a batch of packets to a peer left.
func (t *peerTable) notePath(_ ipproto.Proto, peerAddr, physical netip.AddrPort, _, _ int, recv bool) {
	if recv || physical.Addr() == tailcfg.DerpMagicIPAddr {
		return
	}
	if p, ok := t.index.Load().byIP[peerAddr.Addr()]; ok {
		p.path.lastUDP.Store(time.Now().UnixNano())
	}
}

// entry returns the peer of an id, new if need be.
func (t *peerTable) entry(id uuid.UUID) *peer {
	p, ok := t.byID[id]
	if !ok {
		p = &peer{id: id, path: new(path)}
		t.byID[id] = p
	}
	return p
}

// wish marks a peer as one this node asked for.
func (t *peerTable) wish(id uuid.UUID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.entry(id).destination = true
}

// update takes a peer's node in.
func (t *peerTable) update(id uuid.UUID, d *decodedNode) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return
	}
	// A peer that comes back under another id, or an address that has changed
	// hands, belongs to whom the coordinator named last.
	for other, p := range t.byID {
		if other != id && p.node.Valid() && (p.node.Key() == d.key || overlap(p.route, d.route)) {
			p.stopTimer()
			t.forget(p)
		}
	}
	p := t.entry(id)
	p.stopTimer()
	p.lost = false
	p.route, p.all = d.route, d.endpoints
	p.node = d.view(t.nodeID(d.key))
	p.held = p.destination && !p.ready
	if p.held {
		p.timer = time.AfterFunc(readyWithin, func() { t.release(id) })
	}
	t.install()
}

// ready notes that a peer has this node installed.
func (t *peerTable) ready(id uuid.UUID) {
	t.mu.Lock()
	p, ok := t.byID[id]
	if ok {
		p.ready = true
	}
	t.mu.Unlock()
	if ok {
		t.release(id)
	}
}

// release installs a destination that was held back.
func (t *peerTable) release(id uuid.UUID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p, ok := t.byID[id]
	if !ok || !p.held || t.closed {
		return
	}
	p.held = false
	p.stopTimer()
	t.install()
	// One round trip now spares the first connection the handshake.
	addr := p.route[0].Addr()
	t.n.spawn(func() { t.n.warm(addr) })
}

// remove forgets a peer.
func (t *peerTable) remove(id uuid.UUID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p, ok := t.byID[id]; ok {
		p.stopTimer()
		t.forget(p)
		t.install()
	}
}

// forget drops what is known of a peer, but not that it is wanted.
func (t *peerTable) forget(p *peer) {
	delete(t.byID, p.id)
	if p.destination {
		t.entry(p.id).destination = true
	}
}

// unwish takes back a wish.
func (t *peerTable) unwish(id uuid.UUID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p, ok := t.byID[id]; ok {
		p.destination = false
		if !p.node.Valid() {
			delete(t.byID, id)
		}
	}
}

// lose notes that the coordinator has lost a peer. It is kept while its last
// handshake is young.
func (t *peerTable) lose(id uuid.UUID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p, ok := t.byID[id]
	if !ok || !p.node.Valid() || t.closed {
		return
	}
	p.lost = true
	p.stopTimer()
	left := lostFor - time.Since(t.n.lastHandshake(p.node.Key()))
	if left > 0 {
		p.timer = time.AfterFunc(left, func() { t.expire(id) })
		return
	}
	t.forget(p)
	t.install()
}

// expire looks again at a peer that was lost.
func (t *peerTable) expire(id uuid.UUID) {
	t.mu.Lock()
	p, ok := t.byID[id]
	lost := ok && p.lost
	t.mu.Unlock()
	if lost {
		t.lose(id)
	}
}

// reinstall applies a change of relay-only to every peer.
func (t *peerTable) reinstall() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.install()
}

// nodeID numbers a key. Numbers are never used twice.
func (t *peerTable) nodeID(k key.NodePublic) tailcfg.NodeID {
	id, ok := t.nodeIDs[k]
	if !ok {
		t.lastID++
		id = t.lastID
		t.nodeIDs[k] = id
	}
	return id
}

// install brings the engine in step with the table. The order matters: the
// socket must know a peer before WireGuard looks it up there, and the index
// must hold it before either is asked to look again.
func (t *peerTable) install() {
	if t.closed {
		return // the engine may be gone
	}
	relayOnly := t.n.relayOnly()
	next := &peerIndex{
		byIP:  make(map[netip.Addr]*installed),
		byKey: make(map[key.NodePublic]*installed),
	}
	var views []tailcfg.NodeView
	for _, p := range t.byID {
		if !p.node.Valid() || p.held {
			continue
		}
		node := p.node.AsStruct()
		node.Endpoints = p.all
		if relayOnly {
			node.Endpoints = nil
		}
		in := &installed{node: node.View(), route: p.route, path: p.path}
		views = append(views, in.node)
		next.byKey[node.Key] = in
		for _, a := range p.route {
			next.byIP[a.Addr()] = in
		}
	}
	slices.SortFunc(views, func(a, b tailcfg.NodeView) int { return int(a.ID() - b.ID()) })
	old := t.index.Load()
	t.n.engine.magic.SetNetworkMap(t.n.engine.self, views)
	t.index.Store(next)
	close(t.changed)
	t.changed = make(chan struct{})
	for k, in := range next.byKey {
		was, ok := old.byKey[k]
		switch {
		case ok && was.node.DiscoKey() != in.node.DiscoKey():
			t.n.engine.resetPeer(k) // it has restarted: its sessions are dead
		case !ok || !slices.Equal(was.route, in.route):
			t.n.engine.syncPeer(k)
		}
	}
	for k := range old.byKey {
		if _, ok := next.byKey[k]; !ok {
			t.n.engine.syncPeer(k)
			t.dropID(k)
		}
	}
}

// dropID forgets the number of a key that no peer has any more.
func (t *peerTable) dropID(k key.NodePublic) {
	for _, p := range t.byID {
		if p.node.Valid() && p.node.Key() == k {
			return
		}
	}
	delete(t.nodeIDs, k)
}

// keepAliveAddrs lists the ready destinations.
func (t *peerTable) keepAliveAddrs() []netip.Addr {
	t.mu.Lock()
	defer t.mu.Unlock()
	var addrs []netip.Addr
	for _, p := range t.byID {
		if p.destination && p.ready && !p.held && p.node.Valid() {
			addrs = append(addrs, p.route[0].Addr())
		}
	}
	return addrs
}

// Peers lists the installed peers, in the order of their ids.
func (n *Node) Peers() []PeerStatus {
	var sb ipnstate.StatusBuilder
	sb.WantPeers = true
	n.engine.eng.UpdateStatus(&sb)
	status := sb.Status()

	n.peers.mu.Lock()
	defer n.peers.mu.Unlock()
	var out []PeerStatus
	for _, p := range slices.SortedFunc(maps.Values(n.peers.byID), func(a, b *peer) int {
		return slices.Compare(a.id[:], b.id[:])
	}) {
		if !p.node.Valid() || p.held {
			continue
		}
		s := PeerStatus{ID: p.id, Lost: p.lost, Region: p.node.HomeDERP(), LastHandshake: n.lastHandshake(p.node.Key())}
		for _, r := range p.route {
			s.Addrs = append(s.Addrs, r.Addr())
		}
		if st, ok := status.Peer[p.node.Key()]; ok {
			s.Direct, _ = netip.ParseAddrPort(st.CurAddr)
			s.RxBytes, s.TxBytes = st.RxBytes, st.TxBytes
		}
		out = append(out, s)
	}
	return out
}

// PeerKey is the public key of the peer with an address, empty if there is
// none. A node draws a key when it is made, so another key means another
// process, which knows nothing of earlier connections.
func (n *Node) PeerKey(ip netip.Addr) string {
	if k, ok := n.peers.keyByIP(ip); ok {
		return k.String()
	}
	return ""
}

// lastHandshake is zero for a peer that never completed one.
func (n *Node) lastHandshake(k key.NodePublic) time.Time {
	if p, ok := n.engine.eng.PeerByKey(k); ok {
		return p.LastHandshake()
	}
	return time.Time{}
}

func overlap(a, b []netip.Prefix) bool {
	return slices.ContainsFunc(a, func(p netip.Prefix) bool { return slices.Contains(b, p) })
}
