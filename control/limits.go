package control

import (
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/berthd/berth/wire"
)

// What anybody may ask without being known is limited by address, and only so much of it is worked on
// at once.
const (
	// A whole fleet may come from one address, behind a proxy or NAT, and start at the same time.
	strangerBurst = 300
	strangerEvery = 120 * time.Millisecond // 500 a minute
	// maxStrangers is how many addresses are remembered.
	maxStrangers = 1 << 14
	// maxChecks proofs are checked at once. A check takes a millisecond, or some seconds when keys or
	// certificates have to be fetched.
	maxChecks = 16
)

// rate bounds how often each address may ask. The zero value is ready.
type rate struct {
	mu sync.Mutex
	// full is when an address has its whole burst again. Those for which that is past are as good as unknown.
	full map[netip.Prefix]time.Time
}

// allow takes one from what an address may ask, or says how long it must wait.
func (l *rate) allow(from netip.Prefix, now time.Time) (wait time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.full) >= maxStrangers {
		for p, full := range l.full {
			if !full.After(now) {
				delete(l.full, p)
			}
		}
		if len(l.full) >= maxStrangers {
			clear(l.full) // too many at once to tell apart; the slots still hold
		}
	}
	if l.full == nil {
		l.full = map[netip.Prefix]time.Time{}
	}
	full := l.full[from]
	if full.Before(now) {
		full = now
	}
	full = full.Add(strangerEvery)
	if wait = full.Sub(now) - strangerBurst*strangerEvery; wait > 0 {
		return wait
	}
	l.full[from] = full
	return 0
}

// remoteAddr is where a request comes from; the zero value when that cannot be told.
func remoteAddr(r *http.Request) netip.Addr {
	at, _ := netip.ParseAddrPort(r.RemoteAddr)
	return at.Addr().Unmap().WithZone("")
}

// network is what counts as one address: of IPv6 a host has at least a /64.
func network(addr netip.Addr) netip.Prefix {
	bits := 32
	if addr.Is6() {
		bits = 64
	}
	p, _ := addr.Prefix(bits) // the zero address has the zero prefix
	return p
}

// later answers that it is not a matter of what was asked, but of when.
func later(w http.ResponseWriter, status int, wait time.Duration, message string) {
	seconds := max(1, int((wait+time.Second-1)/time.Second))
	w.Header().Set("Retry-After", strconv.Itoa(seconds))
	writeError(w, &wire.Error{StatusCode: status, Message: message})
}
