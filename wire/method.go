package wire

// The RPC services. A method is called as its service and its name, "/coder.agent.v2.Agent/GetManifest".
// docs/protocol.md#rpc says which are there.
const (
	AgentService   = "/coder.agent.v2.Agent/"
	TailnetService = "/coder.tailnet.v2.Tailnet/"
)

// methods tells since which minor version of API 2 each method is there.
//
// Two are older than the protocol says. Stock clients call RefreshResumeToken and PostTelemetry on
// links of version 2.0, and give up a link that fails either in another way than by
// [CodeUnimplemented].
var methods = map[string]int{
	AgentService + "GetManifest":                         0,
	AgentService + "GetServiceBanner":                    0,
	AgentService + "UpdateStats":                         0,
	AgentService + "UpdateLifecycle":                     0,
	AgentService + "BatchUpdateAppHealths":               0,
	AgentService + "UpdateStartup":                       0,
	AgentService + "BatchUpdateMetadata":                 0,
	AgentService + "BatchCreateLogs":                     0,
	AgentService + "GetAnnouncementBanners":              1,
	AgentService + "ScriptCompleted":                     3,
	AgentService + "GetResourcesMonitoringConfiguration": 4,
	AgentService + "PushResourcesMonitoringUsage":        4,
	AgentService + "ReportConnection":                    4,
	AgentService + "CreateSubAgent":                      6,
	AgentService + "DeleteSubAgent":                      6,
	AgentService + "ListSubAgents":                       6,
	AgentService + "ReportBoundaryLogs":                  7,
	AgentService + "UpdateAppStatus":                     8,
	AgentService + "PushContextState":                    10,

	TailnetService + "Coordinate":         0,
	TailnetService + "StreamDERPMaps":     0,
	TailnetService + "PostTelemetry":      0, // 2.2
	TailnetService + "RefreshResumeToken": 0, // 2.3
	TailnetService + "WorkspaceUpdates":   3,
}

// HasMethod tells whether v has an RPC, by the full name of its method.
func (v Version) HasMethod(method string) bool {
	minor, ok := methods[method]
	return ok && v.AtLeast(minor)
}
