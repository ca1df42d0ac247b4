package conformance

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/google/uuid"
)

// The fifteen traps, each with a test of its own name, on the sides that it concerns.

// Trap 1: an agent dials exactly its own version and never negotiates down; buildinfo means nothing.
func TestTrap01ExactVersion(t *testing.T) {
	w := stage(t)
	a := w.agent(t, "trap-one")
	for _, version := range []string{"2.6", "2.10"} { // the two stock agents
		s := w.link(t, a, version)
		s.must("GetManifest", m{})
		if got := w.info(t, a)["api_version"]; got != version {
			t.Errorf("the server made %v of %s", got, version)
		}
		s.close()
	}
	if v := request(t, "GET", w.url+"/api/v2/buildinfo", "", nil).json(t); v["agent_api_version"] != "1.0" {
		t.Errorf("agent_api_version is %v", v["agent_api_version"])
	}
}

// Trap 2: the agent of 2025 shows its token in a cookie, the one of 2026 in a header.
func TestTrap02CookieOrHeader(t *testing.T) {
	w := stage(t)
	a := w.agent(t, "trap-two")
	for name, h := range map[string]http.Header{"cookie": {"Cookie": {"coder_session_token=" + a.token}}, "header": {"Coder-Session-Token": {a.token}}} {
		s, resp, err := dial(t, w.url+"/api/v2/workspaceagents/me/rpc?version=2.6", h)
		if err != nil {
			t.Fatalf("me/rpc by %s: %v%s", name, err, answer(resp))
		}
		s.must("GetManifest", m{})
		if _, resp := eventsBy(t, w.url+"/api/v2/workspaceagents/me/reinit", h); resp.StatusCode != 200 {
			t.Errorf("reinit by %s:%s", name, answer(resp))
		}
	}
	// The command line of 2025 does so with a person's key on its WebSockets.
	for _, path := range []string{"coordinate?version=2.0", "logs?follow"} {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		ws, resp, err := websocket.Dial(ctx, w.url+"/api/v2/workspaceagents/"+a.id+"/"+path, &websocket.DialOptions{HTTPHeader: http.Header{"Cookie": {"coder_session_token=" + w.key}}})
		if err != nil {
			t.Errorf("%s by cookie: %v%s", path, err, answer(resp))
			continue
		}
		ws.CloseNow()
	}
	// berthd's own token is where both kinds of servers look.
	s := newStock(t, 6)
	s.berthd(t)
	s.awaits(t, "UpdateStartup", nil)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.dials {
		if r.Header.Get("Coder-Session-Token") != s.agent.token {
			t.Error("berthd's dial has no token in its header")
		}
	}
}

// Trap 3: every call has a yamux stream and a dRPC connection of its own, with stream id 1; both services
// share the session.
func TestTrap03StreamPerCall(t *testing.T) {
	w := stage(t)
	s := w.link(t, w.agent(t, "trap-three"), "2.10")
	coord := s.stream("Coordinate", nil)
	maps := s.stream("StreamDERPMaps", m{})
	if _, err := maps.hear(); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for range 100 {
		all.Go(func() {
			if _, err := s.call("UpdateStats", m{}); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if err := coord.say(m{"disconnect": m{}}); err != nil {
		t.Error(err)
	}
	stock := newStock(t, 10)
	stock.berthd(t)
	stock.awaits(t, "UpdateStats", nil)
	stock.awaits(t, "Coordinate", nil)
	for _, name := range stock.methods() { // serveCall is strict about streams and ids
		if strings.HasPrefix(name, "broken") {
			t.Error(name)
		}
	}
}

// Trap 4: what is not supported answers code 12; a client calls RefreshResumeToken even at 2.0.
func TestTrap04Unimplemented(t *testing.T) {
	w := stage(t)
	a := w.agent(t, "trap-four")
	s := w.link(t, a, "2.0")
	for name := range since {
		if strings.HasPrefix(rpcs[name].method, agentService) {
			_, err := s.call(name, m{})
			wantCode12(t, err)
		}
	}
	if _, err := w.coordinate(t, a).call("RefreshResumeToken", m{}); err != nil {
		wantCode12(t, err)
	}
	// berthd takes code 12 for "absent" and keeps its link.
	stock := newStock(t, 10)
	for _, name := range []string{"GetAnnouncementBanners", "ScriptCompleted", "ReportConnection", "GetResourcesMonitoringConfiguration"} {
		stock.answers[name] = func(m) (m, error) { return nil, &rpcError{12, "Unimplemented"} }
	}
	stock.berthd(t)
	stock.awaits(t, "UpdateLifecycle", func(r m) bool { return num(sub(r, "lifecycle"), "state") == 5 })
	eventually(t, "stats go on", func() bool { return len(stock.called("UpdateStats")) >= 3 })
	stock.mu.Lock()
	defer stock.mu.Unlock()
	if len(stock.dials) != 1 {
		t.Errorf("berthd dialed %d times", len(stock.dials))
	}
}

// Trap 5: metadata's interval and timeout carry seconds in the nanosecond field; nothing else does.
func TestTrap05MetadataSeconds(t *testing.T) {
	w := stage(t)
	v := w.link(t, w.agent(t, "full"), "2.10").must("GetManifest", m{})
	d := list(v, "metadata")[0].(m)
	if i, o := sub(d, "interval"), sub(d, "timeout"); num(i, "seconds") != 0 || num(i, "nanos") != 10 || num(o, "seconds") != 0 || num(o, "nanos") != 2 {
		t.Errorf("the interval is %v and the timeout %v, not 10 and 2 nanoseconds", i, o)
	}
	for _, x := range list(v, "scripts") {
		if d := sub(x.(m), "timeout"); flag(x.(m), "run_on_start") && num(d, "seconds") != 600 {
			t.Errorf("the script's timeout is %v", d)
		}
	}
	stock := newStock(t, 10)
	stock.berthd(t)
	eventually(t, "the metadata of every second is collected three times, that of interval 0 once", func() bool {
		count := map[string]int{}
		for _, r := range stock.called("BatchUpdateMetadata") {
			for _, x := range list(r, "metadata") {
				if !has(x.(m), "result") || text(x.(m), "key") == "load" && strings.TrimSpace(text(sub(x.(m), "result"), "value")) != "fine" {
					t.Errorf("a report is %v", x)
				}
				count[text(x.(m), "key")]++
			}
		}
		if count["once"] > 1 {
			t.Fatalf("interval 0 was collected %d times", count["once"])
		}
		return count["load"] >= 3 && count["once"] == 1
	})
}

// Trap 6: missing home_params, a missing health check, enums of 0 and short UUIDs crash a stock agent.
func TestTrap06ManifestShape(t *testing.T) {
	w := stage(t)
	v := w.link(t, w.agent(t, "full"), "2.10").must("GetManifest", m{})
	if !has(sub(v, "derp_map"), "home_params") {
		t.Error("no home_params")
	}
	if len(list(v, "apps")) == 0 || len(list(v, "scripts")) == 0 {
		t.Fatal("nothing to look at")
	}
	for _, x := range list(v, "apps") {
		if app := x.(m); !has(app, "healthcheck") || num(app, "sharing_level") == 0 || num(app, "health") == 0 || len(blob(app, "id")) != 16 {
			t.Errorf("the app is %v", app)
		}
	}
	for _, x := range list(v, "scripts") {
		if script := x.(m); len(blob(script, "id")) != 16 || len(blob(script, "log_source_id")) != 16 {
			t.Errorf("the script is %v", script)
		}
	}
	maps := w.link(t, w.agent(t, "trap-six"), "2.10").stream("StreamDERPMaps", m{})
	if d, err := maps.hear(); err != nil || !has(d, "home_params") {
		t.Errorf("the streamed map is %v, %v", d, err)
	}
}

// Trap 7: the version in UpdateStartup is semantic, with a leading v.
func TestTrap07SemanticVersion(t *testing.T) {
	w := stage(t)
	s := w.link(t, w.agent(t, "trap-seven"), "2.10")
	for version, good := range map[string]bool{"v1.2.3": true, "v2.0.0-rc.1+sha": true, "1.2.3": false, "": false, "vx": false, "v1.2.3.4": false} {
		_, err := s.call("UpdateStartup", m{"startup": m{"version": version}})
		if good && err != nil {
			t.Errorf("%q: %v", version, err)
		} else if !good {
			wantError(t, err, fmt.Sprintf("invalid agent semver version %q", version))
		}
	}
	stock := newStock(t, 10)
	stock.berthd(t)
	if v := text(sub(stock.awaits(t, "UpdateStartup", nil), "startup"), "version"); !semver.MatchString(v) {
		t.Errorf("berthd's version is %q", v)
	}
}

// Trap 8: the form of a node.
func TestTrap08Node(t *testing.T) {
	stock := newStock(t, 10)
	stock.berthd(t)
	stock.awaits(t, "Coordinate", func(r m) bool { return num(sub(sub(r, "update_self"), "node"), "preferred_derp") != 0 })
	id := uuidBytes(stock.agent.id)
	want := agentAddresses(id)
	for _, r := range stock.called("Coordinate") {
		if !has(r, "update_self") {
			continue
		}
		node := sub(sub(r, "update_self"), "node")
		if _, _, _, err := checkNode(node); err != nil { // a home of 0 among them: such a node is not to be sent
			t.Error(err)
		}
		if num(node, "id") != nodeID(id) {
			t.Errorf("the id is %d, not %d", num(node, "id"), nodeID(id))
		}
		if num(node, "preferred_derp") != 999 {
			t.Errorf("the home is %d", num(node, "preferred_derp"))
		}
		addresses := fmt.Sprintf("[%s/128 %s/128]", want[0], want[1])
		if fmt.Sprint(node["addresses"]) != addresses || fmt.Sprint(node["allowed_ips"]) != addresses {
			t.Errorf("addresses %v, allowed_ips %v, not %s", node["addresses"], node["allowed_ips"], addresses)
		}
	}
	// The server's side: TestCoordinate refuses other addresses, in addresses and in allowed_ips.
	w := stage(t)
	a := w.agent(t, "trap-eight")
	c := w.link(t, a, "2.10").stream("Coordinate", nil)
	c.say(m{"update_self": m{"node": fakeNode(1, want[0].String()+"/128")}})
	c.awaitError(t, "invalid node address, got ", true)
}

// Trap 9: the agent acknowledges every NODE; clients never do.
func TestTrap09ReadyForHandshake(t *testing.T) {
	stock := newStock(t, 10)
	stock.berthd(t)
	c := stock.world().connect(t, stock.agent)
	if c.readyAfter > 4*time.Second {
		t.Errorf("the client was ready %v after the node: the acknowledgment is missing, and the limit of 5 s did it", c.readyAfter)
	}
	acks := func(peer string) int {
		stock.mu.Lock()
		defer stock.mu.Unlock()
		return stock.peers[stock.agent.id].acked[peer]
	}
	// Repeats are acknowledged, and nodes without a home, and ones that cannot be decoded.
	peer := uuid.NewString()
	homeless, broken := fakeNode(1, clientAddress().String()+"/128"), fakeNode(1, clientAddress().String()+"/128")
	homeless["preferred_derp"], broken["key"] = 0, []byte("short")
	good := fakeNode(1, clientAddress().String()+"/128")
	for i, node := range []m{good, good, homeless, broken} {
		stock.mu.Lock()
		tell := stock.peers[stock.agent.id].tell
		stock.mu.Unlock()
		tell(m{"id": uuidBytes(peer), "node": node, "kind": "NODE"})
		eventually(t, fmt.Sprintf("node %d is acknowledged", i), func() bool { return acks(peer) == i+1 })
	}
	// berth's client is refused by the server if it acknowledges, and so would not get through.
	w := stage(t)
	a := w.agent(t, "trap-nine")
	w.runAgent(t, a)
	if out, err := w.berth(t, "", "ssh", "trap-nine", "echo through"); err != nil || strings.TrimSpace(out) != "through" {
		t.Errorf("berth ssh: %q, %v", out, err)
	}
}

// Trap 10: TSMP pings are answered, or the agent is unreachable.
func TestTrap10TSMP(t *testing.T) {
	w := stage(t)
	c := w.connect(t, w.berthd(t)) // waits for a pong itself
	if err := c.node.pingTSMP(c.target, patience); err != nil {
		t.Error(err)
	}
}

// Trap 11: the latency check chooses the home region, never STUN.
func TestTrap11HomeRegion(t *testing.T) {
	dead := newStock(t, 10)
	dead.http.Close() // a region whose latency check does not answer
	stock := newStock(t, 10)
	derpMap := stock.derpMap()
	regions := derpMap["regions"].(map[int]m)
	other := dead.derpMap()["regions"].(map[int]m)[999]
	node := other["nodes"].([]m)[0]
	node["name"], node["region_id"], node["host_name"] = "1a", 1, "127.0.0.1"
	regions[1] = m{"region_id": 1, "region_code": "dead", "region_name": "Dead", "nodes": []m{node}}
	regions[1000] = m{"region_id": 1000, "region_code": "stun", "region_name": "STUN", "nodes": []m{{"name": "1000stun0", "region_id": 1000, "host_name": "127.0.0.1", "stun_port": 9, "stun_only": true}}}
	stock.derp = func() m { return derpMap }
	stock.manifest["derp_map"] = derpMap
	stock.berthd(t)
	stock.awaits(t, "Coordinate", func(r m) bool { return has(r, "update_self") })
	for _, r := range stock.called("Coordinate") {
		if home := num(sub(sub(r, "update_self"), "node"), "preferred_derp"); has(r, "update_self") && home != 999 {
			t.Errorf("the home is region %d", home)
		}
	}
}

// Trap 12: the DERP map in JSON has Go's names, and the path is /derp at the root of the host.
func TestTrap12DERPMapNames(t *testing.T) {
	w := stage(t)
	a := w.agent(t, "trap-twelve")
	v := request(t, "GET", w.url+"/api/v2/workspaceagents/"+a.id+"/connection", w.key, nil).json(t)
	checkDERPMap(t, w, v["derp_map"])
	var walk func(any)
	walk = func(v any) {
		object, ok := v.(map[string]any)
		for key, value := range object {
			if strings.Contains(key, "_") || key == "regions" || key == "nodes" {
				t.Errorf("the key %q is not one of Go's", key)
			}
			walk(value)
		}
		if l, ok2 := v.([]any); !ok && ok2 {
			for _, x := range l {
				walk(x)
			}
		}
	}
	walk(v["derp_map"])
	// An access URL with a path prefix does not move the relay: berthd asks /derp.
	stock := newStock(t, 10)
	stock.prefix = "/some/prefix"
	machine := own(t)
	machine.startFor(t, []string{"CODER_AGENT_URL=" + stock.http.URL + stock.prefix, "CODER_AGENT_TOKEN=" + stock.agent.token, "BERTH_LOG_LEVEL=debug"}, "berthd", "run", "--state-dir", machine.home+"/state")
	stock.awaits(t, "Coordinate", func(r m) bool { return num(sub(sub(r, "update_self"), "node"), "preferred_derp") == 999 })
}

// Trap 13: a terminal's init is a little-endian length and JSON with Go's names in one write; after it the
// names are lower case.
func TestTrap13PTYInit(t *testing.T) {
	w := stage(t)
	a := w.agent(t, "trap-thirteen")
	g := w.runAgent(t, a)
	ws, resp, err := socket(t, w.url+"/api/v2/workspaceagents/"+a.id+"/pty?reconnect="+uuid.NewString()+"&height=31&width=101&command=cat", w.key)
	if err != nil {
		t.Fatal(err, answer(resp))
	}
	ws.SetReadLimit(-1)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	ws.Write(ctx, 2, []byte(`{"data":"typed\r","height":41,"width":121}`))
	var seen []byte
	for !bytes.Contains(seen, []byte("typed")) {
		_, b, err := ws.Read(ctx)
		if err != nil {
			t.Fatal(err)
		}
		seen = append(seen, b...)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.inits) != 1 {
		t.Fatalf("%d inits", len(g.inits))
	}
	first := g.inits[0] // what one read of the length and one of the body gave, as a stock agent reads
	if first.size != len(first.body) {
		t.Errorf("the length says %d, one read gave %d bytes", first.size, len(first.body))
	}
	var v map[string]any
	if err := json.Unmarshal(first.body, &v); err != nil {
		t.Fatal(err)
	}
	if v["Height"] != 31.0 || v["Width"] != 101.0 || v["Command"] != "cat" || v["ID"] == nil {
		t.Errorf("the init is %s", first.body)
	}
}

// Trap 14: a port without a service is dialed on loopback before the handshake completes.
func TestTrap14ForwardedPorts(t *testing.T) {
	w := stage(t)
	forwardCases(t, w.connect(t, w.berthd(t)))
}

// Trap 15: log-source is 201, a batch over the limit is rejected whole, follow messages stay below 32 KiB
// and are text.
func TestTrap15Logs(t *testing.T) {
	w := stage(t)
	a := w.agent(t, "trap-fifteen")
	source := uuid.New()
	me := w.url + "/api/v2/workspaceagents/me/"
	request(t, "POST", me+"log-source", a.token, map[string]any{"id": source.String(), "display_name": "Trap"}).wants(t, 201, "")
	ws, resp, err := socket(t, w.url+"/api/v2/workspaceagents/"+a.id+"/logs?follow", w.key)
	if err != nil {
		t.Fatal(err, answer(resp))
	}
	s := w.link(t, a, "2.10")
	var lines []m
	for range 30 {
		lines = append(lines, m{"output": strings.Repeat("l", 10_000), "level": "INFO"})
	}
	s.must("BatchCreateLogs", m{"log_source_id": source[:], "logs": lines})
	for n := 0; n < len(lines); { // the library refuses messages over 32 KiB, as stock readers do
		kind, b, err := message(t, ws)
		if err != nil || kind != 1 {
			t.Fatalf("%v %v", kind, err)
		}
		var entries []any
		if err := json.Unmarshal(b, &entries); err != nil {
			t.Fatal(err)
		}
		n += len(entries)
	}
	if v := s.must("BatchCreateLogs", m{"log_source_id": source[:], "logs": []m{{"output": "fits"}, {"output": strings.Repeat("l", 1<<20-300_000)}}}); !flag(v, "log_limit_exceeded") {
		t.Error("log_limit_exceeded is not set")
	}
	if n := len(w.logs(t, a, "")); n != len(lines) {
		t.Errorf("%d lines are stored, not %d", n, len(lines))
	}
	// berthd takes the overflow for success, and sends nothing more.
	stock := newStock(t, 10)
	stock.answers["BatchCreateLogs"] = func(m) (m, error) { return m{"log_limit_exceeded": true}, nil }
	stock.manifest["scripts"] = []m{{"log_source_id": make([]byte, 16), "script": "for i in 1 2 3 4; do echo $i; sleep 0.5; done", "run_on_start": true, "id": source[:]}}
	stock.berthd(t)
	stock.awaits(t, "UpdateLifecycle", func(r m) bool { return num(sub(r, "lifecycle"), "state") == 5 })
	eventually(t, "stats go on", func() bool { return len(stock.called("UpdateStats")) >= 3 })
	if n := len(stock.called("BatchCreateLogs")); n != 1 {
		t.Errorf("%d batches were sent", n)
	}
	stock.mu.Lock()
	defer stock.mu.Unlock()
	if len(stock.dials) != 1 {
		t.Errorf("berthd dialed %d times", len(stock.dials))
	}
}
