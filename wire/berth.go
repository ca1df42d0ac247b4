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

// StatusReport answers GET /api/v2/berth/agents/{id}/status: an agent with all that it told of its
// workspace.
type StatusReport struct {
	Agent
	Metadata []AgentMetadata `json:"metadata"`
	// Usage is nil where nothing is measured, Traffic before the first report.
	Usage   *Usage   `json:"usage,omitempty"`
	Traffic *Traffic `json:"traffic,omitempty"`
	// Sessions are the newest that people had, the newest first.
	Sessions []Session `json:"sessions"`
	// Notes are what the agent's berthd says of itself, a sentence each: how the last one ended if that was not in
	// order, whom the OOM killer ended.
	Notes []string `json:"notes,omitempty"`
}

// Usage is what a workspace used of memory and disk at a time, in bytes.
type Usage struct {
	CollectedAt time.Time     `json:"collected_at"`
	Memory      *Used         `json:"memory,omitempty"`
	Volumes     []VolumeUsage `json:"volumes"`
}

// Used is how much there is of something, and how much of it is used.
type Used struct {
	Used  int64 `json:"used"`
	Total int64 `json:"total"`
}

// VolumeUsage is how full the file system is that holds a path.
type VolumeUsage struct {
	Path string `json:"path"`
	Used
}

// Traffic is what came and went over the mesh since the report before, and who is there.
type Traffic struct {
	ReportedAt  time.Time `json:"reported_at"`
	Connections int64     `json:"connections"`
	RxBytes     int64     `json:"rx_bytes"`
	TxBytes     int64     `json:"tx_bytes"`
	// LatencyMS is the median to the peers that answer; below zero if none does.
	LatencyMS float64 `json:"latency_ms"`
	SSH       int64   `json:"ssh"`
	Terminals int64   `json:"terminals"`
	VSCode    int64   `json:"vscode"`
	JetBrains int64   `json:"jetbrains"`
}

// Session is one that somebody had in a workspace. A time is nil if that was not reported.
type Session struct {
	ID uuid.UUID `json:"id"`
	// Type is ssh, vscode, jetbrains or reconnecting_pty.
	Type     string     `json:"type"`
	IP       string     `json:"ip,omitempty"`
	BeganAt  *time.Time `json:"began_at,omitempty"`
	EndedAt  *time.Time `json:"ended_at,omitempty"`
	ExitCode int32      `json:"exit_code"`
	Reason   string     `json:"reason,omitempty"`
}

// QueryApp names the app whose statuses GET /api/v2/berth/agents/{id}/app-statuses answers with, by its slug
// (docs/status.md#who-sees-it).
const QueryApp = "app"
