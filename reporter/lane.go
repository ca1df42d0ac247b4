package reporter

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/rpc"
)

const (
	// callTimeout bounds one RPC; the protocol's figure for reports.
	callTimeout = 30 * time.Second
	// verdictDelay is how long a failed call waits for its link to be found dead. If the link lives
	// on, the failure was the server's answer, and asking again would bring the same.
	verdictDelay = time.Second
)

// errAbsent means that this server has no place for a report.
var errAbsent = errors.New("the server does not take these")

// link is one connection to a server.
type link struct {
	API
	version wire.Version
}

// kind says how reports of one kind are delivered.
type kind[T any] struct {
	name  string
	since int                                    // minor version that brought the call
	bound int                                    // reports kept; beyond it the oldest goes
	cost  func(T) int                            // of one report; nil: 1
	room  int                                    // that one call has for costs; it takes at least one report
	pause time.Duration                          // between calls
	fatal bool                                   // a failure ends the link, and the report is kept
	call  func(context.Context, link, []T) error // one RPC
}

// lane delivers reports of one kind, in order. A keyed report replaces the waiting one of its key.
type lane[T any] struct {
	kind[T]
	log  *slog.Logger
	done func() // called when fewer wait than before
	wake chan struct{}

	mu      sync.Mutex
	waiting []report[T]
	stamp   uint64
}

func newLane[T any](r *Reporter, k kind[T]) *lane[T] {
	if k.cost == nil {
		k.cost = func(T) int { return 1 }
	}
	return &lane[T]{kind: k, log: r.log, done: r.progress.announce, wake: make(chan struct{}, 1)}
}

type report[T any] struct {
	key   string // empty: replaces none
	value T
	stamp uint64
}

// put adds a report.
func (l *lane[T]) put(key string, value T) {
	l.mu.Lock()
	l.stamp++
	r := report[T]{key, value, l.stamp}
	i := slices.IndexFunc(l.waiting, func(w report[T]) bool { return key != "" && w.key == key })
	if i >= 0 {
		l.waiting[i] = r
	} else {
		l.waiting = append(l.waiting, r)
	}
	over := len(l.waiting) > l.bound
	if over {
		l.waiting = slices.Delete(l.waiting, 0, 1)
	}
	l.mu.Unlock()
	if over {
		l.log.Warn("too many reports wait for the server; the oldest was dropped", "reports", l.name, "kept", l.bound)
	}
	notify(l.wake)
}

func (l *lane[T]) String() string { return l.name }

func (l *lane[T]) backlog() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return int64(len(l.waiting))
}

// peek returns the reports of the next call.
func (l *lane[T]) peek() []report[T] {
	l.mu.Lock()
	defer l.mu.Unlock()
	var n, used int
	for n < len(l.waiting) {
		used += l.cost(l.waiting[n].value)
		if n > 0 && used > l.room {
			break
		}
		n++
	}
	return slices.Clone(l.waiting[:n])
}

// remove drops those of batch that nothing newer has replaced.
func (l *lane[T]) remove(batch []report[T]) {
	l.mu.Lock()
	l.waiting = slices.DeleteFunc(l.waiting, func(w report[T]) bool {
		return slices.ContainsFunc(batch, func(b report[T]) bool { return b.stamp == w.stamp })
	})
	l.mu.Unlock()
	l.done()
}

// deliver sends what waits and what comes until ctx ends, or a failure ends the link.
func (l *lane[T]) deliver(ctx context.Context, on link) error {
	absent := !on.version.AtLeast(l.since)
	for {
		batch := l.peek()
		if len(batch) == 0 {
			select {
			case <-ctx.Done():
				return nil
			case <-l.wake:
			}
			continue
		}
		if !absent {
			again, err := l.send(ctx, on, batch)
			if ctx.Err() != nil {
				return nil
			}
			if errors.Is(err, errAbsent) {
				absent = true
				l.log.Info("this server does not take some reports; they are dropped", "reports", l.name)
			} else if err != nil {
				return err
			}
			if again {
				continue
			}
		}
		l.remove(batch)
		if !sleep(ctx, l.pause) {
			return nil
		}
	}
}

// send makes one call. It tells whether to make it again, or that it failed for good: with errAbsent
// for this link, with another error for the link itself.
func (l *lane[T]) send(ctx context.Context, on link, batch []report[T]) (again bool, err error) {
	values := make([]T, len(batch))
	for i, r := range batch {
		values[i] = r.value
	}
	err = bounded(ctx, func(ctx context.Context) error { return l.call(ctx, on, values) })
	switch {
	case err == nil:
		return false, nil
	case errors.Is(err, errAbsent), rpc.Unimplemented(err):
		return false, errAbsent
	case l.fatal:
		return false, fmt.Errorf("cannot report %s: %w", l.name, err)
	case !sleep(ctx, verdictDelay):
		return false, nil
	case errors.Is(err, context.DeadlineExceeded):
		return true, nil // no answer is no verdict
	}
	l.log.Warn("the server refused a report; it is dropped", "reports", l.name, "err", err)
	return false, nil
}

// bounded runs one call within its time.
func bounded(ctx context.Context, call func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return call(ctx)
}

// sleep tells whether ctx lived on.
func sleep(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
