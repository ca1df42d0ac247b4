package tailnet

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"
	"tailscale.com/types/key"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/tailnetpb"
)

// Node is one address on the network, and the peers it knows. Its methods may
// be called concurrently.
type Node struct {
	cfg    Config
	log    *slog.Logger
	key    key.NodePrivate
	engine *engine
	peers  *peerTable
	front  *relayFront
	stun   loopbackSTUN
	ports  *portTable
	meter  *meter
	// narrowed and udpFlows belong to mtu.go and forward.go.
	narrowed *narrowed
	udpFlows chan struct{}

	ctx    context.Context // ends with the node
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu    sync.Mutex
	state published
	// changed is closed and replaced whenever state changes.
	changed chan struct{}
	closed  bool
	relays  *relayMap
	// remeasure asks the home chooser for a round at once.
	remeasure chan struct{}
}

// published is the part of what a node tells its peers that changes.
type published struct {
	endpoints []netip.AddrPort
	relayOnly bool
	home      int
	latency   map[string]float64 // "<region>-v4" or "-v6" to seconds
}

// New makes a node. It is on the network once it has a relay map and a
// coordination stream.
func New(cfg Config) (*Node, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.NodeID == 0 {
		cfg.NodeID = rand.Int64N(1<<63-1) + 1
	}
	n := &Node{
		cfg: cfg, log: cfg.Log, key: key.NewNode(),
		ports: newPortTable(), meter: newMeter(),
		narrowed: newNarrowed(), udpFlows: make(chan struct{}, maxForwards),
		state:     published{relayOnly: cfg.RelayOnly},
		changed:   make(chan struct{}),
		remeasure: make(chan struct{}, 1),
	}
	n.ctx, n.cancel = context.WithCancel(context.Background())
	n.peers = newPeerTable(n)
	front, err := newRelayFront(&n.cfg, n.fire)
	if err != nil {
		return nil, err
	}
	n.front = front
	n.engine, err = newEngine(&n.cfg, n.key, hooks{
		peerByIP:  n.peers.keyByIP,
		allowed:   n.peers.allowedIPs,
		nodeByIP:  n.peers.nodeByIP,
		endpoints: n.setEndpoints,
		homeMoved: n.keepHome,
		tcp:       n.acceptTCP,
		udp:       n.acceptUDP,
		outbound:  n.fitPath,
		inbound:   n.meter.received,
		tunneled:  n.meter.count,
		sent:      n.peers.notePath,
	})
	if err != nil {
		front.close()
		return nil, err
	}
	n.wg.Go(n.chooseHome)
	n.wg.Go(n.keepAlive)
	return n, nil
}

// Close stops the node and returns when nothing of it runs any more. Listeners
// and connections are closed. A second call answers [net.ErrClosed].
func (n *Node) Close() error {
	n.mu.Lock()
	if n.closed {
		n.mu.Unlock()
		return net.ErrClosed
	}
	n.closed = true
	n.mu.Unlock()
	n.cancel()
	n.ports.close()
	n.peers.close()
	n.front.close()
	n.engine.close()
	n.wg.Wait()
	n.stun.close()
	return nil
}

// spawn runs f until the node closes, if it has not.
func (n *Node) spawn(f func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.closed {
		n.wg.Go(f)
	}
}

// SetRelayOnly switches direct paths off or on while the node runs. Off, it
// neither tells its endpoints, nor uses those of others, nor sends STUN.
func (n *Node) SetRelayOnly(only bool) {
	n.mu.Lock()
	same := n.state.relayOnly == only
	n.state.relayOnly = only
	n.mu.Unlock()
	if same {
		return
	}
	n.engine.magic.SetOnlyTCP443(only)
	n.peers.reinstall()
	n.engine.magic.ReSTUN("relay-only-changed")
	n.fire()
}

// relayOnly reports whether direct paths are off.
func (n *Node) relayOnly() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.state.relayOnly
}

func (n *Node) setEndpoints(addrs []netip.AddrPort) {
	n.mu.Lock()
	same := slices.Equal(n.state.endpoints, addrs)
	n.state.endpoints = addrs
	n.mu.Unlock()
	if !same {
		n.fire()
	}
}

// fire wakes everyone who waits for a change of what the node publishes.
func (n *Node) fire() {
	n.mu.Lock()
	defer n.mu.Unlock()
	close(n.changed)
	n.changed = make(chan struct{})
}

// wait returns a channel that is closed at the next change.
func (n *Node) wait() <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.changed
}

// Home is the relay region through which the node can be reached, zero while it
// has none. A node without a home is not published.
func (n *Node) Home() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.state.home
}

// Self is what the node tells its peers, as of now.
func (n *Node) Self() *tailnetpb.Node {
	n.mu.Lock()
	s := n.state
	n.mu.Unlock()
	self := &tailnetpb.Node{
		Id:                  n.cfg.NodeID,
		AsOf:                timestamppb.New(time.Now()),
		Key:                 n.key.Public().AppendTo([]byte(wire.NodeKeyPrefix)),
		Disco:               n.engine.magic.DiscoPublicKey().String(),
		PreferredDerp:       int32(s.home),
		DerpLatency:         s.latency,
		DerpForcedWebsocket: n.front.forcedWebsocket(),
	}
	for _, p := range n.cfg.Prefixes {
		self.Addresses = append(self.Addresses, p.String())
	}
	self.AllowedIps = slices.Clone(self.Addresses)
	if !s.relayOnly {
		for _, ep := range s.endpoints {
			self.Endpoints = append(self.Endpoints, ep.String())
		}
	}
	return self
}
