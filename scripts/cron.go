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
	scripts := r.scripts
	r.mu.Unlock()
	for _, s := range scripts {
		if s.GetCron() == "" {
			continue
		}
		schedule, err := parseCron(s.GetCron())
		if err != nil {
			r.cfg.Log.Warn("a script's cron table cannot be read; the script does not run", "script", name(s), "err", err)
			if source, idErr := uuid.FromBytes(s.GetLogSourceId()); idErr == nil {
				r.note(source, agentpb.Log_ERROR, fmt.Sprintf("[berth: the script does not run because its cron table %q cannot be read: %v]", s.GetCron(), err))
			}
			continue
		}
		held := r.heldCron(s)
		r.beside(func() {
			if held != nil {
				<-held.ended
			}
			for due, ok := await(r.running, schedule, time.Time{}); ok; due, ok = await(r.running, schedule, due) {
				r.run(r.running, newRun(s, agentpb.Timing_CRON), func() {})
			}
		})
	}
}

// table says when a script is due: by the clock on the wall, as cron(8) does. It holds where the wall clock and time part, twice a year.
type table struct {
	*cron.SpecSchedule
}

// parseCron reads a cron table.
func parseCron(text string) (table, error) {
	parsed, err := cronParser.Parse(text)
	if err != nil {
		return table{}, err
	}
	spec, ok := parsed.(*cron.SpecSchedule)
	if !ok {
		return table{}, fmt.Errorf("%q is no table", text)
	}
	return table{spec}, nil
}

// everyHour are the bits of a table's hours that are all set.
const everyHour = 1<<24 - 1

// Next returns when the table is due next after now, zero if never. Where the clock is set forward, what was to come in the hour that is not there comes at
// its end; where it is set back, what named its hours comes in the first of the two only. What comes every hour does so in each hour that passes.
func (t table) Next(now time.Time) time.Time {
	if t.Hour&everyHour == everyHour {
		return t.SpecSchedule.Next(now)
	}
	zone := t.Location
	if zone == time.Local {
		zone = now.Location()
	}
	// A clock without a zone knows no such hours.
	plain := *t.SpecSchedule
	plain.Location = time.UTC
	shown := now.In(zone)
	wall := time.Date(shown.Year(), shown.Month(), shown.Day(), shown.Hour(), shown.Minute(), shown.Second(), shown.Nanosecond(), time.UTC)
	for {
		wall = plain.Next(wall)
		if wall.IsZero() {
			return wall
		}
		if due := firstAt(wall, zone); due.After(now) {
			return due.In(now.Location())
		}
	}
}

// maxShift is more than any zone moves its clock by at once.
const maxShift = 24 * time.Hour

// firstAt returns when a zone's clock first shows wall, a time in UTC, or has passed over it.
func firstAt(wall time.Time, zone *time.Location) time.Time {
	shows := func(at time.Time) time.Time {
		_, offset := at.In(zone).Zone()
		return at.Add(time.Duration(offset) * time.Second)
	}
	// Zones are at most a day from UTC. From one change of the offset to the next the clock runs evenly.
	at := wall.Add(-maxShift)
	for {
		_, end := at.In(zone).ZoneBounds()
		due := at.Add(wall.Sub(shows(at)))
		switch {
		case due.Before(at): // passed over
			return at
		case end.IsZero() || due.Before(end):
			return due
		}
		at = end
	}
}

// setBack is how far a clock may be set back for a correction: what was run is not run again, as cron(8) has it. Farther back, the clock was wrong
// before, and counts from now on.
const setBack = 3 * time.Hour

// await waits until the schedule is due next after last, by the wall clock, and returns the time it was due for; false when ctx has ended or the schedule
// never comes. However many times passed while the machine slept, the script is due once, when it wakes. Those that passed before this call are left out,
// so runs never overlap.
func await(ctx context.Context, schedule cron.Schedule, last time.Time) (due time.Time, ok bool) {
	after := func(now time.Time) time.Time {
		if now.Before(last) && last.Sub(now) < setBack {
			return last
		}
		return now
	}
	// Round strips the monotonic clock, which stands still while the machine sleeps.
	seen := time.Now().Round(0)
	next := schedule.Next(after(seen))
	for !next.IsZero() {
		now := time.Now().Round(0)
		if now.Before(seen) { // set back: what was planned may be far off
			next = schedule.Next(after(now))
		}
		seen = now
		if !now.Before(next) {
			return next, ctx.Err() == nil
		}
		timer := time.NewTimer(min(next.Sub(now), clockStep))
		select {
		case <-ctx.Done():
			timer.Stop()
			return time.Time{}, false
		case <-timer.C:
		}
	}
	return time.Time{}, false
}
