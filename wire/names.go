package wire

import "time"

// How a request carries its token (docs/protocol.md#http-served-by-berth-serve). A server takes either; a stock agent of 2025 sends only the cookie.
const (
	HeaderSessionToken = "Coder-Session-Token"
	CookieSessionToken = "coder_session_token"
)

// QuerySignedAppToken is where a terminal's WebSocket carries a token in place of a key.
//
// See docs/protocol.md#names.
const QuerySignedAppToken = "coder_signed_app_token_23db1dde"

// HeaderBuildVersion stands on every response of a control server (docs/protocol.md#names).
const HeaderBuildVersion = "X-Coder-Build-Version"

// TCP ports that an agent serves on its tailnet address (docs/protocol.md#ports-of-an-agent-on-the-mesh). Every other port is forwarded to loopback.
const (
	PortSSH         = 1
	PortPTY         = 2
	PortSpeedtest   = 3
	PortHTTP        = 4
	PortSSHStandard = 22
	// PortResume is berth's addition: SSH over streams that are taken up again (package resume). Below 9 all are reserved; this one is above those that
	// systems choose by themselves, and no service is known for it. A stock agent forwards it to loopback, where nothing listens.
	PortResume = 61022

	// FirstUserPort is the lowest port a port list shows: those below are the agent's own.
	FirstUserPort = 9
)

// Limits of the protocol, in bytes (docs/protocol.md#limits).
const (
	// MaxMessage bounds one RPC message: what stock peers accept before they answer "data overflow".
	MaxMessage = 4 << 20
	// MaxLogBatch bounds one BatchCreateLogs, counting each entry as its output plus LogEntryOverhead.
	MaxLogBatch      = 1 << 20
	LogEntryOverhead = 21
	// MaxFollowMessage bounds one message of a followed log: stock readers refuse longer ones.
	MaxFollowMessage = 32 << 10
	// MaxContainersMessage bounds one message of a containers watch, which readers raise their limit for.
	MaxContainersMessage = 4 << 20
	// MaxAppStatusMessage bounds the message of an app status.
	MaxAppStatusMessage = 160
	// MaxURI bounds the link of an app status, and of an icon: what browsers take.
	MaxURI = 2048
	// MaxMetadataValue bounds one metadata value or error; MaxMetadataKeys the sum of all keys of a batch.
	MaxMetadataValue = 2048
	MaxMetadataKeys  = 6144
	// MaxContextBody bounds the body of one resource of a PushContextState, MaxContextBodies those of all
	// together, MaxContextSource its source, MaxContextError its error, MaxContextHash a hash.
	MaxContextBody   = 256 << 10
	MaxContextBodies = 4 << 20
	MaxContextSource = 1024
	MaxContextError  = 4096
	MaxContextHash   = 64
	// MaxJSONBody bounds a JSON body that a server of ours reads, MaxJSONAnswer an answer that a client
	// or server of ours reads: 5,000 containers with long labels take about 10 MB.
	MaxJSONBody   = 1 << 20
	MaxJSONAnswer = 16 << 20
)

// Limits of the protocol, in pieces (docs/protocol.md#limits).
const (
	// MaxBoundaryLogs bounds one ReportBoundaryLogs.
	MaxBoundaryLogs = 1000
	// MaxContextResources bounds one PushContextState.
	MaxContextResources = 1000
	// MaxPeerUpdates bounds one CoordinateResponse, MaxPeerQueue how many of them wait for a peer that
	// does not take them before it is removed.
	MaxPeerUpdates = 1024
	MaxPeerQueue   = 512
)

// Pace of the RPC link (docs/protocol.md#pace).
const (
	// PingInterval is how often the server probes an agent, PingTimeout when it gives it up.
	PingInterval = 15 * time.Second
	PingTimeout  = 30 * time.Second
	// StatsInterval is how often agents report traffic and sessions.
	StatsInterval = 30 * time.Second
	// ResourcesInterval is how often agents measure their machine; they send the last ResourcesWindow
	// values at a time.
	ResourcesInterval = 10 * time.Second
	ResourcesWindow   = 20
	// ResumeLifetime is how long a resume token is good, ResumeRefresh when to ask for another.
	ResumeLifetime = 24 * time.Hour
	ResumeRefresh  = 12 * time.Hour
)

// ExternalLogSource is the source of log lines that name none (docs/protocol.md#names).
const ExternalLogSource = "3b579bf4-1ed8-4b99-87a8-e9a1e3410410"

// CodeUnimplemented (docs/protocol.md#names) is the RPC error code of a method that this version of a server lacks; see
// [Version.HasMethod].
const CodeUnimplemented = 12

// CodeUnavailable is the RPC error code with which a server of ours says that it cannot take a report now, and
// may later. Stock servers tell no reasons apart (docs/protocol.md#additions).
const CodeUnavailable = 14
