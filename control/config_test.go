package control

import (
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"github.com/berthd/berth/identity/attest"
	"github.com/berthd/berth/internal/testnet"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

func TestConfigMistakes(t *testing.T) {
	for name, tt := range map[string]struct{ text, want string }{
		"unknown key":         {"agents:\n  - name: a\n    colour: red\n", "line 3: unknown key colour"},
		"key twice":           {"agents:\n  - name: a\n    name: b\n", `line 3: mapping key "name" already defined at line 2`},
		"no YAML":             {"agents: [", "line 1: did not find expected node content"},
		"wrong type":          {"agents:\n  - name: a\n    apps: 3\n", "line 3: cannot unmarshal"},
		"two documents":       {"agents: []\n---\nagents: []\n", "more than one YAML document"},
		"no name":             {"agents:\n  - directory: /x\n", "line 2: an agent needs a name"},
		"bad name":            {"agents:\n  - name: a b\n", `line 2: agent name "a b"`},
		"name twice":          {"agents:\n  - name: a\n  - name: A\n", `line 3: agent name "A" is used twice`},
		"bad id":              {"agents:\n  - name: a\n    id: 7\n", `line 3: agent id "7" is not a UUID`},
		"bad duration":        {"agents:\n  - name: a\n    scripts:\n      - {display_name: s, script: x, run_on_start: true, timeout: soon}\n", "line 4: cannot unmarshal"},
		"idle script":         {"agents:\n  - name: a\n    scripts:\n      - {display_name: s, script: x}\n", `line 4: script "s" never runs`},
		"bad cron":            {"agents:\n  - name: a\n    scripts:\n      - display_name: s\n        script: x\n        cron: '* *'\n", `line 6: cron "* *"`},
		"bad slug":            {"agents:\n  - name: a\n    apps:\n      - slug: 'x/y'\n", `line 4: app slug "x/y"`},
		"slug twice":          {"agents:\n  - name: a\n    apps:\n      - slug: x\n      - slug: x\n", `line 5: app slug "x" is used twice`},
		"health check":        {"agents:\n  - name: a\n    apps:\n      - slug: x\n        healthcheck: {url: http://x}\n", "line 5: a health check needs"},
		"unknown cloud":       {"agents:\n  - name: a\n    instance: {provider: moon, id: i}\n", `line 3: instance provider "moon"`},
		"bad variable":        {"agents:\n  - name: a\n    environment: {'A=B': c}\n", `line 3: "A=B" is no name`},
		"fraction interval":   {"agents:\n  - name: a\n    metadata:\n      - {key: k, script: x, interval: 1500ms}\n", "line 4: metadata intervals"},
		"dev container":       {"agents:\n  - name: a\n    devcontainers:\n      - name: x\n", "line 4: a dev container needs"},
		"dev container twice": {"agents:\n  - name: a\n    devcontainers:\n      - {name: x, workspace_folder: /x}\n      - {name: x, workspace_folder: /y}\n", `line 5: dev container "x" is there twice`},
		"secret for nobody":   {"agents:\n  - name: a\n    secrets:\n      - value: x\n", "line 4: a secret needs an env or a file"},
		"secret variable":     {"agents:\n  - name: a\n    secrets:\n      - {env: 'A B', value: x}\n", `line 4: "A B" is no name`},
		"secret of nothing":   {"agents:\n  - name: a\n    secrets:\n      - {env: A}\n", "line 4: a secret needs either a value"},
		"secret too long":     {"agents:\n  - name: a\n    secrets:\n      - {env: A, value: " + strings.Repeat("x", maxSecret+1) + "}\n", "line 4: a secret has at most"},
		"volume":              {"agents:\n  - name: a\n    resources: {volumes: [home]}\n", `line 3: volume "home"`},
		"share":               {"agents:\n  - name: a\n    max_share: all\n", `line 3: max_share "all"`},
		"port proxy":          {"agents:\n  - name: a\n    vscode_port_proxy: https://x\n", `line 3: vscode_port_proxy "https://x"`},
		"banner":              {"banners:\n  - color: red\n", "line 2: a banner needs a message"},
		"banner color":        {"banners:\n  - {message: x, color: 'red;'}\n", `line 2: banner color "red;"`},
		"two at once":         {"agents:\n  - directory: /x\n  - name: '-'\n", "line 2: an agent needs a name\nline 3: "},
	} {
		if _, err := parseConfig([]byte(tt.text)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
}

func TestConfigOfNothing(t *testing.T) {
	for _, text := range []string{"", "# nothing\n", "agents:\n", "agents: []\n"} {
		if declared, err := parseConfig([]byte(text)); err != nil || len(declared.agents) != 0 {
			t.Errorf("%q: %v, %v", text, declared, err)
		}
	}
}

// TestDocumentedConfig keeps docs/config.md true.
func TestDocumentedConfig(t *testing.T) {
	page, err := os.ReadFile("../docs/config.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := strings.Split(string(page), "```yaml\n")[1:]
	if len(blocks) == 0 {
		t.Fatal("no example")
	}
	for _, block := range blocks {
		example, _, _ := strings.Cut(block, "```")
		if _, err := parseConfig([]byte(example)); err != nil {
			t.Errorf("%v in\n%s", err, example)
		}
	}
}

func FuzzConfig(f *testing.F) {
	f.Add(fmt.Sprintf(testConfig, "i-1"))
	f.Add("agents:\n  - name: a\n    name: b\n")
	f.Add("a: &a [*a]\n")
	f.Fuzz(func(t *testing.T, text string) {
		declared, err := parseConfig([]byte(text))
		if err != nil {
			return
		}
		for _, d := range declared.agents {
			if !validName(d.name) {
				t.Errorf("agent name %q passed", d.name)
			}
			if _, err := json.Marshal(d.spec(uuid.New())); err != nil {
				t.Error(err)
			}
		}
	})
}

// TestConfigReload changes the file under a running server.
func TestConfigReload(t *testing.T) {
	x := configured(t, Config{})
	id, token := x.declared("demo")
	_, handMade := x.create("made-by-hand")
	l, bystander := x.connect(token), x.connect(handMade)
	if _, err := l.agent.GetManifest(t.Context(), &agentpb.GetManifestRequest{}); err != nil {
		t.Fatal(err)
	}
	names := func() string {
		var rows []wire.AgentSummary
		x.get("/api/v2/berth/agents", &rows)
		var all []string
		for _, r := range rows {
			all = append(all, r.Name)
		}
		return strings.Join(all, " ")
	}
	// What did not change disturbs nobody.
	if err := x.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := l.agent.GetManifest(t.Context(), &agentpb.GetManifestRequest{}); err != nil {
		t.Errorf("after reloading the same file: %v", err)
	}
	// A mistake changes nothing.
	writeConfig(t, x.config.ConfigFile, "agents: [{nam: x}]")
	if err := x.Reload(t.Context()); err == nil || !strings.Contains(err.Error(), "unknown key nam") {
		t.Errorf("a file with a mistake: %v", err)
	}
	if got := names(); got != "demo made-by-hand" {
		t.Errorf("agents %q", got)
	}
	// What changed is seen without being told, and reaches the agent by a new link.
	writeConfig(t, x.config.ConfigFile, fmt.Sprintf(testConfig, "i-0fedcba9876543210")+"  - name: second\n")
	eventually(t, "the second agent is there", func() bool { return names() == "demo made-by-hand second" })
	<-l.Closed()
	if again, _ := x.declared("demo"); again != id {
		t.Error("the agent got another id")
	}
	// What is no longer declared goes, and its token with it; what people made stays.
	writeConfig(t, x.config.ConfigFile, "agents: []\n")
	if err := x.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := names(); got != "made-by-hand" {
		t.Errorf("agents %q", got)
	}
	if status, _ := x.call("GET", "/api/v2/workspaceagents/me/rpc", "", as(token)...); status != http.StatusUnauthorized {
		t.Errorf("token of an agent that is gone: %d", status)
	}
	if _, err := bystander.agent.GetManifest(t.Context(), &agentpb.GetManifestRequest{}); err != nil {
		t.Error(err)
	}
}

// cloud is a fake AWS and what its metadata service signs.
func cloud(t *testing.T) (aws *testnet.FakeAWS, body func(name string) string) {
	t.Helper()
	aws, err := testnet.NewFakeAWS()
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(aws)
	t.Cleanup(srv.Close)
	do := func(method, path string, header ...string) string {
		req, err := http.NewRequestWithContext(t.Context(), method, srv.URL+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i+1 < len(header); i += 2 {
			req.Header.Set(header[i], header[i+1])
		}
		rec := httptest.NewRecorder()
		aws.ServeHTTP(rec, req)
		return rec.Body.String()
	}
	token := do("PUT", "/latest/api/token", "X-aws-ec2-metadata-token-ttl-seconds", "21600")
	signature := do("GET", "/latest/dynamic/instance-identity/signature", "X-aws-ec2-metadata-token", token)
	document := do("GET", "/latest/dynamic/instance-identity/document", "X-aws-ec2-metadata-token", token)
	return aws, func(name string) string {
		b, err := json.Marshal(wire.AWSInstanceIdentity{Signature: signature, Document: document, AgentName: name})
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
}

func TestExchange(t *testing.T) {
	aws, body := cloud(t)
	x := configured(t, Config{AWS: attest.AWSConfig{Certificates: map[string][]*x509.Certificate{testnet.FakeAWSRegion: aws.Certificates()}}})
	const path = "/api/v2/workspaceagents/aws-instance-identity"
	declare := func(text string) {
		t.Helper()
		writeConfig(t, x.config.ConfigFile, text)
		if err := x.Reload(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	instance := aws.InstanceID()
	ask := func(name string, status int, want string) string {
		t.Helper()
		got, answer := x.call("POST", path, body(name))
		if got != status || !strings.HasPrefix(answer, want) {
			t.Errorf("as %q: %d %s, want %d %s", name, got, answer, status, want)
		}
		return between(answer, `"session_token":"`, `"`)
	}
	ask("", 404, fmt.Sprintf(`{"message":"Instance with id \"%s\" not found."}`, instance))
	declare(fmt.Sprintf(testConfig, instance))
	first, second := ask("", 200, `{"session_token":"`), ask(" demo ", 200, `{"session_token":"`)
	if first == second || uuid.Validate(first) != nil {
		t.Errorf("tokens %q, %q", first, second)
	}
	x.connect(wire.Secret(first))
	x.connect(wire.Secret(second))
	ask("other", 404, fmt.Sprintf(`{"message":"No agent found with instance ID \"%s\" and name \"other\"."}`, instance))
	declare(fmt.Sprintf(testConfig, instance) + fmt.Sprintf("  - name: beta\n    instance: {provider: aws, id: %s}\n", instance))
	ask("", 409, fmt.Sprintf(`{"message":"Multiple agents found with instance ID \"%s\". Set CODER_AGENT_NAME to one of: beta, demo"}`, instance))
	exchanged := wire.Secret(ask("beta", 200, `{"session_token":"`))
	beta, err := x.store.AgentByName(t.Context(), "beta")
	if err != nil {
		t.Fatal(err)
	}
	made, err := x.store.MintToken(t.Context(), beta.ID, false)
	if err != nil {
		t.Fatal(err)
	}
	good := func(token wire.Secret) bool {
		status, _ := x.call("GET", "/api/v2/workspaceagents/me/reinit?wait=true", "", as(token)...)
		return status != http.StatusUnauthorized
	}
	if !good(exchanged) || !good(made) {
		t.Error("a fresh token is not good")
	}
	declare(fmt.Sprintf("agents:\n  - name: beta\n    instance: {provider: aws, id: %s, account: '999999999999'}\n", instance))
	ask("beta", 404, `{"message":"Instance with id`)
	if good(exchanged) {
		t.Error("the token of a machine that the agent is no longer to come from is still good")
	}
	if !good(made) {
		t.Error("a token that a person made ended with the machine's")
	}
}

func TestAdminKey(t *testing.T) {
	dir := t.TempDir()
	x := serve(t, Config{DataDir: dir})
	path := filepath.Join(dir, "admin-key")
	text, err := os.ReadFile(path)
	if err != nil || strings.TrimSpace(string(text)) != x.key.Reveal() || !keyPattern.MatchString(x.key.Reveal()) {
		t.Errorf("the file does not hold the key: %v", err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	x.stop()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	// The key stays good, and no second one is made.
	y := serve(t, Config{DataDir: dir})
	if y.key != "" {
		t.Error("a second admin key")
	}
	if status, _ := y.call("GET", "/api/v2/berth/agents", "", as(x.key)...); status != 200 {
		t.Errorf("the first key: %d", status)
	}
}

func TestNewExplains(t *testing.T) {
	good := &url.URL{Scheme: "http", Host: "127.0.0.1:1"}
	dir := t.TempDir()
	config := filepath.Join(dir, "berth.yaml")
	writeConfig(t, config, "agents: [{name: 'a b'}]")
	busy, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	for name, tt := range map[string]struct {
		config Config
		want   string
	}{
		"no URL":         {Config{}, "the access URL must be http or https"},
		"bad URL":        {Config{AccessURL: &url.URL{Scheme: "ftp", Host: "x"}}, "the access URL must be http or https"},
		"no config":      {Config{AccessURL: good, ConfigFile: dir + "/none"}, "no such file"},
		"bad config":     {Config{AccessURL: good, ConfigFile: config}, "line 1: agent name"},
		"data is a file": {Config{AccessURL: good, DataDir: config}, "cannot use the data directory"},
		"STUN is taken":  {Config{AccessURL: good, STUNAddr: busy.LocalAddr().String()}, "choose another address"},
	} {
		if _, err := New(t.Context(), tt.config); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
}

func TestChosenIDs(t *testing.T) {
	const chosen = "8a1f3c52-0000-4000-8000-000000000001"
	x := configured(t, Config{})
	writeConfig(t, x.config.ConfigFile, "agents:\n  - name: demo\n    id: "+chosen+"\n")
	if err := x.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	a, err := x.store.AgentByName(t.Context(), "demo")
	if diff := cmp.Diff(chosen, a.ID.String()); err != nil || diff != "" {
		t.Errorf("%v\n%s", err, diff)
	}
	all, err := x.store.Agents(t.Context())
	if err != nil || len(all) != 1 {
		t.Errorf("%d agents, %v", len(all), err)
	}
}

// An id may not take over another agent: one that was made by hand with its tokens, or one that had
// the name before.
// TestEmptyConfig: who writes a file empties it first, and may be met in between.
func TestEmptyConfig(t *testing.T) {
	x := configured(t, Config{})
	writeConfig(t, x.config.ConfigFile, "agents:\n  - name: kept\n")
	if err := x.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	writeConfig(t, x.config.ConfigFile, "")
	if err := x.Reload(t.Context()); err == nil || !strings.Contains(err.Error(), "is empty") {
		t.Errorf("an empty file: %v", err)
	}
	if agents, err := x.store.Agents(t.Context()); err != nil || len(agents) != 1 || agents[0].Name != "kept" {
		t.Errorf("agents %v, %v", agents, err)
	}
}

func TestForeignIDs(t *testing.T) {
	x := configured(t, Config{})
	made, token := x.create("made")
	const chosen = "8a1f3c52-0000-4000-8000-000000000002"
	writeConfig(t, x.config.ConfigFile, "agents:\n  - name: old\n    id: "+chosen+"\n")
	if err := x.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]string{
		"agents:\n  - name: new\n    id: " + made.String() + "\n":               `its id is that of "made"`,
		"agents:\n  - name: new\n    id: " + chosen + "\n  - name: old\n":       "give it an id of its own",
		"agents:\n  - name: old\n  - name: new\n    id: " + chosen + "\n":       "give it an id of its own",
		"agents:\n  - name: made\n    id: " + made.String() + "\n  - name: b\n": "was made by hand",
	} {
		writeConfig(t, x.config.ConfigFile, text)
		if err := x.Reload(t.Context()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
	agents, err := x.store.Agents(t.Context())
	if err != nil || len(agents) != 2 || agents[0].Name != "made" || agents[1].Name != "old" {
		t.Errorf("agents %v, %v", agents, err)
	}
	x.connect(token)
}
