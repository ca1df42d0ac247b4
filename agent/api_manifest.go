package agent

import (
	"net/http"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
	"github.com/berthd/berth/wire/tailnetpb"
)

// redacted stands for values that a template or a user put into the manifest.
const redacted = "***REDACTED***"

func (a *api) debugManifest(w http.ResponseWriter, _ *http.Request) {
	m := a.manifest()
	if m == nil {
		writeError(w, http.StatusInternalServerError, "There is no manifest yet.", nil)
		return
	}
	writeJSON(w, http.StatusOK, showManifest(m))
}

// shownManifest is the manifest in force as /debug/manifest shows it.
type shownManifest struct {
	ParentID                 uuid.UUID         `json:"parent_id"`
	AgentID                  uuid.UUID         `json:"agent_id"`
	AgentName                string            `json:"agent_name"`
	OwnerName                string            `json:"owner_name"`
	WorkspaceID              uuid.UUID         `json:"workspace_id"`
	WorkspaceName            string            `json:"workspace_name"`
	GitAuthConfigs           uint32            `json:"git_auth_configs"`
	VSCodePortProxyURI       string            `json:"vscode_port_proxy_uri"`
	DERPMap                  *wire.DERPMap     `json:"derpmap"`
	DERPForceWebSockets      bool              `json:"derp_force_websockets"`
	EnvironmentVariables     map[string]string `json:"environment_variables"`
	Directory                string            `json:"directory"`
	MOTDFile                 string            `json:"motd_file"`
	DisableDirectConnections bool              `json:"disable_direct_connections"`
	shownLists
}

// shownLists have the shapes that the server's own JSON has for these things: whoever reads a manifest
// there reads ids as UUIDs.
type shownLists struct {
	Apps          []wire.App                 `json:"apps"`
	Metadata      []wire.MetadataDescription `json:"metadata"`
	Scripts       []wire.Script              `json:"scripts"`
	Devcontainers []wire.Devcontainer        `json:"devcontainers"`
}

// showManifest leaves out the user's secrets and hides every value that a template may have put a
// secret into: environment variables and the text of scripts.
func showManifest(m *agentpb.Manifest) shownManifest {
	env := make(map[string]string, len(m.GetEnvironmentVariables()))
	for name, value := range m.GetEnvironmentVariables() {
		if value != "" {
			value = redacted
		}
		env[name] = value
	}
	return shownManifest{
		ParentID:                 optionalID(m.GetParentId()),
		AgentID:                  optionalID(m.GetAgentId()),
		AgentName:                m.GetAgentName(),
		OwnerName:                m.GetOwnerUsername(),
		WorkspaceID:              optionalID(m.GetWorkspaceId()),
		WorkspaceName:            m.GetWorkspaceName(),
		GitAuthConfigs:           m.GetGitAuthConfigs(),
		VSCodePortProxyURI:       m.GetVsCodePortProxyUri(),
		DERPMap:                  shownDERPMap(m.GetDerpMap()),
		DERPForceWebSockets:      m.GetDerpForceWebsockets(),
		EnvironmentVariables:     env,
		Directory:                m.GetDirectory(),
		MOTDFile:                 m.GetMotdPath(),
		DisableDirectConnections: m.GetDisableDirectConnections(),
		shownLists:               showLists(m),
	}
}

func showLists(m *agentpb.Manifest) shownLists {
	lists := shownLists{
		Apps: []wire.App{}, Metadata: []wire.MetadataDescription{}, Scripts: []wire.Script{}, Devcontainers: []wire.Devcontainer{},
	}
	for _, app := range m.GetApps() {
		check := app.GetHealthcheck()
		shown := wire.App{
			ID: optionalID(app.GetId()), URL: app.GetUrl(), External: app.GetExternal(), Slug: app.GetSlug(), DisplayName: app.GetDisplayName(),
			Icon: app.GetIcon(), Subdomain: app.GetSubdomain(), SubdomainName: app.GetSubdomainName(),
			SharingLevel: strings.ToLower(app.GetSharingLevel().String()),
			Healthcheck: wire.Healthcheck{
				URL: check.GetUrl(), Interval: int32(check.GetInterval().AsDuration() / time.Second), Threshold: check.GetThreshold(),
			},
			Health: strings.ToLower(app.GetHealth().String()), Hidden: app.GetHidden(), Statuses: []wire.AppStatus{},
		}
		if app.GetCommand() != "" {
			shown.Command = redacted
		}
		lists.Apps = append(lists.Apps, shown)
	}
	for _, d := range m.GetMetadata() {
		lists.Metadata = append(lists.Metadata, wire.MetadataDescription{
			DisplayName: d.GetDisplayName(), Key: d.GetKey(), Script: redacted,
			Interval: metadataSeconds(d.GetInterval()), Timeout: metadataSeconds(d.GetTimeout()),
		})
	}
	for _, s := range m.GetScripts() {
		lists.Scripts = append(lists.Scripts, wire.Script{
			ID: optionalID(s.GetId()), LogSourceID: optionalID(s.GetLogSourceId()), LogPath: s.GetLogPath(), Script: redacted, Cron: s.GetCron(),
			RunOnStart: s.GetRunOnStart(), RunOnStop: s.GetRunOnStop(), StartBlocksLogin: s.GetStartBlocksLogin(),
			Timeout: s.GetTimeout().AsDuration(), DisplayName: s.GetDisplayName(),
		})
	}
	for _, d := range m.GetDevcontainers() {
		shown := wire.Devcontainer{ID: optionalID(d.GetId()), Name: d.GetName(), WorkspaceFolder: d.GetWorkspaceFolder(), ConfigPath: d.GetConfigPath()}
		if id := optionalID(d.GetSubagentId()); id != uuid.Nil {
			shown.SubagentID = uuid.NullUUID{UUID: id, Valid: true}
		}
		lists.Devcontainers = append(lists.Devcontainers, shown)
	}
	return lists
}

func shownDERPMap(m *tailnetpb.DERPMap) *wire.DERPMap {
	if m == nil {
		return nil
	}
	return wire.DERPMapFromProto(m)
}

// optionalID reads a UUID of 16 bytes; anything else is the nil UUID.
func optionalID(b []byte) uuid.UUID {
	id, err := uuid.FromBytes(b)
	if err != nil {
		return uuid.Nil
	}
	return id
}
