package agent

import (
	"log/slog"
	"sync"
	"time"
)

const (
	// The same trouble is told again after a minute, then after ever longer, at least once an hour.
	firstReminder = time.Minute
	lastReminder  = time.Hour
)

// trouble tells a person what is wrong once, and then reminds them with growing intervals for as
// long as it stays wrong in the same way.
type trouble struct {
	log *slog.Logger

	mu       sync.Mutex
	cause    string
	attempts int
	told     time.Time
	interval time.Duration
}

// report takes one failed attempt. It returns true if it said something.
func (t *trouble) report(cause, fix string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	if cause != t.cause {
		t.cause, t.attempts, t.interval = cause, 0, firstReminder
	} else if now.Sub(t.told) < t.interval {
		t.attempts++
		return false
	} else {
		t.interval = min(2*t.interval, lastReminder)
	}
	t.attempts++
	t.told = now
	attrs := []any{}
	if fix != "" {
		attrs = append(attrs, "fix", fix)
	}
	if t.attempts > 1 {
		attrs = append(attrs, "attempts", t.attempts)
	}
	t.log.Warn(cause, attrs...)
	return true
}

// active tells whether the last thing heard was bad.
func (t *trouble) active() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.cause != ""
}

// clear takes a success.
func (t *trouble) clear() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.cause != "" {
		t.log.Info("that trouble is over", "was", t.cause, "attempts", t.attempts)
	}
	t.cause, t.attempts = "", 0
}
