package tailnet

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"go.uber.org/goleak"
	"tailscale.com/ipn/ipnstate"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"github.com/berthd/berth/tailnet/relay"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/tailnetpb"
)

func TestMain(m *testing.M) {
	if os.Getenv(childVar) != "" {
		os.Exit(child())
	}
	goleak.VerifyTestMain(m)
}

// testRelay is a relay with STUN, as one region of a map.
type testRelay struct {
	server *relay.Server
	http   *httptest.Server
	stun   netip.AddrPort
}

func startRelay(t testing.TB, wrap func(http.Handler) http.Handler) *testRelay {
	t.Helper()
	r := &testRelay{server: relay.New(nil, nil)}
	h := r.server.Handler()
	if wrap != nil {
		h = wrap(h)
	}
	r.http = httptest.NewServer(h)
	var err error
	if r.stun, err = r.server.ListenSTUN("127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.server.Close()
		r.http.Close()
	})
	return r
}

func (r *testRelay) region(id int64) *tailnetpb.DERPMap_Region {
	a := r.http.Listener.Addr().(*net.TCPAddr)
	return &tailnetpb.DERPMap_Region{
		RegionId: id, RegionCode: fmt.Sprint("r", id), RegionName: fmt.Sprint("region ", id),
		Nodes: []*tailnetpb.DERPMap_Region_Node{
			{Name: "relay", RegionId: id, HostName: "127.0.0.1", DerpPort: int32(a.Port), StunPort: -1, ForceHttp: r.http.TLS == nil},
			{Name: "stun", RegionId: id, HostName: "127.0.0.1", StunPort: int32(r.stun.Port()), StunOnly: true},
		},
	}
}

func mapOf(regions ...*tailnetpb.DERPMap_Region) *tailnetpb.DERPMap {
	m := &tailnetpb.DERPMap{HomeParams: &tailnetpb.DERPMap_HomeParams{}, Regions: make(map[int64]*tailnetpb.DERPMap_Region)}
	for _, r := range regions {
		m.Regions[r.RegionId] = r
	}
	return m
}

// testNode is a node on a hub.
type testNode struct {
	*Node
	id   uuid.UUID
	stop func()
}

func (n *testNode) addr() netip.Addr             { return n.cfg.Prefixes[0].Addr() }
func (n *testNode) port(p uint16) netip.AddrPort { return netip.AddrPortFrom(n.addr(), p) }

func testLog(t testing.TB, name string) *slog.Logger {
	if !testing.Verbose() || os.Getenv("TAILNET_LOG") == "" {
		return nil
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})).With("node", name)
}

// startNode joins a hub: as an agent, or as a client of the destinations.
func startNode(t testing.TB, h *hub, dm *tailnetpb.DERPMap, cfg Config, id uuid.UUID, destinations ...uuid.UUID) *testNode {
	t.Helper()
	if cfg.Prefixes == nil {
		cfg.Prefixes = wire.AgentPrefixes(id)
		if len(destinations) > 0 {
			cfg.Prefixes = []netip.Prefix{netip.PrefixFrom(wire.RandomAddr(), 128)}
		}
	}
	if cfg.Log == nil {
		cfg.Log = testLog(t, id.String()[:4])
	}
	n, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.SetDERPMap(dm); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	s := h.join(id)
	go func() {
		if len(destinations) > 0 {
			ended <- n.CoordinateClient(ctx, s, destinations...)
		} else {
			ended <- n.CoordinateAgent(ctx, s)
		}
	}()
	tn := &testNode{Node: n, id: id}
	tn.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("coordination of %s ended: %v", id, err)
		}
		if err := n.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	t.Cleanup(tn.stop)
	return tn
}

// pair is an agent and a client of it.
func pair(t testing.TB, dm *tailnetpb.DERPMap, agentCfg, clientCfg Config) (agent, client *testNode) {
	h := newHub()
	a, c := uuid.New(), uuid.New()
	agent = startNode(t, h, dm, agentCfg, a)
	client = startNode(t, h, dm, clientCfg, c, a)
	return agent, client
}

func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// serveEcho echoes on a port of a node until the test ends.
func serveEcho(t testing.TB, n *testNode, port uint16) {
	t.Helper()
	l, err := n.Listen(port)
	if err != nil {
		t.Fatal(err)
	}
	go echo(l)
	t.Cleanup(func() { l.Close() })
}

func echo(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			io.Copy(c, c)
			c.(interface{ CloseWrite() error }).CloseWrite()
			c.Close()
		}()
	}
}

// exchange sends bytes to an echo and wants them back.
func exchange(t testing.TB, n *testNode, to netip.AddrPort, size int) {
	t.Helper()
	ctx := within(t, 20*time.Second)
	c, err := n.DialTCP(ctx, to)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	sent := make([]byte, size)
	rand.Read(sent)
	go func() {
		c.Write(sent)
		c.(interface{ CloseWrite() error }).CloseWrite()
	}()
	c.SetReadDeadline(time.Now().Add(20 * time.Second))
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, sent) {
		t.Fatalf("echo of %d bytes: got %d, err %v", size, len(got), err)
	}
}

// awaitPath polls pings until the way to a peer is of the wanted kind.
func awaitPath(t testing.TB, n *testNode, to netip.Addr, direct bool, limit time.Duration) {
	t.Helper()
	ctx := within(t, limit)
	for {
		one, cancel := context.WithTimeout(ctx, time.Second)
		p, err := n.Ping(one, to)
		cancel()
		if err == nil && p.Direct.IsValid() == direct {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("path to %v is not direct=%v after %v: last ping %+v, %v", to, direct, limit, p, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func TestDirect(t *testing.T) {
	r := startRelay(t, nil)
	agent, client := pair(t, mapOf(r.region(1)), Config{}, Config{})
	serveEcho(t, agent, 1)
	start := time.Now()
	if err := client.AwaitReachable(within(t, 20*time.Second), agent.addr()); err != nil {
		t.Fatal(err)
	}
	t.Log("reachable after", time.Since(start))
	awaitPath(t, client, agent.addr(), true, 10*time.Second)
	exchange(t, client, agent.port(1), 4<<20)
	if _, err := client.DialTCP(within(t, 5*time.Second), agent.port(2)); err == nil {
		t.Error("a port without a listener accepted")
	}
	peers := client.Peers()
	if len(peers) != 1 || peers[0].ID != agent.id || !peers[0].Direct.IsValid() || peers[0].LastHandshake.IsZero() {
		t.Errorf("peers: %+v", peers)
	}
	if s := client.Stats(); s.Flows["TCP"] == 0 || s.TxBytes < 4<<20 || s.RxBytes < 4<<20 {
		t.Errorf("stats: %+v", s)
	}
}

func TestRelayOnlyAndLiveSwitch(t *testing.T) {
	r := startRelay(t, nil)
	agent, client := pair(t, mapOf(r.region(1)), Config{}, Config{RelayOnly: true})
	serveEcho(t, agent, 1)
	if err := client.AwaitReachable(within(t, 20*time.Second), agent.addr()); err != nil {
		t.Fatal(err)
	}
	exchange(t, client, agent.port(1), 4<<20)
	if eps := client.Self().Endpoints; len(eps) != 0 {
		t.Errorf("a relay-only node publishes endpoints %v", eps)
	}
	if p, err := client.Ping(within(t, 5*time.Second), agent.addr()); err != nil || p.Direct.IsValid() || p.Region != 1 {
		t.Errorf("ping of a relay-only node: %+v, %v", p, err)
	}

	// One stream lives through both switches.
	c, err := client.DialTCP(within(t, 10*time.Second), agent.port(1))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	client.SetRelayOnly(false)
	awaitPath(t, client, agent.addr(), true, 10*time.Second)
	roundTrip(t, c, 1<<20)
	client.SetRelayOnly(true)
	awaitPath(t, client, agent.addr(), false, 10*time.Second)
	roundTrip(t, c, 1<<20)
}

// roundTrip sends bytes over an open connection to an echo.
func roundTrip(t testing.TB, c net.Conn, size int) {
	t.Helper()
	sent, got := make([]byte, size), make([]byte, size)
	rand.Read(sent)
	c.SetDeadline(time.Now().Add(20 * time.Second))
	defer c.SetDeadline(time.Time{})
	go c.Write(sent)
	if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(sent, got) {
		t.Fatalf("round trip of %d bytes: %v, equal %v", size, err, bytes.Equal(sent, got))
	}
}

func TestPeersComeAndGo(t *testing.T) {
	r := startRelay(t, nil)
	dm := mapOf(r.region(1))
	h := newHub()
	a, b := uuid.New(), uuid.New()
	agent := startNode(t, h, dm, Config{}, a)
	serveEcho(t, agent, 1)
	first := startNode(t, h, dm, Config{}, uuid.New(), a)
	long, err := first.DialTCP(awaited(t, first, agent), agent.port(1))
	if err != nil {
		t.Fatal(err)
	}
	defer long.Close()

	second := startNode(t, h, dm, Config{}, b, a)
	awaited(t, second, agent)
	exchange(t, second, agent.port(1), 1<<16)
	second.stop()
	awaitPeers(t, agent, 1)
	roundTrip(t, long, 1<<16)

	// The same peer again, with new keys: a restart.
	second = startNode(t, h, dm, Config{}, b, a)
	awaited(t, second, agent)
	exchange(t, second, agent.port(1), 1<<16)
	roundTrip(t, long, 1<<16)
}

// TestPeersChangeWhilePinged: answering pings does not lock up with a change of the peers, as WireGuard would by itself.
func TestPeersChangeWhilePinged(t *testing.T) {
	r := startRelay(t, nil)
	dm := mapOf(r.region(1))
	h := newHub()
	a := uuid.New()
	agent := startNode(t, h, dm, Config{}, a)
	serveEcho(t, agent, 1)
	other := startNode(t, h, dm, Config{}, uuid.New(), a)
	awaited(t, other, agent)
	client := startNode(t, h, dm, Config{}, uuid.New(), a)
	awaited(t, client, agent)
	k, ok := agent.peers.keyByIP(client.addr())
	if !ok {
		t.Fatal("the agent does not know the client")
	}

	// While no packet leaves, a ping is being answered when the change begins, and more wait.
	hold, held := make(chan struct{}), make(chan struct{}, 1)
	agent.engine.eng.SetPeerByIPPacketFunc(func(to netip.Addr) (key.NodePublic, bool) {
		select {
		case held <- struct{}{}:
		default:
		}
		<-hold
		return agent.peers.keyByIP(to)
	})
	for range 20 {
		client.engine.eng.Ping(agent.addr(), tailcfg.PingTSMP, 0, func(*ipnstate.PingResult) {})
	}
	<-held
	changed := make(chan struct{})
	go func() { defer close(changed); agent.engine.resetPeer(k) }()
	select {
	case <-changed:
		t.Error("the change did not wait for the answers to pings: this test shows nothing any more")
	case <-time.After(stuckAfter / 2):
	}
	close(hold)
	select {
	case <-changed:
	case <-time.After(20 * time.Second):
		t.Fatal("a change of the peers did not end in 20 s")
	}
	exchange(t, other, agent.port(1), 1<<16)
}

func TestAgentRestart(t *testing.T) {
	r := startRelay(t, nil)
	dm := mapOf(r.region(1))
	h := newHub()
	a := uuid.New()
	agent := startNode(t, h, dm, Config{}, a)
	serveEcho(t, agent, 1)
	client := startNode(t, h, dm, Config{}, uuid.New(), a)
	awaited(t, client, agent)
	agent.stop()
	agent = startNode(t, h, dm, Config{}, a)
	serveEcho(t, agent, 1)
	start := time.Now()
	awaitPeerKey(t, client, agent)
	awaited(t, client, agent)
	exchange(t, client, agent.port(1), 1<<16)
	t.Log("reachable again after", time.Since(start)) // a lost handshake would show as 5 s or 15 s
}

func awaited(t testing.TB, n, to *testNode) context.Context {
	t.Helper()
	ctx := within(t, 20*time.Second)
	if err := n.AwaitReachable(ctx, to.addr()); err != nil {
		t.Fatal(err)
	}
	return ctx
}

// awaitPeers waits for a number of installed peers.
func awaitPeers(t testing.TB, n *testNode, want int) {
	t.Helper()
	awaitTable(t, n, func(i *peerIndex) bool { return len(i.byKey) == want })
}

func awaitPeerKey(t testing.TB, n, peer *testNode) {
	t.Helper()
	awaitTable(t, n, func(i *peerIndex) bool { _, ok := i.byKey[peer.key.Public()]; return ok })
}

func awaitTable(t testing.TB, n *testNode, ok func(*peerIndex) bool) {
	t.Helper()
	ctx := within(t, 10*time.Second)
	for {
		changed := n.peers.wait()
		if ok(n.peers.index.Load()) {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatalf("the peers never became as wanted: %+v", n.Peers())
		}
	}
}

func TestDERPMapChange(t *testing.T) {
	one, two := startRelay(t, nil), startRelay(t, nil)
	agent, client := pair(t, mapOf(one.region(1)), Config{RelayOnly: true}, Config{RelayOnly: true})
	serveEcho(t, agent, 1)
	c, err := client.DialTCP(awaited(t, client, agent), agent.port(1))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	roundTrip(t, c, 1<<16)
	for _, n := range []*testNode{agent, client} {
		if err := n.SetDERPMap(mapOf(two.region(2))); err != nil {
			t.Fatal(err)
		}
	}
	one.http.CloseClientConnections()
	roundTrip(t, c, 1<<16)
	for _, n := range []*testNode{agent, client} {
		if home := n.Home(); home != 2 {
			t.Errorf("home %d after the map changed to region 2", home)
		}
	}

	// The same map again changes nothing.
	client.mu.Lock()
	before := client.relays
	client.mu.Unlock()
	if err := client.SetDERPMap(mapOf(two.region(2))); err != nil {
		t.Fatal(err)
	}
	client.mu.Lock()
	if client.relays != before {
		t.Error("an equal map replaced the old one")
	}
	client.mu.Unlock()

	// The same region elsewhere: connections to the old relay must end.
	moved := startRelay(t, nil)
	for _, n := range []*testNode{agent, client} {
		if err := n.SetDERPMap(mapOf(moved.region(2))); err != nil {
			t.Fatal(err)
		}
	}
	roundTrip(t, c, 1<<16)
}

func TestUnusableMapRefused(t *testing.T) {
	r := startRelay(t, nil)
	n, err := New(Config{Prefixes: wire.AgentPrefixes(uuid.New())})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	stunOnly := r.region(1)
	stunOnly.Nodes = stunOnly.Nodes[1:]
	for name, m := range map[string]*tailnetpb.DERPMap{"nil": nil, "empty": mapOf(), "STUN only": mapOf(stunOnly)} {
		if err := n.SetDERPMap(m); err == nil || !strings.Contains(err.Error(), "has a relay") {
			t.Errorf("%s map: %v", name, err)
		}
	}
	embedded := r.region(1)
	embedded.EmbeddedRelay = true
	if err := n.SetDERPMap(mapOf(embedded)); err == nil || !strings.Contains(err.Error(), "access URL") {
		t.Errorf("embedded relay without access URL: %v", err)
	}
}

func TestSTUNOnlyRegionIsNeverHome(t *testing.T) {
	r := startRelay(t, nil)
	relayed, stunOnly := r.region(7), r.region(1)
	relayed.Nodes = relayed.Nodes[:1]
	stunOnly.Nodes = stunOnly.Nodes[1:]
	agent, client := pair(t, mapOf(relayed, stunOnly), Config{}, Config{})
	awaited(t, client, agent)
	for _, n := range []*testNode{agent, client} {
		if n.Home() != 7 {
			t.Errorf("home %d", n.Home())
		}
	}
}

// TestEmbeddedRelay reaches the relay at the access URL: with TLS of a private
// CA, headers that the server insists on, and through a dialer.
func TestEmbeddedRelay(t *testing.T) {
	server := relay.New(nil, nil)
	defer server.Close()
	var mu sync.Mutex
	refused := 0
	ts := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Pass") != "sesame" {
			mu.Lock()
			refused++
			mu.Unlock()
			http.Error(w, "no pass", http.StatusForbidden)
			return
		}
		server.Handler().ServeHTTP(w, r)
	}))
	ts.StartTLS()
	defer ts.Close()
	access, _ := url.Parse("https://example.com:8443/prefix")
	cfg := Config{
		RelayOnly: true, AccessURL: access,
		TLS:    tlsFor(ts),
		Header: func() http.Header { return http.Header{"X-Pass": {"sesame"}} },
		DialRelay: func(ctx context.Context, network, addr string) (net.Conn, error) {
			if addr != "example.com:8443" {
				return nil, errors.New("dialled " + addr)
			}
			return (&net.Dialer{}).DialContext(ctx, network, ts.Listener.Addr().String())
		},
	}
	region := &tailnetpb.DERPMap_Region{RegionId: 999, EmbeddedRelay: true, Nodes: []*tailnetpb.DERPMap_Region_Node{{HostName: "wrong.example", StunPort: -1}}}
	agent, client := pair(t, mapOf(region), cfg, cfg)
	serveEcho(t, agent, 1)
	awaited(t, client, agent)
	exchange(t, client, agent.port(1), 1<<20)
	mu.Lock()
	defer mu.Unlock()
	if refused != 0 {
		t.Errorf("%d requests came without the header", refused)
	}
}

// TestWebsocketRelay has a proxy in the way that lets only WebSocket upgrades pass.
// countingLog counts the lines that hold some words.
type countingLog struct {
	words string
	n     atomic.Int64
}

func (l *countingLog) Enabled(context.Context, slog.Level) bool { return true }
func (l *countingLog) WithAttrs([]slog.Attr) slog.Handler       { return l }
func (l *countingLog) WithGroup(string) slog.Handler            { return l }
func (l *countingLog) Handle(_ context.Context, r slog.Record) error {
	if strings.Contains(r.Message, l.words) {
		l.n.Add(1)
	}
	return nil
}

// Without STUN in the map, a relay that goes away must not make the library open its sockets
// anew again and again: it takes a look at the network without one packet sent for a broken socket.
func TestNoSTUNAndRelayGone(t *testing.T) {
	r := startRelay(t, nil)
	region := r.region(1)
	region.Nodes = region.Nodes[:1]
	rebinds := &countingLog{words: "Rebinding"}
	agent, client := pair(t, mapOf(region), Config{Log: slog.New(rebinds)}, Config{Log: slog.New(rebinds)})
	serveEcho(t, agent, 1)
	awaitPath(t, client, agent.addr(), true, 10*time.Second)

	r.http.CloseClientConnections()
	r.server.Close()
	r.http.Close()
	rebinds.n.Store(0)
	for start := time.Now(); time.Since(start) < 4*time.Second; {
		exchange(t, client, agent.port(1), 64<<10)
	}
	// Once or twice is the library's answer to a change; the loop makes hundreds a second.
	if n := rebinds.n.Load(); n > 3 {
		t.Errorf("sockets opened anew %d times in 4 s", n)
	}
}

func TestWebsocketRelay(t *testing.T) {
	for _, force := range []bool{false, true} {
		t.Run(fmt.Sprintf("force=%v", force), func(t *testing.T) {
			r := startRelay(t, func(h http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if strings.EqualFold(r.Header.Get("Upgrade"), "derp") {
						http.Error(w, "no such upgrade", http.StatusBadRequest)
						return
					}
					h.ServeHTTP(w, r)
				})
			})
			cfg := Config{RelayOnly: true, ForceWebsocket: force}
			agent, client := pair(t, mapOf(r.region(1)), cfg, cfg)
			serveEcho(t, agent, 1)
			awaited(t, client, agent)
			exchange(t, client, agent.port(1), 4<<20)
			if why := client.Self().DerpForcedWebsocket[1]; (why == "") != force {
				t.Errorf("forced WebSocket: %q", why)
			}
		})
	}
}

func TestPing(t *testing.T) {
	r := startRelay(t, nil)
	agent, client := pair(t, mapOf(r.region(1)), Config{}, Config{})
	awaited(t, client, agent)
	p, err := client.Ping(within(t, 5*time.Second), agent.addr())
	if err != nil || p.Latency <= 0 || p.Latency > time.Second {
		t.Errorf("ping: %+v, %v", p, err)
	}
	if _, err := client.Ping(within(t, time.Second), wire.RandomAddr()); !errors.Is(err, errNoPeer) {
		t.Errorf("ping of nobody: %v", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	if err := client.AwaitReachable(ctx, wire.RandomAddr()); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, errNoPeer) {
		t.Errorf("waiting for nobody: %v", err)
	}
}

// TestReservedRange has an agent whose id gives an address that the stack keeps
// for other purposes.
func TestReservedRange(t *testing.T) {
	r := startRelay(t, nil)
	dm := mapOf(r.region(1))
	h := newHub()
	a := uuid.MustParse("01020304-0506-0b1a-8000-000000000001")
	agent := startNode(t, h, dm, Config{}, a)
	serveEcho(t, agent, 1)
	client := startNode(t, h, dm, Config{}, uuid.New(), a)
	awaited(t, client, agent)
	exchange(t, client, agent.port(1), 1<<16)
}

func TestNewerPrefix(t *testing.T) {
	r := startRelay(t, nil)
	agent, client := pair(t, mapOf(r.region(1)), Config{}, Config{})
	serveEcho(t, agent, 1)
	awaited(t, client, agent)
	exchange(t, client, netip.AddrPortFrom(agent.cfg.Prefixes[1].Addr(), 1), 1<<16)
}

func TestClosedNode(t *testing.T) {
	n, err := New(Config{Prefixes: wire.AgentPrefixes(uuid.New())})
	if err != nil {
		t.Fatal(err)
	}
	l, err := n.Listen(1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.Listen(1); err == nil {
		t.Error("a port was given twice")
	}
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept after close: %v", err)
	}
	if _, err := n.Listen(2); !errors.Is(err, net.ErrClosed) {
		t.Errorf("listen after close: %v", err)
	}
	if err := n.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("second close: %v", err)
	}
}

func TestNoLeak(t *testing.T) {
	r := startRelay(t, nil)
	run := func() {
		agent, client := pair(t, mapOf(r.region(1)), Config{}, Config{})
		serveEcho(t, agent, 1)
		awaited(t, client, agent)
		exchange(t, client, agent.port(1), 1<<16)
		client.stop()
		agent.stop()
		r.http.CloseClientConnections()
	}
	run()
	before := openFiles(t)
	for range 3 {
		run()
	}
	// The relay notices the end of its connections on its own time.
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(5 * time.Second); openFiles(t) > before && time.Now().Before(deadline); {
		<-tick.C
	}
	if after := openFiles(t); after > before {
		t.Errorf("%d files open before three pairs of nodes, %d after", before, after)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(files)
}

func tlsFor(ts *httptest.Server) *tls.Config {
	pool := x509.NewCertPool()
	pool.AddCert(ts.Certificate())
	return &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
}
