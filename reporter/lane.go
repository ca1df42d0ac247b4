package reporter

import (
	"context"
	"errors"
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
	// on, the failure was the server's answer.
	verdictDelay = time.Second
	// maxRetryDelay is how far apart the attempts of a call that goes on failing come to lie.
	maxRetryDelay = 30 * time.Second
)

var (
	// errAbsent means that this server has no place for a report.
	errAbsent = errors.New("the server does not take these")
	// errNoAnswer means that a server was not reached by a call that does not go over the link.
	errNoAnswer = errors.New("no answer from the server")
)

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
	must  bool                                   // the report is kept until the server takes it
	call  func(context.Context, link, []T) error // one RPC
}

// lane delivers reports of one kind, in order. A keyed report replaces the waiting one of its key.
type lane[T any] struct {
	kind[T]
	log  *slog.Logger
	done func() // called when fewer wait than before
	wake chan struct{}

	complaint string // what the server last refused a report with; deliver's own

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

// deliver sends what waits and what comes until ctx ends.
func (l *lane[T]) deliver(ctx context.Context, on link) {
	absent := !on.version.AtLeast(l.since)
	var retry retry
	for ctx.Err() == nil {
		batch := l.peek()
		if len(batch) == 0 {
			select {
			case <-ctx.Done():
			case <-l.wake:
			}
			continue
		}
		if !absent {
			err := l.send(ctx, on, batch)
			if ctx.Err() != nil {
				return
			}
			if absent = lacks(err); absent {
				l.log.Info("this server does not take some reports; they are dropped", "reports", l.name)
			} else if err != nil {
				if !retry.wait(ctx) {
					return
				}
				keep := l.must || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, errNoAnswer)
				l.complain(keep, err)
				if keep {
					continue
				}
			}
		}
		retry = 0
		l.remove(batch)
		if !sleep(ctx, l.pause) {
			return
		}
	}
}

// send makes one call.
func (l *lane[T]) send(ctx context.Context, on link, batch []report[T]) error {
	values := make([]T, len(batch))
	for i, r := range batch {
		values[i] = r.value
	}
	return bounded(ctx, func(ctx context.Context) error { return l.call(ctx, on, values) })
}

// complain tells what the server made of a report, once for each new reason.
func (l *lane[T]) complain(kept bool, err error) {
	level := slog.LevelWarn
	if err.Error() == l.complaint {
		level = slog.LevelDebug
	}
	l.complaint = err.Error()
	text := "the server refused a report; it is dropped"
	if kept {
		text = "the server did not take a report; trying again"
	}
	l.log.Log(context.Background(), level, text, "reports", l.name, "err", err)
}

// lacks tells whether err means that the server has no place for a report.
func lacks(err error) bool { return errors.Is(err, errAbsent) || rpc.Unimplemented(err) }

// retry spaces the attempts of a call: [verdictDelay] at first, then ever longer.
type retry time.Duration

// first tells whether one attempt in a row has failed.
func (r retry) first() bool { return time.Duration(r) == verdictDelay }

// wait waits until the next attempt is due. It tells whether ctx lived on.
func (r *retry) wait(ctx context.Context) bool {
	*r = retry(min(max(verdictDelay, 2*time.Duration(*r)), maxRetryDelay))
	return sleep(ctx, time.Duration(*r))
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
