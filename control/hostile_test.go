package control

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/google/uuid"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

// socket opens a WebSocket as a stream of bytes, on which nothing is said or read by itself.
func (x *site) socket(path string, token wire.Secret) net.Conn {
	x.t.Helper()
	conn, _, err := websocket.Dial(x.t.Context(), x.url+path, &websocket.DialOptions{
		HTTPClient: x.http, HTTPHeader: http.Header{wire.HeaderSessionToken: {token.Reveal()}},
	})
	if err != nil {
		x.t.Fatal(err)
	}
	x.t.Cleanup(func() { conn.CloseNow() })
	return websocket.NetConn(context.Background(), conn, websocket.MessageBinary)
}

// yamuxFrame is one frame of a session.
func yamuxFrame(kind byte, flags uint16, stream, length uint32, payload string) []byte {
	b := binary.BigEndian.AppendUint16([]byte{0, kind}, flags)
	b = binary.BigEndian.AppendUint32(b, stream)
	return append(binary.BigEndian.AppendUint32(b, length), payload...)
}

// Peers that misbehave at the level of the transport, many at once and all with good credentials: the
// server's memory stays bounded, and an honest agent and a person do not notice.
func TestHostilePeers(t *testing.T) {
	x := serve(t, Config{})
	victim, victimToken := x.create("victim")
	link := x.connect(victimToken)
	source := uuid.New()
	work := func() time.Duration {
		begun := time.Now()
		if _, err := link.agent.GetManifest(t.Context(), &agentpb.GetManifestRequest{}); err != nil {
			t.Fatalf("an honest agent: %v", err)
		}
		_, err := link.agent.BatchCreateLogs(t.Context(), &agentpb.BatchCreateLogsRequest{LogSourceId: source[:], Logs: []*agentpb.Log{{Output: strings.Repeat("x", 1000)}}})
		if err != nil {
			t.Fatalf("an honest agent: %v", err)
		}
		x.get("/api/v2/workspaceagents/"+victim.String(), new(wire.Agent))
		return time.Since(begun)
	}
	work()
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before := heap()

	// Each of these agents has as many links as it may have, and more.
	const agents, each = 3, maxLinks + 4
	const rpcPath = "/api/v2/workspaceagents/me/rpc"
	invoke := func(name string) string {
		return fmt.Sprintf("\x03\x01\x01%c%s\x05\x01\x02\x00\x0d\x01\x03\x00", len(name), name)
	}
	var writing sync.WaitGroup
	for i := range agents {
		_, token := x.create(fmt.Sprint("hostile-", i))
		for j := range each {
			conn := x.socket(rpcPath, token)
			writing.Go(func() {
				switch j % 4 {
				case 0: // says nothing, and is not there
				case 1: // calls a stream that sends, again and again, and never reads
					for n := uint32(1); n < 600; n += 2 {
						call := invoke("/coder.tailnet.v2.Tailnet/StreamDERPMaps")
						open := append(yamuxFrame(1, 1, n, 0, ""), yamuxFrame(0, 0, n, uint32(len(call)), call)...)
						if _, err := conn.Write(open); err != nil {
							return
						}
					}
				case 2: // claims a frame of 4 GiB
					conn.Write(append(yamuxFrame(1, 1, 1, 0, ""), yamuxFrame(0, 0, 1, 1<<32-1, "x")...))
				case 3: // speaks no yamux
					conn.Write([]byte(strings.Repeat("GET / HTTP/1.1\r\n\r\n", 1000)))
				}
			})
		}
	}
	// Readers of a log who do not read, requests that do not end, and bodies that do not come.
	for range 20 {
		x.socket("/api/v2/workspaceagents/"+victim.String()+"/logs?follow=true", x.key)
		for _, begin := range []string{
			"GET /api/v2/buildinfo HTTP/1.1\r\nX-Slow: ",
			"PATCH " + "/api/v2/workspaceagents/me/logs HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n" + wire.HeaderSessionToken + ": " + victimToken.Reveal() + "\r\n\r\n{",
			"GET /derp HTTP/1.1\r\nHost: x\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n\r\n",
		} {
			conn, err := net.Dial("tcp", strings.TrimPrefix(x.url, "http://"))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { conn.Close() })
			io.WriteString(conn, begin)
		}
	}

	var most int64
	var slowest time.Duration
	for range 30 {
		slowest = max(slowest, work())
		most = max(most, heap()-before)
		time.Sleep(50 * time.Millisecond) // sampling, not waiting
	}
	t.Logf("the heap grew by %d MiB at most; what an honest agent and a person do took %v at most", most>>20, slowest)
	if most > 64<<20 {
		t.Errorf("the heap grew by %d MiB", most>>20)
	}
	if slowest > 20*time.Second {
		t.Errorf("an honest agent waited %v", slowest)
	}
	// No agent has more links than it may.
	x.links.mu.Lock()
	count := map[uuid.UUID]int{}
	for k := range x.links.open {
		count[k.agent]++
	}
	x.links.mu.Unlock()
	for id, n := range count {
		if n > maxLinks {
			t.Errorf("agent %s has %d links", id, n)
		}
	}
	if count[victim] != 1 {
		t.Errorf("the honest agent has %d links", count[victim])
	}
	if _, err := link.Ping(); err != nil {
		t.Error(err)
	}
	x.stop()
	writing.Wait()
}

// An agent's oldest link gives way, and only its own. Streams that wait for news neither give way nor
// have a link do it.
func TestTooManyLinks(t *testing.T) {
	var l links
	agent, other := uuid.New(), uuid.New()
	ended := map[int]bool{}
	l.add(&link{agent: other, calls: true, end: func() { t.Error("another agent's link was ended") }})
	for i := range maxLinks + 2 {
		if got, want := l.add(&link{agent: agent, calls: true, end: func() { ended[i] = true }}), i >= maxLinks; got != want {
			t.Errorf("link %d: said that one was ended: %v", i, got)
		}
		if l.add(&link{agent: agent, end: func() { t.Error("a stream that waits was ended") }}) {
			t.Error("a stream that waits ended a link")
		}
	}
	if len(ended) != 2 || !ended[0] || !ended[1] {
		t.Errorf("links %v were ended, want the two oldest", ended)
	}
}
