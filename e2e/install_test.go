package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// bootBare starts a system that has berthd's programs in /opt/new, and no service.
func (r *road) bootBare() *booted {
	r.t.Helper()
	return boot(r.machine, func(root string) {
		r.clear(root, "usr/local/bin/berthd", "usr/local/bin/berthd-ptyhost", "etc/systemd/system/berthd.service", "etc/berthd", "etc/credstore", "etc/credstore.encrypted",
			"var/lib/systemd/credential.secret") // it makes a key for encrypted credentials of its own
		r.must("mkdir", "-p", filepath.Join(root, "opt/new"))
		r.must("cp", filepath.Join(bin, "berthd"), filepath.Join(bin, "berthd-ptyhost"), filepath.Join(root, "opt/new"))
		if err := os.WriteFile(filepath.Join(root, "opt/new/counter"), []byte(counter), 0o755); err != nil {
			r.t.Fatal(err)
		}
	})
}

// berthd runs a verb in the system, with the token at its standard input, and returns its exit code and what it said.
func (b *booted) berthd(r *road, argv ...string) (said string, code int) {
	b.t.Helper()
	cmd := b.inside(argv...)
	cmd.Stdin = strings.NewReader(r.token + "\n")
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		b.t.Fatal(err)
	}
	if strings.Contains(string(out), r.token) {
		b.t.Errorf("%q shows the token:\n%s", argv, out)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// says is berthd, which has to end well and say all of parts.
func (b *booted) says(r *road, argv []string, parts ...string) {
	b.t.Helper()
	said, code := b.berthd(r, argv...)
	if code != 0 {
		b.t.Fatalf("%q exited with %d:\n%s", argv, code, said)
	}
	for _, part := range parts {
		if !strings.Contains(said, part) {
			b.t.Errorf("%q does not say %q:\n%s", argv, part, said)
		}
	}
}

// TestInstall: berthd makes itself a service of a real systemd, changes what is to change, and takes all of it away again.
func TestInstall(t *testing.T) {
	r := newRoad(t, `
agents:
  - name: box
    scripts:
      - {display_name: end, run_on_stop: true, script: "echo ended >>/var/tmp/scripts"}
`)
	b := r.bootBare()
	install := func(args ...string) []string { return append([]string{"/opt/new/berthd", "install"}, args...) }
	serving := func() {
		t.Helper()
		b.wait(20*time.Second, "StatusText", "serving as box (direct)")
	}

	for name, refused := range map[string]struct {
		args []string
		want string
	}{
		"no URL":    {install("--yes", "--token-file", "-"), "URL is missing"},
		"no token":  {install("--yes", "--url", r.url()), "--auth auto"},
		"no answer": {install("--url", r.url(), "--token-file", "/dev/null"), "no token in /dev/null"},
		"no user":   {install("--yes", "--url", r.url(), "--token-file", "-", "--user", "nobody-here"), "--create-user"},
	} {
		if said, code := b.berthd(r, refused.args...); code != 64 || !strings.Contains(said, refused.want) {
			t.Errorf("%s: exit code %d: %s", name, code, said)
		}
	}
	const header = `X-Note=two "words" of $HOME\n`
	first := install("--url", r.url(), "--token-file", "-", "--header", header)
	b.says(r, append(first, "--dry-run"), "/usr/local/bin/berthd", "systemctl enable", "it is not shown", "BERTH_URL="+r.url())
	if exists(filepath.Join(b.root, "etc/berthd")) {
		t.Error("a dry run made something")
	}
	b.says(r, append(first, "--yes"), "berthd says: ")
	serving()
	main := b.property("MainPID")
	if environ := b.do("cat", "/proc/"+main+"/environ"); !strings.Contains(environ, "BERTH_HEADER="+header+"\x00") || strings.Contains(environ, r.token) {
		t.Errorf("berthd was started with %q", environ)
	}
	b.says(r, install("--yes"), "nothing to do")
	b.says(r, append(first, "--yes"), "nothing to do")
	if now := b.property("MainPID"); now != main {
		t.Errorf("berthd was started again for nothing: %s, then %s", main, now)
	}
	if got := b.do("systemctl", "is-enabled", "berthd"); got != "enabled" {
		t.Errorf("the service is %s", got)
	}

	// Encrypted, and for a user who is made.
	b.says(r, install("--yes", "--encrypt", "--user", "dev", "--create-user"), "useradd", "it reads the token", "+BERTH_USER=dev")
	serving()
	b.says(r, install("--yes"), "nothing to do")
	b.says(r, append(first, "--yes"), "nothing to do")
	if exists(filepath.Join(b.root, "etc/credstore/agent-token")) {
		t.Error("the token is still there as plain text")
	}
	if sealed, err := os.ReadFile(filepath.Join(b.root, "etc/credstore.encrypted/agent-token")); err != nil || len(sealed) == 0 || strings.Contains(string(sealed), r.token) {
		t.Errorf("the encrypted token: %q, %v", sealed, err)
	}
	if got := strings.TrimSpace(r.berth("ssh", "box", "id", "-un")); got != "dev" {
		t.Errorf("the workspace is that of %q", got)
	}

	// Confined, they cannot become root.
	confined, err := os.ReadFile("../deploy/systemd/confined.conf")
	if err != nil {
		t.Fatal(err)
	}
	dropIn := filepath.Join(b.root, "etc/systemd/system/berthd.service.d/confined.conf")
	if err := os.WriteFile(dropIn, confined, 0o644); err != nil {
		t.Fatal(err)
	}
	b.do("systemctl", "daemon-reload")
	b.do("systemctl", "stop", "berthd") // the owner of the terminals is older than the drop-in
	b.do("systemctl", "start", "berthd")
	serving()
	b.do("install", "-m", "4755", "/usr/bin/id", "/usr/local/bin/id-of-root")
	const rights = "#!/bin/sh\nread x; echo $(id -un) $(id-of-root -un) $(grep -c 'CapEff:.*[1-9a-f]' /proc/self/status) $(touch ~/mine && echo writes)\nread x\n"
	if err := os.WriteFile(filepath.Join(b.root, "opt/new/rights"), []byte(rights), 0o755); err != nil {
		t.Fatal(err)
	}
	p := r.terminal("shell", "box", "confined", "--command", "/opt/new/rights")
	p.ask("which?", "dev dev 0 writes")
	p.cmd.Process.Kill()
	if err := os.Remove(dropIn); err != nil {
		t.Fatal(err)
	}
	b.do("rm", "/usr/local/bin/id-of-root", "/var/tmp/scripts")
	b.do("systemctl", "daemon-reload")

	cmd := b.inside("script", "-qec", "berthd uninstall", "/dev/null")
	cmd.Stdin = strings.NewReader("n\n")
	if said, err := cmd.CombinedOutput(); cmd.ProcessState.ExitCode() != 1 || !strings.Contains(string(said), "nothing was done") {
		t.Errorf("a no: %v: %s", err, said)
	}
	serving()
	b.says(r, []string{"/usr/local/bin/berthd", "uninstall", "--yes"}, "/var/lib/berthd stays")
	if got := b.do("cat", "/var/tmp/scripts"); got != "ended" {
		t.Errorf("stop scripts: %q", got)
	}
	for _, path := range []string{"usr/local/bin/berthd", "usr/local/bin/berthd-ptyhost", "etc/systemd/system/berthd.service", "etc/systemd/system/berthd.service.d", "etc/berthd", "etc/credstore.encrypted"} {
		if exists(filepath.Join(b.root, path)) {
			t.Errorf("%s is left", path)
		}
	}
	if got := b.property("LoadState"); got != "not-found" {
		t.Errorf("systemd finds the unit: %s", got)
	}
	b.says(r, []string{"/opt/new/berthd", "uninstall", "--yes", "--purge"}, "/var/lib/berthd/")
	if exists(filepath.Join(b.root, "var/lib/berthd")) {
		t.Error("the state is left")
	}

	// One user's own, without root.
	b.do("useradd", "--create-home", "--shell", "/bin/bash", "ann")
	b.do("mkdir", "-p", "/var/lib/systemd/linger")
	b.do("touch", "/var/lib/systemd/linger/ann")
	uid := b.do("id", "-u", "ann")
	b.do("systemctl", "start", "user@"+uid)
	as := func(argv ...string) []string {
		return append([]string{"runuser", "-u", "ann", "--", "env", "HOME=/home/ann", "XDG_RUNTIME_DIR=/run/user/" + uid}, argv...)
	}
	if said, code := b.berthd(r, as(append(first, "--yes")...)...); code != 64 || !strings.Contains(said, "--user-unit") {
		t.Errorf("without root: %d: %s", code, said)
	}
	b.says(r, as(append(first, "--yes", "--user-unit")...), "/home/ann/.local/bin/berthd", "systemctl --user enable", "berthd says: ")
	status := func() string {
		return b.do(as("systemctl", "--user", "show", "--value", "--property=StatusText", "berthd")...)
	}
	eventually(t, 20*time.Second, "ann's berthd serves", func() bool { return status() == "serving as box (direct)" })
	if got := strings.TrimSpace(r.berth("ssh", "box", "id", "-un")); got != "ann" {
		t.Errorf("the workspace is that of %q", got)
	}
	p = r.terminal("shell", "box", "mine", "--command", "/opt/new/counter")
	p.ask("this", "this has count 1")
	b.do(as("systemctl", "--user", "restart", "berthd")...)
	eventually(t, 20*time.Second, "ann's berthd serves again", func() bool { return status() == "serving as box (direct)" })
	p.cmd.Process.Kill()
	p = r.terminal("shell", "box", "mine")
	p.ask("this", "this has count 2")
	p.cmd.Process.Kill()
	b.says(r, as(append(first, "--yes", "--user-unit")...), "nothing to do")
	b.says(r, as("/opt/new/berthd", "uninstall", "--yes", "--user-unit", "--purge"))
	if left := files(t, filepath.Join(b.root, "home/ann/.local")); strings.Contains(strings.Join(left, " "), "berthd") {
		t.Errorf("these are left: %q", left)
	}
}
