package containers

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	"github.com/berthd/berth/wire"
)

// Config configures a [Lister]. The zero value works.
type Config struct {
	// Timeout is what each engine gets to answer; zero means 5 s.
	Timeout time.Duration
	// Log is where the lister writes; nil discards.
	Log *slog.Logger
}

// maxAnswer bounds what an engine may say. 5,000 containers with long labels take about 10 MB.
const maxAnswer = 32 << 20

var errTooLong = fmt.Errorf("it answered with more than %d MiB", maxAnswer>>20)

// boundedConn is a connection that fails once too much has been read.
type boundedConn struct {
	net.Conn
	left int
}

func (c *boundedConn) Read(p []byte) (int, error) {
	if c.left <= 0 {
		return 0, errTooLong
	}
	n, err := c.Conn.Read(p[:min(len(p), c.left)])
	c.left -= n
	return n, err
}

// Lister lists containers. It is safe for concurrent use.
type Lister struct {
	timeout time.Duration
	log     *slog.Logger
	find    func() ([]engine, []string)
}

// New returns a lister of the engines that this process's user and environment know of.
func New(cfg Config) *Lister {
	if cfg.Timeout == 0 {
		cfg.Timeout = 5 * time.Second
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Lister{timeout: cfg.Timeout, log: cfg.Log, find: machine().engines}
}

// List returns the containers of every engine, stopped ones included. An engine that cannot be asked costs a warning and not the list; no engine at
// all is an empty list that names none. The error is ctx's, if it ended first.
func (l *Lister) List(ctx context.Context) (wire.Containers, error) {
	engines, warnings := l.find()
	answers := make([]struct {
		containers []wire.Container
		err        error
	}, len(engines))
	var all sync.WaitGroup
	for i, e := range engines {
		all.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, l.timeout)
			defer cancel()
			answers[i].containers, answers[i].err = e.list(ctx)
		})
	}
	all.Wait()
	if err := ctx.Err(); err != nil {
		return wire.Containers{}, err
	}
	list := wire.Containers{Devcontainers: []wire.Devcontainer{}, Containers: []wire.Container{}, Warnings: warnings}
	for i, a := range answers {
		list.Engines = append(list.Engines, engines[i].name)
		if a.err != nil {
			l.log.Debug("a container engine could not be asked", "engine", engines[i].name, "host", engines[i].host, "err", a.err)
			list.Warnings = append(list.Warnings, l.explain(engines[i], a.err))
			continue
		}
		list.Containers = append(list.Containers, a.containers...)
	}
	list.Warnings = append(list.Warnings, clashes(list.Containers)...)
	return list, nil
}

// list asks one engine.
func (e engine) list(ctx context.Context) ([]wire.Container, error) {
	network, address, _ := strings.Cut(e.host, "://")
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return &boundedConn{Conn: conn, left: maxAnswer}, nil
	}
	// The client's own words for a failed dial do not say why it failed; the kernel's do.
	conn, err := dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	conn.Close()
	options := []client.Opt{client.WithHost(e.host), client.WithDialContext(dial)}
	if e.tlsFromEnv {
		options = append([]client.Opt{client.WithTLSClientConfigFromEnv()}, options...)
	}
	api, err := client.New(options...)
	if err != nil {
		return nil, err
	}
	defer api.Close()
	// Asked for by itself, so that an engine too old for us says so.
	if _, err := api.Ping(ctx, client.PingOptions{NegotiateAPIVersion: true}); err != nil {
		return nil, err
	}
	found, err := api.ContainerList(ctx, client.ContainerListOptions{All: true})
	if err != nil {
		return nil, err
	}
	list := make([]wire.Container, len(found.Items))
	for i, c := range found.Items {
		list[i] = convert(c, e.name)
	}
	return list, nil
}

// explain says what is wrong with an engine, and what to do about it.
func (l *Lister) explain(e engine, err error) string {
	where := e.name + " at " + e.host
	switch {
	case errors.Is(err, fs.ErrPermission):
		return fmt.Sprintf("cannot list the containers of %s: this user may not use its socket (join the group that owns it)", where)
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Sprintf("cannot list the containers of %s: it did not answer within %v", where, l.timeout)
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, fs.ErrNotExist):
		return fmt.Sprintf("cannot list the containers of %s: nothing listens there (is the engine running?)", where)
	}
	return fmt.Sprintf("cannot list the containers of %s: %v", where, err)
}

// convert puts an engine's words into the protocol's.
func convert(c container.Summary, engine string) wire.Container {
	out := wire.Container{
		CreatedAt: time.Unix(c.Created, 0).UTC(),
		ID:        c.ID,
		Name:      name(c),
		Image:     c.Image,
		Labels:    c.Labels,
		Running:   running(c.State),
		Ports:     make([]wire.ContainerPort, 0, len(c.Ports)),
		Status:    status(c),
		Volumes:   make(map[string]string, len(c.Mounts)),
		Engine:    engine,
	}
	if out.Labels == nil {
		out.Labels = map[string]string{}
	}
	for _, p := range c.Ports {
		port := wire.ContainerPort{Port: p.PrivatePort, Network: p.Type, HostPort: p.PublicPort}
		if p.PublicPort != 0 && p.IP.IsValid() {
			port.HostIP = p.IP.String()
		}
		out.Ports = append(out.Ports, port)
	}
	for _, m := range c.Mounts {
		source := m.Source
		if source == "" { // Podman's volumes have a name only
			source = m.Name
		}
		if source != "" {
			out.Volumes[source] = m.Destination
		}
	}
	return out
}

// name is the container's own name; the others are those by which linked containers know it, as "/other/alias".
func name(c container.Summary) string {
	for _, n := range c.Names {
		if n = strings.TrimPrefix(n, "/"); !strings.Contains(n, "/") {
			return n
		}
	}
	return c.ID
}

// running reports whether a container's processes exist, as `docker inspect` has it.
func running(s container.ContainerState) bool {
	switch s {
	case container.StateRunning, container.StatePaused, container.StateRestarting:
		return true
	}
	return false
}

// exitCode finds the code in the words that an engine has for a container that ended, as in "Exited (137) 2 hours ago".
var exitCode = regexp.MustCompile(`^Exited \((-?\d+)\)`)

func status(c container.Summary) string {
	if c.State != container.StateExited {
		return string(c.State)
	}
	switch m := exitCode.FindStringSubmatch(c.Status); {
	case m == nil:
		return "exited"
	case m[1] == "0":
		return "exited successfully"
	default:
		return "exited with code " + m[1]
	}
}

// clashes warns of ports of this machine that several containers have: who is reached there is anybody's guess.
func clashes(list []wire.Container) []string {
	type hostPort struct {
		network string
		port    uint16
	}
	first := make(map[hostPort]string)
	var warnings []string
	for _, c := range list {
		seen := make(map[hostPort]bool) // one container may publish a port on IPv4 and on IPv6
		for _, p := range c.Ports {
			ip, err := netip.ParseAddr(p.HostIP)
			key := hostPort{p.Network, p.HostPort}
			if err != nil || !ip.IsLoopback() && !ip.IsUnspecified() || !c.Running || seen[key] {
				continue
			}
			seen[key] = true
			if other, taken := first[key]; taken {
				warnings = append(warnings, fmt.Sprintf("port %d/%s of this machine is published by several containers: %s and %s", p.HostPort, p.Network, other, c.Name))
				continue
			}
			first[key] = c.Name
		}
	}
	return warnings
}
