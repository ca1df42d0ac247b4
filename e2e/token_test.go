package e2e

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// The stories of a token that ends while terminals are open: the agent is back on another within half
// a minute, or out with 77, and what runs in the terminals does not notice.

const (
	// backWithin is how soon an agent must be back on another token, or out.
	backWithin = 30 * time.Second
	// exitRefused is berthd's exit code for a token that was good and is not any more.
	exitRefused = 77
)

// terminals opens three terminals with something in each that only lives there. The returned function
// attaches to each anew and checks that it is still there.
func terminals(t *testing.T, open func(name string) *pipe) (alive func()) {
	t.Helper()
	names := []string{"one", "two", "three"}
	for i, name := range names {
		p := open(name)
		fmt.Fprintf(p.in, "kept=%s-$((40+%d))\n", name, i)
		fmt.Fprintln(p.in, "echo it-is-$kept")
		waitFor(t, p, fmt.Sprintf("it-is-%s-%d", name, 40+i))
	}
	return func() {
		t.Helper()
		for i, name := range names {
			p := open(name)
			fmt.Fprintln(p.in, "echo again-$kept")
			waitFor(t, p, fmt.Sprintf("again-%s-%d", name, 40+i))
		}
	}
}

func (r *road) shell(name string) *pipe { return r.terminal("shell", "box", name) }

// mint makes another token for the agent.
func (r *road) mint() string {
	r.t.Helper()
	token := tokenPattern.FindString(r.berth("agent", "token", "box"))
	if token == "" {
		r.t.Fatal("agent token printed no token")
	}
	return token
}

// waitBack waits until a session of the agent shows that it works with the token wanted.
func waitBack(t *testing.T, since time.Time, session func() string, wanted func(token string) bool) {
	t.Helper()
	eventually(t, backWithin-time.Since(since), "the agent is back on the new token", func() bool { return wanted(session()) })
	t.Logf("back after %v", time.Since(since).Round(time.Millisecond))
}

// sessionToken is the token that a session of an agent is given; "" if none can be had now. A client that
// set out for an agent which is replaced meanwhile waits for it in vain.
func sessionToken(ssh *exec.Cmd) string {
	var out bytes.Buffer
	ssh.Stdout = &out
	if ssh.Start() != nil {
		return ""
	}
	late := time.AfterFunc(5*time.Second, func() { ssh.Process.Kill() })
	defer late.Stop()
	if ssh.Wait() != nil {
		return ""
	}
	return strings.TrimSpace(out.String())
}

// A revoked token in a file: it is read anew, and the one that was put there meanwhile is used.
func TestRevokedTokenFile(t *testing.T) {
	r := newRoad(t, "agents:\n  - name: box\n")
	file := filepath.Join(r.home, "token")
	write := func(token string) {
		if err := os.WriteFile(file, []byte(token+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(r.token)
	r.run("BERTH_TOKEN=", "BERTH_TOKEN_FILE="+file)
	r.waitConnected(20 * time.Second)
	alive := terminals(t, r.shell)

	since := time.Now()
	r.berth("agent", "revoke", "box")
	r.agent.wait("not authorized", backWithin) // the old token was tried again, and refused
	renewed := r.mint()
	write(renewed)
	waitBack(t, since, func() string { return sessionToken(r.client("ssh", "box", "--", "echo $BERTH_AGENT_TOKEN")) },
		func(token string) bool { return token == renewed })
	alive()
}

// A revoked token that berthd cannot have anew: it leaves with 77, and the next one finds the terminals.
func TestRevokedTokenInTheEnvironment(t *testing.T) {
	r := newRoad(t, "agents:\n  - name: box\n")
	r.run()
	r.waitConnected(20 * time.Second)
	alive := terminals(t, r.shell)

	since := time.Now()
	r.berth("agent", "revoke", "box")
	select {
	case <-r.agent.done:
	case <-time.After(backWithin - time.Since(since)):
		t.Fatalf("neither back nor out after %v:\n%s", backWithin, r.agent.output())
	}
	if code := r.agent.cmd.ProcessState.ExitCode(); code != exitRefused {
		t.Fatalf("exit code %d, want %d:\n%s", code, exitRefused, r.agent.output())
	}
	t.Logf("out after %v", time.Since(since).Round(time.Millisecond))
	if last := lastLine(r.agent.output()); !strings.Contains(last, "refused") || !strings.Contains(last, "token") {
		t.Errorf("the last line does not say why: %q", last)
	}

	// Started again with the same token it does not leave in a loop but waits for a better one.
	r.run()
	r.agent.wait("not authorized", 20*time.Second)
	r.agent.kill()
	r.token = r.mint()
	r.run()
	r.waitConnected(20 * time.Second)
	alive()
}

func lastLine(text string) string {
	text = strings.TrimSpace(text)
	return text[strings.LastIndex(text, "\n")+1:]
}

// kill ends a daemon without a word, as a crash does.
func (d *daemon) kill() {
	d.t.Helper()
	if err := d.cmd.Process.Kill(); err != nil {
		d.t.Fatal(err)
	}
	<-d.done
}

var upFolder = regexp.MustCompile(`^berth-up-\d+$`)

// upFile is a file of the stack that berth up runs.
func (m *machine) upFile(name string) string {
	m.t.Helper()
	entries, err := os.ReadDir(m.tmp)
	if err != nil {
		m.t.Fatal(err)
	}
	for _, e := range entries {
		if upFolder.MatchString(e.Name()) {
			return filepath.Join(m.tmp, e.Name(), name)
		}
	}
	m.t.Fatalf("berth up has no folder in %s", m.tmp)
	return ""
}

// upShell opens a terminal of the agent that berth up runs.
func (m *machine) upShell(name string) *pipe {
	r := &road{machine: m}
	cmd := m.command("script", "-qfec", "berth shell demo "+name, "/dev/null")
	return r.speak(cmd)
}

// upToken is the token that the agent of berth up works with.
func (m *machine) upToken() string {
	return sessionToken(m.command("berth", "ssh", "demo", "--", "echo $BERTH_AGENT_TOKEN"))
}

// A revoked token of a machine that proves itself: the exchange starts anew at once.
func TestRevokedInstanceToken(t *testing.T) {
	for _, cloud := range []string{"aws", "azure", "google"} {
		t.Run(cloud, func(t *testing.T) {
			m := newMachine(t)
			m.up("--cloud", cloud)
			alive := terminals(t, m.upShell)
			old := m.upToken()
			if !tokenPattern.MatchString(old) {
				t.Fatalf("the session has no token: %q", old)
			}

			since := time.Now()
			m.must("berth", "agent", "revoke", "demo")
			waitBack(t, since, m.upToken, func(token string) bool { return token != old && tokenPattern.MatchString(token) })
			alive()
		})
	}
}

// A machine that lost its proof key is another one to the server, until the server is told to forget the
// first. The agent says so, and is back by itself.
func TestLostProofKey(t *testing.T) {
	m := newMachine(t)
	up := m.up()
	alive := terminals(t, m.upShell)
	old := m.upToken()
	key := m.upFile("state/identity_ed25519_key")
	if info, err := os.Stat(key); err != nil || info.Mode() != 0o600 {
		t.Fatalf("the proof key: %v, %v", info, err)
	}
	if err := os.Remove(key); err != nil {
		t.Fatal(err)
	}
	m.must("berth", "agent", "revoke", "demo")
	log := m.upFile("berthd.log")
	eventually(t, backWithin, "the agent says that another key proved itself before", func() bool {
		return strings.Contains(read(t, log), "berth agent forget demo")
	})
	m.forget(up)
	eventually(t, time.Minute, "the agent is back", func() bool {
		token := m.upToken()
		return token != old && tokenPattern.MatchString(token)
	})
	alive()
}

// forget has the server of berth up forget the machine of its agent, by the API as an operator may.
func (m *machine) forget(up *daemon) {
	m.t.Helper()
	server := regexp.MustCompile(`http://[0-9.:]+`).FindString(up.output())
	id := tokenPattern.FindString(m.must("berth", "agent", "list", "--output", "json"))
	req, err := http.NewRequestWithContext(m.t.Context(), http.MethodPost, server+"/api/v2/berth/agents/"+id+"/forget", nil)
	if err != nil {
		m.t.Fatal(err)
	}
	req.Header.Set("Coder-Session-Token", strings.TrimSpace(read(m.t, m.upFile("server/admin-key"))))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		m.t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusNoContent {
		m.t.Fatalf("cannot have agent %q forgotten: %s", id, resp.Status)
	}
}

// The build is replaced: the machine becomes another agent, on that one's token.
func TestReplacedBuild(t *testing.T) {
	m := newMachine(t)
	m.up()
	alive := terminals(t, m.upShell)
	old := m.upToken()
	config := m.upFile("agents.yaml")
	const id = "7d1f0f1e-5c1d-4f7e-9d59-0a3d5e6f7a8b"
	replaced := strings.Replace(read(t, config), "- name: demo\n", "- name: demo\n    id: "+id+"\n", 1)

	since := time.Now()
	if err := os.WriteFile(config, []byte(replaced), 0o600); err != nil {
		t.Fatal(err)
	}
	waitBack(t, since, m.upToken, func(token string) bool { return token != old && tokenPattern.MatchString(token) })
	if log := read(t, m.upFile("berthd.log")); !strings.Contains(log, "id="+id) {
		t.Errorf("the agent is not the new build's:\n%s", log)
	}
	alive()
}

func read(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
