package agent

import (
	"context"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"

	"github.com/berthd/berth/containers"
	"github.com/berthd/berth/internal/enginelab"
	"github.com/berthd/berth/ports"
	"github.com/berthd/berth/wire"
)

// envNamespace tells this test that it is in a network namespace of its own.
const envNamespace = "BERTH_AGENT_TEST_NAMESPACE"

// TestPortsOfContainers: ports in a container, published or not, and of one on the host's network have its name. A real engine has a bridge for it, so all
// of this is in a network namespace.
func TestPortsOfContainers(t *testing.T) {
	if os.Getenv(envNamespace) == "" {
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestPortsOfContainers$", "-test.v")
		cmd.Env = append(os.Environ(), envNamespace+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v (it needs root):\n%s", err, out)
		}
		return
	}
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		t.Fatalf("%v (install iproute2): %s", err, out)
	}
	engine, err := enginelab.Start(enginelab.BridgedDocker)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := engine.Stop(); err != nil {
			t.Error(err)
		}
	})
	run := func(name, mode, port string, change func(*client.ContainerCreateOptions)) string {
		t.Helper()
		spec := enginelab.Spec(name, "httpd", "-f", "-p", port)
		spec.HostConfig.NetworkMode = container.NetworkMode(mode)
		if change != nil {
			change(&spec)
		}
		id, err := engine.Run(spec)
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	alone := run("alone", "none", "8080", nil)
	run("published", "bridge", "8080", func(spec *client.ContainerCreateOptions) {
		inside := network.MustParsePort("8080/tcp")
		spec.Config.ExposedPorts = network.PortSet{inside: {}}
		spec.HostConfig.PortBindings = network.PortMap{inside: {{HostPort: "18080"}}}
	})
	host := run("host", "host", "18081", nil)

	t.Setenv("DOCKER_HOST", engine.Host)
	engines := containers.New(containers.Config{})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- engines.Run(ctx) }()
	_, stop := engines.Watch()
	defer stop()
	lister := ports.New(ports.Config{Containers: engines.Known})
	unnamed := ports.New(ports.Config{})

	has := func(list []wire.ListeningPort, container, process string, port uint16, inside bool) bool {
		return slices.ContainsFunc(list, func(p wire.ListeningPort) bool {
			return p.Container == container && p.ProcessName == process && p.Network == "tcp" && p.Port == port && p.Namespace != 0 == inside
		})
	}
	lists := make(chan []wire.ListeningPort)
	watched := make(chan error, 1)
	go func() {
		watched <- lister.Watch(ctx, func(list []wire.ListeningPort) error {
			select {
			case lists <- list:
			case <-ctx.Done():
			}
			return nil
		})
	}()
	told := func(what string, ok func([]wire.ListeningPort) bool) {
		t.Helper()
		var last []wire.ListeningPort
		for limit := time.After(20 * time.Second); ; {
			select {
			case last = <-lists:
				if ok(last) {
					return
				}
			case <-limit:
				t.Fatalf("not told: %s; the last list is %+v", what, last)
			}
		}
	}
	told("every port has the name of its container", func(list []wire.ListeningPort) bool {
		return has(list, "alone", "busybox", 8080, true) && has(list, "published", "busybox", 8080, true) &&
			has(list, "published", "docker-proxy", 18080, false) && has(list, "host", "busybox", 18081, false)
	})
	if list, err := unnamed.List(t.Context()); err != nil || !has(list, alone[:12], "busybox", 8080, true) || !has(list, "", "docker-proxy", 18080, false) {
		t.Errorf("without the engine's list: %+v, %v", list, err)
	}
	for id, gone := range map[string]func([]wire.ListeningPort) bool{
		alone: func(list []wire.ListeningPort) bool { return has(list, "alone", "busybox", 8080, true) },
		host:  func(list []wire.ListeningPort) bool { return has(list, "host", "busybox", 18081, false) },
	} {
		if _, err := engine.API.ContainerRemove(t.Context(), id, client.ContainerRemoveOptions{Force: true}); err != nil {
			t.Fatal(err)
		}
		told("one is removed", func(list []wire.ListeningPort) bool {
			return !gone(list) && has(list, "published", "busybox", 8080, true)
		})
	}
	run("late", "host", "18082", nil)
	told("one begins", func(list []wire.ListeningPort) bool { return has(list, "late", "busybox", 18082, false) })
	cancel()
	for _, end := range []chan error{watched, ended} {
		if err := <-end; err != nil {
			t.Error(err)
		}
	}
}
