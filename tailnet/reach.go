package tailnet

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"tailscale.com/ipn/ipnstate"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

const (
	// A peer is probed at once, then at growing intervals.
	probeFirst, probeLast = 50 * time.Millisecond, 30 * time.Second
	// resetAfter is how long a peer may stay silent before its WireGuard state
	// is made anew: if its first message was lost, the next would come only
	// after five seconds. Each further wait is twice as long, to let a handshake
	// over a slow path come to its end.
	resetAfter = 500 * time.Millisecond
	// warmFor bounds the probing of a peer nobody waits for.
	warmFor = 10 * time.Second
	// keepAliveEvery holds the path to destinations open: the library lets an
	// idle direct path go after 45 s and many NATs after 30 s.
	keepAliveEvery = 25 * time.Second
)

// errNoPeer is what probing answers while an address belongs to nobody.
var errNoPeer = errors.New("no peer has this address")

// Ping measures the way to a peer, below the tunnel. It sends one probe.
func (n *Node) Ping(ctx context.Context, to netip.Addr) (Ping, error) {
	res, err := n.probe(ctx, to, tailcfg.PingDisco)
	if err != nil {
		return Ping{}, fmt.Errorf("cannot ping %v: %w", to, err)
	}
	p := Ping{Latency: time.Duration(res.LatencySeconds * float64(time.Second)), Region: res.DERPRegionID, RegionName: res.DERPRegionCode}
	p.Direct, _ = netip.ParseAddrPort(res.Endpoint)
	return p, nil
}

// probe sends one probe and waits for the answer.
func (n *Node) probe(ctx context.Context, to netip.Addr, kind tailcfg.PingType) (*ipnstate.PingResult, error) {
	if _, ok := n.peers.keyByIP(to); !ok {
		return nil, errNoPeer
	}
	answer := make(chan *ipnstate.PingResult, 1)
	n.engine.eng.Ping(to, kind, 0, func(r *ipnstate.PingResult) {
		select {
		case answer <- r:
		default:
		}
	})
	select {
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-n.ctx.Done():
		return nil, errors.New("the node is closed")
	case r := <-answer:
		if r.Err != "" {
			return nil, errors.New(r.Err)
		}
		return r, nil
	}
}

// AwaitReachable waits until a packet has reached a peer through the tunnel and
// its answer has come back, trying for as long as ctx allows. The peer need not
// be known yet.
func (n *Node) AwaitReachable(ctx context.Context, to netip.Addr) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	reached := make(chan struct{}, 1)
	silence := resetAfter
	reset := time.NewTimer(silence)
	defer reset.Stop()
	wait := probeFirst
	last := errNoPeer
	var peer key.NodePublic
	for {
		// Probes may overtake each other: the answer to any will do.
		changed := n.peers.wait()
		if k, ok := n.peers.keyByIP(to); ok {
			if k != peer { // another process, which was not waited for yet
				peer, silence = k, resetAfter
				reset.Reset(silence)
			}
			last = errors.New("it does not answer")
			n.engine.eng.Ping(to, tailcfg.PingTSMP, 0, func(r *ipnstate.PingResult) {
				if r.Err == "" {
					select {
					case reached <- struct{}{}:
					default:
					}
				}
			})
		}
		pause := time.NewTimer(wait)
		select {
		case <-reached:
			pause.Stop()
			return nil
		case <-ctx.Done():
			pause.Stop()
			return fmt.Errorf("cannot reach %v: %w (%w)", to, last, context.Cause(ctx))
		case <-n.ctx.Done():
			pause.Stop()
			return fmt.Errorf("cannot reach %v: the node is closed", to)
		case <-reset.C:
			if k, ok := n.peers.keyByIP(to); ok && n.lastHandshake(k).IsZero() {
				n.engine.resetPeer(k)
			}
			silence *= 2
			reset.Reset(silence)
		case <-changed:
			wait = probeFirst
		case <-pause.C:
			wait = min(2*wait, probeLast)
		}
		pause.Stop()
	}
}

// warm starts the handshake with a peer before anyone waits for it.
func (n *Node) warm(to netip.Addr) {
	ctx, cancel := context.WithTimeout(n.ctx, warmFor)
	defer cancel()
	if err := n.AwaitReachable(ctx, to); err != nil && n.ctx.Err() == nil {
		n.log.Debug("peer does not answer yet", "err", err)
	}
}

// keepAlive sends a packet to each ready destination now and then.
func (n *Node) keepAlive() {
	tick := time.NewTicker(keepAliveEvery)
	defer tick.Stop()
	for {
		select {
		case <-n.ctx.Done():
			return
		case <-tick.C:
			for _, to := range n.peers.keepAliveAddrs() {
				n.engine.eng.Ping(to, tailcfg.PingTSMP, 0, func(*ipnstate.PingResult) {})
			}
		}
	}
}
