package conformance

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"
	"golang.org/x/crypto/nacl/box"
	"golang.org/x/crypto/ssh"
)

// TestMonitoring is what the server does to notice that an agent is gone without a word.
func TestMonitoring(t *testing.T) {
	t.Parallel()
	const row = "GET ws /api/v2/workspaceagents/me/rpc"
	w := stage(t)
	check(t, row, "pings by yamux; who does not answer is dropped, and disconnected", func(t *testing.T) {
		a := w.agent(t, "half-open")
		ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
		defer cancel()
		ws, _, err := websocket.Dial(ctx, w.url+"/api/v2/workspaceagents/me/rpc?version=2.10&role=agent", &websocket.DialOptions{HTTPHeader: http.Header{"Coder-Session-Token": {a.token}}})
		if err != nil {
			t.Fatal(err)
		}
		defer ws.CloseNow()
		eventually(t, "the agent is connected", func() bool { return w.info(t, a)["status"] == "connected" })
		pings := 0
		for {
			_, b, err := ws.Read(ctx)
			if err != nil {
				break
			}
			if len(b) >= 12 && b[0] == 0 && b[1] == 2 && binary.BigEndian.Uint16(b[2:]) == 1 {
				pings++
			}
		}
		if ctx.Err() != nil || pings == 0 {
			t.Errorf("after %d pings without an answer: %v", pings, ctx.Err())
		}
		eventually(t, "the agent is disconnected", func() bool { return w.info(t, a)["status"] == "disconnected" })
		if v := w.info(t, a); v["health"].(map[string]any)["reason"] != "agent has lost connection" {
			t.Errorf("the health is %v", v["health"])
		}
	})
}

// TestRelayOfBerthd is how berthd gets to a relay that is not simple.
func TestRelayOfBerthd(t *testing.T) {
	const row = "berthd: relay"
	home := func(r m) bool { return num(sub(sub(r, "update_self"), "node"), "preferred_derp") == 999 }
	through := func(t *testing.T, s *stockServer) {
		t.Helper()
		one, err := s.world().connect(t, s.agent).ssh(1).NewSession()
		if err != nil {
			t.Fatal(err)
		}
		if out, err := one.Output("echo through"); err != nil || string(out) != "through\n" {
			t.Errorf("%q, %v", out, err)
		}
	}
	check(t, row, "WebSocket where the manifest says so", func(t *testing.T) {
		s := newStock(t, 10)
		var plain, sockets atomic.Int64
		s.relay = func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if strings.EqualFold(r.Header.Get("Upgrade"), "websocket") {
					if strings.Contains(r.Header.Get("Sec-WebSocket-Protocol"), "derp") {
						sockets.Add(1)
					}
				} else if r.Header.Get("Upgrade") != "" {
					plain.Add(1)
				}
				next.ServeHTTP(w, r)
			})
		}
		s.manifest["derp_force_websockets"] = true
		s.berthd(t)
		s.awaits(t, "Coordinate", home)
		eventually(t, "the relay is reached", func() bool { return sockets.Load() > 0 })
		if plain.Load() != 0 {
			t.Errorf("%d upgrades to DERP", plain.Load())
		}
		through(t, s) // the second client's own connection is a plain one
	})
	check(t, row, "WebSocket where the upgrade to DERP is refused, and the reason is published", func(t *testing.T) {
		s := newStock(t, 10)
		var open atomic.Bool
		s.relay = func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if strings.EqualFold(r.Header.Get("Upgrade"), "derp") && !open.Load() {
					http.Error(w, "a proxy that knows no DERP", http.StatusForbidden)
					return
				}
				next.ServeHTTP(w, r)
			})
		}
		s.berthd(t)
		s.awaits(t, "Coordinate", func(r m) bool {
			return text(sub(sub(sub(r, "update_self"), "node"), "derp_forced_websocket"), "999") != ""
		})
		open.Store(true)
		through(t, s)
	})
	check(t, row, "no endpoints where direct connections are off", func(t *testing.T) {
		s := newStock(t, 10)
		s.manifest["disable_direct_connections"] = true
		s.berthd(t)
		s.awaits(t, "Coordinate", home)
		through(t, s)
		for _, r := range s.called("Coordinate") {
			if e := list(sub(sub(r, "update_self"), "node"), "endpoints"); len(e) != 0 {
				t.Errorf("the endpoints are %v", e)
			}
		}
	})
	check(t, row, "configured headers are sent to server and relay", func(t *testing.T) {
		s := newStock(t, 10)
		var relayed atomic.Bool
		s.relay = func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Header.Get("Upgrade") != "" && r.Header.Get("X-Pass") == "yes" {
					relayed.Store(true)
				}
				next.ServeHTTP(w, r)
			})
		}
		s.berthd(t, "CODER_AGENT_HEADER=X-Pass=yes")
		s.awaits(t, "Coordinate", home)
		eventually(t, "the relay sees the header", relayed.Load)
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, r := range s.dials {
			if r.Header.Get("X-Pass") != "yes" {
				t.Error("the dial lacks the header")
			}
		}
	})
	check(t, row, "disco pings over the relay are answered", func(t *testing.T) {
		s := newStock(t, 10)
		s.berthd(t)
		c := s.world().connect(t, s.agent)
		key, disco, _, err := checkNode(sub(sub(s.awaits(t, "Coordinate", home), "update_self"), "node"))
		if err != nil {
			t.Fatal(err)
		}
		if err := c.node.pingDisco(key, disco); err != nil {
			t.Error(err)
		}
	})
}

// pingDisco sends disco pings over the relay until a pong to one comes back.
func (n *node) pingDisco(key, disco wgKey) error {
	id := []byte("conformance!")
	for range 60 {
		var nonce [24]byte
		rand.Read(nonce[:])
		ping := append(append([]byte{1, 1}, id...), n.key[:]...)
		ping = append(ping, make([]byte, 1310-len(discoMagic)-32-24-box.Overhead-len(ping))...) // the padding of stock peers
		out := append(append(append([]byte{}, discoMagic...), n.disco[:]...), nonce[:]...)
		if err := n.relay.write(derpSendPacket, key[:], box.Seal(out, ping, &nonce, &disco, &n.discoPrivate)); err != nil {
			return err
		}
		select {
		case pong := <-n.discoPongs:
			if bytes.Equal(pong[:12], id) {
				return nil
			}
		case <-time.After(time.Second):
		}
	}
	return errors.New("no disco pong came over the relay")
}

// TestBlocked is berthd with what an operator may switch off, by the variables of stock agents.
func TestBlocked(t *testing.T) {
	const row = "berthd: block options"
	s := newStock(t, 10)
	s.berthd(t, "CODER_AGENT_BLOCK_FILE_TRANSFER=true", "CODER_AGENT_BLOCK_REVERSE_PORT_FORWARDING=true", "CODER_AGENT_BLOCK_LOCAL_PORT_FORWARDING=true")
	s.awaits(t, "UpdateLifecycle", inState("READY"))
	client := s.world().connect(t, s.agent).ssh(1)
	for _, command := range []string{"scp -t /tmp", "/usr/bin/rsync --server", "nc -l 1", "sftp x"} {
		check(t, row, "the command "+strings.Fields(command)[0], func(t *testing.T) {
			one, err := client.NewSession()
			if err != nil {
				t.Fatal(err)
			}
			out, err := one.Output(command)
			var exit *ssh.ExitError
			if !errors.As(err, &exit) || exit.ExitStatus() != 65 || string(out) != "\x02File transfer has been disabled.\n" {
				t.Errorf("%q, %v", out, err)
			}
		})
	}
	check(t, row, "the subsystem sftp", func(t *testing.T) {
		channel, requests, err := client.OpenChannel("session", nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := channel.SendRequest("subsystem", true, ssh.Marshal(struct{ Name string }{"sftp"})); err != nil {
			t.Fatal(err)
		}
		var status []byte
		for r := range requests {
			if r.Type == "exit-status" {
				status = r.Payload
			}
		}
		if out, _ := io.ReadAll(channel); len(out) != 0 || len(status) != 4 || binary.BigEndian.Uint32(status) != 65 {
			t.Errorf("it says %q and exits with %x", out, status)
		}
	})
	check(t, row, "local and remote forwarding", func(t *testing.T) {
		if conn, err := client.Dial("tcp", echoServer(t, "tcp", "127.0.0.1:0")); err == nil {
			conn.Close()
			t.Error("a port is forwarded")
		}
		if _, err := client.Dial("unix", echoServer(t, "unix", t.TempDir()+"/s")); err == nil || !strings.Contains(err.Error(), "local port forwarding is disabled") {
			t.Errorf("a socket: %v", err)
		}
		if l, err := client.Listen("tcp", "127.0.0.1:0"); err == nil {
			l.Close()
			t.Error("a port is listened on")
		}
	})
	check(t, row, "the rest goes on", func(t *testing.T) {
		one, err := client.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		if out, err := one.Output("echo scp"); err != nil || string(out) != "scp\n" {
			t.Errorf("%q, %v", out, err)
		}
	})
}

// TestDeletedAgent is what a deleted agent, and who looks at it, are told.
func TestDeletedAgent(t *testing.T) {
	t.Parallel()
	w := stage(t)
	a := w.agent(t, "deleted")
	s := w.link(t, a, "2.10")
	agent := s.stream("Coordinate", nil)
	agent.say(m{"update_self": m{"node": agentNode(a)}})
	client := w.coordinate(t, a).stream("Coordinate", nil)
	client.say(m{"add_tunnel": m{"id": uuidBytes(a.id)}})
	client.awaitUpdate(t, "NODE", a.id)
	follower, resp, err := socket(t, w.url+"/api/v2/workspaceagents/"+a.id+"/logs?follow", w.key)
	if err != nil {
		t.Fatal(err, answer(resp))
	}
	if _, _, err := message(t, follower); err != nil {
		t.Fatal(err)
	}
	request(t, "DELETE", w.url+"/api/v2/berth/agents/"+a.id, w.key, nil).wants(t, 204, "")
	check(t, "GET ws /api/v2/workspaceagents/me/rpc", "a deleted agent's session ends, and its token is refused", func(t *testing.T) {
		select {
		case <-s.mx.CloseChan():
		case <-time.After(patience):
			t.Error("the session goes on")
		}
		request(t, "GET", w.url+"/api/v2/workspaceagents/me/rpc?version=2.10", a.token, nil, upgradeHeaders...).wants(t, 401, "Workspace agent not authorized.")
	})
	check(t, "Tailnet.Coordinate", "a deleted agent is gone for its clients", func(t *testing.T) {
		for {
			v, err := client.hear()
			if err != nil {
				return // the stream ended, which says as much
			}
			for _, x := range list(v, "peer_updates") {
				if kind := num(x.(m), "kind"); kind == 2 || kind == 3 {
					return
				}
			}
		}
	})
	check(t, "GET /api/v2/workspaceagents/{id}/logs", "following a deleted agent ends with 1000", func(t *testing.T) {
		var err error
		for err == nil {
			_, _, err = message(t, follower)
		}
		if got := websocket.CloseStatus(err); got != websocket.StatusNormalClosure {
			t.Errorf("the close status is %v (%v)", got, err)
		}
	})
	check(t, "GET /api/v2/workspaceagents/{id}", "a deleted agent", func(t *testing.T) {
		request(t, "GET", w.url+"/api/v2/workspaceagents/"+a.id, w.key, nil).wants(t, 404, "Agent doesn't exist with that id, or you do not have access to it.")
	})
}
