package wire

import (
	"time"

	"github.com/google/uuid"
)

// PathBerth is where berth's own additions to the HTTP API live; nothing else does (docs/protocol.md#additions).
const PathBerth = PathAPI + "berth/"

// QueryNetwork, when it is [NetworkAll], asks for all of listening-ports: UDP too, and ports in other
// network namespaces, and from a server those of well-known services and of apps. Stock clients take
// every entry for a TCP port that they can forward, so without it there are no others. QueryHidden, when it is "true", asks for what is hidden as well: ports of
// berthd itself and of editors' helpers.
//
// See docs/protocol.md#additions.
const (
	QueryNetwork = "network"
	NetworkAll   = "all"
	QueryHidden  = "hidden"
)

// AgentSummary is one row of GET /api/v2/berth/agents.
type AgentSummary struct {
	ID uuid.UUID `json:"id"`
	// Name is unique. A sub-agent is called "parent.name".
	Name           string      `json:"name"`
	Status         AgentStatus `json:"status"`
	LifecycleState string      `json:"lifecycle_state"`
	Version        string      `json:"version,omitempty"`
	InstanceID     string      `json:"instance_id,omitempty"`
	CreatedAt      time.Time   `json:"created_at"`
	LastSeenAt     *time.Time  `json:"last_seen_at,omitempty"`
}

// CreateAgent is the body of POST /api/v2/berth/agents.
type CreateAgent struct {
	Name string `json:"name"`
}

// CreatedAgent answers it. The token is shown this once; the server keeps only its hash.
type CreatedAgent struct {
	ID    uuid.UUID `json:"id"`
	Name  string    `json:"name"`
	Token string    `json:"token"`
}
