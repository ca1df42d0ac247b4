package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/berthd/berth/wire"
)

// startPoll is how often the server is asked whether a workspace's start scripts have ended.
const startPoll = 500 * time.Millisecond

// nowFlag lets a person in to mend a start script that does not end.
func nowFlag(cmd *cobra.Command) *bool {
	return cmd.Flags().Bool("now", false, "go in at once, even while start scripts run that others wait for")
}

// enter reaches an agent as [program.reach] does, for somebody who wants to work there: it waits until the start scripts have ended, if one of them asks
// for that.
func (p *program) enter(ctx context.Context, name string, wait time.Duration, now bool) (*mesh, error) {
	m, err := p.reach(ctx, name, wait)
	if err != nil || now {
		return m, err
	}
	if err := p.awaitStart(ctx, m); err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

// awaitStart waits for start scripts that block the login. A server that cannot say how they do keeps nobody out.
func (p *program) awaitStart(ctx context.Context, m *mesh) error {
	if m.agent.Status == wire.AgentConnected && settled(m.agent.LifecycleState) {
		return nil // as it was a moment ago
	}
	tick := time.NewTicker(startPoll)
	defer tick.Stop()
	for told := false; ; told = true {
		a, err := m.server.Agent(ctx, m.agent.ID)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			fmt.Fprintf(p.errOut, "berth: not waiting for start scripts: %v\n", m.server.problem("ask how they do", err))
			return nil
		case a.StartupScriptBehavior != "blocking":
			return nil
		case settled(a.LifecycleState):
			if a.LifecycleState != "ready" && told {
				fmt.Fprintf(p.errOut, "berth: the start scripts of %[1]s ended as %[2]s; see berth logs %[1]s\n", clean(a.Name), a.LifecycleState)
			}
			return nil
		case !told:
			fmt.Fprintf(p.errOut, "berth: %[1]s runs its start scripts, which the login waits for; berth logs -f %[1]s shows them, --now goes in at once\n", clean(a.Name))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// settled tells whether a workspace in this state of its life has no start scripts to wait for.
func settled(lifecycle string) bool { return lifecycle != "created" && lifecycle != "starting" }
