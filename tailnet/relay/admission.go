package relay

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// What the relay spends on strangers: connections whose node key nobody vouches for. It keeps up to
// 64 MiB for a slow reader of large packets, which is fine for a node of ours and not for whoever finds
// the port. So strangers may be many, because all nodes are strangers for a moment after a restart, but
// they share one small rate and have little time: what they can have queued at any moment is less than
// strangerRate * strangerGrace, 240 MiB.
const (
	maxStrangers = 2048
	// maxStrangersPerAddress is no smaller because a whole cluster may come from one address.
	maxStrangersPerAddress = 1024
	strangerGrace          = time.Minute
	strangerRate           = 4 << 20 // bytes a second, of all of them
	// freeBytes of each connection are not counted against the rate, so that a greeting never waits
	// for what other strangers send.
	freeBytes = 4 << 10
	// askEvery is how often at most the same stranger is looked up again.
	askEvery = 250 * time.Millisecond
)

// errTooMany refuses a connection.
var errTooMany = errors.New("too many connections of unknown nodes")

// lobby holds the strangers. A nil known means that everybody is welcome.
type lobby struct {
	known func(key [32]byte) bool
	rate  *rate.Limiter
	grace time.Duration
	total int
	each  int // of one address

	mu        sync.Mutex
	strangers map[*visitor]struct{}
	addresses map[netip.Addr]int
	swept     time.Time
}

func newLobby(known func([32]byte) bool) *lobby {
	return &lobby{
		known: known, rate: rate.NewLimiter(strangerRate, strangerRate), grace: strangerGrace,
		total: maxStrangers, each: maxStrangersPerAddress,
		strangers: map[*visitor]struct{}{}, addresses: map[netip.Addr]int{},
	}
}

// visitor is one connection. It is a stranger until its key is known.
type visitor struct {
	lobby *lobby
	addr  netip.Addr
	ctx   context.Context // ends with the connection
	leave context.CancelFunc
	timer *time.Timer

	mu       sync.Mutex // protects the following
	stranger bool
	key      *[32]byte
	asked    time.Time

	// The following belong to the reader.
	head []byte
	read int
}

// enter admits a connection. evict is called when it is still a stranger after the grace.
func (l *lobby) enter(addr netip.Addr, evict func()) (*visitor, error) {
	v := &visitor{lobby: l, addr: addr, stranger: l.known != nil}
	v.ctx, v.leave = context.WithCancel(context.Background())
	if !v.stranger {
		return v, nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.full(addr) && time.Since(l.swept) > askEvery {
		l.swept = time.Now()
		l.sweep()
	}
	if l.full(addr) {
		v.leave()
		return nil, errTooMany
	}
	l.strangers[v] = struct{}{}
	l.addresses[addr]++
	v.timer = time.AfterFunc(l.grace, func() {
		if !v.recognised(true) {
			evict()
		}
	})
	return v, nil
}

// The following are called with the lobby locked.

func (l *lobby) full(addr netip.Addr) bool {
	return len(l.strangers) >= l.total || l.addresses[addr] >= l.each
}

// sweep finds strangers that have become known: most nodes say nothing once they are connected.
func (l *lobby) sweep() {
	for v := range l.strangers {
		v.mu.Lock()
		if v.key != nil && l.known(*v.key) {
			v.stranger = false
			l.drop(v)
		}
		v.mu.Unlock()
	}
}

func (l *lobby) drop(v *visitor) {
	if _, ok := l.strangers[v]; !ok {
		return
	}
	delete(l.strangers, v)
	if l.addresses[v.addr]--; l.addresses[v.addr] == 0 {
		delete(l.addresses, v.addr)
	}
	v.timer.Stop()
}

// close forgets a connection.
func (v *visitor) close() {
	v.leave()
	v.lobby.mu.Lock()
	defer v.lobby.mu.Unlock()
	v.lobby.drop(v)
}

// recognised tells whether somebody vouches for the visitor; unless now is set, it may remember the
// answer of a moment ago.
func (v *visitor) recognised(now bool) bool {
	v.mu.Lock()
	stranger, key := v.stranger, v.key
	ask := stranger && key != nil && (now || time.Since(v.asked) > askEvery)
	if ask {
		v.asked = time.Now()
	}
	v.mu.Unlock()
	if !ask {
		return !stranger
	}
	if !v.lobby.known(*key) {
		return false
	}
	v.lobby.mu.Lock()
	defer v.lobby.mu.Unlock()
	v.mu.Lock()
	defer v.mu.Unlock()
	v.stranger = false
	v.lobby.drop(v)
	return true
}

// A client's first frame: its type, the length of the rest, and then its node key. The key cannot be
// borrowed: the rest of the frame is sealed with it, and the library reads no packet before it has
// opened that.
const (
	frameClientInfo = 0x02
	headLen         = 1 + 4 + 32
)

// took looks at what was read, and makes a stranger wait for his share of the rate.
func (v *visitor) took(p []byte) error {
	if len(v.head) < headLen {
		v.head = append(v.head, p[:min(len(p), headLen-len(v.head))]...)
		if len(v.head) == headLen && v.head[0] == frameClientInfo && binary.BigEndian.Uint32(v.head[1:]) >= 32 {
			v.mu.Lock()
			v.key = (*[32]byte)(v.head[5:])
			v.mu.Unlock()
		}
	}
	if v.recognised(false) {
		return nil
	}
	if v.read += len(p); v.read <= freeBytes {
		return nil
	}
	return v.lobby.rate.WaitN(v.ctx, len(p))
}

// watched is the connection of a visitor, as the relay reads it.
type watched struct {
	net.Conn
	from    io.Reader // what came with the request, and then Conn
	visitor *visitor
}

// Read implements [io.Reader]. It reads little at a time, so that a stranger's share is fair.
func (c *watched) Read(p []byte) (int, error) {
	n, err := c.from.Read(p[:min(len(p), 16<<10)])
	if n > 0 {
		if wait := c.visitor.took(p[:n]); wait != nil {
			return 0, net.ErrClosed
		}
	}
	return n, err
}

// Close implements [io.Closer].
func (c *watched) Close() error {
	c.visitor.close()
	return c.Conn.Close()
}
