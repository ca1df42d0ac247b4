package wire

import (
	"bytes"
	"net/netip"

	"github.com/google/uuid"
)

// Prefixes that mesh addresses lie in: the primary one, which is dialled, and the newer one (docs/protocol.md#names).
var (
	PrimaryPrefix = netip.MustParsePrefix("fd7a:115c:a1e0::/48")
	NewerPrefix   = netip.MustParsePrefix("fd60:627a:a42b::/48")
)

// NodeKeyPrefix stands before the 32 bytes of a node's WireGuard key in the node it publishes.
//
// See docs/protocol.md#names.
const NodeKeyPrefix = "np"

// LegacyAgentAddr is the one address that agents older than API 2.0 shared; servers still accept it (docs/protocol.md#names).
var LegacyAgentAddr = netip.MustParseAddr("fd7a:115c:a1e0:49d6:b259:b7ac:b1b2:48f4")

// AgentAddr returns the address to dial an agent at: the id with its first six bytes replaced by
// the primary prefix.
func AgentAddr(id uuid.UUID) netip.Addr { return addrIn(PrimaryPrefix, id) }

// AgentPrefixes returns the /128 prefixes an agent owns, the primary one first.
func AgentPrefixes(id uuid.UUID) []netip.Prefix {
	return []netip.Prefix{
		netip.PrefixFrom(addrIn(PrimaryPrefix, id), 128),
		netip.PrefixFrom(addrIn(NewerPrefix, id), 128),
	}
}

func addrIn(prefix netip.Prefix, id uuid.UUID) netip.Addr {
	p := prefix.Addr().As16()
	a := [16]byte(id)
	copy(a[:6], p[:6])
	return netip.AddrFrom16(a)
}

// reservedNet is the /64 below the primary prefix that the network stack keeps for IPv4 addresses
// mapped into IPv6; TCP to a node there is refused.
var reservedNet = []byte{0x0b, 0x1a}

// RandomAddr returns an address for a client or server node, random in the primary prefix.
func RandomAddr() netip.Addr {
	for {
		id := uuid.New()
		if !bytes.Equal(id[6:8], reservedNet) {
			return addrIn(PrimaryPrefix, id)
		}
	}
}
