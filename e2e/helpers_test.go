package e2e

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// repository makes one with a single commit that git serves, and returns where.
func (m *machine) repository() string {
	m.t.Helper()
	work, bare := filepath.Join(m.tmp, "work"), filepath.Join(m.tmp, "git", "repo.git")
	m.must("git", "init", "-q", "-b", "main", work)
	if err := os.WriteFile(filepath.Join(work, "README"), []byte("hello from git\n"), 0o600); err != nil {
		m.t.Fatal(err)
	}
	m.must("git", "-C", work, "add", "README")
	m.must("git", "-C", work, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-m", "first")
	m.must("git", "clone", "-q", "--bare", work, bare)
	return bare
}

// gitWeb serves a repository over https to whoever has the login. It returns its URL and the file with its CA.
func (m *machine) gitWeb(repository, user, password string) (url, ca string) {
	m.t.Helper()
	backend := filepath.Join(strings.TrimSpace(m.must("git", "--exec-path")), "git-http-backend")
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if u, p, _ := r.BasicAuth(); u != user || p != password {
			w.Header().Set("WWW-Authenticate", `Basic realm="git"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		h := cgi.Handler{Path: backend, Env: []string{"GIT_PROJECT_ROOT=" + filepath.Dir(repository), "GIT_HTTP_EXPORT_ALL=1"}}
		h.ServeHTTP(w, r)
	}))
	m.t.Cleanup(srv.Close)
	ca = filepath.Join(m.tmp, "git-ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600); err != nil {
		m.t.Fatal(err)
	}
	return srv.URL, ca
}

// sshd is OpenSSH's server, which takes one key. It returns its port.
func (m *machine) sshd(authorized string) string {
	m.t.Helper()
	const program = "/usr/sbin/sshd"
	dir := filepath.Join(m.tmp, "sshd")
	for _, d := range []string{dir, "/run/sshd"} { // the second is where sshd drops its rights to
		if err := os.MkdirAll(d, 0o755); err != nil {
			m.t.Fatal(err)
		}
	}
	m.must("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(dir, "host"))
	for name, text := range map[string]string{
		"authorized": authorized + "\n",
		"config": fmt.Sprintf("HostKey %[1]s/host\nAuthorizedKeysFile %[1]s/authorized\nPidFile none\nUsePAM no\nStrictModes no\n"+
			"PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\nSetEnv HOME=%[2]s\n", dir, m.home),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			m.t.Fatal(err)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		m.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { // one sshd for each connection, as inetd would start it
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			f, err := conn.(*net.TCPConn).File()
			conn.Close()
			if err != nil {
				return
			}
			cmd := exec.Command(program, "-i", "-f", filepath.Join(dir, "config"))
			cmd.Stdin, cmd.Stdout = f, f
			cmd.Run()
			f.Close()
		}
	}()
	m.t.Cleanup(func() { l.Close(); <-done })
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		m.t.Fatal(err)
	}
	return port
}

// TestHelpers: git, scripts and people in a workspace use what the server keeps for its owner. berthd is
// called up as a stock start script does, with nothing but the stock agent's variables.
func TestHelpers(t *testing.T) {
	m := newMachine(t)
	repository := m.repository()
	web, ca := m.gitWeb(repository, "oauth2", "glpat-planted")
	late := filepath.Join(m.tmp, "late-token")
	r := newRoad(t, fmt.Sprintf(`
agents:
  - name: box
    environment: {GIT_SSL_CAINFO: %[1]q, GIT_CONFIG_NOSYSTEM: "1"}
    scripts:
      - {display_name: leak, run_on_start: true, script: "echo it is $(coder external-auth access-token work)"}
external_auth:
  - {id: work, type: gitlab, regex: "^%[2]s", token: glpat-planted}
  - {id: late, type: github, regex: "^https://late.example.com", token_file: %[3]q}
`, ca, web, late))
	coder := filepath.Join(r.home, "coder")
	if err := os.Link(filepath.Join(bin, "berthd"), coder); err != nil {
		t.Fatal(err)
	}
	if line, _, _ := strings.Cut(r.must(coder, "--version"), "\n"); !strings.Contains(line, "Coder") {
		t.Errorf("a stock start script does not take %q for an agent", line)
	}
	agent := r.start(coder, []string{"CODER_AGENT_URL=" + r.url(), "CODER_AGENT_TOKEN=" + r.token, "CODER_AGENT_AUTH=token"}, "agent", "--no-reap")
	r.waitConnected(20 * time.Second)

	// in runs a line in the workspace, which must end as told, and returns what it printed.
	in := func(code int, line string) string {
		t.Helper()
		out, err := r.client("ssh", "box", line+"; echo exit $?").CombinedOutput()
		text := string(out)
		if err != nil || !strings.HasSuffix(text, fmt.Sprintf("exit %d\n", code)) {
			t.Fatalf("%s: %v, want exit %d:\n%s", line, err, code, text)
		}
		return strings.TrimSuffix(text, fmt.Sprintf("exit %d\n", code))
	}
	if got := in(0, "git clone -q "+web+"/repo.git web && cat web/README"); got != "hello from git\n" {
		t.Errorf("over https: %q", got)
	}
	if got := in(0, "coder external-auth access-token work"); got != "glpat-planted\n" {
		t.Errorf("the token is %q", got)
	}
	if got := in(1, "berthd external-auth access-token late"); got != r.url()+"/external-auth/late\n" {
		t.Errorf("without a login: %q", got)
	}
	eventually(t, 20*time.Second, "the script's log arrives", func() bool { return strings.Contains(r.berth("logs", "box"), "it is ") })
	if got := r.berth("logs", "box"); !strings.Contains(got, "it is [hidden]") || strings.Contains(got, "planted") {
		t.Errorf("a login that a script fetched is shown:\n%s", got)
	}
	if got := in(0, "coder stat mem --prefix Mi"); !strings.Contains(got, "MiB") {
		t.Errorf("memory: %q", got)
	}

	shell := r.pipe("ssh", "box", "--", "sh")
	shell.ask(`"$GIT_ASKPASS" "Username for 'https://late.example.com': " 2>&1`, "  "+r.url()+"/external-auth/late")
	if err := os.WriteFile(late, []byte("ghp-late\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	shell.ask("true", "ghp-late")

	req, err := http.NewRequest(http.MethodGet, r.url()+"/api/v2/users/me/gitsshkey", nil)
	if err != nil {
		t.Fatal(err)
	}
	var key struct {
		PublicKey string `json:"public_key"`
	}
	if _, body := r.ask(req); json.Unmarshal([]byte(body), &key) != nil || !strings.HasPrefix(key.PublicKey, "ssh-ed25519 ") {
		t.Fatalf("the owner's public key: %s", body)
	}
	port := r.sshd(strings.TrimSpace(key.PublicKey))
	got := in(0, `GIT_SSH_COMMAND="$GIT_SSH_COMMAND -F none -o UserKnownHostsFile=/dev/null -o StrictHostKeyChecking=no -o LogLevel=ERROR" `+
		`git clone -q ssh://root@127.0.0.1:`+port+repository+` ssh && cat ssh/README`)
	if got != "hello from git\n" {
		t.Errorf("over ssh: %q", got)
	}
	if code := agent.stop(os.Interrupt, 20*time.Second); code != 0 {
		t.Errorf("berthd exits with %d", code)
	}
	if out := agent.output() + r.server.output(); strings.Contains(out, "planted") || strings.Contains(out, "ghp-late") {
		t.Errorf("a secret is in a log:\n%s", out)
	}
}
