package coordinator

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/uuid"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/tailnetpb"
)

// Auth says what a peer may do: an agent answers and stands by its own addresses, everyone else
// opens tunnels and takes an address that is nobody's. The zero value permits nothing.
type Auth struct {
	agent  uuid.UUID
	tunnel func(destination uuid.UUID) error
}

// AgentAuth is for the agent with this id. It may announce the addresses that follow from the id
// and acknowledge peers, and may not open tunnels.
func AgentAuth(id uuid.UUID) Auth {
	return Auth{agent: id, tunnel: func(uuid.UUID) error { return errors.New("agents cannot open tunnels") }}
}

// ClientAuth is for a client of one agent. It may open a tunnel to that agent only.
func ClientAuth(agentID uuid.UUID) Auth {
	return Auth{tunnel: func(destination uuid.UUID) error {
		if destination != agentID {
			return fmt.Errorf("invalid agent id, expected %s, got %s", agentID, destination)
		}
		return nil
	}}
}

// UserAuth is for a client of all agents of a user. may is asked at each tunnel, and holds up
// this client only.
func UserAuth(may func(agentID uuid.UUID) bool) Auth {
	return Auth{tunnel: func(destination uuid.UUID) error {
		if !may(destination) {
			return errors.New("workspace agent not found or you do not have permission")
		}
		return nil
	}}
}

// AllowAll is for the server's own node: it may open any tunnel.
func AllowAll() Auth {
	return Auth{tunnel: func(uuid.UUID) error { return nil }}
}

func (a Auth) isAgent() bool { return a.agent != uuid.Nil }

// mayTunnel says whether the peer may open a tunnel to destination.
func (a Auth) mayTunnel(destination uuid.UUID) error {
	if a.tunnel == nil {
		return errors.New("this peer may do nothing")
	}
	return a.tunnel(destination)
}

// mayAcknowledge says whether the peer may send ready_for_handshake.
func (a Auth) mayAcknowledge() error {
	if !a.isAgent() {
		return errors.New("clients may not send ready_for_handshake")
	}
	return nil
}

// addresses returns what a node announces, if the peer may announce such addresses at all. Whether
// one is another peer's is for the caller to find out.
//
// The protocol lets a client take any /128, and says nothing of its allowed_ips. Both become routes
// of the agents that it has a tunnel to, which pick a peer by them: a client that announced the
// address of another would receive what is meant for that one. So berth holds both lists to the
// same rule, and clients to the ranges that they draw their random address from.
func (a Auth) addresses(node *tailnetpb.Node) ([]netip.Addr, error) {
	var addrs []netip.Addr
	for _, list := range []struct {
		name     string
		prefixes []string
	}{{"Addresses", node.GetAddresses()}, {"AllowedIps", node.GetAllowedIps()}} {
		for _, text := range list.prefixes {
			addr, err := a.address(text)
			if err != nil && a.isAgent() {
				return nil, fmt.Errorf("%s: %w", list.name, err)
			}
			if err != nil {
				return nil, err
			}
			if !slices.Contains(addrs, addr) {
				addrs = append(addrs, addr)
			}
		}
	}
	return addrs, nil
}

func (a Auth) address(text string) (netip.Addr, error) {
	prefix, err := netip.ParsePrefix(text)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("invalid node address: %w", err)
	}
	if prefix.Bits() != 128 {
		return netip.Addr{}, fmt.Errorf("invalid address bits, expected 128, got %d", prefix.Bits())
	}
	addr := prefix.Addr()
	own := (wire.PrimaryPrefix.Contains(addr) || wire.NewerPrefix.Contains(addr)) && addr != wire.LegacyAgentAddr
	if a.isAgent() {
		own = addr == wire.LegacyAgentAddr || slices.Contains(wire.AgentPrefixes(a.agent), prefix)
	}
	if !own {
		return netip.Addr{}, fmt.Errorf("invalid node address, got %s", text)
	}
	return addr, nil
}
