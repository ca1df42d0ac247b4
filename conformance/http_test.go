package conformance

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/google/uuid"
	"golang.org/x/crypto/ssh"
)

// socket opens a WebSocket of messages.
func socket(t testing.TB, url, token string) (*websocket.Conn, *http.Response, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	ws, resp, err := websocket.Dial(ctx, url, &websocket.DialOptions{HTTPHeader: http.Header{"Coder-Session-Token": {token}}})
	if err == nil {
		t.Cleanup(func() { ws.CloseNow() })
	}
	return ws, resp, err
}

// message reads one message of a socket.
func message(t testing.TB, ws *websocket.Conn) (websocket.MessageType, []byte, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return ws.Read(ctx)
}

func TestConventions(t *testing.T) {
	w := stage(t)
	const row = "GET /api/v2/buildinfo"
	check(t, row, "fields and headers", func(t *testing.T) {
		r := request(t, "GET", w.url+"/api/v2/buildinfo", "", nil).wants(t, 200, "")
		v := r.json(t)
		if !semver.MatchString(fmt.Sprint(v["version"])) {
			t.Errorf("the version is %v", v["version"])
		}
		if v["agent_api_version"] != "1.0" {
			t.Errorf("agent_api_version is %v, not the constant 1.0", v["agent_api_version"])
		}
		for _, key := range []string{"external_url", "dashboard_url", "telemetry", "workspace_proxy", "provisioner_api_version", "upgrade_message", "deployment_id"} {
			if _, ok := v[key]; !ok {
				t.Errorf("%s is missing", key)
			}
		}
		if _, ok := v["webpush_public_key"]; ok && v["webpush_public_key"] == "" {
			t.Error("an empty webpush_public_key is there")
		}
		if got := r.header.Get("X-Coder-Build-Version"); got != v["version"] {
			t.Errorf("X-Coder-Build-Version is %q", got)
		}
		if r.header.Get("X-Content-Type-Options") != "nosniff" || r.header.Get("Content-Type") != "application/json; charset=utf-8" || !strings.HasSuffix(string(r.body), "}\n") {
			t.Errorf("headers %v, body %q", r.header, r.body)
		}
	})
	check(t, "removed endpoints", "an unknown route", func(t *testing.T) {
		r := request(t, "GET", w.url+"/api/v2/no/such/thing", w.key, nil).wants(t, 404, "Route not found.")
		if r.header.Get("X-Coder-Build-Version") == "" {
			t.Error("no X-Coder-Build-Version on a 404")
		}
	})
	a := w.agent(t, "removed")
	for _, name := range strings.Fields("manifest metadata report-stats report-lifecycle startup startup-logs app-health coordinate version") {
		check(t, "removed endpoints", "me/"+name, func(t *testing.T) {
			for _, method := range []string{"GET", "POST"} {
				r := request(t, method, w.url+"/api/v2/workspaceagents/me/"+name, a.token, "{}")
				if r.status != 404 {
					t.Errorf("%s: %d %s", method, r.status, r.body)
				}
			}
		})
	}
	for _, path := range []string{"/derp/latency-check", "/latency-check", "/healthz"} {
		check(t, "GET "+path, "200", func(t *testing.T) {
			r := request(t, "GET", w.url+path, "", nil).wants(t, 200, "")
			want := "OK"
			if path == "/derp/latency-check" {
				want = ""
			}
			if string(r.body) != want {
				t.Errorf("the body is %q", r.body)
			}
			if path == "/latency-check" && (r.header.Get("Access-Control-Allow-Origin") != "*" || r.header.Get("Timing-Allow-Origin") != "*") {
				t.Errorf("the headers are %v", r.header)
			}
		})
	}
}

func TestAgentRead(t *testing.T) {
	w := stage(t)
	a := w.agent(t, "full")
	at := w.url + "/api/v2/workspaceagents/"
	const row = "GET /api/v2/workspaceagents/{id}"
	check(t, row, "all keys", func(t *testing.T) {
		v := w.info(t, a)
		for _, key := range strings.Fields(`id resource_id parent_id created_at updated_at status lifecycle_state name architecture operating_system environment_variables logs_length
			logs_overflowed directory version api_version apps connection_timeout_seconds troubleshooting_url subsystems health display_apps log_sources scripts startup_script_behavior`) {
			if _, ok := v[key]; !ok {
				t.Errorf("%s is missing", key)
			}
		}
		if v["parent_id"] != nil || v["name"] != "full" || v["directory"] != "~/src" || v["startup_script_behavior"] != "blocking" {
			t.Errorf("parent %v, name %v, directory %v, behavior %v", v["parent_id"], v["name"], v["directory"], v["startup_script_behavior"])
		}
		if env := v["environment_variables"].(map[string]any); env["EDITOR"] != "vim" {
			t.Errorf("the environment is %v", env)
		}
		for _, x := range v["scripts"].([]any) {
			sc := x.(map[string]any)
			for _, key := range strings.Fields("id log_source_id log_path script cron run_on_start run_on_stop start_blocks_login timeout display_name") {
				if _, ok := sc[key]; !ok {
					t.Errorf("a script lacks %s", key)
				}
			}
			if sc["display_name"] == "Install" && sc["timeout"] != float64(10*time.Minute) {
				t.Errorf("the timeout is %v, not in nanoseconds", sc["timeout"])
			}
		}
		for _, x := range v["apps"].([]any) {
			app := x.(map[string]any)
			for _, key := range strings.Fields("id external slug subdomain sharing_level healthcheck health hidden open_in statuses") {
				if _, ok := app[key]; !ok {
					t.Errorf("an app lacks %s", key)
				}
			}
			if app["slug"] == "web" {
				if h := app["healthcheck"].(map[string]any); h["interval"] != 10.0 || h["threshold"] != 3.0 || h["url"] != "http://localhost:8080/healthz" {
					t.Errorf("the health check is %v, its interval is in seconds", h)
				}
			}
		}
	})
	fresh := w.agent(t, "fresh-read")
	check(t, row, "never connected by an agent's role", func(t *testing.T) {
		v := w.info(t, fresh)
		health := v["health"].(map[string]any)
		if health["healthy"] == true && health["reason"] != nil || health["healthy"] == false && health["reason"] == nil {
			t.Errorf("the health is %v", health)
		}
	})
	check(t, row, "latency by region name", func(t *testing.T) {
		c := w.link(t, fresh, "2.10").stream("Coordinate", nil)
		n := agentNode(fresh)
		n["derp_latency"] = map[string]float64{"999-v4": 0.0125, "1234-v6": 0.5}
		c.say(m{"update_self": m{"node": n}})
		eventually(t, "the latency is shown", func() bool {
			l, _ := w.info(t, fresh)["latency"].(map[string]any)
			one, _ := l["Coder Embedded Relay"].(map[string]any)
			if one == nil {
				for name, x := range l { // the relay may have a name of its own
					if x.(map[string]any)["preferred"] == true {
						one = x.(map[string]any)
						t.Logf("the relay is called %q", name)
					}
				}
			}
			other, _ := l["Unnamed 1234"].(map[string]any)
			return one != nil && one["preferred"] == true && one["latency_ms"] == 12.5 && other != nil && other["latency_ms"] == 500.0
		})
	})
	for name, c := range map[string]struct {
		path, token string
		status      int
		message     string
	}{
		"an unknown id":    {uuid.NewString(), w.key, 404, "Agent doesn't exist with that id, or you do not have access to it."},
		"not a UUID":       {"abc", w.key, 400, `Invalid UUID "abc".`},
		"no key":           {a.id, "", 401, "You are signed out or your session has expired. Please sign in again to continue."},
		"a malformed key":  {a.id, "x", 401, "You are signed out or your session has expired. Please sign in again to continue."},
		"an agent's token": {a.id, a.token, 401, "You are signed out or your session has expired. Please sign in again to continue."},
	} {
		check(t, row, name, func(t *testing.T) {
			r := request(t, "GET", at+c.path, c.token, nil).wants(t, c.status, c.message)
			if d, _ := r.json(t)["detail"].(string); c.status != 404 && d == "" {
				t.Error("no detail names the cause")
			}
		})
	}
	for _, c := range []struct{ row, path string }{{"GET /api/v2/workspaceagents/{id}/connection", a.id + "/connection"}, {"GET /api/v2/workspaceagents/connection", "connection"}} {
		check(t, c.row, "the DERP map has Go's names", func(t *testing.T) {
			v := request(t, "GET", at+c.path, w.key, nil).wants(t, 200, "").json(t)
			for _, key := range []string{"derp_map", "derp_force_websockets", "disable_direct_connections"} {
				if _, ok := v[key]; !ok {
					t.Errorf("%s is missing", key)
				}
			}
			if suffix, ok := v["hostname_suffix"]; ok && suffix == "" {
				t.Error("an empty hostname_suffix is there")
			}
			checkDERPMap(t, w, v["derp_map"])
		})
		check(t, c.row, "no key", func(t *testing.T) {
			request(t, "GET", at+c.path, "", nil).wants(t, 401, "You are signed out or your session has expired.")
		})
	}
	check(t, "GET /api/v2/workspaceagents/{id}/connection", "an unknown id", func(t *testing.T) {
		request(t, "GET", at+uuid.NewString()+"/connection", w.key, nil).wants(t, 404, "")
	})
	check(t, "GET ws /api/v2/derp-map", "a binary message with the map, without a key", func(t *testing.T) {
		ws, resp, err := socket(t, w.url+"/api/v2/derp-map", "")
		if err != nil {
			t.Fatal(err, answer(resp))
		}
		kind, b, err := message(t, ws)
		if err != nil || kind != websocket.MessageBinary {
			t.Fatalf("%v %v", kind, err)
		}
		var v any
		if err := json.Unmarshal(b, &v); err != nil {
			t.Fatal(err)
		}
		checkDERPMap(t, w, v)
	})
	check(t, "GET ws /api/v2/derp-map", "no upgrade", func(t *testing.T) {
		if r := request(t, "GET", w.url+"/api/v2/derp-map", "", nil); r.status < 400 || r.status > 499 {
			t.Errorf("%d %s", r.status, r.body)
		}
	})
}

// checkDERPMap checks the JSON form of a DERP map, as it is told to clients.
func checkDERPMap(t *testing.T, w *world, v any) {
	t.Helper()
	regions, _ := v.(map[string]any)["Regions"].(map[string]any)
	relay, _ := regions["999"].(map[string]any)
	if relay == nil {
		t.Fatalf("the map has no region 999: %v", v)
	}
	if relay["EmbeddedRelay"] != true || relay["RegionID"] != 999.0 || relay["RegionCode"] == "" || relay["RegionName"] == "" {
		t.Errorf("the relay is %v", relay)
	}
	access, _ := url.Parse(w.url)
	for _, x := range relay["Nodes"].([]any) {
		n := x.(map[string]any)
		if n["STUNOnly"] == true {
			continue
		}
		if n["RegionID"] != 999.0 || n["HostName"] != access.Hostname() || fmt.Sprint(n["DERPPort"]) != access.Port() || n["ForceHTTP"] != true || n["Name"] == "" {
			t.Errorf("the relay's node is %v", n)
		}
	}
}

func TestCoordinateSocket(t *testing.T) {
	const row = "GET ws /api/v2/workspaceagents/{id}/coordinate"
	w := stage(t)
	a := w.agent(t, "coord-socket")
	at := w.url + "/api/v2/workspaceagents/" + a.id + "/coordinate"
	for _, version := range []string{"2.0", "2.3", "2.10"} {
		check(t, row, "version "+version, func(t *testing.T) {
			s, resp, err := dial(t, at+"?version="+version, http.Header{"Coder-Session-Token": {w.key}})
			if err != nil {
				t.Fatal(err, answer(resp))
			}
			s.must("RefreshResumeToken", m{})
		})
	}
	for _, c := range []struct{ name, query, detail string }{
		{"no version means 1.0", "", "version 1.0 is no longer supported"},
		{"a version to come", "?version=2.11", "server is at version 2.10, behind requested minor version 2.11"},
		{"not a version", "?version=two", "invalid version string: two"},
	} {
		check(t, row, c.name, func(t *testing.T) {
			r := request(t, "GET", at+c.query, w.key, nil, upgradeHeaders...).wants(t, 400, "Unknown or unsupported API version")
			if got := r.validation(t, "version"); got != c.detail {
				t.Errorf("the detail is %q", got)
			}
		})
	}
	check(t, row, "a bad resume token", func(t *testing.T) {
		r := request(t, "GET", at+"?version=2.0&resume_token="+badResume(t, w.coordinate(t, a)), w.key, nil, upgradeHeaders...).wants(t, 401, "Invalid resume token")
		if got := r.validation(t, "resume_token"); got != "Invalid resume token" {
			t.Errorf("the detail is %q", got)
		}
	})
	check(t, row, "an unknown agent", func(t *testing.T) {
		request(t, "GET", w.url+"/api/v2/workspaceagents/"+uuid.NewString()+"/coordinate?version=2.0", w.key, nil, upgradeHeaders...).wants(t, 404, "")
	})
	check(t, row, "no key", func(t *testing.T) {
		request(t, "GET", at+"?version=2.0", "", nil, upgradeHeaders...).wants(t, 401, "You are signed out")
	})
	check(t, row, "no upgrade", func(t *testing.T) {
		request(t, "GET", at+"?version=2.0", w.key, nil).wants(t, 400, "Failed to accept websocket.")
	})
	for _, by := range []http.Header{{"Cookie": {"coder_session_token=" + w.key}}, {"Authorization": {"Bearer " + w.key}}} {
		check(t, row, fmt.Sprintf("a key by %v", sortedKeys(by)), func(t *testing.T) {
			if _, resp, err := dial(t, at+"?version=2.0", by); err != nil {
				t.Fatal(err, answer(resp))
			}
		})
	}
}

func sortedKeys(h http.Header) []string {
	var all []string
	for k := range h {
		all = append(all, k)
	}
	return all
}

func TestAppStatus(t *testing.T) {
	const row = "PATCH /api/v2/workspaceagents/me/app-status"
	w := stage(t)
	a := w.agent(t, "full")
	at := w.url + "/api/v2/workspaceagents/me/app-status"
	patch := func(t *testing.T, body any) reply { return request(t, "PATCH", at, a.token, body) }
	status := func(slug, state, message, uri string) map[string]any {
		return map[string]any{"app_slug": slug, "state": state, "message": message, "uri": uri}
	}
	for _, state := range []string{"working", "idle", "complete", "failure"} {
		check(t, row, state, func(t *testing.T) {
			r := patch(t, status("assistant", state, "doing "+state, "https://x")).wants(t, 200, "")
			if string(r.body) != "null\n" {
				t.Errorf("the body is %q", r.body)
			}
			w.wantStatus(t, a, state, "doing "+state, "https://x")
		})
	}
	check(t, row, "the message is cleaned", func(t *testing.T) {
		patch(t, status("assistant", "working", "  <b>bold</b>\t and \x1b[31mred\x1b[0m \n text ", "")).wants(t, 200, "")
		w.wantStatus(t, a, "working", "bold and red text", "")
	})
	check(t, row, "an unknown state", func(t *testing.T) {
		r := patch(t, status("nobody", "dancing", strings.Repeat("x", 200), "")).wants(t, 400, "Failed to parse request.")
		if d := r.json(t)["detail"]; d != "Invalid state: dancing" {
			t.Errorf("the detail is %v", d)
		}
	})
	check(t, row, "161 bytes", func(t *testing.T) {
		r := patch(t, status("nobody", "working", strings.Repeat("x", 161), "")).wants(t, 400, "Message is too long.")
		if d := r.json(t)["detail"]; d != "Message must be less than 160 characters." || r.validation(t, "message") != d {
			t.Errorf("the detail is %v, the validation %q", d, r.validation(t, "message"))
		}
	})
	check(t, row, "160 bytes", func(t *testing.T) {
		patch(t, status("assistant", "working", strings.Repeat("x", 160), "")).wants(t, 200, "")
	})
	check(t, row, "an unknown slug", func(t *testing.T) {
		r := patch(t, status("nobody", "working", "x", "")).wants(t, 400, "Failed to get workspace app.")
		if d := r.json(t)["detail"]; d != `No app found with slug "nobody"` {
			t.Errorf("the detail is %v", d)
		}
	})
	check(t, row, "deprecated and unknown keys", func(t *testing.T) {
		patch(t, `{"app_slug":"assistant","state":"idle","message":"m","uri":"","icon":"/x.png","needs_user_attention":true,"from":"the future"}`).wants(t, 200, "")
	})
	badBodies(t, row, "PATCH", at, a.token)
}

// badBodies is what every endpoint with a JSON body has to stand.
func badBodies(t *testing.T, row, method, at, token string) {
	check(t, row, "not JSON", func(t *testing.T) {
		r := request(t, method, at, token, "{").wants(t, 400, "Request body must be valid JSON.")
		if r.json(t)["detail"] == nil {
			t.Error("no detail")
		}
	})
	check(t, row, "another type", func(t *testing.T) {
		if r := request(t, method, at, token, `["list"]`); r.status != 400 {
			t.Errorf("%d %s", r.status, r.body)
		}
	})
	check(t, row, "a body without end", func(t *testing.T) {
		r := request(t, method, at, token, `{"x":"`+strings.Repeat("y", 12<<20)+`"}`)
		if r.status < 400 || r.status > 499 {
			t.Errorf("%d %.200s", r.status, r.body)
		}
	})
	if strings.Contains(at, "/me/") {
		for _, c := range []struct{ token, message string }{{"", `Cookie "coder_session_token" must be provided.`}, {"nonsense", "Workspace agent token invalid."}, {uuid.NewString(), "Workspace agent not authorized."}} {
			check(t, row, fmt.Sprintf("the token %.8q", c.token), func(t *testing.T) {
				request(t, method, at, c.token, "{}").wants(t, 401, c.message)
			})
		}
	}
}

func TestLogsHTTP(t *testing.T) {
	w := stage(t)
	a := w.agent(t, "log-http")
	me := w.url + "/api/v2/workspaceagents/me/"
	const sourceRow, logsRow, readRow = "POST /api/v2/workspaceagents/me/log-source", "PATCH /api/v2/workspaceagents/me/logs", "GET /api/v2/workspaceagents/{id}/logs"
	source := uuid.NewString()
	check(t, sourceRow, "201", func(t *testing.T) {
		v := request(t, "POST", me+"log-source", a.token, map[string]any{"id": source, "display_name": "Mine", "icon": "/i.png"}).wants(t, 201, "").json(t)
		if v["id"] != source || v["workspace_agent_id"] != a.id || v["display_name"] != "Mine" || v["icon"] != "/i.png" || v["created_at"] == nil {
			t.Errorf("the answer is %v", v)
		}
	})
	check(t, sourceRow, "again: 201 with the request's values, and nothing changes", func(t *testing.T) {
		v := request(t, "POST", me+"log-source", a.token, map[string]any{"id": source, "display_name": "Other", "icon": ""}).wants(t, 201, "").json(t)
		if v["display_name"] != "Other" {
			t.Errorf("the answer is %v", v)
		}
		for _, x := range w.info(t, a)["log_sources"].([]any) {
			if src := x.(map[string]any); src["id"] == source && src["display_name"] != "Mine" {
				t.Errorf("the source is %v now", src)
			}
		}
	})
	check(t, sourceRow, "the same id at another agent", func(t *testing.T) {
		b := w.agent(t, "log-http-two")
		request(t, "POST", me+"log-source", b.token, map[string]any{"id": source, "display_name": "Theirs"}).wants(t, 201, "")
	})
	check(t, sourceRow, "an id that is no UUID", func(t *testing.T) {
		request(t, "POST", me+"log-source", a.token, `{"id":"x"}`).wants(t, 400, "Request body must be valid JSON.")
	})
	badBodies(t, sourceRow, "POST", me+"log-source", a.token)

	entry := func(output, level string) map[string]any {
		return map[string]any{"created_at": "2001-02-03T04:05:06Z", "output": output, "level": level}
	}
	logs := func(source string, entries ...map[string]any) map[string]any {
		return map[string]any{"log_source_id": source, "logs": entries}
	}
	check(t, logsRow, "stored in order, with the server's time", func(t *testing.T) {
		r := request(t, "PATCH", me+"logs", a.token, logs(source, entry("one", "trace"), entry("two", ""), entry("three", "error"))).wants(t, 200, "")
		if string(r.body) != "null\n" {
			t.Errorf("the body is %q", r.body)
		}
		var got []string
		for _, l := range w.logs(t, a, "") {
			got = append(got, fmt.Sprint(l["level"], " ", l["output"]))
			if at, err := time.Parse(time.RFC3339Nano, l["created_at"].(string)); err != nil || time.Since(at) > time.Hour {
				t.Errorf("created_at is %v", l["created_at"])
			}
		}
		if fmt.Sprint(got) != "[trace one info two error three]" {
			t.Errorf("the log is %q", got)
		}
	})
	check(t, logsRow, "no entries", func(t *testing.T) {
		request(t, "PATCH", me+"logs", a.token, logs(source)).wants(t, 400, "No logs provided.")
	})
	check(t, logsRow, "no source is External", func(t *testing.T) {
		request(t, "PATCH", me+"logs", a.token, `{"logs":[{"output":"from outside","level":"info"}]}`).wants(t, 200, "")
		all := w.logs(t, a, "")
		if got := all[len(all)-1]["source_id"]; got != "3b579bf4-1ed8-4b99-87a8-e9a1e3410410" {
			t.Errorf("the source is %v", got)
		}
	})
	check(t, logsRow, "an unknown source is taken", func(t *testing.T) {
		request(t, "PATCH", me+"logs", a.token, logs(uuid.NewString(), entry("lost", "info"))).wants(t, 200, "")
	})
	check(t, logsRow, "an unknown level", func(t *testing.T) {
		r := request(t, "PATCH", me+"logs", a.token, logs(source, entry("x", "shout"))).wants(t, 400, "Invalid log level provided.")
		if d := r.json(t)["detail"]; d != `invalid log level: "shout"` {
			t.Errorf("the detail is %v", d)
		}
	})
	check(t, logsRow, "what is no text is marked", func(t *testing.T) {
		body := "{\"log_source_id\":\"" + source + "\",\"logs\":[{\"output\":\"a\\u0000b\",\"level\":\"info\"}]}"
		request(t, "PATCH", me+"logs", a.token, body).wants(t, 200, "")
		all := w.logs(t, a, "")
		if got := all[len(all)-1]["output"]; got != "a❌b" {
			t.Errorf("the output is %q", got)
		}
	})
	badBodies(t, logsRow, "PATCH", me+"logs", a.token)

	for _, row := range []string{readRow, "GET /api/v2/workspaceagents/{id}/startup-logs"} {
		at := w.url + "/api/v2/workspaceagents/" + a.id + row[strings.LastIndex(row, "/"):]
		get := func(t *testing.T, query string) []map[string]any {
			r := request(t, "GET", at+query, w.key, nil).wants(t, 200, "")
			var all []map[string]any
			if err := json.Unmarshal(r.body, &all); err != nil {
				t.Fatal(err)
			}
			return all
		}
		check(t, row, "entries in order of their ids", func(t *testing.T) {
			last := -1.0
			for _, l := range get(t, "") {
				for _, key := range []string{"id", "created_at", "output", "level", "source_id"} {
					if _, ok := l[key]; !ok {
						t.Errorf("an entry lacks %s", key)
					}
				}
				if l["id"].(float64) <= last {
					t.Errorf("%v after %v", l["id"], last)
				}
				last = l["id"].(float64)
			}
		})
		check(t, row, "after", func(t *testing.T) {
			all := get(t, "")
			rest := get(t, fmt.Sprintf("?after=%d", int64(all[1]["id"].(float64))))
			if len(rest) != len(all)-2 || rest[0]["id"] != all[2]["id"] {
				t.Errorf("%d entries after the second of %d", len(rest), len(all))
			}
		})
		check(t, row, "before and no_compression change nothing", func(t *testing.T) {
			if all, some := get(t, ""), get(t, "?before=1&no_compression"); len(all) != len(some) {
				t.Errorf("%d and %d entries", len(all), len(some))
			}
		})
		for _, bad := range []string{"x", "-1", "1.5"} {
			check(t, row, "after="+bad, func(t *testing.T) {
				r := request(t, "GET", at+"?after="+bad, w.key, nil).wants(t, 400, `Query param "after" must be an integer greater than or equal to zero.`)
				if got := r.validation(t, "after"); got != "Must be an integer greater than or equal to zero" {
					t.Errorf("the validation is %q", got)
				}
			})
		}
		check(t, row, "as text", func(t *testing.T) {
			r := request(t, "GET", at+"?format=text", w.key, nil).wants(t, 200, "")
			first, _, _ := strings.Cut(string(r.body), "\n")
			at, rest, _ := strings.Cut(first, " ")
			if _, err := time.Parse(time.RFC3339Nano, at); err != nil || rest != "[trace] [agent.log-http|Mine] one" {
				t.Errorf("the first line is %q", first)
			}
			if ct := r.header.Get("Content-Type"); ct != "text/plain; charset=utf-8" {
				t.Errorf("the content type is %q", ct)
			}
		})
		check(t, row, "an unknown format", func(t *testing.T) {
			request(t, "GET", at+"?format=xml", w.key, nil).wants(t, 400, "Invalid format parameter.")
		})
		check(t, row, "text cannot be followed", func(t *testing.T) {
			request(t, "GET", at+"?format=text&follow", w.key, nil, upgradeHeaders...).wants(t, 400, "Text format is not supported with follow mode.")
		})
		check(t, row, "follow without an upgrade", func(t *testing.T) {
			request(t, "GET", at+"?follow", w.key, nil).wants(t, 400, "Failed to accept websocket.")
		})
		check(t, row, "no key", func(t *testing.T) { request(t, "GET", at, "", nil).wants(t, 401, "You are signed out") })
		check(t, row, "followed: text messages, the first at once, none over 32 KiB", func(t *testing.T) {
			b := w.agent(t, fmt.Sprint("followed-", len(row)))
			ws, resp, err := socket(t, w.url+"/api/v2/workspaceagents/"+b.id+row[strings.LastIndex(row, "/"):]+"?follow=false&after=0", w.key)
			if err != nil {
				t.Fatal(err, answer(resp))
			}
			read := func() []map[string]any { // within the 32 KiB that the library allows, as stock readers do
				kind, raw, err := message(t, ws)
				if err != nil {
					t.Fatal(err)
				}
				if kind != websocket.MessageText || !strings.HasSuffix(string(raw), "\n") {
					t.Errorf("a %v message that ends in %q", kind, raw[max(0, len(raw)-3):])
				}
				var all []map[string]any
				if err := json.Unmarshal(raw, &all); err != nil {
					t.Fatalf("%v in %.100s", err, raw)
				}
				return all
			}
			if first := read(); len(first) != 0 {
				t.Errorf("the first message of an empty log has %d entries", len(first))
			}
			var many []map[string]any
			for i := range 200 {
				many = append(many, entry(fmt.Sprintf("%03d %s", i, strings.Repeat("z", 1000)), "info"))
			}
			request(t, "PATCH", me+"logs", b.token, logs(source, many...)).wants(t, 200, "")
			for n := 0; n < len(many); {
				for _, l := range read() {
					if got := l["output"].(string)[:3]; got != fmt.Sprintf("%03d", n) {
						t.Fatalf("line %s instead of %03d", got, n)
					}
					n++
				}
			}
		})
	}
	check(t, logsRow, "over 1 MiB in all: 413, whole", func(t *testing.T) {
		b := w.agent(t, "overflow-http")
		var half []map[string]any
		for range 60 {
			half = append(half, entry(strings.Repeat("x", 10_000), "info"))
		}
		request(t, "PATCH", me+"logs", b.token, logs(source, half...)).wants(t, 200, "")
		request(t, "PATCH", me+"logs", b.token, logs(source, append(half, entry("small", "info"))...)).wants(t, 413, "Logs limit exceeded")
		info := w.info(t, b)
		if n := len(w.logs(t, b, "")); n != len(half) || info["logs_overflowed"] != true || info["logs_length"] != 600000.0 {
			t.Errorf("%d entries, overflowed %v, length %v", n, info["logs_overflowed"], info["logs_length"])
		}
	})
}

func TestReinit(t *testing.T) {
	t.Parallel() // a ping takes 15 s
	const row = "GET sse /api/v2/workspaceagents/me/reinit"
	w := stage(t)
	a := w.agent(t, "reinit")
	at := w.url + "/api/v2/workspaceagents/me/reinit"
	check(t, row, "wait=true at a regular workspace", func(t *testing.T) {
		request(t, "GET", at+"?wait=true", a.token, nil).wants(t, 409, "Workspace is not a prebuilt workspace waiting to be claimed.")
	})
	check(t, row, "without wait it is held open with pings", func(t *testing.T) {
		for _, h := range []http.Header{{"Coder-Session-Token": {a.token}}, {"Cookie": {"coder_session_token=" + a.token}}} {
			next, resp := eventsBy(t, at, h)
			if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "text/event-stream" || resp.Header.Get("Cache-Control") != "no-cache" || resp.Header.Get("X-Accel-Buffering") != "no" {
				t.Fatalf("%d %v", resp.StatusCode, resp.Header)
			}
			defer func() { // by now both have been open for as long
				if e, err := next(); err != nil || e.kind != "ping" || e.data != "" {
					t.Errorf("the first event is %+v, %v", e, err)
				}
			}()
		}
	})
	check(t, row, "streams that are left open do not end the agent's link", func(t *testing.T) {
		b := w.agent(t, "reinit-many")
		s := w.link(t, b, "2.10")
		for range 8 {
			if _, resp := events(t, at, b.token); resp.StatusCode != 200 {
				t.Fatal(answer(resp))
			}
		}
		s.must("UpdateStats", m{})
	})
	check(t, row, "a prebuilt workspace that is claimed", func(t *testing.T) {
		b := w.agent(t, "claimed")
		next, resp := events(t, at+"?wait=true", b.token)
		if resp.StatusCode != 200 {
			t.Fatal(answer(resp))
		}
		request(t, "POST", w.url+"/api/v2/berth/agents/"+b.id+"/claim", w.key, "{}").wants(t, 204, "")
		for {
			e, err := next()
			if err != nil {
				t.Fatal(err)
			}
			if e.kind != "data" {
				continue
			}
			var v map[string]any
			if err := json.Unmarshal([]byte(e.data), &v); err != nil || v["reason"] != "prebuild_claimed" || !uuidPattern.MatchString(fmt.Sprint(v["workspace_id"])) {
				t.Errorf("the event is %s, %v", e.data, err)
			}
			break
		}
		request(t, "GET", at+"?wait=true", b.token, nil).wants(t, 409, "")
	})
	check(t, row, "no token", func(t *testing.T) {
		request(t, "GET", at, "", nil).wants(t, 401, `Cookie "coder_session_token" must be provided.`)
	})
}

func TestHelpersHTTP(t *testing.T) {
	w := stage(t)
	a, b := w.agent(t, "git-one"), w.agent(t, "git-two")
	me := w.url + "/api/v2/workspaceagents/me/"
	const keyRow = "GET /api/v2/workspaceagents/me/gitsshkey"
	check(t, keyRow, "one Ed25519 pair for an owner, kept", func(t *testing.T) {
		first := request(t, "GET", me+"gitsshkey", a.token, nil).wants(t, 200, "").json(t)
		public, _, _, _, err := ssh.ParseAuthorizedKey([]byte(fmt.Sprint(first["public_key"])))
		if err != nil || public.Type() != ssh.KeyAlgoED25519 {
			t.Fatalf("the public key is %v, %v", first["public_key"], err)
		}
		block, _ := pem.Decode([]byte(fmt.Sprint(first["private_key"])))
		if block == nil {
			t.Fatal("the private key is no PEM")
		}
		private, err := ssh.ParseRawPrivateKey([]byte(first["private_key"].(string)))
		if err != nil {
			t.Fatal(err)
		}
		signer, err := ssh.NewSignerFromKey(private)
		if err != nil || string(signer.PublicKey().Marshal()) != string(public.Marshal()) {
			t.Errorf("the keys are no pair: %v", err)
		}
		if _, ok := private.(*ed25519.PrivateKey); !ok {
			t.Errorf("the private key is a %T", private)
		}
		if second := request(t, "GET", me+"gitsshkey", b.token, nil).json(t); second["private_key"] != first["private_key"] {
			t.Error("another agent of the owner has another key")
		}
	})
	check(t, keyRow, "no token", func(t *testing.T) {
		request(t, "GET", me+"gitsshkey", "", nil).wants(t, 401, `Cookie "coder_session_token" must be provided.`)
	})
	for _, name := range []string{"external-auth", "gitauth"} {
		row := "GET /api/v2/workspaceagents/me/" + name
		check(t, row, "neither match nor id", func(t *testing.T) {
			request(t, "GET", me+name, a.token, nil).wants(t, 400, "'url' or 'id' must be provided!")
		})
		check(t, row, "both match and id", func(t *testing.T) {
			request(t, "GET", me+name+"?match=github.com&id=github", a.token, nil).wants(t, 400, "'url' and 'id' cannot be provided together!")
		})
		check(t, row, "nobody matches", func(t *testing.T) {
			r := request(t, "GET", me+name+"?match=https://nobody.example", a.token, nil).wants(t, 404, `No matching external auth provider found in Coder for the url "https://nobody.example".`)
			if d, ok := r.json(t)["detail"].(string); !ok || d == "" {
				t.Errorf("no detail lists the providers")
			}
		})
		for _, c := range []struct{ query, kind, token, username, password string }{
			{"id=gitlab", "gitlab", "gl-token", "oauth2", "gl-token"},
			{"match=https://gitlab.com/group", "gitlab", "gl-token", "oauth2", "gl-token"},
			{"url=https://gitlab.com/group", "gitlab", "gl-token", "oauth2", "gl-token"},
			{"id=bitbucket-cloud&git_branch=main&git_remote_origin=x&chat_id=y", "bitbucket-cloud", "bb-token", "x-token-auth", "bb-token"},
			{"match=https://git.example.com/repo", "azure-devops", "minted", "minted", ""},
		} {
			check(t, row, c.query, func(t *testing.T) {
				v := request(t, "GET", me+name+"?"+c.query, a.token, nil).wants(t, 200, "").json(t)
				if v["access_token"] != c.token || v["username"] != c.username || v["password"] != c.password || v["type"] != c.kind || v["url"] != "" {
					t.Errorf("the answer is %v", v)
				}
				if _, ok := v["token_extra"]; !ok {
					t.Error("token_extra is missing")
				}
				if c.token == "minted" && (v["expires_at"] != "2099-01-02T03:04:05Z" || v["token_extra"].(map[string]any)["scope"] != "all") {
					t.Errorf("expires_at %v, token_extra %v", v["expires_at"], v["token_extra"])
				}
			})
		}
		check(t, row, "not yet authenticated: a URL; listen waits for the token", func(t *testing.T) {
			file := filepath.Join(w.home, "github-token")
			os.Remove(file)
			defer os.Remove(file)
			eventually(t, "the token is gone", func() bool { // it is looked at once a second
				v := request(t, "GET", me+name+"?match=https://github.com", a.token, nil).wants(t, 200, "").json(t)
				return v["url"] == w.url+"/external-auth/github" && (v["access_token"] == nil || v["access_token"] == "")
			})
			answered := make(chan map[string]any, 1)
			go func() {
				answered <- request(t, "GET", me+name+"?id=github&listen", a.token, nil).json(t)
			}()
			if err := os.WriteFile(file, []byte("gh-token\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			if v := <-answered; v["access_token"] != "gh-token" || v["username"] != "gh-token" || v["password"] != "" || v["url"] != "" {
				t.Errorf("the answer is %v", v)
			}
		})
		check(t, row, "an unknown id", func(t *testing.T) {
			request(t, "GET", me+name+"?id=nobody", a.token, nil).wants(t, 404, "")
		})
		check(t, row, "no token", func(t *testing.T) {
			request(t, "GET", me+name+"?id=x", "", nil).wants(t, 401, `Cookie "coder_session_token" must be provided.`)
		})
	}
}

func TestWatchMetadata(t *testing.T) {
	w := stage(t)
	a := w.agent(t, "full")
	at := w.url + "/api/v2/workspaceagents/" + a.id
	shape := func(t *testing.T, all []any) {
		t.Helper()
		if len(all) != 1 {
			t.Fatalf("%d items", len(all))
		}
		d := all[0].(map[string]any)["description"].(map[string]any)
		if d["key"] != "load" || d["display_name"] != "Load" || d["interval"] != 10.0 || d["timeout"] != 2.0 || d["script"] == "" {
			t.Errorf("the description is %v: interval and timeout are in seconds", d)
		}
		r := all[0].(map[string]any)["result"].(map[string]any)
		for _, key := range []string{"collected_at", "age", "value", "error"} {
			if _, ok := r[key]; !ok {
				t.Errorf("the result lacks %s", key)
			}
		}
	}
	const row, wsRow = "GET sse /api/v2/workspaceagents/{id}/watch-metadata", "GET ws /api/v2/workspaceagents/{id}/watch-metadata-ws"
	update := func(value string) {
		s := w.link(t, a, "2.10")
		s.must("BatchUpdateMetadata", m{"metadata": []m{{"key": "load", "result": m{"value": value}}}})
		s.close()
	}
	check(t, row, "the state at once, then changes", func(t *testing.T) {
		next, resp := events(t, at+"/watch-metadata", w.key)
		if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "text/event-stream" {
			t.Fatalf("%d %v", resp.StatusCode, resp.Header)
		}
		updated := false
		for {
			e, err := next()
			if err != nil {
				t.Fatal(err)
			}
			if e.kind != "data" {
				continue
			}
			var all []any
			if err := json.Unmarshal([]byte(e.data), &all); err != nil {
				t.Fatal(err)
			}
			shape(t, all)
			if !updated {
				updated = true
				update("changed-sse")
			}
			if all[0].(map[string]any)["result"].(map[string]any)["value"] == "changed-sse" {
				return
			}
		}
	})
	check(t, wsRow, "the same in text messages", func(t *testing.T) {
		ws, resp, err := socket(t, at+"/watch-metadata-ws", w.key)
		if err != nil {
			t.Fatal(err, answer(resp))
		}
		updated := false
		for {
			kind, raw, err := message(t, ws)
			if err != nil {
				t.Fatal(err)
			}
			var e struct {
				Type string
				Data []any
			}
			if err := json.Unmarshal(raw, &e); err != nil || kind != websocket.MessageText {
				t.Fatalf("%v %v %s", kind, err, raw)
			}
			if e.Type != "data" {
				continue
			}
			shape(t, e.Data)
			if !updated {
				updated = true
				update("changed-ws")
			}
			if e.Data[0].(map[string]any)["result"].(map[string]any)["value"] == "changed-ws" {
				return
			}
		}
	})
	for _, c := range []struct{ row, path string }{{row, "/watch-metadata"}, {wsRow, "/watch-metadata-ws"}} {
		check(t, c.row, "no key", func(t *testing.T) {
			request(t, "GET", at+c.path, "", nil, upgradeHeaders...).wants(t, 401, "You are signed out")
		})
		check(t, c.row, "an unknown agent", func(t *testing.T) {
			request(t, "GET", w.url+"/api/v2/workspaceagents/"+uuid.NewString()+c.path, w.key, nil, upgradeHeaders...).wants(t, 404, "")
		})
	}
}
