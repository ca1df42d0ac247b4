package tailnet

import (
	"net/netip"
	"time"

	"github.com/google/uuid"
)

// Ping is the answer to [Node.Ping].
type Ping struct {
	// Latency is the round trip.
	Latency time.Duration
	// Direct is the peer's UDP address, invalid if the answer came by relay.
	Direct netip.AddrPort
	// Region and RegionName tell the relay region of a relayed answer.
	Region     int
	RegionName string
}

// PeerStatus tells how one peer is reached.
type PeerStatus struct {
	// ID is the peer's id on the coordination stream.
	ID uuid.UUID
	// Addrs are the peer's addresses, primary first.
	Addrs []netip.Addr
	// Direct is the UDP address in use, invalid while packets go by relay.
	Direct netip.AddrPort
	// Region is the relay region packets go through while Direct is invalid.
	Region int
	// LastHandshake is zero if there has been none.
	LastHandshake time.Time
	// Lost is set while the coordinator has lost the peer.
	Lost bool
	// RxBytes and TxBytes count what crossed the network, encrypted.
	RxBytes, TxBytes int64
}

// Stats counts the traffic of tunnel connections since the call before.
type Stats struct {
	// Flows counts distinct connections by IP protocol name ("TCP", "UDP").
	Flows map[string]int64
	// Rx counts packets and bytes received, Tx those sent.
	RxPackets, RxBytes, TxPackets, TxBytes int64
}
