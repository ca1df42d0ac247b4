package containers

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/client"

	"github.com/berthd/berth/wire"
)

// realEngine starts an engine of its own for the test, with nothing in it, and ends it with all its containers. dir is what command may use; its
// socket is dir/sock.
func realEngine(t *testing.T, command func(dir string) *exec.Cmd) (*client.Client, string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("this test needs root, to start a container engine")
	}
	dir, err := os.MkdirTemp("", "eng") // socket names are short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	var log bytes.Buffer
	cmd := command(dir)
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatalf("cannot start a container engine (docker.io and podman must be installed): %v", err)
	}
	exited := make(chan struct{})
	go func() { cmd.Wait(); close(exited) }()
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-exited:
		case <-time.After(20 * time.Second):
			cmd.Process.Kill()
			<-exited
			t.Error("the engine did not end by itself")
		}
		if t.Failed() {
			t.Logf("the engine's log:\n%s", &log)
		}
	})
	host := "unix://" + filepath.Join(dir, "sock")
	api, err := client.New(client.WithHost(host))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { api.Close() })
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for start := time.Now(); ; {
		if _, err = api.Ping(t.Context(), client.PingOptions{NegotiateAPIVersion: true}); err == nil {
			break
		}
		select {
		case <-exited:
			t.Fatalf("the engine ended at once:\n%s", &log)
		case <-tick.C:
		}
		if time.Since(start) > 30*time.Second {
			t.Fatalf("the engine does not answer: %v", err)
		}
	}
	t.Cleanup(func() { removeAll(t, api) })
	return api, host
}

// removeAll ends every container, so that the engine can leave without waiting for them.
func removeAll(t *testing.T, api *client.Client) {
	list, err := api.ContainerList(context.Background(), client.ContainerListOptions{All: true})
	if err != nil {
		t.Error(err)
	}
	for _, c := range list.Items {
		if _, err := api.ContainerRemove(context.Background(), c.ID, client.ContainerRemoveOptions{Force: true}); err != nil {
			t.Error(err)
		}
	}
}

func docker(dir string) *exec.Cmd {
	return exec.Command("dockerd", "--host", "unix://"+filepath.Join(dir, "sock"), "--data-root", filepath.Join(dir, "data"),
		"--exec-root", filepath.Join(dir, "exec"), "--pidfile", filepath.Join(dir, "pid"),
		"--bridge", "none", "--iptables=false", "--ip6tables=false", "--storage-driver", "vfs")
}

func podman(dir string) *exec.Cmd {
	return exec.Command("podman", "--root", filepath.Join(dir, "root"), "--runroot", filepath.Join(dir, "run"), "--storage-driver", "vfs",
		"--cgroup-manager", "cgroupfs", "--events-backend", "none", "system", "service", "--time", "0", "unix://"+filepath.Join(dir, "sock"))
}

// busybox imports an image of one program; no registry is asked.
func busybox(t *testing.T, api *client.Client) {
	t.Helper()
	program, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatalf("cannot make an image (busybox-static must be installed): %v", err)
	}
	var image bytes.Buffer
	w := tar.NewWriter(&image)
	if err := w.WriteHeader(&tar.Header{Name: "busybox", Mode: 0o755, Size: int64(len(program))}); err != nil {
		t.Fatal(err)
	}
	w.Write(program)
	w.Close()
	out, err := api.ImageImport(t.Context(), client.ImageImportSource{Source: &image, SourceName: "-"}, "localhost/busybox:test", client.ImageImportOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if text, err := io.ReadAll(out); err != nil || strings.Contains(string(text), `"error"`) {
		t.Fatalf("cannot import an image: %v: %s", err, text)
	}
}

func TestRealEngine(t *testing.T) {
	for name, command := range map[string]func(string) *exec.Cmd{"docker": docker, "podman": podman} {
		t.Run(name, func(t *testing.T) { testEngine(t, name, command) })
	}
}

func testEngine(t *testing.T, name string, command func(dir string) *exec.Cmd) {
	api, host := realEngine(t, command)
	l := lister(engine{name: name, host: host})
	if got := list(t, l); len(got.Containers) != 0 || len(got.Warnings) != 0 {
		t.Fatalf("an empty engine: %+v", got)
	}
	busybox(t, api)
	volume := t.TempDir()
	hostile := map[string]string{"a b\n": "x=\x1b[31mred\n<b>", "devcontainer.local_folder": "/w"}
	create := func(name string, args ...string) string {
		t.Helper()
		made, err := api.ContainerCreate(t.Context(), client.ContainerCreateOptions{
			Name:   name,
			Config: &container.Config{Image: "localhost/busybox:test", Cmd: append([]string{"/busybox"}, args...), Labels: hostile},
			HostConfig: &container.HostConfig{
				NetworkMode: "none",
				// The engine's own defaults are more than a machine may allow.
				Resources: container.Resources{Ulimits: []*container.Ulimit{{Name: "nofile", Soft: 1024, Hard: 1024}, {Name: "nproc", Soft: 1024, Hard: 1024}}},
				Mounts:    []mount.Mount{{Type: mount.TypeBind, Source: volume, Target: "/data"}},
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		return made.ID
	}
	start := func(id string) {
		t.Helper()
		if _, err := api.ContainerStart(t.Context(), id, client.ContainerStartOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	end := func(id string) {
		t.Helper()
		wait := api.ContainerWait(t.Context(), id, client.ContainerWaitOptions{Condition: container.WaitConditionNotRunning})
		select {
		case <-wait.Result:
		case err := <-wait.Error:
			t.Fatal(err)
		}
	}
	ids := map[string]string{
		"up":    create("up", "sleep", "1000"),
		"good":  create("good", "true"),
		"bad":   create("bad", "sh", "-c", "exit 3"),
		"never": create("never", "true"),
	}
	for _, n := range []string{"up", "good", "bad"} {
		start(ids[n])
	}
	end(ids["good"])
	end(ids["bad"])

	want := func(n string, running bool, status string) wire.Container {
		return wire.Container{
			ID: ids[n], Name: n, Image: "localhost/busybox:test", Labels: hostile, Running: running, Status: status,
			Ports: []wire.ContainerPort{}, Volumes: map[string]string{volume: "/data"}, Engine: name,
		}
	}
	got := list(t, l)
	for _, c := range got.Containers {
		if age := time.Since(c.CreatedAt); age < -time.Minute || age > time.Minute {
			t.Errorf("%s was created %v ago", c.Name, age)
		}
	}
	if diff := cmp.Diff([]wire.Container{
		want("bad", false, "exited with code 3"), want("good", false, "exited successfully"),
		want("never", false, "created"), want("up", true, "running"),
	}, got.Containers, cmpopts.SortSlices(func(a, b wire.Container) bool { return a.Name < b.Name }),
		cmpopts.IgnoreFields(wire.Container{}, "CreatedAt")); diff != "" {
		t.Error(diff)
	}
	if len(got.Warnings) != 0 {
		t.Errorf("warnings %q", got.Warnings)
	}
}

// An engine that hangs costs a warning and not the list.
func TestHungEngine(t *testing.T) {
	api, good := realEngine(t, podman)
	busybox(t, api)
	if _, err := api.ContainerCreate(t.Context(), client.ContainerCreateOptions{
		Name: "here", Config: &container.Config{Image: "localhost/busybox:test", Cmd: []string{"/busybox"}},
	}); err != nil {
		t.Fatal(err)
	}
	hung := silentSocket(t)
	l := lister(engine{name: "hung", host: hung}, engine{name: "well", host: good})
	l.timeout = 2 * time.Second
	got := list(t, l)
	want := []string{fmt.Sprintf("cannot list the containers of hung at %s: it did not answer within 2s", hung)}
	if diff := cmp.Diff(want, got.Warnings); diff != "" {
		t.Error(diff)
	}
	if len(got.Containers) != 1 || got.Containers[0].Name != "here" {
		t.Errorf("got %+v", got.Containers)
	}
}
