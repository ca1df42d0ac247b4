package e2e

import (
	"debug/elf"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
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
	if _, said, code := e.run(nil, "docker", "-H", e.socket, "run", "--rm", "--network", "none", "berthd", "run", "--log-level", "loud"); code != 64 {
		t.Errorf("a wrong setting ends the container with %d: %s", code, said)
	}
}

// exampleOptions turns the example for Docker Compose into what docker run does the same by, with this road's server and token.
func (r *road) exampleOptions() []string {
	r.t.Helper()
	var example struct {
		Services map[string]struct {
			Environment      map[string]string
			Secrets, Volumes []string
		}
		Secrets map[string]struct{ File string }
		Volumes map[string]any
	}
	readYAML(r.t, "../deploy/docker/compose.yaml", &example)
	workspace, ok := example.Services["workspace"]
	if !ok || workspace.Environment["BERTH_URL"] == "" {
		r.t.Fatalf("the example has no workspace with a URL: %+v", example)
	}
	workspace.Environment["BERTH_URL"] = r.url()
	var options []string
	for name, value := range workspace.Environment {
		options = append(options, "--env", name+"="+value)
	}
	for _, name := range workspace.Secrets {
		file := filepath.Join(r.home, filepath.Base(example.Secrets[name].File))
		if err := os.WriteFile(file, []byte(r.token+"\n"), 0o600); err != nil {
			r.t.Fatal(err)
		}
		options = append(options, "--volume", file+":/run/secrets/"+name+":ro")
	}
	for _, volume := range workspace.Volumes {
		name, _, _ := strings.Cut(volume, ":")
		if _, ok := example.Volumes[name]; !ok {
			r.t.Errorf("the example mounts %s, which is no volume of it", volume)
		}
		options = append(options, "--volume", volume)
	}
	return options
}

func readYAML(t *testing.T, path string, into any) {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := yaml.NewDecoder(file).Decode(into); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
}

// TestKubernetesExample: what the example names is there: settings of berthd, volumes of the pod. No cluster is here to try it in.
func TestKubernetesExample(t *testing.T) {
	type named struct{ Name string }
	var example struct {
		Spec struct {
			Template struct {
				Spec struct {
					Containers []struct {
						Args         []string
						Env          []struct{ Name, Value string }
						VolumeMounts []struct {
							Name string
							Path string `yaml:"mountPath"`
						} `yaml:"volumeMounts"`
					}
					Volumes []named
				}
			}
			VolumeClaimTemplates []struct{ Metadata named } `yaml:"volumeClaimTemplates"`
		}
	}
	readYAML(t, "../deploy/kubernetes/workspace.yaml", &example)
	volumes := map[string]bool{}
	for _, v := range example.Spec.Template.Spec.Volumes {
		volumes[v.Name] = true
	}
	for _, v := range example.Spec.VolumeClaimTemplates {
		volumes[v.Metadata.Name] = true
	}
	help := newMachine(t).must("berthd", "run", "--help")
	containers := example.Spec.Template.Spec.Containers
	if len(containers) != 1 || !slices.Equal(containers[0].Args, []string{"run"}) {
		t.Fatalf("containers: %+v", containers)
	}
	mounted := ""
	for _, m := range containers[0].VolumeMounts {
		if !volumes[m.Name] {
			t.Errorf("%s is mounted, and no volume", m.Name)
		}
		mounted += m.Path + " "
	}
	for _, v := range containers[0].Env {
		if !strings.Contains(help, "$"+v.Name) {
			t.Errorf("berthd has no variable %s", v.Name)
		}
		if v.Name == "BERTH_TOKEN_FILE" && !strings.Contains(mounted, filepath.Dir(v.Value)) {
			t.Errorf("%s is in no volume", v.Value)
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
	if err := os.WriteFile(filepath.Join(r.home, "Dockerfile"), []byte("FROM scratch\nCOPY busybox /bin/busybox\nRUN [\"/bin/busybox\", \"--install\", \"/bin\"]\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	e.build("base", map[string]string{"/bin/busybox": "busybox", filepath.Join(r.home, "Dockerfile"): "Dockerfile"})
	e.build("workspace", map[string]string{"../deploy/docker/Dockerfile": "Dockerfile"}, "--build-arg", "BASE=base")
	// With docker's own ten seconds to stop, not those of the example.
	e.do(slices.Concat([]string{"create", "--name", "box", "--network", "host"}, r.exampleOptions(), []string{"workspace", "run", "--shutdown-timeout", "9s"})...)
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
	for range atLength(1, 10) {
		e.do("exec", "box", "/bin/sh", "-c", "i=0; while [ $i -lt 1000 ]; do (true &); i=$((i+1)); done")
	}
	eventually(t, 20*time.Second, "of a thousand orphans, or ten thousand, none is left", func() bool {
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
