package agent

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/berthd/berth/tailnet"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
	"github.com/berthd/berth/wire/tailnetpb"
)

// mesh holds the node while it is up. The node outlives links; what a link runs on it is counted,
// so that the node is closed only after peers were told that it leaves.
type mesh struct {
	node    *tailnet.Node
	leaving context.Context
	leave   context.CancelFunc
	users   sync.RWMutex
}

func newMesh(n *tailnet.Node) *mesh {
	m := &mesh{node: n}
	m.leaving, m.leave = context.WithCancel(context.Background())
	return m
}

// use runs f on the node with a context that also ends when the node is about to close. It does
// nothing if that has begun.
func (m *mesh) use(ctx context.Context, f func(context.Context, *tailnet.Node) error) error {
	m.users.RLock()
	defer m.users.RUnlock()
	if m.leaving.Err() != nil {
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(m.leaving, cancel)()
	err := f(ctx, m.node)
	if m.leaving.Err() != nil {
		return nil
	}
	return err
}

// close ends every use, waits for them, and closes the node.
func (m *mesh) close() error {
	m.leave()
	m.users.Lock()
	defer m.users.Unlock()
	return m.node.Close()
}

// runNode is the mesh node's stage: it waits for the first manifest, which says who we are.
func (a *agent) runNode(ctx context.Context) error {
	m, ok := a.first.wait(ctx)
	if !ok {
		return nil
	}
	id := optionalID(m.GetAgentId())
	node, err := tailnet.New(tailnet.Config{
		Prefixes:        wire.AgentPrefixes(id),
		NodeID:          nodeID(id),
		RelayOnly:       a.relayOnly(m),
		ListenPort:      a.cfg.Mesh.ListenPort,
		ForwardLoopback: true,
		AccessURL:       a.cfg.Server.URL,
		TLS:             a.cfg.Server.TLS,
		Header:          func() http.Header { return a.cfg.Server.Header.Clone() },
		ForceWebsocket:  m.GetDerpForceWebsockets(),
		Log:             slog.New(verbose{a.log.Handler(), &a.meshDebug}).With("part", "tailnet"),
	})
	if err != nil {
		return fmt.Errorf("cannot make the mesh node: %w", err)
	}
	a.setRelayMap(node, m.GetDerpMap())
	up := newMesh(node)
	a.mesh.set(up)
	<-ctx.Done()
	return up.close()
}

// nodeID derives the number a node publishes from the agent's id, as stock agents do.
func nodeID(id uuid.UUID) int64 {
	n := int64(binary.BigEndian.Uint64(id[8:]))
	if n < 0 {
		n = -n
	}
	return n
}

// relayOnly tells whether direct paths are forbidden, by the server or by our own settings.
func (a *agent) relayOnly(m *agentpb.Manifest) bool {
	return a.cfg.Mesh.RelayOnly || m.GetDisableDirectConnections()
}

const (
	// joinPoll is how often a node is asked whether it has found its relay; it takes some 100 ms.
	joinPoll = 20 * time.Millisecond
	// endpointGrace is how long after the relay its own endpoints may take to be found.
	endpointGrace = 500 * time.Millisecond
)

// announceJoin tells when the node has a relay, and whether peers could reach it directly. It
// returns when it has, or ctx is done; then the next link's call goes on waiting.
func (a *agent) announceJoin(ctx context.Context, node *tailnet.Node) {
	tick := time.NewTicker(joinPoll)
	defer tick.Stop()
	var home time.Time
	for {
		self := node.Self()
		if home.IsZero() && node.Home() != 0 {
			home = time.Now()
		}
		path := a.pathFor(self)
		if !home.IsZero() && (path == pathDirect || time.Since(home) > endpointGrace) {
			a.joined.Store(true)
			a.log.Info("joined the mesh", "path", path, "home_region", node.Home())
			a.emit(Event{Step: StepTailnet, Path: path})
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// How peers come to a node.
const (
	pathDirect  = "direct"
	pathRelayed = "relayed"
)

// pathFor tells whether peers could reach a node directly that they are told this of.
func (a *agent) pathFor(self *tailnetpb.Node) string {
	if len(self.GetEndpoints()) > 0 && !a.relayOnly(a.manifest.Load()) {
		return pathDirect
	}
	return pathRelayed
}

// path is pathFor the node as it is; "" before it has joined the mesh.
func (a *agent) path() string {
	if !a.joined.Load() {
		return ""
	}
	return a.pathFor(a.self())
}

// self is what peers are told of the node; nil before there is one, and after.
func (a *agent) self() (self *tailnetpb.Node) {
	up, ok := a.mesh.now()
	if !ok {
		return nil
	}
	_ = up.use(context.Background(), func(_ context.Context, n *tailnet.Node) error {
		self = n.Self()
		return nil
	})
	return self
}

// showMesh describes the node and its peers for people.
func (a *agent) showMesh(w io.Writer) {
	up, ok := a.mesh.now()
	if !ok {
		fmt.Fprintln(w, "not on the mesh yet")
		return
	}
	_ = up.use(context.Background(), func(_ context.Context, n *tailnet.Node) error {
		fmt.Fprintf(w, "home region %d\nendpoints %q\n", n.Home(), n.Self().GetEndpoints())
		for _, p := range n.Peers() {
			path := fmt.Sprintf("relayed by region %d", p.Region)
			if p.Direct.IsValid() {
				path = "direct " + p.Direct.String()
			}
			fmt.Fprintf(w, "peer %s %v: %s, last handshake %s, rx %d tx %d\n",
				p.ID, p.Addrs, path, p.LastHandshake.Format(time.RFC3339), p.RxBytes, p.TxBytes)
		}
		return nil
	})
}
