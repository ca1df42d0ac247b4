package berthd

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/jsonschema-go/jsonschema"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/berthd/berth/agent"
	"github.com/berthd/berth/wire"
)

// assistant is the SDK's own client of a `berthd mcp` in a process of its own.
func assistant(t *testing.T, socket string) *mcp.ClientSession {
	t.Helper()
	cmd := exec.Command(os.Args[0], "mcp", "--app", "claude")
	cmd.Env = []string{envSelf + "=1", "HOME=" + t.TempDir(), "BERTH_SOCKET=" + socket}
	cmd.Stderr = os.Stderr
	client := mcp.NewClient(&mcp.Implementation{Name: "assistant", Version: "v1"}, nil)
	session, err := client.Connect(t.Context(), &mcp.CommandTransport{Command: cmd}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// Closing its input ends it, in order.
		if err := session.Close(); err != nil {
			t.Errorf("berthd mcp: %v", err)
		}
	})
	return session
}

// report calls the tool and returns what it says, and whether it says so as an error.
func report(t *testing.T, session *mcp.ClientSession, arguments map[string]any) (text string, failed bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	result, err := session.CallTool(ctx, &mcp.CallToolParams{Name: reportTool, Arguments: arguments})
	if err != nil {
		return err.Error(), true
	}
	for _, c := range result.Content {
		if c, ok := c.(*mcp.TextContent); ok {
			text += c.Text
		}
	}
	return text, result.IsError
}

func TestMCP(t *testing.T) {
	d := start(t, []string{"BERTH_URL=http://127.0.0.1:1"})
	d.says("level=WARN", "refused")
	session := assistant(t, filepath.Join(d.state, "s", agent.LocalSocket))

	tools, err := session.ListTools(t.Context(), nil)
	if err != nil || len(tools.Tools) != 1 || tools.Tools[0].Name != reportTool {
		t.Fatalf("%+v, %v", tools, err)
	}
	schema, err := json.Marshal(tools.Tools[0].InputSchema)
	if err != nil {
		t.Fatal(err)
	}
	var input jsonschema.Schema
	if err := json.Unmarshal(schema, &input); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"state", "message"}, input.Required); diff != "" {
		t.Errorf("required (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]any{"working", "idle", "complete", "failure"}, input.Properties["state"].Enum); diff != "" {
		t.Errorf("states (-want +got):\n%s", diff)
	}

	for name, tt := range map[string]struct {
		arguments map[string]any
		says      string
		failed    bool
	}{
		"good":         {map[string]any{"state": "idle", "message": "may I delete the branch?", "uri": "https://example.com/1"}, "Reported: idle may I delete", false},
		"bad state":    {map[string]any{"state": "asleep", "message": "m"}, "state", true},
		"no state":     {map[string]any{"message": "m"}, "state", true},
		"no message":   {map[string]any{"state": "idle"}, "message", true},
		"long message": {map[string]any{"state": "idle", "message": strings.Repeat("x", wire.MaxAppStatusMessage+1)}, "message: has 161 bytes", true},
		"long link":    {map[string]any{"state": "idle", "message": "m", "uri": strings.Repeat("x", wire.MaxURI+1)}, "uri: has 2049 bytes", true},
		"other field":  {map[string]any{"state": "idle", "message": "m", "mood": "good"}, "mood", true},
		"a number":     {map[string]any{"state": 1, "message": "m"}, "state", true},
	} {
		if text, failed := report(t, session, tt.arguments); failed != tt.failed || !strings.Contains(text, tt.says) {
			t.Errorf("%s: %q, failed: %v; want %q, %v", name, text, failed, tt.says, tt.failed)
		}
	}
	// The one good status is on its way.
	kept, err := os.ReadFile(filepath.Join(d.state, "s", "spool", "app-status.reports"))
	if err != nil || strings.Count(string(kept), `"body"`) != 1 {
		t.Errorf("%s, %v", kept, err)
	}
	d.stop(syscall.SIGTERM)
	if text, failed := report(t, session, map[string]any{"state": "idle", "message": "m"}); !failed || !strings.Contains(text, "no berthd answers at") {
		t.Errorf("without berthd: %q, %v", text, failed)
	}
}

func TestMCPArguments(t *testing.T) {
	for args, want := range map[string]string{
		"":              "--app is missing",
		"--app x y":     `"y" is no flag`,
		"--state idle":  "flag provided but not defined: -state",
		"--app x --app": "flag needs an argument",
	} {
		var out, errs strings.Builder
		code := Main(t.Context(), append([]string{"mcp"}, strings.Fields(args)...), nil, strings.NewReader(""), &out, &errs)
		if code != ExitUsage || !strings.Contains(errs.String(), want) {
			t.Errorf("%q: exit code %d, %s", args, code, &errs)
		}
	}
}
