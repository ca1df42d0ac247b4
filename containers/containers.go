package containers

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/moby/moby/api/types/container"

	"github.com/berthd/berth/account"
	"github.com/berthd/berth/wire"
)

// Config configures a [Lister]. The zero value works.
type Config struct {
	// User is whose engines are asked, and who must be allowed to; nil is the user that this process runs as.
	User *account.User
	// Timeout is what each engine gets to answer; zero means 5 s.
	Timeout time.Duration
	// Log is where the lister writes; nil discards.
	Log *slog.Logger
}

// How engines are followed.
const (
	// linger is for how long engines are followed after somebody last asked: a later question is answered from memory too, and a machine where nobody
	// asks keeps no engine busy (or awake, where its socket starts it).
	linger = 10 * time.Minute
	// rescan is how often engines are looked for meanwhile, by a dozen calls of stat.
	rescan = 5 * time.Second
)

// ErrStopped is returned once [Lister.Run] has ended.
var ErrStopped = errors.New("containers are not followed any more")

// Lister lists containers while it runs. It is safe for concurrent use.
type Lister struct {
	timeout, heartbeat, linger, rescan time.Duration

	log  *slog.Logger
	find func() ([]engine, []string)

	wake    chan struct{} // has a value when somebody asks
	running chan struct{} // closed once Run has begun

	mu        sync.Mutex
	life      context.Context // Run's
	work      sync.WaitGroup  // followers
	followers []*follower     // in the order in which engines are found
	warnings  []string        // of the engines that cannot be followed
	looked    bool            // followers are of all engines that are there
	asked     time.Time       // when somebody last asked
	watchers  map[chan struct{}]bool
}

// New returns a lister of the engines that this process's user and environment know of.
func New(cfg Config) *Lister {
	if cfg.Timeout == 0 {
		cfg.Timeout = 5 * time.Second
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Lister{
		timeout: cfg.Timeout, heartbeat: heartbeat, linger: linger, rescan: rescan, log: cfg.Log, find: enginesOf(cfg.User),
		wake: make(chan struct{}, 1), running: make(chan struct{}), watchers: make(map[chan struct{}]bool),
	}
}

// Run follows the engines while anybody asks, until ctx is done. It is called once.
func (l *Lister) Run(ctx context.Context) error {
	l.mu.Lock()
	l.life = ctx
	l.mu.Unlock()
	close(l.running)
	defer l.work.Wait()
	for {
		select {
		case <-l.wake:
		case <-ctx.Done():
			return nil
		}
		l.follow(ctx)
	}
}

// follow keeps looking for engines until nobody asks any more.
func (l *Lister) follow(ctx context.Context) {
	tick := time.NewTicker(l.rescan)
	defer tick.Stop()
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.endAll()
	}()
	for l.lookOn() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// lookOn looks for engines, or reports that nobody asks any more.
func (l *Lister) lookOn() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.watchers) == 0 && time.Since(l.asked) > l.linger {
		return false
	}
	l.look()
	return true
}

func (l *Lister) endAll() {
	for _, f := range l.followers {
		f.end()
	}
	l.followers, l.warnings, l.looked = nil, nil, false
}

// look begins to follow engines that have come, and stops for those that are gone. l.mu is held.
func (l *Lister) look() {
	if l.life.Err() != nil {
		return
	}
	engines, warnings := l.find()
	known := make(map[engine]*follower, len(l.followers))
	for _, f := range l.followers {
		known[f.engine] = f
	}
	now := make([]*follower, len(engines))
	changed := !slices.Equal(warnings, l.warnings)
	for i, e := range engines {
		if now[i] = known[e]; now[i] != nil {
			delete(known, e)
			continue
		}
		ctx, end := context.WithCancel(l.life)
		f := &follower{engine: e, timeout: l.timeout, beat: l.heartbeat, log: l.log, changed: l.tell, first: make(chan struct{}), end: end}
		f.spoken = sync.OnceFunc(func() { close(f.first) })
		l.work.Go(func() { f.run(ctx) })
		now[i] = f
	}
	for _, gone := range known {
		gone.end()
		changed = true
	}
	l.followers, l.warnings, l.looked = now, warnings, true
	if changed {
		l.tellLocked()
	}
}

// tell tells those who watch that the list has changed.
func (l *Lister) tell() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.tellLocked()
}

func (l *Lister) tellLocked() {
	for w := range l.watchers {
		select {
		case w <- struct{}{}:
		default:
		}
	}
}

// Watch returns a channel that gets a value when the list has changed, one for all changes since the last was taken. Until stop is called, engines are
// followed.
func (l *Lister) Watch() (changed <-chan struct{}, stop func()) {
	w := make(chan struct{}, 1)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.watchers[w] = true
	l.ask()
	return w, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.watchers, w)
	}
}

// ask makes Run follow engines. l.mu is held.
func (l *Lister) ask() {
	l.asked = time.Now()
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// List returns the containers of every engine, stopped ones included, as the engines last told of them. What it returns is shared and not to be changed. An
// engine that cannot be asked costs a warning and not the list; no engine at all is an empty list that names none. An engine that was not followed yet is
// waited for, at most as long as it may take to answer. The error is ctx's if it ended first, or [ErrStopped].
func (l *Lister) List(ctx context.Context) (wire.Containers, error) {
	list := wire.Containers{Devcontainers: []wire.Devcontainer{}, Containers: []wire.Container{}}
	followers, warnings, err := l.now(ctx)
	if err != nil {
		return wire.Containers{}, err
	}
	list.Warnings = warnings
	for _, f := range followers {
		list.Engines = append(list.Engines, f.name)
		containers, warning := f.state()
		if warning != "" {
			list.Warnings = append(list.Warnings, warning)
		}
		list.Containers = append(list.Containers, containers...)
	}
	list.Warnings = append(list.Warnings, clashes(list.Containers)...)
	return list, nil
}

// Known returns the containers that are known without asking anybody: it neither waits nor has engines followed. ok says that engines are followed, for
// somebody who watches or has asked, and that each has answered or has been given up on. Of an engine that hangs they are those it last told of. What it
// returns is shared and not to be changed.
func (l *Lister) Known() (list []wire.Container, ok bool) {
	l.mu.Lock()
	followers, looked := l.followers, l.looked
	l.mu.Unlock()
	if !looked {
		return nil, false
	}
	for _, f := range followers {
		select {
		case <-f.first:
		default:
			return nil, false
		}
		containers, _ := f.state()
		list = append(list, containers...)
	}
	return list, true
}

// minPrefix is how much of an id must be given.
const minPrefix = 4

// Find returns the one container with this name, id or beginning of an id, and the host of its engine. A name that several engines know means the
// container that runs; ENGINE/NAME, such as docker/web, means one for certain. Its errors are for people.
func (l *Lister) Find(ctx context.Context, name string) (c wire.Container, host string, err error) {
	followers, _, err := l.now(ctx)
	if err != nil {
		return wire.Container{}, "", fmt.Errorf("cannot find container %q: %w", name, err)
	}
	type candidate struct {
		wire.Container
		host string
	}
	var exact, begun []candidate
	var warnings []string
	for _, f := range followers {
		containers, warning := f.state()
		if warning != "" {
			warnings = append(warnings, warning)
		}
		for _, c := range containers {
			switch {
			case c.Name == name, c.ID == name, c.Engine+"/"+c.Name == name:
				exact = append(exact, candidate{c, f.host})
			case len(name) >= minPrefix && strings.HasPrefix(c.ID, name):
				begun = append(begun, candidate{c, f.host})
			}
		}
	}
	found := exact
	if len(found) == 0 {
		found = begun
	}
	if running := slices.DeleteFunc(slices.Clone(found), func(c candidate) bool { return !c.Running }); len(running) > 0 {
		found = running
	}
	switch len(found) {
	case 1:
		return found[0].Container, found[0].host, nil
	case 0:
		if len(followers) == 0 {
			return wire.Container{}, "", fmt.Errorf("cannot find container %q: there is no container engine here", name)
		}
		return wire.Container{}, "", errors.New(strings.Join(append([]string{fmt.Sprintf("cannot find container %q: no engine knows it", name)}, warnings...), "; "))
	}
	var all []string
	for _, c := range found {
		all = append(all, fmt.Sprintf("%q", c.Engine+"/"+c.Name))
	}
	return wire.Container{}, "", fmt.Errorf("cannot tell which container %q is: it may be %s", name, strings.Join(all, " or "))
}

// now returns the followers of all engines, once each has something to say.
func (l *Lister) now(ctx context.Context) (followers []*follower, warnings []string, err error) {
	select {
	case <-l.running:
	case <-ctx.Done():
		return nil, nil, ctx.Err()
	}
	l.mu.Lock()
	l.ask()
	l.look()
	followers, warnings = l.followers, slices.Clone(l.warnings)
	life := l.life
	l.mu.Unlock()
	for _, f := range followers {
		select {
		case <-f.first:
		case <-ctx.Done():
			return nil, nil, ctx.Err()
		case <-life.Done():
		}
	}
	if life.Err() != nil {
		return nil, nil, ErrStopped
	}
	return followers, warnings, nil
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

		ComposeProject: c.Labels["com.docker.compose.project"],
		ComposeService: c.Labels["com.docker.compose.service"],
	}
	if out.Running { // Podman does not tell of others
		out.NetworkMode = networkMode(c.HostConfig.NetworkMode)
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
	slices.SortFunc(out.Ports, comparePorts)
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

// networkMode is the mode's name: Docker calls its usual one by two.
func networkMode(mode string) string {
	if mode == "default" {
		return "bridge"
	}
	return mode
}

// How a container ended, in the protocol's words; the first if its code is not known yet.
const (
	exited             = "exited"
	exitedSuccessfully = "exited successfully"
	exitedWithCode     = "exited with code "
)

// ended reports whether a container ran and does not any more. "stopped" is Podman's for one that has just done so.
func ended(s container.ContainerState) bool { return s == container.StateExited || s == "stopped" }

func status(c container.Summary) string {
	if !ended(c.State) {
		return string(c.State)
	}
	if m := exitCode.FindStringSubmatch(c.Status); m != nil {
		if code, err := strconv.Atoi(m[1]); err == nil {
			return exitStatus(code, "")
		}
	}
	return exited
}

func exitStatus(code int, why string) string {
	switch {
	case code == 0:
		return exitedSuccessfully
	case why == "":
		return exitedWithCode + strconv.Itoa(code)
	}
	return exitedWithCode + strconv.Itoa(code) + ": " + why
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
