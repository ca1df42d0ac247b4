package control

import (
	"encoding/json"
	"net/http"
	"regexp"
	"strings"
	"testing"

	"github.com/google/uuid"
)

// document is what a reader of openapi.json sees.
type document struct {
	OpenAPI string `json:"openapi"`
	Paths   map[string]map[string]struct {
		OperationID string                `json:"operationId"`
		Summary     string                `json:"summary"`
		Security    []map[string][]string `json:"security"`
		Parameters  []struct {
			Name, In string
			Required bool
		} `json:"parameters"`
		RequestBody any                        `json:"requestBody"`
		Responses   map[string]json.RawMessage `json:"responses"`
	} `json:"paths"`
	Components struct {
		Schemas, Responses, SecuritySchemes map[string]json.RawMessage
	} `json:"components"`
}

var inBraces = regexp.MustCompile(`\{([a-z]+)\}`)

// TestDocument compares the served document with what the server answers: each operation leads to a
// handler that asks for the token that the document says, and the document holds together.
func TestDocument(t *testing.T) {
	x := serve(t, Config{})
	status, body := x.call("GET", documentPath, "")
	if status != http.StatusOK {
		t.Fatalf("%d %s", status, body)
	}
	var d document
	if err := json.Unmarshal([]byte(body), &d); err != nil {
		t.Fatal(err)
	}
	if d.OpenAPI != "3.1.0" {
		t.Errorf("version %q", d.OpenAPI)
	}
	for _, m := range regexp.MustCompile(`"\$ref": "#/components/([a-z]+)/([A-Za-z]+)"`).FindAllStringSubmatch(body, -1) {
		if m[1] == "schemas" && d.Components.Schemas[m[2]] == nil || m[1] == "responses" && d.Components.Responses[m[2]] == nil {
			t.Errorf("%s leads nowhere", m[0])
		}
	}
	names := map[string]bool{}
	for path, methods := range d.Paths {
		for method, op := range methods {
			at := strings.ToUpper(method) + " " + path
			if names[op.OperationID] {
				t.Errorf("%s: %s is the name of another", at, op.OperationID)
			}
			names[op.OperationID] = true
			if op.Summary == "" || len(op.Responses) == 0 {
				t.Errorf("%s says too little", at)
			}
			for _, m := range inBraces.FindAllStringSubmatch(path, -1) {
				found := false
				for _, p := range op.Parameters {
					found = found || p.In == "path" && p.Name == m[1] && p.Required
				}
				if !found {
					t.Errorf("%s does not describe {%s}", at, m[1])
				}
			}
			status, body := x.call(strings.ToUpper(method), inBraces.ReplaceAllString(path, uuid.NewString()), "")
			if status == http.StatusNotFound && strings.Contains(body, "Route not found.") {
				t.Errorf("%s leads nowhere", at)
			}
			if secured := len(op.Security) > 0; secured && status != http.StatusUnauthorized {
				t.Errorf("%s needs a token, but answers %d without one", at, status)
			} else if secured && strings.Contains(body, "signed out") != (op.Security[0][userKey] != nil) {
				t.Errorf("%s needs %v, but answers %s", at, op.Security, body)
			}
		}
	}
	// The rows of the protocol that a stock peer calls.
	for _, row := range stockRoutes {
		method, path, _ := strings.Cut(row, " ")
		if _, ok := d.Paths[path][strings.ToLower(method)]; !ok {
			t.Errorf("%s is not there", row)
		}
	}
}

var stockRoutes = []string{
	"GET /api/v2/derp-map",
	"GET /api/v2/tailnet",
	"POST /api/v2/workspaceagents/aws-instance-identity",
	"POST /api/v2/workspaceagents/azure-instance-identity",
	"POST /api/v2/workspaceagents/google-instance-identity",
	"GET /api/v2/workspaceagents/connection",
	"GET /api/v2/workspaceagents/me/rpc",
	"PATCH /api/v2/workspaceagents/me/logs",
	"POST /api/v2/workspaceagents/me/log-source",
	"PATCH /api/v2/workspaceagents/me/app-status",
	"GET /api/v2/workspaceagents/me/reinit",
	"GET /api/v2/workspaceagents/me/external-auth",
	"GET /api/v2/workspaceagents/me/gitauth",
	"GET /api/v2/workspaceagents/me/gitsshkey",
	"POST /api/v2/workspaceagents/me/tasks/{task}/log-snapshot",
	"POST /api/v2/workspaceagents/me/experimental/chat-context/refresh",
	"GET /api/v2/workspaceagents/{id}",
	"GET /api/v2/workspaceagents/{id}/connection",
	"GET /api/v2/workspaceagents/{id}/coordinate",
	"GET /api/v2/workspaceagents/{id}/logs",
	"GET /api/v2/workspaceagents/{id}/startup-logs",
	"GET /api/v2/workspaceagents/{id}/listening-ports",
	"GET /api/v2/workspaceagents/{id}/containers",
	"GET /api/v2/workspaceagents/{id}/containers/watch",
	"POST /api/v2/workspaceagents/{id}/containers/devcontainers/{dc}/recreate",
	"DELETE /api/v2/workspaceagents/{id}/containers/devcontainers/{dc}",
	"GET /api/v2/workspaceagents/{id}/pty",
	"GET /api/v2/workspaceagents/{id}/watch-metadata",
	"GET /api/v2/workspaceagents/{id}/watch-metadata-ws",
	"GET /api/v2/buildinfo",
	"GET /api/v2/users/{user}",
	"GET /api/v2/users/{user}/workspace/{name}",
	"GET /api/v2/workspaces/{id}",
	"GET /api/v2/workspaces/{id}/watch",
	"GET /api/v2/workspaces/{id}/watch-ws",
	"POST /api/v2/workspaces/{id}/usage",
	"GET /api/v2/templateversions/{version}",
	"GET /api/v2/appearance",
	"GET /api/v2/applications/host",
	"POST /api/v2/applications/reconnecting-pty-signed-token",
	"GET /api/v2/init-script/{os}/{arch}",
	"GET /derp",
	"GET /derp/latency-check",
	"GET /latency-check",
	"GET /healthz",
}

// TestRemovedRoutes: what moved to the link long ago is gone, and is not taken for an agent called "me".
func TestRemovedRoutes(t *testing.T) {
	x := serve(t, Config{})
	_, token := x.create("demo")
	for _, name := range []string{"manifest", "metadata", "report-stats", "report-lifecycle", "startup", "startup-logs", "app-health", "coordinate", "version", "connection", "logs"} {
		for _, method := range []string{"GET", "POST"} {
			status, body := x.call(method, "/api/v2/workspaceagents/me/"+name, "", as(token)...)
			if status != http.StatusNotFound || body != `{"message":"Route not found."}`+"\n" {
				t.Errorf("%s %s: %d %s", method, name, status, body)
			}
		}
	}
}
