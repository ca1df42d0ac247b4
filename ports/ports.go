package ports

import (
	"cmp"
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/berthd/berth/wire"
)

// Config configures a [Lister]. The zero value works.
type Config struct {
	// HidePIDs are processes whose ports are marked as hidden, for [Berthd].
	HidePIDs []int
	// Containers returns the containers of this machine's engines, by which ports get their names, and whether it knows them at this time: if not, the
	// names stay as they are. It is called once or twice a scan while there is another network namespace or a process in a container, and has to answer
	// from memory; nil knows none. A container that it does not know is called by the beginning of its id.
	Containers func() (list []wire.Container, ok bool)
	// Log is where the lister writes; nil discards.
	Log *slog.Logger
}

// maxNamespaces bounds the network namespaces that are looked into. A machine with more containers than that has nobody who reads the list.
const maxNamespaces = 1000

// Lister lists ports, and remembers who owns them. It is safe for concurrent use.
type Lister struct {
	cfg    Config
	source source
	walled atomic.Bool // some network namespace may not be entered

	mu      sync.Mutex // held for a whole scan: a second one at the same time would walk /proc for nothing
	spaces  spaces
	owners  owners
	sockets []socket // of the last scan
	spare   []socket // room for the next
	names   names
	list    []wire.ListeningPort // of the last scan; nil before the first

	contained bool // some process of the list is in a container
	full      bool // it was said that there are too many namespaces

	scanning sync.Mutex
	scanner  *scanner // nil when nobody watches
}

// source tells which sockets listen.
type source interface {
	// sockets appends those of a network namespace to all.
	sockets(ctx context.Context, ns *namespace, all []socket) ([]socket, error)
	String() string
}

// socket is a TCP socket that listens, or a UDP socket that is bound and not connected.
type socket struct {
	network string // "tcp" or "udp"
	local   netip.AddrPort
	uid     uint32
	key     socketKey
	space   int64 // its network namespace; 0 is our own
}

// socketKey is one socket for as long as the machine runs. A kernel reuses inode numbers; the cookie it does not, but not every source has it.
type socketKey struct {
	inode  uint32
	cookie uint64
}

// process is what may be told of a process.
type process struct {
	name, command string
	started       *time.Time
	editor        string // whose helper it is, if it is hidden
	container     string // the id of the one it runs in
	ticks         string // when it started, in the kernel's words: a pid alone may have come to another
	read          time.Time
}

// New returns a lister that uses the best source this machine allows.
func New(cfg Config) *Lister {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Lister{cfg: cfg, source: bestSource(cfg.Log)}
}

// Source names where the list comes from: "netlink", "/proc/net" or "nothing", and what differs for other network namespaces.
func (l *Lister) Source() string {
	if l.walled.Load() && l.source.String() != (procNet{}).String() {
		return l.source.String() + ", and " + procNet{}.String() + " for namespaces that may not be entered"
	}
	return l.source.String()
}

// List returns one entry for each port and network of each network namespace that can be looked into, with every address it is bound to, sorted by port.
// What is hidden has an entry of its own. Fields that cannot be read are empty. The list is shared and must not be changed.
func (l *Lister) List(ctx context.Context) ([]wire.ListeningPort, error) {
	return l.look(ctx, true)
}

// look is List. Unless it has to be exact, another network namespace is taken to be as it was while it has as many sockets of each kind (see sweep).
func (l *Lister) look(ctx context.Context, exact bool) ([]wire.ListeningPort, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.watched() {
		defer l.spaces.release()
	}
	now := time.Now()
	found, err := l.source.sockets(ctx, l.spaces.ours(), l.spare[:0])
	if err != nil {
		return nil, err
	}
	others := l.spaces.others(now)
	exact = exact || l.owners.lost // its socket may be gone, with another in its place
	l.owners.lost = false
	for _, ns := range others {
		found = l.peek(ctx, ns, exact, now, found)
	}
	if err := ctx.Err(); err != nil { // sockets that were not looked for are not gone
		return nil, err
	}
	if l.spaces.full && !l.full {
		l.full = true
		l.cfg.Log.Warn("there are more network namespaces than are looked into; ports in the others are not listed", "limit", maxNamespaces)
	}
	fresh := !slices.Equal(found, l.sockets)
	l.sockets, l.spare = found, l.sockets
	fresh = l.owners.resolve(ctx, l.sockets, fresh, l.spaces.count, now) || fresh
	if err := ctx.Err(); err != nil {
		l.list = nil // it may lack owners that another scan finds
		return nil, err
	}
	if len(others) > 0 || l.contained {
		fresh = l.learn() || fresh
	}
	if fresh || l.list == nil {
		l.list = l.group(l.sockets)
		if l.contained && l.learn() {
			l.list = l.group(l.sockets)
		}
	}
	return l.list, nil
}

// learn asks for the names of containers, and reports whether there are others than before.
func (l *Lister) learn() bool {
	if l.cfg.Containers == nil {
		return false
	}
	list, ok := l.cfg.Containers()
	return ok && l.names.learn(list)
}

// group makes one entry of all sockets of one port.
func (l *Lister) group(sockets []socket) []wire.ListeningPort {
	type port struct {
		space   int64
		network string
		number  uint16
		hidden  string // what is hidden does not hide what is not
	}
	l.contained = false
	at := make(map[port]int, len(sockets))
	list := make([]wire.ListeningPort, 0, len(sockets))
	for i, s := range sockets {
		pid := l.owners.pid(i)
		var owner *process
		hidden := ""
		if pid != 0 {
			owner = l.owners.process(pid)
			hidden = owner.editor
		}
		if slices.Contains(l.cfg.HidePIDs, pid) {
			hidden = Berthd
		}
		p := port{s.space, s.network, s.local.Port(), hidden}
		i, seen := at[p]
		if !seen {
			i = len(list)
			at[p] = i
			list = append(list, wire.ListeningPort{Network: p.network, Port: p.number, Namespace: p.space, Hidden: hidden})
		}
		entry := &list[i]
		entry.Addresses = append(entry.Addresses, s.local.Addr().String())
		// Of several owners the first counts, which for a server with workers is the one that started them.
		first := pid != 0 && (entry.PID == 0 || pid < entry.PID)
		if first {
			entry.PID = pid
			entry.ProcessName, entry.Command, entry.StartedAt = owner.name, owner.command, owner.started
		}
		if first || !seen {
			l.place(entry, s, owner)
		}
	}
	for i := range list {
		slices.Sort(list[i].Addresses)
		list[i].Addresses = slices.Compact(list[i].Addresses)
	}
	slices.SortFunc(list, func(a, b wire.ListeningPort) int {
		return cmp.Or(cmp.Compare(a.Port, b.Port), cmp.Compare(a.Network, b.Network), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Hidden, b.Hidden))
	})
	return list
}

// place says whose a port is: which container's, and which user's.
func (l *Lister) place(entry *wire.ListeningPort, s socket, owner *process) {
	id := ""
	if owner != nil {
		id = l.spaces.foreign(owner.container)
	}
	if id == "" && s.space != 0 {
		id = l.spaces.container(s.space)
	}
	switch {
	case id != "":
		l.contained = true
		entry.Container = l.names.of(id)
		entry.User = strconv.FormatUint(uint64(s.uid), 10) // what the container calls it, we do not know
		if s.uid == 0 {
			entry.User = "root"
		}
		return
	case s.space == 0:
		entry.Container = l.names.publishes(s)
	}
	entry.User = l.owners.user(s.uid)
}
