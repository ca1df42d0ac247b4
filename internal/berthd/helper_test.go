package berthd

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/berthd/berth/agent"
	"github.com/berthd/berth/client"
	"github.com/berthd/berth/wire"
)

// keeper is the part of a control server that helpers ask, as a stock one answers.
type keeper struct {
	url string

	mu       sync.Mutex
	key      *wire.GitSSHKey
	auth     map[string]wire.ExternalAuth // by id, and by what it matches
	loggedIn chan struct{}                // closed when the person has logged in; nil if they are
	listens  atomic.Int64
	header   string // a header that requests must have
}

const agentToken = "5b0f4c1e-6f9c-4a30-9a3b-0d6a3e2f1c11"

func newKeeper(t *testing.T) *keeper {
	k := &keeper{auth: map[string]wire.ExternalAuth{}}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /api/v2/workspaceagents/me/gitsshkey", func(w http.ResponseWriter, r *http.Request) {
		k.mu.Lock()
		key := k.key
		k.mu.Unlock()
		if key == nil {
			answer(403, "Forbidden.")(w, r)
			return
		}
		writeTestJSON(w, key)
	})
	mux.HandleFunc("GET /api/v2/workspaceagents/me/external-auth", k.externalAuth)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		k.mu.Lock()
		gate := k.header
		k.mu.Unlock()
		if r.Header.Get(wire.HeaderSessionToken) != agentToken || gate != "" && r.Header.Get("X-Gate") != gate {
			answer(401, "Workspace agent not authorized.")(w, r)
			return
		}
		mux.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	k.url = srv.URL
	return k
}

// knows lets a test change what the server knows.
func (k *keeper) knows(f func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f()
}

func (k *keeper) externalAuth(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	k.mu.Lock()
	auth, ok := k.auth[q.Get("id")+q.Get("match")]
	login := k.loggedIn
	k.mu.Unlock()
	switch {
	case !q.Has("id") && !q.Has("match"):
		answer(400, "'url' or 'id' must be provided!")(w, r)
		return
	case !ok:
		answer(404, `No matching external auth provider found in Coder for the url "x".`)(w, r)
		return
	}
	if q.Has("listen") && login != nil {
		k.listens.Add(1)
		select {
		case <-login:
			login = nil
		case <-r.Context().Done():
			return
		}
	}
	if login != nil {
		auth = wire.ExternalAuth{URL: k.url + "/external-auth/github"}
	}
	writeTestJSON(w, auth)
}

func writeTestJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	json.NewEncoder(w).Encode(v)
}

// session is the environment that a session of a stock deployment has.
func (k *keeper) session(t *testing.T, also ...string) []string {
	return append([]string{
		envSelf + "=1", "PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir(), "LC_ALL=C",
		"CODER_AGENT_URL=" + k.url, "CODER_AGENT_TOKEN=" + agentToken, "GIT_CONFIG_NOSYSTEM=1",
	}, also...)
}

// command runs a program without a terminal and returns its exit code and what it said.
func command(t *testing.T, env []string, name string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	var out, errs bytes.Buffer
	cmd.Env, cmd.Stdout, cmd.Stderr = env, &out, &errs
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.WaitDelay = 10 * time.Second
	err := cmd.Run()
	if cmd.ProcessState == nil {
		t.Fatal(err)
	}
	for _, said := range []string{out.String(), errs.String()} {
		if strings.Contains(said, agentToken) || strings.Contains(said, "goroutine ") {
			t.Errorf("%s %q said a secret or a stack trace:\n%s", name, args, said)
		}
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

func TestExternalAuthVerb(t *testing.T) {
	k := newKeeper(t)
	k.knows(func() {
		k.auth["github"] = wire.ExternalAuth{AccessToken: "gho_token", Type: "github", TokenExtra: json.RawMessage(`{"authed_user":{"id":"U1","n":7},"list":["a"]}`)}
	})
	env := k.session(t)
	tests := map[string]struct {
		args   string
		code   int
		stdout string
		stderr string
	}{
		"token":             {"access-token github", 0, "gho_token\n", ""},
		"extra":             {"access-token github --extra authed_user.id", 0, "U1\n", ""},
		"extra, flag first": {"access-token --extra list.0 github", 0, "a\n", ""},
		"extra number":      {"access-token github --extra authed_user.n", 0, "7\n", ""},
		"extra object":      {"access-token github --extra authed_user", 0, `{"id":"U1","n":7}` + "\n", ""},
		"no such extra":     {"access-token github --extra authed_user.name", 1, "", "authed_user.name"},
		"unknown":           {"access-token gitlab", 1, "", "No matching external auth provider"},
		"no id":             {"access-token", 64, "", "needs the id"},
		"other verb":        {"refresh", 64, "", "refresh"},
		"bad output":        {"access-token github --output xml", 64, "", "xml"},
		"help":              {"--help", 0, externalAuthHelp, ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			code, stdout, stderr := command(t, env, os.Args[0], append([]string{"external-auth"}, strings.Fields(tt.args)...)...)
			if code != tt.code || stdout != tt.stdout || !strings.Contains(stderr, tt.stderr) || tt.stderr == "" && stderr != "" {
				t.Errorf("exit code %d, said %q and %q; want %d, %q and %q", code, stdout, stderr, tt.code, tt.stdout, tt.stderr)
			}
		})
	}
	code, stdout, _ := command(t, env, os.Args[0], "external-auth", "access-token", "github", "--output", "json")
	var all map[string]any
	if err := json.Unmarshal([]byte(stdout), &all); code != 0 || err != nil || all["access_token"] != "gho_token" || all["type"] != "github" {
		t.Errorf("as JSON: %d %s", code, stdout)
	}

	k.knows(func() { k.loggedIn = make(chan struct{}) })
	page := k.url + "/external-auth/github\n"
	if code, stdout, stderr := command(t, env, os.Args[0], "external-auth", "access-token", "github"); code != 1 || stdout != page || stderr != "" {
		t.Errorf("before the login: %d %q %q, want 1 and %q", code, stdout, stderr, page)
	}
}

// TestHelpersFindTheServer: a session's own agent comes before settings that a person made for berth,
// and headers go along.
func TestHelpersFindTheServer(t *testing.T) {
	k := newKeeper(t)
	k.knows(func() { k.header = "open" })
	k.knows(func() { k.auth["github"] = wire.ExternalAuth{AccessToken: "gho_token"} })
	tokenFile := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(tokenFile, []byte(agentToken+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	base := []string{envSelf + "=1", "PATH=" + os.Getenv("PATH"), "BERTH_HEADER=X-Gate=open"}
	for name, env := range map[string][]string{
		"stock names":        {"CODER_AGENT_URL=" + k.url, "CODER_AGENT_TOKEN=" + agentToken},
		"our names":          {"BERTH_AGENT_URL=" + k.url, "BERTH_AGENT_TOKEN=" + agentToken},
		"a person's beside":  {"BERTH_AGENT_URL=" + k.url, "BERTH_AGENT_TOKEN=" + agentToken, "BERTH_URL=http://127.0.0.1:1", "BERTH_TOKEN=mine"},
		"token file":         {"BERTH_URL=" + k.url, "CODER_AGENT_TOKEN_FILE=" + tokenFile},
		"cloud, but a token": {"CODER_AGENT_URL=" + k.url, "CODER_AGENT_TOKEN=" + agentToken, "CODER_AGENT_AUTH=token"},
		"run's own mistakes": {"CODER_AGENT_URL=" + k.url, "CODER_AGENT_TOKEN=" + agentToken, "BERTH_LOG_FORMAT=xml", "BERTH_SHUTDOWN_TIMEOUT=soon"},
		"header command":     {"CODER_AGENT_URL=" + k.url, "CODER_AGENT_TOKEN=" + agentToken, "BERTH_HEADER=", "CODER_AGENT_HEADER_COMMAND=test -n \"$CODER_URL\" && printf 'X-Other=1\\n\\nX-Gate=open\\n'"},
	} {
		t.Run(name, func(t *testing.T) {
			code, stdout, stderr := command(t, append(append([]string{}, base...), env...), os.Args[0], "external-auth", "access-token", "github")
			if code != 0 || stdout != "gho_token\n" {
				t.Errorf("%d %q %q", code, stdout, stderr)
			}
		})
	}
	for name, tt := range map[string]struct {
		env  string
		says string
	}{
		"no token":           {"X=", "BERTH_TOKEN"},
		"failing command":    {"BERTH_HEADER_COMMAND=echo s3cr3t-planted; exit 3", "--header-command failed"},
		"endless command":    {"BERTH_HEADER_COMMAND=yes", "more than 64 KiB"},
		"command's nonsense": {"BERTH_HEADER_COMMAND=echo s3cr3t-planted", "must be key=value"},
	} {
		t.Run(name, func(t *testing.T) {
			code, _, stderr := command(t, append([]string{"CODER_AGENT_URL=" + k.url, tt.env}, base...), os.Args[0], "external-auth", "access-token", "github")
			if code == 0 || !strings.Contains(stderr, tt.says) || strings.Contains(stderr, "planted") {
				t.Errorf("%d %q, want %q", code, stderr, tt.says)
			}
		})
	}
}

// TestSessionWithAnOldToken: the token of a terminal that has been open for days may be over; berthd
// has the one in use.
func TestSessionWithAnOldToken(t *testing.T) {
	k := newKeeper(t)
	k.knows(func() { k.auth["github"] = wire.ExternalAuth{AccessToken: "gho_token"} })
	d := start(t, []string{"BERTH_URL=" + k.url, "BERTH_TOKEN=" + agentToken})
	d.says("level=WARN", "no control server answers") // it has its token; the keeper is none for agents
	env := k.session(t, "CODER_AGENT_TOKEN=11111111-1111-4111-8111-111111111111", "BERTH_SOCKET="+filepath.Join(d.state, "s", agent.LocalSocket))
	code, stdout, stderr := command(t, env, os.Args[0], "external-auth", "access-token", "github")
	if code != 0 || stdout != "gho_token\n" {
		t.Errorf("%d %q %q", code, stdout, stderr)
	}
}

func TestAskpassAnswers(t *testing.T) {
	k := newKeeper(t)
	k.knows(func() {
		k.auth["https://github.com"] = wire.ExternalAuth{AccessToken: "t", Username: "t", Type: "github"}
	})
	k.knows(func() {
		k.auth["https://gitlab.com:8443"] = wire.ExternalAuth{AccessToken: "t", Username: "oauth2", Password: "t", Type: "gitlab"}
	})
	k.knows(func() { k.auth["https://evil.example.com"] = wire.ExternalAuth{URL: "javascript:alert(1)"} })
	env := k.session(t, "GIT_PREFIX=")
	for prompt, want := range map[string]struct {
		code   int
		stdout string
		stderr string
	}{
		"Username for 'https://github.com': ":             {0, "t\n", ""},
		"Password for 'https://t@github.com': ":           {0, "t\n", ""},
		"Username for 'https://gitlab.com:8443': ":        {0, "oauth2\n", ""},
		"Password for 'https://oauth2@gitlab.com:8443': ": {0, "t\n", ""},
		"Username for 'https://none.example.com': ":       {1, "", "no login for https://none.example.com"},
		"Password for 'ssh://x': ":                        {1, "", "no web address"},
		"Username for 'https://evil.example.com': ":       {1, "", "no web address"},
		"Password for the token: ":                        {1, "", "no web address"},
	} {
		code, stdout, stderr := command(t, env, os.Args[0], prompt)
		if code != want.code || stdout != want.stdout || !strings.Contains(stderr, want.stderr) || want.stderr == "" && stderr != "" {
			t.Errorf("%s: %d %q %q; want %+v", prompt, code, stdout, stderr, want)
		}
	}
	if code, _, stderr := command(t, env, os.Args[0], "git-askpass"); code != ExitUsage || !strings.Contains(stderr, "question") {
		t.Errorf("without a question: %d %q", code, stderr)
	}
}

func TestAskpassWaitsForALogin(t *testing.T) {
	k := newKeeper(t)
	k.knows(func() {
		k.auth["https://github.com"] = wire.ExternalAuth{AccessToken: "t", Username: "t", Type: "github"}
	})
	k.knows(func() { k.loggedIn = make(chan struct{}) })
	const prompt = "Username for 'https://github.com': "
	code, stdout, stderr := command(t, k.session(t, "CODER_CHAT_AGENT=true"), os.Args[0], prompt)
	if code != 1 || stdout != "" || !strings.Contains(stderr, k.url+"/external-auth/github") || k.listens.Load() != 0 {
		t.Errorf("for a program: %d %q %q", code, stdout, stderr)
	}

	done := make(chan struct{})
	go func() {
		defer close(done)
		for k.listens.Load() == 0 {
			select {
			case <-t.Context().Done():
				return
			case <-time.After(time.Millisecond):
			}
		}
		k.knows(func() { close(k.loggedIn) })
	}()
	code, stdout, stderr = command(t, k.session(t), os.Args[0], prompt)
	<-done
	if code != 0 || stdout != "t\n" || !strings.Contains(stderr, "log in at") {
		t.Errorf("%d %q %q", code, stdout, stderr)
	}
}

// TestAskpassGivesUp: where nobody logs in, and where the server turns away meanwhile.
func TestAskpassGivesUp(t *testing.T) {
	k := newKeeper(t)
	k.knows(func() { k.loggedIn = make(chan struct{}) })
	k.knows(func() { k.auth["https://github.com"] = wire.ExternalAuth{} })
	var errs bytes.Buffer
	p := process{env: environment{"CODER_AGENT_URL": k.url, "CODER_AGENT_TOKEN": agentToken}, stderr: &errs}
	server, err := p.server(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	const page = "https://berth.example.com/external-auth/github"
	if _, err := p.awaitLogin(t.Context(), server, "https://github.com", page, 300*time.Millisecond); err == nil || !strings.Contains(err.Error(), "nobody logged in") {
		t.Errorf("%v, want that nobody logged in", err)
	}
	_, err = p.awaitLogin(t.Context(), server, "https://gone.example.com", page, time.Minute)
	if problem := client.Explain(err); problem == nil || problem.Kind != client.KindUnknown {
		t.Errorf("%v, want the server's refusal", err)
	}
	if strings.Count(errs.String(), page) != 2 {
		t.Errorf("said %q", &errs)
	}
}

// TestByTheNameCoder: alone it explains itself, and does not run a second agent.
func TestByTheNameCoder(t *testing.T) {
	coder := filepath.Join(t.TempDir(), "coder")
	if err := os.Symlink(os.Args[0], coder); err != nil {
		t.Fatal(err)
	}
	env := []string{envSelf + "=1", "HOME=" + t.TempDir()}
	for args, want := range map[string]struct {
		code   int
		stdout string
	}{"": {0, usageText}, "login": {ExitUsage, ""}, "stat disk --path /proc": {0, "0/0 GiB\n"}} {
		if code, stdout, stderr := command(t, env, coder, strings.Fields(args)...); code != want.code || stdout != want.stdout {
			t.Errorf("coder %s: %d %q %q", args, code, stdout, stderr)
		}
	}
}

func FuzzPrompt(f *testing.F) {
	f.Add("Username for 'https://github.com': ")
	f.Add("Password for 'https://u:p@h:1/x?y#z': ")
	f.Add("Username for '")
	f.Fuzz(func(t *testing.T, prompt string) {
		u, err := parsePrompt(prompt)
		if err == nil && (u.Host == "" || u.Scheme != "http" && u.Scheme != "https") {
			t.Errorf("%q gives %v", prompt, u)
		}
	})
}

func TestWhatIsShownIsHarmless(t *testing.T) {
	if got := wire.Line("ssh-ed25519 AAAA\x1b]0;x\x07\n\u009bm me\n"); got != "ssh-ed25519 AAAA ]0;x   m me" {
		t.Errorf("%q", got)
	}
	for page, ok := range map[string]bool{"https://x/y": true, "http://x": true, "ftp://x": false, "https://x/\x1b[m": false, "": false} {
		if err := checkPage(page); (err == nil) != ok {
			t.Errorf("%q: %v", page, err)
		}
	}
}
