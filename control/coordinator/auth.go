package coordinator

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/google/uuid"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/tailnetpb"
)

// Auth says what a peer may do: an agent answers and stands by its own addresses, everyone else
// opens tunnels and takes an address that is nobody's. The zero value permits nothing.
type Auth struct {
	agent  bool
	tunnel func(destination uuid.UUID) error
}

// AgentAuth is for the agent with this id. It may announce the addresses that follow from the id
// and acknowledge peers, and may not open tunnels.
func AgentAuth(id uuid.UUID) Auth {
	_ = id
	return Auth{agent: true}
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

// UserAuth is for a client of all agents of a user. may is asked at each tunnel and must be quick.
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

var _ = []any{netip.Addr{}, wire.PrimaryPrefix, (*tailnetpb.Node)(nil)}
