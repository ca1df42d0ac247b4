package conformance

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
)

// fakeNode is a node as far as the coordinator looks at it.
func fakeNode(id int64, addresses ...string) m {
	_, key := newKey()
	_, disco := newKey()
	return m{"id": id, "as_of": time.Now(), "key": append([]byte("np"), key[:]...), "disco": fmt.Sprintf("discokey:%x", disco), "preferred_derp": 999,
		"derp_latency": map[string]float64{"999-v4": 0.01}, "addresses": addresses, "allowed_ips": addresses}
}

func agentNode(a identity) m {
	var addresses []string
	for _, addr := range agentAddresses(uuidBytes(a.id)) {
		addresses = append(addresses, addr.String()+"/128")
	}
	return fakeNode(nodeID(uuidBytes(a.id)), addresses...)
}

// peerUpdates reads until an update about the peer (any, when id is "") of the kind has come.
func (c *stream) awaitUpdate(t testing.TB, kind, id string) m {
	t.Helper()
	for {
		v, err := c.hear()
		if err != nil {
			t.Fatalf("waiting for %s of %s: %v", kind, id, err)
		}
		if e := text(v, "error"); e != "" {
			t.Fatalf("waiting for %s: error %q", kind, e)
		}
		for _, x := range list(v, "peer_updates") {
			u := x.(m)
			if enum("tailnet.CoordinateResponse.PeerUpdate.Kind", num(u, "kind")) == kind && (id == "" || uuidText(blob(u, "id")) == id) {
				return u
			}
		}
	}
}

// awaitError reads until the coordinator's error, and checks that the stream ends or goes on as it should.
func (c *stream) awaitError(t testing.TB, words string, ends bool) {
	t.Helper()
	for {
		v, err := c.hear()
		if err != nil {
			t.Fatalf("waiting for the error %q: %v", words, err)
		}
		if e := text(v, "error"); e != "" {
			if !strings.Contains(e, words) {
				t.Errorf("the error is %q, not %q", e, words)
			}
			break
		}
	}
	if ends {
		for {
			if _, err := c.hear(); err != nil {
				return
			}
		}
	}
}

func TestCoordinate(t *testing.T) {
	const row = "Tailnet.Coordinate"
	outer, w := t, stage(t)
	a := w.agent(t, "coordinated")
	other := w.agent(t, "elsewhere")
	as := w.link(t, a, "2.10")
	tunnel := m{"add_tunnel": m{"id": uuidBytes(a.id)}}
	client := func(t *testing.T) (*stream, m) {
		s := w.coordinate(t, a)
		return s.stream("Coordinate", nil), fakeNode(1, clientAddress().String()+"/128")
	}
	agent := as.stream("Coordinate", nil)
	node := agentNode(a)
	if err := agent.say(m{"update_self": m{"node": node}}); err != nil {
		t.Fatal(err)
	}

	var c *stream
	var clientID string
	check(t, row, "a tunnel brings the nodes to both ends", func(t *testing.T) {
		s := w.coordinate(outer, a) // it lives on in the cases that follow
		own := fakeNode(1, clientAddress().String()+"/128")
		c = s.stream("Coordinate", nil)
		c.say(m{"update_self": m{"node": own}})
		c.say(tunnel)
		u := c.awaitUpdate(t, "NODE", a.id)
		if !bytes.Equal(blob(sub(u, "node"), "key"), node["key"].([]byte)) || text(sub(u, "node"), "disco") != node["disco"] || num(sub(u, "node"), "id") != node["id"] {
			t.Errorf("the agent's node is %v, not %v", u, node)
		}
		u = agent.awaitUpdate(t, "NODE", "")
		clientID = uuidText(blob(u, "id"))
		if !bytes.Equal(blob(sub(u, "node"), "key"), own["key"].([]byte)) {
			t.Errorf("the client's node is %v, not %v", u, own)
		}
	})
	if clientID == "" {
		t.FailNow()
	}
	check(t, row, "ready_for_handshake goes to the client", func(t *testing.T) {
		agent.say(m{"ready_for_handshake": []m{{"id": uuidBytes(clientID)}}})
		if u := c.awaitUpdate(t, "READY_FOR_HANDSHAKE", a.id); has(u, "node") {
			t.Errorf("readiness comes with a node: %v", u)
		}
	})
	check(t, row, "ready_for_handshake without a tunnel is not fatal", func(t *testing.T) {
		stranger := uuid.New()
		agent.say(m{"ready_for_handshake": []m{{"id": stranger[:]}}})
		agent.awaitError(t, fmt.Sprintf("ready for handshake error: you do not share a tunnel with %q", stranger), false)
		node["preferred_derp"] = 1000
		agent.say(m{"update_self": m{"node": node}})
		if u := c.awaitUpdate(t, "NODE", a.id); num(sub(u, "node"), "preferred_derp") != 1000 {
			t.Errorf("the update is %v", u)
		}
	})
	check(t, row, "an equal node is not sent again", func(t *testing.T) {
		agent.say(m{"update_self": m{"node": node}})
		node["preferred_derp"] = 1001
		agent.say(m{"update_self": m{"node": node}})
		if u := c.awaitUpdate(t, "NODE", a.id); num(sub(u, "node"), "preferred_derp") != 1001 {
			t.Errorf("the next update is %v", u)
		}
	})
	check(t, row, "a tunnel before the agent is there waits for it", func(t *testing.T) {
		s := w.coordinate(t, other)
		early := s.stream("Coordinate", nil)
		early.say(m{"add_tunnel": m{"id": uuidBytes(other.id)}})
		early.say(m{"update_self": m{"node": fakeNode(2, clientAddress().String()+"/128")}})
		late := w.link(t, other, "2.0").stream("Coordinate", nil)
		late.say(m{"update_self": m{"node": agentNode(other)}})
		early.awaitUpdate(t, "NODE", other.id)
		late.awaitUpdate(t, "NODE", "")
	})
	check(t, row, "remove_tunnel disconnects both ends", func(t *testing.T) {
		c.say(m{"remove_tunnel": m{"id": uuidBytes(a.id)}})
		c.awaitUpdate(t, "DISCONNECTED", a.id)
		agent.awaitUpdate(t, "DISCONNECTED", clientID)
		c.say(tunnel)
		c.awaitUpdate(t, "NODE", a.id)
		agent.awaitUpdate(t, "NODE", clientID)
	})
	check(t, row, "disconnect is told, and ends the stream", func(t *testing.T) {
		c.say(m{"disconnect": m{}})
		for {
			if _, err := c.hear(); err != nil {
				break
			}
		}
		agent.awaitUpdate(t, "DISCONNECTED", clientID)
	})
	check(t, row, "a client that is gone is LOST", func(t *testing.T) {
		s := w.coordinate(t, a)
		gone := s.stream("Coordinate", nil)
		gone.say(m{"update_self": m{"node": fakeNode(3, clientAddress().String()+"/128")}})
		gone.say(tunnel)
		gone.awaitUpdate(t, "NODE", a.id)
		id := uuidText(blob(agent.awaitUpdate(t, "NODE", ""), "id"))
		s.close()
		agent.awaitUpdate(t, "LOST", id)
	})
	check(t, row, "several fields in one request", func(t *testing.T) {
		c, own := client(t)
		c.say(m{"update_self": m{"node": own}, "add_tunnel": m{"id": uuidBytes(a.id)}})
		c.awaitUpdate(t, "NODE", a.id)
		agent.awaitUpdate(t, "NODE", "")
	})

	for _, bad := range []struct {
		name    string
		request m
		words   string
	}{
		{"another agent", m{"add_tunnel": m{"id": uuidBytes(other.id)}}, fmt.Sprintf("authorization: invalid agent id, expected %s, got %s", a.id, other.id)},
		{"an address with 64 bits", m{"update_self": m{"node": fakeNode(1, "fd7a:115c:a1e0::1/64")}}, "authorization: invalid address bits, expected 128, got 64"},
		{"an address that is none", m{"update_self": m{"node": fakeNode(1, "no prefix")}}, "authorization: "},
		{"ready_for_handshake", m{"ready_for_handshake": []m{{"id": uuidBytes(a.id)}}}, "authorization: clients may not send ready_for_handshake"},
		{"a tunnel to 15 bytes", m{"add_tunnel": m{"id": make([]byte, 15)}}, ""},
	} {
		check(t, row, "a client may not: "+bad.name, func(t *testing.T) {
			c, _ := client(t)
			c.say(bad.request)
			c.awaitError(t, bad.words, true)
		})
	}
	mine := agentAddresses(uuidBytes(a.id))[0].String() + "/128"
	theirs := agentAddresses(uuidBytes(other.id))[0].String() + "/128"
	with := func(addresses, allowed []string) m {
		n := fakeNode(1, addresses...)
		n["allowed_ips"] = allowed
		return m{"update_self": m{"node": n}}
	}
	for _, bad := range []struct {
		name    string
		request m
		words   []string
	}{
		{"open a tunnel", m{"add_tunnel": m{"id": uuidBytes(other.id)}}, []string{"authorization: agents cannot open tunnels"}},
		{"claim another's address", with([]string{theirs}, nil), []string{"authorization: ", "invalid node address, got "}},
		{"allow another's address", with([]string{mine}, []string{mine, theirs}), []string{"authorization: ", "AllowedIps: ", "invalid node address, got "}},
		{"claim a prefix", with([]string{"fd7a:115c:a1e0::/48"}, nil), []string{"authorization: ", "invalid address bits, expected 128, got 48"}},
		{"allow everything", with([]string{mine}, []string{"::/0"}), []string{"authorization: ", "invalid address bits, expected 128, got 0"}},
	} {
		check(t, row, "an agent may not: "+bad.name, func(t *testing.T) {
			b := w.link(t, a, "2.10").stream("Coordinate", nil)
			b.say(bad.request)
			for _, words := range bad.words[1:] {
				defer func() {
					if t.Failed() {
						t.Logf("expected %q", words)
					}
				}()
			}
			v, err := b.hear()
			for err == nil && text(v, "error") == "" {
				v, err = b.hear()
			}
			for _, words := range bad.words {
				if !strings.Contains(text(v, "error"), words) {
					t.Errorf("the error is %q (%v), which has no %q", text(v, "error"), err, words)
				}
			}
		})
	}
	check(t, row, "the legacy address is an agent's", func(t *testing.T) {
		b := w.link(t, other, "2.10").stream("Coordinate", nil)
		b.say(with([]string{agentAddresses(uuidBytes(other.id))[0].String() + "/128", "fd7a:115c:a1e0:49d6:b259:b7ac:b1b2:48f4/128"}, nil))
		s := w.coordinate(t, other).stream("Coordinate", nil)
		s.say(m{"add_tunnel": m{"id": uuidBytes(other.id)}})
		s.awaitUpdate(t, "NODE", other.id)
	})
	check(t, row, "a second stream of a peer overwrites the first", func(t *testing.T) {
		b := w.agent(t, "twice")
		s := w.link(t, b, "2.10")
		first := s.stream("Coordinate", nil)
		first.say(m{"update_self": m{"node": agentNode(b)}})
		c := w.coordinate(t, b).stream("Coordinate", nil)
		c.say(m{"add_tunnel": m{"id": uuidBytes(b.id)}})
		c.awaitUpdate(t, "NODE", b.id)
		second := s.stream("Coordinate", nil)
		newer := agentNode(b)
		second.say(m{"update_self": m{"node": newer}})
		first.awaitError(t, "peer ID overwritten by new connection", true)
		for !bytes.Equal(blob(sub(c.awaitUpdate(t, "NODE", b.id), "node"), "key"), newer["key"].([]byte)) {
		}
	})
	check(t, row, "an agent that comes back finds its clients", func(t *testing.T) {
		b := w.agent(t, "returns")
		s := w.link(t, b, "2.10")
		first := s.stream("Coordinate", nil)
		first.say(m{"update_self": m{"node": agentNode(b)}})
		c := w.coordinate(t, b).stream("Coordinate", nil)
		c.say(m{"update_self": m{"node": fakeNode(5, clientAddress().String()+"/128")}})
		c.say(m{"add_tunnel": m{"id": uuidBytes(b.id)}})
		c.awaitUpdate(t, "NODE", b.id)
		s.close()
		c.awaitUpdate(t, "LOST", b.id)
		again := w.link(t, b, "2.10").stream("Coordinate", nil)
		again.say(m{"update_self": m{"node": agentNode(b)}})
		again.awaitUpdate(t, "NODE", "")
		c.awaitUpdate(t, "NODE", b.id)
	})
}

func TestTailnetRPC(t *testing.T) {
	w := stage(t)
	a := w.agent(t, "tailnet-rpc")
	as, cs := w.link(t, a, "2.10"), w.coordinate(t, a)
	for who, s := range map[string]*session{"an agent": as, "a client": cs} {
		check(t, "Tailnet.StreamDERPMaps", "the whole map at once, to "+who, func(t *testing.T) {
			maps := s.stream("StreamDERPMaps", m{})
			v, err := maps.hear()
			if err != nil {
				t.Fatal(err)
			}
			relayOf(t, w.url, v)
			r := sub(sub(v, "regions"), "999")
			if !flag(r, "embedded_relay") || num(r, "region_id") != 999 || len(list(r, "nodes")) == 0 {
				t.Errorf("the embedded relay is %v", r)
			}
			maps.Close()
		})
	}
	check(t, "Tailnet.RefreshResumeToken", "a token that keeps the peer id", func(t *testing.T) {
		v := cs.must("RefreshResumeToken", m{})
		if text(v, "token") == "" || seconds(sub(v, "refresh_in")) <= 0 || time.Until(instant(sub(v, "expires_at"))) < time.Hour {
			t.Fatalf("the answer is %v", v)
		}
		agent := as.stream("Coordinate", nil)
		agent.say(m{"update_self": m{"node": agentNode(a)}})
		join := func(s *session) string {
			c := s.stream("Coordinate", nil)
			c.say(m{"update_self": m{"node": fakeNode(1, clientAddress().String()+"/128")}})
			c.say(m{"add_tunnel": m{"id": uuidBytes(a.id)}})
			return uuidText(blob(agent.awaitUpdate(t, "NODE", ""), "id"))
		}
		before := join(cs)
		url := w.url + "/api/v2/workspaceagents/" + a.id + "/coordinate?version=2.0&resume_token=" + text(v, "token")
		again, resp, err := dial(t, url, http.Header{"Coder-Session-Token": {w.key}})
		if err != nil {
			t.Fatal(err, answer(resp))
		}
		if after := join(again); after != before {
			t.Errorf("the peer was %s and is %s", before, after)
		}
	})
	check(t, "Tailnet.RefreshResumeToken", "on the agent's socket it does no harm", func(t *testing.T) {
		_, err := as.call("RefreshResumeToken", m{})
		wantCode12(t, err)
		as.must("UpdateStats", m{})
	})
	check(t, "Tailnet.PostTelemetry", "taken, or code 12", func(t *testing.T) {
		event := m{"id": make([]byte, 16), "time": time.Now(), "application": "ssh", "status": "CONNECTED", "client_type": "CLI", "client_version": "v2.0.0", "node_id_self": 1, "node_id_remote": 2,
			"p2p_endpoint": m{"hash": "00", "port": 1, "fields": m{"version": 4, "class": "PRIVATE"}}, "home_derp": 999, "throughput_mbits": m{"value": 1.5},
			"latest_netcheck": m{"UDP": true, "OSHasIPv6": m{"value": true}, "RegionV4Latency": map[int]time.Duration{999: time.Millisecond}}, "p2p_latency": time.Millisecond}
		for who, s := range map[string]*session{"client": cs, "agent": as} {
			if _, err := s.call("PostTelemetry", m{"events": []m{event, {}}}); err != nil {
				wantCode12(t, err)
				t.Logf("%s: %v", who, err)
			}
		}
	})
	check(t, "Tailnet.PostTelemetry", "an id of 3 bytes and an unknown status end nothing", func(t *testing.T) {
		cs.call("PostTelemetry", m{"events": []m{{"id": []byte("abc"), "status": 12}}})
		cs.must("RefreshResumeToken", m{})
	})
	check(t, "Tailnet.WorkspaceUpdates", "not on the socket of one agent", func(t *testing.T) {
		u := cs.stream("WorkspaceUpdates", m{"workspace_owner_id": make([]byte, 16)})
		var e *rpcError
		if _, err := u.hear(); !errors.As(err, &e) {
			t.Errorf("the answer is %v", err)
		}
	})
	check(t, "Agent.GetManifest", "not on a client's socket", func(t *testing.T) {
		_, err := cs.call("GetManifest", m{})
		wantError(t, err, "")
	})
	check(t, "Tailnet.WorkspaceUpdates", "the whole state first, then differences", func(t *testing.T) {
		s, resp, err := dial(t, w.url+"/api/v2/tailnet?version=2.3", http.Header{"Coder-Session-Token": {w.key}})
		if err != nil {
			t.Fatal(err, answer(resp))
		}
		me := request(t, "GET", w.url+"/api/v2/users/me", w.key, nil).wants(t, 200, "").json(t)
		u := s.stream("WorkspaceUpdates", m{"workspace_owner_id": uuidBytes(me["id"].(string))})
		first, err := u.hear()
		if err != nil {
			t.Fatal(err)
		}
		agents, workspaces := map[string]m{}, map[string]m{}
		for _, x := range list(first, "upserted_agents") {
			agents[uuidText(blob(x.(m), "id"))] = x.(m)
		}
		for _, x := range list(first, "upserted_workspaces") {
			workspaces[uuidText(blob(x.(m), "id"))] = x.(m)
		}
		mine := agents[a.id]
		if mine == nil || workspaces[uuidText(blob(mine, "workspace_id"))] == nil {
			t.Fatalf("the agent %s or its workspace is not in the first message: %v", a.id, first)
		}
		if len(list(first, "deleted_agents"))+len(list(first, "deleted_workspaces")) != 0 {
			t.Errorf("the first message deletes something: %v", first)
		}
		b := w.agent(t, "brand-new")
		u.SetDeadline(time.Now().Add(patience))
		for {
			next, err := u.hear()
			if err != nil {
				t.Fatalf("waiting for the new agent: %v", err)
			}
			for _, x := range list(next, "upserted_agents") {
				id := uuidText(blob(x.(m), "id"))
				if agents[id] != nil {
					t.Errorf("the agent %s is upserted twice", id)
				}
				agents[id] = x.(m)
			}
			if agents[b.id] != nil {
				break
			}
		}
		request(t, "DELETE", w.url+"/api/v2/berth/agents/"+b.id, w.key, nil).wants(t, 204, "")
		for {
			next, err := u.hear()
			if err != nil {
				t.Fatalf("waiting for the agent to go: %v", err)
			}
			for _, x := range list(next, "deleted_agents") {
				if uuidText(blob(x.(m), "id")) == b.id {
					return
				}
			}
		}
	})
	const row = "GET ws /api/v2/tailnet"
	check(t, row, "a tunnel to any agent", func(t *testing.T) {
		s, resp, err := dial(t, w.url+"/api/v2/tailnet?version=2.0", http.Header{"Coder-Session-Token": {w.key}})
		if err != nil {
			t.Fatal(err, answer(resp))
		}
		c := s.stream("Coordinate", nil)
		for _, name := range []string{"tunnel-one", "tunnel-two"} {
			b := w.agent(t, name)
			g := w.link(t, b, "2.10").stream("Coordinate", nil)
			g.say(m{"update_self": m{"node": agentNode(b)}})
			c.say(m{"add_tunnel": m{"id": uuidBytes(b.id)}})
			c.awaitUpdate(t, "NODE", b.id)
		}
		c.say(m{"add_tunnel": m{"id": uuidBytes("55555555-5555-4555-8555-555555555555")}})
		c.awaitError(t, "authorization: workspace agent not found or you do not have permission", true)
	})
	check(t, row, "no version is 2.0", func(t *testing.T) {
		s, resp, err := dial(t, w.url+"/api/v2/tailnet", http.Header{"Coder-Session-Token": {w.key}})
		if err != nil {
			t.Fatal(err, answer(resp))
		}
		s.must("RefreshResumeToken", m{})
	})
	check(t, row, "a version to come", func(t *testing.T) {
		r := request(t, "GET", w.url+"/api/v2/tailnet?version=2.11", w.key, nil, upgradeHeaders...).wants(t, 400, "Unknown or unsupported API version")
		if got := r.validation(t, "version"); got != "server is at version 2.10, behind requested minor version 2.11" {
			t.Errorf("the detail is %q", got)
		}
	})
	check(t, row, "a bad resume token", func(t *testing.T) {
		r := request(t, "GET", w.url+"/api/v2/tailnet?version=2.0&resume_token="+badResume(t, cs), w.key, nil, upgradeHeaders...).wants(t, 401, "Invalid resume token")
		if got := r.validation(t, "resume_token"); got != "Invalid resume token" {
			t.Errorf("the detail is %q", got)
		}
	})
	check(t, row, "no key", func(t *testing.T) {
		request(t, "GET", w.url+"/api/v2/tailnet", "", nil, upgradeHeaders...).wants(t, 401, "You are signed out or your session has expired. Please sign in again to continue.")
	})
	check(t, row, "an agent's token", func(t *testing.T) {
		request(t, "GET", w.url+"/api/v2/tailnet", a.token, nil, upgradeHeaders...).wants(t, 401, "You are signed out or your session has expired. Please sign in again to continue.")
	})
}

// badResume is a resume token whose last signature byte is another.
func badResume(t testing.TB, s *session) string {
	t.Helper()
	token := []byte(text(s.must("RefreshResumeToken", m{}), "token"))
	at := bytes.LastIndexByte(token, '.') + 3
	if token[at] == 'A' {
		token[at] = 'B'
	} else {
		token[at] = 'A'
	}
	return string(token)
}
