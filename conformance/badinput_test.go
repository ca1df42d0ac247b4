package conformance

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/google/uuid"
	"github.com/hashicorp/yamux"
)

// memory is the resident memory of a process in bytes; 0 when there is none.
func memory(pid int) int64 {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	_, rest, _ := strings.Cut(string(b), "VmRSS:")
	var kib int64
	fmt.Sscan(rest, &kib)
	return kib << 10
}

// bounded runs an attack and checks that the server's memory stays within 200 MiB of what it was, and that
// a connection of somebody else does not notice.
func bounded(t *testing.T, w *world, attack func()) {
	t.Helper()
	bystander := w.link(t, w.agent(t, "bystander-"+uuid.NewString()[:8]), "2.10")
	before := memory(w.server.cmd.Process.Pid)
	var peak atomic.Int64
	stop := make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() {
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			peak.Store(max(peak.Load(), memory(w.server.cmd.Process.Pid)))
			bystander.call("UpdateStats", m{})
			select {
			case <-stop:
				return
			case <-tick.C:
			}
		}
	})
	func() {
		defer watching.Wait()
		defer close(stop)
		attack()
	}()
	bystander.must("UpdateStats", m{})
	if before == 0 || peak.Load() == 0 {
		t.Error("the server's memory is not known")
	}
	if grown := peak.Load() - before; grown > 200<<20 {
		t.Errorf("the server grew by %d MiB", grown>>20)
	}
}

func TestBadFrames(t *testing.T) {
	const row = "GET ws /api/v2/workspaceagents/me/rpc"
	w := stage(t)
	a := w.agent(t, "bad-frames")
	invoke := frame(packetInvoke, 1, 1, []byte(rpcs["UpdateStats"].method))
	endless := func(kind byte, total int) []byte { // a packet that goes on, cut into frames of 64 KiB
		var b []byte
		for n := 0; n < total; n += 64 << 10 {
			part := frame(kind, 1, 2, make([]byte, 64<<10))
			part[0] &^= 1
			b = append(b, part...)
		}
		return b
	}
	huge := append([]byte{packetMessage<<1 | 1, 1, 2}, binary.AppendUvarint(nil, 1<<62)...)
	for _, bad := range []struct {
		name  string
		bytes []byte
		waits bool // the server waits for the rest of it, as stock ones do
	}{
		{"a frame that claims 2^62 bytes", append(bytes.Clone(invoke), huge...), true},
		{"a message before the Invoke", frame(packetMessage, 1, 1, nil), true},
		{"a kind that there is not", append(bytes.Clone(invoke), frame(0x3f, 1, 2, nil)...), false},
		{"a packet of more than 4 MiB", append(bytes.Clone(invoke), endless(packetMessage, 5<<20)...), false},
		{"an Invoke of more than 4 MiB", endless(packetInvoke, 5<<20), false},
		{"a varint that does not end", bytes.Repeat([]byte{0xff}, 64), false},
		{"message ids that go back", append(frame(packetInvoke, 1, 5, []byte(rpcs["UpdateStats"].method)), frame(packetMessage, 1, 3, nil)...), false},
		{"an Invoke in the middle", append(bytes.Clone(invoke), frame(packetInvoke, 1, 2, []byte("/x"))...), false},
		{"a name that there is not", append(append(frame(packetInvoke, 1, 1, []byte("/coder.agent.v2.Agent/Nothing")), frame(packetMessage, 1, 2, nil)...), frame(packetCloseSend, 1, 3, nil)...), false},
		{"a name of 60 KiB", append(append(frame(packetInvoke, 1, 1, bytes.Repeat([]byte("n"), 60<<10)), frame(packetMessage, 1, 2, nil)...), frame(packetCloseSend, 1, 3, nil)...), false},
		{"metadata that is no map", append(frame(packetMetadata, 1, 1, []byte{0xff, 0xff}), invoke...), false},
	} {
		check(t, row, bad.name, func(t *testing.T) {
			s := w.link(t, a, "2.10")
			bounded(t, w, func() {
				stream, err := s.mx.OpenStream()
				if err != nil {
					t.Fatal(err)
				}
				limit := patience
				if bad.waits {
					limit = time.Second
				}
				stream.SetDeadline(time.Now().Add(limit))
				go stream.Write(bad.bytes) // it may be cut off
				_, err = newCall(stream).next()
				switch timeout := errors.Is(err, yamux.ErrTimeout); {
				case err == nil:
					t.Error("it was answered as if it were good")
				case timeout && !bad.waits:
					t.Error("it was neither refused nor cut off")
				}
			})
			// Calls beside it on the same session are not disturbed.
			s.must("UpdateStats", m{})
		})
	}
	check(t, row, "metadata before the Invoke is tolerated", func(t *testing.T) {
		s := w.link(t, a, "2.10")
		stream, err := s.mx.OpenStream()
		if err != nil {
			t.Fatal(err)
		}
		stream.SetDeadline(time.Now().Add(patience))
		entry := []byte("\x0a\x0a\x0a\x03key\x12\x03val")
		b := append(frame(packetMetadata, 1, 1, entry), frame(packetInvoke, 1, 2, []byte(rpcs["UpdateStats"].method))...)
		stream.Write(append(append(b, frame(packetMessage, 1, 3, nil)...), frame(packetCloseSend, 1, 4, nil)...))
		if _, err := newCall(stream).next(); err != nil {
			t.Error(err)
		}
	})
	check(t, row, "unknown kinds with the control flag are ignored", func(t *testing.T) {
		s := w.link(t, a, "2.10")
		stream, err := s.mx.OpenStream()
		if err != nil {
			t.Fatal(err)
		}
		stream.SetDeadline(time.Now().Add(patience))
		unknown := frame(0x3e, 1, 2, []byte("later"))
		unknown[0] |= 0x80
		b := append(frame(packetInvoke, 1, 1, []byte(rpcs["UpdateStats"].method)), unknown...)
		stream.Write(append(append(b, frame(packetMessage, 1, 3, nil)...), frame(packetCloseSend, 1, 4, nil)...))
		if _, err := newCall(stream).next(); err != nil {
			t.Error(err)
		}
	})
	for name, junk := range map[string][]byte{
		"yamux of another version":   {9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0},
		"a yamux type to come":       {0, 77, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0},
		"more than the window holds": append([]byte{0, 0, 0, 1, 0, 0, 0, 1, 0x40, 0, 0, 0}, make([]byte, 1<<20)...),
		"HTTP":                       []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
	} {
		check(t, row, name, func(t *testing.T) {
			bounded(t, w, func() {
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				defer cancel()
				ws, _, err := websocket.Dial(ctx, w.url+"/api/v2/workspaceagents/me/rpc?version=2.0", &websocket.DialOptions{HTTPHeader: http.Header{"Coder-Session-Token": {a.token}}})
				if err != nil {
					t.Fatal(err)
				}
				defer ws.CloseNow()
				ws.SetReadLimit(-1)
				ws.Write(ctx, websocket.MessageBinary, junk)
				for err == nil {
					_, _, err = ws.Read(ctx)
				}
				if ctx.Err() != nil {
					t.Error("the socket stays open")
				}
			})
		})
	}
	check(t, row, "10,000 streams at once", func(t *testing.T) {
		s := w.link(t, a, "2.10")
		bounded(t, w, func() {
			// Opened by hand, as yamux would wait for its backlog.
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			ws, _, err := websocket.Dial(ctx, w.url+"/api/v2/workspaceagents/me/rpc?version=2.0", &websocket.DialOptions{HTTPHeader: http.Header{"Coder-Session-Token": {a.token}}})
			if err != nil {
				t.Fatal(err)
			}
			defer ws.CloseNow()
			ws.SetReadLimit(-1)
			go func() { // what comes back is thrown away
				for {
					if _, _, err := ws.Read(ctx); err != nil {
						return
					}
				}
			}()
			for i := range 10_000 {
				open := []byte{0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0}
				binary.BigEndian.PutUint32(open[4:], uint32(2*i+1))
				if ws.Write(ctx, websocket.MessageBinary, open) != nil {
					return // cut off, which is fine
				}
			}
		})
		s.must("UpdateStats", m{})
	})
}

// TestSlowPeers has peers that say nothing, stop in the middle, or never read.
func TestSlowPeers(t *testing.T) {
	w := stage(t)
	check(t, "GET /healthz", "200 connections that stop in the header", func(t *testing.T) {
		bounded(t, w, func() {
			for range 200 {
				fmt.Fprintf(rawConn(t, w), "GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: ")
			}
			request(t, "GET", w.url+"/healthz", "", nil).wants(t, 200, "")
		})
	})
	check(t, "GET /healthz", "a header of 2 MiB", func(t *testing.T) {
		conn := rawConn(t, w)
		fmt.Fprintf(conn, "GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: %s\r\n\r\n", strings.Repeat("x", 2<<20))
		b := make([]byte, 12)
		if n, err := io.ReadFull(conn, b); err == nil && string(b[9:12]) != "431" {
			t.Errorf("%q", b[:n])
		}
	})
	a := w.agent(t, "slow")
	check(t, "PATCH /api/v2/workspaceagents/me/logs", "a body that stops half-way holds up nobody", func(t *testing.T) {
		for range 50 {
			fmt.Fprintf(rawConn(t, w), "PATCH /api/v2/workspaceagents/me/logs HTTP/1.1\r\nHost: x\r\nCoder-Session-Token: %s\r\nContent-Length: 1000\r\n\r\n{\"logs\":[", a.token)
		}
		request(t, "PATCH", w.url+"/api/v2/workspaceagents/me/logs", a.token, `{"logs":[{"output":"quick","level":"info"}]}`).wants(t, 200, "")
	})
	check(t, "GET /derp", "a relay client that never greets, and one that never reads", func(t *testing.T) {
		bounded(t, w, func() {
			for range 50 {
				fmt.Fprintf(rawConn(t, w), "GET /derp HTTP/1.1\r\nHost: x\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n\r\n")
			}
			host := strings.TrimPrefix(w.url, "http://")
			p1, k1 := newKey()
			p2, k2 := newKey()
			deaf, err := dialRelay(host, p1, k1)
			if err != nil {
				t.Fatal(err)
			}
			defer deaf.Close()
			loud, err := dialRelay(host, p2, k2)
			if err != nil {
				t.Fatal(err)
			}
			defer loud.Close()
			loud.SetDeadline(time.Now().Add(patience))
			for range 1000 {
				if err := loud.write(derpSendPacket, k1[:], make([]byte, 60<<10)); err != nil {
					t.Fatalf("the sender is cut off: %v", err)
				}
			}
			loud.write(derpPing, []byte("still ok"))
			for {
				kind, p, err := loud.read()
				if err != nil {
					t.Fatal(err)
				}
				if kind == derpPong && string(p) == "still ok" {
					break
				}
			}
			_ = k2
		})
	})
	check(t, "GET /derp", "frames that claim too much", func(t *testing.T) {
		bounded(t, w, func() {
			p, k := newKey()
			c, err := dialRelay(strings.TrimPrefix(w.url, "http://"), p, k)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(patience))
			c.Conn.Write(append([]byte{derpSendPacket, 0xff, 0xff, 0xff, 0xff}, k[:]...))
			for err == nil {
				_, _, err = c.read()
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("the relay waits for 4 GiB")
			}
		})
	})
	check(t, "Tailnet.Coordinate", "a client that never reads", func(t *testing.T) {
		b := w.agent(t, "loud")
		agent := w.link(t, b, "2.10").stream("Coordinate", nil)
		node := agentNode(b)
		agent.say(m{"update_self": m{"node": node}})
		deaf := w.coordinate(t, b).stream("Coordinate", nil)
		deaf.say(m{"add_tunnel": m{"id": uuidBytes(b.id)}})
		deaf.say(m{"update_self": m{"node": fakeNode(1, clientAddress().String()+"/128")}})
		listener := w.coordinate(t, b).stream("Coordinate", nil)
		listener.say(m{"add_tunnel": m{"id": uuidBytes(b.id)}})
		listener.awaitUpdate(t, "NODE", b.id)
		var last atomic.Int64
		go func() {
			for {
				v, err := listener.hear()
				if err != nil {
					return
				}
				for _, x := range list(v, "peer_updates") {
					last.Store(num(sub(x.(m), "node"), "preferred_derp"))
				}
			}
		}()
		bounded(t, w, func() {
			var endpoints []string
			for i := range 40 {
				endpoints = append(endpoints, fmt.Sprintf("192.0.2.%d:%d", i, 40000+i))
			}
			node["endpoints"] = endpoints
			for i := 1; i <= 2000; i++ {
				node["preferred_derp"] = i
				if err := agent.say(m{"update_self": m{"node": node}}); err != nil {
					t.Fatalf("after %d updates: %v", i, err)
				}
				if i%200 == 0 { // a reader that is 512 behind is cut off, too
					eventually(t, "the other client has the last node", func() bool { return last.Load() == int64(i) })
				}
			}
		})
	})
	check(t, "GET /api/v2/workspaceagents/{id}/logs", "a follower that never reads", func(t *testing.T) {
		b := w.agent(t, "followed-by-the-deaf")
		var sockets []*websocket.Conn
		for range 20 {
			ws, resp, err := socket(t, w.url+"/api/v2/workspaceagents/"+b.id+"/logs?follow", w.key)
			if err != nil {
				t.Fatal(err, answer(resp))
			}
			sockets = append(sockets, ws)
		}
		s := w.link(t, b, "2.10")
		bounded(t, w, func() {
			line := strings.Repeat("l", 9_000)
			for i := range 100 {
				s.must("BatchCreateLogs", m{"log_source_id": make([]byte, 16), "logs": []m{{"output": fmt.Sprintf("%03d%s", i, line)}}})
			}
			// One of them begins to read now, and misses nothing.
			for n := 0; n < 100; {
				_, raw, err := message(t, sockets[0])
				if err != nil {
					t.Fatal(err)
				}
				n += bytes.Count(raw, []byte(`"output"`))
			}
		})
	})
}

// TestHostileAgent is an agent that answers the server with a redirect, with too much, or not at all.
func TestHostileAgent(t *testing.T) {
	const row = "GET /api/v2/workspaceagents/{id}/listening-ports"
	w := stage(t)
	var hits atomic.Int64
	canary := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		hits.Add(1)
		respond(rw, 200, map[string]any{"ports": []any{map[string]any{"process_name": "stolen", "network": "tcp", "port": 9999}}})
	}))
	defer canary.Close()
	a := w.agent(t, "hostile")
	g := w.runAgent(t, a)
	at := w.url + "/api/v2/workspaceagents/" + a.id
	check(t, row, "an agent's redirect is not followed", func(t *testing.T) {
		g.api(func(rw http.ResponseWriter, r *http.Request) {
			http.Redirect(rw, r, canary.URL+r.URL.Path, http.StatusTemporaryRedirect)
		})
		for _, path := range []string{"/listening-ports", "/containers"} {
			r := request(t, "GET", at+path, w.key, nil)
			if r.status < 400 || hits.Load() != 0 || bytes.Contains(r.body, []byte("stolen")) {
				t.Errorf("%s: %d, %d hits, %.200s", path, r.status, hits.Load(), r.body)
			}
		}
	})
	check(t, row, "an answer without end", func(t *testing.T) {
		bounded(t, w, func() {
			g.api(func(rw http.ResponseWriter, r *http.Request) {
				io.WriteString(rw, `{"ports":[`)
				b := bytes.Repeat([]byte(`{"process_name":"x","network":"tcp","port":9999},`), 1000)
				for {
					if _, err := rw.Write(b); err != nil {
						return
					}
				}
			})
			if r := request(t, "GET", at+"/listening-ports", w.key, nil); r.status < 500 {
				t.Errorf("%d %.200s", r.status, r.body)
			}
		})
	})
	check(t, row, "an answer that is not JSON", func(t *testing.T) {
		g.api(func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, "<html>") })
		request(t, "GET", at+"/listening-ports", w.key, nil).wants(t, 500, "Internal error fetching listening ports.")
	})
}

// TestBadServer is berthd under a server that tells it nonsense: it goes on, and is well again when the
// server is.
func TestBadServer(t *testing.T) {
	const row = "Tailnet.StreamDERPMaps"
	home := func(r m) bool { return num(sub(sub(r, "update_self"), "node"), "preferred_derp") == 999 }
	for name, bad := range map[string]m{
		"no region":         {"home_params": m{}},
		"only STUN":         {"home_params": m{}, "regions": map[int]m{1: {"region_id": 1, "nodes": []m{{"name": "s", "region_id": 1, "host_name": "127.0.0.1", "stun_port": 9, "stun_only": true}}}}},
		"a region alone":    {"home_params": m{}, "regions": map[int]m{1: {"region_id": 1}}},
		"keys that differ":  {"home_params": m{}, "regions": map[int]m{1: {"region_id": 2, "nodes": []m{{"name": "x", "region_id": 3, "host_name": "127.0.0.1"}}}}},
		"no home_params":    {},
		"impossible values": {"home_params": m{"region_score": map[int]float64{1: -1}}, "regions": map[int]m{-5: {"region_id": -5, "nodes": []m{{"region_id": -5, "host_name": "\x01", "ipv4": "x", "derp_port": 99999999, "stun_port": -7}}}}},
	} {
		check(t, row, "berthd under a map with "+name, func(t *testing.T) {
			t.Parallel()
			s := newStock(t, 10)
			var good atomic.Bool
			s.derp = func() m {
				if good.Load() {
					return s.derpMap()
				}
				return bad
			}
			s.manifest["derp_map"] = bad
			d := s.berthd(t)
			s.awaits(t, "UpdateLifecycle", func(r m) bool { return num(sub(r, "lifecycle"), "state") == 5 })
			s.mu.Lock()
			for _, c := range s.calls {
				if c.method == "Coordinate" && has(c.request, "update_self") {
					if _, _, _, err := checkNode(sub(sub(c.request, "update_self"), "node")); err != nil {
						t.Errorf("a node is published without a home: %v", err)
					}
				}
			}
			s.mu.Unlock()
			good.Store(true)
			s.manifest["derp_map"] = s.derpMap()
			s.drop()
			s.awaits(t, "Coordinate", home)
			if strings.Contains(d.output(), "panic") {
				t.Error("berthd panicked")
			}
		})
	}
	check(t, "Tailnet.Coordinate", "berthd stands updates that make no sense", func(t *testing.T) {
		s := newStock(t, 10)
		d := s.berthd(t)
		s.awaits(t, "Coordinate", home)
		s.mu.Lock()
		tell := s.peers[s.agent.id].tell
		s.mu.Unlock()
		peer := uuid.New()
		node := fakeNode(1, "fd7a:115c:a1e0::/48", "::/0", "not an address")
		node["endpoints"] = []string{"nowhere", "1.2.3.4:99999", "[::1]"}
		tell(m{"id": []byte("short"), "kind": "NODE", "node": fakeNode(1)},
			m{"kind": "NODE"}, m{"id": peer[:], "kind": "NODE"}, m{"id": peer[:], "kind": 99}, m{"id": peer[:], "kind": "NODE", "node": node},
			m{"id": peer[:], "kind": "LOST"}, m{"id": peer[:], "kind": "DISCONNECTED"}, m{"?": unknownField()}, m{})
		c := s.world().connect(t, s.agent) // and goes on
		out, err := func() ([]byte, error) {
			session, err := c.ssh(1).NewSession()
			if err != nil {
				return nil, err
			}
			return session.Output("echo alive")
		}()
		if err != nil || string(out) != "alive\n" || strings.Contains(d.output(), "panic") {
			t.Errorf("%q, %v", out, err)
		}
	})
	short := []byte("abc")
	for name, change := range map[string]func(m){
		"an agent id of 3 bytes":      func(v m) { v["agent_id"] = short },
		"a nil agent id":              func(v m) { v["agent_id"] = make([]byte, 16) },
		"no DERP map":                 func(v m) { delete(v, "derp_map") },
		"apps without their messages": func(v m) { v["apps"] = []m{{}, {"id": short, "health": 77, "sharing_level": 88}} },
		"scripts without ids": func(v m) {
			v["scripts"] = []m{{"run_on_start": true, "script": "true"}, {"cron": "nonsense", "script": "true", "id": short}}
		},
		"metadata without intervals": func(v m) { v["metadata"] = []m{{"key": "k", "script": "echo x"}, {}} },
	} {
		check(t, "Agent.GetManifest", "berthd under a manifest with "+name, func(t *testing.T) {
			t.Parallel()
			s := newStock(t, 10)
			var good atomic.Bool
			was := s.manifest
			bad := m{}
			for k, v := range was {
				bad[k] = v
			}
			change(bad)
			s.answers["GetManifest"] = func(m) (m, error) {
				if good.Load() {
					return was, nil
				}
				return bad, nil
			}
			d := s.berthd(t)
			s.awaits(t, "GetManifest", nil)
			good.Store(true)
			s.drop()
			s.awaits(t, "UpdateStartup", nil)
			s.awaits(t, "Coordinate", home)
			if strings.Contains(d.output(), "panic") {
				t.Error("berthd panicked")
			}
		})
	}
	check(t, "Agent.UpdateStats", "berthd under an interval of 0, and of less", func(t *testing.T) {
		s := newStock(t, 10)
		s.answers["UpdateStats"] = func(m) (m, error) { return m{"report_interval": m{"seconds": -5}}, nil }
		s.berthd(t)
		s.awaits(t, "UpdateLifecycle", func(r m) bool { return num(sub(r, "lifecycle"), "state") == 5 })
		s.awaits(t, "Coordinate", home)
		if n := len(s.called("UpdateStats")); n > 20 {
			t.Errorf("%d reports in a moment", n)
		}
	})
}
