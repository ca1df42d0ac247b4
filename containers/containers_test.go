package containers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/moby/api/types/container"
	"go.uber.org/goleak"

	"github.com/berthd/berth/wire"
)

// askVar makes this binary list the engine it names and print the warnings; see TestPermission.
const askVar = "BERTH_CONTAINERS_TEST_ASK"

func TestMain(m *testing.M) {
	if host := os.Getenv(askVar); host != "" {
		ctx, cancel := context.WithCancel(context.Background())
		l := lister(engine{name: "docker", host: host})
		ran := make(chan error, 1)
		go func() { ran <- l.Run(ctx) }()
		got, err := l.List(ctx)
		cancel()
		if err := errors.Join(err, <-ran); err != nil {
			panic(err)
		}
		for _, w := range got.Warnings {
			fmt.Println(w)
		}
		return
	}
	goleak.VerifyTestMain(withLab{m})
}

// withLab runs tests, and ends the engines after them.
type withLab struct{ *testing.M }

func (m withLab) Run() int {
	code := m.M.Run()
	if err := closeLab(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

// lister lists given engines instead of this machine's.
func lister(engines ...engine) *Lister {
	l := New(Config{Timeout: 20 * time.Second})
	l.find = func() ([]engine, []string) { return engines, nil }
	return l
}

// run runs l until the test ends.
func run(t *testing.T, l *Lister) *Lister {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- l.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ran; err != nil {
			t.Error(err)
		}
	})
	return l
}

// eventually waits for what happens in other processes.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(30 * time.Second); !ok(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

func list(t *testing.T, l *Lister) wire.Containers {
	t.Helper()
	got, err := l.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// socket serves connections on a Unix socket until the test ends, and returns its host.
func socket(t *testing.T, serve func(net.Listener)) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "eng")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var done sync.WaitGroup
	done.Go(func() { serve(l) })
	t.Cleanup(func() { l.Close(); done.Wait() })
	return "unix://" + path
}

// silentSocket takes connections and never says a word.
func silentSocket(t *testing.T) string {
	return socket(t, func(l net.Listener) {
		var conns []net.Conn
		defer func() {
			for _, c := range conns {
				c.Close()
			}
		}()
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns = append(conns, c)
		}
	})
}

func TestNoEngine(t *testing.T) {
	got, err := json.Marshal(list(t, run(t, lister())))
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"devcontainers":[],"containers":[]}`; string(got) != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestWarnings(t *testing.T) {
	stale := socket(t, func(l net.Listener) { l.(*net.UnixListener).SetUnlinkOnClose(false); l.Close() })
	web := socket(t, func(l net.Listener) {
		http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "<html>") }))
	})
	old := socket(t, func(l net.Listener) {
		http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Api-Version", "1.20") }))
	})
	hostile := socket(t, func(l net.Listener) {
		http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Api-Version", "1.41")
			if !strings.HasSuffix(r.URL.Path, "_ping") {
				w.Header().Set("Content-Type", "application/json")
				w.WriteHeader(http.StatusInternalServerError)
				json.NewEncoder(w).Encode(map[string]string{"message": "\x1b]0;owned\a" + strings.Repeat("x", 1000)})
			}
		}))
	})
	for name, tt := range map[string]struct{ host, want string }{
		"hostile": {hostile, `\x1b]0;owned\axxx`},
		"missing": {"unix:///no/such/socket", "nothing listens there"},
		"stale":   {stale, "nothing listens there"},
		"hangs":   {silentSocket(t), "did not answer within 100ms"},
		"no api":  {web, "invalid character"},
		"too old": {old, "the engine is too old (berthd speaks versions 1.40 to "},
		"no host": {"unix", "missing address"},
	} {
		t.Run(name, func(t *testing.T) {
			l := lister(engine{name: "docker", host: tt.host})
			l.timeout = 100 * time.Millisecond
			got := list(t, run(t, l))
			if len(got.Warnings) != 1 || !strings.Contains(got.Warnings[0], tt.want) || !strings.Contains(got.Warnings[0], "docker at "+tt.host) {
				t.Errorf("got %q, want one warning with %q", got.Warnings, tt.want)
			}
			if got.Containers == nil {
				t.Error("no list")
			}
		})
	}
}

// Root may use any socket, so somebody else tries: this binary, as nobody.
func TestPermission(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("this test needs root, to become somebody else")
	}
	host := silentSocket(t)
	path := strings.TrimPrefix(host, "unix://")
	if err := errors.Join(os.Chmod(filepath.Dir(path), 0o755), os.Chmod(path, 0o600)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{askVar + "=" + host}
	const nobody = 65534
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	got, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	want := "cannot list the containers of docker at " + host + ": this user may not use its socket (join the group that owns it)\n"
	if string(got) != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := run(t, lister(engine{name: "docker", host: silentSocket(t)})).List(ctx); err == nil {
		t.Error("a cancelled list succeeded")
	}
}

// An answer without end is cut off.
func TestEndlessAnswer(t *testing.T) {
	endless := socket(t, func(l net.Listener) {
		http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Api-Version", "1.41")
			if !strings.HasSuffix(r.URL.Path, "/containers/json") {
				return
			}
			io.WriteString(w, `[{"Id":"`)
			for chunk := []byte(strings.Repeat("x", 1<<20)); ; {
				if _, err := w.Write(chunk); err != nil {
					return
				}
			}
		}))
	})
	if got := list(t, run(t, lister(engine{name: "docker", host: endless}))); len(got.Warnings) != 1 || !strings.Contains(got.Warnings[0], "more than 32 MiB") {
		t.Errorf("got %q", got.Warnings)
	}
}

// slowEngine has running containers, and takes its time for each look at one of them. refuses says which look it answers with an error.
func slowEngine(t *testing.T, containers int, takes time.Duration, refuses func(id string) bool) (host string, lists *atomic.Int32) {
	lists = new(atomic.Int32)
	id := func(i int) string { return fmt.Sprintf("%064x", i+1) }
	mux := http.NewServeMux()
	mux.HandleFunc("/_ping", func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Api-Version", "1.41") })
	mux.HandleFunc("/v1.41/events", func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	mux.HandleFunc("/v1.41/containers/json", func(w http.ResponseWriter, r *http.Request) {
		var all []container.Summary
		for i := range containers {
			if filter := r.URL.Query().Get("filters"); filter == "" || strings.Contains(filter, id(i)) {
				all = append(all, container.Summary{ID: id(i), Names: []string{"/" + id(i)}, State: "running"})
			}
		}
		if len(all) == containers {
			lists.Add(1)
		}
		json.NewEncoder(w).Encode(all)
	})
	mux.HandleFunc("/v1.41/containers/{id}/json", func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-time.After(takes):
		case <-r.Context().Done():
		}
		if refuses(r.PathValue("id")) {
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		json.NewEncoder(w).Encode(container.InspectResponse{ID: r.PathValue("id"), State: &container.State{Status: "running", Pid: 7}})
	})
	return socket(t, func(l net.Listener) { http.Serve(l, mux) }), lists
}

// An engine that needs longer for all its containers together than it may for one answer is no engine that does not answer.
func TestSlowEngine(t *testing.T) {
	const containers = 24
	// 24 looks, four at a time, take 600 ms at least.
	host, lists := slowEngine(t, containers, 100*time.Millisecond, func(string) bool { return false })
	l := lister(engine{name: "docker", host: host})
	l.timeout, l.heartbeat = 500*time.Millisecond, 50*time.Millisecond
	run(t, l)
	eventually(t, "all are known in full", func() bool {
		got := list(t, l)
		if len(got.Warnings) > 0 || len(got.Containers) != containers {
			t.Fatalf("%d containers, warnings %q", len(got.Containers), got.Warnings)
		}
		return !slices.ContainsFunc(got.Containers, func(c wire.Container) bool { return c.PID != 7 })
	})
	if n := lists.Load(); n != 1 {
		t.Errorf("%d whole lists were asked for", n)
	}
}

// What an engine once told of a container is kept when it fails at the next look.
func TestFailedLook(t *testing.T) {
	var broken atomic.Bool
	host, lists := slowEngine(t, 3, 0, func(id string) bool { return broken.Load() && strings.HasSuffix(id, "2") })
	l := lister(engine{name: "docker", host: host})
	l.heartbeat = 20 * time.Millisecond
	run(t, l)
	list(t, l)
	broken.Store(true)
	l.mu.Lock()
	f := l.followers[0]
	l.mu.Unlock()
	api, err := f.connect(t.Context(), looking, new(allowance))
	if err != nil {
		t.Fatal(err)
	}
	defer api.Close()
	unseen, err := f.refresh(t.Context(), api, nil)
	if err != nil || len(unseen) != 1 || !strings.HasSuffix(unseen[0], "2") {
		t.Errorf("unseen %q, %v", unseen, err)
	}
	got := list(t, l)
	if len(got.Warnings) > 0 || slices.ContainsFunc(got.Containers, func(c wire.Container) bool { return c.PID != 7 }) {
		t.Errorf("got %+v", got)
	}
	if n := lists.Load(); n != 2 {
		t.Errorf("%d whole lists were asked for", n)
	}
}

func TestConvert(t *testing.T) {
	var in container.Summary
	if err := json.Unmarshal([]byte(`{"Id":"abc","Names":["/other/alias","/web"],"Image":"img","Created":1700000000,"State":"paused","Status":"Up 2 hours (Paused)",
		"Ports":[{"IP":"0.0.0.0","PrivatePort":80,"PublicPort":8080,"Type":"tcp"},{"PrivatePort":53,"Type":"udp"},{"IP":"","PrivatePort":1,"Type":"sctp"}],
		"Mounts":[{"Type":"volume","Name":"vol","Destination":"/v"},{"Type":"tmpfs","Destination":"/t"},{"Type":"bind","Source":"/s","Destination":"/d"}]}`), &in); err != nil {
		t.Fatal(err)
	}
	want := wire.Container{
		CreatedAt: time.Unix(1700000000, 0).UTC(), ID: "abc", Name: "web", Image: "img", Labels: map[string]string{}, Running: true, Status: "paused",
		Ports: []wire.ContainerPort{
			{Port: 1, Network: "sctp"}, {Port: 53, Network: "udp"}, {Port: 80, Network: "tcp", HostIP: "0.0.0.0", HostPort: 8080},
		},
		Volumes: map[string]string{"vol": "/v", "/s": "/d"}, Engine: "docker",
	}
	if diff := cmp.Diff(want, convert(in, "docker")); diff != "" {
		t.Error(diff)
	}
}

func TestStatus(t *testing.T) {
	for _, tt := range []struct {
		state   container.ContainerState
		words   string
		want    string
		running bool
	}{
		{"running", "Up 3 minutes", "running", true},
		{"exited", "Exited (0) 3 minutes ago", "exited successfully", false},
		{"exited", "Exited (137) 3 minutes ago", "exited with code 137", false},
		{"exited", "Gone", "exited", false},
		{"created", "Created", "created", false},
		{"dead", "Dead", "dead", false},
		{"restarting", "Restarting (1) 3 seconds ago", "restarting", true},
	} {
		if got := status(container.Summary{State: tt.state, Status: tt.words}); got != tt.want || running(tt.state) != tt.running {
			t.Errorf("%s, %s: got %q, running %v", tt.state, tt.words, got, running(tt.state))
		}
	}
}

func TestClashes(t *testing.T) {
	on := func(name string, ips ...string) wire.Container {
		c := wire.Container{Name: name, Running: true}
		for _, ip := range ips {
			c.Ports = append(c.Ports, wire.ContainerPort{Network: "tcp", Port: 80, HostIP: ip, HostPort: 8080})
		}
		return c
	}
	got := clashes([]wire.Container{on("a", "0.0.0.0", "::"), on("b", "192.0.2.1"), on("c", ""), on("d", "127.0.0.1")})
	if diff := cmp.Diff([]string{"port 8080/tcp of this machine is published by several containers: a and d"}, got); diff != "" {
		t.Error(diff)
	}
}

func TestEngines(t *testing.T) {
	root, err := os.MkdirTemp("", "eng")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(root)
	listen := func(path string) string {
		t.Helper()
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return "unix://" + path
	}
	write := func(path, text string) {
		t.Helper()
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	env := map[string]string{}
	s := surroundings{getenv: func(k string) string { return env[k] }, home: filepath.Join(root, "home"), uid: 7, run: []string{filepath.Join(root, "run"), filepath.Join(root, "var")}}
	check := func(want []engine, wantWarnings ...string) {
		t.Helper()
		got, warnings := s.engines()
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(engine{})); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff(wantWarnings, warnings); diff != "" {
			t.Error(diff)
		}
	}
	check(nil)

	podman := listen("run/podman/podman.sock")
	if err := os.Symlink("podman/podman.sock", filepath.Join(root, "run/docker.sock")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("run", filepath.Join(root, "var")); err != nil {
		t.Fatal(err)
	}
	rootless := listen("run/user/7/docker.sock")
	custom := listen("custom.sock")
	write("home/.docker/contexts/meta/1/meta.json", `{"Name":"mine","Endpoints":{"docker":{"Host":"`+custom+`"}}}`)
	write("home/.docker/contexts/meta/2/meta.json", `{"Name":"far","Endpoints":{"docker":{"Host":"tcp://example.com:2376"}}}`)
	write("home/.docker/contexts/meta/3/meta.json", `broken`)
	write("home/.docker/desktop/docker.sock", "no socket")
	check([]engine{{name: "podman (root)", host: podman}, {name: "docker (rootless)", host: rootless}, {name: "docker (mine)", host: custom}})

	env["DOCKER_HOST"] = "unix:///no/such"
	env["CONTAINER_HOST"] = "ssh://far"
	env["XDG_RUNTIME_DIR"] = filepath.Join(root, "elsewhere")
	check([]engine{{name: "docker", host: "unix:///no/such"}, {name: "podman (root)", host: podman}, {name: "docker (mine)", host: custom}},
		"cannot list the containers of the engine in CONTAINER_HOST: only unix:// and tcp:// are understood")

	env["DOCKER_HOST"], env["CONTAINER_HOST"] = "tcp://127.0.0.1:1", ""
	check([]engine{{name: "docker", host: "tcp://127.0.0.1:1", tlsFromEnv: true}, {name: "podman (root)", host: podman}, {name: "docker (mine)", host: custom}})
}

// Root's agent finds the engines of the machine's users, by the names of those who own them; another user's agent finds its own alone.
func TestEnginesOfUsers(t *testing.T) {
	root, err := os.MkdirTemp("", "eng")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(root)
	listen := func(path string, owner int) string {
		t.Helper()
		path = filepath.Join(root, "user", path)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		if err := os.Chown(path, owner, owner); err != nil {
			t.Fatal(err)
		}
		return "unix://" + path
	}
	const nobody, nameless = 65534, 4242421
	own := listen("0/docker.sock", 0)
	docker, podman := listen("4242421/docker.sock", nameless), listen("65534/podman/podman.sock", nobody)
	s := surroundings{getenv: func(string) string { return "" }, home: root, run: []string{root}}
	for uid, want := range map[int][]engine{
		0: {
			{name: "docker (rootless)", host: own}, {name: "podman (nobody)", host: podman}, {name: "docker (uid 4242421)", host: docker},
		},
		nameless: {{name: "docker (rootless)", host: docker}},
	} {
		s.uid = uid
		got, warnings := s.engines()
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(engine{})); diff != "" || len(warnings) > 0 {
			t.Errorf("as %d: warnings %q\n%s", uid, warnings, diff)
		}
	}
	for i := range maxUsers {
		listen(fmt.Sprintf("%d/docker.sock", 5000+i), 5000+i)
	}
	s.uid = 0
	if got, _ := s.engines(); len(got) != maxUsers+1 {
		t.Errorf("%d engines are followed", len(got))
	}
}

func FuzzParseContext(f *testing.F) {
	f.Add(`{"Name":"mine","Endpoints":{"docker":{"Host":"unix:///x"}}}`)
	f.Add(`{"Endpoints":null}`)
	f.Add(`[`)
	f.Fuzz(func(t *testing.T, text string) {
		if name, host, err := parseContext(strings.NewReader(text)); err != nil && (name != "" || host != "") {
			t.Errorf("%q, %q with %v", name, host, err)
		}
	})
}
