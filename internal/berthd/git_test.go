package berthd

import (
	"context"
	"encoding/pem"
	"io/fs"
	"net"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/berthd/berth/wire"
)

// tool finds a program that the tests need; see test.sh.
func tool(t *testing.T, name string) string {
	t.Helper()
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin", "/sbin") {
		path := filepath.Join(dir, name)
		if info, err := os.Stat(path); err == nil && info.Mode()&0o111 != 0 {
			return path
		}
	}
	t.Fatalf("%s is missing: ./test.sh unit installs it", name)
	return ""
}

func must(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v: %s", name, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// bareRepository makes one with a single commit, whose README holds "hello".
func bareRepository(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	work, bare := filepath.Join(dir, "work"), filepath.Join(dir, "repo.git")
	must(t, "git", "init", "-q", "-b", "main", work)
	if err := os.WriteFile(filepath.Join(work, "README"), []byte("hello\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	must(t, "git", "-C", work, "add", "README")
	must(t, "git", "-C", work, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-m", "first")
	must(t, "git", "clone", "-q", "--bare", work, bare)
	return bare
}

// newKey makes a key pair with ssh-keygen.
func newKey(t *testing.T, path string) wire.GitSSHKey {
	t.Helper()
	must(t, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "berth", "-f", path)
	private, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	public, err := os.ReadFile(path + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	return wire.GitSSHKey{PublicKey: string(public), PrivateKey: string(private)}
}

// sshServer is a real sshd that takes one key. It returns its address.
func sshServer(t *testing.T, authorized string) (addr string) {
	t.Helper()
	sshd := tool(t, "sshd")
	if os.Getuid() == 0 { // where sshd drops its privileges to; Debian's service makes it at boot
		if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	newKey(t, filepath.Join(dir, "host"))
	for name, content := range map[string]string{
		"authorized": authorized,
		"config": "HostKey " + dir + "/host\nAuthorizedKeysFile " + dir + "/authorized\nPidFile none\nUsePAM no\nStrictModes no\n" +
			"SetEnv HOME=" + dir + "\n" + // bash reads .bashrc for sshd's commands, too
			"PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// One sshd for each connection, as inetd would start it: it needs no port of its own to be found free.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			f, err := conn.(*net.TCPConn).File()
			conn.Close()
			if err != nil {
				continue
			}
			cmd := exec.CommandContext(ctx, sshd, "-i", "-e", "-f", filepath.Join(dir, "config"))
			cmd.Stdin, cmd.Stdout = f, f
			cmd.Run()
			f.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); cancel(); <-done })
	return l.Addr().String()
}

// gitOverSSH returns the environment and URL to clone with.
func gitOverSSH(t *testing.T, k *keeper, addr, repository string, options ...string) (env []string, url string) {
	t.Helper()
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	own := strings.Join(append([]string{"-F none", "-o UserKnownHostsFile=/dev/null", "-o StrictHostKeyChecking=no", "-o LogLevel=ERROR"}, options...), " ")
	env = k.session(t, "GIT_SSH_COMMAND="+os.Args[0]+" git-ssh -- "+own, "GIT_TERMINAL_PROMPT=0")
	return env, "ssh://" + me.Username + "@" + addr + repository
}

// TestGitOverSSH clones and pushes with the key that the server keeps, over a real sshd.
func TestGitOverSSH(t *testing.T) {
	k := newKeeper(t)
	key := newKey(t, filepath.Join(t.TempDir(), "workspace"))
	k.knows(func() { k.key = &key })
	repository := bareRepository(t)
	env, url := gitOverSSH(t, k, sshServer(t, key.PublicKey), repository)
	clone := filepath.Join(t.TempDir(), "clone")
	if code, _, stderr := command(t, env, "git", "clone", "-q", url, clone); code != 0 || stderr != "" {
		t.Fatalf("clone: %d %s", code, stderr)
	}
	if got, err := os.ReadFile(filepath.Join(clone, "README")); string(got) != "hello\n" {
		t.Errorf("README %q, %v", got, err)
	}
	code, _, stderr := command(t, env, "git", "-C", clone, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "--allow-empty", "-m", "second")
	if code != 0 {
		t.Fatal(stderr)
	}
	if code, _, stderr := command(t, env, "git", "-C", clone, "push", "-q"); code != 0 || stderr != "" {
		t.Errorf("push: %d %s", code, stderr)
	}
	if got := must(t, "git", "-C", repository, "log", "-1", "--format=%s", "main"); got != "second" {
		t.Errorf("the server has %q", got)
	}
}

// TestGitOverSSHWithOwnKeys: without a key of the server's, those of the user still work.
func TestGitOverSSHWithOwnKeys(t *testing.T) {
	dir := t.TempDir()
	own := newKey(t, filepath.Join(dir, "own"))
	other := newKey(t, filepath.Join(dir, "other"))
	repository := bareRepository(t)
	addr := sshServer(t, own.PublicKey)
	for name, tt := range map[string]struct {
		key    *wire.GitSSHKey
		down   bool
		stderr []string
	}{
		"the server refuses":   {nil, false, []string{"going on without the workspace's own key", "Forbidden"}},
		"the server has none":  {&wire.GitSSHKey{}, false, []string{"going on without the workspace's own key", "has none"}},
		"the server is away":   {nil, true, []string{"going on without the workspace's own key", "refused"}},
		"the server's is new":  {&other, false, nil}, // own keys are offered first
		"the server's is torn": {&wire.GitSSHKey{PrivateKey: "no key"}, false, nil},
	} {
		t.Run(name, func(t *testing.T) {
			k := newKeeper(t)
			if k.knows(func() { k.key = tt.key }); tt.down {
				k.url = "http://127.0.0.1:1"
			}
			env, url := gitOverSSH(t, k, addr, repository, "-i "+filepath.Join(dir, "own"))
			clone := filepath.Join(t.TempDir(), "clone")
			code, _, stderr := command(t, env, "git", "clone", "-q", url, clone)
			if code != 0 {
				t.Errorf("%d %s", code, stderr)
			}
			for _, want := range tt.stderr {
				if !strings.Contains(stderr, want) {
					t.Errorf("said %q, want %q", stderr, want)
				}
			}
		})
	}
	t.Run("no key fits", func(t *testing.T) {
		k := newKeeper(t)
		k.knows(func() { k.key = &other })
		env, url := gitOverSSH(t, k, addr, repository)
		code, _, stderr := command(t, env, "git", "clone", "-q", url, filepath.Join(t.TempDir(), "clone"))
		if code == 0 || !strings.Contains(stderr, strings.TrimSpace(other.PublicKey)) || strings.Contains(stderr, "PRIVATE") {
			t.Errorf("%d %s, want the public key and how to use it", code, stderr)
		}
	})
}

func TestGitSSHExitCodes(t *testing.T) {
	k := newKeeper(t)
	key := newKey(t, filepath.Join(t.TempDir(), "workspace"))
	k.knows(func() { k.key = &key })
	addr := sshServer(t, key.PublicKey)
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	ssh := []string{"git-ssh", "--", "-F", "none", "-o", "UserKnownHostsFile=/dev/null", "-o", "StrictHostKeyChecking=no", "-o", "LogLevel=ERROR", "-p", port, host}
	for remote, want := range map[string]int{"exit 0": 0, "exit 7": 7, "kill -9 $$": 255} {
		if code, _, stderr := command(t, k.session(t), os.Args[0], append(ssh, remote)...); code != want {
			t.Errorf("%s: %d, want %d: %s", remote, code, want, stderr)
		}
	}
	// Neither the key nor a file of it is to be seen while ssh runs.
	code, stdout, _ := command(t, k.session(t), os.Args[0], append(ssh, "ps -eo args | grep -c '[P]RIVATE KEY'; cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -o -- '-i /proc/[0-9]*/fd/[0-9]*' | head -1")...)
	if lines := strings.Split(stdout, "\n"); code != 0 || lines[0] != "0" || !strings.HasPrefix(lines[1], "-i /proc/") {
		t.Errorf("%d %q", code, stdout)
	}
	if code, stdout, _ := command(t, k.session(t), os.Args[0], "git-ssh", "--", "-G", "example.com"); code != 0 || !strings.Contains(stdout, "hostname example.com") {
		t.Errorf("git's probe: %d %q", code, stdout)
	}
	if code, _, _ := command(t, k.session(t), os.Args[0], "git-ssh", "--"); code != ExitUsage {
		t.Errorf("without arguments: %d", code)
	}
	if code, _, stderr := command(t, append(k.session(t), "PATH=/nowhere"), os.Args[0], "gitssh", "--", "x"); code != ExitFailure || !strings.Contains(stderr, "cannot run ssh") {
		t.Errorf("without ssh: %d %q", code, stderr)
	}
}

func TestHeldKeyIsPrivateAndGoes(t *testing.T) {
	for name, hold := range map[string]func([]byte) (string, func(), error){
		"as it is done": holdKey,
		"in a file":     func(pem []byte) (string, func(), error) { return tempKey(t.TempDir(), pem) },
	} {
		path, release, err := hold([]byte("the key\n"))
		if err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v, want mode 600", name, info, err)
		}
		for range 2 { // ssh reads a key more than once
			if got, err := os.ReadFile(path); string(got) != "the key\n" {
				t.Errorf("%s: %q %v", name, got, err)
			}
		}
		release()
		if _, err := os.Stat(path); !os.IsNotExist(err) {
			t.Errorf("%s: %v after release", name, err)
		}
	}
}

// TestGitOverHTTPS clones from a real git behind a login, through a real TLS server.
func TestGitOverHTTPS(t *testing.T) {
	backend := filepath.Join(must(t, "git", "--exec-path"), "git-http-backend")
	repository := bareRepository(t)
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if name, password, _ := r.BasicAuth(); name != "oauth2" || password != "glpat-1" {
			w.Header().Set("WWW-Authenticate", `Basic realm="git"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		h := cgi.Handler{Path: backend, Env: []string{"GIT_PROJECT_ROOT=" + filepath.Dir(repository), "GIT_HTTP_EXPORT_ALL=1"}}
		h.ServeHTTP(w, r)
	}))
	defer srv.Close()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), fs.FileMode(0o600)); err != nil {
		t.Fatal(err)
	}
	k := newKeeper(t)
	env := k.session(t, "GIT_ASKPASS="+os.Args[0], "GIT_SSL_CAINFO="+ca)
	clone := func() (int, string, string) {
		dir := filepath.Join(t.TempDir(), "clone")
		code, _, stderr := command(t, env, "git", "clone", "-q", srv.URL+"/repo.git", dir)
		return code, stderr, dir
	}
	began := time.Now()
	if code, stderr, _ := clone(); code == 0 || !strings.Contains(stderr, "no login for "+srv.URL) {
		t.Errorf("without a login: %d %s", code, stderr)
	}
	if took := time.Since(began); took > time.Minute {
		t.Errorf("took %v to fail without a terminal", took)
	}
	k.knows(func() {
		k.auth[srv.URL] = wire.ExternalAuth{AccessToken: "glpat-1", Username: "oauth2", Password: "glpat-1", Type: "gitlab"}
	})
	code, stderr, dir := clone()
	if code != 0 || stderr != "" {
		t.Fatalf("%d %s", code, stderr)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "README")); string(got) != "hello\n" {
		t.Errorf("README %q, %v", got, err)
	}
}
