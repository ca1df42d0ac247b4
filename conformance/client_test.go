package conformance

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

// client is a second client of the protocol, from the pages alone: the coordinate socket, a tunnel to one
// agent, a node of its own, and streams to the agent's ports.
type client struct {
	t       testing.TB
	session *session
	coord   *stream
	node    *node
	target  netip.Addr
	// readyAfter is how long after the agent's node its ready_for_handshake came.
	readyAfter time.Duration
}

// connect is what a stock client does, in order: connection info, socket, streams, tunnel, node, wait for
// the agent's node and its readiness, TSMP until it answers.
func (w *world) connect(t testing.TB, a identity) *client {
	t.Helper()
	info := request(t, "GET", w.url+"/api/v2/workspaceagents/"+a.id+"/connection", w.key, nil).wants(t, 200, "")
	if _, ok := info.json(t)["derp_map"].(map[string]any)["Regions"]; !ok {
		t.Fatalf("connection info without Regions: %s", info.body)
	}
	c := &client{t: t, session: w.coordinate(t, a), target: agentAddresses(uuidBytes(a.id))[0]}
	c.coord = c.session.stream("Coordinate", nil)
	maps := c.session.stream("StreamDERPMaps", m{})
	derpMap, err := maps.hear()
	if err != nil {
		t.Fatalf("StreamDERPMaps: %v", err)
	}
	c.node = newNode(t, w.url, derpMap, time.Now().UnixNano(), clientAddress())
	if err := c.coord.say(m{"add_tunnel": m{"id": uuidBytes(a.id)}}); err != nil {
		t.Fatal(err)
	}
	if err := c.coord.say(m{"update_self": m{"node": c.node.wire()}}); err != nil {
		t.Fatal(err)
	}
	c.handshake(a)
	return c
}

// handshake waits for the agent's node and its readiness, and then for the agent itself.
func (c *client) handshake(a identity) {
	c.t.Helper()
	var known time.Time
	var ready bool
	for known.IsZero() || !ready {
		update, err := c.coord.hear()
		if err != nil {
			c.t.Fatalf("Coordinate: %v", err)
		}
		if e := text(update, "error"); e != "" {
			c.t.Fatalf("Coordinate: %s", e)
		}
		for _, x := range list(update, "peer_updates") {
			u := x.(m)
			if uuidText(blob(u, "id")) != a.id {
				c.t.Fatalf("an update about %s, to which there is no tunnel", uuidText(blob(u, "id")))
			}
			switch kind := enum("tailnet.CoordinateResponse.PeerUpdate.Kind", num(u, "kind")); kind {
			case "NODE":
				if err := c.node.setPeer(a.id, sub(u, "node")); err != nil {
					c.t.Fatalf("the agent's node: %v", err)
				}
				if known.IsZero() {
					known = time.Now()
				}
			case "READY_FOR_HANDSHAKE":
				ready = true
				if !known.IsZero() {
					c.readyAfter = time.Since(known)
				}
			default:
				c.t.Fatalf("the agent is %s", kind)
			}
		}
	}
	go func() { // what else the coordinator says; a node that changes is installed
		for {
			update, err := c.coord.hear()
			if err != nil {
				return
			}
			for _, x := range list(update, "peer_updates") {
				if u := x.(m); num(u, "kind") == 1 && c.node.alive.Err() == nil {
					c.node.setPeer(uuidText(blob(u, "id")), sub(u, "node"))
				}
			}
		}
	}()
	c.coord.SetDeadline(time.Time{})
	c.node.keepAlive(a.id)
	if err := c.node.pingTSMP(c.target, patience); err != nil {
		c.t.Fatal(err)
	}
}

// dial opens a stream to a port of the agent.
func (c *client) dial(port uint16) net.Conn {
	c.t.Helper()
	conn, err := c.node.dial(c.target, port, patience)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(patience))
	return conn
}

// ssh is a session on the agent's SSH port: any user, no authentication.
func (c *client) ssh(port uint16) *ssh.Client {
	c.t.Helper()
	conn, chans, reqs, err := ssh.NewClientConn(c.dial(port), "agent", &ssh.ClientConfig{User: "anybody", HostKeyCallback: ssh.InsecureIgnoreHostKey()})
	if err != nil {
		c.t.Fatalf("SSH on port %d: %v", port, err)
	}
	client := ssh.NewClient(conn, chans, reqs)
	c.t.Cleanup(func() { client.Close() })
	return client
}

// pty opens a terminal on port 2: the length, little endian, and the JSON in one write.
func (c *client) pty(init string) net.Conn {
	c.t.Helper()
	conn := c.dial(2)
	b := binary.LittleEndian.AppendUint16(nil, uint16(len(init)))
	if _, err := conn.Write(append(b, init...)); err != nil {
		c.t.Fatal(err)
	}
	return conn
}

// http is a client of the agent's HTTP API on port 4; its base URL has the agent's address.
func (c *client) http() (*http.Client, string) {
	return &http.Client{Transport: &http.Transport{DialContext: c.node.dialContext, DisableKeepAlives: true}}, fmt.Sprintf("http://[%s]:4", c.target)
}

// say types into a terminal.
func say(t testing.TB, conn net.Conn, v any) {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write(b); err != nil {
		t.Fatal(err)
	}
}
