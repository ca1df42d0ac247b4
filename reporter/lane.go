package reporter

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"

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
type kind[T proto.Message] struct {
	name  string
	file  string                                 // where what waits is kept on disk; empty: in memory alone
	since int                                    // minor version that brought the call
	bound int                                    // reports kept; beyond it the oldest goes
	cost  func(T) int                            // of one report; nil: 1
	room  int                                    // that one call has for costs; it takes at least one report
	pause time.Duration                          // between calls
	pace  time.Duration                          // between calls for one key; meanwhile its newest report waits
	must  bool                                   // the report is kept until the server takes it
	call  func(context.Context, link, []T) error // one RPC
}

// lane delivers reports of one kind, in order. A keyed report replaces the waiting one of its key.
type lane[T proto.Message] struct {
	kind[T]
	log   *slog.Logger
	done  func()        // called when fewer wait than before
	hurry *atomic.Int32 // over zero: no report rests, as somebody waits for all of them
	wake  chan struct{}
	shelf *shelf // nil: in memory alone

	complaint string // what the server last refused a report with; deliver's own

	mu      sync.Mutex
	waiting []report[T]
	rests   map[string]time.Time // until when, by key
	stamp   uint64               // of the newest report
	changes uint64               // of what waits
	agent   uuid.UUID            // whose reports they are; nil if nobody has said
	found   uint64               // stamp of the last report that an earlier process left
}

// newLane makes a lane, with what an earlier process left in dir.
func newLane[T proto.Message](r *Reporter, dir string, k kind[T]) *lane[T] {
	if k.cost == nil {
		k.cost = func(T) int { return 1 }
	}
	l := &lane[T]{
		kind: k, log: r.log, done: r.progress.announce, hurry: &r.flushing,
		wake: make(chan struct{}, 1), rests: map[string]time.Time{},
	}
	if dir != "" && k.file != "" {
		l.shelf = newShelf(dir, k.file, k.name, r.log, r.unsynced)
		l.recover()
	}
	return l
}

type report[T proto.Message] struct {
	key   string // empty: replaces none
	value T
	body  []byte // value as it is kept on disk
	stamp uint64
}

// put adds a report. Where they are kept on disk, it is there when put returns.
func (l *lane[T]) put(key string, value T) {
	var body []byte
	if l.shelf != nil {
		// A body that cannot be encoded cannot be sent either, and the call will say so.
		body, _ = proto.Marshal(value)
	}
	l.mu.Lock()
	l.stamp++
	l.changes++
	r := report[T]{key, value, body, l.stamp}
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
	l.save()
	notify(l.wake)
}

// newest returns the report that was put last, if it waits still.
func (l *lane[T]) newest() (value T, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.waiting) == 0 {
		return value, false
	}
	return l.waiting[len(l.waiting)-1].value, true
}

// drop takes out the report of a key.
func (l *lane[T]) drop(key string) {
	l.mu.Lock()
	l.waiting = slices.DeleteFunc(l.waiting, func(r report[T]) bool { return r.key == key })
	l.changes++
	l.mu.Unlock()
	l.save()
}

// follow adds what another lane was left by an earlier process, made into other reports, and empties that.
func (l *lane[T]) follow(other *lane[T], made func(T) T) {
	if l.agent == uuid.Nil {
		l.agent = other.agent
	}
	for _, left := range slices.Clone(other.waiting) {
		l.put("", made(left.value))
		other.drop(left.key)
	}
	l.found = l.stamp
}

// save brings the file up to what waits. Of several at once one writes for all.
func (l *lane[T]) save() {
	if l.shelf == nil {
		return
	}
	l.shelf.write(func(written uint64) (shelved, uint64) {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.changes == written {
			return shelved{}, written
		}
		content := shelved{Agent: l.agent, Reports: make([]shelvedReport, len(l.waiting))}
		for i, r := range l.waiting {
			content.Reports[i] = shelvedReport{r.key, r.body}
		}
		return content, l.changes
	})
}

// recover takes up what an earlier process left.
func (l *lane[T]) recover() {
	content := l.shelf.read()
	l.agent = content.Agent
	for _, kept := range content.Reports[max(0, len(content.Reports)-l.bound):] {
		var none T
		value := none.ProtoReflect().New().Interface().(T)
		if err := proto.Unmarshal(kept.Body, value); err != nil {
			l.log.Warn("a report that berthd left cannot be read; it is dropped", "reports", l.name, "err", err)
			continue
		}
		l.stamp++
		l.waiting = append(l.waiting, report[T]{kept.Key, value, kept.Body, l.stamp})
	}
	l.found = l.stamp
}

// belongTo says whose reports they are from now on. What an earlier process left of another agent is dropped.
func (l *lane[T]) belongTo(agent uuid.UUID) {
	l.mu.Lock()
	same := l.agent == agent
	if !same && l.agent != uuid.Nil {
		l.waiting = slices.DeleteFunc(l.waiting, func(r report[T]) bool { return r.stamp <= l.found })
	}
	if l.agent = agent; !same {
		l.changes++
	}
	l.mu.Unlock()
	l.save()
}

// sync makes what was saved survive a loss of power.
func (l *lane[T]) sync() {
	if l.shelf != nil {
		l.shelf.sync()
	}
}

// hasten wakes deliver when there is a hurry.
func (l *lane[T]) hasten() { notify(l.wake) }

func (l *lane[T]) String() string { return l.name }

func (l *lane[T]) backlog() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return int64(len(l.waiting))
}

// peek returns the reports of the next call. If all that wait rest, it returns none, and for how long they do.
func (l *lane[T]) peek() (batch []report[T], rest time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now, used := time.Now(), 0
	for _, r := range l.waiting {
		if left := l.rests[r.key].Sub(now); left > 0 && l.hurry.Load() == 0 {
			if rest == 0 || left < rest {
				rest = left
			}
			continue
		}
		used += l.cost(r.value)
		if len(batch) > 0 && used > l.room {
			break
		}
		batch = append(batch, r)
	}
	return batch, rest
}

// remove drops those of batch that nothing newer has replaced, and lets their keys rest.
func (l *lane[T]) remove(batch []report[T]) {
	l.mu.Lock()
	l.waiting = slices.DeleteFunc(l.waiting, func(w report[T]) bool {
		return slices.ContainsFunc(batch, func(b report[T]) bool { return b.stamp == w.stamp })
	})
	l.changes++
	if l.pace > 0 {
		now := time.Now()
		maps.DeleteFunc(l.rests, func(_ string, until time.Time) bool { return !now.Before(until) })
		for _, r := range batch {
			l.rests[r.key] = now.Add(l.pace)
		}
	}
	l.mu.Unlock()
	l.save()
	l.done()
}

// await waits until there may be a report to send: for a new one, and for one that rests.
func (l *lane[T]) await(ctx context.Context, rest time.Duration) {
	var rested <-chan time.Time
	if rest > 0 {
		timer := time.NewTimer(rest)
		defer timer.Stop()
		rested = timer.C
	}
	select {
	case <-ctx.Done():
	case <-l.wake:
	case <-rested:
	}
}

// deliver sends what waits and what comes until ctx ends.
func (l *lane[T]) deliver(ctx context.Context, on link) {
	absent := !on.version.AtLeast(l.since)
	var retry retry
	for ctx.Err() == nil {
		batch, rest := l.peek()
		if len(batch) == 0 {
			l.await(ctx, rest)
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
				keep := l.must || undecided(err)
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

// undecided tells whether err says nothing about the report: there was no answer, or the server has a trouble
// of its own.
func undecided(err error) bool {
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, errNoAnswer) || rpc.Code(err) == wire.CodeUnavailable
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
