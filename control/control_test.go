package control

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"

	"github.com/coder/websocket"
	"github.com/google/uuid"
	"go.uber.org/goleak"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
	"github.com/berthd/berth/wire/rpc"
	"github.com/berthd/berth/wire/tailnetpb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// site is a server that answers on loopback, with its admin key.
type site struct {
	*Server
	t    *testing.T
	url  string
	key  wire.Secret
	log  *logBuffer
	http *http.Client
	stop func()
}

// serve starts a server; stop ends it, at the latest with the test.
func serve(t *testing.T, config Config) *site {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	config.AccessURL = &url.URL{Scheme: "http", Host: l.Addr().String()}
	log := new(logBuffer)
	if config.Log == nil {
		config.Log = slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	s, err := New(t.Context(), config)
	if err != nil {
		l.Close()
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	transport := &http.Transport{DisableKeepAlives: true}
	x := &site{Server: s, t: t, url: "http://" + l.Addr().String(), key: s.AdminKey(), log: log, http: &http.Client{Transport: transport}}
	stopped := false
	x.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	}
	t.Cleanup(x.stop)
	return x
}

// call does a request and returns status and body. Headers are name, value pairs.
func (x *site) call(method, path, body string, header ...string) (int, string) {
	x.t.Helper()
	req, err := http.NewRequestWithContext(x.t.Context(), method, x.url+path, strings.NewReader(body))
	if err != nil {
		x.t.Fatal(err)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := x.http.Do(req)
	if err != nil {
		x.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		x.t.Fatal(err)
	}
	if v := resp.Header.Get(wire.HeaderBuildVersion); !strings.HasPrefix(v, "v") {
		x.t.Errorf("%s %s: %s is %q", method, path, wire.HeaderBuildVersion, v)
	}
	return resp.StatusCode, string(text)
}

func (x *site) asUser() []string { return []string{wire.HeaderSessionToken, x.key.Reveal()} }

func as(token wire.Secret) []string { return []string{wire.HeaderSessionToken, token.Reveal()} }

// get reads a JSON answer of status 200.
func (x *site) get(path string, v any) {
	x.t.Helper()
	status, body := x.call("GET", path, "", x.asUser()...)
	if status != http.StatusOK {
		x.t.Fatalf("GET %s: %d %s", path, status, body)
	}
	if err := json.Unmarshal([]byte(body), v); err != nil {
		x.t.Fatal(err)
	}
}

// create makes an agent by hand.
func (x *site) create(name string) (uuid.UUID, wire.Secret) {
	x.t.Helper()
	status, body := x.call("POST", "/api/v2/berth/agents", fmt.Sprintf(`{"name":%q}`, name), x.asUser()...)
	var made wire.CreatedAgent
	if err := json.Unmarshal([]byte(body), &made); err != nil || status != http.StatusCreated {
		x.t.Fatalf("create %s: %d %s", name, status, body)
	}
	return made.ID, wire.Secret(made.Token)
}

// agentLink is the raw client's side of a link.
type agentLink struct {
	*rpc.Client
	ws      *websocket.Conn
	agent   agentpb.DRPCAgentClient
	tailnet tailnetpb.DRPCTailnetClient
}

func (x *site) link(path string, header http.Header) *agentLink {
	x.t.Helper()
	conn, resp, err := websocket.Dial(x.t.Context(), x.url+path, &websocket.DialOptions{HTTPClient: x.http, HTTPHeader: header})
	if err != nil {
		body := ""
		if resp != nil {
			text, _ := io.ReadAll(resp.Body)
			body = string(text)
		}
		x.t.Fatalf("dial %s: %v %s", path, err, body)
	}
	client, err := rpc.NewClient(websocket.NetConn(context.Background(), conn, websocket.MessageBinary))
	if err != nil {
		x.t.Fatal(err)
	}
	l := &agentLink{client, conn, agentpb.NewDRPCAgentClient(client), tailnetpb.NewDRPCTailnetClient(client)}
	x.t.Cleanup(func() { l.Close() })
	return l
}

func (x *site) connect(token wire.Secret) *agentLink {
	x.t.Helper()
	return x.link("/api/v2/workspaceagents/me/rpc?version=2.10&role=agent", http.Header{wire.HeaderSessionToken: {token.Reveal()}})
}

func TestPlaces(t *testing.T) {
	x := serve(t, Config{})
	id, token := x.create("demo")
	unknown := uuid.NewString()
	task := "/api/v2/workspaceagents/me/tasks/" + unknown + "/log-snapshot"
	// upgrade asks for a WebSocket, with one header changed.
	upgrade := func(name, value string) []string {
		return append(x.asUser(), "Connection", "keep-alive, Upgrade", "Upgrade", "websocket", "Sec-WebSocket-Version", "13",
			"Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA==", name, value)
	}
	agentPath := "/api/v2/workspaceagents/" + id.String()
	const signedOut = `{"message":"You are signed out or your session has expired. Please sign in again to continue.","detail":`
	tests := []struct {
		name, method, path, body string
		header                   []string
		status                   int
		want                     string // the body; with a trailing …, how it begins
	}{
		{"unknown route", "GET", "/api/v2/nothing", "", nil, 404, `{"message":"Route not found."}` + "\n"},
		{"unknown method", "POST", "/api/v2/buildinfo", "", nil, 404, `{"message":"Route not found."}` + "\n"},
		{"healthz", "GET", "/healthz", "", nil, 200, "OK"},
		{"latency", "GET", "/latency-check", "", nil, 200, "OK"},
		{"relay latency", "GET", "/derp/latency-check", "", nil, 200, ""},
		{"relay without upgrade", "GET", "/derp", "", nil, 426, "DERP requires connection upgrade\n"},
		{"build info", "GET", "/api/v2/buildinfo", "", nil, 200, `{"external_url":…`},

		{"no key", "GET", agentPath, "", nil, 401, signedOut + `…`},
		{"malformed key", "GET", agentPath, "", []string{wire.HeaderSessionToken, "abc"}, 401, signedOut + `"Invalid API key format…`},
		{"unknown key", "GET", agentPath, "", []string{wire.HeaderSessionToken, "0123456789-0123456789012345678901"}, 401, signedOut + `"API key is invalid."}` + "\n"},
		{"an agent's token is no key", "GET", agentPath, "", as(token), 401, signedOut + `…`},
		{"key as cookie", "GET", agentPath, "", []string{"Cookie", "coder_session_token=" + x.key.Reveal()}, 200, `{"id":"` + id.String() + `…`},
		{"key as bearer", "GET", agentPath, "", []string{"Authorization", "Bearer " + x.key.Reveal()}, 200, `{…`},
		{"key in the query", "GET", agentPath + "?coder_session_token=" + x.key.Reveal(), "", nil, 200, `{…`},
		{"key as access token", "GET", agentPath + "?access_token=" + x.key.Reveal(), "", nil, 200, `{…`},
		{"unknown agent", "GET", "/api/v2/workspaceagents/" + unknown, "", x.asUser(), 404, `{"message":"Agent doesn't exist with that id, or you do not have access to it."}` + "\n"},
		{"no UUID", "GET", "/api/v2/workspaceagents/x", "", x.asUser(), 400, `{"message":"Invalid UUID \"x\".","detail":"invalid UUID length: 1"}` + "\n"},
		{"connection", "GET", agentPath + "/connection", "", x.asUser(), 200, `{"derp_map":{"Regions":{"999":{"EmbeddedRelay":true,"RegionID":999,"RegionCode":"berth","RegionName":…`},
		{"connection of none", "GET", "/api/v2/workspaceagents/connection", "", x.asUser(), 200, `{"derp_map":…`},

		{"no token", "PATCH", "/api/v2/workspaceagents/me/logs", "{}", nil, 401, `{"message":"Cookie \"coder_session_token\" must be provided."}` + "\n"},
		{"token is no UUID", "PATCH", "/api/v2/workspaceagents/me/logs", "{}", as("abc"), 401, `{"message":"Workspace agent token invalid.","detail":"An agent token must be a valid UUIDv4. (len 3)"}` + "\n"},
		{"unknown token", "PATCH", "/api/v2/workspaceagents/me/logs", "{}", as(wire.Secret(unknown)), 401, `{"message":"Workspace agent not authorized.","detail":"The agent cannot authenticate until…`},
		{"a key is no token", "PATCH", "/api/v2/workspaceagents/me/logs", "{}", x.asUser(), 401, `{"message":"Workspace agent token invalid."…`},
		{"broken JSON", "PATCH", "/api/v2/workspaceagents/me/logs", "{", as(token), 400, `{"message":"Request body must be valid JSON.","detail":"unexpected EOF"}` + "\n"},
		{"no logs", "PATCH", "/api/v2/workspaceagents/me/logs", "{}", as(token), 400, `{"message":"No logs provided."}` + "\n"},
		{"bad level", "PATCH", "/api/v2/workspaceagents/me/logs", `{"logs":[{"level":"loud"}]}`, as(token), 400, `{"message":"Invalid log level provided.","detail":"invalid log level: \"loud\""}` + "\n"},
		{"huge body", "PATCH", "/api/v2/workspaceagents/me/logs", `{"logs":[{"output":"` + strings.Repeat("x", 5<<20) + `"}]}`, as(token), 413, `{"message":"Request body is too large."…`},
		{"a log", "PATCH", "/api/v2/workspaceagents/me/logs", `{"logs":[{"output":"hello","level":""}],"unknown":1}`, as(token), 200, "null\n"},
		{"log source", "POST", "/api/v2/workspaceagents/me/log-source", `{"id":"` + unknown + `","display_name":"Build","icon":""}`, as(token), 201, `{"workspace_agent_id":"` + id.String() + `","id":"` + unknown + `…`},
		{"log source again", "POST", "/api/v2/workspaceagents/me/log-source", `{"id":"` + unknown + `","display_name":"Other","icon":""}`, as(token), 201, `{"workspace_agent_id":…`},
		{"bad after", "GET", agentPath + "/logs?after=-1", "", x.asUser(), 400, `{"message":"Query param \"after\" must be an integer greater than or equal to zero.","validations":[{"field":"after","detail":"Must be an integer greater than or equal to zero"}]}` + "\n"},
		{"bad format", "GET", agentPath + "/logs?format=xml", "", x.asUser(), 400, `{"message":"Invalid format parameter."…`},
		{"text and follow", "GET", agentPath + "/logs?format=text&follow", "", x.asUser(), 400, `{"message":"Text format is not supported with follow mode."}` + "\n"},
		{"follow without upgrade", "GET", agentPath + "/logs?follow", "", x.asUser(), 400, `{"message":"Failed to accept websocket."…`},
		{"logs", "GET", agentPath + "/logs", "", x.asUser(), 200, `[{"id":…`},
		{"no more logs", "GET", agentPath + "/logs?after=9999999", "", x.asUser(), 200, "[]\n"},

		{"reinit of a modern agent", "GET", "/api/v2/workspaceagents/me/reinit?wait=true", "", as(token), 409, `{"message":"Workspace is not a prebuilt workspace waiting to be claimed."}` + "\n"},
		{"status: state", "PATCH", "/api/v2/workspaceagents/me/app-status", `{"app_slug":"x","state":"asleep"}`, as(token), 400, `{"message":"Failed to parse request.","detail":"Invalid state: asleep"}` + "\n"},
		{"status: length", "PATCH", "/api/v2/workspaceagents/me/app-status", `{"app_slug":"x","state":"idle","message":"` + strings.Repeat("x", 161) + `"}`, as(token), 400, `{"message":"Message is too long.","detail":"Message must be less than 160 characters.","validations":[{"field":"message","detail":"Message must be less than 160 characters."}]}` + "\n"},
		{"status: slug", "PATCH", "/api/v2/workspaceagents/me/app-status", `{"app_slug":"x","state":"idle"}`, as(token), 400, `{"message":"Failed to get workspace app.","detail":"No app found with slug \"x\""}` + "\n"},

		{"rpc: version text", "GET", "/api/v2/workspaceagents/me/rpc?version=two", "", as(token), 400, `{"message":"Unknown or unsupported API version","validations":[{"field":"version","detail":"invalid version string: two"}]}` + "\n"},
		{"rpc: newer", "GET", "/api/v2/workspaceagents/me/rpc?version=2.11", "", as(token), 400, `{"message":"Unknown or unsupported API version","validations":[{"field":"version","detail":"server is at version 2.10, behind requested minor version 2.11"}]}` + "\n"},
		{"rpc: older", "GET", "/api/v2/workspaceagents/me/rpc?version=1.9", "", as(token), 400, `{"message":"Unknown or unsupported API version","validations":[{"field":"version","detail":"version 1.9 is no longer supported"}]}` + "\n"},
		{"rpc: no upgrade", "GET", "/api/v2/workspaceagents/me/rpc", "", as(token), 400, `{"message":"Failed to accept websocket."…`},
		{"coordinate: no version", "GET", agentPath + "/coordinate", "", x.asUser(), 400, `{"message":"Unknown or unsupported API version","validations":[{"field":"version","detail":"version 1.0 is no longer supported"}]}` + "\n"},
		{"coordinate: resume token", "GET", agentPath + "/coordinate?version=2.0&resume_token=a.b.c", "", x.asUser(), 401, `{"message":"Invalid resume token",…`},

		{"ports of an absent agent", "GET", agentPath + "/listening-ports", "", x.asUser(), 400, `{"message":"Agent state is \"connecting\", it must be in the \"connected\" state."}` + "\n"},
		{"containers: label", "GET", agentPath + "/containers?label=a", "", x.asUser(), 400, `{"message":"Invalid label format","detail":"Labels must be in the format key=value"}` + "\n"},
		{"pty: parameters", "GET", agentPath + "/pty?reconnect=x&height=-1&backend_type=tmux", "", x.asUser(), 400, `{"message":"Invalid query parameters.","validations":[{"field":"height",…`},

		{"follow: no key of a WebSocket", "GET", agentPath + "/logs?follow", "", upgrade("Sec-WebSocket-Key", "x"), 400, `{"message":"Failed to accept websocket.","detail":"its Sec-WebSocket-Key header is not 16 bytes in base64"}` + "\n"},
		{"follow: old WebSocket", "GET", agentPath + "/logs?follow", "", upgrade("Sec-WebSocket-Version", "8"), 400, `{"message":"Failed to accept websocket.","detail":"WebSocket version \"8\" is not supported, only 13"}` + "\n"},
		{"follow: page of another origin", "GET", agentPath + "/logs?follow", "", upgrade("Origin", "https://evil.example"), 403, `{"message":"Forbidden.","detail":"WebSockets are not for pages of other origins."}` + "\n"},

		{"task: id", "POST", "/api/v2/workspaceagents/me/tasks/x/log-snapshot?format=agentapi", `{"messages":[]}`, as(token), 400, `{"message":"Invalid task ID format.","detail":"invalid UUID length: 1"}` + "\n"},
		{"task: no format", "POST", task, `{"messages":[]}`, as(token), 400, `{"message":"Invalid query parameters.","validations":[{"field":"format",…`},
		{"task: other format", "POST", task + "?format=xml", `{"messages":[]}`, as(token), 400, `{"message":"Invalid format parameter.",…`},
		{"task: no JSON", "POST", task + "?format=agentapi", `{`, as(token), 400, `{"message":"Failed to decode request payload.","detail":"unexpected EOF"}` + "\n"},
		{"task: too long", "POST", task + "?format=agentapi", `{"messages":["` + strings.Repeat("x", 65<<10) + `"]}`, as(token), 400, `{"message":"Failed to decode request payload.","detail":"http: request body too large"}` + "\n"},
		{"task: no messages", "POST", task + "?format=agentapi", `{}`, as(token), 400, `{"message":"Invalid agentapi payload structure.",…`},
		{"task: null messages", "POST", task + "?format=agentapi", `{"messages":null}`, as(token), 400, `{"message":"Invalid agentapi payload structure.",…`},
		{"task: of nobody", "POST", task + "?format=agentapi", `{"messages":[]}`, as(token), 404, `{"message":"Resource not found or you do not have access to this resource"}` + "\n"},
		{"chats", "POST", "/api/v2/workspaceagents/me/experimental/chat-context/refresh", "", as(token), 200, `{"refreshed":0}` + "\n"},

		{"create: taken", "POST", "/api/v2/berth/agents", `{"name":"Demo"}`, x.asUser(), 409, `{"message":"An agent named \"Demo\" already exists."}` + "\n"},
		{"create: no name", "POST", "/api/v2/berth/agents", `{}`, x.asUser(), 400, `{"message":"Validation failed.","validations":[{"field":"name","detail":"Validation failed for tag \"required\" with value: \"\""}]}` + "\n"},
		{"create: bad name", "POST", "/api/v2/berth/agents", `{"name":"a\nProxyCommand evil"}`, x.asUser(), 400, `{"message":"Validation failed.","validations":[{"field":"name"…`},
		{"create: nobody", "POST", "/api/v2/berth/agents", `{"name":"b"}`, nil, 401, signedOut + `…`},

		{"identity: empty", "POST", "/api/v2/workspaceagents/aws-instance-identity", `{}`, nil, 400, `{"message":"Validation failed.","validations":[{"field":"signature","detail":"Validation failed for tag \"required\" with value: \"\""},{"field":"document",…`},
		{"identity: forged", "POST", "/api/v2/workspaceagents/aws-instance-identity", `{"signature":"` + base64.StdEncoding.EncodeToString(make([]byte, 128)) + `","document":"{\"instanceId\":\"i-0123456789abcdef0\",\"region\":\"us-east-1\"}"}`, nil, 401, `{"message":"Invalid AWS identity."…`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			status, body := x.call(tt.method, tt.path, tt.body, tt.header...)
			if status != tt.status {
				t.Errorf("status %d, want %d", status, tt.status)
			}
			if begin, partial := strings.CutSuffix(tt.want, "…"); partial && !strings.HasPrefix(body, begin) || !partial && body != tt.want {
				t.Errorf("got  %.300s\nwant %s", body, tt.want)
			}
		})
	}
	for _, secret := range []wire.Secret{x.key, token} {
		if strings.Contains(x.log.String(), secret.Reveal()) {
			t.Error("the log holds a secret")
		}
	}
}

// logBuffer is a log that may be read while it is written.
type logBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}
