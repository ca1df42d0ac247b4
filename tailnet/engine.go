package tailnet

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"go4.org/netipx"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"tailscale.com/envknob"
	"tailscale.com/net/dns"
	"tailscale.com/net/netmon"
	"tailscale.com/net/netns"
	"tailscale.com/net/packet"
	"tailscale.com/net/tsdial"
	"tailscale.com/net/tstun"
	"tailscale.com/tailcfg"
	"tailscale.com/tsd"
	"tailscale.com/types/ipproto"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"
	"tailscale.com/types/netlogfunc"
	"tailscale.com/types/netmap"
	"tailscale.com/types/nettype"
	"tailscale.com/types/views"
	"tailscale.com/util/eventbus"
	"tailscale.com/wgengine"
	"tailscale.com/wgengine/filter"
	"tailscale.com/wgengine/magicsock"
	"tailscale.com/wgengine/netstack"
	"tailscale.com/wgengine/netstack/gro"
	"tailscale.com/wgengine/router"
	"tailscale.com/wgengine/wgcfg"
)

// The library has settings of the process rather than of a node. This package
// is its only user, and sets them before the first node exists.
func init() {
	// As root the library would mark its sockets or bind them to the interface
	// of the default route, which breaks machines with several or none.
	netns.SetEnabled(false)
	// Nothing uploads logs; this keeps it so if something linked in would.
	envknob.SetNoLogsNoSupport()
	// Relays are spoken to through relayFront, a listener on loopback, so TLS
	// on that leg would only cost time. What crosses the network is what the
	// relay's own address asks for.
	envknob.Setenv("TS_DEBUG_USE_DERP_HTTP", "true")
	envknob.Setenv("TS_DEBUG_MTU", strconv.Itoa(relayMTU))
}

// A path may fail for a while: a direct one is given up only after 6.5 s, and a
// relay in the control server is away while that restarts. A connection must
// outlive that, and go on soon after, so a lost segment is sent again at least
// every three seconds, for five minutes. The stack's own limits are a connection
// that ends after 12 s (with stock nodes' five retries) or that sleeps for two
// minutes between tries.
const (
	tcpMaxRTO     = 3 * time.Second
	tcpMaxRetries = 100
)

// tcpWindow bounds the bytes of one connection on their way. Each packet of them
// that waits between the stack and the network holds 64 KiB, so the stack's own
// bound of 8 MiB means over 400 MB at full speed, and a collector that works hard
// to keep it down; with 2 MiB the same speed takes a third of the memory and less
// processor time (bench/mesh). It allows 20 MB/s over a path of 100 ms.
const tcpWindow, tcpWindowFirst = 2 << 20, 1 << 20

// engine is the library's node: WireGuard, the socket that finds paths, and a
// TCP/IP stack, put together in the order in which they work.
type engine struct {
	bus    *eventbus.Bus
	mon    *netmon.Monitor
	dialer *tsdial.Dialer
	eng    wgengine.Engine
	magic  *magicsock.Conn
	tun    *tstun.Wrapper
	stack  *netstack.Impl
	self   tailcfg.NodeView

	drains sync.WaitGroup // see changePeers
}

// hooks are what the engine asks of the node. All are called concurrently.
type hooks struct {
	peerByIP  func(netip.Addr) (key.NodePublic, bool) // for every outbound packet
	allowed   func(key.NodePublic) ([]netip.Prefix, bool)
	nodeByIP  func(netip.Addr) (wgengine.PeerForIP, bool)
	endpoints func([]netip.AddrPort)
	homeMoved func(region int)
	tcp       func(src, dst netip.AddrPort) (handler func(net.Conn), intercept bool)
	udp       func(src, dst netip.AddrPort) (handler func(nettype.ConnPacketConn), intercept bool)
	outbound  tstun.FilterFunc             // for every packet that leaves the stack
	inbound   func(*packet.Parsed)         // for every packet that enters it
	tunneled  netlogfunc.ConnectionCounter // counts what leaves, inside the tunnel
	sent      netlogfunc.ConnectionCounter // counts what leaves and arrives, outside it
}

func newEngine(cfg *Config, private key.NodePrivate, h hooks) (_ *engine, err error) {
	logf := libraryLog(cfg.Log)
	sys := tsd.NewSystem()
	e := &engine{bus: sys.Bus.Get(), dialer: &tsdial.Dialer{Logf: logf}}
	defer func() {
		if err != nil {
			e.close()
		}
	}()
	e.dialer.SetBus(e.bus)
	if e.mon, err = netmon.New(e.bus, logf); err != nil {
		return nil, fmt.Errorf("cannot watch the network interfaces: %w", err)
	}
	e.eng, err = wgengine.NewUserspaceEngine(logf, wgengine.Config{
		EventBus: e.bus, NetMon: e.mon, Dialer: e.dialer, ListenPort: cfg.ListenPort,
		SetSubsystem: sys.Set, ControlKnobs: sys.ControlKnobs(),
		HealthTracker: sys.HealthTracker.Get(), Metrics: sys.UserMetricsRegistry(),
	})
	if err != nil {
		return nil, fmt.Errorf("cannot start WireGuard: %w", err)
	}
	sys.Set(e.eng)
	e.magic, e.tun = sys.MagicSock.Get(), sys.Tun.Get()
	// Before the first look at the network, which would send STUN.
	e.magic.SetOnlyTCP443(cfg.RelayOnly)
	// The socket does nothing while it believes every interface is down, which
	// it does on a machine with nothing but loopback.
	e.magic.SetNetworkUp(true)

	e.eng.SetPeerByIPPacketFunc(h.peerByIP)
	e.eng.SetPeerConfigFunc(h.allowed)
	e.eng.SetPeerForIPFunc(h.nodeByIP)

	e.stack, err = netstack.Create(logf, e.tun, e.eng, e.magic, e.dialer, sys.DNSManager.Get(), sys.ProxyMapper())
	if err != nil {
		return nil, fmt.Errorf("cannot start the TCP/IP stack: %w", err)
	}
	sys.Set(e.stack)
	e.stack.ProcessLocalIPs = true
	e.stack.GetTCPHandlerForFlow = h.tcp
	e.stack.GetUDPHandlerForFlow = h.udp
	inject := e.tun.PostFilterPacketInboundFromWireGuard
	e.tun.PostFilterPacketInboundFromWireGuard = func(p *packet.Parsed, w *tstun.Wrapper, g *gro.GRO) (filter.Response, *gro.GRO) {
		h.inbound(p)
		return inject(p, w, g)
	}
	e.tun.PreFilterPacketOutboundToWireGuardAppConnectorIntercept = h.outbound
	e.tun.SetConnectionCounter(h.tunneled)
	e.magic.SetConnectionCounter(h.sent)
	if err := e.tune(); err != nil {
		return nil, err
	}
	e.tun.Start()
	if err := e.stack.Start(nil); err != nil {
		return nil, fmt.Errorf("cannot start the TCP/IP stack: %w", err)
	}
	e.watch(h)
	return e, e.configure(cfg, private, logf)
}

// tune sets what differs from the stack's defaults.
func (e *engine) tune() error {
	rto, retries := tcpip.TCPMaxRTOOption(tcpMaxRTO), tcpip.TCPMaxRetriesOption(tcpMaxRetries)
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: tcpWindowFirst, Max: tcpWindow}
	send := tcpip.TCPSendBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: tcpWindowFirst, Max: tcpWindow}
	for _, opt := range []tcpip.SettableTransportProtocolOption{&rto, &retries, &receive, &send} {
		if err := e.stack.SetTransportProtocolOption(tcp.ProtocolNumber, opt); err != nil {
			return fmt.Errorf("cannot set %T to %v: %v", opt, opt, err)
		}
	}
	return nil
}

// watch subscribes to what the library finds out by itself.
func (e *engine) watch(h hooks) {
	e.eng.SetStatusCallback(func(s *wgengine.Status, err error) {
		if err != nil {
			return
		}
		addrs := make([]netip.AddrPort, len(s.LocalAddrs))
		for i, ep := range s.LocalAddrs {
			addrs[i] = ep.Addr
		}
		h.endpoints(addrs)
	})
	client := e.bus.Client("berth")
	eventbus.SubscribeFunc(client, func(c magicsock.HomeDERPChanged) { h.homeMoved(c.New) })
	eventbus.SubscribeFunc(client, func(netmon.ChangeDelta) {
		// Every change of an interface sets this anew, wrongly on an isolated host.
		e.magic.SetNetworkUp(true)
	})
}

// configure gives the node its key, its addresses and a packet filter.
func (e *engine) configure(cfg *Config, private key.NodePrivate, logf logger.Logf) error {
	e.self = (&tailcfg.Node{
		ID:         1,
		Key:        private.Public(),
		DiscoKey:   e.magic.DiscoPublicKey(),
		Addresses:  cfg.Prefixes,
		AllowedIPs: cfg.Prefixes,
		Hostinfo:   (&tailcfg.Hostinfo{}).View(),
	}).View()
	e.stack.UpdateNetstackIPs(&netmap.NetworkMap{SelfNode: e.self, NodeKey: private.Public()})
	e.magic.SetNetworkMap(e.self, nil)
	e.eng.SetSelfNode(e.self)

	var local netipx.IPSetBuilder
	for _, p := range cfg.Prefixes {
		local.AddPrefix(p)
	}
	localSet, err := local.IPSet()
	if err != nil {
		return fmt.Errorf("cannot make the packet filter: %w", err)
	}
	all := netip.MustParsePrefix("::/0")
	e.eng.SetFilter(filter.New([]filter.Match{{
		IPProto: views.SliceOf([]ipproto.Proto{ipproto.TCP, ipproto.UDP, ipproto.ICMPv6, ipproto.SCTP}),
		Srcs:    []netip.Prefix{all},
		Dsts:    []filter.NetPortRange{{Net: all, Ports: filter.PortRange{First: 0, Last: 65535}}},
	}}, nil, localSet, &netipx.IPSet{}, nil, logf))
	err = e.eng.Reconfig(&wgcfg.Config{PrivateKey: private, Addresses: cfg.Prefixes},
		&router.Config{LocalAddrs: cfg.Prefixes}, &dns.Config{})
	if err != nil {
		return fmt.Errorf("cannot configure WireGuard: %w", err)
	}
	return nil
}

// syncPeer has WireGuard look again at what a peer may have, resetPeer makes its state anew.
func (e *engine) syncPeer(k key.NodePublic)  { e.changePeers(func() { e.eng.SyncDevicePeer(k) }) }
func (e *engine) resetPeer(k key.NodePublic) { e.changePeers(func() { e.eng.ResetDevicePeer(k) }) }

// stuckAfter is how long a change of the peers may take, which is well under a millisecond on an idle machine.
const stuckAfter = 500 * time.Millisecond

// changePeers makes a change, which by itself can lock up for good: to remove a peer WireGuard waits for what handles that peer's packets, holding the
// lock that sending any packet needs; and what handles a ping waits until the answer can be sent. So once a change takes long, packets
// are taken from those that wait to be sent, and lost, until it is done. TCP sends again what is lost, and so does who pings.
func (e *engine) changePeers(change func()) {
	changed := make(chan struct{})
	stuck := time.AfterFunc(stuckAfter, func() { e.drains.Go(func() { e.drain(changed) }) })
	change()
	close(changed)
	stuck.Stop()
}

// drain loses packets that wait to be sent, until a change is done and one more has come.
func (e *engine) drain(changed <-chan struct{}) {
	packet, size := [][]byte{make([]byte, tstun.MaxPacketSize)}, make([]int, 1)
	for {
		select {
		case <-changed:
			return
		default:
		}
		if _, err := e.tun.Read(packet, size, 0); errors.Is(err, io.EOF) {
			return
		}
	}
}

// close stops what has been started, the users of a part before the part.
func (e *engine) close() {
	if e.stack != nil {
		// The stack first stops sending and then resets every connection, so
		// with more of them than its queue holds it would wait for ever.
		// Without an address it sends no resets.
		e.stack.UpdateNetstackIPs(&netmap.NetworkMap{SelfNode: (&tailcfg.Node{}).View()})
		e.stack.Close()
	}
	if e.mon != nil {
		e.mon.Close()
	}
	e.dialer.Close()
	if e.eng != nil {
		e.eng.Close()
	}
	e.drains.Wait()
	e.bus.Close()
}

// libraryLog passes the library's chatter on at debug level.
func libraryLog(log *slog.Logger) logger.Logf {
	return func(format string, args ...any) {
		log.Debug("mesh: " + strings.TrimSpace(fmt.Sprintf(format, args...)))
	}
}
