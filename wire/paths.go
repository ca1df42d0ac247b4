package wire

// Where the HTTP API of a control server is (docs/protocol.md#http-served-by-berth-serve).
const (
	PathAPI       = "/api/v2/"
	PathBuildInfo = PathAPI + "buildinfo"
	// PathAgents is followed by an agent's id, PathMe by what an agent asks about itself.
	PathAgents = PathAPI + "workspaceagents/"
	PathMe     = PathAgents + "me/"
	// PathDERP is where every relay is, whatever the path of its server's URL, and PathLatencyCheck where
	// nodes measure the way to it.
	PathDERP         = "/derp"
	PathLatencyCheck = PathDERP + "/latency-check"
)

// Where the HTTP API of an agent is, on [PortHTTP] of its mesh address (docs/protocol.md#ports-of-an-agent-on-the-mesh).
const (
	PathAgentPorts      = "/api/v0/listening-ports"
	PathAgentContainers = "/api/v0/containers"
	PathAgentTerminals  = "/api/v0/terminals"
	// PathAgentScriptLogs is followed by the id of a script's log source.
	PathAgentScriptLogs = "/api/v0/script-logs/"
)
