package e2e

import (
	"debug/elf"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// The programs are static: they need no loader and no library of the machine they are copied to.
func TestStatic(t *testing.T) {
	for _, name := range []string{"berth", "berthd", "berthd-ptyhost"} {
		f, err := elf.Open(filepath.Join(bin, name))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for _, p := range f.Progs {
			if p.Type == elf.PT_INTERP {
				t.Errorf("%s asks for a loader", name)
			}
		}
	}
}

// docker is an engine of the test's own with the image that the Dockerfile packs.
type docker struct {
	*machine
	socket string
}

// startDocker starts the engine and builds the Dockerfile's targets.
func startDocker(m *machine, targets ...string) docker {
	m.t.Helper()
	e := docker{m, "unix://" + filepath.Join(m.home, "docker.sock")}
	engine := filepath.Join(m.home, "engine")
	d := m.start("dockerd", nil, "--host", e.socket, "--data-root", filepath.Join(engine, "data"), "--exec-root", filepath.Join(engine, "exec"),
		"--pidfile", filepath.Join(m.home, "pid"), "--bridge", "none", "--iptables=false", "--storage-driver", "vfs")
	d.wait("API listen on", time.Minute)
	m.t.Cleanup(func() { d.stop(os.Interrupt, 30*time.Second) })
	files := map[string]string{"../Dockerfile": "Dockerfile"}
	for _, name := range []string{"berth", "berthd", "berthd-ptyhost"} {
		files[filepath.Join(bin, name)] = "dist/" + name
	}
	for _, name := range targets {
		e.build(name, files, "--target", name)
	}
	return e
}

// build builds an image of files.
func (e docker) build(name string, files map[string]string, args ...string) {
	e.t.Helper()
	context := filepath.Join(e.home, "context-"+name)
	for from, to := range files {
		body, err := os.ReadFile(from)
		if err != nil {
			e.t.Fatal(err)
		}
		if err := os.MkdirAll(filepath.Dir(filepath.Join(context, to)), 0o755); err != nil {
			e.t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(context, to), body, 0o755); err != nil {
			e.t.Fatal(err)
		}
	}
	// The classic builder: the newer one comes as a plug-in that Debian's package lacks.
	build := e.command("docker", append(append([]string{"-H", e.socket, "build", "--network", "none", "-t", name}, args...), context)...)
	build.Env = e.env("DOCKER_BUILDKIT=0")
	if out, err := build.CombinedOutput(); err != nil {
		e.t.Fatalf("docker build: %v\n%s", err, out)
	}
}

// do runs docker, which must succeed.
func (e docker) do(args ...string) string {
	e.t.Helper()
	return strings.TrimSpace(e.must("docker", append([]string{"-H", e.socket}, args...)...))
}

// logs is what a container's program said on standard error.
func (e docker) logs(name string) string {
	_, text, _ := e.run(nil, "docker", "-H", e.socket, "logs", name)
	return text
}

// The Dockerfile packs them from scratch, and the image runs.
func TestImage(t *testing.T) {
	e := startDocker(newMachine(t), "berth", "berthd")
	for _, name := range []string{"berth", "berthd"} {
		if out := e.do("run", "--rm", "--network", "none", name, "version"); !strings.Contains(out, name) {
			t.Errorf("%s version in a container: %s", name, out)
		}
	}
}

// TestContainerStop: berthd is process 1 of a container. Stop scripts run within what `docker stop` grants, whether the server is there or not, and what
// they said arrives, if need be after the next start.
func TestContainerStop(t *testing.T) {
	r := newRoad(t, `
agents:
  - name: box
    scripts:
      - display_name: begin
        run_on_start: true
        script: i=0; while [ $i -lt 50 ]; do (sleep 0.1 &); i=$((i+1)); done; echo begun
      - display_name: end
        run_on_stop: true
        script: sleep 1; echo "ended with a token of ${#CODER_AGENT_TOKEN} letters"
`)
	e := startDocker(r.machine, "berthd")
	if err := os.WriteFile(filepath.Join(r.home, "Dockerfile"), []byte("FROM berthd\nCOPY busybox /bin/busybox\nRUN [\"/bin/busybox\", \"--install\", \"/bin\"]\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	e.build("workspace", map[string]string{"/bin/busybox": "busybox", filepath.Join(r.home, "Dockerfile"): "Dockerfile"})
	if err := os.Mkdir(filepath.Join(r.home, "state"), 0o700); err != nil {
		t.Fatal(err)
	}
	e.do("create", "--name", "box", "--network", "host", "--volume", filepath.Join(r.home, "state")+":/var/lib/berthd",
		"--env", "BERTH_URL="+r.url(), "--env", "BERTH_TOKEN="+r.token, "workspace", "run", "--shutdown-timeout", "9s")
	defer func() {
		if t.Failed() {
			t.Log(e.logs("box"))
		}
		e.do("rm", "--force", "box")
	}()
	said := func(what string, times int) {
		t.Helper()
		eventually(t, 20*time.Second, fmt.Sprintf("%q is in the log %d times", what, times), func() bool {
			return strings.Count(r.berth("logs", "box"), what) == times
		})
	}
	ended := fmt.Sprintf("ended with a token of %d letters", len(r.token))
	stop := func() {
		t.Helper()
		e.do("stop", "box") // with Docker's own ten seconds
		if code := e.do("inspect", "--format", "{{.State.ExitCode}}", "box"); code != "0" {
			t.Errorf("docker stop: exit code %s", code)
		}
	}

	e.do("start", "box")
	said("begun", 1)
	eventually(t, 10*time.Second, "no orphan is left unwaited for", func() bool {
		return !strings.Contains(e.do("exec", "box", "/bin/ps", "-o", "stat,comm"), "Z")
	})
	stop()
	said(ended, 1)
	if got := r.status(); !strings.Contains(got, "off") {
		t.Errorf("the workspace is not off:\n%s", got)
	}

	// The server goes while it runs.
	e.do("start", "box")
	said("begun", 2)
	r.server.kill()
	stop()
	r.serve()
	e.do("start", "box")
	said(ended, 2)
	said("begun", 3)

	// SIGHUP starts berthd again and nothing else; a killed berthd ends the container with 128 and the signal.
	e.do("kill", "--signal", "HUP", "box")
	eventually(t, 20*time.Second, "berthd is started again", func() bool { return strings.Count(e.logs("box"), "berthd starts") == 4 })
	said("begun", 3)
	// The command may end with the container.
	e.run(nil, "docker", "-H", e.socket, "exec", "box", "/bin/sh", "-c",
		`for p in /proc/[0-9]*; do [ "$(cut -d' ' -f4 $p/stat)" = 1 ] && grep -q shutdown-timeout $p/cmdline && kill -KILL ${p#/proc/}; done; true`)
	if code := e.do("wait", "box"); code != "137" {
		t.Errorf("a killed berthd: exit code %s", code)
	}
}
