package scripts

import (
	"context"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/robfig/cron/v3"

	"github.com/berthd/berth/wire/agentpb"
)

// cronParser reads sec min hour day month [weekday].
var cronParser = cron.NewParser(cron.Second | cron.Minute | cron.Hour | cron.Dom | cron.Month | cron.DowOptional)

// clockStep is how often a waiting cron script looks at the clock: it may be set, and the machine
// may have slept.
const clockStep = 30 * time.Second

// followCron runs every script with a cron table when it is due, until Stop.
func (r *Runner) followCron() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stopped {
		return
	}
	for _, s := range r.scripts {
		if s.GetCron() == "" {
			continue
		}
		schedule, err := cronParser.Parse(s.GetCron())
		if err != nil {
			r.cfg.Log.Warn("a script's cron table cannot be read; the script does not run", "script", name(s), "err", err)
			if source, idErr := uuid.FromBytes(s.GetLogSourceId()); idErr == nil {
				r.note(source, agentpb.Log_ERROR, fmt.Sprintf("[berth: the script does not run because its cron table %q cannot be read: %v]", s.GetCron(), err))
			}
			continue
		}
		r.following.Go(func() {
			for await(r.running, schedule) {
				r.run(r.running, s, agentpb.Timing_CRON, func() {})
			}
		})
	}
}

// await waits until the schedule is due, by the wall clock; false when ctx has ended or the schedule
// never comes. Times that pass while a script runs are left out, so runs never overlap.
func await(ctx context.Context, schedule cron.Schedule) bool {
	// Round strips the monotonic clock, which stands still while the machine sleeps.
	seen := time.Now().Round(0)
	next := schedule.Next(seen)
	for !next.IsZero() {
		now := time.Now().Round(0)
		if now.Before(seen) { // set back: what was planned may be far off
			next = schedule.Next(now)
		}
		seen = now
		if !now.Before(next) {
			return ctx.Err() == nil
		}
		timer := time.NewTimer(min(next.Sub(now), clockStep))
		select {
		case <-ctx.Done():
			timer.Stop()
			return false
		case <-timer.C:
		}
	}
	return false
}
