package main

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/berthd/berth/wire"
)

var agentID = uuid.MustParse("7c1f3a52-6f0e-4d0e-9d5b-0a4f5f3c2b10")

func readAll(t *testing.T, r io.Reader) string {
	t.Helper()
	data, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func devNull(t *testing.T) *os.File {
	t.Helper()
	f, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// berth runs a command line in this process, without a terminal.
func berth(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	dir := t.TempDir()
	out, errOut := create(t, filepath.Join(dir, "out")), create(t, filepath.Join(dir, "err"))
	code = run(args, devNull(t), out, errOut)
	return code, readFile(t, out.Name()), readFile(t, errOut.Name())
}

func create(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// answers serves fixed answers by path, to whoever shows the token, and points the environment there.
func answers(t *testing.T, byPath map[string]any) {
	t.Helper()
	isolate(t)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		v, ok := byPath[r.Method+" "+r.URL.Path]
		switch {
		case r.Header.Get(wire.HeaderSessionToken) != "good":
			w.WriteHeader(http.StatusUnauthorized)
			v = wire.Error{Message: "You are signed out."}
		case !ok:
			w.WriteHeader(http.StatusNotFound)
			v = wire.Error{Message: "Route not found."}
		case r.Method == http.MethodPost:
			w.WriteHeader(http.StatusCreated)
		}
		json.NewEncoder(w).Encode(v)
	}))
	t.Cleanup(srv.Close)
	t.Setenv("BERTH_URL", srv.URL)
	t.Setenv("BERTH_TOKEN", "good")
}

const agentsPath = "GET " + wire.PathBerth + "agents"

func agentPath(rest string) string { return "GET /api/v2/workspaceagents/" + agentID.String() + rest }

func TestHelpHasExamples(t *testing.T) {
	p := &program{in: devNull(t), out: devNull(t), errOut: devNull(t)}
	root := p.command()
	for _, c := range append(root.Commands(), p.agentCommand().Commands()...) {
		if c.Name() == "help" || c.Name() == "completion" {
			continue
		}
		if c.Example == "" || c.Short == "" {
			t.Errorf("%s has no example or no short text", c.CommandPath())
		}
		if c.Args == nil {
			t.Errorf("%s does not check its arguments", c.CommandPath())
		}
	}
}

func TestUsageErrors(t *testing.T) {
	isolate(t)
	for _, tt := range []struct{ args, want string }{
		{"statsu", "status"},
		{"ssh", "NAME"},
		{"ssh demo --no-such-flag top", "--help"},
		{"ssh demo --user root", "--container"},
		{"ssh demo --stdio --container web", "SetEnv"},
		{"forward demo", "--auto"},
		{"forward demo 1-2000", "1024"},
		{"ports demo --tcp --udp", "leave both out"},
		{"containers demo --label =x", "KEY=VALUE"},
		{"ports", "NAME"},
		{"shell box --close", "which session"},
		{"shell box --rename x", "which session"},
		{"shell box work --list", "--list shows all"},
		{"shell box --user u", "--container"},
		{"ports a b", "NAME"},
		{"agent craete x", "create"},
		{"agent create", "NAME"},
		{"forward demo http", "REMOTE"},
		{"speedtest demo --direction sideways", "both"},
		{"ports demo --output yaml", "json"},
		{"logs demo --no-such-flag", "--help"},
	} {
		code, stdout, stderr := berth(t, strings.Fields(tt.args)...)
		if code != exitUsage || !strings.Contains(stderr, tt.want) || stdout != "" || strings.Count(stderr, "\n") != 1 {
			t.Errorf("berth %s: code %d, stdout %q, stderr %q", tt.args, code, stdout, stderr)
		}
	}
}

func TestErrorsSayWhatToDo(t *testing.T) {
	answers(t, map[string]any{agentsPath: []wire.AgentSummary{{ID: agentID, Name: "demo"}}})
	if code, _, stderr := berth(t, "ports", "dmeo"); code != exitFailed || !strings.Contains(stderr, "demo") {
		t.Errorf("an unknown agent: code %d, %q", code, stderr)
	}
	if code, _, stderr := berth(t, "ssh", "dmeo", "--", "true"); code != exitTransport || !strings.Contains(stderr, "demo") {
		t.Errorf("ssh to an unknown agent: code %d, %q", code, stderr)
	}
	if code, _, stderr := berth(t, "ssh", "a\nb"); code != exitTransport || strings.Count(stderr, "\n") != 1 {
		t.Errorf("ssh to a name of two lines: code %d, %q", code, stderr)
	}
	t.Setenv("BERTH_TOKEN", "bad-but-secret")
	if code, _, stderr := berth(t, "agent", "list"); code != exitFailed || !strings.Contains(stderr, "token") || strings.Contains(stderr, "bad-but-secret") {
		t.Errorf("a bad token: code %d, %q", code, stderr)
	}
}

func TestHostileNames(t *testing.T) {
	evil := "demo\x1b]0;x\x07\n\u202eroot"
	answers(t, map[string]any{
		agentsPath:                    []wire.AgentSummary{{ID: agentID, Name: "demo", Version: evil, LifecycleState: evil}},
		agentPath(""):                 wire.Agent{ID: agentID, Name: evil, LogSources: []wire.LogSource{{DisplayName: evil}}},
		berthPath("/app-statuses"):    []wire.AppStatus{{State: evil, Message: evil, URI: evil}},
		berthPath("/status"):          evilStatus(evil),
		agentPath("/listening-ports"): wire.ListeningPorts{Ports: []wire.ListeningPort{{ProcessName: evil, Port: 80, Command: evil}}},
		agentPath("/containers"):      wire.Containers{Containers: []wire.Container{{Name: evil, Image: evil}}, Warnings: []string{evil}},
		agentPath("/logs"):            []wire.LogEntry{{ID: 1, Output: evil, Level: evil}},
	})
	for _, args := range []string{"agent list", "status demo", "status demo --app x", "ports demo", "containers demo", "logs demo"} {
		for _, output := range []string{"text", "json"} {
			code, stdout, stderr := berth(t, append(strings.Fields(args), "--output", output)...)
			if code != 0 || stdout == "" {
				t.Errorf("berth %s: code %d, stderr %q", args, code, stderr)
			}
			if strings.ContainsAny(stdout+stderr, "\x1b\x07\u202e") {
				t.Errorf("berth %s lets control characters through: %q", args, stdout+stderr)
			}
			if output == "json" && !json.Valid([]byte(stdout)) {
				t.Errorf("berth %s prints no JSON: %q", args, stdout)
			}
		}
	}
}

func TestCompletionOfAgents(t *testing.T) {
	answers(t, map[string]any{agentsPath: []wire.AgentSummary{{Name: "demo", Status: wire.AgentConnected}, {Name: "other"}}})
	for _, verb := range []string{"ssh", "shell", "ports", "containers", "logs", "status", "ping", "speedtest", "forward"} {
		_, stdout, _ := berth(t, "__complete", verb, "de")
		if !strings.HasPrefix(stdout, "demo\tconnected\n") || strings.Contains(stdout, "other") {
			t.Errorf("berth %s de<Tab> offers %q", verb, stdout)
		}
	}
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		if code, stdout, _ := berth(t, "completion", shell); code != 0 || stdout == "" {
			t.Errorf("no completion for %s", shell)
		}
	}
}

func TestAgentCreate(t *testing.T) {
	answers(t, map[string]any{"POST " + wire.PathBerth + "agents": wire.CreatedAgent{ID: agentID, Name: "new", Token: "once"}})
	if code, stdout, _ := berth(t, "agent", "create", "new"); code != 0 || stdout != "once\n" {
		t.Errorf("code %d, stdout %q: it must be the token alone", code, stdout)
	}
}

func TestVersionNeedsNoServer(t *testing.T) {
	isolate(t)
	if code, stdout, stderr := berth(t, "version"); code != 0 || !strings.HasPrefix(stdout, "berth ") || stderr != "" {
		t.Errorf("code %d, %q, %q", code, stdout, stderr)
	}
}

func TestArguments(t *testing.T) {
	for _, tt := range [][2]string{{"/usr/bin/berth up", "up"}, {"berth", ""}, {"/state/bin/berthd git-ssh -- x", "berthd git-ssh -- x"}, {"berthd", "berthd"}} {
		if got := strings.Join(arguments(strings.Fields(tt[0])), " "); got != tt[1] {
			t.Errorf("%s: %q, want %q", tt[0], got, tt[1])
		}
	}
}
