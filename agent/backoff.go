package agent

import (
	"math/rand/v2"
	"time"

	"github.com/berthd/berth/client"
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

// pace says how soon to try again, by what can be done about the trouble.
type pace struct {
	quick   *backoff // it passes by itself
	early   *backoff // it passes when the server is done with something
	refused *backoff // another token may be handed over
	patient *backoff // somebody has to act, or register this machine
	rare    *backoff // somebody has to change this machine's settings
}

func newPace() *pace {
	return &pace{
		quick:   &backoff{min: 100 * time.Millisecond, max: 10 * time.Second},
		early:   &backoff{min: time.Second, max: 10 * time.Second},
		refused: &backoff{min: time.Second, max: 20 * time.Second},
		patient: &backoff{min: 2 * time.Second, max: time.Minute},
		rare:    &backoff{min: 10 * time.Second, max: 2 * time.Minute},
	}
}

// after returns how long to wait. A server that says when to come is asked no sooner; those that
// were told the same come spread over the quarter of it that follows.
func (p *pace) after(problem *client.Problem) time.Duration {
	if wait := problem.RetryAfter; wait > 0 {
		return wait + rand.N(wait/4+time.Millisecond)
	}
	return p.of(problem.Kind).next()
}

func (p *pace) of(k client.Kind) *backoff {
	switch k {
	case client.KindRefused:
		return p.refused
	case client.KindEarly:
		return p.early
	case client.KindUnknown, client.KindAddress, client.KindOften:
		return p.patient
	case client.KindAmbiguous:
		return p.rare
	}
	return p.quick
}

func (p *pace) reset() {
	for _, b := range []*backoff{p.quick, p.early, p.refused, p.patient, p.rare} {
		b.reset()
	}
}
