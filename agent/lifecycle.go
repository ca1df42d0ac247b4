package agent

import (
	"bytes"
	"context"
	"slices"
	"time"

	"github.com/berthd/berth/scripts"
	"github.com/berthd/berth/wire/agentpb"
)

// runOpen is the innermost stage: while it runs, the workspace is open to peers. Its end begins that of
// the workspace.
func (a *agent) runOpen(ctx context.Context) error {
	up, ok := a.mesh.wait(ctx)
	if !ok {
		return nil
	}
	a.serving.set(up)
	<-ctx.Done()
	if !a.restarting() {
		a.reporter.Lifecycle(agentpb.Lifecycle_SHUTTING_DOWN)
	}
	a.leaving.set(time.Now().Add(a.cfg.Services.ShutdownTimeout))
	a.close()
	return nil
}

// runWorkspace starts what the manifest says is to be started with the workspace, once that is open to
// peers, and stops it when it closes. Whoever stops a machine may kill what is left after ten seconds, so
// stop scripts run while sessions are ended and peers told; the stage ends after both.
func (a *agent) runWorkspace(ctx context.Context) error {
	a.scripts.TakeUp() // at once: they wait for somebody who takes what they print
	if _, ok := a.serving.wait(ctx); !ok {
		a.stopUnopened()
		return nil
	}
	m := a.first.value
	a.settleEditors(m)
	open, cancel := a.whileOpen(ctx)
	defer cancel()
	state := a.startWorkspace(open, m)
	if open.Err() == nil {
		a.log.Info("ready", "state", stateName(state))
		a.emit(Event{Step: StepReady, Detail: stateName(state)})
	}
	<-open.Done()
	if a.restarting() {
		a.scripts.Leave()
	} else {
		a.stopWorkspace()
	}
	<-ctx.Done()
	return nil
}

// whileOpen returns a context that also ends when the workspace closes.
func (a *agent) whileOpen(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	unhook := context.AfterFunc(a.closing, cancel)
	return ctx, func() { unhook(); cancel() }
}

// startWorkspace runs the start scripts, unless a berthd before us did in this boot. Those that it has left it takes up.
func (a *agent) startWorkspace(ctx context.Context, m *agentpb.Manifest) agentpb.Lifecycle_State {
	own := a.ownScripts(m)
	note, ran := loadStartup(a.cfg.State, bootID(), optionalID(m.GetAgentId()))
	if ran && note.Progress == nil {
		state := note.state()
		a.log.Info("start scripts ran before in this boot; not running them again", "state", stateName(state))
		a.reporter.Lifecycle(state)
		a.scripts.Adopt(own)
		return state
	}
	began := time.Now()
	var result scripts.Result
	if ran {
		a.log.Info("start scripts go on that were begun before berthd was started again", "scripts", len(note.Progress.Runs))
		result = a.scripts.Resume(ctx, own, *note.Progress)
	} else {
		a.reporter.Lifecycle(agentpb.Lifecycle_STARTING)
		if left := len(m.GetScripts()) - len(own); left > 0 {
			a.log.Warn("dev containers are declared, which berthd does not start by itself", "count", left,
				"fix", "run devcontainer up in the workspace, or let the server recreate them")
		}
		result = a.scripts.Start(ctx, own)
	}
	if ctx.Err() != nil {
		return agentpb.Lifecycle_STARTING
	}
	state := result.State()
	a.log.Info("start scripts ended", "state", stateName(state), "scripts", len(own), "took", time.Since(began).Round(time.Millisecond))
	a.reporter.Lifecycle(state)
	a.remember(startup{Outcome: state.String()})
	return state
}

// noteProgress remembers how far the start scripts are.
func (a *agent) noteProgress(p scripts.Progress) { a.remember(startup{Progress: &p}) }

// ownScripts are those that are run as scripts. One with the id of a dev container is no script unless the
// feature is off: it gives that its log source.
func (a *agent) ownScripts(m *agentpb.Manifest) []*agentpb.WorkspaceAgentScript {
	if a.cfg.Services.NoDevcontainers || len(m.GetParentId()) > 0 {
		return m.GetScripts()
	}
	return slices.DeleteFunc(slices.Clone(m.GetScripts()), func(s *agentpb.WorkspaceAgentScript) bool {
		return len(s.GetId()) > 0 && slices.ContainsFunc(m.GetDevcontainers(), func(d *agentpb.WorkspaceAgentDevcontainer) bool {
			return bytes.Equal(d.GetId(), s.GetId())
		})
	})
}

// lastSteps is what stop scripts leave of a shutdown's time, or a quarter of it if that is less: for terminals to end, and for the reports of how the
// scripts did.
const lastSteps = 5 * time.Second

// stopWorkspace runs the stop scripts at once, all within one budget.
func (a *agent) stopWorkspace() {
	result := a.stopScripts()
	a.log.Info("stop scripts ended", "state", stateName(result.State()))
	a.reporter.Lifecycle(result.State())
	if err := forgetStartup(a.cfg.State); err != nil {
		a.log.Warn("start scripts will not run at the next start", "error", err)
	}
}

func (a *agent) stopScripts() scripts.Result {
	total := a.cfg.Services.ShutdownTimeout
	ctx, cancel := context.WithTimeout(context.Background(), a.inTime(total-min(lastSteps, total/4)))
	defer cancel()
	return a.scripts.Stop(ctx)
}

// minStep is what a last step gets when the time for a shutdown is over: enough for one that meets no trouble.
const minStep = 500 * time.Millisecond

// inTime bounds the time of a step by what is left for the shutdown.
func (a *agent) inTime(step time.Duration) time.Duration {
	over, ok := a.leaving.now()
	if !ok { // nothing was open yet
		return step
	}
	return min(step, max(minStep, time.Until(over)))
}

// stopUnopened runs the stop scripts of a workspace that a berthd before us started in this boot, and that we could not open: the server is away,
// most likely.
func (a *agent) stopUnopened() {
	if a.restarting() {
		a.scripts.Leave()
		return
	}
	m, ok := loadManifest(a.cfg.State)
	if ok {
		_, ok = loadStartup(a.cfg.State, bootID(), optionalID(m.GetAgentId()))
	}
	if !ok { // it was not started
		a.stopScripts() // that are held nevertheless
		return
	}
	if a.manifest.Load() == nil {
		a.shell.Update(m, a.token())
	}
	a.reporter.Lifecycle(agentpb.Lifecycle_SHUTTING_DOWN)
	a.scripts.Adopt(a.ownScripts(m))
	a.stopWorkspace()
}

// remember notes what became of the start scripts. Without the note they run again after a crash.
func (a *agent) remember(note startup) {
	note.Boot, note.AgentID = bootID(), optionalID(a.manifest.Load().GetAgentId())
	if err := note.save(a.cfg.State); err != nil {
		a.log.Warn("start scripts would run again should berthd be restarted", "error", err)
	}
}
