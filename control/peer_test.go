package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/coder/websocket"
	"github.com/google/uuid"

	"github.com/berthd/berth/tailnet"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
	"github.com/berthd/berth/wire/tailnetpb"
)

// join puts an agent on the mesh that serves api on its port 4 and echoes terminals on port 2.
func (x *site) join(id uuid.UUID, token wire.Secret, api http.Handler) *agentLink {
	t := x.t
	t.Helper()
	l := x.connect(token)
	manifest, err := l.agent.GetManifest(t.Context(), &agentpb.GetManifestRequest{})
	if err != nil {
		t.Fatal(err)
	}
	access, err := url.Parse(x.url)
	if err != nil {
		t.Fatal(err)
	}
	node, err := tailnet.New(tailnet.Config{Prefixes: wire.AgentPrefixes(id), AccessURL: access, RelayOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { node.Close() })
	if err := node.SetDERPMap(manifest.GetDerpMap()); err != nil {
		t.Fatal(err)
	}
	web, err := node.Listen(wire.PortHTTP)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: api}
	go server.Serve(web)
	t.Cleanup(func() { server.Close() })
	pty, err := node.Listen(wire.PortPTY)
	if err != nil {
		t.Fatal(err)
	}
	go echoTerminals(pty)

	ctx, cancel := context.WithCancel(context.Background())
	stream, err := l.tailnet.Coordinate(ctx)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		node.CoordinateAgent(ctx, stream)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return l
}

// echoTerminals answers each terminal with its name and then what is typed, until "exit".
func echoTerminals(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			init, err := wire.ReadPTYInit(conn)
			if err != nil {
				return
			}
			fmt.Fprintf(conn, "%s %dx%d %s\n", init.ID, init.Width, init.Height, init.Command)
			requests := wire.NewPTYRequestReader(conn)
			for {
				req, err := requests.Next()
				if err != nil || req.Data == "exit" {
					return
				}
				io.WriteString(conn, req.Data)
			}
		}()
	}
}

// TestThroughTheMesh asks an agent over the server's own node.
func TestThroughTheMesh(t *testing.T) {
	x := configured(t, Config{})
	id, token := x.declared("demo")
	var answer atomic.Value
	victim := make(chan string, 10)
	decoy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	target := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { victim <- r.URL.Path })}
	go target.Serve(decoy)
	defer target.Close()
	l := x.join(id, token, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer.Load().(func(http.ResponseWriter, *http.Request))(w, r)
	}))
	says := func(status int, body string) {
		answer.Store(func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(status)
			io.WriteString(w, body)
		})
	}
	path := "/api/v2/workspaceagents/" + id.String()
	ask := func(what string, status int, want string) {
		t.Helper()
		got, body := x.call("GET", path+what, "", x.asUser()...)
		if got != status || !strings.Contains(body, want) {
			t.Errorf("%s: %d %.300s, want %d %s", what, got, body, status, want)
		}
	}

	says(200, `{"ports":[{"process_name":"x","network":"tcp","port":8},{"process_name":"sshd","network":"tcp","port":22},
		{"process_name":"web","network":"tcp","port":8080},{"process_name":"mine","network":"tcp","port":3000}]}`)
	ask("/listening-ports", 200, `{"ports":[{"process_name":"mine","network":"tcp","port":3000}]}`)

	says(200, `{"devcontainers":null,"containers":[{"id":"1","labels":{"a":"b"}},{"id":"2","labels":{"a":"c"}}],"warnings":["w"]}`)
	ask("/containers?label=a=c", 200, `"containers":[{"created_at":"0001-01-01T00:00:00Z","id":"2"`)
	says(403, `{"message":"Dev Container feature not enabled."}`)
	ask("/containers", 403, `{"message":"Dev Container feature not enabled."}`)
	says(500, "<html>")
	ask("/containers", 500, `"message":"The agent answered with an error."`)
	ask("/listening-ports", 500, `"message":"Internal error fetching listening ports."`)

	// A hostile agent: sends the server elsewhere, answers without end, answers nonsense.
	answer.Store(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "http://"+decoy.Addr().String()+"/api/v0/listening-ports", http.StatusTemporaryRedirect)
	})
	ask("/listening-ports", 500, "the agent answered 307")
	answer.Store(func(w http.ResponseWriter, r *http.Request) {
		for {
			if _, err := w.Write(make([]byte, 64<<10)); err != nil {
				return
			}
		}
	})
	ask("/containers", 500, "longer than")
	says(200, "not JSON")
	ask("/listening-ports", 500, "cannot decode")
	select {
	case p := <-victim:
		t.Errorf("the server followed the agent to %s", p)
	default:
	}

	// A terminal.
	session := uuid.New()
	ws, _, err := websocket.Dial(t.Context(), x.url+path+"/pty?reconnect="+session.String()+"&width=100&height=30&command=top",
		&websocket.DialOptions{HTTPClient: x.http, HTTPHeader: http.Header{wire.HeaderSessionToken: {x.key.Reveal()}}})
	if err != nil {
		t.Fatal(err)
	}
	defer ws.CloseNow()
	term := websocket.NetConn(t.Context(), ws, websocket.MessageBinary)
	if _, err := io.WriteString(term, `{"data":"hello`); err != nil { // message boundaries carry no meaning
		t.Fatal(err)
	}
	if _, err := io.WriteString(term, ` there"}{"height":5,"width":5}{"data":"exit"}`); err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(term)
	if want := session.String() + " 100x30 top\nhello there"; err != nil || string(text) != want {
		t.Errorf("terminal said %q (%v), want %q", text, err, want)
	}

	// The view of a node that is on the mesh has its latency.
	var view wire.Agent
	x.get(path, &view)
	if !view.Latency["Berth Embedded Relay"].Preferred {
		t.Errorf("latency %v", view.Latency)
	}
	l.Close()
	eventually(t, "the agent is gone", func() bool {
		status, _ := x.call("GET", path+"/listening-ports", "", x.asUser()...)
		return status == http.StatusBadRequest
	})
}

// TestClientsMayNot: what a client's link does not open.
func TestClientsMayNot(t *testing.T) {
	x := serve(t, Config{})
	id, _ := x.create("demo")
	other, _ := x.create("other")
	l := x.link("/api/v2/workspaceagents/"+id.String()+"/coordinate?version=2.0", http.Header{wire.HeaderSessionToken: {x.key.Reveal()}})
	stream, err := l.tailnet.Coordinate(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&tailnetpb.CoordinateRequest{AddTunnel: &tailnetpb.CoordinateRequest_Tunnel{Id: other[:]}}); err != nil {
		t.Fatal(err)
	}
	resp, err := stream.Recv()
	if err != nil || !strings.HasPrefix(resp.GetError(), "authorization: invalid agent id") {
		t.Errorf("%v, %v", resp, err)
	}
	if _, err := stream.Recv(); err == nil || errors.Is(err, context.Canceled) {
		t.Errorf("the stream goes on: %v", err)
	}
}
