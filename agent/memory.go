package agent

import (
	"context"
	"time"

	"github.com/berthd/berth/usage"
)

// killsEvery is how often the OOM killer's counters are read: a few small files, some 100 µs.
const killsEvery = 5 * time.Second

// watchMemory is the stage that tells when the OOM killer ended something in the workspace.
func (a *agent) watchMemory(ctx context.Context) error {
	tick := time.NewTicker(killsEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if rise, ok := a.cfg.Life.killed(usage.OOMKills()); ok {
			a.log.Warn("the OOM killer ended processes in this workspace", "count", rise.To-rise.From, "counter", rise.File, "fix", MemoryFix)
		}
	}
}
