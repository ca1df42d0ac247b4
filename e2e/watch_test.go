package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// TestWatchPorts: each change shows, as a line, as JSON and in place on a terminal, and so it does
// after the agent and the server were killed.
func TestWatchPorts(t *testing.T) {
	m := newMachine(t)
	m.isolate()
	r := newRoadOn(m, oneBox)
	r.run()
	r.waitConnected(20 * time.Second)
	r.httpd("127.0.0.1:3000")

	lines := r.launch("ports", "box", "--watch", "--tcp")
	lines.wait(" + 3000/tcp  127.0.0.1  busybox  ", 20*time.Second)
	objects := r.launch("ports", "box", "--watch", "--output", "json")
	objects.wait(`"port":3000`, 20*time.Second)

	socket := filepath.Join(m.tmp, "tmux")
	tmux := func(args ...string) string {
		t.Helper()
		return m.must("tmux", append([]string{"-S", socket, "-f", "/dev/null"}, args...)...)
	}
	defer m.run(nil, "tmux", "-S", socket, "kill-server")
	key, err := os.ReadFile(filepath.Join(r.data, "admin-key"))
	if err != nil {
		t.Fatal(err)
	}
	tmux("new-session", "-d", "-s", "w", "-x", "90", "-y", "200", "env", "BERTH_URL="+r.url(), "BERTH_TOKEN="+strings.TrimSpace(string(key)), "sh", "-c",
		"trap : INT; "+filepath.Join(bin, "berth")+" ports box -w --tcp; echo exit $?; exec cat")
	screen := func() string { return tmux("capture-pane", "-p", "-t", "w") }
	shows := func(what string, want bool) {
		t.Helper()
		var last string
		defer func() {
			if t.Failed() {
				t.Logf("the screen:\n%s", last)
			}
		}()
		eventually(t, 20*time.Second, fmt.Sprintf("the screen shows %q: %v", what, want), func() bool {
			last = screen()
			return strings.Contains(last, what) == want
		})
	}
	shows("3000/tcp", true)

	second := r.httpd("127.0.0.1:3001")
	lines.wait(" + 3001/tcp  127.0.0.1  busybox", 10*time.Second)
	objects.wait(`"port":3001`, 10*time.Second)
	shows("3001/tcp", true)
	second.stop(os.Kill, 5*time.Second)
	lines.wait(" - 3001/tcp  127.0.0.1  busybox", 10*time.Second)
	shows("3001/tcp", false)

	long := os.Getenv("BERTH_LONG") != "" // a server is awaited with growing patience
	r.agent.cmd.Process.Kill()
	<-r.agent.done
	if long {
		r.server.cmd.Process.Kill()
		<-r.server.done
	}
	lines.wait("berth: lost the connection to box; trying again", 30*time.Second)
	shows("lost", true)
	r.httpd("127.0.0.1:3002")
	if long {
		r.serve()
	}
	r.run()
	lines.wait("berth: box is back", 40*time.Second)
	lines.wait(" + 3002/tcp  127.0.0.1  busybox", 10*time.Second)
	objects.wait(`"port":3002`, 10*time.Second)
	shows("3002/tcp", true)

	tmux("send-keys", "-t", "w", "C-c")
	shows("exit 0", true)
	for _, what := range []string{"3000/tcp", "3002/tcp"} {
		shows(what, true) // the last list stays
	}
	if out := lines.output(); strings.Count(out, "+ 3000/tcp") != 1 || strings.Contains(out, "\x1b") {
		t.Errorf("the lines:\n%s", out)
	}
	changes := map[string]int{}
	for _, line := range strings.Split(objects.output(), "\n") {
		var c struct {
			At     time.Time
			Change string
			Item   struct {
				Port    int
				Network string
			}
		}
		if strings.HasPrefix(line, "{") {
			if err := json.Unmarshal([]byte(line), &c); err != nil || c.At.IsZero() {
				t.Fatalf("%q: %v", line, err)
			}
			changes[fmt.Sprintf("%s %d/%s", c.Change, c.Item.Port, c.Item.Network)]++
		}
	}
	for _, want := range []string{"added 3000/tcp", "added 3001/tcp", "removed 3001/tcp", "added 3002/tcp"} {
		if changes[want] != 1 {
			t.Errorf("%q is told %d times: %v", want, changes[want], changes)
		}
	}
	if code := lines.stop(os.Interrupt, 10*time.Second); code != 0 {
		t.Errorf("Ctrl-C: exit code %d", code)
	}
}

// TestContainersOfPodman: a container of a real engine shows under watch with its hostile labels made
// harmless, a shell opens in it with and without a terminal, and one that is not there is refused.
func TestContainersOfPodman(t *testing.T) {
	m := newMachine(t)
	name := filepath.Base(filepath.Dir(m.home))
	evil := "x\x1b[2J\nsecond"
	r := newRoadOn(m, oneBox)
	socket := filepath.Join(m.tmp, "podman.sock")
	r.start("podman", nil, "system", "service", "--time=0", "unix://"+socket)
	eventually(t, 20*time.Second, "podman serves", func() bool { return exists(socket) })
	podman := func(args ...string) string {
		t.Helper()
		return m.must("podman", append([]string{"--url", "unix://" + socket}, args...)...)
	}
	root := m.busyboxRoot()
	image := "localhost/" + name + ":1"
	podman("import", "--quiet", root, image)
	defer m.run(nil, "podman", "rmi", "--force", image)
	r.run("DOCKER_HOST=unix://" + socket)
	r.waitConnected(20 * time.Second)

	lines := r.launch("containers", "box", "--watch", "--label", "berth-e2e="+name)
	objects := r.launch("containers", "box", "--watch", "--output", "json", "--label", "berth-e2e="+name)
	// Root without every capability, as in CI's containers, cannot raise the limits that podman sets by itself.
	podman("run", "--detach", "--network=none", "--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024", "--name", name, "--label", "berth-e2e="+name, "--label", "evil="+evil, image, "sleep", "1000")
	defer m.run(nil, "podman", "rm", "--force", "--time", "0", name)
	lines.wait(" + "+name+"  ", 30*time.Second)
	objects.wait(`"evil":"x\u001b[2J\nsecond"`, 30*time.Second)
	if out := r.berth("containers", "box"); !strings.Contains(out, name) || strings.Contains(out, "\x1b") {
		t.Errorf("berth containers:\n%s", out)
	}

	in := func(args ...string) (string, int) {
		t.Helper()
		cmd := r.client(append([]string{"ssh", "box", "--container", name}, args...)...)
		var errOut bytes.Buffer
		cmd.Stderr = &errOut
		out, _ := cmd.Output()
		return string(out) + errOut.String(), cmd.ProcessState.ExitCode()
	}
	if out, code := in("--", "cat /etc/berth-e2e; exit 7"); out != "inside\n" || code != 7 {
		t.Errorf("a command in the container: exit %d, %q", code, out)
	}
	if out, code := in("--user", "guest", "id", "-un"); out != "guest\n" || code != 0 {
		t.Errorf("as another user: exit %d, %q", code, out)
	}
	var listed struct {
		Containers []struct{ Name, Engine string }
	}
	if err := json.Unmarshal([]byte(r.berth("containers", "box", "--output", "json", "--label", "berth-e2e="+name)), &listed); err != nil || len(listed.Containers) != 1 {
		t.Fatalf("the container is listed as %+v: %v", listed, err)
	}
	engine := listed.Containers[0].Engine
	shell := r.terminal("ssh", "box", "--container", name)
	fmt.Fprintln(shell.in, "stty size; cat /etc/berth-e2e; tty")
	waitFor(t, shell, "/dev/pts/")
	if out, code := in("--container", engine+"/"+name, "cat", "/etc/berth-e2e"); out != "inside\n" || code != 0 {
		t.Errorf("by its engine and name: exit %d, %q", code, out)
	}
	if out, code := in("--container", "no-such", "true"); code != 229 || !strings.Contains(out, `cannot find container "no-such"`) {
		t.Errorf("a container that is not there: exit %d, %q", code, out)
	}
	podman("stop", "--time", "0", name)
	lines.wait(" ~ "+name+"  ", 30*time.Second)
	if out, code := in("true"); code != 229 || !regexp.MustCompile(`does not run, its state is "exited`).MatchString(out) {
		t.Errorf("a container that was stopped: exit %d, %q", code, out)
	}
	podman("rm", name)
	lines.wait(" - "+name+"  ", 30*time.Second)
}

// busyboxRoot packs the root of an image, for no registry can be reached.
func (m *machine) busyboxRoot() string {
	m.t.Helper()
	busybox := strings.TrimSpace(m.must("sh", "-c", "command -v busybox"))
	dir := filepath.Join(m.home, "root")
	for _, d := range []string{"bin", "etc", "proc", "dev", "tmp", "root"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			m.t.Fatal(err)
		}
	}
	m.must("cp", busybox, filepath.Join(dir, "bin", "busybox"))
	for _, applet := range []string{"sh", "cat", "id", "sleep", "stty", "true", "tty"} {
		if err := os.Symlink("busybox", filepath.Join(dir, "bin", applet)); err != nil {
			m.t.Fatal(err)
		}
	}
	for name, text := range map[string]string{"passwd": "root:x:0:0::/root:/bin/sh\nguest:x:1000:1000::/tmp:/bin/sh\n", "group": "root:x:0:\nguest:x:1000:\n", "berth-e2e": "inside\n"} {
		if err := os.WriteFile(filepath.Join(dir, "etc", name), []byte(text), 0o644); err != nil {
			m.t.Fatal(err)
		}
	}
	archive := filepath.Join(m.home, "root.tar")
	m.must("tar", "-C", dir, "-cf", archive, ".")
	return archive
}
