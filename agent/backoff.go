package agent

import (
	"math/rand/v2"
	"time"
)

// backoff spaces attempts. Its delays are drawn from the whole range below a ceiling that doubles,
// so that many agents that lost one server do not come back together.
type backoff struct {
	min, max time.Duration
	ceiling  time.Duration
}

// quickBackoff is for troubles that pass by themselves, patientBackoff for those that wait for a person
// or for a machine to be registered.
func quickBackoff() *backoff   { return &backoff{min: 100 * time.Millisecond, max: 10 * time.Second} }
func patientBackoff() *backoff { return &backoff{min: 2 * time.Second, max: time.Minute} }

// next returns how long to wait before the next attempt.
func (b *backoff) next() time.Duration {
	b.ceiling = min(max(b.min, 2*b.ceiling), b.max)
	return rand.N(b.ceiling) + time.Millisecond
}

// reset forgets past failures.
func (b *backoff) reset() { b.ceiling = 0 }
