package containers

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/client"

	"github.com/berthd/berth/internal/enginelab"
	"github.com/berthd/berth/wire"
)

// lab holds the engines that this package's tests share: starting one takes seconds.
var lab struct {
	sync.Mutex
	engines map[string]*enginelab.Engine
}

// shared returns an engine that other tests use too. What it holds is removed after the test.
func shared(t *testing.T, kind string) *enginelab.Engine {
	t.Helper()
	lab.Lock()
	defer lab.Unlock()
	e := lab.engines[kind]
	if e == nil {
		var err error
		if e, err = enginelab.Start(kind); err != nil {
			t.Fatal(err)
		}
		if lab.engines == nil {
			lab.engines = make(map[string]*enginelab.Engine)
		}
		lab.engines[kind] = e
	}
	t.Cleanup(func() {
		if err := e.RemoveAll(); err != nil {
			t.Error(err)
		}
	})
	return e
}

// closeLab ends the engines.
func closeLab() error {
	lab.Lock()
	defer lab.Unlock()
	for kind, e := range lab.engines {
		if err := e.Stop(); err != nil {
			return fmt.Errorf("%s: %w", kind, err)
		}
	}
	return nil
}

// onEach runs a test on both kinds of engine.
func onEach(t *testing.T, test func(t *testing.T, e *enginelab.Engine)) {
	for _, kind := range enginelab.Kinds {
		t.Run(kind, func(t *testing.T) { test(t, shared(t, kind)) })
	}
}

// of is the engine as the package finds it.
func of(e *enginelab.Engine) engine { return engine{name: e.Kind, host: e.Host} }

// create makes a container.
func create(t *testing.T, e *enginelab.Engine, spec client.ContainerCreateOptions) string {
	t.Helper()
	id, err := e.Create(spec)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// up makes a container and starts it.
func up(t *testing.T, e *enginelab.Engine, spec client.ContainerCreateOptions) string {
	t.Helper()
	id, err := e.Run(spec)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func TestRealEngine(t *testing.T) { onEach(t, testEngine) }

func testEngine(t *testing.T, e *enginelab.Engine) {
	l := run(t, lister(of(e)))
	if got := list(t, l); len(got.Containers) != 0 || len(got.Warnings) != 0 {
		t.Fatalf("an empty engine: %+v", got)
	}
	volume := t.TempDir()
	hostile := map[string]string{"a b\n": "x=\x1b[31mred\n<b>", "devcontainer.local_folder": "/w"}
	spec := func(name string, argv ...string) client.ContainerCreateOptions {
		s := enginelab.Spec(name, argv...)
		s.Config.Labels = hostile
		s.HostConfig.Mounts = []mount.Mount{{Type: mount.TypeBind, Source: volume, Target: "/data"}}
		return s
	}
	ids := map[string]string{
		"up":    up(t, e, spec("up", "sleep", "1000")),
		"good":  up(t, e, spec("good", "true")),
		"bad":   up(t, e, spec("bad", "sh", "-c", "exit 3")),
		"never": create(t, e, spec("never", "true")),
	}
	want := func(n string, running bool, status string) wire.Container {
		mode := ""
		if running {
			mode = "none"
		}
		return wire.Container{
			ID: ids[n], Name: n, Image: enginelab.Image, Labels: hostile, Running: running, Status: status,
			Ports: []wire.ContainerPort{}, Volumes: map[string]string{volume: "/data"}, Engine: e.Kind, NetworkMode: mode,
		}
	}
	var got wire.Containers
	eventually(t, "all is told of", func() bool {
		got = list(t, l)
		stopped := 0
		for _, c := range got.Containers {
			if !c.Running {
				stopped++
			}
		}
		return len(got.Containers) == 4 && stopped == 3
	})
	for _, c := range got.Containers {
		if age := time.Since(c.CreatedAt); age < -time.Minute || age > time.Minute {
			t.Errorf("%s was created %v ago", c.Name, age)
		}
		if (c.PID > 0) != c.Running {
			t.Errorf("%s (%s) has the process id %d", c.Name, c.Status, c.PID)
		}
	}
	if diff := cmp.Diff([]wire.Container{
		want("bad", false, "exited with code 3"), want("good", false, "exited successfully"),
		want("never", false, "created"), want("up", true, "running"),
	}, got.Containers, cmpopts.IgnoreFields(wire.Container{}, "CreatedAt", "PID")); diff != "" {
		t.Error(diff)
	}
	if len(got.Warnings) != 0 {
		t.Errorf("warnings %q", got.Warnings)
	}
}

// An engine that hangs costs a warning and not the list.
func TestHungEngine(t *testing.T) {
	e := shared(t, enginelab.Podman)
	create(t, e, client.ContainerCreateOptions{Name: "here", Config: &container.Config{Image: enginelab.Image, Cmd: []string{"/busybox"}}})
	hung := silentSocket(t)
	l := lister(engine{name: "hung", host: hung}, of(e))
	l.timeout = 2 * time.Second
	got := list(t, run(t, l))
	want := []string{fmt.Sprintf("cannot list the containers of hung at %s: it did not answer within 2s", hung)}
	if diff := cmp.Diff(want, got.Warnings); diff != "" {
		t.Error(diff)
	}
	if len(got.Containers) != 1 || got.Containers[0].Name != "here" {
		t.Errorf("got %+v", got.Containers)
	}
}
