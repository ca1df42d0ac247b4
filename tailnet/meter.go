package tailnet

import (
	"net/netip"
	"sync"

	"tailscale.com/types/ipproto"
)

// maxFlows bounds the flows told apart between two calls of [Node.Stats];
// further ones count in the totals only.
const maxFlows = 4096

// meter counts the traffic inside the tunnel.
type meter struct {
	mu    sync.Mutex
	flows map[flow]struct{}
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
	if len(m.flows) < maxFlows {
		m.flows[flow{proto, src, dst}] = struct{}{}
	}
	if recv {
		m.stats.RxPackets += int64(packets)
		m.stats.RxBytes += int64(bytes)
	} else {
		m.stats.TxPackets += int64(packets)
		m.stats.TxBytes += int64(bytes)
	}
}

// Stats counts the traffic of tunnel connections since the call before.
func (n *Node) Stats() Stats {
	m := n.meter
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.stats
	s.Flows = make(map[string]int64)
	for f := range m.flows {
		s.Flows[f.proto.String()]++
	}
	m.stats = Stats{}
	clear(m.flows)
	return s
}
