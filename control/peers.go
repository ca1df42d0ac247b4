package control

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/berthd/berth/control/coordinator"
	"github.com/berthd/berth/tailnet"
	"github.com/berthd/berth/wire"
)

// Tunnels of the server's own node: one to each agent it was asked to reach, kept for a while
// because the next question about an agent comes soon, and a tunnel takes a moment to come up.
const (
	tunnelIdle  = 30 * time.Minute
	tunnelCheck = 5 * time.Minute
	tunnelRetry = time.Second
)

// peers is the server's own node on the mesh, with which it reaches agents for people that have no
// node. It starts with the first use.
type peers struct {
	server *Server

	mu      sync.Mutex
	running context.Context // nil outside run
	node    *tailnet.Node
	relay   *pipeListener
	tunnels map[uuid.UUID]*tunnel
	tasks   sync.WaitGroup
}

// tunnel is the way to one agent. Its fields belong to the lock of peers.
type tunnel struct {
	users int
	used  time.Time
	end   context.CancelFunc
}

func newPeers(s *Server) *peers { return &peers{server: s, tunnels: make(map[uuid.UUID]*tunnel)} }

// run ends tunnels that nobody uses, and all of them when ctx is done.
func (p *peers) run(ctx context.Context) error {
	p.mu.Lock()
	p.running = ctx
	p.mu.Unlock()
	ticker := time.NewTicker(tunnelCheck)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return p.close()
		case now := <-ticker.C:
			p.mu.Lock()
			for id, t := range p.tunnels {
				if t.users == 0 && now.Sub(t.used) >= tunnelIdle {
					t.end()
					delete(p.tunnels, id)
				}
			}
			p.mu.Unlock()
		}
	}
}

func (p *peers) close() error {
	p.mu.Lock()
	p.running = nil
	node, relay := p.node, p.relay
	p.node, p.relay = nil, nil
	clear(p.tunnels) // their context has ended
	p.mu.Unlock()
	var err error
	if node != nil {
		err = node.Close()
		relay.Close()
	}
	p.tasks.Wait()
	return err
}

// acquire makes sure of a tunnel to an agent until release is called.
func (p *peers) acquire(agent uuid.UUID) (_ *tailnet.Node, release func(), _ error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.running == nil {
		return nil, nil, fmt.Errorf("cannot reach an agent: the server is not running")
	}
	if p.node == nil {
		if err := p.start(); err != nil {
			return nil, nil, err
		}
	}
	t := p.tunnels[agent]
	if t == nil {
		ctx, end := context.WithCancel(p.running)
		t = &tunnel{end: end}
		p.tunnels[agent] = t
		node := p.node
		p.tasks.Go(func() { p.keepTunnel(ctx, node, agent) })
	}
	t.users++
	var once sync.Once
	return p.node, func() {
		once.Do(func() {
			p.mu.Lock()
			defer p.mu.Unlock()
			t.users--
			t.used = time.Now()
		})
	}, nil
}

// start makes the node; p.mu is held. It reaches the embedded relay through memory: the access URL
// may not be reachable from the server itself.
func (p *peers) start() error {
	access := *p.server.config.AccessURL
	access.Scheme = "http" // there is nobody to encrypt for
	relay := newPipeListener()
	web := &http.Server{Handler: p.server.relay.Handler(), ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout}
	node, err := tailnet.New(tailnet.Config{
		Prefixes:  []netip.Prefix{netip.PrefixFrom(wire.RandomAddr(), 128)},
		RelayOnly: p.server.config.RelayOnly,
		AccessURL: &access,
		DialRelay: relay.dial,
		Proxy:     func(*http.Request) (*url.URL, error) { return nil, nil },
		Log:       p.server.log.With("node", "server"),
	})
	if err != nil {
		return fmt.Errorf("cannot start the server's node: %w", err)
	}
	relayMap := p.server.relayMap.Proto()
	for _, region := range relayMap.Regions {
		for _, n := range region.Nodes {
			n.ForceHttp = true
		}
	}
	if err := node.SetDERPMap(relayMap); err != nil {
		node.Close()
		return fmt.Errorf("cannot start the server's node: %w", err)
	}
	p.node, p.relay = node, relay
	p.tasks.Go(func() {
		defer web.Close()
		_ = web.Serve(relay) // ends with the listener
	})
	return nil
}

// keepTunnel coordinates with one agent until ctx is done.
func (p *peers) keepTunnel(ctx context.Context, node *tailnet.Node, agent uuid.UUID) {
	peer := coordinator.Peer{ID: uuid.New(), Auth: coordinator.ClientAuth(agent)}
	for ctx.Err() == nil {
		stream := p.server.coordinator.Connect(ctx, peer)
		if err := node.CoordinateClient(ctx, stream, agent); err != nil {
			p.server.log.Debug("lost a tunnel", "agent", agent, "err", err)
		}
		timer := time.NewTimer(tunnelRetry)
		select {
		case <-ctx.Done():
		case <-timer.C:
		}
		timer.Stop()
	}
}

// dial connects to a port of an agent.
func (p *peers) dial(ctx context.Context, agent uuid.UUID, port uint16) (net.Conn, error) {
	node, release, err := p.acquire(agent)
	if err != nil {
		return nil, err
	}
	addr := wire.AgentAddr(agent)
	if err := node.AwaitReachable(ctx, addr); err != nil {
		release()
		return nil, err
	}
	conn, err := node.DialTCP(ctx, netip.AddrPortFrom(addr, port))
	if err != nil {
		release()
		return nil, fmt.Errorf("cannot dial port %d: %w", port, err)
	}
	return &tunnelConn{Conn: conn, release: release}, nil
}

// tunnelConn lets go of its tunnel when it is closed.
type tunnelConn struct {
	net.Conn
	release func()
}

func (c *tunnelConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}

// client returns an HTTP client that talks to one agent whatever a URL or an answer says: a hostile
// agent cannot send it elsewhere.
func (p *peers) client(agent uuid.UUID) *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				conn, err := p.dial(ctx, agent, wire.PortHTTP)
				if err != nil {
					return nil, unreachable{err}
				}
				return conn, nil
			},
			DisableKeepAlives:      true,
			MaxResponseHeaderBytes: 64 << 10,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// pipeListener is a listener whose connections are dialled within the process.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newPipeListener() *pipeListener {
	return &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (l *pipeListener) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	ours, theirs := net.Pipe()
	select {
	case l.conns <- theirs:
		return ours, nil
	case <-l.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Accept implements [net.Listener].
func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close implements [net.Listener].
func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

// Addr implements [net.Listener].
func (l *pipeListener) Addr() net.Addr { return pipeAddr{} }

type pipeAddr struct{}

func (pipeAddr) Network() string { return "pipe" }
func (pipeAddr) String() string  { return "embedded relay" }
