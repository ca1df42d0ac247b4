package agent

import (
	"context"
	"time"

	"github.com/berthd/berth/wire/agentpb"
)

// runWorkspace is the innermost stage: it opens the mesh to peers, starts what the manifest says is
// to be started with the workspace, and stops it at the end.
func (a *agent) runWorkspace(ctx context.Context) error {
	up, ok := a.mesh.wait(ctx)
	if !ok {
		return nil
	}
	a.serving.set(up)
	m := a.first.value

	state := a.startWorkspace(ctx, m)
	if ctx.Err() == nil {
		a.log.Info("ready", "state", stateName(state))
		a.emit(Event{Step: StepReady, Detail: stateName(state)})
	}
	<-ctx.Done()
	if !a.restarting() {
		a.stopWorkspace()
	}
	return nil
}

// startWorkspace runs the start scripts, unless a berthd before us did in this boot.
func (a *agent) startWorkspace(ctx context.Context, m *agentpb.Manifest) agentpb.Lifecycle_State {
	note, ran := loadStartup(a.cfg.State, bootID(), optionalID(m.GetAgentId()))
	if ran {
		state := note.state()
		if note.Outcome == "" {
			a.log.Warn("berthd was cut off while start scripts ran; they are not run again in this boot", "state", stateName(state))
		} else {
			a.log.Info("start scripts ran before in this boot; not running them again", "state", stateName(state))
		}
		a.reporter.Lifecycle(state)
		a.scripts.Adopt(m.GetScripts())
		return state
	}
	note = startup{Boot: bootID(), AgentID: optionalID(m.GetAgentId())}
	a.remember(note)
	a.reporter.Lifecycle(agentpb.Lifecycle_STARTING)
	began := time.Now()
	result := a.scripts.Start(ctx, m.GetScripts())
	if ctx.Err() != nil {
		return agentpb.Lifecycle_STARTING
	}
	state := result.State()
	a.log.Info("start scripts ended", "state", stateName(state), "scripts", len(m.GetScripts()), "took", time.Since(began).Round(time.Millisecond))
	a.reporter.Lifecycle(state)
	note.Outcome = state.String()
	a.remember(note)
	return state
}

// stopWorkspace runs the stop scripts at once, all within one budget.
func (a *agent) stopWorkspace() {
	ctx, cancel := context.WithTimeout(context.Background(), a.cfg.Services.StopTimeout)
	defer cancel()
	a.reporter.Lifecycle(agentpb.Lifecycle_SHUTTING_DOWN)
	result := a.scripts.Stop(ctx)
	a.log.Info("stop scripts ended", "state", stateName(result.State()))
	a.reporter.Lifecycle(result.State())
	if err := forgetStartup(a.cfg.State); err != nil {
		a.log.Warn("start scripts will not run at the next start", "error", err)
	}
}

// remember notes what became of the start scripts. Without the note they run again after a crash.
func (a *agent) remember(note startup) {
	if err := note.save(a.cfg.State); err != nil {
		a.log.Warn("start scripts would run again should berthd be restarted", "error", err)
	}
}
