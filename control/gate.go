package control

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/berthd/berth/wire"
)

// Agents come back all at once when the server or the network was away, stock ones without jitter. Each
// link begins with requests of the store, which have limits of time; so few begin at the same time, the
// others wait their turn, and whoever would wait too long is told when to come again.
const (
	// maxBeginning keeps both the CPUs and the store's log busy. More only lengthens what each waits for.
	maxBeginning = 32
	// maxWaiting bounds the requests held, some 20 KiB each.
	maxWaiting = 4096
	// turnTimeout leaves an agent enough of the 45 s and more that it waits for an answer.
	turnTimeout = 20 * time.Second
	// comeAgain is told to those who are turned away. Agents of ours spread over the time after it.
	comeAgain = 10 * time.Second
)

var errBusy = errors.New("too many at the same time")

// gate admits so many at a time, in the order they came.
type gate struct {
	slots   chan struct{}
	waiting atomic.Int64
}

func newGate(slots int) *gate { return &gate{slots: make(chan struct{}, slots)} }

// enter waits for a turn, which ends when leave is called; that may be done more than once.
func (g *gate) enter(ctx context.Context) (leave func(), err error) {
	if g.waiting.Add(1) > maxWaiting {
		g.waiting.Add(-1)
		return nil, errBusy
	}
	defer g.waiting.Add(-1)
	timer := time.NewTimer(turnTimeout)
	defer timer.Stop()
	select {
	case g.slots <- struct{}{}:
		var left atomic.Bool
		return func() {
			if !left.Swap(true) {
				<-g.slots
			}
		}, nil
	case <-timer.C:
		return nil, errBusy
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// writeBusy turns a caller away.
func writeBusy(w http.ResponseWriter) {
	w.Header().Set("Retry-After", strconv.Itoa(int(comeAgain/time.Second)))
	writeError(w, &wire.Error{StatusCode: http.StatusServiceUnavailable, Message: "Too many agents are linking at the moment.",
		Detail: "The server was away, or many agents lost it at once. Try again in some seconds."})
}
