package ports

import (
	"net/netip"
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
	address netip.Addr // unspecified: every one
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
			if p.HostPort == 0 || !c.Running {
				continue
			}
			address, err := netip.ParseAddr(p.HostIP)
			if err != nil { // an engine that does not say means every one
				address = netip.IPv4Unspecified()
			}
			next.published[published{p.Network, everyAddress(address), p.HostPort}] = c.Name
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

// publishes names the container that a port of this machine leads to: the engine's proxy listens there for it, or the engine itself. Another program may
// listen on the same port of another address.
func (n *names) publishes(s socket) string {
	return n.published[published{s.network, everyAddress(s.local.Addr()), s.local.Port()}]
}

// everyAddress makes one address of those that stand for every one.
func everyAddress(a netip.Addr) netip.Addr {
	if a = a.Unmap(); a.IsUnspecified() {
		return netip.IPv4Unspecified()
	}
	return a
}

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
