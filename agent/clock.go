package agent

import (
	"context"
	"time"
)

const (
	// clockTick is how often the clocks are compared.
	clockTick = 2 * time.Second
	// clockJump is how far apart they may drift between two ticks. Steering by NTP moves them by
	// less than a millisecond a tick; a suspended machine wakes with the whole of its sleep.
	clockJump = 5 * time.Second
)

// watchClock calls jumped with the size of each gap between wall time and monotonic time, until ctx
// is done. A gap means the machine slept, was paused, or had its clock set: connections are likely
// dead and certificates may be valid only now.
func watchClock(ctx context.Context, wall func() time.Time, jumped func(time.Duration)) {
	tick := time.NewTicker(clockTick)
	defer tick.Stop()
	// Round strips the monotonic reading, so that wallThen measures wall time alone.
	wallThen, monoThen := wall().Round(0), time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		wallNow, monoNow := wall().Round(0), time.Now()
		gap := wallNow.Sub(wallThen) - monoNow.Sub(monoThen)
		if gap.Abs() >= clockJump {
			jumped(gap)
		}
		wallThen, monoThen = wallNow, monoNow
	}
}
