// Package enginelab runs container engines of their own for tests and measurements, which need root for it, and the Debian packages docker.io, podman and
// busybox-static. [Start] starts one with nothing in it, [Engine.Create] makes containers of an image of BusyBox that is imported from this machine, as no
// registry is asked, and [Engine.Stop] ends it with all that it holds.
package enginelab

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
)

// The engines that can be started.
const (
	Docker = "docker"
	Podman = "podman"
	// BridgedDocker is Docker with a network of its own, on which containers can publish ports. It makes a device, so it belongs into a network namespace.
	BridgedDocker = "docker with a bridge"
)

// Kinds lists those that any test can start.
var Kinds = []string{Docker, Podman}

// The images that each engine has.
const (
	// Image is BusyBox under all its names, with the users root and dev (1000), whose shells are sh and ash.
	Image = "localhost/busybox:test"
	// ShelllessImage is the one program /busybox.
	ShelllessImage = "localhost/shellless:test"
)

const (
	startLimit = 30 * time.Second
	stopLimit  = 20 * time.Second
)

// Engine is a running engine.
type Engine struct {
	Kind string
	// Host is where it listens, as in DOCKER_HOST.
	Host string
	// API is a client of it.
	API *client.Client

	dir    string
	cmd    *exec.Cmd
	log    bytes.Buffer
	exited chan struct{}
}

// Start starts an engine.
func Start(kind string) (*Engine, error) {
	if os.Getuid() != 0 {
		return nil, errors.New("a container engine can be started by root only: run this as root")
	}
	dir, err := os.MkdirTemp("", "eng") // names of sockets are short
	if err != nil {
		return nil, err
	}
	e := &Engine{Kind: kind, Host: "unix://" + filepath.Join(dir, "sock"), dir: dir}
	if e.API, err = client.New(client.WithHost(e.Host)); err != nil {
		return nil, err
	}
	if err := e.start(); err != nil {
		return nil, errors.Join(err, e.Stop())
	}
	if err := errors.Join(e.importImage(Image, everything()), e.importImage(ShelllessImage, nil)); err != nil {
		return nil, errors.Join(err, e.Stop())
	}
	return e, nil
}

// Restart starts the engine again after it was ended by [Engine.Halt]; it has what it had.
func (e *Engine) Restart() error { return e.start() }

func (e *Engine) start() error {
	in := func(name string) string { return filepath.Join(e.dir, name) }
	switch e.Kind {
	case Docker, BridgedDocker:
		e.cmd = exec.Command("dockerd", "--host", e.Host, "--data-root", in("data"), "--exec-root", in("exec"), "--pidfile", in("pid"),
			"--iptables=false", "--ip6tables=false", "--storage-driver", "vfs")
		if e.Kind == Docker {
			e.cmd.Args = append(e.cmd.Args, "--bridge", "none")
		}
	case Podman:
		e.cmd = exec.Command("podman", "--root", in("root"), "--runroot", in("run"), "--storage-driver", "vfs", "--cgroup-manager", "cgroupfs",
			"--events-backend", "file", "--tmpdir", in("tmp"), "system", "service", "--time", "0", e.Host)
	default:
		return fmt.Errorf("there is no engine %q", e.Kind)
	}
	e.cmd.Stdout, e.cmd.Stderr = &e.log, &e.log
	if err := e.cmd.Start(); err != nil {
		return fmt.Errorf("cannot start %s (install docker.io and podman): %w", e.Kind, err)
	}
	e.exited = make(chan struct{})
	go func(cmd *exec.Cmd, exited chan struct{}) { cmd.Wait(); close(exited) }(e.cmd, e.exited)
	limit := time.After(startLimit)
	for {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		_, err := e.API.Ping(ctx, client.PingOptions{NegotiateAPIVersion: true})
		cancel()
		if err == nil {
			return nil
		}
		select {
		case <-e.exited:
			return fmt.Errorf("%s ended at once: %s", e.Kind, e.log.String())
		case <-limit:
			return fmt.Errorf("%s does not answer: %w", e.Kind, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Signal signals the engine, such as with SIGSTOP.
func (e *Engine) Signal(sig syscall.Signal) error { return e.cmd.Process.Signal(sig) }

// Halt ends the engine's process.
func (e *Engine) Halt() error {
	e.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-e.exited:
		return nil
	case <-time.After(stopLimit):
		e.cmd.Process.Kill()
		<-e.exited
		return fmt.Errorf("%s did not end by itself", e.Kind)
	}
}

// Stop ends the engine, and removes all that it had.
func (e *Engine) Stop() error {
	var err error
	if e.exited != nil {
		select {
		case <-e.exited:
		default:
			err = errors.Join(e.RemoveAll(), e.Halt())
		}
	}
	e.API.Close()
	// Docker leaves this behind when a container was on the host's network.
	if failed := syscall.Unmount(filepath.Join(e.dir, "exec/netns/default"), syscall.MNT_DETACH); failed != nil && !errors.Is(failed, syscall.EINVAL) && !errors.Is(failed, syscall.ENOENT) {
		err = errors.Join(err, failed)
	}
	return errors.Join(err, e.removeDir())
}

// removeDir removes the engine's folder. Podman's helpers tidy up after a command that has ended, and outlive the service by a moment.
func (e *Engine) removeDir() error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(stopLimit); ; <-tick.C {
		if err := os.RemoveAll(e.dir); err == nil || !errors.Is(err, syscall.ENOTEMPTY) || time.Now().After(deadline) {
			return err
		}
	}
}

// Log is what the engine said of itself. The engine must have ended.
func (e *Engine) Log() string { return e.log.String() }

// Remove removes a container, running or not.
func (e *Engine) Remove(id string) error {
	_, err := e.API.ContainerRemove(context.Background(), id, client.ContainerRemoveOptions{Force: true})
	return err
}

// RemoveAll removes every container.
func (e *Engine) RemoveAll() error {
	ctx := context.Background()
	list, err := e.API.ContainerList(ctx, client.ContainerListOptions{All: true})
	if err != nil {
		return err
	}
	for _, c := range list.Items {
		err = errors.Join(err, e.Remove(c.ID))
	}
	return err
}

// Spec returns how to make a container that does not ask for more than a small machine allows. The first of argv is a program of BusyBox.
func Spec(name string, argv ...string) client.ContainerCreateOptions {
	return client.ContainerCreateOptions{
		Name:   name,
		Config: &container.Config{Image: Image, Cmd: append([]string{"/busybox"}, argv...)},
		HostConfig: &container.HostConfig{
			NetworkMode: "none",
			// The engines' own defaults are more than some machines allow.
			Resources: container.Resources{Ulimits: []*container.Ulimit{{Name: "nofile", Soft: 1024, Hard: 1024}, {Name: "nproc", Soft: 1024, Hard: 1024}}},
		},
	}
}

// Create makes a container and returns its id.
func (e *Engine) Create(spec client.ContainerCreateOptions) (id string, err error) {
	made, err := e.API.ContainerCreate(context.Background(), spec)
	if err != nil {
		return "", fmt.Errorf("cannot make container %s: %w", spec.Name, err)
	}
	return made.ID, nil
}

// Run makes a container and starts it.
func (e *Engine) Run(spec client.ContainerCreateOptions) (id string, err error) {
	if id, err = e.Create(spec); err != nil {
		return "", err
	}
	if _, err = e.API.ContainerStart(context.Background(), id, client.ContainerStartOptions{}); err != nil {
		return "", fmt.Errorf("cannot start container %s: %w", spec.Name, err)
	}
	return id, nil
}

// file is one of an image; a link if it has a target, a directory if it has nothing.
type file struct{ name, target, body string }

// everything is what makes BusyBox a system.
func everything() []file {
	files := []file{
		{name: "bin/"}, {name: "tmp/"}, {name: "root/"}, {name: "home/"}, {name: "home/dev/"}, {name: "etc/"},
		{name: "etc/passwd", body: "root:x:0:0:root:/root:/bin/sh\ndev:x:1000:1000:Dev:/home/dev:/bin/ash\n"},
		{name: "etc/group", body: "root:x:0:\ndev:x:1000:\n"},
	}
	names, err := exec.Command("/bin/busybox", "--list").Output()
	if err != nil {
		return files // importing says what is missing
	}
	for name := range strings.FieldsSeq(string(names)) {
		files = append(files, file{name: "bin/" + name, target: "/busybox"})
	}
	return files
}

// importImage makes an image of /busybox and files.
func (e *Engine) importImage(name string, files []file) error {
	program, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return fmt.Errorf("cannot make an image (install busybox-static): %w", err)
	}
	var image bytes.Buffer
	w := tar.NewWriter(&image)
	for _, f := range append([]file{{name: "busybox", body: string(program)}}, files...) {
		header := &tar.Header{Name: f.name, Mode: 0o755, Size: int64(len(f.body)), Linkname: f.target, Typeflag: tar.TypeReg}
		switch {
		case f.target != "":
			header.Typeflag = tar.TypeSymlink
		case strings.HasSuffix(f.name, "/"):
			header.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(header); err != nil {
			return err
		}
		if _, err := io.WriteString(w, f.body); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	out, err := e.API.ImageImport(context.Background(), client.ImageImportSource{Source: &image, SourceName: "-"}, name, client.ImageImportOptions{})
	if err != nil {
		return fmt.Errorf("cannot import an image: %w", err)
	}
	defer out.Close()
	if text, err := io.ReadAll(out); err != nil || strings.Contains(string(text), `"error"`) {
		return fmt.Errorf("cannot import an image: %w: %s", err, text)
	}
	return nil
}
