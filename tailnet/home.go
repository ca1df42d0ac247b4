package tailnet

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/tailnetpb"
)

// The home region is the relay that a node is always connected to, where its
// peers find it. The library would choose it by STUN, so that a region that
// answers STUN but relays nothing could win, and would move it only while its
// own control protocol runs. So this package chooses: by the time that a relay
// takes to answer /derp/latency-check, asked in the same way as it is
// connected to. The library's health tracker is never told of a control
// connection, which makes it keep the home it is given.

const (
	measureTimeout = 5 * time.Second
	// Relays are measured again at an uneven pace, lest a fleet do so in step.
	measureEvery, measureJitter = 20 * time.Second, 6 * time.Second
	// measureSoon is the pace while no relay answers.
	measureSoon = 2 * time.Second
	// latencyMemory is how long a good measurement counts.
	latencyMemory = 5 * time.Minute
	// A new home must be better by this much and by a third, or nodes
	// would move to and fro between equals.
	minGain = 10 * time.Millisecond
)

// measurement is one answer of a relay.
type measurement struct {
	at  time.Time
	rtt time.Duration
	v6  bool
}

// chooser remembers measurements and picks a home. It belongs to one goroutine.
type chooser struct {
	history map[int][]measurement
}

// add takes in a round of measurements and returns the region to live in, zero
// if no relay ever answered. regions are those of the map.
func (c *chooser) add(now time.Time, regions map[int]*region, round map[int]measurement, home int) int {
	if c.history == nil {
		c.history = make(map[int][]measurement)
	}
	for id := range c.history {
		if regions[id] == nil {
			delete(c.history, id)
		}
	}
	for id, m := range round {
		keep := c.history[id][:0]
		for _, old := range c.history[id] {
			if now.Sub(old.at) < latencyMemory {
				keep = append(keep, old)
			}
		}
		c.history[id] = append(keep, m)
	}
	best := 0
	for id := range round {
		if best == 0 || c.better(regions, id, best) {
			best = id
		}
	}
	if regions[home] == nil {
		home = 0
	}
	if best == 0 || home == 0 {
		return max(best, home) // one of them is zero
	}
	if _, alive := round[home]; !alive {
		return best
	}
	if regions[home].avoid && !regions[best].avoid {
		return best
	}
	old, fresh := c.cost(regions, home), c.cost(regions, best)
	if old-fresh < minGain || fresh > old/3*2 {
		return home
	}
	return best
}

// better reports whether a makes a better home than b.
func (c *chooser) better(regions map[int]*region, a, b int) bool {
	if regions[a].avoid != regions[b].avoid {
		return !regions[a].avoid
	}
	if ca, cb := c.cost(regions, a), c.cost(regions, b); ca != cb {
		return ca < cb
	}
	return a < b
}

// cost is the best remembered latency of a region, scaled by its score.
func (c *chooser) cost(regions map[int]*region, id int) time.Duration {
	best := time.Duration(1<<63 - 1)
	for _, m := range c.history[id] {
		best = min(best, m.rtt)
	}
	return time.Duration(float64(best) * regions[id].score)
}

// SetDERPMap replaces the relay map. A map in which no node relays is refused
// and the present one stays. Connections survive a change of relays.
func (n *Node) SetDERPMap(m *tailnetpb.DERPMap) error {
	rm, err := readRelayMap(m, n.cfg.AccessURL)
	if err != nil {
		return err
	}
	rm.source = proto.CloneOf(m)
	n.mu.Lock()
	if n.relays != nil && proto.Equal(n.relays.source, m) {
		// Servers send the map anew on each connection. Relays that stay the
		// same keep their connections.
		n.mu.Unlock()
		return nil
	}
	n.relays = rm
	home := n.state.home
	gone := home != 0 && rm.regions[home] == nil
	if gone {
		n.state.home = 0
	}
	n.mu.Unlock()
	n.front.set(rm.regions)
	if gone {
		n.fire()
	}
	select {
	case n.remeasure <- struct{}{}:
	default:
	}
	return nil
}

// applyRelays hands the map and the home to the library. Only chooseHome's
// goroutine does, so that changes keep their order.
func (n *Node) applyRelays() {
	n.mu.Lock()
	rm, home := n.relays, n.state.home
	n.mu.Unlock()
	if rm == nil || home == 0 {
		// The library would pick a home of its own from a map without one.
		return
	}
	servers := rm.stun
	if len(servers) == 0 {
		own, err := n.stun.node()
		if err != nil {
			n.log.Warn("the network cannot be looked at", "err", err)
		} else {
			servers = append(servers, own)
		}
	}
	n.engine.magic.SetDERPMap(rm.libraryMap(n.front, home, servers))
	n.engine.magic.ForceSetNearestDERP(home)
}

// keepHome puts the home back should the library have moved it.
func (n *Node) keepHome(moved int) {
	if home := n.Home(); home != 0 && home != moved {
		n.engine.magic.ForceSetNearestDERP(home)
	}
}

// chooseHome measures the relays and moves the home, until the node closes.
func (n *Node) chooseHome() {
	var c chooser
	var settled *relayMap
	silent := false
	for {
		pause := measureEvery + rand.N(measureJitter)
		n.mu.Lock()
		rm := n.relays
		n.mu.Unlock()
		if rm != nil {
			if rm != settled {
				rm.settleFamilies(n.ctx)
				settled = rm
				n.applyRelays()
			}
			round, err := n.measure(rm.regions)
			if len(round) == 0 {
				pause = measureSoon
				if !silent && n.ctx.Err() == nil {
					n.log.Warn("no relay answers, so peers cannot find this node; trying on", "err", err)
				}
			}
			silent = len(round) == 0
			n.moveHome(&c, rm, round)
		}
		select {
		case <-n.ctx.Done():
			return
		case <-n.remeasure:
		case <-time.After(pause):
		}
	}
}

func (n *Node) moveHome(c *chooser, rm *relayMap, round map[int]measurement) {
	latency := make(map[string]float64)
	for id, m := range round {
		family := "v4"
		if m.v6 {
			family = "v6"
		}
		latency[fmt.Sprintf("%d-%s", id, family)] = m.rtt.Seconds()
	}
	n.mu.Lock()
	if n.relays != rm { // measured in vain: the map was replaced meanwhile
		n.mu.Unlock()
		return
	}
	old := n.state.home
	home := c.add(time.Now(), rm.regions, round, old)
	n.state.home, n.state.latency = home, latency
	n.mu.Unlock()
	if home == old {
		return
	}
	n.log.Debug("home relay chosen", "region", rm.regions[home].name, "was", old)
	n.applyRelays()
	n.fire()
}

// measure asks every relay region for its latency. Regions that do not answer
// in time are left out, and the error tells why.
func (n *Node) measure(regions map[int]*region) (map[int]measurement, error) {
	ctx, cancel := context.WithTimeout(n.ctx, measureTimeout)
	defer cancel()
	var (
		mu    sync.Mutex
		round = make(map[int]measurement)
		errs  []error
		wg    sync.WaitGroup
	)
	for id, reg := range regions {
		wg.Go(func() {
			m, err := n.cfg.measureRegion(ctx, reg)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				n.log.Debug("relay did not answer", "region", reg.name, "err", err)
				errs = append(errs, err)
				return
			}
			round[id] = m
		})
	}
	wg.Wait()
	return round, errors.Join(errs...)
}

// measureRegion takes the first relay of a region that answers. Only the time
// from question to answer counts, not that of the connection.
func (c *Config) measureRegion(ctx context.Context, reg *region) (measurement, error) {
	var err error
	for _, node := range reg.nodes {
		var m measurement
		if m, err = c.measureNode(ctx, node); err == nil {
			return m, nil
		}
	}
	return measurement{}, err
}

func (c *Config) measureNode(ctx context.Context, node relayNode) (measurement, error) {
	var m measurement
	// The transport writes and reads in goroutines of its own.
	var asked, answered atomic.Int64
	start := time.Now()
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(i httptrace.GotConnInfo) {
			if a, ok := i.Conn.RemoteAddr().(*net.TCPAddr); ok {
				ip, _ := netip.AddrFromSlice(a.IP)
				m.v6 = ip.Unmap().Is6()
			}
		},
		WroteRequest:         func(httptrace.WroteRequestInfo) { asked.Store(int64(time.Since(start))) },
		GotFirstResponseByte: func() { answered.Store(int64(time.Since(start))) },
	})
	req := (&http.Request{Method: http.MethodGet, URL: node.url(wire.PathLatencyCheck), Header: c.header()}).WithContext(ctx)
	resp, err := c.transport(node).RoundTrip(req)
	if err != nil {
		return m, fmt.Errorf("cannot measure the relay at %s: %w", req.URL.Host, err)
	}
	resp.Body.Close()
	if resp.StatusCode > 299 {
		return m, fmt.Errorf("cannot measure the relay at %s: it answered %s", req.URL.Host, resp.Status)
	}
	m.at = time.Now()
	m.rtt = time.Duration(max(answered.Load()-asked.Load(), 1))
	return m, nil
}
