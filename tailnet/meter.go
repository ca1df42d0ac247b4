package tailnet

import (
	"net/netip"
	"strconv"
	"sync"

	"tailscale.com/net/packet"
	"tailscale.com/types/ipproto"
)

// maxFlows bounds the flows told apart between two calls of [Node.Stats];
// further ones count in the totals only. It is the protocol's figure.
const maxFlows = 2048

// meter counts the traffic inside the tunnel.
type meter struct {
	mu    sync.Mutex
	flows map[flow]struct{}
	last  flow // spares the map for the next packet of the same flow
	stats Stats
}

type flow struct {
	proto    ipproto.Proto
	src, dst netip.AddrPort
}

func newMeter() *meter { return &meter{flows: make(map[flow]struct{})} }

// count is called for every packet, src being this node.
func (m *meter) count(proto ipproto.Proto, src, dst netip.AddrPort, packets, bytes int, recv bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if f := (flow{proto, src, dst}); f != m.last && len(m.flows) < maxFlows {
		m.flows[f] = struct{}{}
		m.last = f
	}
	if recv {
		m.stats.RxPackets += int64(packets)
		m.stats.RxBytes += int64(bytes)
	} else {
		m.stats.TxPackets += int64(packets)
		m.stats.TxBytes += int64(bytes)
	}
}

// received is called for every packet that enters the stack.
func (m *meter) received(p *packet.Parsed) {
	m.count(p.IPProto, p.Dst, p.Src, 1, len(p.Buffer()), true)
}

// protocolName is what the protocol's statistics call an IP protocol.
func protocolName(p ipproto.Proto) string {
	switch p {
	case ipproto.TCP:
		return "TCP"
	case ipproto.UDP:
		return "UDP"
	case ipproto.ICMPv6:
		return "ICMPv6"
	case ipproto.TSMP:
		return "TSMP"
	}
	return strconv.Itoa(int(p))
}

// Stats counts the traffic of tunnel connections since the call before.
func (n *Node) Stats() Stats {
	m := n.meter
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.stats
	s.Flows = make(map[string]int64)
	for f := range m.flows {
		s.Flows[protocolName(f.proto)]++
	}
	m.stats = Stats{}
	m.last = flow{}
	clear(m.flows)
	return s
}
