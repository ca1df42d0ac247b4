package ports

import (
	"cmp"
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"sync"

	"github.com/berthd/berth/wire"
)

// Config configures a [Lister]. The zero value works.
type Config struct {
	// HidePIDs are processes whose ports are marked as hidden, for [Berthd].
	HidePIDs []int
	// Log is where the lister writes; nil discards.
	Log *slog.Logger
}

// Lister lists ports, and remembers who owns them. It is safe for concurrent use.
type Lister struct {
	cfg    Config
	source source

	mu     sync.Mutex // held for a whole scan: a second one at the same time would walk /proc for nothing
	owners owners

	scanning sync.Mutex
	scanner  *scanner // nil when nobody watches
}

// source tells which sockets listen.
type source interface {
	sockets(ctx context.Context) ([]socket, error)
	String() string
}

// socket is a TCP socket that listens, or a UDP socket that is bound and not connected.
type socket struct {
	network string // "tcp" or "udp"
	local   netip.AddrPort
	uid     uint32
	key     socketKey
	pid     int // its owner, if the source knows
}

// socketKey is one socket for as long as the machine runs. A kernel reuses inode numbers; the cookie it does not, but not every source has it.
type socketKey struct {
	inode  uint32
	cookie uint64
}

// New returns a lister that uses the best source this machine allows.
func New(cfg Config) *Lister {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Lister{cfg: cfg, source: bestSource(cfg.Log)}
}

// Source names where the list comes from: "netlink", "/proc/net" or "nothing".
func (l *Lister) Source() string { return l.source.String() }

// List returns one entry for each port and network, with every address it is bound to, sorted by port. Fields that cannot be read are empty.
func (l *Lister) List(ctx context.Context) ([]wire.ListeningPort, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	sockets, err := l.source.sockets(ctx)
	if err != nil {
		return nil, err
	}
	l.owners.resolve(ctx, sockets)
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return l.group(sockets), nil
}

// group makes one entry of all sockets of one port.
func (l *Lister) group(sockets []socket) []wire.ListeningPort {
	type port struct {
		network string
		number  uint16
		hidden  string // what is hidden does not hide what is not
	}
	at := make(map[port]int, len(sockets))
	list := make([]wire.ListeningPort, 0, len(sockets))
	for _, s := range sockets {
		pid := l.owners.pid(s)
		hidden := ""
		if pid != 0 {
			hidden = l.owners.process(pid).helper
		}
		if slices.Contains(l.cfg.HidePIDs, pid) {
			hidden = Berthd
		}
		p := port{s.network, s.local.Port(), hidden}
		i, seen := at[p]
		if !seen {
			i = len(list)
			at[p] = i
			list = append(list, wire.ListeningPort{Network: p.network, Port: p.number, User: l.owners.user(s.uid), Hidden: hidden})
		}
		entry := &list[i]
		entry.Addresses = append(entry.Addresses, s.local.Addr().String())
		// Of several owners the first counts, which for a server with workers is the one that started them.
		if pid != 0 && (entry.PID == 0 || pid < entry.PID) {
			entry.PID = pid
			owner := l.owners.process(pid)
			entry.ProcessName, entry.Command, entry.StartedAt = owner.name, owner.command, owner.started
		}
	}
	for i := range list {
		slices.Sort(list[i].Addresses)
		list[i].Addresses = slices.Compact(list[i].Addresses)
	}
	slices.SortFunc(list, func(a, b wire.ListeningPort) int {
		return cmp.Or(cmp.Compare(a.Port, b.Port), cmp.Compare(a.Network, b.Network))
	})
	return list
}
