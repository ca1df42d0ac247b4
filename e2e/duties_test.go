package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestDuties: what a configuration asks of a workspace beside sessions is done and seen by the people
// who look at it, and done anew for the one who claims the workspace.
func TestDuties(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	web := &http.Server{Handler: http.NotFoundHandler()}
	go web.Serve(l)
	t.Cleanup(func() { web.Close() })
	r := newRoad(t, fmt.Sprintf(`
agents:
  - name: box
    prebuilt: true
    environment: {PLANET: earth}
    apps:
      - slug: web
        url: http://%[1]s
        healthcheck: {url: "http://%[1]s/", interval: 1s, threshold: 1}
      - slug: gone
        url: http://127.0.0.1:1
        healthcheck: {url: "http://127.0.0.1:1/", interval: 1s, threshold: 1}
    metadata:
      - {key: planet, script: "echo $PLANET", interval: 1s}
      - {key: broken, script: "echo half; exit 3", interval: 1s}
    resources: {memory: true, volumes: [/]}
    secrets:
      - {file: ~/.config/registry, value: planted-secret}
      - {env: PLANTED, value: planted-secret}
    scripts:
      - {display_name: start, script: "echo x >> $HOME/starts", run_on_start: true}
      - {display_name: stop, script: "echo x >> $HOME/stops", run_on_stop: true}
`, l.Addr()))
	r.run()
	r.waitConnected(20 * time.Second)

	id := r.agentID()
	r.eventuallyShows("/api/v2/workspaceagents/"+id, 30*time.Second, func(body string) bool {
		var agent struct {
			Apps []struct{ Slug, Health string } `json:"apps"`
		}
		if json.Unmarshal([]byte(body), &agent) != nil {
			return false
		}
		health := map[string]string{}
		for _, app := range agent.Apps {
			health[app.Slug] = app.Health
		}
		return health["web"] == "healthy" && health["gone"] == "unhealthy"
	})
	r.eventuallyShows("/api/v2/workspaceagents/"+id+"/watch-metadata", 30*time.Second, func(body string) bool {
		return strings.Contains(body, `"value":"earth"`) && strings.Contains(body, `"value":"half"`) && strings.Contains(body, `"error":"run cmd: exit status 3"`)
	})
	secret := filepath.Join(r.home, ".config", "registry")
	if info, err := os.Stat(secret); err != nil || info.Mode() != 0o600 {
		t.Errorf("the secret's file: %v, %v", info, err)
	}

	req, err := http.NewRequest(http.MethodPost, r.url()+"/api/v2/berth/agents/"+id+"/claim", nil)
	if err != nil {
		t.Fatal(err)
	}
	if status, body := r.ask(req); status/100 != 2 {
		t.Fatalf("claim: %d %s", status, body)
	}
	lines := func(name string) int {
		text, _ := os.ReadFile(filepath.Join(r.home, name))
		return strings.Count(string(text), "\n")
	}
	eventually(t, 30*time.Second, "the claimed workspace has started anew", func() bool { return lines("stops") == 1 && lines("starts") == 2 })
	r.waitConnected(20 * time.Second)
	if code := r.agent.stop(os.Interrupt, 20*time.Second); code != 0 {
		t.Errorf("berthd exits with %d", code)
	}
	if out := r.agent.output() + r.server.output(); strings.Contains(out, "planted-secret") {
		t.Errorf("a secret is in a log:\n%s", out)
	}
}

// agentID is the id of the one agent.
func (r *road) agentID() string {
	r.t.Helper()
	id := tokenPattern.FindString(r.berth("agent", "list"))
	if id == "" {
		r.t.Fatal("list shows no agent")
	}
	return id
}

// ask makes a request with the admin key and returns what came within two seconds: some answers go on.
func (r *road) ask(req *http.Request) (int, string) {
	r.t.Helper()
	key, err := os.ReadFile(filepath.Join(r.data, "admin-key"))
	if err != nil {
		r.t.Fatal(err)
	}
	req.Header.Set("Coder-Session-Token", strings.TrimSpace(string(key)))
	client := &http.Client{Timeout: 2 * time.Second}
	defer client.CloseIdleConnections()
	resp, err := client.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, string(body)
}

// eventuallyShows polls a page of the server until it is as wanted.
func (r *road) eventuallyShows(path string, limit time.Duration, wanted func(body string) bool) {
	r.t.Helper()
	eventually(r.t, limit, "wanted of "+path, func() bool {
		req, err := http.NewRequest(http.MethodGet, r.url()+path, nil)
		if err != nil {
			r.t.Fatal(err)
		}
		_, body := r.ask(req)
		return wanted(body)
	})
}
