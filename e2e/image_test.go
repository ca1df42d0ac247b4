package e2e

import (
	"debug/elf"
	"os"
	"os/exec"
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

// The Dockerfile packs them from scratch, and the image runs.
func TestImage(t *testing.T) {
	m := newMachine(t)
	context := filepath.Join(m.home, "context")
	if err := os.MkdirAll(filepath.Join(context, "dist"), 0o755); err != nil {
		t.Fatal(err)
	}
	files := map[string]string{"../Dockerfile": "Dockerfile"}
	for _, name := range []string{"berth", "berthd", "berthd-ptyhost"} {
		files[filepath.Join(bin, name)] = "dist/" + name
	}
	for from, to := range files {
		body, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(context, to), body, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	engine := filepath.Join(m.home, "engine")
	socket := "unix://" + filepath.Join(m.home, "docker.sock")
	d := m.start("dockerd", nil, "--host", socket, "--data-root", filepath.Join(engine, "data"), "--exec-root", filepath.Join(engine, "exec"),
		"--pidfile", filepath.Join(m.home, "pid"), "--bridge", "none", "--iptables=false", "--storage-driver", "vfs")
	d.wait("API listen on", time.Minute)
	defer d.stop(os.Interrupt, 30*time.Second)
	for _, name := range []string{"berth", "berthd"} {
		// The classic builder: the newer one comes as a plug-in that Debian's package lacks.
		build := m.command("docker", "-H", socket, "build", "--target", name, "-t", name, context)
		build.Env = m.env("DOCKER_BUILDKIT=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("docker build: %v\n%s", err, out)
		}
		out, err := exec.Command("docker", "-H", socket, "run", "--rm", "--network", "none", name, "version").CombinedOutput()
		if err != nil || !strings.Contains(string(out), name) {
			t.Errorf("%s version in a container: %v\n%s", name, err, out)
		}
	}
}
