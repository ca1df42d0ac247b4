package tailnet

import (
	"encoding/binary"
	"net/netip"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"tailscale.com/net/packet"
	"tailscale.com/net/tstun"
	"tailscale.com/types/ipproto"
	"tailscale.com/wgengine/filter"
)

// A relay carries frames of up to 64 KiB in a TCP stream and costs as much work
// for a small packet as for a large one, so through a relay packets should be
// large. A direct path crosses networks of which little is known, so there they
// must be small. The stack is therefore told of a large MTU, and the node itself
// does what a router before a narrow link does: a connection that starts
// while the path is direct is told the small size (its SYN announces it), and one
// whose path becomes direct later gets an ICMPv6 Packet Too Big. Peers that are
// not ours announce their own size and are never sent more.
const (
	relayMTU  = 16 << 10
	directMTU = 1280
	// directFor is how long a path counts as direct after a packet went that way.
	directFor = 2 * time.Second
	// tooBigEvery spaces the Packet Too Big messages to one connection. The
	// first is enough; more are for segments that were already on their way.
	tooBigEvery = 100 * time.Millisecond
	maxNarrowed = 4096
	tcpMSS      = directMTU - header.IPv6MinimumSize - header.TCPMinimumSize
)

// narrowed remembers when connections were last told of a narrow path.
type narrowed struct {
	mu   sync.Mutex
	told map[flow]*narrowing
}

type narrowing struct {
	last  time.Time
	times int
}

func newNarrowed() *narrowed { return &narrowed{told: make(map[flow]*narrowing)} }

// due reports whether a connection is to be told now.
func (t *narrowed) due(f flow, now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	n, ok := t.told[f]
	if !ok {
		if len(t.told) >= maxNarrowed {
			clear(t.told)
		}
		n = new(narrowing)
		t.told[f] = n
	}
	// Large buffers are cut into segments later, so a packet's size alone does
	// not tell whether its connection has obeyed. It does at once; repeats only
	// make up for one that came while its handshake was not over.
	if n.times >= 3 || now.Sub(n.last) < tooBigEvery {
		return false
	}
	n.times, n.last = n.times+1, now
	return true
}

// forget lets connections be told again.
func (t *narrowed) forget(f flow) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.told, f)
}

// fitPath looks at each packet that leaves the stack.
func (n *Node) fitPath(p *packet.Parsed, _ *tstun.Wrapper) filter.Response {
	if p.IPVersion != 6 || p.IPProto != ipproto.TCP {
		return filter.Accept
	}
	syn := p.TCPFlags&packet.TCPSyn != 0
	if !syn && len(p.Buffer()) <= directMTU {
		return filter.Accept
	}
	in, ok := n.peers.index.Load().byIP[p.Dst.Addr()]
	if !ok {
		return filter.Accept
	}
	now := time.Now()
	direct := now.UnixNano()-in.path.lastUDP.Load() < int64(directFor)
	f := flow{ipproto.TCP, p.Src, p.Dst}
	switch {
	case syn && direct:
		clampMSS(p.Buffer())
	case syn:
		n.narrowed.forget(f)
	case direct && n.narrowed.due(f, now):
		n.tooBig(p)
	}
	return filter.Accept
}

// clampMSS lowers the segment size that a SYN announces.
func clampMSS(pkt []byte) {
	if len(pkt) < header.IPv6MinimumSize+header.TCPMinimumSize {
		return
	}
	tcp := header.TCP(pkt[header.IPv6MinimumSize:])
	end := int(tcp.DataOffset())
	if end > len(tcp) {
		return
	}
	for i := header.TCPMinimumSize; i+1 < end; {
		switch kind := tcp[i]; kind {
		case header.TCPOptionEOL:
			return
		case header.TCPOptionNOP:
			i++
			continue
		case header.TCPOptionMSS:
			if i+4 > end || binary.BigEndian.Uint16(tcp[i+2:]) <= tcpMSS {
				return
			}
			old := binary.BigEndian.Uint16(tcp[i+2:])
			binary.BigEndian.PutUint16(tcp[i+2:], tcpMSS)
			// RFC 1624: the new sum from the old one and the changed word.
			tcp.SetChecksum(^checksum.Combine(checksum.Combine(^tcp.Checksum(), ^old), tcpMSS))
			return
		default:
			if tcp[i+1] < 2 {
				return
			}
			i += int(tcp[i+1])
		}
	}
}

// tooBig tells the stack, as a router would, that a packet does not fit.
func (n *Node) tooBig(p *packet.Parsed) {
	msg := tooBigMessage(p.Buffer(), p.Dst.Addr(), p.Src.Addr())
	// The stack may answer with segments at once, and whoever called us is the
	// one who takes them away.
	n.spawn(func() {
		var in packet.Parsed
		in.Decode(msg)
		n.engine.tun.PostFilterPacketInboundFromWireGuard(&in, n.engine.tun, nil)
	})
}

// tooBigMessage is the ICMPv6 message, quoting as much as fits the least MTU.
func tooBigMessage(pkt []byte, from, to netip.Addr) []byte {
	const head = header.IPv6MinimumSize + header.ICMPv6PacketTooBigMinimumSize
	quote := pkt[:min(len(pkt), header.IPv6MinimumMTU-head)]
	msg := make([]byte, head+len(quote))
	ip := header.IPv6(msg)
	src, dst := from.As16(), to.As16()
	binary.BigEndian.PutUint32(msg, 6<<28)
	ip.SetPayloadLength(uint16(len(msg) - header.IPv6MinimumSize))
	msg[6] = uint8(header.ICMPv6ProtocolNumber)
	msg[7] = 255
	copy(msg[8:], src[:])
	copy(msg[24:], dst[:])
	icmp := header.ICMPv6(msg[header.IPv6MinimumSize:])
	icmp.SetType(header.ICMPv6PacketTooBig)
	icmp.SetMTU(directMTU)
	copy(icmp[header.ICMPv6PacketTooBigMinimumSize:], quote)
	icmp.SetChecksum(header.ICMPv6Checksum(header.ICMPv6ChecksumParams{Header: icmp, Src: ip.SourceAddress(), Dst: ip.DestinationAddress()}))
	return msg
}
