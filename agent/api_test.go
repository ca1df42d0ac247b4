package agent

import (
	"bytes"
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
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
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
		ports: func(context.Context) ([]wire.ListeningPort, error) {
			return []wire.ListeningPort{{ProcessName: "web", Network: "tcp", Port: 8080}}, nil
		},
		containers: func(context.Context) (wire.Containers, error) {
			return wire.Containers{}, errors.New("no engine")
		},
		manifest: testManifest,
		mesh:     func(w io.Writer) { fmt.Fprintln(w, "home region 1") },
		metrics:  func(w io.Writer) { writeMetric(w, "gauge", "berthd_ssh_sessions", "Sessions.", 2) },
		logs:     bytes.NewBufferString("a line\n"),
		log:      slog.New(slog.DiscardHandler),
	}
}

func TestAPI(t *testing.T) {
	tests := map[string]struct {
		method, path, body string
		status             int
		contains           []string
	}{
		"hello":         {"GET", "/", "", 200, []string{`"message":"Hello from the agent!"`}},
		"ports":         {"GET", "/api/v0/listening-ports", "", 200, []string{`"process_name":"web"`, `"network":"tcp"`, `"port":8080`}},
		"containers":    {"GET", "/api/v0/containers", "", 500, []string{`"message":"Could not get containers"`, "no engine"}},
		"netcheck":      {"GET", "/api/v0/netcheck", "", 200, []string{`"severity":"ok"`, `"net_info":null`, `"interfaces":{`, `"mtu":`}},
		"manifest":      {"GET", "/debug/manifest", "", 200, []string{`"agent_name":"demo"`, `"API_KEY":"***REDACTED***"`, `"EMPTY":""`, `"display_name":"setup"`}},
		"logs":          {"GET", "/debug/logs", "", 200, []string{"a line"}},
		"mesh":          {"GET", "/debug/magicsock", "", 200, []string{"home region 1"}},
		"prometheus":    {"GET", "/debug/prometheus", "", 200, []string{"berthd_ssh_sessions 2\n", "# TYPE go_goroutines gauge\n"}},
		"unknown":       {"GET", "/api/v0/read-file", "", 404, nil},
		"nothing posts": {"POST", "/api/v0/containers", "", 405, nil},
		"bad json":      {"POST", "/api/v0/list-directory", "{", 400, []string{"Request body must be valid JSON."}},
		"bad relation":  {"POST", "/api/v0/list-directory", `{"relativity":"moon"}`, 500, []string{"moon"}},
		"no such":       {"POST", "/api/v0/list-directory?path=/no/such", `{}`, 404, nil},
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

func TestManifestBeforeTheFirst(t *testing.T) {
	a := testAPI()
	a.manifest = func() *agentpb.Manifest { return nil }
	w := httptest.NewRecorder()
	a.handler().ServeHTTP(w, httptest.NewRequest("GET", "/debug/manifest", nil))
	if w.Code != http.StatusInternalServerError {
		t.Errorf("status %d, want 500", w.Code)
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
			testAPI().handler().ServeHTTP(w, httptest.NewRequest("POST", "/api/v0/list-directory", strings.NewReader(body)))
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
		testAPI().handler().ServeHTTP(w, httptest.NewRequest("POST", "/api/v0/list-directory?path="+path, strings.NewReader("{}")))
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
	if _, err := tail.WriteTo(&out); err != nil {
		t.Fatal(err)
	}
	if !strings.HasSuffix(out.String(), "line 99999\n") || !strings.HasPrefix(out.String(), "line ") {
		t.Errorf("kept %q … %q", out.String()[:20], out.String()[out.Len()-20:])
	}
	if out.Len() < logTailSize/2 || out.Len() > 2*logTailSize {
		t.Errorf("kept %d bytes, want about %d", out.Len(), logTailSize)
	}
}

// serveLocal runs a local API and returns what is reported to it.
func serveLocal(t *testing.T, socket string) <-chan *agentpb.UpdateAppStatusRequest {
	t.Helper()
	reported := make(chan *agentpb.UpdateAppStatusRequest, 10)
	l := newLocalAPI(socket, func(u *agentpb.UpdateAppStatusRequest) { reported <- u }, slog.New(slog.DiscardHandler))
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

	for name, bad := range map[string]wire.PatchAppStatus{
		"no app":    {State: "idle"},
		"bad state": {AppSlug: "claude", State: "asleep"},
		"too long":  {AppSlug: "claude", State: "idle", Message: strings.Repeat("x", wire.MaxAppStatusMessage+1)},
	} {
		var refusal *wire.Error
		if err := ReportAppStatus(t.Context(), socket, bad); !errors.As(err, &refusal) || refusal.StatusCode != http.StatusBadRequest {
			t.Errorf("%s: %v, want a refusal", name, err)
		}
	}
	if len(reported) != 0 {
		t.Errorf("a bad status was reported: %v", <-reported)
	}
}

func TestReportAppStatusWithoutAgent(t *testing.T) {
	err := ReportAppStatus(t.Context(), filepath.Join(t.TempDir(), "s"), wire.PatchAppStatus{AppSlug: "x", State: "idle"})
	var dial *net.OpError
	if !errors.As(err, &dial) {
		t.Errorf("%v, want a dial error", err)
	}
}
