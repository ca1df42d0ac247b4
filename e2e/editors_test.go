package e2e

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestOpenSSHPrograms: programs that bring their own ideas of SSH find what they expect.
func TestOpenSSHPrograms(t *testing.T) {
	s := newOpenSSH(t)
	for name, test := range map[string]func(*testing.T, *openSSH){
		"git": testGit, "no prompt": testNoPrompt, "VS Code": testVSCode, "TRAMP": testTRAMP, "Ansible": testAnsible,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, s)
		})
	}
}

// testGit clones from the workspace, and pushes to it.
func testGit(t *testing.T, s *openSSH) {
	bare := s.repository()
	clone := filepath.Join(s.home, "clone")
	git := func(args ...string) string {
		t.Helper()
		cmd := s.command("git", args...)
		cmd.Env = s.env("GIT_SSH_COMMAND=ssh -o BatchMode=yes -F "+s.config, "GIT_CONFIG_NOSYSTEM=1")
		got := finish(t, cmd, nil)
		if got.Code != 0 {
			t.Fatalf("git %q: %+v", args, got)
		}
		return got.Out
	}
	git("clone", "-q", "box.berth:"+bare, clone)
	if err := os.WriteFile(filepath.Join(clone, "large"), bytes.Repeat([]byte("0123456789abcdef"), 1<<17), 0o600); err != nil {
		t.Fatal(err)
	}
	git("-C", clone, "add", "large")
	git("-C", clone, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-m", "second")
	git("-C", clone, "push", "-q", "origin", "main")
	if got := git("--git-dir", bare, "log", "--format=%s", "main"); got != "second\nfirst\n" {
		t.Errorf("the workspace has the commits %q", got)
	}
}

// testNoPrompt: where git in the workspace has no login and no key, and no terminal to ask at, it fails at once and says of what.
// TestHelpers has what it does with them.
func testNoPrompt(t *testing.T, s *openSSH) {
	repository := filepath.Join(s.tmp, "nothing", "repo.git")
	s.must("git", "init", "-q", "--bare", repository)
	web, ca := s.gitWeb(repository, "somebody", "else")
	port := s.sshd("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHUZIhaXbUHf5pTzqWjVyNqDLCFaO1WyTIsP9d4eHMXp nobody")
	for what, tt := range map[string]struct{ line, says string }{
		"https":                   {"git -c http.sslCAInfo=" + ca + " clone -q " + web + "/repo.git nothing-web", "could not read Username"},
		"ssh with an unknown key": {"git clone -q ssh://root@127.0.0.1:" + port + repository + " nothing-ssh", "Host key verification failed"},
		"ssh without a login": {`GIT_SSH_COMMAND="$GIT_SSH_COMMAND -F none -o UserKnownHostsFile=/dev/null -o StrictHostKeyChecking=no" ` +
			"git clone -q ssh://root@127.0.0.1:" + port + repository + " nothing-ssh", "Permission denied"},
	} {
		if got := s.ssh(t, "", "box.berth", tt.line); got.Code == 0 || !strings.Contains(got.Err, tt.says) {
			t.Errorf("%s: %+v, want %q", what, got, tt.says)
		}
	}
}

// testVSCode goes VS Code's way in: a long script on the input of bash starts a server on a port of loopback and tells which; all
// connections to it then go through the same connection's SOCKS proxy, beside further commands.
func testVSCode(t *testing.T, s *openSSH) {
	const page = "the editor's server\n"
	site := filepath.Join(s.home, "editor")
	if err := os.Mkdir(site, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(site, "page"), []byte(page), 0o600); err != nil {
		t.Fatal(err)
	}
	port, proxy, control := freePort(t), freeAddr(t), filepath.Join(s.tmp, "code")
	script := fmt.Sprintf("busybox httpd -f -p 127.0.0.1:%d -h %s &\n", port, site) +
		strings.Repeat("installed=yes # what the script does takes some 30 kB\n", 30<<10/54) +
		`until busybox wget -qO- http://127.0.0.1:` + fmt.Sprint(port) + `/page >/dev/null; do sleep 0.1; done
[ "$installed" = yes ] && echo ready
{
	read line # it goes on for as long as the editor does
	kill %1
	echo "ended by $line"
}
`
	cmd := s.program(t, "ssh", "-T", "-D", proxy, "-M", "-S", control, "box.berth", "bash")
	in, out := begin(t, cmd, script)

	conns := make([]net.Conn, 200)
	var all sync.WaitGroup
	for i := range conns {
		all.Go(func() {
			var err error
			if conns[i], err = socks(proxy, port); err != nil {
				t.Errorf("connection %d: %v", i, err)
			}
		})
	}
	all.Wait()
	if t.Failed() {
		return
	}
	for range 3 { // beside them
		if diff := cmp.Diff(outcome{Out: "beside\n"}, s.ssh(t, "", "-S", control, "box.berth", "echo beside")); diff != "" {
			t.Error(diff)
		}
	}
	for i, c := range conns {
		all.Go(func() {
			defer c.Close()
			c.SetDeadline(time.Now().Add(time.Minute))
			io.WriteString(c, "GET /page HTTP/1.0\r\n\r\n")
			if got, err := io.ReadAll(c); err != nil || !strings.HasSuffix(string(got), page) {
				t.Errorf("connection %d: %q, %v", i, got, err)
			}
		})
	}
	all.Wait()
	fmt.Fprintln(in, "the editor")
	in.Close()
	if rest, err := io.ReadAll(out); err != nil || string(rest) != "ended by the editor\n" {
		t.Errorf("the script ends with %q, %v", rest, err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

// installed skips a test of a program that only the group "long" of test.sh installs, as it is large.
func installed(t *testing.T, program string) {
	t.Helper()
	if _, err := exec.LookPath(program); err == nil {
		return
	}
	if os.Getenv("BERTH_LONG") != "" {
		t.Fatalf("%s is not installed: ./test.sh long does that", program)
	}
	t.Skipf("%s is not installed", program)
}

// testTRAMP has Emacs read, write, list and run something in the workspace.
func testTRAMP(t *testing.T, s *openSSH) {
	installed(t, "emacs")
	there := filepath.Join(s.home, "tramp")
	if err := os.Mkdir(there, 0o700); err != nil {
		t.Fatal(err)
	}
	program := fmt.Sprintf(`(progn (require 'tramp)
  (setq tramp-ssh-controlmaster-options %q)
  (let ((default-directory %q) (text (make-string 200000 ?x)))
    (write-region text nil "written ü")
    (with-temp-buffer (insert-file-contents "written ü") (princ (if (equal (buffer-string) text) "same " "other ")))
    (princ (directory-files "." nil "written"))
    (princ (process-file "sh" nil nil nil "-c" "exit 7"))
    (princ (shell-command-to-string "echo \" $((40+2))\""))))`, "-o BatchMode=yes -F "+s.config, "/ssh:box.berth:"+there+"/")
	got := finish(t, s.command("emacs", "-Q", "--batch", "--eval", program), nil)
	if want := "same (written ü)7 42\n"; got.Code != 0 || got.Out != want {
		t.Errorf("%+v, want %q", got, want)
	}
}

// testAnsible has Ansible gather facts and copy a file, which makes it use commands, SFTP and multiplexing.
func testAnsible(t *testing.T, s *openSSH) {
	installed(t, "ansible")
	from, to := filepath.Join(s.home, "ansible-from"), filepath.Join(s.home, "ansible-to")
	if err := os.WriteFile(from, bytes.Repeat([]byte("by Ansible\n"), 10_000), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"-m", "ping"}, {"-m", "copy", "-a", "src=" + from + " dest=" + to}, {"-m", "shell", "-a", "test $(wc -l <" + to + ") = 10000"}} {
		cmd := s.command("ansible", append([]string{"all", "-i", "box.berth,"}, args...)...)
		cmd.Env = s.env("ANSIBLE_SSH_ARGS=-F "+s.config+" -o ControlMaster=auto -o ControlPersist=5s", "ANSIBLE_SSH_CONTROL_PATH_DIR="+filepath.Join(s.tmp, "ansible"))
		if got := finish(t, cmd, nil); got.Code != 0 {
			t.Errorf("ansible %q: %+v", args, got)
		}
	}
}
