package containers

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	"github.com/berthd/berth/internal/enginelab"
	"github.com/berthd/berth/wire"
)

// named returns the container of a name, nil if there is none.
func named(list wire.Containers, name string) *wire.Container {
	for i := range list.Containers {
		if list.Containers[i].Name == name {
			return &list.Containers[i]
		}
	}
	return nil
}

// follow waits until the list, looked at only when told of a change, is as wanted.
func follow(t *testing.T, l *Lister, changed <-chan struct{}, what string, ok func(wire.Containers) bool) {
	t.Helper()
	limit := time.After(30 * time.Second)
	for {
		got := list(t, l)
		if ok(got) {
			return
		}
		select {
		case <-changed:
		case <-limit:
			t.Fatalf("not told of it: %s; the list is %+v", what, got)
		}
	}
}

// Every change shows by the engine's events: nothing asks for the list in between.
func TestEvents(t *testing.T) { onEach(t, testEvents) }

func testEvents(t *testing.T, e *enginelab.Engine) {
	l := run(t, lister(of(e)))
	changed, stop := l.Watch()
	defer stop()
	see := func(what string, ok func(c *wire.Container) bool) {
		t.Helper()
		follow(t, l, changed, what, func(list wire.Containers) bool { return ok(named(list, "web")) })
	}
	see("none yet", func(c *wire.Container) bool { return c == nil })
	ctx := t.Context()
	spec := enginelab.Spec("web", "sh", "-c", "trap 'exit 5' TERM; while :; do sleep 0.05; done")
	spec.Config.Labels = map[string]string{"com.docker.compose.project": "shop", "com.docker.compose.service": "front"}
	id := create(t, e, spec)
	see("created", func(c *wire.Container) bool {
		return c != nil && c.Status == "created" && !c.Running && c.PID == 0 && c.ComposeProject == "shop" && c.ComposeService == "front"
	})
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(e.API.ContainerStart(ctx, id, client.ContainerStartOptions{}))
	see("started", func(c *wire.Container) bool {
		return c != nil && c.Running && c.Status == "running" && c.NetworkMode == "none" && c.PID > 0
	})
	if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", named(list(t, l), "web").PID)); err != nil || !strings.HasSuffix(exe, "/busybox") {
		t.Errorf("its process is %q, %v", exe, err)
	}
	must(e.API.ContainerPause(ctx, id, client.ContainerPauseOptions{}))
	see("paused", func(c *wire.Container) bool { return c.Running && c.Status == "paused" })
	must(e.API.ContainerUnpause(ctx, id, client.ContainerUnpauseOptions{}))
	see("goes on", func(c *wire.Container) bool { return c.Status == "running" })
	must(e.API.ContainerRename(ctx, id, client.ContainerRenameOptions{NewName: "shop"}))
	follow(t, l, changed, "renamed", func(list wire.Containers) bool { return named(list, "web") == nil && named(list, "shop") != nil })
	must(e.API.ContainerRename(ctx, id, client.ContainerRenameOptions{NewName: "web"}))
	must(e.API.ContainerStop(ctx, id, client.ContainerStopOptions{}))
	see("stopped", func(c *wire.Container) bool {
		return c != nil && !c.Running && strings.HasPrefix(c.Status, "exited with code ") && c.PID == 0
	})
	must(e.API.ContainerRemove(ctx, id, client.ContainerRemoveOptions{}))
	see("removed", func(c *wire.Container) bool { return c == nil })
}

// Only Docker checks the health of containers by itself; Podman leaves that to systemd.
func TestHealth(t *testing.T) {
	e := shared(t, enginelab.Docker)
	l := run(t, lister(of(e)))
	changed, stop := l.Watch()
	defer stop()
	spec := enginelab.Spec("checked", "sleep", "1000")
	spec.Config.Healthcheck = &container.HealthConfig{Test: []string{"CMD", "/busybox", "test", "-e", "/tmp/well"}, Interval: 200 * time.Millisecond, Retries: 1}
	id := up(t, e, spec)
	sees := func(health string) {
		t.Helper()
		follow(t, l, changed, health, func(list wire.Containers) bool {
			c := named(list, "checked")
			return c != nil && c.Health == health
		})
	}
	sees("unhealthy")
	p, err := Start(t.Context(), e.Host, id, Command{Line: "touch /tmp/well"})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	sees("healthy")
}

// Many containers with labels that mean harm: each is in the list, letter for letter. In the long test they run.
func TestMany(t *testing.T) {
	onEach(t, func(t *testing.T, e *enginelab.Engine) {
		count, begin := 20, create
		if os.Getenv("BERTH_LONG") != "" {
			count, begin = 200, up
		}
		l := run(t, lister(of(e)))
		changed, stop := l.Watch()
		defer stop()
		list(t, l)
		want := map[string]map[string]string{}
		for i := range count {
			spec := enginelab.Spec(fmt.Sprintf("c.%03d_%s", i, strings.Repeat("x", i%50)), "sleep", "10000")
			spec.Config.Image = enginelab.ShelllessImage
			spec.Config.Labels = map[string]string{
				"nr": fmt.Sprint(i), "bell": "\a\x1b]0;owned\a", "\x1b[2J": "\r\n\t", "html": "<script>alert(1)</script>", "bidi": "\u202egnp.exe",
				"long": strings.Repeat("y", 4000), "devcontainer.metadata": "[not json", "com.docker.compose.project": "p\n\x1b[31m",
			}
			begin(t, e, spec)
			want[spec.Name] = spec.Config.Labels
		}
		follow(t, l, changed, "all are made", func(list wire.Containers) bool { return len(list.Containers) == count })
		got := map[string]map[string]string{}
		for _, c := range list(t, l).Containers {
			got[c.Name] = maps.Collect(maps.All(c.Labels))
			for label := range c.Labels {
				if _, ours := want[c.Name][label]; !ours { // Podman adds what it knows of the image
					delete(got[c.Name], label)
				}
			}
			if c.ComposeProject != "p\n\x1b[31m" {
				t.Errorf("project %q", c.ComposeProject)
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	})
}

// An engine that stops is told of, and one that comes back too, with all it has.
func TestRestart(t *testing.T) { onEach(t, testRestart) }

func testRestart(t *testing.T, e *enginelab.Engine) {
	create(t, e, enginelab.Spec("kept", "true"))
	l := run(t, lister(of(e)))
	changed, stop := l.Watch()
	defer stop()
	follow(t, l, changed, "it is there", func(list wire.Containers) bool { return named(list, "kept") != nil })
	if err := e.Halt(); err != nil {
		t.Fatal(err)
	}
	follow(t, l, changed, "the engine stopped", func(list wire.Containers) bool {
		return len(list.Containers) == 0 && len(list.Warnings) == 1 && strings.Contains(list.Warnings[0], "nothing listens there")
	})
	if err := e.Restart(); err != nil {
		t.Fatal(err)
	}
	follow(t, l, changed, "the engine is back", func(list wire.Containers) bool { return named(list, "kept") != nil && len(list.Warnings) == 0 })
	create(t, e, enginelab.Spec("new", "true"))
	follow(t, l, changed, "events go on", func(list wire.Containers) bool { return named(list, "new") != nil })
}

// An engine that freezes says nothing at all. What it had is shown with a warning, and it is not in the way of others.
func TestFrozen(t *testing.T) {
	frozen, well := shared(t, enginelab.Docker), shared(t, enginelab.Podman)
	create(t, frozen, enginelab.Spec("iced", "true"))
	create(t, well, enginelab.Spec("fine", "true"))
	l := lister(of(frozen), of(well))
	l.timeout, l.heartbeat = 2*time.Second, 100*time.Millisecond
	run(t, l)
	changed, stop := l.Watch()
	defer stop()
	follow(t, l, changed, "both are there", func(list wire.Containers) bool { return named(list, "iced") != nil && named(list, "fine") != nil })
	if err := frozen.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	thawed := false
	thaw := func() {
		if !thawed {
			thawed = true
			if err := frozen.Signal(syscall.SIGCONT); err != nil {
				t.Error(err)
			}
		}
	}
	defer thaw()
	follow(t, l, changed, "it is frozen", func(list wire.Containers) bool {
		return len(list.Warnings) == 1 && strings.Contains(list.Warnings[0], "did not answer within 2s; they are shown as they were at ")
	})
	create(t, well, enginelab.Spec("meanwhile", "true"))
	follow(t, l, changed, "the other goes on", func(list wire.Containers) bool {
		return named(list, "meanwhile") != nil && named(list, "iced") != nil && len(list.Warnings) == 1
	})
	if got, ok := l.Known(); !ok || named(wire.Containers{Containers: got}, "iced") == nil {
		t.Errorf("%v are known, %v", got, ok)
	}
	// Who asks anew waits for it no longer than it may take to answer, and has the other's.
	other := lister(of(frozen), of(well))
	other.timeout = 3 * time.Second
	if got := list(t, run(t, other)); len(got.Warnings) != 1 || named(got, "fine") == nil {
		t.Errorf("got %+v", got)
	}
	thaw()
	create(t, frozen, enginelab.Spec("thawed", "true"))
	follow(t, l, changed, "it is back", func(list wire.Containers) bool { return named(list, "thawed") != nil && len(list.Warnings) == 0 })
}

// An engine that appears while somebody watches is found, and one whose socket goes is no longer spoken of.
func TestEngineAppears(t *testing.T) {
	e := shared(t, enginelab.Podman)
	create(t, e, enginelab.Spec("found", "true"))
	dir := t.TempDir()
	l := lister()
	l.find = surroundings{getenv: func(string) string { return "" }, home: dir, run: []string{dir}}.engines
	l.rescan = 20 * time.Millisecond
	run(t, l)
	changed, stop := l.Watch()
	defer stop()
	if got := list(t, l); len(got.Engines) != 0 {
		t.Fatalf("got %+v", got)
	}
	socket := filepath.Join(dir, "docker.sock")
	if err := os.Symlink(strings.TrimPrefix(e.Host, "unix://"), socket); err != nil {
		t.Fatal(err)
	}
	follow(t, l, changed, "it came", func(list wire.Containers) bool { return named(list, "found") != nil })
	if got := list(t, l).Engines; !slices.Equal(got, []string{"docker"}) {
		t.Errorf("engines %q", got)
	}
	if err := os.Remove(socket); err != nil {
		t.Fatal(err)
	}
	follow(t, l, changed, "it went", func(list wire.Containers) bool { return len(list.Engines) == 0 && len(list.Containers) == 0 })
}

// Nobody asks: nobody is asked. Somebody asks again: the answer is the engine's of now.
func TestLinger(t *testing.T) {
	e := shared(t, enginelab.Podman)
	l := lister(of(e))
	l.linger, l.rescan = 50*time.Millisecond, 20*time.Millisecond
	run(t, l)
	following := func() int {
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.followers)
	}
	if got, ok := l.Known(); ok || following() != 0 {
		t.Errorf("%v are known though nobody asked; %d engines are followed", got, following())
	}
	list(t, l)
	eventually(t, "the engine is let go", func() bool { return following() == 0 })
	create(t, e, enginelab.Spec("later", "true"))
	if got, ok := l.Known(); ok || following() != 0 {
		t.Errorf("%v are known though the engine was let go; %d engines are followed", got, following())
	}
	if named(list(t, l), "later") == nil {
		t.Error("the list is an old one")
	}
	_, stop := l.Watch()
	eventually(t, "they are known while one watches", func() bool {
		got, ok := l.Known()
		return ok && named(wire.Containers{Containers: got}, "later") != nil
	})
	stop()
	eventually(t, "it is followed no longer", func() bool { return following() == 0 })
}

func TestStopped(t *testing.T) {
	l := lister(engine{name: "docker", host: silentSocket(t)})
	ctx, cancel := context.WithCancel(t.Context())
	asked := make(chan error, 1)
	ran := make(chan error, 1)
	go func() { ran <- l.Run(ctx) }()
	go func() {
		_, err := l.List(t.Context())
		asked <- err
	}()
	eventually(t, "it is asked", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.followers) > 0
	})
	if got, ok := l.Known(); ok {
		t.Errorf("%v are known of an engine that has not answered", got)
	}
	cancel()
	if err := <-asked; err != ErrStopped {
		t.Errorf("who waited got %v", err)
	}
	if err := <-ran; err != nil {
		t.Error(err)
	}
	if _, err := l.List(t.Context()); err != ErrStopped {
		t.Errorf("who asks late gets %v", err)
	}
}

func TestFind(t *testing.T) {
	docker, podman := shared(t, enginelab.Docker), shared(t, enginelab.Podman)
	l := run(t, lister(of(docker), of(podman)))
	both := create(t, docker, enginelab.Spec("both", "true"))
	create(t, podman, enginelab.Spec("both", "true"))
	create(t, docker, enginelab.Spec("mostly", "true"))
	running := up(t, podman, enginelab.Spec("mostly", "sleep", "1000"))
	eventually(t, "all are listed", func() bool { return len(list(t, l).Containers) == 4 && named(list(t, l), "mostly") != nil })
	for name, want := range map[string]string{
		"docker/both": both, both: both, both[:12]: both, "mostly": running,
	} {
		if c, host, err := l.Find(t.Context(), name); err != nil || c.ID != want || host == "" {
			t.Errorf("%s is %q at %q, %v", name, c.ID, host, err)
		}
	}
	for name, want := range map[string]string{
		"both": `cannot tell which container "both" is: it may be "docker/both" or "podman/both"`,
		"none": `cannot find container "none": no engine knows it`,
		"":     `cannot find container "": no engine knows it`, both[:3]: "no engine knows it", "\x1b[2J": `"\x1b[2J"`,
	} {
		if _, _, err := l.Find(t.Context(), name); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", name, err)
		}
	}
	if _, _, err := run(t, lister()).Find(t.Context(), "web"); err == nil || !strings.Contains(err.Error(), "there is no container engine here") {
		t.Errorf("without an engine: %v", err)
	}
}
