package conformance

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/google/uuid"
	"google.golang.org/protobuf/encoding/protowire"
)

// rpcCase is one call: what is sent and what has to come back.
type rpcCase struct {
	name    string
	request m
	raw     []byte // in place of request
	fails   string // words of the error; "" is success, "any" any error
	check   func(t *testing.T, reply m)
}

// calls runs the cases of a method, in order, over one session.
func calls(t *testing.T, s *session, service, method string, cases []rpcCase) {
	t.Helper()
	for _, c := range cases {
		check(t, service+"."+method, c.name, func(t *testing.T) {
			r := rpcs[method]
			b := c.raw
			if b == nil {
				b = encode(r.request, c.request)
			}
			raw, err := s.raw(r.method, b)
			if c.fails == "any" {
				c.fails = ""
				wantError(t, err, "")
				return
			}
			if c.fails != "" {
				wantError(t, err, c.fails)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			v, err := decode(r.response, raw)
			if err != nil {
				t.Fatal(err)
			}
			if c.check != nil {
				c.check(t, v)
			}
		})
	}
}

// info is the server's view of an agent.
func (w *world) info(t testing.TB, a identity) map[string]any {
	t.Helper()
	return request(t, "GET", w.url+"/api/v2/workspaceagents/"+a.id, w.key, nil).wants(t, 200, "").json(t)
}

func garbage() []byte { return []byte{0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f} }

// unknown is a message with a field and an enum value that nobody knows.
func unknownField() []byte {
	return protowire.AppendString(protowire.AppendTag(nil, 999, protowire.BytesType), "from the future")
}

func TestAgentRPC(t *testing.T) {
	w := stage(t)
	full := w.agent(t, "full")
	s := w.link(t, full, "2.10")

	calls(t, s, "Agent", "GetManifest", []rpcCase{
		{name: "a stock agent can decode it", request: m{}, check: func(t *testing.T, v m) {
			if len(blob(v, "agent_id")) != 16 || bytes.Equal(blob(v, "agent_id"), make([]byte, 16)) {
				t.Errorf("agent_id is %x", blob(v, "agent_id"))
			}
			if len(blob(v, "workspace_id")) != 16 {
				t.Errorf("workspace_id is %x", blob(v, "workspace_id"))
			}
			if has(v, "parent_id") {
				t.Error("a top-level agent has a parent_id")
			}
			if !has(sub(v, "derp_map"), "home_params") {
				t.Error("the DERP map has no home_params")
			}
			for _, x := range list(v, "apps") {
				app := x.(m)
				if len(blob(app, "id")) != 16 || !has(app, "healthcheck") || num(app, "sharing_level") == 0 || num(app, "health") == 0 {
					t.Errorf("an agent crashes on the app %v", app)
				}
			}
			for _, x := range list(v, "scripts") {
				if script := x.(m); len(blob(script, "id")) != 16 || len(blob(script, "log_source_id")) != 16 {
					t.Errorf("an agent cannot decode the script %v", script)
				}
			}
			if text(v, "agent_name") == "" || text(v, "owner_username") == "" || text(v, "workspace_name") == "" {
				t.Errorf("a name is empty: %q %q %q", text(v, "agent_name"), text(v, "owner_username"), text(v, "workspace_name"))
			}
		}},
		{name: "what was declared is in it", request: m{}, check: func(t *testing.T, v m) {
			if text(v, "directory") != "~/src" || text(v, "motd_path") != "/etc/motd" || sub(v, "environment_variables")["EDITOR"] != "vim" {
				t.Errorf("directory %q, motd %q, environment %v", text(v, "directory"), text(v, "motd_path"), v["environment_variables"])
			}
			if secrets := list(v, "secrets"); len(secrets) != 1 || text(secrets[0].(m), "env_name") != "FROM_SECRET" || string(blob(secrets[0].(m), "value")) != "whispered" {
				t.Errorf("the secrets are %v", secrets)
			}
			if num(v, "git_auth_configs") != 4 {
				t.Errorf("git_auth_configs is %d", num(v, "git_auth_configs"))
			}
			if len(list(v, "apps")) != 2 || len(list(v, "scripts")) != 2 || len(list(v, "metadata")) != 1 {
				t.Fatalf("%d apps, %d scripts, %d metadata", len(list(v, "apps")), len(list(v, "scripts")), len(list(v, "metadata")))
			}
			for _, x := range list(v, "scripts") {
				if script := x.(m); flag(script, "run_on_start") && (seconds(sub(script, "timeout")) != 600 || !flag(script, "start_blocks_login")) {
					t.Errorf("the start script is %v", script)
				} else if !flag(script, "run_on_start") && text(script, "cron") != "0 30 3 * * *" {
					t.Errorf("the cron script is %v", script)
				}
			}
			for _, x := range list(v, "apps") {
				app := x.(m)
				switch text(app, "slug") {
				case "web":
					if h := sub(app, "healthcheck"); text(h, "url") != "http://localhost:8080/healthz" || seconds(sub(h, "interval")) != 10 || num(h, "threshold") != 3 || num(app, "health") != 2 {
						t.Errorf("the web app is %v", app)
					}
				case "assistant":
					if num(app, "health") != 1 {
						t.Errorf("an app without a health check is not DISABLED: %v", app)
					}
				}
			}
		}},
		{name: "unknown fields are skipped", raw: unknownField()},
		{name: "garbage is refused", raw: garbage(), fails: "any"},
	})

	calls(t, s, "Agent", "GetServiceBanner", []rpcCase{{name: "the first banner", request: m{}, check: func(t *testing.T, v m) {
		if !flag(v, "enabled") || text(v, "message") != "Maintenance on Friday" || text(v, "background_color") != "#b45309" {
			t.Errorf("the banner is %v", v)
		}
	}}})
	calls(t, s, "Agent", "GetAnnouncementBanners", []rpcCase{{name: "all banners", request: m{}, check: func(t *testing.T, v m) {
		var got []string
		for _, b := range list(v, "announcement_banners") {
			got = append(got, fmt.Sprint(flag(b.(m), "enabled"), " ", text(b.(m), "message")))
		}
		if fmt.Sprint(got) != "[true Maintenance on Friday true And on Saturday]" {
			t.Errorf("the banners are %q", got)
		}
	}}})

	calls(t, s, "Agent", "UpdateStartup", []rpcCase{
		{name: "echoed", request: m{"startup": m{"version": "v2.20.1-devel+abc", "expanded_directory": "/root/src", "subsystems": []string{"EXECTRACE", "ENVBOX", "EXECTRACE"}}},
			check: func(t *testing.T, v m) {
				if text(v, "version") != "v2.20.1-devel+abc" || text(v, "expanded_directory") != "/root/src" {
					t.Errorf("the answer is %v", v)
				}
				info := w.info(t, full)
				if info["version"] != "v2.20.1-devel+abc" || info["expanded_directory"] != "/root/src" || fmt.Sprint(info["subsystems"]) != "[envbox exectrace]" || info["api_version"] != "2.10" {
					t.Errorf("the server has version %v, directory %v, subsystems %v, API %v", info["version"], info["expanded_directory"], info["subsystems"], info["api_version"])
				}
			}},
		{name: "a version without v", request: m{"startup": m{"version": "2.20.1"}}, fails: `invalid agent semver version "2.20.1"`},
		{name: "no version", request: m{"startup": m{}}, fails: `invalid agent semver version ""`},
		{name: "subsystem 0", request: m{"startup": m{"version": "v1.0.0", "subsystems": []int{0}}}, fails: "any"},
		{name: "an unknown subsystem", request: m{"startup": m{"version": "v1.0.0", "subsystems": []int{77}}}, fails: "any"},
		{name: "no startup", request: m{}, fails: "any"},
		{name: "garbage", raw: garbage(), fails: "any"},
	})

	states := []string{"starting", "start_timeout", "start_error", "ready", "shutting_down", "shutdown_timeout", "shutdown_error", "off", "created"}
	var lifecycle []rpcCase
	for _, state := range states {
		at := time.Now().Truncate(time.Microsecond)
		lifecycle = append(lifecycle, rpcCase{name: "to " + state, request: m{"lifecycle": m{"state": strings.ToUpper(state), "changed_at": at}}, check: func(t *testing.T, v m) {
			if enum("agent.Lifecycle.State", num(v, "state")) != strings.ToUpper(state) || !instant(sub(v, "changed_at")).Equal(at) {
				t.Errorf("the answer is %v", v)
			}
			info := w.info(t, full)
			if info["lifecycle_state"] != state {
				t.Errorf("the server says %v", info["lifecycle_state"])
			}
			_, ready := info["ready_at"]
			if wantReady := state != "starting"; ready != wantReady {
				t.Errorf("ready_at is there: %v", ready)
			}
		}})
	}
	lifecycle = append(lifecycle,
		rpcCase{name: "state 0", request: m{"lifecycle": m{"changed_at": time.Now()}}, fails: "any"},
		rpcCase{name: "an unknown state", request: m{"lifecycle": m{"state": 99, "changed_at": time.Now()}}, fails: "any"},
		rpcCase{name: "the year 1 is now", request: m{"lifecycle": m{"state": "READY", "changed_at": m{"seconds": -62135596800}}}, check: func(t *testing.T, v m) {
			if since := time.Since(instant(sub(v, "changed_at"))); since < -time.Minute || since > time.Minute {
				t.Logf("the answer is %v ago", since) // the page says only that the response echoes
			}
			at, err := time.Parse(time.RFC3339Nano, fmt.Sprint(w.info(t, full)["started_at"]))
			if err != nil || time.Since(at) > time.Hour {
				t.Errorf("started_at is %v", at)
			}
		}},
		rpcCase{name: "no lifecycle", request: m{}, fails: "any"},
	)
	calls(t, s, "Agent", "UpdateLifecycle", lifecycle)

	calls(t, s, "Agent", "UpdateStats", []rpcCase{
		{name: "without stats it asks for the interval", request: m{}, check: func(t *testing.T, v m) {
			if seconds(sub(v, "report_interval")) <= 0 {
				t.Errorf("report_interval is %v", v)
			}
		}},
		{name: "with everything", request: m{"stats": m{"connections_by_proto": map[string]int64{"TCP": 3, "UDP": 1}, "connection_count": 4, "connection_median_latency_ms": 1.5,
			"rx_packets": 1, "rx_bytes": 2, "tx_packets": 3, "tx_bytes": 4, "session_count_vscode": 1, "session_count_jetbrains": 2, "session_count_reconnecting_pty": 3, "session_count_ssh": 4,
			"metrics": []m{{"name": "agent_sessions_total", "type": "COUNTER", "value": 7.0, "labels": []m{{"name": "pty", "value": "yes"}}}}}},
			check: func(t *testing.T, v m) {
				if seconds(sub(v, "report_interval")) <= 0 {
					t.Errorf("report_interval is %v", v)
				}
			}},
		{name: "latency unknown", request: m{"stats": m{"connection_median_latency_ms": -0.001}}},
		{name: "an unknown metric type does no harm", request: m{"stats": m{"metrics": []m{{"name": "x", "type": 9}}}}},
	})

	manifest := s.must("GetManifest", m{})
	apps, scripts := map[string][]byte{}, list(manifest, "scripts")
	for _, x := range list(manifest, "apps") {
		apps[text(x.(m), "slug")] = blob(x.(m), "id")
	}
	health := func(id []byte, h any) m { return m{"updates": []m{{"id": id, "health": h}}} }
	calls(t, s, "Agent", "BatchUpdateAppHealths", []rpcCase{
		{name: "healthy", request: health(apps["web"], "HEALTHY"), check: func(t *testing.T, _ m) {
			for _, x := range w.info(t, full)["apps"].([]any) {
				if app := x.(map[string]any); app["slug"] == "web" && app["health"] != "healthy" {
					t.Errorf("the app is %v", app["health"])
				}
			}
		}},
		{name: "unchanged", request: health(apps["web"], "HEALTHY")},
		{name: "unhealthy", request: health(apps["web"], "UNHEALTHY")},
		{name: "nothing", request: m{}},
		{name: "an unknown app", request: health(uuidBytes("11111111-1111-4111-8111-111111111111"), "HEALTHY"), fails: "any"},
		{name: "an app without a health check", request: health(apps["assistant"], "HEALTHY"), fails: "any"},
		{name: "health 0", request: health(apps["web"], 0), fails: "any"},
		{name: "an unknown health", request: health(apps["web"], 42), fails: "any"},
		{name: "an id of 15 bytes", request: health(apps["web"][:15], "HEALTHY"), fails: "any"},
	})

	metadata := func(key, value, problem string) m {
		return m{"metadata": []m{{"key": key, "result": m{"collected_at": time.Now(), "age": 3, "value": value, "error": problem}}}}
	}
	stored := func(value, problem string) func(*testing.T, m) {
		return func(t *testing.T, _ m) {
			eventually(t, fmt.Sprintf("the metadata shows value %.40q, error %q", value, problem), func() bool {
				for _, x := range watchOnce(t, w, full) {
					r := x["result"].(map[string]any)
					if x["description"].(map[string]any)["key"] == "load" && r["value"] == value && r["error"] == problem {
						return true
					}
				}
				return false
			})
		}
	}
	long := strings.Repeat("v", 2049)
	calls(t, s, "Agent", "BatchUpdateMetadata", []rpcCase{
		{name: "trimmed", request: metadata("load", " 0.5\n", "\tbad "), check: stored("0.5", "bad")},
		{name: "a value of 2048 bytes", request: metadata("load", long[:2048], ""), check: stored(long[:2048], "")},
		{name: "a value of 2049 bytes is cut", request: metadata("load", long, "mine"), check: stored(long[:2048], "value of 2049 bytes exceeded 2048 bytes")},
		{name: "an error of 2049 bytes is replaced", request: metadata("load", "x", long), check: stored("x", "error of 2049 bytes exceeded 2048 bytes")},
		{name: "an unknown key is ignored", request: metadata("nobody", "x", "")},
		{name: "nothing", request: m{}},
		{name: "more than 6144 bytes of keys", request: m{"metadata": []m{{"key": "load", "result": m{"value": "kept"}}, {"key": strings.Repeat("k", 6141), "result": m{}}}}, fails: "any"},
		{name: "what came before the limit is kept", request: m{}, check: stored("kept", "")},
		{name: "no result", request: m{"metadata": []m{{"key": "load"}}}, fails: "any"},
	})

	logger := w.agent(t, "logger")
	ls := w.link(t, logger, "2.10")
	source := uuid.New()
	calls(t, ls, "Agent", "BatchCreateLogs", []rpcCase{
		{name: "stored", request: m{"log_source_id": source[:], "logs": []m{{"created_at": time.Unix(1, 0), "output": "first", "level": "WARN"}, {"output": "second"}, {"output": "third", "level": 88}}},
			check: func(t *testing.T, v m) {
				if flag(v, "log_limit_exceeded") {
					t.Error("three lines exceed the limit")
				}
				logs := w.logs(t, logger, "")
				var got []string
				for _, l := range logs {
					got = append(got, fmt.Sprint(l["level"], " ", l["output"]))
					if at, err := time.Parse(time.RFC3339Nano, l["created_at"].(string)); err != nil || time.Since(at) > time.Hour {
						t.Errorf("created_at is %v: the server's own time counts", l["created_at"])
					}
					if l["source_id"] != source.String() {
						t.Errorf("source_id is %v", l["source_id"])
					}
				}
				if fmt.Sprint(got) != "[warn first info second info third]" {
					t.Errorf("the log is %q", got)
				}
			}},
		{name: "no entries", request: m{"log_source_id": source[:]}},
		{name: "a nil source is External", request: m{"log_source_id": make([]byte, 16), "logs": []m{{"output": "from outside"}}}, check: func(t *testing.T, _ m) {
			logs := w.logs(t, logger, "")
			if got := logs[len(logs)-1]["source_id"]; got != "3b579bf4-1ed8-4b99-87a8-e9a1e3410410" {
				t.Errorf("source_id is %v", got)
			}
			found := false
			for _, x := range w.info(t, logger)["log_sources"].([]any) {
				if src := x.(map[string]any); src["id"] == "3b579bf4-1ed8-4b99-87a8-e9a1e3410410" {
					found = src["display_name"] == "External" && src["icon"] == "/emojis/1f310.png"
				}
			}
			if !found {
				t.Error("the source External is not made")
			}
		}},
		{name: "a source of 15 bytes", request: m{"log_source_id": source[:15], "logs": []m{{"output": "x"}}}, fails: "any"},
		{name: "a batch over 1 MiB in all is rejected whole, as success", request: m{"log_source_id": source[:], "logs": []m{{"output": "a line that would fit"}, {"output": strings.Repeat("x", 1<<20)}}},
			check: func(t *testing.T, v m) {
				if !flag(v, "log_limit_exceeded") {
					t.Error("log_limit_exceeded is not set")
				}
				for _, l := range w.logs(t, logger, "") {
					if l["output"] == "a line that would fit" {
						t.Error("a part of the batch was stored")
					}
				}
				if w.info(t, logger)["logs_overflowed"] != true {
					t.Error("logs_overflowed is not true")
				}
			}},
		{name: "once overflowed, for good", request: m{"log_source_id": source[:], "logs": []m{{"output": "x"}}}, check: func(t *testing.T, v m) {
			if !flag(v, "log_limit_exceeded") {
				t.Error("log_limit_exceeded is not set")
			}
		}},
	})

	if len(scripts) != 2 {
		t.Fatalf("%d scripts", len(scripts))
	}
	script := blob(scripts[0].(m), "id")
	now := time.Now()
	timing := func(change m) m {
		v := m{"script_id": script, "start": now, "end": now.Add(time.Second), "exit_code": 3, "stage": "START", "status": "EXIT_FAILURE"}
		for k, x := range change {
			if x == nil {
				delete(v, k)
			} else {
				v[k] = x
			}
		}
		return m{"timing": v}
	}
	shown := func(code float64, status string) func(*testing.T, m) {
		return func(t *testing.T, _ m) {
			for _, x := range w.info(t, full)["scripts"].([]any) {
				if sc := x.(map[string]any); sc["id"] == uuidText(script) && (sc["exit_code"] != code || sc["status"] != status) {
					t.Errorf("the script shows %v %v", sc["exit_code"], sc["status"])
				}
			}
		}
	}
	calls(t, s, "Agent", "ScriptCompleted", []rpcCase{
		{name: "a failure", request: timing(m{}), check: shown(3, "exit_failure")},
		{name: "the newest is shown", request: timing(m{"exit_code": 0, "status": "OK", "stage": "CRON"}), check: shown(0, "ok")},
		{name: "timed out", request: timing(m{"exit_code": 255, "status": "TIMED_OUT"}), check: shown(255, "timed_out")},
		{name: "pipes left open", request: timing(m{"exit_code": 0, "status": "PIPES_LEFT_OPEN", "stage": "STOP"}), check: shown(0, "pipes_left_open")},
		{name: "an id of 3 bytes", request: timing(m{"script_id": []byte("abc")}), fails: "any"},
		{name: "no start", request: timing(m{"start": nil}), fails: "any"},
		{name: "no end", request: timing(m{"end": nil}), fails: "any"},
		{name: "a start of year 1", request: timing(m{"start": m{"seconds": -62135596800}}), fails: "any"},
		{name: "an end before the start", request: timing(m{"end": now.Add(-time.Second)}), fails: "any"},
		{name: "an unknown stage", request: timing(m{"stage": 9}), fails: "any"},
		{name: "an unknown status", request: timing(m{"status": 9}), fails: "any"},
		{name: "no timing", request: m{}, fails: "any"},
	})

	calls(t, s, "Agent", "GetResourcesMonitoringConfiguration", []rpcCase{{name: "what was declared", request: m{}, check: func(t *testing.T, v m) {
		if c := sub(v, "config"); num(c, "num_datapoints") <= 0 || num(c, "collection_interval_seconds") <= 0 {
			t.Errorf("the answer is %v", v)
		}
		if vs := list(v, "volumes"); !flag(sub(v, "memory"), "enabled") || len(vs) != 1 || text(vs[0].(m), "path") != "/" || !flag(vs[0].(m), "enabled") {
			t.Errorf("the answer is %v", v)
		}
	}}})
	bare := w.link(t, w.agent(t, "bare"), "2.10")
	calls(t, bare, "Agent", "GetResourcesMonitoringConfiguration", []rpcCase{{name: "nothing is monitored", request: m{}, check: func(t *testing.T, v m) {
		if c := sub(v, "config"); num(c, "num_datapoints") <= 0 || num(c, "collection_interval_seconds") <= 0 || flag(sub(v, "memory"), "enabled") || len(list(v, "volumes")) != 0 {
			t.Errorf("the answer is %v", v)
		}
	}}})
	calls(t, s, "Agent", "PushResourcesMonitoringUsage", []rpcCase{
		{name: "a window", request: m{"datapoints": []m{{"collected_at": now, "memory": m{"used": 1, "total": 2}, "volumes": []m{{"volume": "/", "used": 1, "total": 2}}}, {"collected_at": now}}}},
		{name: "nothing", request: m{}},
	})

	connection := func(change m) m {
		v := m{"id": uuidBytes("22222222-2222-4222-8222-222222222222"), "action": "CONNECT", "type": "SSH", "timestamp": now, "ip": "127.0.0.1"}
		for k, x := range change {
			v[k] = x
		}
		return m{"connection": v}
	}
	calls(t, s, "Agent", "ReportConnection", []rpcCase{
		{name: "connect", request: connection(m{})},
		{name: "disconnect", request: connection(m{"action": "DISCONNECT", "status_code": 1, "reason": "graceful"})},
		{name: "disconnect of an id never seen", request: connection(m{"id": uuidBytes("33333333-3333-4333-8333-333333333333"), "action": "DISCONNECT", "type": "RECONNECTING_PTY"})},
		{name: "localhost", request: connection(m{"ip": "localhost"})},
		{name: "an address that is none", request: connection(m{"ip": "not an address"})},
		{name: "no address", request: connection(m{"ip": ""})},
		{name: "a nil id", request: connection(m{"id": make([]byte, 16)}), fails: "any"},
		{name: "an id of 17 bytes", request: connection(m{"id": make([]byte, 17)}), fails: "any"},
		{name: "action 0", request: connection(m{"action": 0}), fails: "any"},
		{name: "type 0", request: connection(m{"type": 0}), fails: "any"},
		{name: "an unknown type", request: connection(m{"type": 55}), fails: "any"},
		{name: "no connection", request: m{}, fails: "any"},
	})

	status := func(change m) m {
		v := m{"slug": "assistant", "state": "WORKING", "message": "reading", "uri": "https://example.com"}
		for k, x := range change {
			v[k] = x
		}
		return v
	}
	calls(t, s, "Agent", "UpdateAppStatus", []rpcCase{
		{name: "working", request: status(m{}), check: func(t *testing.T, _ m) { w.wantStatus(t, full, "working", "reading", "https://example.com") }},
		{name: "idle", request: status(m{"state": "IDLE", "uri": ""}), check: func(t *testing.T, _ m) { w.wantStatus(t, full, "idle", "reading", "") }},
		{name: "failure", request: status(m{"state": "FAILURE"})},
		{name: "an unknown state", request: status(m{"state": 17}), fails: "any"},
		{name: "a message of 161 bytes", request: status(m{"message": strings.Repeat("x", 161)}), fails: "Message is too long."},
		{name: "an unknown slug", request: status(m{"slug": "nobody"}), fails: "Failed to get workspace app."},
	})

	calls(t, s, "Agent", "ReportBoundaryLogs", []rpcCase{
		{name: "1000 entries", request: m{"logs": repeat(m{"allowed": true, "time": now, "http_request": m{"method": "GET", "url": "https://x", "matched_rule": "x"}}, 1000), "session_id": "s", "confined_process_name": "p"}},
		{name: "1001 entries", request: m{"logs": repeat(m{"allowed": true}, 1001)}, fails: "any"},
	})
	subAgents(t, w)
	pushContext(t, s)
}

func repeat(v m, n int) []m {
	all := make([]m, n)
	for i := range all {
		all[i] = v
	}
	return all
}

// wantStatus checks the newest status of the app "assistant".
func (w *world) wantStatus(t *testing.T, a identity, state, message, uri string) {
	t.Helper()
	for _, x := range w.info(t, a)["apps"].([]any) {
		app := x.(map[string]any)
		if app["slug"] != "assistant" {
			continue
		}
		statuses, _ := app["statuses"].([]any)
		if len(statuses) == 0 {
			t.Fatal("the app has no status")
		}
		for _, y := range statuses { // one of them, whatever their order
			if s := y.(map[string]any); s["state"] == state && s["message"] == message && s["uri"] == uri {
				return
			}
		}
		t.Errorf("no status is %s %q %q: %v", state, message, uri, statuses)
		return
	}
	t.Error("no app is called assistant")
}

// subAgents goes through the three calls with a parent of its own.
func subAgents(t *testing.T, w *world) {
	parent := w.agent(t, "parent")
	s := w.link(t, parent, "2.10")
	var child m
	app := func(slug string) m {
		return m{"slug": slug, "url": "http://localhost:3000", "display_name": "An app", "share": "PUBLIC", "open_in": "TAB", "healthcheck": m{"interval": 5, "threshold": 6, "url": "http://localhost:3000/up"}}
	}
	calls(t, s, "Agent", "CreateSubAgent", []rpcCase{
		{name: "with apps", request: m{"name": "dev", "directory": "/work", "architecture": "amd64", "operating_system": "linux", "apps": []m{app("good"), app("BAD SLUG"), app("good")},
			"display_apps": []string{"VSCODE", "WEB_TERMINAL"}}, check: func(t *testing.T, v m) {
			child = sub(v, "agent")
			if text(child, "name") != "dev" || len(blob(child, "id")) != 16 || len(blob(child, "auth_token")) != 16 {
				t.Fatalf("the agent is %v", child)
			}
			var failed []string
			for _, x := range list(v, "app_creation_errors") {
				e := x.(m)
				if text(e, "error") == "" {
					t.Errorf("an app's error without text: %v", e)
				}
				failed = append(failed, fmt.Sprint(num(e, "index")))
			}
			if fmt.Sprint(failed) != "[1 2]" {
				t.Errorf("the apps that failed are %v, not [1 2]", failed)
			}
			a := identity{id: uuidText(blob(child, "id")), token: uuidText(blob(child, "auth_token"))}
			info := w.info(t, a)
			if info["parent_id"] != parent.id || info["name"] != "dev" || info["directory"] != "/work" || fmt.Sprint(info["display_apps"]) != "[vscode web_terminal]" {
				t.Errorf("the server shows %v", info)
			}
			apps := info["apps"].([]any)
			if len(apps) != 1 {
				t.Fatalf("%d apps", len(apps))
			}
			got := apps[0].(map[string]any)
			if slug, _ := got["slug"].(string); len(slug) != 8+1+4 || !strings.HasSuffix(slug, "-good") {
				t.Errorf("the stored slug is %q", slug)
			}
			if got["health"] != "initializing" || got["open_in"] != "tab" {
				t.Errorf("the app is %v", got)
			}
			// The token is an agent's, and the manifest knows the parent.
			cs := w.link(t, a, "2.10")
			if got := uuidText(blob(cs.must("GetManifest", m{}), "parent_id")); got != parent.id {
				t.Errorf("the child's parent_id is %s", got)
			}
		}},
		{name: "the same name", request: m{"name": "dev"}, fails: "workspace agent name"},
		{name: "no name", request: m{}, fails: "any"},
		{name: "a name with a space", request: m{"name": "a b"}, fails: "any"},
		{name: "an unknown display app", request: m{"name": "other", "display_apps": []int{99}}, fails: "any"},
		{name: "an id that is no child's", request: m{"id": uuidBytes("44444444-4444-4444-8444-444444444444")}, fails: "any"},
	})
	if child == nil {
		t.Fatal("no child")
	}
	check(t, "Agent.CreateSubAgent", "the stored slug is made of name and slug", func(t *testing.T) {
		// SHA-256 of "dev/good" in lower-case base32hex, its first 8 characters.
		info := w.info(t, identity{id: uuidText(blob(child, "id"))})
		if got := info["apps"].([]any)[0].(map[string]any)["slug"]; got != slugOf("dev", "good") {
			t.Errorf("the slug is %v, not %s", got, slugOf("dev", "good"))
		}
	})
	calls(t, s, "Agent", "CreateSubAgent", []rpcCase{{name: "an own child's id updates it", request: m{"id": blob(child, "id"), "name": "ignored", "directory": "/elsewhere", "display_apps": []string{"SSH_HELPER"}}, check: func(t *testing.T, v m) {
		if a := sub(v, "agent"); text(a, "name") != "dev" || !bytes.Equal(blob(a, "id"), blob(child, "id")) || !bytes.Equal(blob(a, "auth_token"), blob(child, "auth_token")) {
			t.Errorf("the answer is %v, the child is %v", a, child)
		}
		info := w.info(t, identity{id: uuidText(blob(child, "id"))})
		if info["directory"] != "/elsewhere" || fmt.Sprint(info["display_apps"]) != "[ssh_helper]" {
			t.Errorf("the server shows %v %v", info["directory"], info["display_apps"])
		}
	}}})
	other := w.link(t, w.agent(t, "stranger"), "2.10")
	check(t, "Agent.CreateSubAgent", "another's child", func(t *testing.T) {
		_, err := other.call("CreateSubAgent", m{"id": blob(child, "id")})
		wantError(t, err, "subagent does not belong to this parent agent")
	})
	calls(t, s, "Agent", "ListSubAgents", []rpcCase{{name: "the child", request: m{}, check: func(t *testing.T, v m) {
		if all := list(v, "agents"); len(all) != 1 || !bytes.Equal(blob(all[0].(m), "id"), blob(child, "id")) || len(blob(all[0].(m), "auth_token")) != 16 {
			t.Errorf("the agents are %v", all)
		}
	}}})
	calls(t, other, "Agent", "ListSubAgents", []rpcCase{{name: "none", request: m{}, check: func(t *testing.T, v m) {
		if len(list(v, "agents")) != 0 {
			t.Errorf("the agents are %v", v)
		}
	}}})
	calls(t, other, "Agent", "DeleteSubAgent", []rpcCase{{name: "another's child", request: m{"id": blob(child, "id")}, fails: "any"}})
	calls(t, s, "Agent", "DeleteSubAgent", []rpcCase{
		{name: "an id of 4 bytes", request: m{"id": []byte("1234")}, fails: "any"},
		{name: "the child", request: m{"id": blob(child, "id")}, check: func(t *testing.T, _ m) {
			if all := list(s.must("ListSubAgents", m{}), "agents"); len(all) != 0 {
				t.Errorf("the agents are %v", all)
			}
			_, resp, err := dial(t, w.url+"/api/v2/workspaceagents/me/rpc?version=2.0", http.Header{"Coder-Session-Token": {uuidText(blob(child, "auth_token"))}})
			if err == nil || resp == nil || resp.StatusCode != 401 {
				t.Errorf("the token of a deleted child: %v%s", err, answer(resp))
			}
		}},
	})
}

func pushContext(t *testing.T, s *session) {
	t.Helper()
	// A server may leave this RPC out; then the answer is code 12 and nothing else.
	if _, err := s.call("PushContextState", m{"version": 1, "initial": true}); err != nil {
		check(t, "Agent.PushContextState", "left out with code 12", func(t *testing.T) {
			wantCode12(t, err)
		})
		return
	}
	resource := func(change m) m {
		v := m{"source": "/AGENTS.md", "content_hash": make([]byte, 32), "size_bytes": 3, "status": "OK", "instruction_file": m{"content": []byte("abc")}}
		for k, x := range change {
			if x == nil {
				delete(v, k)
			} else {
				v[k] = x
			}
		}
		return v
	}
	push := func(version int, resources ...m) m { return m{"version": version, "resources": resources} }
	accepted := func(want bool) func(*testing.T, m) {
		return func(t *testing.T, v m) {
			if flag(v, "accepted") != want {
				t.Errorf("accepted is %v", flag(v, "accepted"))
			}
		}
	}
	many := make([]m, 1001)
	for i := range many {
		many[i] = resource(m{"source": fmt.Sprint("/", i)})
	}
	calls(t, s, "Agent", "PushContextState", []rpcCase{
		{name: "newer", request: push(5, resource(m{})), check: accepted(true)},
		{name: "the same version", request: push(5), check: accepted(false)},
		{name: "an older version", request: push(4), check: accepted(false)},
		{name: "initial", request: m{"version": 1, "initial": true}, check: accepted(true)},
		{name: "1001 resources", request: push(9, many...), fails: "any"},
		{name: "a body over 256 KiB", request: push(9, resource(m{"instruction_file": m{"content": make([]byte, 256<<10+1)}})), fails: "any"},
		{name: "no source", request: push(9, resource(m{"source": ""})), fails: "any"},
		{name: "a source twice", request: push(9, resource(m{}), resource(m{})), fails: "any"},
		{name: "a source of 1025 bytes", request: push(9, resource(m{"source": strings.Repeat("s", 1025)})), fails: "any"},
		{name: "an error of 4097 bytes", request: push(9, resource(m{"error": strings.Repeat("e", 4097)})), fails: "any"},
		{name: "a hash of 65 bytes", request: push(9, resource(m{"content_hash": make([]byte, 65)})), fails: "any"},
		{name: "status 0", request: push(9, resource(m{"status": 0})), fails: "any"},
		{name: "no body", request: push(9, resource(m{"instruction_file": nil})), fails: "any"},
		{name: "an empty body", request: push(9, resource(m{"instruction_file": nil, "mcp_config": m{}})), check: accepted(true)},
	})
}

func wantCode12(t *testing.T, err error) {
	t.Helper()
	e, ok := err.(*rpcError)
	if !ok || e.code != 12 {
		t.Errorf("the answer is %v, not code 12", err)
	}
}

// TestRPCSocket is the opening of the agent's socket: versions, and the ways to show a token.
func TestRPCSocket(t *testing.T) {
	const row = "GET ws /api/v2/workspaceagents/me/rpc"
	w := stage(t)
	a := w.agent(t, "socket")
	base := w.url + "/api/v2/workspaceagents/me/rpc"
	for minor := 0; minor <= 10; minor++ {
		check(t, row, fmt.Sprintf("version 2.%d", minor), func(t *testing.T) {
			s := w.link(t, a, fmt.Sprintf("2.%d", minor))
			defer s.close()
			s.must("UpdateStats", m{})
			if got := w.info(t, a)["api_version"]; got != fmt.Sprintf("2.%d", minor) {
				t.Errorf("the server remembers version %v", got)
			}
			// What a version lacks answers "unimplemented".
			for name, from := range since {
				if from > minor && strings.HasPrefix(rpcs[name].method, agentService) {
					_, err := s.call(name, m{})
					wantCode12(t, err)
				}
			}
		})
	}
	check(t, row, "no version is 2.0", func(t *testing.T) {
		s, resp, err := dial(t, base, http.Header{"Coder-Session-Token": {a.token}})
		if err != nil {
			t.Fatal(err, answer(resp))
		}
		defer s.close()
		s.must("GetManifest", m{})
		if got := w.info(t, a)["api_version"]; got != "2.0" {
			t.Errorf("the server remembers version %v", got)
		}
	})
	for _, c := range []struct{ version, detail string }{
		{"2.11", "server is at version 2.10, behind requested minor version 2.11"},
		{"3.0", "server is at version 2.10, behind requested major version 3.0"},
		{"1.0", "version 1.0 is no longer supported"},
		{"2", "invalid version string: 2"},
		{"x.1", "invalid major version: x"},
		{"2.y", "invalid minor version: y"},
		{"2.1.0", "invalid version string: 2.1.0"},
	} {
		check(t, row, "version "+c.version, func(t *testing.T) {
			r := request(t, "GET", base+"?version="+c.version, a.token, nil, upgradeHeaders...).wants(t, 400, "Unknown or unsupported API version")
			if got := r.validation(t, "version"); got != c.detail {
				t.Errorf("the detail is %q, not %q", got, c.detail)
			}
		})
	}
	for _, c := range []struct {
		name   string
		url    string
		header http.Header
	}{
		{"header", base, http.Header{"Coder-Session-Token": {a.token}}},
		{"cookie", base, http.Header{"Cookie": {"coder_session_token=" + a.token}}},
		{"bearer", base, http.Header{"Authorization": {"Bearer " + a.token}}},
		{"query", base + "?coder_session_token=" + a.token, nil},
		{"access_token", base + "?access_token=" + a.token, nil},
		{"the cookie counts before the header", base, http.Header{"Cookie": {"coder_session_token=" + a.token}, "Coder-Session-Token": {uuid.NewString()}}},
	} {
		check(t, row, "token by "+c.name, func(t *testing.T) {
			s, resp, err := dial(t, c.url, c.header)
			if err != nil {
				t.Fatal(err, answer(resp))
			}
			defer s.close()
			s.must("GetManifest", m{})
		})
	}
	check(t, row, "no token", func(t *testing.T) {
		request(t, "GET", base, "", nil, upgradeHeaders...).wants(t, 401, `Cookie "coder_session_token" must be provided.`)
	})
	check(t, row, "a token that is no UUID", func(t *testing.T) {
		r := request(t, "GET", base, "abc", nil, upgradeHeaders...).wants(t, 401, "Workspace agent token invalid.")
		if got := r.json(t)["detail"]; got != "An agent token must be a valid UUIDv4. (len 3)" {
			t.Errorf("the detail is %q", got)
		}
	})
	check(t, row, "an unknown token", func(t *testing.T) {
		r := request(t, "GET", base, uuid.NewString(), nil, upgradeHeaders...).wants(t, 401, "Workspace agent not authorized.")
		if got := r.json(t)["detail"]; got != "The agent cannot authenticate until the workspace provision job has been completed. If the job is no longer running, this agent is invalid." {
			t.Errorf("the detail is %q", got)
		}
	})
	check(t, row, "a person's key", func(t *testing.T) {
		request(t, "GET", base, w.key, nil, upgradeHeaders...).wants(t, 401, "Workspace agent token invalid.")
	})
	check(t, row, "no upgrade", func(t *testing.T) {
		request(t, "GET", base+"?version=2.0", a.token, nil).wants(t, 400, "Failed to accept websocket.")
	})
	check(t, row, "no compression is negotiated", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		ws, resp, err := websocket.Dial(ctx, base, &websocket.DialOptions{HTTPHeader: http.Header{"Coder-Session-Token": {a.token}}, CompressionMode: websocket.CompressionContextTakeover})
		if err != nil {
			t.Fatal(err)
		}
		defer ws.CloseNow()
		if got := resp.Header.Get("Sec-WebSocket-Extensions"); got != "" {
			t.Errorf("the server negotiates %q", got)
		}
	})
	check(t, row, "a text message ends it with 1003", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		ws, _, err := websocket.Dial(ctx, base, &websocket.DialOptions{HTTPHeader: http.Header{"Coder-Session-Token": {a.token}}})
		if err != nil {
			t.Fatal(err)
		}
		defer ws.CloseNow()
		if err := ws.Write(ctx, websocket.MessageText, []byte("hello")); err != nil {
			t.Fatal(err)
		}
		for err == nil {
			_, _, err = ws.Read(ctx)
		}
		if got := websocket.CloseStatus(err); got != websocket.StatusUnsupportedData {
			t.Errorf("the close status is %v (%v)", got, err)
		}
	})
	check(t, row, "a role that is not an agent's is not monitored", func(t *testing.T) {
		b := w.agent(t, "unmonitored")
		s, resp, err := dial(t, base+"?version=2.10&role=logs-sender", http.Header{"Coder-Session-Token": {b.token}})
		if err != nil {
			t.Fatal(err, answer(resp))
		}
		defer s.close()
		s.must("GetManifest", m{})
		info := w.info(t, b)
		if info["status"] == "connected" && info["first_connected_at"] == nil {
			t.Errorf("the server says %v", info)
		}
	})
	check(t, row, "first, last and no more connected", func(t *testing.T) {
		b := w.agent(t, "comes-and-goes")
		s := w.link(t, b, "2.10")
		eventually(t, "the agent is connected", func() bool { return w.info(t, b)["status"] == "connected" })
		s.close()
		eventually(t, "the agent is disconnected", func() bool {
			info := w.info(t, b)
			return info["status"] == "disconnected" && info["disconnected_at"] != nil && info["first_connected_at"] != nil
		})
	})
}

// upgradeHeaders ask for a WebSocket, for refusals that come before it.
var upgradeHeaders = []string{"Connection", "Upgrade", "Upgrade", "websocket", "Sec-WebSocket-Version", "13", "Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="}
