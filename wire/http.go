package wire

import (
	"time"

	"github.com/google/uuid"
)

// SessionToken answers an identity exchange. The token is for the holder only.
type SessionToken struct {
	SessionToken string `json:"session_token"`
}

// PatchAppStatus is the body of PATCH workspaceagents/me/app-status.
type PatchAppStatus struct {
	AppSlug string `json:"app_slug"`
	// State is working, idle, complete or failure.
	State string `json:"state"`
	// Message is at most [MaxAppStatusMessage] bytes.
	Message string `json:"message"`
	URI     string `json:"uri"`
}

// PostLogSource is the body of POST workspaceagents/me/log-source.
type PostLogSource struct {
	ID          uuid.UUID `json:"id"`
	DisplayName string    `json:"display_name"`
	Icon        string    `json:"icon"`
}

// LogSource is one origin of log lines of an agent.
type LogSource struct {
	WorkspaceAgentID uuid.UUID `json:"workspace_agent_id"`
	ID               uuid.UUID `json:"id"`
	CreatedAt        time.Time `json:"created_at"`
	DisplayName      string    `json:"display_name"`
	Icon             string    `json:"icon"`
}

// PatchLogs is the body of PATCH workspaceagents/me/logs.
type PatchLogs struct {
	LogSourceID uuid.UUID  `json:"log_source_id"`
	Logs        []PatchLog `json:"logs"`
}

// PatchLog is one line sent by [PatchLogs]. The server stamps its own time.
type PatchLog struct {
	CreatedAt time.Time `json:"created_at"`
	Output    string    `json:"output"`
	// Level is trace, debug, info, warn or error; empty means info.
	Level string `json:"level"`
}

// Reinitialization is the event of GET workspaceagents/me/reinit: the agent is to start anew.
type Reinitialization struct {
	WorkspaceID uuid.UUID `json:"workspace_id"`
	// Reason is [ReasonPrebuildClaimed].
	Reason  string    `json:"reason"`
	OwnerID uuid.UUID `json:"owner_id"`
}

// ReasonPrebuildClaimed says that a workspace that ran before it had a user has one now (docs/protocol.md#names).
const ReasonPrebuildClaimed = "prebuild_claimed"

// LogEntry is one stored line. IDs grow within an agent.
type LogEntry struct {
	ID        int64     `json:"id"`
	CreatedAt time.Time `json:"created_at"`
	Output    string    `json:"output"`
	Level     string    `json:"level"`
	SourceID  uuid.UUID `json:"source_id"`
}

// ConnectionInfo answers GET {id}/connection: what a client needs to join the mesh.
type ConnectionInfo struct {
	DERPMap                  *DERPMap `json:"derp_map"`
	DERPForceWebSockets      bool     `json:"derp_force_websockets"`
	DisableDirectConnections bool     `json:"disable_direct_connections"`
	HostnameSuffix           string   `json:"hostname_suffix,omitempty"`
}

// BuildInfo answers GET buildinfo.
type BuildInfo struct {
	ExternalURL    string `json:"external_url"`
	Version        string `json:"version"`
	DashboardURL   string `json:"dashboard_url"`
	Telemetry      bool   `json:"telemetry"`
	WorkspaceProxy bool   `json:"workspace_proxy"`
	// AgentAPIVersion is always "1.0" and says nothing about the RPC version.
	AgentAPIVersion       string `json:"agent_api_version"`
	ProvisionerAPIVersion string `json:"provisioner_api_version"`
	UpgradeMessage        string `json:"upgrade_message"`
	DeploymentID          string `json:"deployment_id"`
}

// ListeningPorts answers listening-ports, of the agent and of the server.
type ListeningPorts struct {
	Ports []ListeningPort `json:"ports"`
	// Source names where berthd has them from (docs/ports.md). With stock agents it is empty.
	Source string `json:"source,omitempty"`
}

// ListeningPort is one port that something listens on. The first three fields are the stock ones;
// the others are berth's additions and empty where they cannot be read.
type ListeningPort struct {
	ProcessName string `json:"process_name"`
	// Network is "tcp" or "udp".
	Network string `json:"network"`
	Port    uint16 `json:"port"`

	// Addresses the port is bound to, such as "0.0.0.0" or "::1".
	Addresses []string   `json:"addresses,omitempty"`
	PID       int        `json:"pid,omitempty"`
	Command   string     `json:"command,omitempty"`
	User      string     `json:"user,omitempty"`
	StartedAt *time.Time `json:"started_at,omitempty"`
	// Container names the container that listens, or that publishes the port.
	Container string `json:"container,omitempty"`
	// Namespace is the inode of the network namespace that the port is in, as `lsns -t net` has it; 0
	// is the agent's own. What is in another does not answer at the agent's loopback addresses.
	Namespace int64 `json:"namespace,omitempty"`
	// Hidden says what the port belongs to when it is shown only on demand ([QueryHidden]).
	Hidden string `json:"hidden,omitempty"`
}

// Terminals answers terminals of an agent: those that can be attached to by id or name on [PortPTY].
type Terminals struct {
	Terminals []Terminal `json:"terminals"`
}

// Terminal is one terminal of an agent. Text comes from programs and is not clean.
type Terminal struct {
	ID        uuid.UUID  `json:"id"`
	Name      string     `json:"name,omitempty"`
	Title     string     `json:"title,omitempty"`     // what the program calls its window
	Command   string     `json:"command"`             // what the terminal was started with
	Running   string     `json:"running,omitempty"`   // the command in the foreground now, where that can be read
	Directory string     `json:"directory,omitempty"` // where it is (OSC 7, else of the process in the foreground)
	Container string     `json:"container,omitempty"`
	Kind      string     `json:"kind,omitempty"` // "ssh" for the terminal of an SSH session; only one that was cut off is listed
	PID       int        `json:"pid"`
	Rows      uint16     `json:"rows"`
	Cols      uint16     `json:"cols"`
	Viewers   int        `json:"viewers"`
	CreatedAt time.Time  `json:"created_at"`
	ActiveAt  time.Time  `json:"active_at"`           // last output or input
	EndsAt    time.Time  `json:"ends_at,omitzero"`    // when it is ended if nobody attaches
	CutOffAt  time.Time  `json:"cut_off_at,omitzero"` // when the SSH client of a terminal of kind "ssh" was cut off
	Exited    *PTYEnding `json:"exited,omitempty"`    // how it ended, while nobody was told
}

// TerminalChange changes a terminal (PATCH [PathAgentTerminals]/{id or name}).
type TerminalChange struct {
	Name *string `json:"name,omitempty"`
}

// Containers answers containers, of the agent and of the server.
type Containers struct {
	Devcontainers []Devcontainer `json:"devcontainers"`
	Containers    []Container    `json:"containers"`
	Warnings      []string       `json:"warnings,omitempty"`
	// Engines names the engines that were asked, berth's addition. With stock agents it is empty.
	Engines []string `json:"engines,omitempty"`
}

// Container is one container beside an agent. What follows Volumes is berth's addition.
type Container struct {
	CreatedAt time.Time         `json:"created_at"`
	ID        string            `json:"id"`
	Name      string            `json:"name"`
	Image     string            `json:"image"`
	Labels    map[string]string `json:"labels"`
	Running   bool              `json:"running"`
	Ports     []ContainerPort   `json:"ports"`
	// Status is "running", "exited successfully", "exited with code N" or "exited with code N: why", or an engine's word for a
	// state in between, such as "created" or "paused".
	Status string `json:"status"`
	// Volumes maps a source on the host to its place in the container.
	Volumes map[string]string `json:"volumes"`
	// Engine names the engine it runs on, such as "docker" or "podman (root)".
	Engine string `json:"engine,omitempty"`
	// Health is "starting", "healthy" or "unhealthy"; empty without a health check.
	Health string `json:"health,omitempty"`
	// ComposeProject and ComposeService say which part of which Compose project it is.
	ComposeProject string `json:"compose_project,omitempty"`
	ComposeService string `json:"compose_service,omitempty"`
	// NetworkMode is "host", "none", "bridge", "container:ID" or the name of a network; empty if it does not run.
	NetworkMode string `json:"network_mode,omitempty"`
	// PID is the process id of its first process, as the engine's machine counts; 0 if it does not run or that is another machine.
	PID int `json:"pid,omitempty"`
}

// ContainerPort is a port of a container; the host fields are set when it is published.
type ContainerPort struct {
	Port     uint16 `json:"port"`
	Network  string `json:"network"`
	HostIP   string `json:"host_ip,omitempty"`
	HostPort uint16 `json:"host_port,omitempty"`
}

// Devcontainer is a development container that the agent manages.
type Devcontainer struct {
	ID              uuid.UUID     `json:"id"`
	Name            string        `json:"name"`
	WorkspaceFolder string        `json:"workspace_folder"`
	ConfigPath      string        `json:"config_path,omitempty"`
	SubagentID      uuid.NullUUID `json:"subagent_id"`
	Status          string        `json:"status"`
	Dirty           bool          `json:"dirty"`
	Container       *Container    `json:"container,omitempty"`
	// Agent is the agent inside of it, if one runs.
	Agent *DevcontainerAgent `json:"agent,omitempty"`
	Error string             `json:"error,omitempty"`
}

// DevcontainerAgent is the sub-agent of a [Devcontainer].
type DevcontainerAgent struct {
	ID        uuid.UUID `json:"id"`
	Name      string    `json:"name"`
	Directory string    `json:"directory"`
}

// Agent answers GET workspaceagents/{id}.
type Agent struct {
	ID                       uuid.UUID          `json:"id"`
	ResourceID               uuid.UUID          `json:"resource_id"`
	ParentID                 uuid.NullUUID      `json:"parent_id"`
	CreatedAt                time.Time          `json:"created_at"`
	UpdatedAt                time.Time          `json:"updated_at"`
	FirstConnectedAt         *time.Time         `json:"first_connected_at,omitempty"`
	LastConnectedAt          *time.Time         `json:"last_connected_at,omitempty"`
	DisconnectedAt           *time.Time         `json:"disconnected_at,omitempty"`
	StartedAt                *time.Time         `json:"started_at,omitempty"`
	ReadyAt                  *time.Time         `json:"ready_at,omitempty"`
	Status                   AgentStatus        `json:"status"`
	LifecycleState           string             `json:"lifecycle_state"`
	Name                     string             `json:"name"`
	Architecture             string             `json:"architecture"`
	OperatingSystem          string             `json:"operating_system"`
	InstanceID               string             `json:"instance_id,omitempty"`
	EnvironmentVariables     map[string]string  `json:"environment_variables"`
	LogsLength               int32              `json:"logs_length"`
	LogsOverflowed           bool               `json:"logs_overflowed"`
	Directory                string             `json:"directory,omitempty"`
	ExpandedDirectory        string             `json:"expanded_directory,omitempty"`
	Version                  string             `json:"version"`
	APIVersion               string             `json:"api_version"`
	Apps                     []App              `json:"apps"`
	Latency                  map[string]Latency `json:"latency,omitempty"`
	ConnectionTimeoutSeconds int32              `json:"connection_timeout_seconds"`
	TroubleshootingURL       string             `json:"troubleshooting_url"`
	Subsystems               []string           `json:"subsystems"`
	Health                   AgentHealth        `json:"health"`
	DisplayApps              []string           `json:"display_apps"`
	LogSources               []LogSource        `json:"log_sources"`
	Scripts                  []Script           `json:"scripts"`
	StartupScriptBehavior    string             `json:"startup_script_behavior"`
}

// AgentStatus is the state of an agent's connection to the server.
type AgentStatus string

// The states of a connection (docs/protocol.md#names).
const (
	AgentConnecting   AgentStatus = "connecting"
	AgentConnected    AgentStatus = "connected"
	AgentDisconnected AgentStatus = "disconnected"
	AgentTimeout      AgentStatus = "timeout"
)

// Latency is the round trip from an agent to a relay region.
type Latency struct {
	Preferred    bool    `json:"preferred"`
	Milliseconds float64 `json:"latency_ms"`
}

// AgentHealth tells whether an agent is well, and what is wrong if not.
type AgentHealth struct {
	Healthy bool   `json:"healthy"`
	Reason  string `json:"reason,omitempty"`
}

// Script is a start, stop or cron script of an agent.
type Script struct {
	ID               uuid.UUID     `json:"id"`
	LogSourceID      uuid.UUID     `json:"log_source_id"`
	LogPath          string        `json:"log_path"`
	Script           string        `json:"script"`
	Cron             string        `json:"cron"`
	RunOnStart       bool          `json:"run_on_start"`
	RunOnStop        bool          `json:"run_on_stop"`
	StartBlocksLogin bool          `json:"start_blocks_login"`
	Timeout          time.Duration `json:"timeout"`
	DisplayName      string        `json:"display_name"`
	ExitCode         *int32        `json:"exit_code,omitempty"`
	Status           string        `json:"status,omitempty"`
}

// App is something in a workspace that people open or watch.
type App struct {
	ID            uuid.UUID   `json:"id"`
	URL           string      `json:"url,omitempty"`
	External      bool        `json:"external"`
	Slug          string      `json:"slug"`
	DisplayName   string      `json:"display_name,omitempty"`
	Command       string      `json:"command,omitempty"`
	Icon          string      `json:"icon,omitempty"`
	Subdomain     bool        `json:"subdomain"`
	SubdomainName string      `json:"subdomain_name,omitempty"`
	SharingLevel  string      `json:"sharing_level"`
	Healthcheck   Healthcheck `json:"healthcheck"`
	// Health is disabled, initializing, healthy or unhealthy.
	Health   string      `json:"health"`
	Group    string      `json:"group,omitempty"`
	Hidden   bool        `json:"hidden"`
	OpenIn   string      `json:"open_in"`
	Tooltip  string      `json:"tooltip,omitempty"`
	Statuses []AppStatus `json:"statuses"`
}

// Healthcheck tells how an agent checks an app. Interval is in seconds.
type Healthcheck struct {
	URL       string `json:"url"`
	Interval  int32  `json:"interval"`
	Threshold int32  `json:"threshold"`
}

// AppStatus is what a program said of itself at one moment.
type AppStatus struct {
	ID                 uuid.UUID `json:"id"`
	CreatedAt          time.Time `json:"created_at"`
	WorkspaceID        uuid.UUID `json:"workspace_id"`
	AgentID            uuid.UUID `json:"agent_id"`
	AppID              uuid.UUID `json:"app_id"`
	State              string    `json:"state"`
	Message            string    `json:"message"`
	URI                string    `json:"uri"`
	Icon               string    `json:"icon"`
	NeedsUserAttention bool      `json:"needs_user_attention"`
}

// AgentMetadata is one value that an agent collects, in a message of watch-metadata.
type AgentMetadata struct {
	Result      MetadataResult      `json:"result"`
	Description MetadataDescription `json:"description"`
}

// MetadataResult is the newest value. Age is in seconds; the time is zero before the first one.
type MetadataResult struct {
	CollectedAt time.Time `json:"collected_at"`
	Age         int64     `json:"age"`
	Value       string    `json:"value"`
	Error       string    `json:"error"`
}

// MetadataDescription says how a value is collected. Interval and timeout are in seconds.
type MetadataDescription struct {
	DisplayName string `json:"display_name"`
	Key         string `json:"key"`
	Script      string `json:"script"`
	Interval    int64  `json:"interval"`
	Timeout     int64  `json:"timeout"`
}

// ServerEvent is a server-sent event as a message of a WebSocket: its type is data, error or ping.
type ServerEvent struct {
	Type string `json:"type"`
	Data any    `json:"data"`
}

// Refreshed answers POST workspaceagents/me/experimental/chat-context/refresh: how many chats were.
type Refreshed struct {
	Refreshed int `json:"refreshed"`
}

// SignTerminalToken is the body of POST applications/reconnecting-pty-signed-token: who wants to open
// terminals at URL without a key.
type SignTerminalToken struct {
	URL     string    `json:"url"`
	AgentID uuid.UUID `json:"agentID"`
}

// SignedTerminalToken answers it. The token goes into the query, as [QuerySignedAppToken].
type SignedTerminalToken struct {
	SignedToken string `json:"signed_token"`
}
