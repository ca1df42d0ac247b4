package agent

import (
	"fmt"
	"io"
	"net/http"
	"runtime"
	"runtime/metrics"
	"strconv"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

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

// shownLists are shown as the protocol has them.
type shownLists struct {
	Apps          []rawMessage `json:"apps"`
	Metadata      []rawMessage `json:"metadata"`
	Scripts       []rawMessage `json:"scripts"`
	Devcontainers []rawMessage `json:"devcontainers"`
}

// rawMessage shows a protobuf message in JSON.
type rawMessage struct{ proto.Message }

// MarshalJSON implements json.Marshaler.
func (m rawMessage) MarshalJSON() ([]byte, error) {
	return protojson.MarshalOptions{UseProtoNames: true}.Marshal(m.Message)
}

func rawMessages[M proto.Message](list []M) []rawMessage {
	out := make([]rawMessage, len(list))
	for i, m := range list {
		out[i] = rawMessage{m}
	}
	return out
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
	scripts := make([]*agentpb.WorkspaceAgentScript, len(m.GetScripts()))
	for i, s := range m.GetScripts() {
		scripts[i] = proto.CloneOf(s)
		scripts[i].Script = redacted
	}
	apps := make([]*agentpb.WorkspaceApp, len(m.GetApps()))
	for i, app := range m.GetApps() {
		apps[i] = proto.CloneOf(app)
		if app.GetCommand() != "" {
			apps[i].Command = redacted
		}
	}
	metadata := make([]*agentpb.WorkspaceAgentMetadata_Description, len(m.GetMetadata()))
	for i, d := range m.GetMetadata() {
		metadata[i] = proto.CloneOf(d)
		metadata[i].Script = redacted
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
		shownLists: shownLists{
			Apps:          rawMessages(apps),
			Metadata:      rawMessages(metadata),
			Scripts:       rawMessages(scripts),
			Devcontainers: rawMessages(m.GetDevcontainers()),
		},
	}
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

// routeDebug adds what helps to find out what is wrong.
func (a *api) routeDebug(mux *http.ServeMux) {
	mux.HandleFunc("GET /debug/logs", a.debugLogs)
	mux.HandleFunc("GET /debug/magicsock", a.debugMesh)
	mux.HandleFunc("GET /debug/magicsock/debug-logging/{state}", a.debugMeshLogging)
	mux.HandleFunc("GET /debug/manifest", a.debugManifest)
}

// debugLogs shows the agent's own log; with after, in RFC 3339, what was written since then.
func (a *api) debugLogs(w http.ResponseWriter, r *http.Request) {
	if !onlyQuery(w, r, "after") {
		return
	}
	var after time.Time
	if text := r.URL.Query().Get("after"); text != "" {
		var err error
		if after, err = time.Parse(time.RFC3339Nano, text); err != nil {
			writeBadQuery(w, wire.Validation{Field: "after", Detail: fmt.Sprintf("Query param \"after\" must be a time such as 2006-01-02T15:04:05Z: %v", err)})
			return
		}
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	// A peer that left is no trouble of ours.
	_ = a.logs.WriteSince(w, after)
}

func (a *api) debugMesh(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	a.mesh(w)
}

// debugMeshLogging switches whether the mesh logs all it does.
func (a *api) debugMeshLogging(w http.ResponseWriter, r *http.Request) {
	on, err := strconv.ParseBool(r.PathValue("state"))
	if err != nil {
		http.Error(w, fmt.Sprintf("invalid state %q, must be a boolean", r.PathValue("state")), http.StatusBadRequest)
		return
	}
	a.meshDebug.Store(on)
	a.log.Info("verbose logs of the mesh were switched", "on", on)
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	fmt.Fprintf(w, "updated magicsock debug logging to %v", on)
}

func (a *api) prometheus(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	a.metrics(w)
	processMetrics(w)
}

// processMetrics writes what the Go runtime knows about this process.
func processMetrics(w io.Writer) {
	sample := []metrics.Sample{{Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}}
	metrics.Read(sample)
	writeMetric(w, "gauge", "go_goroutines", "Goroutines that exist.", float64(runtime.NumGoroutine()))
	writeMetric(w, "gauge", "go_memory_mapped_bytes", "Memory the Go runtime holds, without what it gave back.",
		float64(sample[0].Value.Uint64()-sample[1].Value.Uint64()))
}

// writeMetric writes one metric without labels in the Prometheus text format.
func writeMetric(w io.Writer, kind, name, help string, value float64) {
	fmt.Fprintf(w, "# HELP %s %s\n# TYPE %s %s\n%s %g\n", name, help, name, kind, name, value)
}
