package client

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

// next returns how long to wait before the next attempt.
func (b *backoff) next() time.Duration {
	b.ceiling = min(max(b.min, 2*b.ceiling), b.max)
	return rand.N(b.ceiling) + time.Millisecond
}

// reset forgets past failures.
func (b *backoff) reset() { b.ceiling = 0 }

// Pace says how soon an agent tries again to link, by what can be done about the trouble. It is not
// for use by several at the same time.
type Pace struct {
	// Known says that the server knew this machine before: if it knows it twice now, the workspace is
	// being built anew.
	Known bool

	quick   *backoff // it passes by itself
	early   *backoff // it passes when the server is done with something
	refused *backoff // another token, or the workspace's new build, may be on its way
	patient *backoff // somebody has to act
	rare    *backoff // somebody has to change this machine's settings
}

// NewPace returns the pace of one that has not failed yet.
func NewPace() *Pace {
	return &Pace{
		quick:   &backoff{min: 100 * time.Millisecond, max: 10 * time.Second},
		early:   &backoff{min: time.Second, max: 10 * time.Second},
		refused: &backoff{min: time.Second, max: 20 * time.Second},
		patient: &backoff{min: 2 * time.Second, max: time.Minute},
		rare:    &backoff{min: 10 * time.Second, max: 2 * time.Minute},
	}
}

// After returns how long to wait. A server that says when to come is asked no sooner; those that
// were told the same come spread over the quarter of it that follows.
func (p *Pace) After(problem *Problem) time.Duration {
	if wait := problem.RetryAfter; wait > 0 {
		return wait + rand.N(wait/4+time.Millisecond)
	}
	return p.of(problem.Kind).next()
}

func (p *Pace) of(k Kind) *backoff {
	switch k {
	case KindRefused, KindUnknown:
		// Machines boot before the build that declares them is done: a stock server answers 404 so long.
		return p.refused
	case KindEarly:
		return p.early
	case KindAmbiguous:
		if p.Known {
			return p.refused
		}
		return p.rare
	case KindAddress, KindOften:
		return p.patient
	}
	return p.quick
}

// Soon returns how long to wait where trying at once may well help, whatever the trouble.
func (p *Pace) Soon() time.Duration { return p.quick.next() }

// Reset forgets past failures.
func (p *Pace) Reset() {
	for _, b := range []*backoff{p.quick, p.early, p.refused, p.patient, p.rare} {
		b.reset()
	}
}
