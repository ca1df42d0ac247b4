package e2e

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// road is a control server and an agent as an operator starts them, each a process of its own.
type road struct {
	*machine
	addr, data, config, token string
	flags                     []string // of the server
	server, agent             *daemon
}

var tokenPattern = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`)

// newRoad starts the server and mints the token of the agent "box", which the configuration declares.
func newRoad(t *testing.T, config string, flags ...string) *road {
	t.Helper()
	return newRoadOn(newMachine(t), config, flags...)
}

func newRoadOn(m *machine, config string, flags ...string) *road {
	m.t.Helper()
	return newRoadAt(m, freeAddr(m.t), config, flags...)
}

func newRoadAt(m *machine, addr, config string, flags ...string) *road {
	t := m.t
	t.Helper()
	r := &road{machine: m, flags: flags, addr: addr, data: filepath.Join(m.home, "data"), config: filepath.Join(m.home, "agents.yaml")}
	if err := os.WriteFile(r.config, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	r.serve()
	out := r.berth("agent", "token", "box")
	if r.token = tokenPattern.FindString(out); r.token == "" {
		t.Fatalf("agent token printed no token:\n%s", out)
	}
	return r
}

func (r *road) serve() {
	r.server = r.start("berth", nil, append([]string{"serve", "--listen", r.addr, "--data-dir", r.data, "--config", r.config}, r.flags...)...)
	r.server.wait("serving http", 20*time.Second)
}

func (r *road) url() string { return "http://" + r.addr }

// client is a command as an operator with the admin key runs it.
func (r *road) client(args ...string) *exec.Cmd {
	cmd := r.command("berth", args...)
	key, err := os.ReadFile(filepath.Join(r.data, "admin-key"))
	if err != nil {
		r.t.Fatal(err)
	}
	cmd.Env = r.env("BERTH_URL="+r.url(), "BERTH_TOKEN="+strings.TrimSpace(string(key)))
	return cmd
}

func (r *road) berth(args ...string) string {
	r.t.Helper()
	cmd := r.client(args...)
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	out, err := cmd.Output()
	if err != nil {
		r.t.Fatalf("berth %q: %v\n%s%s", args, err, out, &errOut)
	}
	return string(out)
}

func (r *road) run(env ...string) {
	env = append([]string{"BERTH_URL=" + r.url(), "BERTH_TOKEN=" + r.token}, env...)
	r.agent = r.start("berthd", env, "run", "--state-dir", filepath.Join(r.home, "state"))
}

func (r *road) status() string {
	out, _ := r.client("status", "box").CombinedOutput()
	return string(out)
}

func (r *road) waitConnected(limit time.Duration) {
	r.t.Helper()
	var last string
	eventually(r.t, limit, "the agent is connected", func() bool {
		last = r.status()
		return strings.Contains(last, "connected") && !strings.Contains(last, "disconnected")
	})
}

// pipe is a command that is spoken to line by line.
type pipe struct {
	t     *testing.T
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines chan string
}

func (r *road) pipe(args ...string) *pipe {
	r.t.Helper()
	return r.speak(r.client(args...))
}

// terminal is a command with a terminal around it, which script(1) makes.
func (r *road) terminal(args ...string) *pipe {
	r.t.Helper()
	cmd := r.client(args...)
	wrapped := r.command("script", "-qfec", "berth "+strings.Join(args, " "), "/dev/null")
	wrapped.Env = cmd.Env
	return r.speak(wrapped)
}

func (r *road) speak(cmd *exec.Cmd) *pipe {
	r.t.Helper()
	p := &pipe{t: r.t, cmd: cmd, lines: make(chan string, 1<<16)}
	var err error
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		r.t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		r.t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	go func() {
		defer close(p.lines)
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			p.lines <- lines.Text()
		}
	}()
	r.t.Cleanup(func() {
		p.cmd.Process.Kill()
		p.cmd.Wait()
	})
	return p
}

func (p *pipe) ask(line, want string) {
	p.t.Helper()
	if _, err := fmt.Fprintln(p.in, line); err != nil {
		p.t.Fatalf("cannot type %q: %v", line, err)
	}
	timeout := time.After(15 * time.Second)
	for {
		select {
		case got, ok := <-p.lines:
			if !ok {
				p.t.Fatalf("%q: the session ended", line)
			}
			if got == want {
				return
			}
		case <-timeout:
			p.t.Fatalf("%q: no answer %q in 15 s", line, want)
		}
	}
}

// The control server dies hard for a while: what runs goes on, and no log line is lost or doubled.
func TestServerKilled(t *testing.T) {
	lines, outage := atLength(1000, 3000), time.Duration(atLength(8, 30))*time.Second
	r := newRoad(t, fmt.Sprintf(`
agents:
  - name: box
    scripts:
      - display_name: numbers
        run_on_start: true
        script: |
          i=1
          while [ $i -le %d ]; do echo "line $i"; i=$((i+1)); sleep 0.015; done
`, lines))
	r.run()
	r.waitConnected(20 * time.Second)
	session := r.pipe("ssh", "box", "--", "cat")
	session.ask("before", "before")
	shell := r.terminal("shell", "box", "kept")
	fmt.Fprintln(shell.in, "echo before-$((40+2))")
	waitFor(t, shell, "before-42")
	eventually(t, 20*time.Second, "log lines arrive", func() bool { return strings.Contains(r.berth("logs", "box"), "line 100") })

	r.server.cmd.Process.Kill()
	<-r.server.done
	over := time.After(outage)
	session.ask("while it is dead", "while it is dead")
	fmt.Fprintln(shell.in, "echo dead-$((40+2))")
	waitFor(t, shell, "dead-42")
	<-over
	session.ask("after all that time", "after all that time")

	r.serve()
	back := time.Now()
	r.waitConnected(15 * time.Second)
	t.Logf("the link was back after %v", time.Since(back).Round(time.Millisecond))
	session.ask("and again", "and again")
	fmt.Fprintln(shell.in, "echo back-$((40+2))")
	waitFor(t, shell, "back-42")
	r.pipe("ssh", "box", "--", "cat").ask("a new session", "a new session")

	eventually(t, 3*time.Minute, "the last line arrives", func() bool { return strings.Contains(r.berth("logs", "box"), fmt.Sprint("line ", lines)) })
	ledger(t, r.berth("logs", "box"), lines)
}

var numberedLine = regexp.MustCompile(`\bline (\d+)$`)

// ledger checks that each of n lines stands there once and in order.
func ledger(t *testing.T, log string, n int) {
	t.Helper()
	next := 1
	for _, line := range strings.Split(strings.TrimSpace(log), "\n") {
		m := numberedLine.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		if got, _ := strconv.Atoi(m[1]); got != next {
			t.Fatalf("line %d stands where %d belongs", got, next)
		}
		next++
	}
	if next != n+1 {
		t.Errorf("%d lines of %d", next-1, n)
	}
}

// berthd itself is killed while a terminal is open and lines are being written; the next one takes
// both up again.
func TestAgentKilled(t *testing.T) {
	r := newRoad(t, "agents:\n  - name: box\n")
	r.run()
	r.waitConnected(20 * time.Second)
	shell := r.terminal("shell", "box", "kept")
	fmt.Fprintln(shell.in, "marker=still-$((40+2))-here")
	fmt.Fprintln(shell.in, "echo $marker")
	waitFor(t, shell, "still-42-here")

	r.agent.cmd.Process.Kill()
	<-r.agent.done
	r.run()
	r.agent.wait("ready", 20*time.Second)
	again := r.terminal("shell", "box", "kept")
	fmt.Fprintln(again.in, "echo again-$marker")
	waitFor(t, again, "again-still-42-here")

	if code := r.agent.stop(syscall.SIGTERM, 20*time.Second); code != 0 {
		t.Errorf("SIGTERM: exit code %d", code)
	}
	eventually(t, 5*time.Second, "the terminals ended with it", func() bool {
		for _, p := range r.processes() {
			if strings.Contains(p, "ptyhost") {
				return false
			}
		}
		return true
	})
}

func waitFor(t *testing.T, p *pipe, words string) {
	t.Helper()
	timeout := time.After(20 * time.Second)
	for {
		select {
		case line, ok := <-p.lines:
			if !ok {
				t.Fatalf("ended before %q", words)
			}
			if strings.Contains(line, words) {
				return
			}
		case <-timeout:
			t.Fatalf("no %q in 20 s", words)
		}
	}
}

// A planted secret must appear nowhere but in the places that hold it by design.
func TestSecretsStaySecret(t *testing.T) {
	const planted, ofUser = "planted-s3cret-value", "users-s3cret-value"
	r := newRoad(t, "agents:\n  - name: box\n    environment:\n      DATABASE_PASSWORD: "+planted+"\n"+
		"    secrets:\n      - {env: OF_USER, value: "+ofUser+"}\n"+
		"    scripts:\n      - display_name: hello\n        run_on_start: true\n"+
		"        script: echo hello $BERTH_AGENT_TOKEN; printf %s \"${OF_USER%value}\"; sleep 0.2; echo \"${OF_USER#users-s3cret-}\"; echo bye\n")
	r.run("BERTH_LOG_LEVEL=debug")
	r.waitConnected(20 * time.Second)
	eventually(t, 20*time.Second, "the script's log arrives", func() bool { return strings.Contains(r.berth("logs", "box"), "bye") })
	if log := r.berth("logs", "box"); strings.Count(log, "[hidden]") != 2 {
		t.Errorf("the token and the secret are not hidden in the log:\n%s", log)
	}
	full := r.berth("logs", "box", "--full")
	if !strings.HasPrefix(full, "==> hello <==\nhello [hidden]\n") || !strings.HasSuffix(full, "\nbye\n") {
		t.Errorf("the script's own log file is shown as\n%s", full)
	}
	key, err := os.ReadFile(filepath.Join(r.data, "admin-key"))
	if err != nil {
		t.Fatal(err)
	}
	admin := strings.TrimSpace(string(key))

	if out := r.berth("ssh", "box", "--", "echo $DATABASE_PASSWORD"); strings.TrimSpace(out) != planted {
		t.Errorf("the session does not have its variable: %q", out)
	}
	seen := map[string]string{
		"agent's log":   r.agent.output(),
		"server's log":  r.server.output(),
		"status":        r.status(),
		"processes":     strings.Join(r.processes(), "\n"),
		"workspace log": r.berth("logs", "box"),
		"full log":      full,
		"manifest":      r.berth("ssh", "box", "--", "true") + r.debug("/debug/manifest"),
		"debug logs":    r.debug("/debug/logs"),
	}
	// A wrong token, and the right one for a wrong server, must not come back in an error.
	bad := r.client("agent", "list")
	bad.Env = r.env("BERTH_URL="+r.url(), "BERTH_TOKEN=wrong-"+admin)
	out, _ := bad.CombinedOutput()
	seen["error"] = string(out)
	// The store keeps hashes only; the variable is the agent's configuration and may stand there.
	for _, f := range files(t, r.data) {
		if body, err := os.ReadFile(filepath.Join(r.data, f)); err == nil && f != "admin-key" && (bytes.Contains(body, []byte(r.token)) || bytes.Contains(body, []byte(admin))) {
			t.Errorf("a token stands in clear in %s", f)
		}
	}
	for what, text := range seen {
		for name, secret := range map[string]string{"variable": planted, "user's secret": ofUser, "agent token": r.token, "admin key": admin} {
			if strings.Contains(text, secret) {
				t.Errorf("the %s shows in the %s", name, what)
			}
		}
	}
}

// debug asks the agent's own HTTP API, over the mesh as anybody who may reach it would.
func (r *road) debug(path string) string {
	r.t.Helper()
	addr := freeAddr(r.t)
	port := addr[strings.LastIndex(addr, ":")+1:]
	cmd := r.client("forward", "box", port+":4")
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	var body []byte
	eventually(r.t, 15*time.Second, "the forwarded port answers", func() bool {
		resp, err := http.Get("http://127.0.0.1:" + port + path)
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		body, err = io.ReadAll(resp.Body)
		return err == nil && resp.StatusCode == http.StatusOK
	})
	return string(body)
}

// A data directory on a full disk: one plain sentence, no stack trace, no loop.
func TestServerDiskFull(t *testing.T) {
	m := newMachine(t)
	disk := m.smallDisk()
	out, errOut, code := m.run(nil, "berth", "serve", "--listen", "127.0.0.1:0", "--data-dir", filepath.Join(disk, "data"))
	all := out + errOut
	if code == 0 || !strings.Contains(all, "space") || strings.Contains(all, "goroutine") || strings.Count(all, "\n") > 10 {
		t.Errorf("exit %d:\n%s", code, all)
	}
}

// Two servers on one data directory, two daemons on one state directory: the second says so and ends.
func TestSecondOfAKind(t *testing.T) {
	r := newRoad(t, "agents:\n  - name: box\n")
	out, errOut, code := r.machine.run(nil, "berth", "serve", "--listen", "127.0.0.1:0", "--data-dir", r.data)
	if code == 0 || !strings.Contains(out+errOut, "in use") {
		t.Errorf("second server: exit %d: %s%s", code, out, errOut)
	}
	r.run()
	r.agent.wait("ready", 20*time.Second)
	cmd := r.command("berthd", "run", "--state-dir", filepath.Join(r.home, "state"))
	cmd.Env = r.env("BERTH_URL="+r.url(), "BERTH_TOKEN="+r.token)
	all, err := cmd.CombinedOutput()
	if err == nil || cmd.ProcessState.ExitCode() == 1 || !strings.Contains(string(all), "state") {
		t.Errorf("second daemon: %v: %s", err, all)
	}
}
