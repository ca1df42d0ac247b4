package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"github.com/berthd/berth/shell"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

// yard is an HTTP API over containers that a test makes up, and a workspace that is real.
type yard struct {
	*api
	dir string // has bin, which is the PATH, and the folders
	url string
	id  uuid.UUID // of the one declared dev container, whose folder is dir/site

	mu         sync.Mutex
	containers []wire.Container
	watcher    chan struct{}
	logged     strings.Builder
}

func newYard(t *testing.T) *yard {
	y := &yard{api: testAPI(), dir: t.TempDir(), id: uuid.New()}
	for _, dir := range []string{"bin", "site"} {
		if err := os.Mkdir(filepath.Join(y.dir, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", filepath.Join(y.dir, "bin"))
	source := uuid.New()
	m := &agentpb.Manifest{
		Devcontainers: []*agentpb.WorkspaceAgentDevcontainer{{Id: y.id[:], WorkspaceFolder: filepath.Join(y.dir, "site"), Name: "web"}},
		Scripts:       []*agentpb.WorkspaceAgentScript{{Id: y.id[:], LogSourceId: source[:]}},
	}
	workspace := shell.New(shell.Config{})
	workspace.Update(m, "")
	view := &containerView{
		list: func(context.Context) (wire.Containers, error) {
			y.mu.Lock()
			defer y.mu.Unlock()
			return wire.Containers{Containers: append([]wire.Container{}, y.containers...)}, nil
		},
		watch: func() (<-chan struct{}, func()) {
			y.mu.Lock()
			defer y.mu.Unlock()
			y.watcher = make(chan struct{}, 1)
			return y.watcher, func() {}
		},
		manifest: func() *agentpb.Manifest { return m },
		expand:   workspace.Expand, home: workspace.Home, command: workspace.Command,
		logs: func(id uuid.UUID, _ agentpb.Log_Level) io.WriteCloser {
			if id != source {
				t.Errorf("logged to %v, want the script's source", id)
			}
			return y
		},
		log: slog.New(slog.DiscardHandler),
	}
	y.api.containers = view
	ctx, cancel := context.WithCancel(context.Background())
	srv := httptest.NewUnstartedServer(y.handler())
	srv.Config.BaseContext = newHTTPServer(ctx, nil, y.log).BaseContext
	srv.Start()
	y.url = srv.URL
	done := make(chan struct{})
	go func() { defer close(done); view.run(ctx) }()
	t.Cleanup(func() {
		cancel()
		<-done
		srv.Close()
		y.work.Wait()
		http.DefaultClient.CloseIdleConnections()
	})
	eventually(t, "the view runs", func() bool {
		view.mu.Lock()
		defer view.mu.Unlock()
		return view.ctx != nil
	})
	return y
}

func (y *yard) Write(p []byte) (int, error) {
	y.mu.Lock()
	defer y.mu.Unlock()
	return y.logged.Write(p)
}

func (y *yard) Close() error { return nil }

func (y *yard) has(list ...wire.Container) {
	y.mu.Lock()
	defer y.mu.Unlock()
	y.containers = list
	if y.watcher != nil {
		y.watcher <- struct{}{}
	}
}

// install puts a devcontainer command into the workspace, which only the real one's contract binds.
func (y *yard) install(t *testing.T, script string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(y.dir, "bin/devcontainer"), []byte("#!/bin/sh\n"+script), 0o700); err != nil {
		t.Fatal(err)
	}
}

// ask makes a request and decodes its answer.
func (y *yard) ask(t *testing.T, method, path string, into any) int {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, y.url+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(body, into); err != nil {
		t.Fatalf("%s %s: %v in %q", method, path, err, body)
	}
	return resp.StatusCode
}

// only returns the state of the one dev container there is.
func (y *yard) only(t *testing.T) wire.Devcontainer {
	t.Helper()
	var list wire.Containers
	if status := y.ask(t, "GET", wire.PathAgentContainers, &list); status != 200 || len(list.Devcontainers) != 1 {
		t.Fatalf("status %d, %+v", status, list)
	}
	return list.Devcontainers[0]
}

func labelled(name, folder, config string, running bool) wire.Container {
	return wire.Container{ID: name, Name: name, Running: running, CreatedAt: time.Now(), Labels: map[string]string{labelFolder: folder, labelConfig: config}}
}

func TestDevcontainers(t *testing.T) {
	y := newYard(t)
	site := filepath.Join(y.dir, "site")
	config := filepath.Join(site, "devcontainer.json")
	other := filepath.Join(y.dir, "My App!")
	otherConfig := filepath.Join(y.dir, "other.json")
	for _, file := range []string{config, otherConfig} {
		if err := os.WriteFile(file, []byte("{}"), 0o600); err != nil {
			t.Fatal(err)
		}
		long := time.Now().Add(-time.Hour)
		if err := os.Chtimes(file, long, long); err != nil {
			t.Fatal(err)
		}
	}
	if d := y.only(t); d.ID != y.id || d.Name != "web" || d.Status != "stopped" || d.Container != nil || d.WorkspaceFolder != site {
		t.Errorf("without a container: %+v", d)
	}

	test := labelled("test", other, otherConfig, true)
	test.Labels[labelTestRun] = "true"
	y.has(
		labelled("runs", site, config, true),
		labelled("newer but stopped", site, config, false),
		labelled("claims", filepath.Join(y.dir, "elsewhere"), filepath.Join(y.dir, "none.json"), true),
		labelled("found", other, otherConfig, false),
		test,
		wire.Container{ID: "plain", Running: true},
	)
	var list wire.Containers
	y.ask(t, "GET", wire.PathAgentContainers, &list)
	type row struct{ Name, Status, Container string }
	var got []row
	for _, d := range list.Devcontainers {
		got = append(got, row{d.Name, d.Status, d.Container.ID})
		if d.Dirty {
			t.Errorf("%s is dirty: %+v", d.Name, d)
		}
	}
	if diff := cmp.Diff([]row{{"web", "running", "runs"}, {"my-app", "stopped", "found"}}, got); diff != "" {
		t.Errorf("dev containers (-want +got):\n%s", diff)
	}
	if len(list.Containers) != 6 {
		t.Errorf("%d containers, want all 6", len(list.Containers))
	}
	id := list.Devcontainers[1].ID

	later := time.Now().Add(time.Hour)
	if err := os.Chtimes(config, later, later); err != nil {
		t.Fatal(err)
	}
	y.ask(t, "GET", wire.PathAgentContainers, &list)
	if !list.Devcontainers[0].Dirty || list.Devcontainers[1].ID != id {
		t.Errorf("after a change of the configuration: %+v", list.Devcontainers)
	}
}

func TestRecreateDevcontainer(t *testing.T) {
	y := newYard(t)
	recreate := wire.PathAgentContainers + "/devcontainers/" + y.id.String() + "/recreate"
	var answer wire.Error
	for _, path := range []string{uuid.NewString(), "web"} {
		if status := y.ask(t, "POST", wire.PathAgentContainers+"/devcontainers/"+path+"/recreate", &answer); status != 404 || answer.Message != "Devcontainer not found." {
			t.Errorf("%s: %d %+v", path, status, answer)
		}
	}
	if status := y.ask(t, "POST", recreate, &answer); status != 500 || !strings.Contains(answer.Detail, "devcontainer command") {
		t.Errorf("without the command: %d %+v", status, answer)
	}
	if d := y.only(t); d.Status != "stopped" {
		t.Errorf("a refusal left %+v", d)
	}

	gate := filepath.Join(y.dir, "gate")
	y.install(t, `
		echo "$*" >"`+y.dir+`/args"
		echo '{"type":"text","level":3,"text":"building"}' >&2
		echo '{"type":"text","level":1,"text":"noise"}' >&2
		while ! [ -e "`+gate+`" ]; do /bin/sleep 0.02; done
		echo '{"outcome":"success","containerId":"c1"}'`)
	answer = wire.Error{}
	if status := y.ask(t, "POST", recreate, &answer); status != 202 {
		t.Fatalf("%d %+v", status, answer)
	}
	want := wire.Error{Message: "Devcontainer recreation initiated", Detail: `Recreation process for devcontainer "web" has started.`}
	if diff := cmp.Diff(want, answer); diff != "" {
		t.Errorf("answer (-want +got):\n%s", diff)
	}
	if d := y.only(t); d.Status != "starting" {
		t.Errorf("while it runs: %+v", d)
	}
	if status := y.ask(t, "POST", recreate, &answer); status != 409 || answer.Message != "Unable to recreate transitioning devcontainer" {
		t.Errorf("a second one: %d %+v", status, answer)
	}
	if status := y.ask(t, "DELETE", strings.TrimSuffix(recreate, "/recreate"), &answer); status != 409 || answer.Message != "Unable to delete transitioning devcontainer" {
		t.Errorf("delete: %d %+v", status, answer)
	}
	if err := os.WriteFile(gate, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is done", func() bool { return y.only(t).Status == "stopped" }) // no engine here made a container
	args, err := os.ReadFile(filepath.Join(y.dir, "args"))
	if want := "up --log-format json --workspace-folder " + y.dir + "/site --remove-existing-container\n"; err != nil || string(args) != want {
		t.Errorf("ran with %q, %v; want %q", args, err, want)
	}
	if got := y.logged.String(); got != "building\n" {
		t.Errorf("logged %q", got)
	}
	if status := y.ask(t, "DELETE", strings.TrimSuffix(recreate, "/recreate"), &answer); status != 500 || !strings.Contains(answer.Detail, "removes no containers") {
		t.Errorf("delete: %d %+v", status, answer)
	}

	y.install(t, `echo '{"outcome":"error","message":"no such image","description":"cannot build"}'; exit 1`)
	y.ask(t, "POST", recreate, &answer)
	eventually(t, "it failed", func() bool { return y.only(t).Status == "error" })
	if d := y.only(t); !strings.Contains(d.Error, "no such image") {
		t.Errorf("failed as %+v", d)
	}
}

func TestWatchContainers(t *testing.T) {
	y := newYard(t)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	conn, resp, err := websocket.Dial(ctx, y.url+wire.PathAgentContainers+"/watch", &websocket.DialOptions{CompressionMode: websocket.CompressionNoContextTakeover})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.CloseNow()
	if got := resp.Header.Get("Sec-WebSocket-Extensions"); !strings.Contains(got, "permessage-deflate; client_no_context_takeover; server_no_context_takeover") {
		t.Errorf("extensions %q", got)
	}
	next := func() wire.Containers {
		kind, message, err := conn.Read(ctx)
		if err != nil {
			t.Fatal(err)
		}
		var list wire.Containers
		if err := json.Unmarshal(message, &list); err != nil || kind != websocket.MessageText || !strings.HasSuffix(string(message), "}\n") {
			t.Errorf("%v message %q: %v", kind, message, err)
		}
		return list
	}
	if list := next(); len(list.Devcontainers) != 1 || list.Devcontainers[0].Status != "stopped" {
		t.Errorf("first %+v", list)
	}
	y.install(t, `exit 3`)
	y.ask(t, "POST", wire.PathAgentContainers+"/devcontainers/"+y.id.String()+"/recreate", new(wire.Error))
	var states []string
	for len(states) == 0 || states[len(states)-1] != "error" {
		states = append(states, next().Devcontainers[0].Status)
	}
	if states[0] == "stopped" || len(states) > 2 {
		t.Errorf("states %q, want starting, which may be missed, and error", states)
	}
	y.has(wire.Container{ID: "c1", Name: "new"})
	if list := next(); len(list.Containers) != 1 || list.Containers[0].Name != "new" {
		t.Errorf("after an engine told of a container: %+v", list.Containers)
	}
}

// TestWatchOfVeryMany: readers close on a message that is too long.
func TestWatchOfVeryMany(t *testing.T) {
	list := wire.Containers{Warnings: []string{"first"}}
	for i := range 3000 {
		list.Containers = append(list.Containers, wire.Container{Name: fmt.Sprint(i), Labels: map[string]string{"l": strings.Repeat("x", 4000)}})
	}
	message, err := watchMessage(list)
	if err != nil || len(message) > wire.MaxContainersMessage {
		t.Fatalf("%d bytes, %v", len(message), err)
	}
	var got wire.Containers
	if err := json.Unmarshal(message, &got); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("%d of 3000 containers are left out: a watch has no room for more", 3000-len(got.Containers))
	if len(got.Containers) < 800 || len(got.Warnings) != 2 || got.Warnings[1] != want || len(list.Containers) != 3000 || len(list.Warnings) != 1 {
		t.Errorf("%d containers, %q", len(got.Containers), got.Warnings)
	}
}

func unwatched() (<-chan struct{}, func()) { return nil, func() {} }

// TestWatchEndsWithTheAgent: a stop says goodbye and waits for nobody.
func TestWatchEndsWithTheAgent(t *testing.T) {
	a := testAPI()
	a.containers.list = func(context.Context) (wire.Containers, error) { return wire.Containers{}, nil }
	a.containers.watch = unwatched
	a.containers.manifest = func() *agentpb.Manifest { return nil }
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	l := listenLoopback(t)
	served := make(chan error, 1)
	go func() { served <- a.serve(ctx, l) }()
	conn, _, err := websocket.Dial(t.Context(), "http://"+l.Addr().String()+wire.PathAgentContainers+"/watch", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.CloseNow()
	if _, _, err := conn.Read(t.Context()); err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, _, err := conn.Read(context.Background()); websocket.CloseStatus(err) != websocket.StatusGoingAway {
		t.Errorf("closed with %v, want 1001", err)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
	http.DefaultClient.CloseIdleConnections()
}

// TestWatcherThatDoesNotAnswer: it does not hold up a stop beyond its second.
func TestWatcherThatDoesNotAnswer(t *testing.T) {
	a := testAPI()
	a.containers.list = func(context.Context) (wire.Containers, error) { return wire.Containers{}, nil }
	a.containers.watch = unwatched
	a.containers.manifest = func() *agentpb.Manifest { return nil }
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	l := listenLoopback(t)
	served := make(chan error, 1)
	go func() { served <- a.serve(ctx, l) }()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET %s/watch HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n", wire.PathAgentContainers)
	buf := make([]byte, 4096)
	for seen := ""; !strings.Contains(seen, "devcontainers"); {
		n, err := conn.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		seen += string(buf[:n])
	}
	cancel()
	began := time.Now()
	if err := <-served; err != nil {
		t.Error(err)
	}
	// The library alone waits for 5 s, as long as the whole stage may take.
	if took := time.Since(began); took > 4*time.Second {
		t.Errorf("took %v", took)
	}
}

func TestContainersSwitchedOff(t *testing.T) {
	a := testAPI()
	a.containers.refusal = "Dev Container feature not enabled."
	h := a.handler()
	for target, want := range map[string]int{wire.PathAgentContainers: 403, wire.PathAgentContainers + "/watch": 404, wire.PathAgentContainers + "/devcontainers/x/recreate": 404} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, request("GET", target, ""))
		if w.Code != want || want == 403 && !strings.Contains(w.Body.String(), `"message":"Dev Container feature not enabled."`) {
			t.Errorf("%s: %d %s", target, w.Code, w.Body)
		}
	}
}

func TestWatchRefusals(t *testing.T) {
	a := testAPI()
	w := httptest.NewRecorder()
	a.handler().ServeHTTP(w, request("GET", wire.PathAgentContainers+"/watch", ""))
	if w.Code != 500 || !strings.Contains(w.Body.String(), "Could not get containers") {
		t.Errorf("no engine: %d %s", w.Code, w.Body)
	}
	y := newYard(t)
	y.watchers.Store(maxWatchers)
	w = httptest.NewRecorder()
	y.handler().ServeHTTP(w, request("GET", wire.PathAgentContainers+"/watch", ""))
	if w.Code != 503 {
		t.Errorf("too many: %d %s", w.Code, w.Body)
	}
}

func TestDevcontainerName(t *testing.T) {
	for folder, want := range map[string]string{
		"/w/My App!": "my-app", "/": "devcontainer", "/w/åäö": "devcontainer",
		"/w/" + strings.Repeat("x", 80): strings.Repeat("x", 64), "/w/a.b_c": "a-b-c",
	} {
		if got := devcontainerName(folder); got != want {
			t.Errorf("%s: %q, want %q", folder, got, want)
		}
	}
}

func FuzzDevcontainerOutput(f *testing.F) {
	f.Add(`{"outcome":"success","containerId":"x"}`)
	f.Add("{\"level\":3,\"text\":\"a\\n\"}\nplain\n{\"outcome\":\"error\"}\n")
	f.Add("{\"level\":\"3\"}\n\x00\n")
	f.Fuzz(func(t *testing.T, out string) {
		o := readOutcome(strings.NewReader(out))
		if o.Outcome == "success" && o.problem() != "" {
			t.Errorf("%q is both", out)
		}
		log := &devcontainerLog{to: io.Discard}
		if n, err := log.Write([]byte(out)); n != len(out) || err != nil {
			t.Errorf("wrote %d: %v", n, errors.Join(err))
		}
	})
}

// TestScriptOfADevcontainer: what stands for a dev container is not run as a script, unless berthd knows
// none of them.
func TestScriptOfADevcontainer(t *testing.T) {
	id, other := uuid.New(), uuid.New()
	m := &agentpb.Manifest{
		Scripts:       []*agentpb.WorkspaceAgentScript{{Id: other[:]}, {Id: id[:]}, {}},
		Devcontainers: []*agentpb.WorkspaceAgentDevcontainer{{Id: id[:]}, {}},
	}
	a := &agent{}
	if own := a.ownScripts(m); len(own) != 2 || own[0] != m.Scripts[0] || own[1] != m.Scripts[2] {
		t.Errorf("scripts %v", own)
	}
	a.cfg.Services.NoDevcontainers = true
	if own := a.ownScripts(m); len(own) != 3 {
		t.Errorf("without dev containers: %v", own)
	}
	a.cfg.Services.NoDevcontainers = false
	m.ParentId = other[:]
	if own := a.ownScripts(m); len(own) != 3 {
		t.Errorf("in a sub-agent: %v", own)
	}
}
