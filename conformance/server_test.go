package conformance

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/hashicorp/yamux"
	"tailscale.com/derp/derpserver"
	"tailscale.com/types/key"
)

// stockServer is a small control server of an exact version, from the pages alone: as strict as a stock one
// where an agent could go wrong, and it notes everything that it is asked.
type stockServer struct {
	t        testing.TB
	http     *httptest.Server
	minor    int // of API 2.x
	agent    identity
	manifest m
	// answers replaces the usual answer of a method.
	answers map[string]func(m) (m, error)
	// refuse, when set, answers me/rpc in its place.
	refuse http.HandlerFunc
	// derp gives the map that is streamed; prefix is a path that stands before the API's.
	derp   func() m
	prefix string
	// relay stands before /derp.
	relay func(http.Handler) http.Handler
	// reinit answers me/reinit in place of the usual.
	reinit http.HandlerFunc

	mu       sync.Mutex
	calls    []recorded
	dials    []*http.Request
	requests []*http.Request // all others
	peers    map[string]*coordPeer
	tunnels  map[[2]string]bool // source, destination
	sessions []*yamux.Session
	sockets  []*websocket.Conn
}

// recorded is a call that an agent made.
type recorded struct {
	method  string
	request m
	at      time.Time
}

// coordPeer is a peer with an open Coordinate stream.
type coordPeer struct {
	node  m
	tell  func(updates ...m)
	agent bool
	acked map[string]int // ready_for_handshake by peer
	nodes int
}

// since says from which minor version on there is a method.
var since = map[string]int{"GetAnnouncementBanners": 1, "ScriptCompleted": 3, "GetResourcesMonitoringConfiguration": 4, "PushResourcesMonitoringUsage": 4,
	"ReportConnection": 4, "CreateSubAgent": 6, "DeleteSubAgent": 6, "ListSubAgents": 6, "ReportBoundaryLogs": 7, "UpdateAppStatus": 8, "PushContextState": 10,
	"PostTelemetry": 2, "RefreshResumeToken": 3, "WorkspaceUpdates": 3}

// newStock starts a server with one agent.
func newStock(t testing.TB, minor int) *stockServer {
	t.Helper()
	s := &stockServer{t: t, minor: minor, answers: map[string]func(m) (m, error){}, peers: map[string]*coordPeer{}, tunnels: map[[2]string]bool{},
		agent: identity{"stock", "7d1c9d3e-64a5-4f0e-9b4c-8a1f00c0ffee", "0b0e3a52-9c1d-4f5c-8f7a-6a57c1d4a001"}}
	relay := derpserver.New(key.NewNode(), func(string, ...any) {})
	t.Cleanup(func() { relay.Close() })
	derp := derpserver.AddWebSocketSupport(relay, derpserver.Handler(relay))
	mux := http.NewServeMux()
	mux.HandleFunc("/derp", func(w http.ResponseWriter, r *http.Request) {
		if s.relay != nil {
			s.relay(derp).ServeHTTP(w, r)
			return
		}
		derp.ServeHTTP(w, r)
	})
	mux.HandleFunc("/derp/latency-check", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("GET /api/v2/buildinfo", func(w http.ResponseWriter, _ *http.Request) {
		respond(w, 200, map[string]any{"external_url": "", "version": "v2.20.1", "agent_api_version": "1.0"})
	})
	mux.HandleFunc("GET /api/v2/workspaceagents/me/rpc", s.serveRPC)
	mux.HandleFunc("GET /api/v2/workspaceagents/me/reinit", s.serveReinit)
	mux.HandleFunc("GET /api/v2/workspaceagents/{id}/connection", func(w http.ResponseWriter, _ *http.Request) {
		respond(w, 200, map[string]any{"derp_map": map[string]any{"Regions": map[string]any{}}})
	})
	mux.HandleFunc("GET /api/v2/workspaceagents/{id}/coordinate", func(w http.ResponseWriter, r *http.Request) {
		s.accept(w, r, fmt.Sprintf("aaaaaaaa-0000-4000-8000-%012x", time.Now().UnixNano()&0xffffffffffff), false)
	})
	s.http = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasPrefix(r.URL.Path, "/derp") {
			s.mu.Lock()
			if strings.HasSuffix(r.URL.Path, "/api/v2/workspaceagents/me/rpc") {
				s.dials = append(s.dials, r.Clone(context.Background()))
			} else {
				s.requests = append(s.requests, r.Clone(context.Background()))
			}
			s.mu.Unlock()
		}
		if s.prefix != "" && strings.HasPrefix(r.URL.Path, s.prefix) {
			http.StripPrefix(s.prefix, mux).ServeHTTP(w, r)
			return
		}
		mux.ServeHTTP(w, r)
	}))
	t.Cleanup(func() {
		s.drop()
		s.http.CloseClientConnections()
		s.http.Close()
	})
	id := func(n int) []byte { return uuidBytes(fmt.Sprintf("5f3759df-0000-4000-8000-%012d", n)) }
	s.manifest = m{"agent_id": uuidBytes(s.agent.id), "agent_name": "main", "owner_username": "ada", "workspace_id": id(1), "workspace_name": "engine",
		"environment_variables": map[string]string{"FROM_TEMPLATE": "yes:$USER"}, "vs_code_port_proxy_uri": "", "derp_map": s.derpMap(),
		"scripts": []m{{"log_source_id": id(2), "script": "echo begun", "run_on_start": true, "timeout": time.Minute, "id": id(3)}},
		"apps": []m{{"id": id(4), "slug": "web", "url": s.http.URL + "/healthz", "sharing_level": "OWNER", "health": "INITIALIZING",
			"healthcheck": m{"url": s.http.URL + "/api/v2/buildinfo", "interval": time.Second, "threshold": 3}},
			{"id": id(5), "slug": "quiet", "sharing_level": "OWNER", "health": "DISABLED", "healthcheck": m{}}},
		"metadata": []m{{"key": "load", "display_name": "Load", "script": "echo ' fine '", "interval": time.Duration(1), "timeout": time.Duration(5)},
			{"key": "once", "display_name": "Once", "script": "echo once", "interval": m{}, "timeout": m{}}},
	}
	return s
}

// derpMap has the server's own relay, which an agent has to find from its own access URL.
func (s *stockServer) derpMap() m {
	base, _ := url.Parse(s.http.URL)
	port, _ := strconv.Atoi(base.Port())
	return m{"home_params": m{}, "regions": map[int]m{999: {"region_id": 999, "embedded_relay": true, "region_code": "coder", "region_name": "Coder Embedded Relay",
		"nodes": []m{{"name": "999b", "region_id": 999, "host_name": "not-where-you-think.invalid", "derp_port": port, "stun_port": -1, "force_http": true}}}}}
}

func respond(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.Header().Set("X-Coder-Build-Version", "v2.20.1")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(v)
}

// token looks where a stock server looks, in its order.
func token(r *http.Request) string {
	if c, err := r.Cookie("coder_session_token"); err == nil && c.Value != "" {
		return c.Value
	}
	if q := r.URL.Query().Get("coder_session_token"); q != "" {
		return q
	}
	return r.Header.Get("Coder-Session-Token")
}

func (s *stockServer) serveRPC(w http.ResponseWriter, r *http.Request) {
	if s.refuse != nil {
		s.refuse(w, r)
		return
	}
	if token(r) != s.agent.token {
		respond(w, 401, map[string]any{"message": "Workspace agent not authorized."})
		return
	}
	version := r.URL.Query().Get("version")
	if version == "" {
		version = "2.0"
	}
	major, minor := 0, 0
	detail := ""
	if _, err := fmt.Sscanf(version, "%d.%d", &major, &minor); err != nil {
		detail = "invalid version string: " + version
	} else if major > 2 {
		detail = fmt.Sprintf("server is at version 2.%d, behind requested major version %s", s.minor, version)
	} else if minor > s.minor {
		detail = fmt.Sprintf("server is at version 2.%d, behind requested minor version %s", s.minor, version)
	} else if major < 2 {
		detail = fmt.Sprintf("version %s is no longer supported", version)
	}
	if detail != "" {
		respond(w, 400, map[string]any{"message": "Unknown or unsupported API version", "validations": []any{map[string]any{"field": "version", "detail": detail}}})
		return
	}
	s.accept(w, r, s.agent.id, true)
}

func (s *stockServer) serveReinit(w http.ResponseWriter, r *http.Request) {
	if token(r) != s.agent.token {
		respond(w, 401, map[string]any{"message": "Workspace agent not authorized."})
		return
	}
	if s.reinit != nil {
		s.reinit(w, r)
		return
	}
	if r.URL.Query().Get("wait") == "true" {
		respond(w, 409, map[string]any{"message": "Workspace is not a prebuilt workspace waiting to be claimed."})
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	w.WriteHeader(200)
	io.WriteString(w, "event: ping\n\n")
	w.(http.Flusher).Flush()
	<-r.Context().Done()
}

// accept makes a session of a socket and serves its streams until it ends.
func (s *stockServer) accept(w http.ResponseWriter, r *http.Request, peer string, agent bool) {
	ws, err := websocket.Accept(w, r, nil)
	if err != nil {
		return
	}
	ws.SetReadLimit(-1)
	mx, err := yamux.Server(websocket.NetConn(context.Background(), ws, websocket.MessageBinary), muxConfig())
	if err != nil {
		return
	}
	s.mu.Lock()
	s.sessions, s.sockets = append(s.sessions, mx), append(s.sockets, ws)
	s.mu.Unlock()
	defer ws.CloseNow()
	for {
		stream, err := mx.AcceptStream()
		if err != nil {
			return
		}
		go func() {
			defer stream.Close()
			c := newCall(stream)
			err := s.serveCall(c, peer, agent)
			if err == nil { // the caller closes the stream
				c.SetReadDeadline(time.Now().Add(patience))
				io.Copy(io.Discard, c.r)
			}
			if err != nil {
				s.mu.Lock()
				s.calls = append(s.calls, recorded{"broken: " + err.Error(), nil, time.Now()})
				s.mu.Unlock()
			}
		}()
	}
}

// drop ends all sessions, as a server that goes down.
func (s *stockServer) drop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, ws := range s.sockets {
		ws.Close(websocket.StatusGoingAway, "")
		s.sessions[i].Close()
	}
	s.sockets, s.sessions = nil, nil
}

// fail answers with an Error packet.
func (c *call) fail(code uint64, text string) error {
	return c.send(packetError, append(binary.BigEndian.AppendUint64(nil, code), text...))
}

func (s *stockServer) serveCall(c *call, peer string, agent bool) error {
	p, err := readPacket(c.r)
	if err == nil && p.kind == packetMetadata {
		p, err = readPacket(c.r)
	}
	if err != nil || p.kind != packetInvoke || p.stream != 1 {
		return fmt.Errorf("a stream began with %v, %v", p, err)
	}
	c.seen = p.id
	path := string(p.data)
	name := path[strings.LastIndex(path, "/")+1:]
	r, ok := rpcs[name]
	if !ok || r.method != path || agent == false && strings.HasPrefix(path, agentService) {
		return c.fail(0, fmt.Sprintf("protocol error: unknown rpc: %q", path))
	}
	if name == "Coordinate" {
		return s.serveCoordinate(&stream{c, r}, peer, agent)
	}
	raw, err := c.next()
	if err != nil {
		return fmt.Errorf("%s without a request: %w", name, err)
	}
	req, err := decode(r.request, raw)
	if err != nil {
		return err
	}
	if agent {
		s.mu.Lock()
		s.calls = append(s.calls, recorded{name, req, time.Now()})
		s.mu.Unlock()
	}
	if since[name] > s.minor {
		return c.fail(0, fmt.Sprintf("protocol error: unknown rpc: %q", path))
	}
	if name == "StreamDERPMaps" {
		derp := s.derpMap
		if s.derp != nil {
			derp = s.derp
		}
		if err := c.send(packetMessage, encode("tailnet.DERPMap", derp())); err != nil {
			return err
		}
		io.Copy(io.Discard, c.r) // until the caller leaves
		return nil
	}
	resp, err := s.answer(name, req)
	if err != nil {
		var e *rpcError
		if errors.As(err, &e) {
			return c.fail(e.code, e.text)
		}
		return c.fail(0, err.Error())
	}
	if err := c.send(packetMessage, encode(r.response, resp)); err != nil {
		return err
	}
	return c.send(packetCloseSend, nil)
}

func (s *stockServer) answer(name string, req m) (m, error) {
	if f := s.answers[name]; f != nil {
		return f(req)
	}
	switch name {
	case "GetManifest":
		return s.manifest, nil
	case "UpdateStartup":
		return sub(req, "startup"), nil
	case "UpdateLifecycle":
		return sub(req, "lifecycle"), nil
	case "UpdateStats":
		return m{"report_interval": 2 * time.Second}, nil
	case "GetServiceBanner":
		return m{"enabled": true, "message": "one banner"}, nil
	case "GetAnnouncementBanners":
		return m{"announcement_banners": []m{{"enabled": true, "message": "first banner"}, {"enabled": true, "message": "second banner"}, {"message": "off"}}}, nil
	case "GetResourcesMonitoringConfiguration":
		return m{"config": m{"num_datapoints": 2, "collection_interval_seconds": 1}, "memory": m{"enabled": true}, "volumes": []m{{"enabled": true, "path": "/"}}}, nil
	case "RefreshResumeToken", "WorkspaceUpdates", "PostTelemetry":
		return nil, &rpcError{12, "Unimplemented"}
	}
	return m{}, nil
}

// serveCoordinate tells peers that share a tunnel of each other.
func (s *stockServer) serveCoordinate(c *stream, id string, agent bool) error {
	c.SetDeadline(time.Time{})
	var writing sync.Mutex
	p := &coordPeer{agent: agent, acked: map[string]int{}, tell: func(updates ...m) {
		writing.Lock()
		defer writing.Unlock()
		c.send(packetMessage, encode("tailnet.CoordinateResponse", m{"peer_updates": updates}))
	}}
	s.mu.Lock()
	s.peers[id] = p
	for other := range s.peers {
		if s.shareLocked(id, other) && s.peers[other].node != nil {
			p.tell(m{"id": uuidBytes(other), "node": s.peers[other].node, "kind": "NODE", "reason": "init"})
			s.peers[other].nodes++
		}
	}
	s.mu.Unlock()
	how := "LOST"
	for {
		raw, err := c.next()
		if err != nil {
			break
		}
		req, err := decode("tailnet.CoordinateRequest", raw)
		if err != nil {
			return err
		}
		s.mu.Lock()
		if agent {
			s.calls = append(s.calls, recorded{"Coordinate", req, time.Now()})
		}
		if has(req, "update_self") {
			p.node = sub(sub(req, "update_self"), "node")
			s.tellLocked(id, m{"id": uuidBytes(id), "node": p.node, "kind": "NODE", "reason": "node update"})
		}
		if has(req, "add_tunnel") {
			to := uuidText(blob(sub(req, "add_tunnel"), "id"))
			s.tunnels[[2]string{id, to}] = true
			if other := s.peers[to]; other != nil {
				if other.node != nil {
					p.tell(m{"id": uuidBytes(to), "node": other.node, "kind": "NODE", "reason": "add tunnel"})
				}
				if p.node != nil {
					other.tell(m{"id": uuidBytes(id), "node": p.node, "kind": "NODE", "reason": "add tunnel"})
				}
			}
		}
		for _, x := range list(req, "ready_for_handshake") {
			to := uuidText(blob(x.(m), "id"))
			p.acked[to]++
			if other := s.peers[to]; other != nil && s.shareLocked(id, to) {
				other.tell(m{"id": uuidBytes(id), "kind": "READY_FOR_HANDSHAKE"})
			}
		}
		s.mu.Unlock()
		if has(req, "disconnect") {
			how = "DISCONNECTED"
			break
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.peers[id] == p {
		s.tellLocked(id, m{"id": uuidBytes(id), "kind": how})
		delete(s.peers, id)
		for tunnel := range s.tunnels {
			if tunnel[0] == id {
				delete(s.tunnels, tunnel)
			}
		}
	}
	return nil
}

func (s *stockServer) shareLocked(a, b string) bool {
	return s.tunnels[[2]string{a, b}] || s.tunnels[[2]string{b, a}]
}

func (s *stockServer) tellLocked(id string, update m) {
	for other, p := range s.peers {
		if other != id && s.shareLocked(id, other) {
			p.tell(update)
		}
	}
}

// called returns the calls of a method so far.
func (s *stockServer) called(method string) []m {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []m
	for _, c := range s.calls {
		if c.method == method {
			all = append(all, c.request)
		}
	}
	return all
}

// methods returns the names of all that was called, each once.
func (s *stockServer) methods() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []string
	for _, c := range s.calls {
		if !slices.Contains(all, c.method) {
			all = append(all, c.method)
		}
	}
	slices.Sort(all)
	return all
}

// awaits waits for a call of the method that the condition holds for.
func (s *stockServer) awaits(t testing.TB, method string, holds func(m) bool) m {
	t.Helper()
	var found m
	eventually(t, "a call of "+method+" as expected", func() bool {
		for _, req := range s.called(method) {
			if holds == nil || holds(req) {
				found = req
				return true
			}
		}
		return false
	})
	return found
}

// world is this server, for the second client.
func (s *stockServer) world() *world { return &world{url: s.http.URL, key: "any"} }

// berthd runs the agent against this server, named by the variables that a stock deployment sets.
func (s *stockServer) berthd(t *testing.T, env ...string) *daemon {
	t.Helper()
	machine := own(t)
	env = append([]string{"CODER_AGENT_URL=" + s.http.URL, "CODER_AGENT_TOKEN=" + s.agent.token, "BERTH_LOG_LEVEL=debug"}, env...)
	return machine.startFor(t, env, "berthd", "run", "--state-dir", machine.home+"/state")
}
