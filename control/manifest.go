package control

import (
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire/agentpb"
)

// owner is whom all workspaces belong to.
const owner = "admin"

// manifest is what an agent is told to do. Stock agents crash on a missing health check or relay
// parameter and on enum values of 0, so every field that they read is there.
//
// workspace is what [Server.workspaceOf] says.
func (s *Server) manifest(a, workspace store.Agent, st store.State) *agentpb.Manifest {
	m := &agentpb.Manifest{
		AgentId: a.ID[:], AgentName: a.Name, OwnerUsername: owner,
		WorkspaceId: workspace.ID[:], WorkspaceName: workspace.Name,
		EnvironmentVariables: a.Environment, Directory: a.Directory, MotdPath: a.MOTD,
		DisableDirectConnections: s.config.RelayOnly, DerpForceWebsockets: s.config.ForceWebSocket,
		DerpMap: s.relayMap.Proto(), VsCodePortProxyUri: workspace.VSCodePortProxy,
	}
	m.GitAuthConfigs = uint32(len(s.declaredProviders()))
	if a.IsSubAgent() {
		m.ParentId = a.ParentID[:]
	}
	for _, app := range a.Apps {
		m.Apps = append(m.Apps, &agentpb.WorkspaceApp{
			Id: app.ID[:], Url: app.URL, External: app.External, Slug: app.Slug, DisplayName: app.DisplayName,
			Command: app.Command, Icon: app.Icon, Hidden: app.Hidden, Subdomain: app.Subdomain, SharingLevel: shareProto[sharedWith(app, workspace)],
			Healthcheck: &agentpb.WorkspaceApp_Healthcheck{
				Url: app.HealthURL, Interval: durationpb.New(app.HealthInterval), Threshold: app.HealthThreshold,
			},
			Health: healthProto[appHealth(app, st)],
		})
	}
	for _, script := range a.Scripts {
		m.Scripts = append(m.Scripts, &agentpb.WorkspaceAgentScript{
			Id: script.ID[:], LogSourceId: script.LogSourceID[:], LogPath: script.LogPath, Script: script.Script, Cron: script.Cron,
			RunOnStart: script.RunOnStart, RunOnStop: script.RunOnStop, StartBlocksLogin: script.StartBlocksLogin,
			Timeout: durationpb.New(script.Timeout), DisplayName: script.DisplayName,
		})
	}
	for _, d := range a.Devcontainers {
		m.Devcontainers = append(m.Devcontainers, &agentpb.WorkspaceAgentDevcontainer{
			Id: d.ID[:], WorkspaceFolder: d.WorkspaceFolder, ConfigPath: d.ConfigPath, Name: d.Name,
		})
		// The script of a dev container does nothing: agents log its start under it and report its end.
		m.Scripts = append(m.Scripts, &agentpb.WorkspaceAgentScript{
			Id: d.ID[:], LogSourceId: d.LogSourceID[:], Timeout: durationpb.New(0), DisplayName: devcontainerLog(d),
		})
	}
	for _, secret := range a.Secrets {
		m.Secrets = append(m.Secrets, &agentpb.WorkspaceSecret{EnvName: secret.Env, FilePath: secret.File, Value: []byte(secret.Value)})
	}
	for _, d := range a.Metadata {
		m.Metadata = append(m.Metadata, &agentpb.WorkspaceAgentMetadata_Description{
			DisplayName: d.DisplayName, Key: d.Key, Script: d.Script,
			Interval: secondsAsNanos(d.Interval), Timeout: secondsAsNanos(d.Timeout),
		})
	}
	return m
}

// devcontainerLog is what the log of a dev container is called.
func devcontainerLog(d store.Devcontainer) string { return "Dev Container (" + d.Name + ")" }

// shareProto is who may open an app, as agents are told it.
var shareProto = map[store.Share]agentpb.WorkspaceApp_SharingLevel{
	store.ShareOwner:         agentpb.WorkspaceApp_OWNER,
	store.ShareOrganization:  agentpb.WorkspaceApp_ORGANIZATION,
	store.ShareAuthenticated: agentpb.WorkspaceApp_AUTHENTICATED,
	store.SharePublic:        agentpb.WorkspaceApp_PUBLIC,
}

// healthProto is the health of an app as agents are told it.
var healthProto = map[string]agentpb.WorkspaceApp_Health{
	appDisabled:     agentpb.WorkspaceApp_DISABLED,
	appInitializing: agentpb.WorkspaceApp_INITIALIZING,
	appHealthy:      agentpb.WorkspaceApp_HEALTHY,
	appUnhealthy:    agentpb.WorkspaceApp_UNHEALTHY,
}

// secondsAsNanos puts a number of seconds where nanoseconds belong: the protocol has metadata
// intervals so, and agents read them so. Less than a second becomes one; 0 keeps its meaning.
func secondsAsNanos(d time.Duration) *durationpb.Duration {
	seconds := d / time.Second
	if d > 0 && seconds == 0 {
		seconds = 1
	}
	return durationpb.New(seconds)
}
