package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

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
		{"process_name":"web","network":"tcp","port":8080},{"process_name":"mine","network":"tcp","port":3000},{"process_name":"dns","network":"udp","port":5353}]}`)
	ask("/listening-ports", 200, `{"ports":[{"process_name":"mine","network":"tcp","port":3000}]}`)
	ask("/listening-ports?network=all", 200, `{"ports":[{"process_name":"sshd","network":"tcp","port":22},`+
		`{"process_name":"web","network":"tcp","port":8080},{"process_name":"mine","network":"tcp","port":3000},{"process_name":"dns","network":"udp","port":5353}]}`)

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

	// An agent's failure is told apart from one of the way to it.
	says(500, `{"message":"Could not scan for listening ports."}`)
	ask("/listening-ports", 500, `{"message":"Internal error fetching listening ports.","detail":"Could not scan for listening ports."}`)

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

// TestDevcontainers asks an agent to change what it has, and watches it.
func TestDevcontainers(t *testing.T) {
	x := configured(t, Config{})
	id, token := x.declared("demo")
	list, ended := make(chan string), make(chan struct{}, 10)
	known, hostile := uuid.New(), uuid.New()
	decoy := make(chan string, 10)
	elsewhere := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { decoy <- r.Method + " " + r.URL.Path }))
	defer elsewhere.Close()
	redirect := atomic.Bool{}
	api := http.NewServeMux()
	api.HandleFunc("/api/v0/containers/watch", func(w http.ResponseWriter, r *http.Request) {
		if redirect.Load() {
			http.Redirect(w, r, elsewhere.URL+"/watch", http.StatusTemporaryRedirect)
			return
		}
		conn, err := websocket.Accept(w, r, &websocket.AcceptOptions{CompressionMode: websocket.CompressionNoContextTakeover})
		if err != nil {
			return
		}
		defer conn.CloseNow()
		gone := conn.CloseRead(r.Context())
		defer func() { ended <- struct{}{} }()
		for {
			select {
			case text := <-list:
				if text == "" {
					conn.Close(websocket.StatusNormalClosure, "")
					return
				}
				if conn.Write(r.Context(), websocket.MessageText, []byte(text)) != nil {
					return
				}
			case <-gone.Done():
				return
			}
		}
	})
	api.HandleFunc("POST /api/v0/containers/devcontainers/{id}/recreate", func(w http.ResponseWriter, r *http.Request) {
		switch r.PathValue("id") {
		case known.String():
			w.WriteHeader(http.StatusAccepted)
			io.WriteString(w, `{"message":"Devcontainer recreation initiated","detail":"Recreation process for devcontainer \"x\" has started."}`)
		case hostile.String():
			http.Redirect(w, r, elsewhere.URL+"/recreate", http.StatusTemporaryRedirect)
		default:
			w.WriteHeader(http.StatusNotFound)
			io.WriteString(w, `{"message":"Devcontainer not found."}`)
		}
	})
	api.HandleFunc("DELETE /api/v0/containers/devcontainers/{id}", func(w http.ResponseWriter, r *http.Request) {
		if r.PathValue("id") == known.String() {
			w.WriteHeader(http.StatusConflict)
			io.WriteString(w, `{"message":"Unable to delete transitioning devcontainer"}`)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	})
	path := "/api/v2/workspaceagents/" + id.String() + "/containers"
	notConnected := `{"message":"Agent state is \"connecting\", it must be in the \"connected\" state."}` + "\n"
	for _, ask := range []struct{ method, path string }{
		{"GET", path + "/watch"}, {"POST", path + "/devcontainers/" + known.String() + "/recreate"}, {"DELETE", path + "/devcontainers/" + known.String()},
	} {
		if status, body := x.call(ask.method, ask.path, "", x.asUser()...); status != 400 || body != notConnected {
			t.Errorf("absent agent, %s %s: %d %s", ask.method, ask.path, status, body)
		}
	}
	x.join(id, token, api)

	for _, tt := range []struct {
		method, path string
		status       int
		body         string
	}{
		{"POST", known.String() + "/recreate", 202, `{"message":"Devcontainer recreation initiated","detail":"Recreation process for devcontainer \"x\" has started."}` + "\n"},
		{"POST", uuid.NewString() + "/recreate", 404, `{"message":"Devcontainer not found."}` + "\n"},
		{"POST", "x/recreate", 400, `{"message":"Invalid UUID \"x\".","detail":"invalid UUID length: 1"}` + "\n"},
		{"POST", "..%2F..%2Fx/recreate", 400, `{"message":"Invalid UUID \"../../x\".","detail":"invalid UUID length: 7"}` + "\n"},
		{"POST", hostile.String() + "/recreate", 500, `{"message":"Internal error recreating devcontainer.","detail":"the agent answered 307"}` + "\n"},
		{"DELETE", known.String(), 409, `{"message":"Unable to delete transitioning devcontainer"}` + "\n"},
		{"DELETE", uuid.NewString(), 204, ""},
	} {
		status, body := x.call(tt.method, path+"/devcontainers/"+tt.path, "", x.asUser()...)
		if status != tt.status || body != tt.body {
			t.Errorf("%s %s: %d %s", tt.method, tt.path, status, body)
		}
	}

	watch := func() (*websocket.Conn, *http.Response, error) {
		return websocket.Dial(t.Context(), x.url+path+"/watch", &websocket.DialOptions{
			HTTPClient: x.http, HTTPHeader: http.Header{wire.HeaderSessionToken: {x.key.Reveal()}}, CompressionMode: websocket.CompressionContextTakeover,
		})
	}
	conn, resp, err := watch()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.CloseNow()
	if got := resp.Header.Get("Sec-WebSocket-Extensions"); got != "" {
		t.Errorf("the server speaks %q to its client", got)
	}
	conn.SetReadLimit(wire.MaxContainersMessage)
	name := strings.Repeat("x", 100<<10) // longer than the library's own limit
	for _, text := range []string{`{"devcontainers":null,"containers":[]}`, `{"containers":[{"name":"` + name + `"}]}`} {
		list <- text
		kind, message, err := conn.Read(t.Context())
		if err != nil || kind != websocket.MessageText || !strings.HasPrefix(string(message), `{"devcontainers":null,"containers":[`) || message[len(message)-1] != '\n' {
			t.Fatalf("%v %.100s %v", kind, message, err)
		}
		if strings.Contains(text, name) != strings.Contains(string(message), name) {
			t.Errorf("the list is not the agent's")
		}
	}
	list <- "nonsense"
	if _, _, err := conn.Read(t.Context()); websocket.CloseStatus(err) != websocket.StatusInternalError {
		t.Errorf("after nonsense: %v", err)
	}
	<-ended // with its reader, the agent's side goes too
	if conn, _, err = watch(); err != nil {
		t.Fatal(err)
	}
	defer conn.CloseNow()
	list <- ""
	if _, _, err := conn.Read(t.Context()); websocket.CloseStatus(err) != websocket.StatusInternalError || !strings.Contains(err.Error(), "lost the agent") {
		t.Errorf("after the agent ended it: %v", err)
	}
	redirect.Store(true)
	status, body := x.call("GET", path+"/watch", "", x.asUser()...)
	if status != 500 || !strings.HasPrefix(body, `{"message":"Internal error watching agent's containers.","detail":"the agent answered 307"`) {
		t.Errorf("a redirect: %d %s", status, body)
	}
	select {
	case p := <-decoy:
		t.Errorf("the server followed the agent to %s", p)
	default:
	}
}

// TestTerminalOfNobody: that there is no way to an agent is said on the socket.
func TestTerminalOfNobody(t *testing.T) {
	x := serve(t, Config{})
	id, _ := x.create("demo")
	conn, _, err := websocket.Dial(t.Context(), x.url+"/api/v2/workspaceagents/"+id.String()+"/pty?reconnect="+uuid.NewString(),
		&websocket.DialOptions{HTTPClient: x.http, HTTPHeader: http.Header{wire.HeaderSessionToken: {x.key.Reveal()}}})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.CloseNow()
	_, _, err = conn.Read(t.Context())
	var closed websocket.CloseError
	if !errors.As(err, &closed) || closed.Code != websocket.StatusInternalError || closed.Reason != `dial workspace agent: Agent state is "connecting", it must be in the "connected" state.` {
		t.Errorf("closed with %v", err)
	}
}

// TestTerminalToken: it opens terminals of its agent, and nothing else, and not for long.
func TestTerminalToken(t *testing.T) {
	x := serve(t, Config{})
	id, _ := x.create("demo")
	other, _ := x.create("other")
	const at = "/api/v2/applications/reconnecting-pty-signed-token"
	body := func(url string, id uuid.UUID) string { return fmt.Sprintf(`{"url":%q,"agentID":%q}`, url, id) }
	terminals := "/api/v2/workspaceagents/" + id.String() + "/pty"
	status, text := x.call("POST", at, body("ws://x"+terminals+"?reconnect=1", id), x.asUser()...)
	var made wire.SignedTerminalToken
	if err := json.Unmarshal([]byte(text), &made); err != nil || status != 200 || made.SignedToken == "" {
		t.Fatalf("%d %s", status, text)
	}
	missing := uuid.New()
	for _, tt := range []struct {
		body   string
		status int
	}{
		{`{}`, 400}, {body("http://x/api/v2/buildinfo", id), 400}, {body("http://x"+terminals, other), 400},
		{body("http://x/api/v2/workspaceagents/"+missing.String()+"/pty", missing), 404},
	} {
		if status, text := x.call("POST", at, tt.body, x.asUser()...); status != tt.status {
			t.Errorf("%s: %d %s", tt.body, status, text)
		}
	}
	if status, _ := x.call("POST", at, body(terminals, id)); status != 401 {
		t.Errorf("without a key: %d", status)
	}
	open := func(path, token string) int {
		status, _ := x.call("GET", path+"?reconnect="+uuid.NewString()+"&"+wire.QuerySignedAppToken+"="+token, "")
		return status
	}
	flipped := []byte(made.SignedToken)
	flipped[30] ^= 1
	for name, tt := range map[string]struct {
		path, token string
		status      int
	}{
		"good (but no upgrade)": {terminals, made.SignedToken, 400},
		"another agent's":       {"/api/v2/workspaceagents/" + other.String() + "/pty", made.SignedToken, 401},
		"not for logs":          {"/api/v2/workspaceagents/" + id.String() + "/logs", made.SignedToken, 401},
		"forged":                {terminals, string(flipped), 401},
		"short":                 {terminals, "AAAA", 401},
		"over":                  {terminals, x.terminalToken(id, time.Now().Add(-time.Second)), 401},
		"no UUID":               {"/api/v2/workspaceagents/me/pty", made.SignedToken, 401},
	} {
		if got := open(tt.path, tt.token); got != tt.status {
			t.Errorf("%s: %d, want %d", name, got, tt.status)
		}
	}
}

func FuzzTerminalToken(f *testing.F) {
	s := &Server{resumeKey: []byte("fuzz")}
	agent, now := uuid.New(), time.Now()
	f.Add(s.terminalToken(agent, now.Add(-time.Hour)))
	f.Add(s.terminalToken(uuid.New(), now.Add(time.Hour)))
	f.Add("")
	f.Fuzz(func(t *testing.T, token string) {
		if s.checkTerminalToken(token, agent, now) {
			t.Errorf("%q is good", token)
		}
	})
}

func FuzzPTYQuery(f *testing.F) {
	f.Add("reconnect=6ba7b810-9dad-11d1-80b4-00c04fd430c8&height=5&width=65535&command=ls")
	f.Add("reconnect=x&height=-1&width=65536&backend_type=tmux")
	f.Add("reconnect=00000000-0000-0000-0000-000000000000")
	f.Add("%zz;&&=&reconnect")
	f.Fuzz(func(t *testing.T, text string) {
		query, _ := url.ParseQuery(text) // as net/http: what cannot be read is left out
		init, e := parsePTY(query)
		if (e == nil) != (init.ID != uuid.Nil) || e != nil && len(e.Validations) == 0 {
			t.Errorf("%q: %+v, %+v", text, init, e)
		}
	})
}

func FuzzLabels(f *testing.F) {
	f.Add("label=a=b&label=c=d")
	f.Add("label=a")
	f.Add("label=a=b=c&label==")
	f.Fuzz(func(t *testing.T, text string) {
		query, _ := url.ParseQuery(text)
		labels, e := parseLabels(query)
		if e == nil && len(labels) > len(query["label"]) || e != nil && labels != nil {
			t.Errorf("%q: %v, %v", text, labels, e)
		}
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
