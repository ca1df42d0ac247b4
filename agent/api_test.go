package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/berthd/berth/mask"
	"github.com/berthd/berth/ports"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
	"github.com/berthd/berth/wire/tailnetpb"
)

// planted is a secret that no answer may hold.
const planted = "s3cr3t-planted"

func testManifest() *agentpb.Manifest {
	id := uuid.MustParse("6b1a3b5c-0d2e-4f60-8a7b-9c8d7e6f5a4b")
	return &agentpb.Manifest{
		AgentId:              id[:],
		AgentName:            "demo",
		EnvironmentVariables: map[string]string{"API_KEY": planted, "EMPTY": ""},
		Secrets:              []*agentpb.WorkspaceSecret{{EnvName: "S", Value: []byte(planted)}},
		Scripts:              []*agentpb.WorkspaceAgentScript{{Id: id[:], Script: "curl -H " + planted, DisplayName: "setup"}},
		Metadata:             []*agentpb.WorkspaceAgentMetadata_Description{{Key: "k", Script: planted}},
		Apps:                 []*agentpb.WorkspaceApp{{Id: id[:], Slug: "code", Command: planted}},
	}
}

func testAPI() *api {
	return &api{
		ports: ports.New(ports.Config{}),
		containers: &containerView{list: func(context.Context) (wire.Containers, error) {
			return wire.Containers{}, errors.New("no engine")
		}, watch: unwatched},
		terminals: &terminalHost{socket: "/no/such/socket", log: slog.New(slog.DiscardHandler)},
		manifest:  testManifest,
		self: func() *tailnetpb.Node {
			return &tailnetpb.Node{PreferredDerp: 999, DerpLatency: map[string]float64{"999-v4": 0.5}}
		},
		mesh:      func(w io.Writer) { fmt.Fprintln(w, "home region 1") },
		meshDebug: new(atomic.Bool),
		metrics:   func(w io.Writer) { writeMetric(w, "gauge", "berthd_ssh_sessions", "Sessions.", 2) },
		logs:      testTail("a line\n"),
		log:       slog.New(slog.DiscardHandler),
	}
}

func testTail(lines ...string) *LogTail {
	tail := new(LogTail)
	for _, line := range lines {
		io.WriteString(tail, line)
	}
	return tail
}

// request is one as a peer on the mesh sends it.
func request(method, target, body string) *http.Request {
	r := httptest.NewRequest(method, target, strings.NewReader(body))
	r.Host = "[fd7a:115c:a1e0::1]:4"
	return r
}

func TestAPI(t *testing.T) {
	tests := map[string]struct {
		method, path, body string
		status             int
		contains           []string
	}{
		"hello":      {"GET", "/", "", 200, []string{`"message":"Hello from the agent!"`}},
		"ports":      {"GET", "/api/v0/listening-ports", "", 200, []string{`"process_name":`, `"network":"tcp"`, `"addresses":["127.0.0.1"]`, `"source":`}},
		"containers": {"GET", "/api/v0/containers", "", 500, []string{`"message":"Could not get containers"`, "no engine"}},
		"netcheck": {"GET", "/api/v0/netcheck", "", 200, []string{
			`{"severity":"ok","warnings":null,"dismissed":false,"net_info":{"PreferredDERP":999,"DERPLatency":{"999-v4":0.5}},"interfaces":{"severity":`, `"addresses":[`, `"mtu":`}},
		"manifest":      {"GET", "/debug/manifest", "", 200, []string{`"agent_name":"demo"`, `"API_KEY":"***REDACTED***"`, `"EMPTY":""`, `"display_name":"setup"`}},
		"logs":          {"GET", "/debug/logs", "", 200, []string{"a line"}},
		"logs since":    {"GET", "/debug/logs?after=2020-01-01T00:00:00Z", "", 200, []string{"a line"}},
		"logs, bad":     {"GET", "/debug/logs?after=yesterday", "", 400, []string{`"message":"Query parameters have invalid values."`, `"field":"after"`}},
		"mesh logging":  {"GET", "/debug/magicsock/debug-logging/true", "", 200, []string{"true"}},
		"bad logging":   {"GET", "/debug/magicsock/debug-logging/loud", "", 400, []string{"loud"}},
		"mesh":          {"GET", "/debug/magicsock", "", 200, []string{"home region 1"}},
		"prometheus":    {"GET", "/debug/prometheus", "", 200, []string{"berthd_ssh_sessions 2\n", "# TYPE go_goroutines gauge\n"}},
		"unknown":       {"GET", "/api/v0/read-file", "", 404, []string{"404 page not found\n"}},
		"write-file":    {"POST", "/api/v0/write-file?path=/tmp/x", "x", 404, nil},
		"processes":     {"POST", "/api/v0/processes/start", `{"command":"id"}`, 404, nil},
		"nothing posts": {"POST", "/api/v0/containers", "", 405, nil},
		"bad json":      {"POST", "/api/v0/list-directory", "{", 400, []string{"Request body must be valid JSON."}},
		"bad relation":  {"POST", "/api/v0/list-directory", `{"relativity":"moon"}`, 500, []string{"moon"}},
		"no such":       {"POST", "/api/v0/list-directory?path=/no/such", `{}`, 404, nil},
		"unknown query": {"POST", "/api/v0/list-directory?path=/&depth=1", `{}`, 400, []string{`"message":"Query parameters have invalid values."`, `"field":"depth"`}},
		"query twice":   {"POST", "/api/v0/list-directory?path=/&path=/etc", `{}`, 400, []string{`"field":"path"`}},
		"bad query":     {"POST", "/api/v0/list-directory?path=%zz", `{}`, 400, []string{"Query parameters"}},
		"not absolute":  {"POST", "/api/v0/list-directory?path=etc", `{}`, 500, []string{"absolute"}},
	}
	srv := httptest.NewServer(testAPI().handler())
	defer srv.Close()
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			req, err := http.NewRequestWithContext(t.Context(), tt.method, srv.URL+tt.path, strings.NewReader(tt.body))
			if err != nil {
				t.Fatal(err)
			}
			resp, err := srv.Client().Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			if resp.StatusCode != tt.status {
				t.Errorf("status %d, want %d: %s", resp.StatusCode, tt.status, body)
			}
			for _, want := range tt.contains {
				if !strings.Contains(string(body), want) {
					t.Errorf("%s does not hold %s", body, want)
				}
			}
			if strings.Contains(string(body), planted) {
				t.Errorf("the planted secret is in the answer: %s", body)
			}
		})
	}
}

// TestOnlyAddressesAndOwnOrigins: what a web page can send through somebody's browser is refused.
func TestOnlyAddressesAndOwnOrigins(t *testing.T) {
	h := testAPI().handler()
	for name, tt := range map[string]struct {
		host, origin string
		status       int
	}{
		"the mesh address":   {"[fd7a:115c:a1e0::1]:4", "", 200},
		"forwarded":          {"127.0.0.1:8004", "", 200},
		"localhost":          {"localhost:8004", "", 200},
		"own origin":         {"localhost:8004", "http://localhost:8004", 200},
		"a desktop client's": {"Demo.Box.me.coder:4", "", 200},
		"rebound name":       {"evil.example.com:8004", "", 403},
		"nearly a client's":  {"coder.example.com", "", 403},
		"no host":            {"", "", 403},
		"a page's post":      {"127.0.0.1:8004", "https://evil.example.com", 403},
		"a port's neighbour": {"127.0.0.1:8004", "http://127.0.0.1:3000", 403},
	} {
		t.Run(name, func(t *testing.T) {
			r := httptest.NewRequest("POST", "/api/v0/list-directory?path=/", strings.NewReader("{}"))
			if r.Host = tt.host; tt.origin != "" {
				r.Header.Set("Origin", tt.origin)
			}
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			if w.Code != tt.status {
				t.Errorf("status %d, want %d: %s", w.Code, tt.status, w.Body)
			}
		})
	}
}

func TestMeshLogging(t *testing.T) {
	a := testAPI()
	var out bytes.Buffer
	log := slog.New(verbose{slog.NewTextHandler(&out, nil), a.meshDebug}).With("part", "tailnet")
	log.Debug("before")
	srv := httptest.NewServer(a.handler())
	defer srv.Close()
	for state, on := range map[string]bool{"true": true, "0": false} {
		resp, err := http.Get(srv.URL + "/debug/magicsock/debug-logging/" + state)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if a.meshDebug.Load() != on {
			t.Errorf("%s: %v", state, !on)
		}
		log.Debug("while " + state)
	}
	if got := out.String(); strings.Contains(got, "before") || !strings.Contains(got, "while true") || strings.Contains(got, "while 0") {
		t.Errorf("logged %q", got)
	}
	http.DefaultClient.CloseIdleConnections()
}

func TestManifestBeforeTheFirst(t *testing.T) {
	a := testAPI()
	a.manifest = func() *agentpb.Manifest { return nil }
	w := httptest.NewRecorder()
	a.handler().ServeHTTP(w, request("GET", "/debug/manifest", ""))
	if w.Code != http.StatusInternalServerError {
		t.Errorf("status %d, want 500", w.Code)
	}
}

// TestManifestLists: apps, scripts and all else look as in the JSON of the server, where ids are UUIDs and
// times are numbers.
func TestManifestLists(t *testing.T) {
	id := uuid.MustParse("6b1a3b5c-0d2e-4f60-8a7b-9c8d7e6f5a4b")
	a := testAPI()
	a.manifest = func() *agentpb.Manifest {
		return &agentpb.Manifest{
			Apps: []*agentpb.WorkspaceApp{{
				Id: id[:], Slug: "code", Url: "http://localhost:1", SharingLevel: agentpb.WorkspaceApp_OWNER, Health: agentpb.WorkspaceApp_HEALTHY,
				Healthcheck: &agentpb.WorkspaceApp_Healthcheck{Url: "http://localhost:1/up", Interval: durationpb.New(5 * time.Second), Threshold: 6},
			}},
			Metadata:      []*agentpb.WorkspaceAgentMetadata_Description{{Key: "k", Interval: durationpb.New(10), Timeout: durationpb.New(3)}},
			Scripts:       []*agentpb.WorkspaceAgentScript{{Id: id[:], LogSourceId: id[:], RunOnStart: true, Timeout: durationpb.New(time.Minute)}},
			Devcontainers: []*agentpb.WorkspaceAgentDevcontainer{{Id: id[:], Name: "dev", WorkspaceFolder: "/w", SubagentId: id[:]}},
		}
	}
	w := httptest.NewRecorder()
	a.handler().ServeHTTP(w, request("GET", "/debug/manifest", ""))
	var got struct {
		Apps          json.RawMessage
		Metadata      json.RawMessage
		Scripts       json.RawMessage
		Devcontainers json.RawMessage
	}
	if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]string{
		string(got.Apps): `[{"id":"6b1a3b5c-0d2e-4f60-8a7b-9c8d7e6f5a4b","url":"http://localhost:1","external":false,"slug":"code","subdomain":false,` +
			`"sharing_level":"owner","healthcheck":{"url":"http://localhost:1/up","interval":5,"threshold":6},"health":"healthy","hidden":false,"open_in":"","statuses":[]}]`,
		string(got.Metadata): `[{"display_name":"","key":"k","script":"***REDACTED***","interval":10,"timeout":3}]`,
		string(got.Scripts): `[{"id":"6b1a3b5c-0d2e-4f60-8a7b-9c8d7e6f5a4b","log_source_id":"6b1a3b5c-0d2e-4f60-8a7b-9c8d7e6f5a4b","log_path":"",` +
			`"script":"***REDACTED***","cron":"","run_on_start":true,"run_on_stop":false,"start_blocks_login":false,"timeout":60000000000,"display_name":""}]`,
		string(got.Devcontainers): `[{"id":"6b1a3b5c-0d2e-4f60-8a7b-9c8d7e6f5a4b","name":"dev","workspace_folder":"/w",` +
			`"subagent_id":"6b1a3b5c-0d2e-4f60-8a7b-9c8d7e6f5a4b","status":"","dirty":false}]`,
	} {
		if text != want {
			t.Errorf("got  %s\nwant %s", text, want)
		}
	}
}

func TestListDirectory(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"b", "a", "Z"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"sub", "dir"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("sub", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	t.Setenv("HOME", dir)
	requests := map[string]string{
		"root": fmt.Sprintf(`{"relativity":"root","path":["%s"]}`, strings.Join(strings.Split(dir[1:], "/"), `","`)),
		"home": `{"relativity":"home","path":[]}`,
	}
	for name, body := range requests {
		t.Run(name, func(t *testing.T) {
			w := httptest.NewRecorder()
			testAPI().handler().ServeHTTP(w, request("POST", "/api/v0/list-directory", body))
			var got directory
			if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil {
				t.Fatalf("%v in %s", err, w.Body)
			}
			var names []string
			for _, e := range got.Contents {
				names = append(names, e.Name)
			}
			if diff := cmp.Diff([]string{"dir", "link", "sub", "Z", "a", "b"}, names); diff != "" {
				t.Errorf("directories first, then by name (-want +got):\n%s", diff)
			}
			if got.AbsolutePathString != dir || filepath.Join("/", filepath.Join(got.AbsolutePath...)) != dir {
				t.Errorf("path %q, %q; want %q", got.AbsolutePathString, got.AbsolutePath, dir)
			}
		})
	}
}

// TestListWhatIsNoDirectory: a FIFO too is refused at once, not waited for.
func TestListWhatIsNoDirectory(t *testing.T) {
	dir := t.TempDir()
	fifo, file := filepath.Join(dir, "fifo"), filepath.Join(dir, "file")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]int{fifo: 500, file: 500, filepath.Join(dir, "none"): 404} {
		w := httptest.NewRecorder()
		testAPI().handler().ServeHTTP(w, request("POST", "/api/v0/list-directory?path="+path, "{}"))
		if w.Code != want {
			t.Errorf("%s: status %d, want %d: %s", path, w.Code, want, w.Body)
		}
	}
}

func TestLogTailKeepsTheNewest(t *testing.T) {
	var tail LogTail
	for i := range 100_000 {
		fmt.Fprintf(&tail, "line %d\n", i)
	}
	var out bytes.Buffer
	if err := tail.WriteSince(&out, time.Time{}); err != nil {
		t.Fatal(err)
	}
	if !strings.HasSuffix(out.String(), "line 99999\n") || !strings.HasPrefix(out.String(), "line ") {
		t.Errorf("kept %q … %q", out.String()[:20], out.String()[out.Len()-20:])
	}
	if out.Len() < logTailSize/2 || out.Len() > 2*logTailSize {
		t.Errorf("kept %d bytes, want about %d", out.Len(), logTailSize)
	}
}

func TestLogTailSince(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tail := testTail("old\n")
		time.Sleep(time.Minute)
		since := time.Now()
		io.WriteString(tail, "new\n")
		var out bytes.Buffer
		if err := tail.WriteSince(&out, since); err != nil || out.String() != "new\n" {
			t.Errorf("%q, %v", &out, err)
		}
	})
}

// testAbout is what the local APIs of tests tell of their agent.
var testAbout = About{Version: "v1.2.3", PID: 7, Server: "https://berth.example.com", Reachable: true, Commands: 2}

func TestAskAbout(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	if _, err := AskAbout(t.Context(), socket); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("nobody is there: %v", err)
	}
	serveLocal(t, socket)
	if about, err := AskAbout(t.Context(), socket); err != nil || !cmp.Equal(about, testAbout) {
		t.Errorf("%+v, %v", about, err)
	}
}

// serveLocal runs a local API and returns what is reported to it.
func serveLocal(t *testing.T, socket string) <-chan *agentpb.UpdateAppStatusRequest {
	t.Helper()
	return serveLocalHiding(t, socket, mask.New())
}

func serveLocalHiding(t *testing.T, socket string, hidden *mask.Masker) <-chan *agentpb.UpdateAppStatusRequest {
	t.Helper()
	reported := make(chan *agentpb.UpdateAppStatusRequest, 10)
	l := &localAPI{
		path: socket, server: "https://berth.example.com", token: func() wire.Secret { return "in-use" },
		manifest:  func() *agentpb.Manifest { return &agentpb.Manifest{Apps: []*agentpb.WorkspaceApp{{Slug: "claude"}}} },
		about:     func() About { return testAbout },
		appStatus: func(u *agentpb.UpdateAppStatusRequest) { reported <- u }, hide: hidden.Add, log: slog.New(slog.DiscardHandler), ready: make(chan struct{}),
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	<-l.ready
	return reported
}

func TestReportAppStatus(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	if err := os.WriteFile(socket, nil, 0o600); err != nil { // what a crash left behind
		t.Fatal(err)
	}
	reported := serveLocal(t, socket)
	info, err := os.Stat(socket)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket %v, %v; want mode 600", info.Mode(), err)
	}

	good := wire.PatchAppStatus{AppSlug: "claude", State: "failure", Message: "tests fail", URI: "https://x"}
	if err := ReportAppStatus(t.Context(), socket, good); err != nil {
		t.Fatal(err)
	}
	got := <-reported
	if got.Slug != "claude" || got.State != agentpb.UpdateAppStatusRequest_FAILURE || got.Message != "tests fail" || got.Uri != "https://x" {
		t.Errorf("reported %v", got)
	}

	for field, bad := range map[string]wire.PatchAppStatus{
		"app_slug": {State: "idle"},
		"state":    {AppSlug: "claude", State: "asleep"},
		"message":  {AppSlug: "claude", State: "idle", Message: strings.Repeat("x", wire.MaxAppStatusMessage+1)},
		"uri":      {AppSlug: "claude", State: "idle", URI: strings.Repeat("x", wire.MaxURI+1)},
	} {
		var refusal *wire.Error
		err := ReportAppStatus(t.Context(), socket, bad)
		if !errors.As(err, &refusal) || refusal.StatusCode != http.StatusBadRequest {
			t.Errorf("%s: %v, want a refusal", field, err)
		} else if _, ok := refusal.Validation(field); !ok || len(refusal.Validations) != 1 {
			t.Errorf("%s: refused with %v", field, err)
		}
	}
	err = ReportAppStatus(t.Context(), socket, wire.PatchAppStatus{AppSlug: "clod", State: "asleep"})
	if err == nil || !strings.Contains(err.Error(), `app_slug: "clod" is no app of this workspace, which has claude: state: "asleep" is none of working, idle, complete, failure`) {
		t.Errorf("two fields are wrong: %v", err)
	}
	if len(reported) != 0 {
		t.Errorf("a bad status was reported: %v", <-reported)
	}
}

// TestReportByCurl runs the lines of docs/status.md.
func TestReportByCurl(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	reported := serveLocal(t, socket)
	for body, want := range map[string]string{
		`{"app_slug":"claude","state":"idle","message":"waiting for \"you\""}`: "202 ",
		`{"app_slug":"claude","state":"asleep"}`:                               `400 {"message":"The status has invalid fields.","validations":[{"field":"state","detail":"\"asleep\" is none of working, idle, complete, failure"}]}` + "\n",
		`{"app_slug":"claude","status":"idle"}`:                                `400 {"message":"Request body must be valid JSON.","detail":"json: unknown field \"status\""}` + "\n",
		`{"app_slug":"claude","state":"idle"}}`:                                `400 {"message":"Request body must be valid JSON.","detail":"invalid character '}' looking for beginning of value"}` + "\n",
		`{"app_slug":"claude","state":"idle"} {}`:                              `400 {"message":"Request body must be valid JSON.","detail":"there is more than one value"}` + "\n",
		`state=idle`: `400 {"message":"Request body must be valid JSON.","detail":"invalid character 's' looking for beginning of value"}` + "\n",
		`{"message":"` + strings.Repeat("x", maxLocalBody) + `"}`: `413 {"message":"Request body must have at most 32768 bytes."}` + "\n",
	} {
		// The code is told in front, though curl knows it last.
		cmd := exec.CommandContext(t.Context(), "curl", "-s", "--unix-socket", socket, "-d", body, "-w", "%{stderr}%{http_code} ", "http://berthd/v1/app-status")
		var out, code bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &code
		if err := cmd.Run(); err != nil {
			t.Fatal(err)
		}
		if got := code.String() + out.String(); got != want {
			t.Errorf("%.60s: %q, want %q", body, got, want)
		}
	}
	if got := <-reported; got.GetMessage() != `waiting for "you"` || len(reported) > 0 {
		t.Errorf("reported %v and %d more", got, len(reported))
	}
}

// TestManyProgramsReportAtOnce: those beyond the bound wait for a moment, and programs that send nothing hold
// up nobody for longer than the deadline.
func TestManyProgramsReportAtOnce(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	reported := serveLocal(t, socket)
	const programs = 2 * maxLocalConnections
	errs := make(chan error, programs)
	for i := range programs {
		go func() {
			errs <- ReportAppStatus(t.Context(), socket, wire.PatchAppStatus{AppSlug: "claude", State: "idle", Message: fmt.Sprint(i)})
		}()
	}
	for range programs {
		<-reported
	}
	for range programs {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
}

func TestSessionToken(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	serveLocal(t, socket)
	token, err := SessionToken(t.Context(), socket, "https://berth.example.com")
	if err != nil || token != "in-use" {
		t.Errorf("token %q, %v", token.Reveal(), err)
	}
	if token, err := SessionToken(t.Context(), socket, "https://evil.example.com"); err == nil {
		t.Errorf("another server gets %q", token.Reveal())
	}
}

func TestHide(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	hidden := mask.New()
	serveLocalHiding(t, socket, hidden)
	if err := Hide(t.Context(), socket, "", "a-login-of-somebody", "another-one"); err != nil {
		t.Fatal(err)
	}
	if got := hidden.String("with a-login-of-somebody and another-one"); got != "with [hidden] and [hidden]" {
		t.Errorf("shown as %q", got)
	}
	w := httptest.NewRecorder()
	tooLong := httptest.NewRequest(http.MethodPost, "/v1/secrets", strings.NewReader(`{"values":["`+strings.Repeat("x", maxLocalBody)+`"]}`))
	(&localAPI{}).handler().ServeHTTP(w, tooLong)
	if w.Code != http.StatusRequestEntityTooLarge || strings.Contains(w.Body.String(), "xx") {
		t.Errorf("more than there is room for: %d %s", w.Code, w.Body)
	}
}

func TestReportAppStatusWithoutAgent(t *testing.T) {
	err := ReportAppStatus(t.Context(), filepath.Join(t.TempDir(), "s"), wire.PatchAppStatus{AppSlug: "x", State: "idle"})
	var dial *net.OpError
	if !errors.As(err, &dial) {
		t.Errorf("%v, want a dial error", err)
	}
}
