package conformance

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/google/uuid"
)

// TestProxied is what the server answers by asking the agent: berthd and the second agent.
func TestProxied(t *testing.T) {
	w := stage(t)
	real := w.berthd(t)
	second := w.agent(t, "proxied")
	w.runAgent(t, second)
	away := w.agent(t, "away")
	at := w.url + "/api/v2/workspaceagents/"

	const portsRow = "GET /api/v2/workspaceagents/{id}/listening-ports"
	check(t, portsRow, "filtered by the server", func(t *testing.T) {
		r := request(t, "GET", at+second.id+"/listening-ports", w.key, nil).wants(t, 200, "")
		ports := r.json(t)["ports"].([]any)
		if len(ports) != 1 { // 22 is of the fixed set that is never shown
			t.Fatalf("the ports are %s", r.body)
		}
		if p := ports[0].(map[string]any); p["port"] != 4321.0 || p["process_name"] != "second" || p["network"] != "tcp" {
			t.Errorf("the port is %v", p)
		}
	})
	check(t, portsRow, "of berthd", func(t *testing.T) {
		ports, ok := request(t, "GET", at+real.id+"/listening-ports", w.key, nil).wants(t, 200, "").json(t)["ports"].([]any)
		if !ok {
			t.Fatal("no ports")
		}
		for _, x := range ports {
			p := x.(map[string]any)
			if p["network"] != "tcp" || p["port"].(float64) < 9 || p["port"] == 8080.0 {
				t.Errorf("the port %v/%v is shown", p["network"], p["port"])
			}
		}
	})
	const containersRow = "GET /api/v2/workspaceagents/{id}/containers"
	check(t, containersRow, "an agent without the feature: its 403 passes through", func(t *testing.T) {
		request(t, "GET", at+second.id+"/containers", w.key, nil).wants(t, 403, "Dev Container feature not enabled.")
	})
	check(t, containersRow, "a label that is none", func(t *testing.T) {
		r := request(t, "GET", at+real.id+"/containers?label=novalue", w.key, nil).wants(t, 400, "Invalid label format")
		if d := r.json(t)["detail"]; d != "Labels must be in the format key=value" {
			t.Errorf("the detail is %v", d)
		}
		request(t, "GET", at+real.id+"/containers?label=a=b=c", w.key, nil).wants(t, 400, "Invalid label format")
	})
	check(t, containersRow, "of berthd", func(t *testing.T) {
		v := request(t, "GET", at+real.id+"/containers?label=nobody=has-this", w.key, nil).wants(t, 200, "").json(t)
		if _, ok := v["containers"]; !ok {
			t.Errorf("containers are missing: %v", v)
		}
		if _, ok := v["devcontainers"]; !ok {
			t.Errorf("devcontainers are missing: %v", v)
		}
		if warnings, ok := v["warnings"]; ok && len(warnings.([]any)) == 0 {
			t.Error("empty warnings are there")
		}
	})
	const watchRow = "GET ws /api/v2/workspaceagents/{id}/containers/watch"
	check(t, watchRow, "text messages, the first at once", func(t *testing.T) {
		ws, resp, err := socket(t, at+real.id+"/containers/watch", w.key)
		if err != nil {
			t.Fatal(err, answer(resp))
		}
		if ext := resp.Header.Get("Sec-WebSocket-Extensions"); ext != "" {
			t.Errorf("the server negotiates %q", ext)
		}
		ws.SetReadLimit(4 << 20)
		kind, b, err := message(t, ws)
		if err != nil || kind != websocket.MessageText || !bytes.HasSuffix(b, []byte("\n")) {
			t.Fatalf("%v %v %q", kind, err, b)
		}
		var v map[string]any
		if err := json.Unmarshal(b, &v); err != nil {
			t.Fatal(err)
		}
		if _, ok := v["containers"]; !ok {
			t.Errorf("the message is %s", b)
		}
	})
	const recreateRow, deleteRow = "POST /api/v2/workspaceagents/{id}/containers/devcontainers/{dc}/recreate", "DELETE /api/v2/workspaceagents/{id}/containers/devcontainers/{dc}"
	check(t, recreateRow, "an unknown dev container", func(t *testing.T) {
		request(t, "POST", at+real.id+"/containers/devcontainers/"+uuid.NewString()+"/recreate", w.key, nil).wants(t, 404, "Devcontainer not found.")
	})
	check(t, deleteRow, "an unknown dev container", func(t *testing.T) {
		request(t, "DELETE", at+real.id+"/containers/devcontainers/"+uuid.NewString(), w.key, nil).wants(t, 404, "Devcontainer not found.")
	})
	const ptyRow = "GET ws /api/v2/workspaceagents/{id}/pty"
	for _, c := range []struct {
		row, method, path string
		header            []string
	}{{portsRow, "GET", "/listening-ports", nil}, {containersRow, "GET", "/containers", nil}, {watchRow, "GET", "/containers/watch", upgradeHeaders},
		{recreateRow, "POST", "/containers/devcontainers/" + uuid.NewString() + "/recreate", nil}, {deleteRow, "DELETE", "/containers/devcontainers/" + uuid.NewString(), nil}} {
		check(t, c.row, "an agent that is not connected", func(t *testing.T) {
			request(t, c.method, at+away.id+c.path, w.key, nil, c.header...).wants(t, 400, `Agent state is "`)
		})
		check(t, c.row, "an unknown agent", func(t *testing.T) {
			request(t, c.method, at+uuid.NewString()+c.path, w.key, nil, c.header...).wants(t, 404, "")
		})
		check(t, c.row, "no key", func(t *testing.T) {
			request(t, c.method, at+real.id+c.path, "", nil, c.header...).wants(t, 401, "You are signed out")
		})
	}
	check(t, portsRow, "the state is named", func(t *testing.T) {
		// It has never been connected as an agent; making its token was a link of a moment.
		state := fmt.Sprint(w.info(t, away)["status"])
		request(t, "GET", at+away.id+"/listening-ports", w.key, nil).wants(t, 400, fmt.Sprintf(`Agent state is %q, it must be in the "connected" state.`, state))
	})

	for who, a := range map[string]identity{"berthd": real, "the second agent": second} {
		check(t, ptyRow, "a terminal of "+who, func(t *testing.T) {
			session := uuid.NewString()
			url := at + a.id + "/pty?reconnect=" + session + "&height=30&width=100&command=/bin/sh"
			ws, resp, err := socket(t, url, w.key)
			if err != nil {
				t.Fatal(err, answer(resp))
			}
			ws.SetReadLimit(-1)
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			conn := websocket.NetConn(ctx, ws, websocket.MessageBinary)
			// Objects follow each other; where one message ends means nothing.
			send := func(input string) {
				for _, part := range []string{input[:7], input[7:20], input[20:]} {
					if err := ws.Write(ctx, websocket.MessageBinary, []byte(part)); err != nil {
						t.Fatal(err)
					}
				}
			}
			send(`{"data":"stty size; echo $((6*7))"}{"data":"-typed\r"}`)
			readUntil(t, conn, "30 100")
			readUntil(t, conn, "42-typed")
			send(`{"height":40,"width":120}{"data":"stty size\r"}`)
			readUntil(t, conn, "40 120")
			ws.CloseNow()
			// The same id takes it up again.
			again, resp, err := socket(t, url, w.key)
			if err != nil {
				t.Fatal(err, answer(resp))
			}
			again.SetReadLimit(-1)
			conn = websocket.NetConn(ctx, again, websocket.MessageBinary)
			readUntil(t, conn, "42-typed")
			again.Write(ctx, websocket.MessageBinary, []byte(`{"data":"exit\r"}`))
			for {
				if _, _, err = again.Read(ctx); err != nil {
					break
				}
			}
			if ctx.Err() != nil {
				t.Error("the socket stays open when the shell ends")
			}
		})
	}
	for _, c := range []struct{ name, query, field string }{
		{"no reconnect", "", "reconnect"}, {"a reconnect that is no UUID", "?reconnect=x", "reconnect"},
		{"a height that is no number", "?reconnect=" + uuid.NewString() + "&height=tall", "height"}, {"a width over 65535", "?reconnect=" + uuid.NewString() + "&width=65536", "width"},
	} {
		check(t, ptyRow, c.name, func(t *testing.T) {
			r := request(t, "GET", at+real.id+"/pty"+c.query, w.key, nil, upgradeHeaders...).wants(t, 400, "Invalid query parameters.")
			if r.validation(t, c.field) == "" {
				t.Errorf("no validation of %s: %s", c.field, r.body)
			}
		})
	}
	check(t, ptyRow, "an unknown agent", func(t *testing.T) {
		request(t, "GET", at+uuid.NewString()+"/pty?reconnect="+uuid.NewString(), w.key, nil, upgradeHeaders...).wants(t, 404, "")
	})
	check(t, ptyRow, "no key", func(t *testing.T) {
		request(t, "GET", at+real.id+"/pty?reconnect="+uuid.NewString(), "", nil, upgradeHeaders...).wants(t, 401, "")
	})
}

// TestInstanceIdentity is the shape of the three exchanges; the proofs themselves are not of these pages.
func TestInstanceIdentity(t *testing.T) {
	w := stage(t)
	for _, c := range []struct {
		cloud, bad, message, missing string
		field                        []string
	}{
		{"aws", `{"signature":"eA==","document":"{\"instanceId\":\"i-1\"}"}`, "Invalid AWS identity.", `{"signature":"eA=="}`, []string{"document"}},
		{"azure", `{"signature":"eA==","encoding":"pkcs7"}`, "Invalid Azure identity.", `{}`, []string{"signature", "encoding"}},
		{"google", `{"json_web_token":"a.b.c"}`, "Invalid GCP identity.", `{}`, []string{"json_web_token"}},
	} {
		row := "POST /api/v2/workspaceagents/" + c.cloud + "-instance-identity"
		at := w.url + "/api/v2/workspaceagents/" + c.cloud + "-instance-identity"
		check(t, row, "a proof that does not hold", func(t *testing.T) {
			request(t, "POST", at, "", c.bad).wants(t, 401, c.message)
		})
		check(t, row, "a required field is missing", func(t *testing.T) {
			r := request(t, "POST", at, "", c.missing).wants(t, 400, "Validation failed.")
			for _, field := range c.field {
				if got := r.validation(t, field); got != `Validation failed for tag "required" with value: ""` {
					t.Errorf("the validation of %s is %q: %s", field, got, r.body)
				}
			}
		})
		badBodies(t, row, "POST", at, "")
	}
}

func TestInfrastructure(t *testing.T) {
	w := stage(t)
	check(t, "GET /derp", "no upgrade", func(t *testing.T) {
		r := request(t, "GET", w.url+"/derp", "", nil).wants(t, 426, "")
		if !strings.Contains(string(r.body), "DERP requires connection upgrade") {
			t.Errorf("the body is %q", r.body)
		}
	})
	check(t, "GET /derp", "greeting, packets between two, peer gone", func(t *testing.T) {
		host := strings.TrimPrefix(w.url, "http://")
		pa, ka := newKey()
		pb, kb := newKey()
		a, err := dialRelay(host, pa, ka)
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		b, err := dialRelay(host, pb, kb)
		if err != nil {
			t.Fatal(err)
		}
		a.SetDeadline(time.Now().Add(patience))
		b.SetDeadline(time.Now().Add(patience))
		await := func(c *relayConn, want byte) []byte {
			t.Helper()
			for {
				kind, payload, err := c.read()
				if err != nil {
					t.Fatalf("waiting for frame %#x: %v", want, err)
				}
				if kind == want {
					return payload
				}
			}
		}
		a.write(derpSendPacket, kb[:], []byte("over the relay"))
		if p := await(b, derpRecvPacket); !bytes.Equal(p, append(ka[:], "over the relay"...)) {
			t.Errorf("the packet is %q", p)
		}
		a.write(derpPing, []byte("12345678"))
		if p := await(a, derpPong); string(p) != "12345678" {
			t.Errorf("the pong is %q", p)
		}
		a.write(0x7e, []byte("a type to come")) // skipped
		b.write(derpSendPacket, ka[:], bytes.Repeat([]byte("x"), 64<<10))
		if p := await(a, derpRecvPacket); len(p) != 32+64<<10 {
			t.Errorf("%d bytes", len(p))
		}
		b.Close()
		if p := await(a, derpPeerGone); !bytes.Equal(p[:32], kb[:]) || len(p) < 33 || p[32] != 0 {
			t.Errorf("peer gone is %x", p)
		}
	})
	check(t, "GET /derp", "WebSocket with the subprotocol derp", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		ws, resp, err := websocket.Dial(ctx, w.url+"/derp", &websocket.DialOptions{Subprotocols: []string{"derp"}, HTTPHeader: http.Header{"Origin": {"https://elsewhere.example"}}})
		if err != nil {
			t.Fatal(err, answer(resp))
		}
		defer ws.CloseNow()
		kind, b, err := ws.Read(ctx)
		if err != nil || kind != websocket.MessageBinary || len(b) < 5 || b[0] != derpServerKey {
			t.Errorf("the greeting is %v %x %v", kind, b, err)
		}
	})
	check(t, "GET /derp", "fast start has no HTTP answer", func(t *testing.T) {
		conn := rawConn(t, w)
		fmt.Fprintf(conn, "GET /derp HTTP/1.1\r\nHost: x\r\nUpgrade: DERP\r\nConnection: Upgrade\r\nDerp-Fast-Start: 1\r\n\r\n")
		b := make([]byte, 13)
		if _, err := conn.Read(b); err != nil || b[0] != derpServerKey || !bytes.Equal(b[5:], []byte("DERP\xf0\x9f\x94\x91")) {
			t.Errorf("the first bytes are %x, %v", b, err)
		}
	})

	const binRow = "GET /bin/coder-{os}-{arch}"
	// The server holds no agent programs, and says so.
	const initRow = "GET /api/v2/init-script/{os}/{arch}"
	for _, c := range []struct{ row, path string }{{binRow, "/bin/coder-linux-amd64"}, {binRow, "/bin/coder-plan10-z80"}, {initRow, "/api/v2/init-script/linux/amd64"}} {
		check(t, c.row, "left out: "+c.path, func(t *testing.T) {
			r := request(t, "GET", w.url+c.path, "", nil).wants(t, 404, "")
			if message, _ := r.json(t)["message"].(string); message == "" || message == "Route not found." {
				t.Errorf("the message is %q", message)
			}
		})
	}
	check(t, initRow, "a system that there is not", func(t *testing.T) {
		request(t, "GET", w.url+"/api/v2/init-script/plan10/z80", "", nil).wants(t, 400, "Unknown os/arch: ")
	})
}

func TestApplications(t *testing.T) {
	w := stage(t)
	a := w.agent(t, "full")
	check(t, "GET /api/v2/applications/host", "no wildcard", func(t *testing.T) {
		if v := request(t, "GET", w.url+"/api/v2/applications/host", w.key, nil).wants(t, 200, "").json(t); v["host"] != "" {
			t.Errorf("the host is %v", v)
		}
	})
	check(t, "GET /api/v2/applications/host", "no key", func(t *testing.T) {
		request(t, "GET", w.url+"/api/v2/applications/host", "", nil).wants(t, 401, "You are signed out")
	})
	check(t, "GET /api/v2/applications/auth-redirect", "nowhere to go", func(t *testing.T) {
		r := request(t, "GET", w.url+"/api/v2/applications/auth-redirect?redirect_uri=https://elsewhere.example/", w.key, nil)
		if r.status < 400 || r.status > 499 {
			t.Errorf("%d %s: a key must not leave for a foreign host", r.status, r.header.Get("Location"))
		}
	})
	const signedRow = "POST /api/v2/applications/reconnecting-pty-signed-token"
	check(t, signedRow, "the token opens a terminal in place of a key", func(t *testing.T) {
		b := w.agent(t, "signed")
		w.runAgent(t, b)
		at := w.url + "/api/v2/workspaceagents/" + b.id + "/pty"
		v := request(t, "POST", w.url+"/api/v2/applications/reconnecting-pty-signed-token", w.key, map[string]any{"url": at, "agentID": b.id}).wants(t, 200, "").json(t)
		query := "?reconnect=" + uuid.NewString() + "&command=" + url.QueryEscape("echo by token") + "&coder_signed_app_token_23db1dde="
		ws, resp, err := socket(t, at+query+url.QueryEscape(fmt.Sprint(v["signed_token"])), "")
		if err != nil {
			t.Fatal(err, answer(resp))
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		readUntil(t, websocket.NetConn(ctx, ws, websocket.MessageBinary), "by token")
		for who, token := range map[string]string{"a damaged token": fmt.Sprint(v["signed_token"]) + "x", "no token": ""} {
			if r := request(t, "GET", at+query+url.QueryEscape(token), "", nil, upgradeHeaders...); r.status != 401 {
				t.Errorf("%s: %d %s", who, r.status, r.body)
			}
		}
		other := w.url + "/api/v2/workspaceagents/" + a.id + "/pty" + query + url.QueryEscape(fmt.Sprint(v["signed_token"]))
		if r := request(t, "GET", other, "", nil, upgradeHeaders...); r.status < 400 || r.status > 499 {
			t.Errorf("another agent with the token: %d", r.status)
		}
	})
	check(t, signedRow, "no key", func(t *testing.T) {
		request(t, "POST", w.url+"/api/v2/applications/reconnecting-pty-signed-token", "", "{}").wants(t, 401, "You are signed out")
	})
	me := w.url + "/api/v2/workspaceagents/me/"
	const chatRow, taskRow = "POST /api/v2/workspaceagents/me/experimental/chat-context/refresh", "POST /api/v2/workspaceagents/me/tasks/{task}/log-snapshot"
	check(t, chatRow, "there are no chats", func(t *testing.T) {
		if v := request(t, "POST", me+"experimental/chat-context/refresh", a.token, "{}").wants(t, 200, "").json(t); v["refreshed"] != 0.0 {
			t.Errorf("the answer is %v", v)
		}
	})
	check(t, chatRow, "no token", func(t *testing.T) {
		request(t, "POST", me+"experimental/chat-context/refresh", "", "{}").wants(t, 401, `Cookie "coder_session_token" must be provided.`)
	})
	task := uuid.NewString()
	for _, c := range []struct {
		name, path, body string
		status           int
		message          string
	}{
		{"a task that is not this workspace's", task + "/log-snapshot?format=agentapi", `{"messages":[]}`, 404, ""},
		{"a task that is no UUID", "x/log-snapshot?format=agentapi", `{"messages":[]}`, 400, "Invalid task ID format."},
		{"another format", task + "/log-snapshot?format=xml", `{"messages":[]}`, 400, "Invalid format parameter."},
	} {
		check(t, taskRow, c.name, func(t *testing.T) {
			request(t, "POST", me+"tasks/"+c.path, a.token, c.body).wants(t, c.status, c.message)
		})
	}
}

// TestCommandLine is what a stock command line asks for on its way to an SSH session.
func TestCommandLine(t *testing.T) {
	w := stage(t)
	a := w.agent(t, "full")
	const row = "what the CLI calls"
	var me map[string]any
	check(t, row, "users/me", func(t *testing.T) {
		me = request(t, "GET", w.url+"/api/v2/users/me", w.key, nil).wants(t, 200, "").json(t)
		if !uuidPattern.MatchString(fmt.Sprint(me["id"])) || me["username"] == "" {
			t.Errorf("the user is %v", me)
		}
	})
	if me == nil {
		return
	}
	var workspace map[string]any
	for _, owner := range []string{"me", fmt.Sprint(me["username"])} {
		check(t, row, "users/{owner}/workspace/{name} of "+owner, func(t *testing.T) {
			workspace = request(t, "GET", w.url+"/api/v2/users/"+owner+"/workspace/full", w.key, nil).wants(t, 200, "").json(t)
			build, _ := workspace["latest_build"].(map[string]any)
			if build == nil || build["transition"] != "start" || build["status"] != "running" || build["job"].(map[string]any)["status"] != "succeeded" {
				t.Fatalf("the build is %v", build)
			}
			found := false
			for _, r := range build["resources"].([]any) {
				agents, _ := r.(map[string]any)["agents"].([]any)
				for _, x := range agents {
					found = found || x.(map[string]any)["id"] == a.id
				}
			}
			if !found {
				t.Errorf("the agent is not in the build: %v", build["resources"])
			}
		})
	}
	if workspace == nil {
		return
	}
	for _, path := range []string{"templateversions/" + fmt.Sprint(workspace["latest_build"].(map[string]any)["template_version_id"]), "appearance", "workspaces/" + fmt.Sprint(workspace["id"])} {
		check(t, row, strings.Split(path, "/")[0], func(t *testing.T) {
			request(t, "GET", w.url+"/api/v2/"+path, w.key, nil).wants(t, 200, "").json(t)
		})
	}
	for _, path := range []string{"users/first", "users/me/gitsshkey", "workspaces"} {
		check(t, row, path, func(t *testing.T) {
			r := request(t, "GET", w.url+"/api/v2/"+path, w.key, nil).wants(t, 200, "")
			if bytes.Contains(r.body, []byte("PRIVATE KEY")) {
				t.Error("a private key leaves to a person")
			}
			if path == "workspaces" && !bytes.Contains(r.body, []byte(fmt.Sprint(workspace["id"]))) {
				t.Errorf("the workspace is not in the list: %.300s", r.body)
			}
		})
	}
	check(t, row, "workspaces/{id}/watch-ws", func(t *testing.T) {
		ws, resp, err := socket(t, w.url+"/api/v2/workspaces/"+fmt.Sprint(workspace["id"])+"/watch-ws", w.key)
		if err != nil {
			t.Fatal(err, answer(resp))
		}
		if kind, b, err := message(t, ws); err != nil || kind != websocket.MessageText || !bytes.Contains(b, []byte(`"type"`)) {
			t.Errorf("%v %v %.200s", kind, err, b)
		}
	})
	check(t, row, "workspaces/{id}/usage", func(t *testing.T) {
		for _, app := range []string{"ssh", "vscode", "jetbrains", "reconnecting-pty"} {
			request(t, "POST", w.url+"/api/v2/workspaces/"+fmt.Sprint(workspace["id"])+"/usage", w.key, map[string]any{"agent_id": a.id, "app_name": app}).wants(t, 204, "")
		}
	})
	check(t, row, "workspaces/{id}/watch", func(t *testing.T) {
		next, resp := events(t, w.url+"/api/v2/workspaces/"+fmt.Sprint(workspace["id"])+"/watch", w.key)
		if resp.StatusCode != 200 {
			t.Fatal(answer(resp))
		}
		for {
			e, err := next()
			if err != nil {
				t.Fatal(err)
			}
			if e.kind == "data" {
				return
			}
		}
	})
	check(t, row, "no key", func(t *testing.T) {
		request(t, "GET", w.url+"/api/v2/users/me", "", nil).wants(t, 401, "You are signed out")
	})
}
