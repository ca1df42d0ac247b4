package agent

import (
	"context"
	"fmt"
	"log/slog"
	"time"
)

// stage is one of the nested lifetimes.
type stage struct {
	name string
	// run blocks until ctx is done and its work is wound up, and returns nil then. Anything it
	// returns earlier ends the whole nest.
	run func(ctx context.Context) error
	// ready is closed when the next stage may start; nil means at once.
	ready <-chan struct{}
	// budget is how long run may take to return once told to stop.
	budget time.Duration
}

// runStages starts the stages in order, waits until ctx is done or one of them ends by itself, and
// stops those that were started in reverse order. It returns the error of the stage that ended
// early, or nil.
//
// Each stage has a context that outlives ctx: it is cancelled when the stage's own turn to stop has
// come, so that what is stopped first still has everything it was built on.
func runStages(ctx context.Context, log *slog.Logger, stages []stage) error {
	type running struct {
		stage
		stop func()
		done chan error
	}
	ended := make(chan error, len(stages))
	var started []running
	var failure error

start:
	for _, s := range stages {
		stageCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
		r := running{s, stop, make(chan error, 1)}
		started = append(started, r)
		go func() {
			err := s.run(stageCtx)
			if err != nil {
				err = fmt.Errorf("%s: %w", s.name, err)
			} else if stageCtx.Err() == nil {
				err = fmt.Errorf("%s: ended without being told to", s.name)
			}
			r.done <- err
			ended <- err
		}()
		if s.ready == nil {
			continue
		}
		select {
		case <-s.ready:
		case failure = <-ended:
			break start
		case <-ctx.Done():
			break start
		}
	}
	if failure == nil {
		select {
		case <-ctx.Done():
		case failure = <-ended:
		}
	}

	for i := len(started) - 1; i >= 0; i-- {
		s := started[i]
		s.stop()
		budget, began := time.NewTimer(s.budget), time.Now()
		select {
		case err := <-s.done:
			log.Debug("stopped", "part", s.name, "took", time.Since(began))
			if err != nil && failure == nil {
				failure = err
			}
		case <-budget.C:
			log.Warn("a part of berthd did not stop in time and is left behind", "part", s.name, "budget", s.budget)
		}
		budget.Stop()
	}
	return failure
}
