package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/berthd/berth/client"
	"github.com/berthd/berth/tailnet"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/rpc"
	"github.com/berthd/berth/wire/tailnetpb"
)

const (
	// How long to wait before the coordination stream is opened again: the pace stock clients keep.
	minRedial = 50 * time.Millisecond
	maxRedial = 10 * time.Second
	// defaultWait is how long an agent may take to be reachable: a berthd that lost its server is
	// back within 15 s, and the first packets need a few round trips.
	defaultWait = 30 * time.Second
	// defaultTokenRefresh is when to ask for a resume token again if the server does not say.
	defaultTokenRefresh = 30 * time.Minute

	// probeInterval is how often a connection that shall outlive its network looks whether its agent is there. After
	// probesLost pings in a row without an answer, each of probeTimeout, it is given up and made anew: 8 s after
	// a network is gone, and not for a packet or two.
	probeInterval = 2 * time.Second
	probeTimeout  = 2 * time.Second
	probesLost    = 3
)

// mesh is a place on the mesh of one agent. It stays joined by itself until closed: connections live
// on while the control server is away.
type mesh struct {
	server *server
	agent  wire.AgentSummary
	node   *tailnet.Node
	log    *slog.Logger
	resume string // the resume token; only the coordinating goroutine uses it
	stop   context.CancelFunc
	done   chan struct{}
}

// joinMesh joins the mesh as a client of the agent. What the server refuses at first is an error; what
// breaks later is tried again.
func joinMesh(ctx context.Context, s *server, agent wire.AgentSummary, log *slog.Logger) (*mesh, error) {
	doing := "reach agent " + agent.Name
	info, err := s.Connection(ctx, agent.ID)
	if err != nil {
		return nil, s.problem(doing, err)
	}
	if info.DERPMap == nil {
		return nil, fmt.Errorf("cannot %s: the server sent no relay map; check its log", doing)
	}
	link, err := s.Coordinate(ctx, agent.ID, "")
	if err != nil {
		return nil, s.problem(doing, err)
	}
	node, err := tailnet.New(tailnet.Config{
		Prefixes:       []netip.Prefix{netip.PrefixFrom(wire.RandomAddr(), 128)},
		RelayOnly:      info.DisableDirectConnections,
		AccessURL:      s.access.url,
		TLS:            s.tls(),
		ForceWebsocket: info.DERPForceWebSockets,
		Log:            log,
	})
	if err != nil {
		link.Close()
		return nil, err
	}
	if err := node.SetDERPMap(info.DERPMap.Proto()); err != nil {
		link.Close()
		node.Close()
		return nil, err
	}
	running, stop := context.WithCancel(context.WithoutCancel(ctx))
	m := &mesh{server: s, agent: agent, node: node, log: log, stop: stop, done: make(chan struct{})}
	go m.coordinate(running, link)
	return m, nil
}

// Close leaves the mesh; it breaks every connection.
func (m *mesh) Close() error {
	m.stop()
	<-m.done
	return m.node.Close()
}

// coordinate keeps a coordination stream open until ctx is done, beginning with the link given.
func (m *mesh) coordinate(ctx context.Context, link *client.Link) {
	defer close(m.done)
	wait := minRedial
	for {
		if link != nil {
			start := time.Now()
			err := m.follow(ctx, link)
			link.Close()
			m.log.Debug("coordination ended", "error", err)
			if time.Since(start) > maxRedial {
				wait = minRedial
			}
		}
		// Up to half as long again, so that many clients of one server do not come back in step.
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait + rand.N(wait/2)):
		}
		wait = min(2*wait, maxRedial)
		var err error
		if link, err = m.server.Coordinate(ctx, m.agent.ID, m.resume); err != nil {
			m.log.Debug("cannot coordinate", "error", err)
			link = nil
		}
	}
}

// follow runs everything that goes over one link.
func (m *mesh) follow(ctx context.Context, link *client.Link) error {
	// The stream outlives ctx by the moment that saying goodbye takes.
	stream, err := link.Tailnet.Coordinate(context.WithoutCancel(ctx))
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		if err := m.node.CoordinateClient(ctx, stream, m.agent.ID); err != nil {
			return err
		}
		return errors.New("the stream ended")
	})
	group.Go(func() error { return ignoreMissing(m.followRelays(ctx, link)) })
	group.Go(func() error { return ignoreMissing(m.keepResumeToken(ctx, link)) })
	return group.Wait()
}

// ignoreMissing drops the error of a method that the server does not have.
func ignoreMissing(err error) error {
	if rpc.Unimplemented(err) {
		return nil
	}
	return err
}

// followRelays takes over each relay map that the server sends.
func (m *mesh) followRelays(ctx context.Context, link *client.Link) error {
	maps, err := link.Tailnet.StreamDERPMaps(ctx, &tailnetpb.StreamDERPMapsRequest{})
	if err != nil {
		return err
	}
	for {
		relays, err := maps.Recv()
		if err != nil {
			return err
		}
		if err := m.node.SetDERPMap(relays); err != nil {
			m.log.Warn("the server sent a relay map that cannot be used", "error", err)
		}
	}
}

// keepResumeToken keeps a token that lets the next link be the same peer.
func (m *mesh) keepResumeToken(ctx context.Context, link *client.Link) error {
	for {
		answer, err := link.Tailnet.RefreshResumeToken(ctx, &tailnetpb.RefreshResumeTokenRequest{})
		if err != nil {
			return err
		}
		m.resume = answer.GetToken()
		again := answer.GetRefreshIn().AsDuration()
		if again <= 0 {
			again = defaultTokenRefresh
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(again):
		}
	}
}

// await returns when the agent answers on the mesh, or says why it does not.
func (m *mesh) await(ctx context.Context) error {
	err := m.node.AwaitReachable(ctx, wire.AgentAddr(m.agent.ID))
	if err == nil || ctx.Err() == nil || errors.Is(ctx.Err(), context.Canceled) {
		return err
	}
	const brief = 5 * time.Second // the question is only asked to explain
	asking, cancel := context.WithTimeout(context.WithoutCancel(ctx), brief)
	defer cancel()
	a, err := m.server.Agent(asking, m.agent.ID)
	switch {
	case err != nil:
		return m.server.problem("reach agent "+m.agent.Name, err)
	case a.Status != wire.AgentConnected:
		return fmt.Errorf("cannot reach agent %s: it is %s; check that berthd runs there and can reach the server", m.agent.Name, a.Status)
	}
	return fmt.Errorf("cannot reach agent %s: the server sees it, but neither a direct path nor the relay leads there; check that the relay (%s/derp) can be reached from both ends",
		m.agent.Name, m.server.access.url.Redacted())
}

// dial opens a connection to a port of the agent.
func (m *mesh) dial(ctx context.Context, port uint16) (net.Conn, error) {
	if err := m.await(ctx); err != nil {
		return nil, err
	}
	return m.connect(ctx, port)
}

// connect is dial for an agent that is known to be there.
func (m *mesh) connect(ctx context.Context, port uint16) (net.Conn, error) {
	conn, err := m.node.DialTCP(ctx, netip.AddrPortFrom(wire.AgentAddr(m.agent.ID), port))
	if err != nil {
		return nil, fmt.Errorf("cannot connect to port %d of agent %s: %w", port, m.agent.Name, err)
	}
	return conn, nil
}

// ping asks for a sign of life, whichever way it goes.
func (m *mesh) ping(ctx context.Context) (tailnet.Ping, error) {
	return m.node.Ping(ctx, wire.AgentAddr(m.agent.ID))
}

// probe returns when the agent is gone, which a silent TCP connection does not notice, or ctx is done. heard is set
// whenever something comes from the agent; ask sends it something, which makes a restarted agent reset the connection.
// Pings, which do not queue behind what the connection carries, show a dead path.
func (m *mesh) probe(ctx context.Context, heard *atomic.Bool, ask func()) {
	for missed := 0; missed < probesLost && ctx.Err() == nil; {
		if missed == 0 {
			select {
			case <-ctx.Done():
				return
			case <-time.After(probeInterval):
			}
			ask()
		}
		if heard.Swap(false) {
			missed = 0
			continue
		}
		pinging, cancel := context.WithTimeout(ctx, probeTimeout)
		_, err := m.ping(pinging)
		cancel()
		if err != nil {
			missed++
		} else {
			missed = 0
		}
	}
}

// path says how the agent is reached.
func path(p tailnet.Ping) string {
	if p.Direct.IsValid() {
		return "direct, " + p.Direct.String()
	}
	if p.RegionName != "" {
		return "relayed by " + p.RegionName
	}
	return fmt.Sprintf("relayed by region %d", p.Region)
}

// reach finds an agent, joins its mesh and waits until it answers, telling of it on a terminal.
func (p *program) reach(ctx context.Context, name string, wait time.Duration) (*mesh, error) {
	line := p.progress()
	defer line.done()
	line.say("finding %s…", name)
	s, agent, err := p.find(ctx, name)
	if err != nil {
		return nil, err
	}
	line.say("joining the mesh of %s…", agent.Name)
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	m, err := joinMesh(ctx, s, agent, p.log())
	if err != nil {
		return nil, err
	}
	if agent.Status == wire.AgentConnected {
		line.say("connecting to %s…", agent.Name)
	} else {
		line.say("waiting for %s, which is %s…", agent.Name, agent.Status)
	}
	if err := m.await(ctx); err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}
