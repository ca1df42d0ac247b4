package tailnet

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"go4.org/mem"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/tailnetpb"
)

// Limits on what one peer may tell about itself. Real nodes have two addresses
// and, with several networks, some tens of endpoints; more than that are cut off.
const (
	maxAddresses = 16
	maxEndpoints = 128
)

// decodedNode is a peer's node, checked.
type decodedNode struct {
	key       key.NodePublic
	disco     key.DiscoPublic
	home      int
	route     []netip.Prefix
	endpoints []netip.AddrPort
}

// errNoHome marks the node of a peer that has not chosen a relay yet; another
// follows when it has.
var errNoHome = errors.New("the node has no home relay yet")

// decodeNode checks what a peer told about itself. Addresses of whole networks
// are left out, since a peer speaks only for itself, and so are endpoints that
// are no addresses.
func decodeNode(n *tailnetpb.Node) (*decodedNode, error) {
	if n.GetPreferredDerp() <= 0 {
		return nil, errNoHome
	}
	raw, ok := strings.CutPrefix(string(n.GetKey()), wire.NodeKeyPrefix)
	if !ok || len(raw) != 32 {
		return nil, fmt.Errorf("cannot read a node key of %d bytes: want %q and 32 bytes", len(n.GetKey()), wire.NodeKeyPrefix)
	}
	d := &decodedNode{key: key.NodePublicFromRaw32(mem.S(raw)), home: int(n.GetPreferredDerp())}
	if d.key.IsZero() {
		return nil, errors.New("cannot use a node key of zeros")
	}
	if err := d.disco.UnmarshalText([]byte(n.GetDisco())); err != nil {
		return nil, fmt.Errorf("cannot read the disco key: %w", err)
	}
	if d.disco.IsZero() {
		return nil, errors.New("cannot use a disco key of zeros")
	}
	for _, text := range n.GetAllowedIps() {
		p, err := netip.ParsePrefix(text)
		if err == nil && p.IsSingleIP() && p.Addr().Is6() && !p.Addr().Is4In6() && len(d.route) < maxAddresses {
			d.route = append(d.route, p)
		}
	}
	if len(d.route) == 0 {
		return nil, errors.New("cannot reach a node without an address")
	}
	for _, text := range n.GetEndpoints() {
		ep, err := netip.ParseAddrPort(text)
		if err == nil && ep.Port() != 0 && len(d.endpoints) < maxEndpoints {
			d.endpoints = append(d.endpoints, netip.AddrPortFrom(ep.Addr().Unmap(), ep.Port()))
		}
	}
	return d, nil
}

// view is the node as the library takes it, without endpoints.
func (d *decodedNode) view(id tailcfg.NodeID) tailcfg.NodeView {
	return (&tailcfg.Node{
		ID:         id,
		Key:        d.key,
		DiscoKey:   d.disco,
		Addresses:  d.route,
		AllowedIPs: d.route,
		HomeDERP:   d.home,
		Hostinfo:   (&tailcfg.Hostinfo{}).View(),
	}).View()
}
