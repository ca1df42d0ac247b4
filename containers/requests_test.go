package containers

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	"github.com/berthd/berth/internal/enginelab"
	"github.com/berthd/berth/wire"
)

// proxy is a real engine behind a socket that takes note of every request, and may change it or its answer.
type proxy struct {
	host string

	mu       sync.Mutex
	requests []string // method and path
}

// proxied puts a proxy before an engine. Either change may be nil.
func proxied(t *testing.T, e *enginelab.Engine, request func(*http.Request), answer func(*http.Response)) *proxy {
	t.Helper()
	p := new(proxy)
	var conns sync.WaitGroup
	p.host = socket(t, func(l net.Listener) {
		ended := make(chan struct{})
		defer conns.Wait()
		defer close(ended)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conns.Go(func() {
				defer conn.Close()
				behind, err := net.Dial("unix", strings.TrimPrefix(e.Host, "unix://"))
				if err != nil {
					return
				}
				passed := make(chan struct{})
				conns.Go(func() {
					select {
					case <-ended: // an engine's events have no end of their own
					case <-passed:
					}
					behind.Close()
				})
				p.pass(conn, behind, request, answer)
				close(passed)
			})
		}
	})
	return p
}

func (p *proxy) pass(conn, behind net.Conn, change func(*http.Request), changeAnswer func(*http.Response)) {
	from, to := bufio.NewReader(conn), bufio.NewReader(behind)
	for {
		req, err := http.ReadRequest(from)
		if err != nil {
			return
		}
		p.mu.Lock()
		p.requests = append(p.requests, req.Method+" "+req.URL.Path)
		p.mu.Unlock()
		if change != nil {
			change(req)
		}
		if req.Write(behind) != nil {
			return
		}
		resp, err := http.ReadResponse(to, req)
		if err != nil {
			return
		}
		if resp.StatusCode == http.StatusSwitchingProtocols {
			resp.Write(conn)
			go func() {
				io.Copy(behind, from)
				behind.(*net.UnixConn).CloseWrite()
			}()
			io.Copy(conn, to)
			return
		}
		if changeAnswer != nil {
			changeAnswer(resp)
		}
		if resp.Write(conn) != nil {
			return
		}
	}
}

// The requests that an engine gets when containers are looked at, and when a command runs in one, are these and no others.
func TestRequests(t *testing.T) { onEach(t, testRequests) }

func testRequests(t *testing.T, e *enginelab.Engine) {
	p := proxied(t, e, nil, nil)
	l := run(t, lister(engine{name: "proxied", host: p.host}))
	changed, stop := l.Watch()
	defer stop()
	id := up(t, e, enginelab.Spec("watched", "sleep", "1000"))
	eventually(t, "it is listed", func() bool { return named(list(t, l), "watched") != nil })
	<-changed
	looked := p.take()
	check := func(got []string, allowed ...string) {
		t.Helper()
		used := map[string]bool{}
		for _, r := range got {
			i := slices.IndexFunc(allowed, func(pattern string) bool { return regexp.MustCompile("^" + pattern + "$").MatchString(r) })
			if i < 0 {
				t.Errorf("the engine was asked for %s", r)
				continue
			}
			used[allowed[i]] = true
		}
		for _, pattern := range allowed {
			if !used[pattern] && pattern != "GET /_ping" {
				t.Errorf("nothing asked for %s: is the list still true?", pattern)
			}
		}
	}
	const version = `/v1\.[0-9]+`
	check(looked, "HEAD /_ping", "GET /_ping", "GET "+version+"/events", "GET "+version+"/containers/json", "GET "+version+"/containers/"+id+"/json")

	proc, err := Start(t.Context(), p.host, id, Command{Line: "trap 'exit 6' USR1; echo up; while :; do sleep 0.05; done", Terminal: true, Rows: 20, Cols: 30})
	if err != nil {
		t.Fatal(err)
	}
	defer proc.Close()
	var out watcher
	copied := make(chan error, 1)
	go func() { copied <- proc.Copy(&out, &out) }()
	eventually(t, "it runs", func() bool { return out.saw("up") })
	if err := proc.Resize(t.Context(), 22, 33); err != nil {
		t.Error(err)
	}
	// Not root's way, but the one of users who may not see the process.
	if err := proc.signalInside(t.Context(), syscall.SIGUSR1); err != nil {
		t.Error(err)
	}
	if err := <-copied; err != nil {
		t.Error(err)
	}
	if code, err := proc.Wait(t.Context()); code != 6 || err != nil {
		t.Errorf("exit code %d, %v", code, err)
	}
	stop()
	var executed []string
	for _, r := range p.take() {
		if !strings.HasSuffix(r, "/containers/json") && !strings.HasSuffix(r, "/events") { // the lister's
			executed = append(executed, r)
		}
	}
	const exec = version + "/exec/[0-9a-f]{64}"
	check(executed, "HEAD /_ping", "GET /_ping", "GET "+version+"/containers/"+id+"/json", "POST "+version+"/containers/"+id+"/exec",
		"POST "+exec+"/start", "POST "+exec+"/resize", "GET "+exec+"/json")

	// A command that may be over by then is not held up to size its terminal.
	brief, err := Start(t.Context(), p.host, id, Command{Line: "true", Terminal: true, Rows: 20, Cols: 30})
	if err != nil {
		t.Fatal(err)
	}
	defer brief.Close()
	if asked := p.take(); slices.ContainsFunc(asked, func(r string) bool { return strings.HasSuffix(r, "/resize") }) {
		t.Errorf("starting asked for %q", asked)
	}
	if err := brief.Copy(io.Discard, io.Discard); err != nil {
		t.Error(err)
	}
	if code, err := brief.Wait(t.Context()); code != 0 || err != nil {
		t.Errorf("exit code %d, %v", code, err)
	}

	// What is not on the list does not even leave.
	for name, list := range map[string][]request{"looking": looking, "executing": executing} {
		api, err := engine{name: "proxied", host: p.host}.connect(t.Context(), list, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer api.Close()
		p.take()
		for what, ask := range map[string]func() error{
			"remove": func() error {
				_, err := api.ContainerRemove(t.Context(), id, client.ContainerRemoveOptions{Force: true})
				return err
			},
			"stop": func() error { _, err := api.ContainerStop(t.Context(), id, client.ContainerStopOptions{}); return err },
			"create": func() error {
				_, err := api.ContainerCreate(t.Context(), enginelab.Spec("more", "true"))
				return err
			},
			"images": func() error { _, err := api.ImageList(t.Context(), client.ImageListOptions{}); return err },
			"a path": func() error {
				_, err := api.ContainerInspect(t.Context(), "../images/"+id, client.ContainerInspectOptions{})
				return err
			},
			"a name": func() error {
				_, err := api.ContainerInspect(t.Context(), "watched", client.ContainerInspectOptions{})
				return err
			},
		} {
			if err := ask(); err == nil || !strings.Contains(err.Error(), "berthd never does") {
				t.Errorf("%s may %s: %v", name, what, err)
			}
		}
		for _, r := range p.take() {
			if strings.Contains(r, "watched") || strings.Contains(r, "images") || strings.HasPrefix(r, "DELETE") || strings.HasSuffix(r, "stop") {
				t.Errorf("%s let through %s", name, r)
			}
		}
	}
}

func (p *proxy) take() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	taken := p.requests
	p.requests = nil
	return taken
}

// watcher keeps what is written.
type watcher struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (w *watcher) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.buf.Write(b)
}

func (w *watcher) saw(text string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.Contains(w.buf.String(), text)
}

// A real engine that says it is another version: older than anything the client speaks, newer than anything it knows, and one that has left the
// client's versions behind (which is what an engine says to a version older than its own oldest).
func TestVersions(t *testing.T) {
	e := shared(t, enginelab.Docker)
	create(t, e, enginelab.Spec("here", "true"))
	says := func(version string) func(*http.Response) {
		return func(r *http.Response) {
			if r.Header.Get("Api-Version") != "" {
				r.Header.Set("Api-Version", version)
			}
		}
	}
	path := func(version string) func(*http.Request) {
		return func(r *http.Request) { r.URL.Path = versionPrefix.ReplaceAllString(r.URL.Path, "/"+version+"/") }
	}
	tooOld := "the engine is too old (berthd speaks versions " + client.MinAPIVersion + " to "
	for name, tt := range map[string]struct {
		request func(*http.Request)
		answer  func(*http.Response)
		warning string
	}{
		"as it is": {nil, nil, ""},
		"older":    {nil, says("1.30"), tooOld},
		"newer":    {path("v1.41"), says("1.99"), ""},
		"beyond":   {path("v1.10"), says("1.99"), "the engine is too new (berthd speaks versions "},
		"nonsense": {nil, says("x\x1b[31m"), "cannot list the containers of strange"},
	} {
		t.Run(name, func(t *testing.T) {
			p := proxied(t, e, tt.request, tt.answer)
			got := list(t, run(t, lister(engine{name: "strange", host: p.host})))
			switch {
			case tt.warning == "" && (len(got.Warnings) != 0 || len(got.Containers) != 1):
				t.Errorf("got %+v", got)
			case tt.warning != "" && (len(got.Warnings) != 1 || !strings.Contains(got.Warnings[0], tt.warning)):
				t.Errorf("warnings %q, want %q", got.Warnings, tt.warning)
			}
		})
	}
}

func TestDevcontainerUser(t *testing.T) {
	for metadata, want := range map[string]string{
		"": "", "[]": "", "null": "", `{"remoteUser":"x"}`: "", "[1]": "", `[{"remoteUser":7}]`: "",
		`[{"id":"feature"},{"remoteUser":"vscode"},{"remoteUser":""}]`: "vscode",
		`[{"remoteUser":"a"},{"remoteUser":"b"}]`:                      "b",
	} {
		if got := devcontainerUser(map[string]string{"devcontainer.metadata": metadata}); got != want {
			t.Errorf("%s: %q, want %q", metadata, got, want)
		}
	}
}

func FuzzPermits(f *testing.F) {
	f.Add("GET", "/v1.41/containers/json")
	f.Add("POST", "/v1.41/exec/"+strings.Repeat("a", 64)+"/start")
	f.Add("GET", "/v1.41/containers/../images/json")
	f.Fuzz(func(t *testing.T, method, path string) {
		if !permits(looking, "", method, path) && !permits(executing, "", method, path) {
			return
		}
		shape := regexp.MustCompile(`^(/v\d+\.\d+)?/(_ping|events|containers/json|(containers|exec)/[0-9a-f]{64}/(json|exec|start|resize))$`)
		if !shape.MatchString(path) || !slices.Contains([]string{"GET", "HEAD", "POST"}, method) {
			t.Errorf("%s %q is let through", method, path)
		}
	})
}

func FuzzAnswer(f *testing.F) {
	f.Add(`{"Id":"a","Names":["/a"],"State":"exited","Status":"Exited (3) now","Ports":[{"IP":"::","PrivatePort":1,"PublicPort":2,"Type":"tcp"}]}`,
		`{"Name":"/a","State":{"Status":"running","Pid":7,"Health":{"Status":"healthy"}},"HostConfig":{"NetworkMode":"default"},"NetworkSettings":{"Ports":{"80/tcp":[{"HostIp":"","HostPort":"80"}],"1/udp":null}}}`)
	f.Add(`{}`, `{}`)
	f.Add(`{"State":"\u001b"}`, `{"State":{"ExitCode":-1,"Status":"exited","Error":"x\n"},"NetworkSettings":{"Ports":{"99999/tcp":[{"HostPort":"-1"}]}}}`)
	f.Fuzz(func(t *testing.T, summary, details string) {
		var in container.Summary
		var is container.InspectResponse
		if json.Unmarshal([]byte(summary), &in) != nil || json.Unmarshal([]byte(details), &is) != nil {
			return
		}
		c := convert(in, "docker")
		detail(&c, is, true)
		if !c.Running && c.PID != 0 {
			t.Errorf("%s does not run, with process id %d", c.Status, c.PID)
		}
		for _, p := range c.Ports {
			if p.HostPort == 0 && p.HostIP != "" {
				t.Errorf("port %+v is published nowhere", p)
			}
		}
		_ = clashes([]wire.Container{c, c})
	})
}
