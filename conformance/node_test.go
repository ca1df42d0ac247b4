package conformance

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tailscale/wireguard-go/conn"
	"github.com/tailscale/wireguard-go/device"
	"github.com/tailscale/wireguard-go/tun"
	"golang.org/x/crypto/curve25519"
	"golang.org/x/crypto/nacl/box"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// tunnelMTU is what the pages demand of every node.
const tunnelMTU = 1280

// wgKey is a Curve25519 key.
type wgKey = [32]byte

func newKey() (private, public wgKey) {
	rand.Read(private[:])
	private[0] &= 248
	private[31] = private[31]&127 | 64
	p, err := curve25519.X25519(private[:], curve25519.Basepoint)
	if err != nil {
		panic(err)
	}
	return private, wgKey(p)
}

// node is a face on the mesh made of the pages alone: WireGuard over DERP frames written by hand, TSMP and
// disco answered by hand, and no direct path at all.
type node struct {
	t            testing.TB
	private, key wgKey
	discoPrivate wgKey
	disco        wgKey
	id           int64
	addresses    []netip.Addr
	region       int64
	latency      float64
	relay        *relayConn
	wg           *device.Device
	stack        *stack.Stack
	link         *channel.Endpoint
	alive        context.Context
	die          context.CancelFunc
	inbox        chan packetFrom // WireGuard packets that came through the relay
	discoPongs   chan []byte     // from the transaction id on
	tsmp         chan []byte     // TSMP messages that came out of the tunnel
	answerTSMP   bool
	mu           sync.Mutex
	discoToNode  map[wgKey]wgKey
	peerKeys     map[string]wgKey // by peer id
}

type packetFrom struct {
	from wgKey
	data []byte
}

// newNode connects to the relay of the map and brings up the tunnel. The map is what the control server
// gave; access is the server's URL, from which the nodes of an embedded relay are rewritten.
func newNode(t testing.TB, access string, derpMap m, id int64, addresses ...netip.Addr) *node {
	t.Helper()
	n := &node{t: t, id: id, addresses: addresses, inbox: make(chan packetFrom, 1024),
		discoPongs: make(chan []byte, 16), tsmp: make(chan []byte, 64), answerTSMP: true,
		discoToNode: map[wgKey]wgKey{}, peerKeys: map[string]wgKey{}}
	n.alive, n.die = context.WithCancel(context.Background())
	n.private, n.key = newKey()
	n.discoPrivate, n.disco = newKey()
	host, region := relayOf(t, access, derpMap)
	n.region = region
	n.latency = latencyCheck(t, "http://"+host)
	relay, err := dialRelay(host, n.private, n.key)
	if err != nil {
		t.Fatalf("relay %s: %v", host, err)
	}
	n.relay = relay
	t.Cleanup(n.close)
	n.startStack()
	n.wg = device.NewDevice(n.tun(), (*relayBind)(n), &device.Logger{Verbosef: device.DiscardLogf, Errorf: device.DiscardLogf})
	if err := n.wg.IpcSet("private_key=" + hex.EncodeToString(n.private[:]) + "\n"); err != nil {
		t.Fatal(err)
	}
	if err := n.wg.Up(); err != nil {
		t.Fatal(err)
	}
	go n.readRelay()
	return n
}

func (n *node) close() {
	if n.alive.Err() != nil {
		return
	}
	n.die()
	n.relay.Close()
	n.wg.Close()
	n.stack.Close()
}

// relayOf picks the region that is home: the first with a node that carries packets. An embedded relay's
// node is where the access URL says.
func relayOf(t testing.TB, access string, derpMap m) (hostPort string, region int64) {
	t.Helper()
	base, err := url.Parse(access)
	if err != nil {
		t.Fatal(err)
	}
	if !has(derpMap, "home_params") {
		t.Error("the DERP map lacks home_params, without which a stock agent crashes")
	}
	for key, r := range sub(derpMap, "regions") {
		if fmt.Sprint(num(r.(m), "region_id")) != key {
			t.Errorf("region %s says that it is %d", key, num(r.(m), "region_id"))
		}
		for _, x := range list(r.(m), "nodes") {
			node := x.(m)
			if flag(node, "stun_only") {
				continue
			}
			if flag(r.(m), "embedded_relay") {
				return base.Host, num(r.(m), "region_id")
			}
			port := num(node, "derp_port")
			if port == 0 {
				port = 443
			}
			return net.JoinHostPort(text(node, "host_name"), fmt.Sprint(port)), num(r.(m), "region_id")
		}
	}
	t.Fatalf("no region of the DERP map has a relay: %v", derpMap)
	return "", 0
}

func latencyCheck(t testing.TB, base string) float64 {
	t.Helper()
	start := time.Now()
	resp, err := http.Get(base + "/derp/latency-check")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, _ := io.ReadAll(resp.Body); resp.StatusCode != 200 || len(body) != 0 {
		t.Errorf("/derp/latency-check: %d and %d bytes, not 200 and none", resp.StatusCode, len(body))
	}
	return time.Since(start).Seconds()
}

// wire is the node as it is published.
func (n *node) wire() m {
	var addresses []string
	for _, a := range n.addresses {
		addresses = append(addresses, netip.PrefixFrom(a, 128).String())
	}
	return m{"id": n.id, "as_of": time.Now(), "key": append([]byte("np"), n.key[:]...), "disco": "discokey:" + hex.EncodeToString(n.disco[:]),
		"preferred_derp": n.region, "derp_latency": map[string]float64{fmt.Sprintf("%d-v4", n.region): n.latency},
		"addresses": addresses, "allowed_ips": addresses}
}

// checkNode holds a node that berth published to the rules, and returns what a peer needs of it.
func checkNode(w m) (key, disco wgKey, allowed []netip.Prefix, err error) {
	raw := blob(w, "key")
	if len(raw) != 34 || !bytes.HasPrefix(raw, []byte("np")) {
		return key, disco, nil, fmt.Errorf("the node's key is %x, not np and 32 bytes", raw)
	}
	key = wgKey(raw[2:])
	digits, ok := strings.CutPrefix(text(w, "disco"), "discokey:")
	d, err := hex.DecodeString(digits)
	if !ok || err != nil || len(d) != 32 || strings.ToLower(digits) != digits {
		return key, disco, nil, fmt.Errorf("the node's disco is %q", text(w, "disco"))
	}
	disco = wgKey(d)
	if num(w, "preferred_derp") == 0 {
		return key, disco, nil, errors.New("the node has no home region")
	}
	for _, a := range list(w, "allowed_ips") {
		p, err := netip.ParsePrefix(a.(string))
		if err != nil || p.Bits() != 128 {
			return key, disco, nil, fmt.Errorf("allowed_ips has %q", a)
		}
		allowed = append(allowed, p)
	}
	if len(allowed) == 0 {
		return key, disco, nil, errors.New("the node has no allowed_ips")
	}
	for k := range sub(w, "derp_latency") {
		var region int
		if _, err := fmt.Sscanf(k, "%d-v", &region); err != nil {
			return key, disco, nil, fmt.Errorf("derp_latency has the key %q", k)
		}
	}
	return key, disco, allowed, nil
}

// setPeer installs a peer's node as a WireGuard peer.
func (n *node) setPeer(id string, w m) error {
	key, disco, allowed, err := checkNode(w)
	if err != nil {
		return err
	}
	n.removePeerUnless(id, key)
	n.mu.Lock()
	n.discoToNode[disco] = key
	n.peerKeys[id] = key
	n.mu.Unlock()
	var b strings.Builder
	fmt.Fprintf(&b, "public_key=%x\nendpoint=%x\nreplace_allowed_ips=true\n", key, key)
	for _, p := range allowed {
		fmt.Fprintf(&b, "allowed_ip=%s\n", p)
	}
	return n.wg.IpcSet(b.String())
}

// keepAlive turns the keepalive of a peer on, which makes this side shake hands.
func (n *node) keepAlive(id string) {
	n.mu.Lock()
	key, ok := n.peerKeys[id]
	n.mu.Unlock()
	if ok {
		n.wg.IpcSet(fmt.Sprintf("public_key=%x\npersistent_keepalive_interval=25\n", key))
	}
}

func (n *node) removePeerUnless(id string, key wgKey) {
	n.mu.Lock()
	old, ok := n.peerKeys[id]
	if ok && old != key {
		delete(n.peerKeys, id)
	}
	n.mu.Unlock()
	if ok && old != key {
		n.wg.IpcSet(fmt.Sprintf("public_key=%x\nremove=true\n", old))
	}
}

func (n *node) removePeer(id string) { n.removePeerUnless(id, wgKey{}) }

// The relay: DERP frames.

const (
	derpServerKey     = 0x01
	derpClientInfo    = 0x02
	derpServerInfo    = 0x03
	derpSendPacket    = 0x04
	derpRecvPacket    = 0x05
	derpKeepAlive     = 0x06
	derpNotePreferred = 0x07
	derpPeerGone      = 0x08
	derpPing          = 0x12
	derpPong          = 0x13
)

// relayConn is a connection to a relay after the greeting.
type relayConn struct {
	net.Conn
	r  *bufio.Reader
	mu sync.Mutex // serializes writes
}

// dialRelay connects, upgrades and greets as the pages say.
func dialRelay(hostPort string, private, public wgKey) (*relayConn, error) {
	c, err := net.DialTimeout("tcp", hostPort, 10*time.Second)
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(30 * time.Second))
	fmt.Fprintf(c, "GET /derp HTTP/1.1\r\nHost: %s\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n\r\n", hostPort)
	rc := &relayConn{Conn: c, r: bufio.NewReader(c)}
	resp, err := http.ReadResponse(rc.r, nil)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != 101 || !strings.EqualFold(resp.Header.Get("Upgrade"), "DERP") || !strings.EqualFold(resp.Header.Get("Connection"), "Upgrade") || resp.Header.Get("Derp-Version") != "2" {
		return nil, fmt.Errorf("the upgrade was answered with %s %v", resp.Status, resp.Header)
	}
	if err := rc.greet(private, public, resp.Header.Get("Derp-Public-Key")); err != nil {
		c.Close()
		return nil, err
	}
	c.SetDeadline(time.Time{})
	return rc, rc.write(derpNotePreferred, []byte{1})
}

func (c *relayConn) greet(private, public wgKey, told string) error {
	kind, payload, err := c.read()
	if err != nil {
		return fmt.Errorf("no greeting: %w", err)
	}
	magic := []byte("DERP\xf0\x9f\x94\x91")
	if kind != derpServerKey || len(payload) < 40 || !bytes.HasPrefix(payload, magic) {
		return fmt.Errorf("the greeting is frame %#x %x", kind, payload)
	}
	server := wgKey(payload[8:40])
	if told != "" && told != hex.EncodeToString(server[:]) {
		return fmt.Errorf("Derp-Public-Key is %s, the greeting has %x", told, server)
	}
	var nonce [24]byte
	rand.Read(nonce[:])
	info := append(public[:len(public):len(public)], nonce[:]...)
	info = box.Seal(info, []byte(`{"version":2,"CanAckPings":true}`), &nonce, &server, &private)
	if err := c.write(derpClientInfo, info); err != nil {
		return err
	}
	kind, payload, err = c.read()
	if err != nil {
		return fmt.Errorf("no server info: %w", err)
	}
	if kind != derpServerInfo || len(payload) < 24 {
		return fmt.Errorf("the server info is frame %#x of %d bytes", kind, len(payload))
	}
	copy(nonce[:], payload)
	plain, ok := box.Open(nil, payload[24:], &nonce, &server, &private)
	if !ok {
		return errors.New("the server info's box does not open")
	}
	var said struct{ Version int }
	if err := json.Unmarshal(plain, &said); err != nil || said.Version != 2 {
		return fmt.Errorf("the server info says %s", plain)
	}
	return nil
}

func (c *relayConn) read() (kind byte, payload []byte, err error) {
	var h [5]byte
	if _, err := io.ReadFull(c.r, h[:]); err != nil {
		return 0, nil, err
	}
	size := binary.BigEndian.Uint32(h[1:])
	if size > 1<<20 {
		return 0, nil, fmt.Errorf("a DERP frame of %d bytes", size)
	}
	payload = make([]byte, size)
	_, err = io.ReadFull(c.r, payload)
	return h[0], payload, err
}

func (c *relayConn) write(kind byte, parts ...[]byte) error {
	b := []byte{kind, 0, 0, 0, 0}
	for _, p := range parts {
		b = append(b, p...)
	}
	binary.BigEndian.PutUint32(b[1:], uint32(len(b)-5))
	c.mu.Lock()
	defer c.mu.Unlock()
	_, err := c.Conn.Write(b)
	return err
}

func (n *node) readRelay() {
	for {
		kind, payload, err := n.relay.read()
		if err != nil {
			return
		}
		switch {
		case kind == derpPing:
			n.relay.write(derpPong, payload)
		case kind == derpRecvPacket && len(payload) > 32:
			from, data := wgKey(payload[:32]), payload[32:]
			if bytes.HasPrefix(data, discoMagic) {
				n.readDisco(from, data)
				continue
			}
			select {
			case n.inbox <- packetFrom{from, data}:
			case <-n.alive.Done():
				return
			}
		}
	}
}

// Disco: pings that come over the relay are answered there. All but pings and pongs is for direct paths,
// which this node does not have.

var discoMagic = []byte("TS\xf0\x9f\x92\xac")

func (n *node) readDisco(from wgKey, data []byte) {
	if len(data) < 6+32+24 {
		return
	}
	sender, nonce := wgKey(data[6:38]), [24]byte(data[38:62])
	plain, ok := box.Open(nil, data[62:], &nonce, &sender, &n.discoPrivate)
	if ok && len(plain) >= 14 && plain[0] == 2 {
		select {
		case n.discoPongs <- plain[2:]:
		default:
		}
	}
	if !ok || len(plain) < 14 || plain[0] != 1 {
		return
	}
	pong := append([]byte{2, 1}, plain[2:14]...)
	pong = append(pong, netip.MustParseAddr("::ffff:127.3.3.40").AsSlice()...)
	pong = binary.BigEndian.AppendUint16(pong, uint16(n.region))
	rand.Read(nonce[:])
	out := append(append(append([]byte{}, discoMagic...), n.disco[:]...), nonce[:]...)
	n.relay.write(derpSendPacket, from[:], box.Seal(out, pong, &nonce, &sender, &n.discoPrivate))
}

// relayBind gives WireGuard the relay as its only way out.
type relayBind node

// relayEndpoint is a peer's node key, which is its address at the relay.
type relayEndpoint wgKey

func (e relayEndpoint) ClearSrc()           {}
func (e relayEndpoint) SrcToString() string { return "" }
func (e relayEndpoint) DstToString() string { return hex.EncodeToString(e[:]) }
func (e relayEndpoint) DstToBytes() []byte  { return e[:] }
func (e relayEndpoint) DstIP() netip.Addr   { return netip.IPv6Unspecified() }
func (e relayEndpoint) SrcIP() netip.Addr   { return netip.IPv6Unspecified() }

func (b *relayBind) Open(port uint16) ([]conn.ReceiveFunc, uint16, error) {
	receive := func(packets [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
		select {
		case p := <-b.inbox:
			sizes[0], eps[0] = copy(packets[0], p.data), relayEndpoint(p.from)
			return 1, nil
		case <-b.alive.Done():
			return 0, net.ErrClosed
		}
	}
	return []conn.ReceiveFunc{receive}, 1, nil
}

func (b *relayBind) Send(bufs [][]byte, ep conn.Endpoint, offset int) error {
	to := ep.(relayEndpoint)
	for _, buf := range bufs {
		if err := b.relay.write(derpSendPacket, to[:], buf[offset:]); err != nil {
			return err
		}
	}
	return nil
}

func (b *relayBind) ParseEndpoint(s string) (conn.Endpoint, error) {
	k, err := hex.DecodeString(s)
	if err != nil || len(k) != 32 {
		return nil, fmt.Errorf("%q is no key", s)
	}
	return relayEndpoint(k), nil
}

func (b *relayBind) Close() error         { return nil }
func (b *relayBind) SetMark(uint32) error { return nil }
func (b *relayBind) BatchSize() int       { return 1 }

// The tunnel's inner end: gVisor's stack, with TSMP taken out before it.

const tsmpProtocol = 99

func (n *node) startStack() {
	n.link = channel.New(1024, tunnelMTU, "")
	n.stack = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol6},
	})
	sack := tcpip.TCPSACKEnabled(true)
	n.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &sack)
	if err := n.stack.CreateNIC(1, n.link); err != nil {
		n.t.Fatal(err)
	}
	for _, a := range n.addresses {
		address := tcpip.ProtocolAddress{Protocol: ipv6.ProtocolNumber, AddressWithPrefix: tcpip.AddrFrom16(a.As16()).WithPrefix()}
		if err := n.stack.AddProtocolAddress(1, address, stack.AddressProperties{}); err != nil {
			n.t.Fatal(err)
		}
	}
	n.stack.AddRoute(tcpip.Route{Destination: header.IPv6EmptySubnet, NIC: 1})
}

func (n *node) tun() tun.Device { return &nodeTun{n, make(chan tun.Event)} }

type nodeTun struct {
	*node
	events chan tun.Event
}

func (d *nodeTun) File() *os.File           { return nil }
func (d *nodeTun) MTU() (int, error)        { return tunnelMTU, nil }
func (d *nodeTun) Name() (string, error)    { return "conformance", nil }
func (d *nodeTun) Events() <-chan tun.Event { return d.events }
func (d *nodeTun) BatchSize() int           { return 1 }

func (d *nodeTun) Close() error {
	close(d.events)
	return nil
}

func (d *nodeTun) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	p := d.link.ReadContext(d.alive)
	if p == nil {
		return 0, os.ErrClosed
	}
	view := p.ToView()
	p.DecRef()
	sizes[0] = copy(bufs[0][offset:], view.AsSlice())
	return 1, nil
}

func (d *nodeTun) Write(bufs [][]byte, offset int) (int, error) {
	for _, b := range bufs {
		b = b[offset:]
		if len(b) < 40 || b[0]>>4 != 6 {
			continue
		}
		if b[6] == tsmpProtocol {
			d.readTSMP(b)
			continue
		}
		p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(append([]byte{}, b...))})
		d.link.InjectInbound(ipv6.ProtocolNumber, p)
		p.DecRef()
	}
	return len(bufs), nil
}

// readTSMP answers a ping with a pong and keeps everything for whoever looks.
func (d *nodeTun) readTSMP(b []byte) {
	message := append([]byte{}, b[40:]...)
	select {
	case d.tsmp <- message:
	default:
	}
	if d.answerTSMP && len(message) >= 9 && message[0] == 'p' {
		pong := append([]byte{'o'}, message[1:9]...)
		d.sendTSMP(netip.AddrFrom16([16]byte(b[24:40])), netip.AddrFrom16([16]byte(b[8:24])), append(pong, 0, 0))
	}
}

// sendTSMP puts a message of protocol 99 into the tunnel.
func (n *node) sendTSMP(from, to netip.Addr, message []byte) {
	p := make([]byte, 40, 40+len(message))
	p[0] = 6 << 4
	binary.BigEndian.PutUint16(p[4:], uint16(len(message)))
	p[6], p[7] = tsmpProtocol, 64
	copy(p[8:], from.AsSlice())
	copy(p[24:], to.AsSlice())
	var packets stack.PacketBufferList
	packet := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(append(p, message...))})
	packets.PushBack(packet)
	n.link.WritePackets(packets)
	packet.DecRef()
}

// pingTSMP sends pings until a pong comes back, as a stock client does before it calls a peer reachable.
func (n *node) pingTSMP(to netip.Addr, limit time.Duration) error {
	deadline := time.After(limit)
	for try := byte(0); ; try++ {
		body := []byte{1, 2, 3, 4, 5, 6, 7, try}
		n.sendTSMP(n.addresses[0], to, append([]byte{'p'}, body...))
		wait := time.After(500 * time.Millisecond)
	answers:
		for {
			select {
			case b := <-n.tsmp:
				if len(b) >= 9 && b[0] == 'o' && bytes.Equal(b[1:8], body[:7]) {
					return nil
				}
			case <-wait:
				break answers
			case <-deadline:
				return fmt.Errorf("no TSMP pong from %v in %v", to, limit)
			}
		}
	}
}

// dial opens a stream to a port of a peer.
func (n *node) dial(to netip.Addr, port uint16, limit time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	return n.dialContext(ctx, "tcp", netip.AddrPortFrom(to, port).String())
}

func (n *node) dialUDP(to netip.Addr, port uint16) (net.Conn, error) {
	return gonet.DialUDP(n.stack, nil, &tcpip.FullAddress{NIC: 1, Addr: tcpip.AddrFrom16(to.As16()), Port: port}, ipv6.ProtocolNumber)
}

func (n *node) listen(port uint16) net.Listener {
	l, err := gonet.ListenTCP(n.stack, tcpip.FullAddress{NIC: 1, Port: port}, ipv6.ProtocolNumber)
	if err != nil {
		n.t.Fatal(err)
	}
	return l
}

// agentAddresses are the two addresses of an agent.
func agentAddresses(id []byte) []netip.Addr {
	var all []netip.Addr
	for _, prefix := range []string{"fd7a115ca1e0", "fd60627aa42b"} {
		b, _ := hex.DecodeString(prefix)
		all = append(all, netip.AddrFrom16([16]byte(append(b, id[6:16]...))))
	}
	return all
}

// clientAddress is a random address of a client.
func clientAddress() netip.Addr {
	b := [16]byte{0xfd, 0x7a, 0x11, 0x5c, 0xa1, 0xe0}
	rand.Read(b[6:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return netip.AddrFrom16(b)
}

// dialContext is dial in the form of net/http.
func (n *node) dialContext(ctx context.Context, network, address string) (net.Conn, error) {
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, err
	}
	c, err := gonet.DialContextTCP(ctx, n.stack, tcpip.FullAddress{NIC: 1, Addr: tcpip.AddrFrom16(to.Addr().As16()), Port: to.Port()}, ipv6.ProtocolNumber)
	if err != nil {
		return nil, err
	}
	return c, nil
}
