package control

import (
	"errors"
	"fmt"
	"net/http"
	"runtime/debug"

	"github.com/berthd/berth/control/openapi"
	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
)

const (
	api    = wire.PathAPI
	agents = wire.PathAgents
)

// Who may call a route, by the names that the document has for it.
const (
	agentToken = "agentToken"
	userKey    = "userKey"
)

// guarded is a handler behind what it takes to reach it.
type guarded struct {
	security string // agentToken, userKey, or empty for anybody
	http.HandlerFunc
}

func anyone(next http.HandlerFunc) guarded { return guarded{"", next} }

func (s *Server) forAgent(next func(http.ResponseWriter, *http.Request, caller)) guarded {
	return guarded{agentToken, s.agentRoute(next)}
}

func (s *Server) forUser(next http.HandlerFunc) guarded { return guarded{userKey, s.userRoute(next)} }

func (s *Server) onAgent(next func(http.ResponseWriter, *http.Request, store.Agent)) guarded {
	return guarded{userKey, s.workspaceRoute(next)}
}

// endpoint is one row of the table of all that the server answers.
type endpoint struct {
	openapi.Route
	handler http.HandlerFunc
}

// endpoints is the table from which both the mux and the document at openapi.json are made.
func (s *Server) endpoints() []endpoint {
	var table []endpoint
	on := func(method, path string, to guarded, op openapi.Operation) {
		if to.security == agentToken {
			op.Errors = append([]int{http.StatusTooManyRequests}, op.Errors...) // see openRequests
		}
		table = append(table, endpoint{openapi.Route{Method: method, Path: path, Security: to.security, Operation: op}, to.HandlerFunc})
	}
	relay := anyone(s.relay.Handler().ServeHTTP)

	on("GET", "/healthz", anyone(getOK), openapi.Operation{Summary: "Whether the server answers", Media: openapi.Text})
	on("GET", "/latency-check", anyone(getLatencyCheck), openapi.Operation{Summary: "How far the server is, also for pages of other origins", Media: openapi.Text})
	on("GET", wire.PathDERP, relay, openapi.Operation{Summary: "The relay, over an upgrade to DERP or WebSocket", Socket: openapi.BinaryMessages, Errors: []int{426}})
	on("GET", wire.PathLatencyCheck, relay, openapi.Operation{Summary: "How far the relay is"})
	on("GET", wire.PathDERP+"/probe", relay, openapi.Operation{Summary: "How far the relay is, as newer nodes ask"})

	on("GET", externalAuthPath+"{provider}", anyone(s.getExternalAuthPage), openapi.Operation{
		Summary: "What is to be done for a service without a token", Media: openapi.Text})

	on("GET", wire.PathBuildInfo, anyone(s.getBuildInfo), openapi.Operation{Summary: "What runs here", Answer: wire.BuildInfo{}})
	on("GET", api+"derp-map", anyone(s.getDERPMap), openapi.Operation{Summary: "The relay map, as it changes",
		Socket: openapi.BinaryMessages, Answer: wire.DERPMap{}, Errors: []int{400}})

	exchangeErrors := []int{400, 401, 404, 409, 413, 429, 500, 503}
	on("POST", agents+"aws-instance-identity", anyone(s.postAWSInstanceIdentity), openapi.Operation{
		Summary: "Trade a signed AWS identity document for an agent's token",
		Body:    wire.AWSInstanceIdentity{}, Answer: wire.SessionToken{}, Errors: exchangeErrors})
	on("POST", agents+"azure-instance-identity", anyone(s.postAzureInstanceIdentity), openapi.Operation{
		Summary: "Trade a document that Azure attested for an agent's token",
		Body:    wire.AzureInstanceIdentity{}, Answer: wire.SessionToken{}, Errors: exchangeErrors})
	on("POST", agents+"google-instance-identity", anyone(s.postGoogleInstanceIdentity), openapi.Operation{
		Summary: "Trade an identity token of Google Cloud for an agent's token",
		Body:    wire.GoogleInstanceIdentity{}, Answer: wire.SessionToken{}, Errors: exchangeErrors})
	on("POST", wire.PathIdentityChallenge, anyone(s.postIdentityChallenge), openapi.Operation{
		Summary: "Ask for a challenge that the proof of a machine then answers",
		Body:    wire.IdentityChallengeRequest{}, Answer: wire.IdentityChallenge{}, Errors: []int{400, 413, 429}})

	version := openapi.Param{Name: "version", Type: "string", Doc: "API version, major.minor"}
	resume := openapi.Param{Name: "resume_token", Type: "string", Doc: "from RefreshResumeToken: come back as the same peer"}
	on("GET", agents+"me/rpc", s.forAgent(s.getRPC), openapi.Operation{
		Summary: "An agent's link: yamux and dRPC, services Agent and Tailnet",
		Query:   []openapi.Param{version, {Name: "role", Type: "string", Doc: "absent or agent: the link tells whether the agent is connected"}},
		Socket:  openapi.BinaryMessages, Errors: []int{400, 500}})
	on("GET", agents+"me/reinit", s.forAgent(s.getReinit), openapi.Operation{
		Summary: "Wait for the workspace to be claimed",
		Query:   []openapi.Param{{Name: "wait", Type: "string", Doc: "true: answer 409 when there is nothing to wait for"}},
		Answer:  wire.Reinitialization{}, Media: openapi.EventStream, Errors: []int{409, 500}})
	for _, name := range []string{"external-auth", "gitauth"} {
		on("GET", agents+"me/"+name, s.forAgent(s.getExternalAuth), openapi.Operation{
			Summary: "A credential of the owner for another service",
			Query: []openapi.Param{
				{Name: "match", Type: "string", Doc: "URL that one of the providers is for; this or id"},
				{Name: "id", Type: "string", Doc: "of the provider"},
				{Name: "url", Type: "string", Doc: "an older name of match"},
				{Name: "listen", Type: "boolean", Doc: "answer once there is a token"},
			},
			Answer: wire.ExternalAuth{}, Errors: []int{400, 404, 500, 503}})
	}
	on("GET", agents+"me/gitsshkey", s.forAgent(s.getGitSSHKey), openapi.Operation{
		Summary: "The owner's SSH key pair", Answer: wire.GitSSHKey{}, Errors: []int{500}})
	on("PATCH", agents+"me/app-status", s.forAgent(s.patchAppStatus), openapi.Operation{
		Summary: "Say what an app is doing", Body: wire.PatchAppStatus{}, Errors: []int{400, 413, 500}})
	on("POST", agents+"me/log-source", s.forAgent(s.postLogSource), openapi.Operation{
		Summary: "Declare a source of log lines", Body: wire.PostLogSource{}, Status: 201, Answer: wire.LogSource{}, Errors: []int{400, 413, 500}})
	on("PATCH", agents+"me/logs", s.forAgent(s.patchLogs), openapi.Operation{
		Summary: "Add lines to the log", Body: wire.PatchLogs{}, Errors: []int{400, 413, 500}})

	on("POST", agents+"me/tasks/{task}/log-snapshot", s.forAgent(s.postTaskLogSnapshot), openapi.Operation{
		Summary: "What was said in a task; there are no tasks here",
		Query:   []openapi.Param{{Name: "format", Type: "string", Doc: snapshotFormat, Required: true}},
		Body:    map[string]any{}, Status: 204, Errors: []int{400, 404}})
	on("POST", agents+"me/experimental/chat-context/refresh", s.forAgent(postChatContextRefresh), openapi.Operation{
		Summary: "Look at the context of chats again; there are none here", Answer: wire.Refreshed{}})

	on("GET", agents+"connection", s.forUser(s.getConnection), openapi.Operation{
		Summary: "What a client needs to join the mesh", Answer: wire.ConnectionInfo{}})
	on("GET", agents+"{id}", s.onAgent(s.getAgent), openapi.Operation{
		Summary: "All that is known of an agent", Answer: wire.Agent{}, Errors: []int{400, 404, 500}})
	on("GET", agents+"{id}/connection", s.onAgent(s.getAgentConnection), openapi.Operation{
		Summary: "What a client needs to reach an agent", Answer: wire.ConnectionInfo{}, Errors: []int{400, 404}})
	on("GET", agents+"{id}/coordinate", s.onAgent(s.getCoordinate), openapi.Operation{
		Summary: "A client's link: yamux and dRPC, service Tailnet, for one agent",
		Query:   []openapi.Param{version, resume},
		Socket:  openapi.BinaryMessages, Errors: []int{400, 404, 500}})
	on("GET", api+"tailnet", s.forUser(s.getTailnet), openapi.Operation{
		Summary: "A client's link: yamux and dRPC, service Tailnet, for all agents",
		Query:   []openapi.Param{version, resume},
		Socket:  openapi.BinaryMessages, Errors: []int{400}})
	for _, name := range []string{"logs", "startup-logs"} {
		on("GET", agents+"{id}/"+name, s.onAgent(s.getLogs), openapi.Operation{
			Summary: "The log of an agent, as it is or as it grows",
			Query: []openapi.Param{
				{Name: "after", Type: "integer", Doc: "only lines with ids above this"},
				{Name: "before", Type: "integer", Doc: "ignored, as stock servers do"},
				{Name: "follow", Type: "boolean", Doc: "go on with new lines, over a WebSocket"},
				{Name: "no_compression", Type: "boolean", Doc: "nothing is compressed anyway"},
				{Name: "format", Type: "string", Doc: "json or text"},
			},
			Answer: []wire.LogEntry{}, Media: openapi.Text, Socket: openapi.MaybeText, Errors: []int{400, 404, 500}})
	}
	on("GET", agents+"{id}/listening-ports", s.onAgent(s.getListeningPorts), openapi.Operation{
		Summary: "What listens in the workspace",
		Query: []openapi.Param{{Name: wire.QueryNetwork, Type: "string", Doc: "all: UDP too, not only TCP, and ports in other network namespaces"},
			{Name: wire.QueryHidden, Type: "boolean", Doc: "true: also ports of berthd itself and of editors' helpers"}},
		Answer: wire.ListeningPorts{}, Errors: []int{400, 404, 500}})
	on("GET", agents+"{id}/containers", s.onAgent(s.getContainers), openapi.Operation{
		Summary: "The containers beside the agent",
		Query:   []openapi.Param{{Name: "label", Type: "string", Doc: "key=value that containers must have; may be given often"}},
		Answer:  wire.Containers{}, Errors: []int{400, 403, 404, 408, 500}})
	on("GET", agents+"{id}/containers/watch", s.onAgent(s.getContainersWatch), openapi.Operation{
		Summary: "The containers beside the agent, as they change", Socket: openapi.TextMessages, Answer: wire.Containers{}, Errors: []int{400, 404, 500}})
	on("POST", agents+"{id}/containers/devcontainers/{dc}/recreate", s.onAgent(s.postRecreateDevcontainer), openapi.Operation{
		Summary: "Make a development container anew", Status: 202, Answer: wire.Error{}, Errors: []int{400, 404, 409, 500}})
	on("DELETE", agents+"{id}/containers/devcontainers/{dc}", s.onAgent(s.deleteDevcontainer), openapi.Operation{
		Summary: "Stop and remove a development container", Status: 204, Errors: []int{400, 404, 409, 500}})
	on("GET", agents+"{id}/watch-metadata", s.onAgent(s.getWatchMetadata), openapi.Operation{
		Summary: "What the agent collects, as it changes", Media: openapi.EventStream, Answer: []wire.AgentMetadata{}, Errors: []int{400, 404}})
	on("GET", agents+"{id}/watch-metadata-ws", s.onAgent(s.getWatchMetadataSocket), openapi.Operation{
		Summary: "What the agent collects, as it changes", Socket: openapi.TextMessages, Answer: wire.ServerEvent{}, Errors: []int{400, 404}})
	on("GET", agents+"{id}/pty", s.onTerminals(s.getPTY), openapi.Operation{
		Summary: "A terminal",
		Query: []openapi.Param{
			{Name: "reconnect", Type: "string", Doc: "UUID of the session; the same one attaches again", Required: true},
			{Name: "height", Type: "integer", Doc: "rows, 80 by default"},
			{Name: "width", Type: "integer", Doc: "columns, 80 by default"},
			{Name: "command", Type: "string", Doc: "run instead of the login shell"},
			{Name: "container", Type: "string", Doc: "where to run it"},
			{Name: "container_user", Type: "string", Doc: "as whom to run it"},
			{Name: "backend_type", Type: "string", Doc: "empty, screen or buffered"},
			{Name: wire.QuerySignedAppToken, Type: "string", Doc: "from applications/reconnecting-pty-signed-token, in place of a key"},
		},
		Socket: openapi.BinaryMessages, Errors: []int{400, 404}})

	on("GET", api+"users/first", anyone(getFirstUser), openapi.Operation{Summary: "Whether there is a user", Answer: wire.Error{}})
	on("GET", api+"users/{user}", s.onUser(s.getUser), openapi.Operation{
		Summary: "The owner: me, his name or his id", Answer: wire.User{}, Errors: []int{404}})
	on("GET", api+"users/{user}/gitsshkey", s.onUser(s.getUserGitSSHKey), openapi.Operation{
		Summary: "The owner's public SSH key", Answer: wire.UserSSHKey{}, Errors: []int{404, 500}})
	on("GET", api+"users/{user}/workspace/{name}", s.forUser(s.getUserWorkspace), openapi.Operation{
		Summary: "A workspace by name", Answer: wire.Workspace{}, Errors: []int{404, 500}})
	on("GET", api+"workspaces", s.forUser(s.getWorkspaces), openapi.Operation{
		Summary: "The workspaces",
		Query: []openapi.Param{
			{Name: "q", Type: "string", Doc: "words: a part of a name, owner:me, name:x, status:running"},
			{Name: "offset", Type: "integer", Doc: "how many to leave out"},
			{Name: "limit", Type: "integer", Doc: fmt.Sprintf("how many at most; %d by default and at most", maxWorkspaces)},
		},
		Answer: wire.Workspaces{}, Errors: []int{400, 500}})
	on("GET", api+"workspaces/{id}", s.onWorkspace(s.getWorkspace), openapi.Operation{
		Summary: "A workspace", Answer: wire.Workspace{}, Errors: []int{400, 404, 500}})
	on("GET", api+"workspaces/{id}/watch", s.onWorkspace(s.getWatchWorkspace), openapi.Operation{
		Summary: "A workspace, as it changes", Media: openapi.EventStream, Answer: wire.Workspace{}, Errors: []int{400, 404}})
	on("GET", api+"workspaces/{id}/watch-ws", s.onWorkspace(s.getWatchWorkspaceSocket), openapi.Operation{
		Summary: "A workspace, as it changes", Socket: openapi.TextMessages, Answer: wire.ServerEvent{}, Errors: []int{400, 404}})
	on("POST", api+"workspaces/{id}/usage", s.onWorkspace(s.postWorkspaceUsage), openapi.Operation{
		Summary: "Note that somebody uses a workspace", Body: wire.WorkspaceUsage{}, Status: 204, Errors: []int{400, 404, 413, 500}})
	on("GET", api+"templateversions/{version}", s.forUser(s.getTemplateVersion), openapi.Operation{
		Summary: "What workspaces are built from", Answer: wire.TemplateVersion{}, Errors: []int{400, 404}})
	on("GET", api+"appearance", s.forUser(s.getAppearance), openapi.Operation{Summary: "How the deployment looks", Answer: wire.Appearance{}})
	on("GET", api+"applications/host", s.forUser(getAppHost), openapi.Operation{Summary: "The host names of apps", Answer: wire.AppHost{}})
	on("POST", api+"applications/reconnecting-pty-signed-token", s.forUser(s.postTerminalToken), openapi.Operation{
		Summary: "A token for the terminals of an agent, good for a minute", Body: wire.SignTerminalToken{}, Answer: wire.SignedTerminalToken{},
		Errors: []int{400, 404, 413, 500}})
	on("GET", api+"init-script/{os}/{arch}", anyone(getInitScript), openapi.Operation{
		Summary: "A script that starts a stock agent; there is none", Media: openapi.Text, Errors: []int{400, 404}})
	on("GET", "/install.sh", anyone(s.getInstallScript), openapi.Operation{
		Summary: "A shell script that installs an agent for this server", Media: openapi.Text, Errors: []int{404}})
	on("GET", "/bin/{file}", anyone(s.getProgram), openapi.Operation{
		Summary: "An archive with an agent program, SHA256SUMS of them, or their VERSION", Media: archiveMedia, Errors: []int{404, 416, 503}})

	on("GET", wire.PathBerth+"agents", s.forUser(s.getBerthAgents), openapi.Operation{
		Summary: "Every agent", Answer: []wire.AgentSummary{}, Errors: []int{500}})
	on("POST", wire.PathBerth+"agents", s.forUser(s.postBerthAgent), openapi.Operation{
		Summary: "Declare an agent and make its token", Body: wire.CreateAgent{}, Status: 201, Answer: wire.CreatedAgent{}, Errors: []int{400, 409, 413, 500}})
	on("DELETE", wire.PathBerth+"agents/{id}", s.onAgent(s.deleteBerthAgent), openapi.Operation{
		Summary: "Forget an agent with its tokens, state and log", Status: 204, Errors: []int{400, 404, 409, 500}})
	on("GET", wire.PathBerth+"agents/{id}/status", s.onAgent(s.getBerthStatus), openapi.Operation{
		Summary: "An agent with all that it told of its workspace", Answer: wire.StatusReport{}, Errors: []int{400, 404, 500}})
	on("GET", wire.PathBerth+"agents/{id}/app-statuses", s.onAgent(s.getBerthAppStatuses), openapi.Operation{
		Summary: "What an app said of itself, newest first",
		Query:   []openapi.Param{{Name: wire.QueryApp, Type: "string", Doc: "slug of the app", Required: true}},
		Answer:  []wire.AppStatus{}, Errors: []int{400, 404, 500}})
	on("POST", wire.PathBerth+"agents/{id}/token", s.onAgent(s.postBerthToken), openapi.Operation{
		Summary: "Make another token for an agent", Status: 201, Answer: wire.CreatedAgent{}, Errors: []int{400, 404, 500}})
	on("POST", wire.PathBerth+"agents/{id}/revoke", s.onAgent(s.postBerthRevoke), openapi.Operation{
		Summary: "End every token of an agent, and its link", Status: 204, Errors: []int{400, 404, 500}})
	on("POST", wire.PathBerth+"agents/{id}/claim", s.onAgent(s.postBerthClaim), openapi.Operation{
		Summary: "Give a prebuilt workspace to its user", Status: 204, Errors: []int{400, 404, 409, 500}})
	on("POST", wire.PathBerth+"agents/{id}/forget", s.onAgent(s.postBerthForget), openapi.Operation{
		Summary: "Forget which installation the machine of an agent has, and end its tokens", Status: 204, Errors: []int{400, 404, 409, 500}})
	on("GET", wire.PathBerth+"metrics", s.forUser(s.getMetrics), openapi.Operation{
		Summary: "Counters and gauges in the text format of Prometheus", Media: openapi.Text})
	return table
}

// documentPath is where the table is described.
const documentPath = api + "openapi.json"

// routes ties every path to its handler.
func (s *Server) routes() (http.Handler, error) {
	var document []byte
	table := append(s.endpoints(), endpoint{
		openapi.Route{Method: "GET", Path: documentPath, Operation: openapi.Operation{Summary: "This document", Answer: map[string]any{}}},
		func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", jsonType)
			_, _ = w.Write(document)
		},
	})
	mux := http.NewServeMux()
	described := make([]openapi.Route, 0, len(table))
	for _, e := range table {
		mux.HandleFunc(e.Method+" "+e.Path, e.handler)
		described = append(described, e.Route)
	}
	mux.HandleFunc("/", noRoute)
	document, err := openapi.New(openapi.Info{
		Title: "berth", Version: s.config.Version, Server: "/", Header: wire.HeaderSessionToken, Failure: wire.Error{},
		Security: map[string]string{
			agentToken: "An agent's token, a UUID. Also taken from a bearer token, the cookie or the query parameter coder_session_token.",
			userKey:    "A person's key, <10 characters>-<22 characters>. Also taken from the same places.",
		},
	}, described)
	if err != nil {
		return nil, fmt.Errorf("cannot describe the routes: %w", err)
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set(wire.HeaderBuildVersion, s.config.Version)
		w.Header().Set("X-Content-Type-Options", "nosniff")
		extendWrite(w)
		boundBody(w, r)
		defer func() {
			// net/http would print the request's panic and go on; here it goes to the log, with an answer.
			switch p := recover(); p {
			case nil:
			case http.ErrAbortHandler:
				panic(p)
			default:
				s.log.Error("a request failed badly", "path", r.URL.Path, "panic", p, "stack", string(debug.Stack()))
				writeError(w, internalError(errors.New("the server's log has more")))
			}
		}()
		mux.ServeHTTP(w, r)
	}), nil
}

func noRoute(w http.ResponseWriter, _ *http.Request) {
	writeError(w, &wire.Error{StatusCode: http.StatusNotFound, Message: "Route not found."})
}
