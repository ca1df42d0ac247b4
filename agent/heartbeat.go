package agent

import (
	"context"
	"time"
)

// Heartbeat tells a supervisor that the agent is alive. The zero value tells nobody.
type Heartbeat struct {
	// Every is the pause between two beats, and Beat is called for each, as long as the parts that
	// all else goes through, the reports and the mesh, can be asked something. Beat must not block.
	Every time.Duration
	Beat  func()
}

// runHeartbeat is the stage that beats. A part that is stuck stops it for good, which is the purpose.
func (a *agent) runHeartbeat(ctx context.Context) error {
	if a.cfg.Heartbeat.Beat == nil {
		<-ctx.Done()
		return nil
	}
	tick := time.NewTicker(a.cfg.Heartbeat.Every)
	defer tick.Stop()
	for {
		a.askParts()
		a.cfg.Heartbeat.Beat()
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// askParts returns when each of the parts has answered.
func (a *agent) askParts() {
	a.reporter.Backlog()
	if up, ok := a.mesh.now(); ok {
		up.node.Home()
	}
}
