package ports

import (
	"slices"

	"github.com/berthd/berth/wire"
)

// names is what the engines say of containers. Its zero value knows none.
type names struct {
	last      []wire.Container
	byID      map[string]string
	published map[published]string
}

// published is a port of this machine that an engine passes on to a container.
type published struct {
	network string
	port    uint16
}

// learn takes in a list, and reports whether it is another than before.
func (n *names) learn(list []wire.Container) bool {
	if slices.EqualFunc(list, n.last, func(a, b wire.Container) bool {
		return a.ID == b.ID && a.Name == b.Name && a.Running == b.Running && slices.Equal(a.Ports, b.Ports)
	}) {
		return false
	}
	next := names{last: list, byID: make(map[string]string, len(list)), published: make(map[published]string)}
	for _, c := range list {
		next.byID[c.ID] = c.Name
		for _, p := range c.Ports {
			if p.HostPort != 0 && c.Running {
				next.published[published{p.Network, p.HostPort}] = c.Name
			}
		}
	}
	*n = next
	return true
}

// of returns the name of a container, or the beginning of its id as engines show it.
func (n *names) of(id string) string {
	if name := n.byID[id]; name != "" {
		return name
	}
	return id[:min(len(id), 12)]
}

// publishes names the container that a port of this machine leads to: the engine's proxy listens there for it, or the engine itself.
func (n *names) publishes(s socket) string { return n.published[published{s.network, s.local.Port()}] }

// idLength is how many hexadecimal digits the ids of containers have.
const idLength = 64

// containerOf takes the id of the innermost container out of /proc/PID/cgroup (cgroups(7)); "" is none. Docker, Podman, containerd and CRI-O put it into the
// names of a container's control groups, behind a separator and before anything but a letter, a digit or a line.
func containerOf(cgroup []byte) string {
	run := 0 // of digits, up to here
	for i := len(cgroup) - 1; i >= 0; i-- {
		switch c := cgroup[i]; {
		case c >= '0' && c <= '9' || c >= 'a' && c <= 'f':
			run++
			continue
		case run == idLength && (c == '/' || c == ':' || c == '-'):
			if end := i + 1 + idLength; end == len(cgroup) || !isWord(cgroup[end]) {
				return string(cgroup[i+1 : end])
			}
		}
		run = 0
	}
	return ""
}

func isWord(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '_'
}
