package e2e

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// The people of TestTargetUser, in a user database that only its agents see. These numbers are nobody's here.
const (
	devUID, devGID     = 54242, 54243
	guestUID, guestGID = 54244, 54244
	teamGID            = 54250
)

// lent is the workspace of another user than the one that berthd runs as.
type lent struct {
	*openSSH
	root, dev string // the machine's folder, and the user's home in it
	secret    string // a file that only root may read
}

// planted is what stands in the file that only root may read.
const planted = "for root only"

const lentBox = `
agents:
  - name: box
    motd: ~/motd
    scripts:
      - {display_name: starts, run_on_start: true, script: "id -un >~/started; touch $BERTH_SCRIPT_DATA_DIR/kept; echo $GIT_ASKPASS >>~/started"}
    apps:
      - {slug: demo}
    metadata:
      - {key: who, display_name: Who, script: id -un, interval: 10s, timeout: 5s}
    secrets:
      - {file: ~/.token, value: not-a-real-one}
  - name: nologin
  - name: moved
`

func newLent(t *testing.T) *lent {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root runs a workspace for another user")
	}
	m := newMachine(t)
	l := &lent{root: filepath.Dir(m.home)}
	l.dev, l.secret = filepath.Join(l.root, "dev"), filepath.Join(l.root, "secret")
	steps := []error{
		os.Chmod(l.root, 0o755), os.Chmod(bin, 0o755), os.Chmod(m.tmp, 0o777|os.ModeSticky), // they are root's alone otherwise
		os.WriteFile(l.secret, []byte(planted+"\n"), 0o600),
		os.Mkdir(l.dev, 0o700), os.Symlink(l.secret, filepath.Join(l.dev, "motd")), os.Chown(l.dev, devUID, devGID),
		os.WriteFile(filepath.Join(l.root, "passwd"), fmt.Appendf(nil, "root:x:0:0:root:%s:/bin/bash\ndev:x:%d:%d::%s:/bin/bash\nguest:x:%d:%d::%s:/usr/sbin/nologin\n",
			m.home, devUID, devGID, l.dev, guestUID, guestGID, l.root), 0o644),
		os.WriteFile(filepath.Join(l.root, "group"), fmt.Appendf(nil, "root:x:0:\ndev:x:%d:\nteam:x:%d:ann,dev\ntty:x:5:\n", devGID, teamGID), 0o644),
	}
	if err := errors.Join(steps...); err != nil {
		t.Fatal(err)
	}
	l.openSSH = &openSSH{road: newRoadOn(m, lentBox)}
	l.must("berth", "--url", l.url(), "--token-file", filepath.Join(l.data, "admin-key"), "config-ssh", "--yes")
	l.config = filepath.Join(l.home, ".ssh", "config")
	return l
}

// runAs starts an agent that sees the test's user database.
func (l *lent) runAs(agent string, flags ...string) *daemon {
	l.t.Helper()
	token := tokenPattern.FindString(l.berth("agent", "token", agent))
	argv := []string{"--mount", "sh", "-c", `mount --bind "$1/passwd" /etc/passwd && mount --bind "$1/group" /etc/group && shift && exec "$@"`, "sh",
		l.root, filepath.Join(bin, "berthd"), "run", "--state-dir", filepath.Join(l.root, "state-"+agent)}
	cmd := l.command("unshare", append(argv, flags...)...)
	cmd.Env = l.env("BERTH_URL="+l.url(), "BERTH_TOKEN="+token)
	return l.startCommand(cmd, "berthd for "+agent)
}

// owner is whom a file belongs to, and what they may do with it.
func owner(t *testing.T, path string) string {
	t.Helper()
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	stat := info.Sys().(*syscall.Stat_t)
	return fmt.Sprintf("%d:%d %v", stat.Uid, stat.Gid, info.Mode().Perm())
}

const devOnly, devPrivate = "54242:54243 -rw-------", "54242:54243 -rwx------"

// TestTargetUser: with --user, a berthd that is root does nothing for a workspace that its user could not do.
func TestTargetUser(t *testing.T) {
	l := newLent(t)
	berthd := l.runAs("box", "--user", "dev")
	berthd.wait("ready", 30*time.Second)
	guest := l.runAs("nologin", "--user", fmt.Sprint(guestUID))
	guest.wait("ready", 30*time.Second)
	t.Run("at once", func(t *testing.T) {
		for name, test := range map[string]func(*testing.T, *lent){
			"who": lentWho, "no way back": lentNoWayBack, "root's file": lentSecret, "sftp": lentSFTP, "agent": lentAgent, "sockets": lentSockets,
			"terminals": lentTerminals, "what berthd does": lentOnBehalf, "nologin": lentNoLogin, "refused": lentRefused, "root's terminals": lentLater,
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				test(t, l)
			})
		}
	})
	for _, d := range []*daemon{berthd, guest} {
		if code := d.stop(syscall.SIGTERM, 30*time.Second); code != 0 {
			t.Errorf("%s exits with %d", d.name, code)
		}
	}
	eventually(t, 10*time.Second, "nothing of the user is left", func() bool {
		for _, p := range l.processes() {
			pid, _, _ := strings.Cut(p, " ")
			if info, err := os.Stat("/proc/" + pid); err == nil && info.Sys().(*syscall.Stat_t).Uid == devUID {
				return false
			}
		}
		return true
	})
	leftovers, err := filepath.Glob(filepath.Join(l.tmp, "*"))
	if err != nil || len(leftovers) > 0 {
		t.Errorf("%q are left behind, %v", leftovers, err)
	}
}

func lentWho(t *testing.T, l *lent) {
	want := outcome{Out: fmt.Sprintf("dev %d %d %d %d|%s dev dev /bin/bash -|%s|0022\n", devUID, devGID, devGID, teamGID, l.dev, l.dev)}
	const ask = `echo "$(id -un) $(id -u) $(id -g) $(id -G)|$HOME $USER $LOGNAME $SHELL ${XDG_STATE_HOME--}|$PWD|$(umask)"`
	if diff := cmp.Diff(want, l.ssh(t, "", "box.berth", ask)); diff != "" {
		t.Errorf("a command: %s", diff)
	}
	if got := l.ssh(t, ask+"\nexit\n", "-tt", "box.berth"); !strings.Contains(strings.ReplaceAll(got.Out, "\r", ""), want.Out) {
		t.Errorf("on a terminal: %+v, want %s", got, want.Out)
	}
}

func lentNoWayBack(t *testing.T, l *lent) {
	for _, terminal := range []string{"-T", "-tt"} {
		got := l.ssh(t, "", terminal, "box.berth", `awk '/^(Uid|Gid|Cap(Inh|Prm|Eff|Amb)):/ {$1=$1; print}' /proc/self/status; setpriv --reuid 0 --clear-groups true; echo $?`)
		out := strings.ReplaceAll(got.Out, "\r", "")
		ids := "Uid: 54242 54242 54242 54242\nGid: 54243 54243 54243 54243\nCapInh: 0000000000000000\nCapPrm: 0000000000000000\nCapEff: 0000000000000000\nCapAmb: 0000000000000000\n"
		if !strings.HasPrefix(out, ids) || strings.HasSuffix(out, "\n0\n") {
			t.Errorf("%s: %+v", terminal, got)
		}
	}
}

// lentSecret reads a file of root's in every way there is.
func lentSecret(t *testing.T, l *lent) {
	copied := filepath.Join(l.home, "copied")
	for what, cmd := range map[string]*exec.Cmd{
		"a command":    l.program(t, "ssh", "box.berth", "cat "+l.secret),
		"a terminal":   l.program(t, "ssh", "-tt", "box.berth", "cat "+l.secret),
		"sftp":         l.program(t, "sftp", "-q", "box.berth:"+l.secret, copied),
		"scp":          l.program(t, "scp", "-q", "box.berth:"+l.secret, copied),
		"scp of old":   l.program(t, "scp", "-q", "-O", "box.berth:"+l.secret, copied),
		"scp to there": l.program(t, "scp", "-q", l.config, "box.berth:"+l.secret),
	} {
		if got := finish(t, cmd, nil); got.Code == 0 || !strings.Contains(got.Out+got.Err, "ermission denied") {
			t.Errorf("%s: %+v", what, got)
		}
	}
	if got, err := os.ReadFile(l.secret); err != nil || string(got) != planted+"\n" || exists(copied) {
		t.Errorf("root's file has %q, %v; a copy exists: %v", got, err, exists(copied))
	}
	if got := l.ssh(t, "exit\n", "-tt", "box.berth"); strings.Contains(got.Out, planted) {
		t.Errorf("a message of the day that is a link to it is shown: %+v", got)
	}

	web := freePort(t)
	l.forward(fmt.Sprintf("%d:4", web))
	list := func(path string) (status int, body string) {
		t.Helper()
		req, err := http.NewRequest(http.MethodPost, fmt.Sprintf("http://127.0.0.1:%d/api/v0/list-directory", web), strings.NewReader(path))
		if err != nil {
			t.Fatal(err)
		}
		return l.ask(req)
	}
	if status, body := list(fmt.Sprintf(`{"relativity":"root","path":[%q]}`, l.home)); status != http.StatusForbidden {
		t.Errorf("root's directory: %d %s", status, body)
	}
	if status, body := list(`{"relativity":"home"}`); status != http.StatusOK || !strings.Contains(body, fmt.Sprintf("%q", l.dev)) {
		t.Errorf("the home: %d %s", status, body)
	}
}

func lentSFTP(t *testing.T, l *lent) {
	batch := func(line string) outcome {
		t.Helper()
		return finish(t, l.program(t, "sftp", "-q", "-b", "-", "box.berth"), strings.NewReader(line+"\n"))
	}
	if got := batch("pwd\nput " + l.config + " config\nmkdir new\nchmod 640 config"); got.Code != 0 || !strings.Contains(got.Out, l.dev) {
		t.Errorf("%+v", got)
	}
	if got := owner(t, filepath.Join(l.dev, "config")); got != "54242:54243 -rw-r-----" {
		t.Errorf("what was put belongs to %s", got)
	}
	for _, line := range []string{"chown 0 config", "chgrp 0 config", "put " + l.config + " /etc/berth-test", "rm " + l.secret, "ls " + l.home} {
		if got := batch(line); got.Code == 0 || !strings.Contains(got.Err, "ermission denied") {
			t.Errorf("%s: %+v", line, got)
		}
	}
}

func lentAgent(t *testing.T, l *lent) {
	_, env := l.sshAgent(t, l.home)
	cmd := l.program(t, "ssh", "-A", "box.berth", "stat -c '%u:%g %a' $SSH_AUTH_SOCK $(dirname $SSH_AUTH_SOCK); ssh-add -l")
	cmd.Env = env
	got := finish(t, cmd, nil)
	if !strings.HasPrefix(got.Out, "54242:54243 755\n54242:54243 700\n") || !strings.Contains(got.Out, "mine (ED25519)") {
		t.Errorf("%+v", got)
	}
}

func lentSockets(t *testing.T, l *lent) {
	target, denied, local := filepath.Join(l.root, "target"), filepath.Join(l.home, "denied"), filepath.Join(l.home, "local")
	upperAt(t, target)
	upperAt(t, denied)
	remote, stolen := filepath.Join(l.dev, "sockets", "s"), filepath.Join(l.home, "stolen")
	if err := os.Chmod(target, 0o666); err != nil {
		t.Fatal(err)
	}
	cmd := l.program(t, "ssh", "-o", "ExitOnForwardFailure=yes", "-L", local+":"+target, "-R", remote+":"+target, "box.berth", "echo ready; cat")
	in, _ := begin(t, cmd)
	for what, path := range map[string]string{"-L": local, "-R": remote} {
		c, err := net.Dial("unix", path)
		asks(t, what, c, err)
	}
	for path, want := range map[string]string{remote: devOnly, filepath.Dir(remote): devPrivate} {
		if got := owner(t, path); got != want {
			t.Errorf("%s belongs to %s", path, got)
		}
	}
	in.Close()
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	eventually(t, 10*time.Second, "the socket is removed", func() bool { return !exists(remote) })

	if got := l.ssh(t, "", "-R", stolen+":"+target, "-o", "ExitOnForwardFailure=yes", "box.berth", "true"); got.Code == 0 || exists(stolen) {
		t.Errorf("a socket in root's directory: %+v", got)
	}
	if first, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start"); err == nil && strings.TrimSpace(string(first)) != "0" {
		if got := l.ssh(t, "", "-R", "79:"+target, "-o", "ExitOnForwardFailure=yes", "box.berth", "true"); got.Code == 0 {
			t.Errorf("a low port: %+v", got)
		}
	}
	cmd = l.program(t, "ssh", "-L", local+":"+denied, "-o", "StreamLocalBindUnlink=yes", "box.berth", "echo ready; cat")
	in, _ = begin(t, cmd)
	c, err := net.Dial("unix", local)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if n, err := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("root's socket answered: %d, %v", n, err)
	}
	in.Close()
	cmd.Wait()
}

func lentTerminals(t *testing.T, l *lent) {
	p := l.terminal("shell", "box", "work")
	// devpts gives a terminal to tty, 0620, where it is mounted so, and else to nobody but the user.
	fmt.Fprintln(p.in, `echo at $(id -un) $(stat -c '%u %a' $(tty) | sed s/620/600/) $((40+2))`)
	waitFor(t, p, "at dev 54242 600 42")
	found := false
	for _, process := range l.processes() {
		pid, name, _ := strings.Cut(process, " ")
		if strings.HasPrefix(name, "berthd-ptyhost") && strings.Contains(name, "state-box") {
			found = true
			if got := owner(t, "/proc/"+pid); !strings.HasPrefix(got, "54242:54243 ") {
				t.Errorf("the owner of the terminals is %s", got)
			}
		}
	}
	if !found {
		t.Error("nobody owns the terminals")
	}
}

// lentOnBehalf: scripts, secrets, the socket for reports and what else berthd does by itself is the user's; the rest is not.
func lentOnBehalf(t *testing.T, l *lent) {
	state := filepath.Join(l.root, "state-box")
	own := filepath.Join(state, fmt.Sprintf("user-%d", devUID))
	started := filepath.Join(l.dev, "started")
	eventually(t, 20*time.Second, "the start script has run", func() bool {
		text, _ := os.ReadFile(started)
		return strings.Count(string(text), "\n") == 2
	})
	if text, err := os.ReadFile(started); err != nil || string(text) != "dev\n"+own+"/bin/berthd\n" {
		t.Errorf("the start script says %q, %v", text, err)
	}
	for path, want := range map[string]string{
		started:                             "54242:54243 -rw-r--r--",
		filepath.Join(l.dev, ".token"):      devOnly,
		own:                                 devPrivate,
		filepath.Join(own, "berthd.sock"):   devOnly,
		filepath.Join(own, "ptyhost.sock"):  devOnly,
		filepath.Join(own, "log"):           devPrivate,
		state:                               "0:0 -rwx--x--x",
		filepath.Join(state, "spool"):       "0:0 -rwx------",
		filepath.Join(state, "ptyhost.log"): "0:0 -rw-------",
		filepath.Join(state, "lock"):        "0:0 -rw-------",
	} {
		if got := owner(t, path); got != want {
			t.Errorf("%s belongs to %s, want %s", path, got, want)
		}
	}
	keys, err := filepath.Glob(filepath.Join(state, "ssh_host_*"))
	if err != nil || len(keys) != 1 || owner(t, keys[0]) != "0:0 -rw-------" {
		t.Errorf("host keys: %q, %v", keys, err)
	}
	for _, kept := range []string{"log/*", "coder-script-data/*/kept"} {
		if found, err := filepath.Glob(filepath.Join(own, kept)); err != nil || len(found) != 1 || !strings.HasPrefix(owner(t, found[0]), "54242:54243 ") {
			t.Errorf("%s: %q, %v", kept, found, err)
		}
	}
	if got := l.ssh(t, "", "box.berth", "berthd report --app demo --state working --message hello"); got.Code != 0 {
		t.Errorf("a report: %+v", got)
	}
	for line := range strings.Lines(l.berth("agent", "list")) {
		if slices.Contains(strings.Fields(line), "box") {
			l.eventuallyShows("/api/v2/workspaceagents/"+tokenPattern.FindString(line)+"/watch-metadata", 30*time.Second, func(body string) bool {
				return strings.Contains(body, `"value":"dev"`)
			})
			return
		}
	}
	t.Error("the list has no box")
}

// lentNoLogin: as with sshd, the login shell says no by itself, and SFTP is up to it too.
func lentNoLogin(t *testing.T, l *lent) {
	for _, args := range [][]string{{"nologin.berth"}, {"nologin.berth", "true"}, {"-tt", "nologin.berth"}} {
		if got := l.ssh(t, "", args...); got.Code != 1 || !strings.Contains(got.Out, "not available") {
			t.Errorf("%q: %+v", args, got)
		}
	}
	if got := finish(t, l.program(t, "sftp", "-b", "-", "nologin.berth"), strings.NewReader("ls\n")); got.Code == 0 {
		t.Errorf("sftp: %+v", got)
	}
}

// lentRefused: what cannot be is said at the start, and nothing runs.
func lentRefused(t *testing.T, l *lent) {
	for name, c := range map[string]struct {
		argv []string
		says string
	}{
		"unknown":  {[]string{"berthd", "run", "--user", "no-such-user"}, "useradd"},
		"not root": {[]string{"setpriv", "--reuid", "54242", "--regid", "54243", "--clear-groups", filepath.Join(bin, "berthd"), "run", "--user", "root"}, "only root"},
		"homeless": {[]string{"berthd", "run", "--user", "nobody"}, "home directory /nonexistent is not there"},
		"shut off": {[]string{"berthd", "run", "--user", "daemon", "--state-dir", filepath.Join(l.home, "shut-off")}, "cannot enter"},
	} {
		cmd := l.command(c.argv[0], c.argv[1:]...)
		cmd.Dir = "/"
		cmd.Env = l.env("BERTH_URL="+l.url(), "BERTH_TOKEN=x")
		if got := finish(t, cmd, nil); got.Code != 64 || !strings.Contains(got.Err, c.says) {
			t.Errorf("%s: %+v, want %q", name, got, c.says)
		}
	}
}

// lentLater: terminals that ran as root do not live on when the workspace becomes another user's.
func lentLater(t *testing.T, l *lent) {
	before := l.runAs("moved")
	before.wait("ready", 30*time.Second)
	socket := filepath.Join(l.root, "state-moved", "ptyhost.sock")
	if code := before.stop(syscall.SIGHUP, 20*time.Second); code != 75 || !exists(socket) {
		t.Fatalf("berthd exits with %d, and leaves its terminals: %v", code, exists(socket))
	}
	after := l.runAs("moved", "--user", "dev")
	after.wait("ended the terminals that ran as root", 30*time.Second)
	after.wait("ready", 30*time.Second)
	if exists(socket) {
		t.Error("root's terminals are still there")
	}
	if code := after.stop(syscall.SIGTERM, 30*time.Second); code != 0 {
		t.Errorf("berthd exits with %d", code)
	}
}
