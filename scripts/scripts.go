// Package scripts runs the start, stop and cron scripts of a workspace.
//
// A [Runner] is made with [New]. [Runner.Start] runs the start scripts and then follows the cron
// tables; [Runner.Stop] ends what runs, runs the stop scripts and returns when nothing is left
// behind. What a script prints goes line by line to its log source and raw to its log file.
//
// A script is done when its process exits. A child that it left in the background may go on
// printing: its output is followed, and a warning in the log names it.
//
// Each script is held by a process of its own ([hold.RunProcess]), so that it lives on when this one ends: [Runner.Leave] lets go of what
// runs. The runner of the next process finds it by [Runner.TakeUp], and [Runner.Resume] goes on where Start was.
package scripts

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/berthd/berth/mask"
	"github.com/berthd/berth/scripts/hold"
	"github.com/berthd/berth/shell"
	"github.com/berthd/berth/wire/agentpb"
)

// Config says what scripts run with.
type Config struct {
	// Shell builds the commands. It must have a manifest before a script runs.
	Shell *shell.Workspace
	// Logs opens a log source for words of ours. Nil discards them.
	Logs func(source uuid.UUID, level agentpb.Log_Level) io.WriteCloser
	// Stream opens a stream of a log source for what a script prints. id names the stream to a later process, which is given the
	// first byte that is kept. Nil is what Logs opens.
	Stream func(source uuid.UUID, level agentpb.Log_Level, id uuid.UUID, kept uint64) hold.Taker
	// Forget is called when nobody will ask for a stream any more. Nil is for nothing.
	Forget func(id uuid.UUID)
	// Holder makes the command of a process that calls [hold.RunProcess]; of several the first that works is used. Nil: scripts are held in
	// this process, and end with it.
	Holder func() []*exec.Cmd
	// HoldDir is where later processes find what is held, in sockets of the workspace's user whose names take [HoldName] bytes.
	HoldDir string
	// Progress is called before start scripts run and whenever one has ended. Nil is for nothing.
	Progress func(Progress)
	// Mask has the secrets that are hidden in what scripts print. A script that outlives this process takes them to the next. Nil has none.
	Mask *mask.Masker
	// Completed is called once for each run, from any goroutine. Nil reports nothing.
	Completed func(*agentpb.Timing)
	// LogDir holds the log files of scripts that name none.
	LogDir string
	// DataDir holds what scripts keep between runs, and BinDir below it.
	DataDir string
	// Log gets what went wrong outside of the scripts; nil discards it.
	Log *slog.Logger
}

// BinDir returns the directory below dataDir in which scripts leave commands for the workspace. It
// belongs first in PATH; see [shell.Config].
func BinDir(dataDir string) string { return filepath.Join(dataDir, dataName, "bin") }

// Runner runs scripts. Its methods may be called at the same time.
type Runner struct {
	cfg Config

	// running ends when Stop begins: what runs then is hung up. alive ends when Stop does: what
	// still runs then is killed, and no more output is read.
	running, alive context.Context
	hangUp         context.CancelFunc
	kill           context.CancelCauseFunc

	following sync.WaitGroup // every goroutine

	pipeGrace, hangupGrace time.Duration

	mu      sync.Mutex
	scripts []*agentpb.WorkspaceAgentScript
	taken   []*takenUp
	stopped bool
}

// New returns a runner without scripts.
func New(cfg Config) *Runner {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Logs == nil {
		cfg.Logs = func(uuid.UUID, agentpb.Log_Level) io.WriteCloser { return discard{} }
	}
	if cfg.Completed == nil {
		cfg.Completed = func(*agentpb.Timing) {}
	}
	if cfg.Forget == nil {
		cfg.Forget = func(uuid.UUID) {}
	}
	if cfg.Progress == nil {
		cfg.Progress = func(Progress) {}
	}
	r := &Runner{cfg: cfg, pipeGrace: pipeGrace, hangupGrace: shell.HangupGrace}
	r.alive, r.kill = context.WithCancelCause(context.Background())
	r.running, r.hangUp = context.WithCancel(r.alive)
	return r
}

type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }
func (discard) Close() error                { return nil }

// Start runs all start scripts at the same time, returns when they have ended, and from then on
// runs cron scripts when they are due. When ctx ends it returns without waiting for those that still
// run: [Runner.Stop] or [Runner.Leave] is to be next. It is to be called once, instead of [Runner.Adopt] or [Runner.Resume].
func (r *Runner) Start(ctx context.Context, scripts []*agentpb.WorkspaceAgentScript) Result {
	r.know(scripts)
	runs := r.chosen(agentpb.Timing_START, (*agentpb.WorkspaceAgentScript).GetRunOnStart)
	p := Progress{}
	for _, run := range runs {
		p.Runs = append(p.Runs, run.id)
	}
	r.cfg.Progress(p)
	ended, _ := r.begin(r.running, runs)
	return r.awaitStart(ctx, p, ended)
}

// Adopt takes over scripts whose start has been run by an earlier process: cron scripts run when
// they are due, and Stop knows what to run.
func (r *Runner) Adopt(scripts []*agentpb.WorkspaceAgentScript) {
	r.know(scripts)
	r.settleOthers(nil)
	r.followCron()
}

// Resume is Start for scripts of which an earlier process came as far as p says. What was running and is not held any more
// counts as failed. [Runner.TakeUp] comes before it.
func (r *Runner) Resume(ctx context.Context, scripts []*agentpb.WorkspaceAgentScript, p Progress) Result {
	r.know(scripts)
	r.settleOthers(p.Runs)
	ended := make(chan outcome)
	for _, id := range p.Runs {
		held := r.heldAs(func(t tag) bool { return t.Run == id })
		if held == nil {
			r.cfg.Log.Warn("a start script was cut off with berthd; it counts as failed", "run", id)
		}
		r.beside(func() {
			o := outcome{run: id, status: agentpb.Timing_EXIT_FAILURE}
			if held != nil {
				<-held.ended
				o = held.outcome
			}
			select {
			case ended <- o:
			case <-r.alive.Done():
			}
		})
	}
	return r.awaitStart(ctx, p, ended)
}

// settleOthers settles start scripts that were taken up and have been counted.
func (r *Runner) settleOthers(uncounted []uuid.UUID) {
	r.mu.Lock()
	taken := r.taken
	r.mu.Unlock()
	for _, t := range taken {
		if t.Stage == agentpb.Timing_START && !slices.Contains(uncounted, t.Run) {
			r.beside(func() {
				<-t.ended
				t.outcome.settle()
			})
		}
	}
}

func (r *Runner) know(scripts []*agentpb.WorkspaceAgentScript) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.scripts = scripts
}

// awaitStart waits for the start scripts that p says run.
func (r *Runner) awaitStart(ctx context.Context, p Progress, ended <-chan outcome) Result {
	for len(p.Runs) > 0 {
		select {
		case o := <-ended:
			if o.left {
				continue // and ctx ends
			}
			p.count(o)
			r.cfg.Progress(p)
			o.settle()
		case <-ctx.Done():
			p.Failed++ // nobody asks any more how they did
			return p.result()
		case <-r.running.Done():
			p.Failed++
			return p.result()
		}
	}
	r.followCron()
	return p.result()
}

// Progress tells how far start scripts are, for another process to go on from there.
type Progress struct {
	// Runs are those that have not ended.
	Runs []uuid.UUID `json:"runs"`
	// TimedOut and Failed are as in [Result], of those that have.
	TimedOut int `json:"timed_out"`
	Failed   int `json:"failed"`
}

func (p *Progress) count(o outcome) {
	p.Runs = slices.DeleteFunc(slices.Clone(p.Runs), func(id uuid.UUID) bool { return id == o.run })
	result := p.result()
	result.count(o)
	p.TimedOut, p.Failed = result.TimedOut, result.Failed
}

func (p Progress) result() Result {
	return Result{Stage: agentpb.Timing_START, TimedOut: p.TimedOut, Failed: p.Failed}
}

// Leave lets go of what runs, for the runner of another process to take up, and returns when this one does nothing any more.
func (r *Runner) Leave() {
	r.mu.Lock()
	r.stopped = true
	r.mu.Unlock()
	if r.cfg.Holder != nil {
		r.kill(errLeft)
	} else {
		r.kill(nil)
	}
	r.following.Wait()
}

// stopMargin is what a hung-up script has to end before it is killed, and how much of Stop's time is left for that.
const stopMargin = 2 * time.Second

// errLeft is why a runner is not alive any more when what it runs lives on.
var errLeft = errors.New("scripts are left to another process")

// Stop hangs up what runs, runs all stop scripts at the same time and returns when they have ended
// and nothing is being followed any more, at the latest shortly after ctx ends. A runner that has
// been stopped runs nothing any more.
func (r *Runner) Stop(ctx context.Context) Result {
	r.mu.Lock()
	again := r.stopped
	r.stopped = true
	r.mu.Unlock()
	if again {
		return Result{Stage: agentpb.Timing_STOP}
	}
	r.hangUp()
	defer context.AfterFunc(ctx, func() { r.kill(nil) })()
	runCtx, cancel := ctx, context.CancelFunc(func() {})
	if deadline, ok := ctx.Deadline(); ok {
		runCtx, cancel = context.WithDeadlineCause(ctx, deadline.Add(-min(stopMargin, time.Until(deadline)/4)), errNoBudget)
	}
	defer cancel()
	runs := r.chosen(agentpb.Timing_STOP, (*agentpb.WorkspaceAgentScript).GetRunOnStop)
	ended, settled := r.begin(runCtx, runs)
	result := Result{Stage: agentpb.Timing_STOP}
	for range runs {
		result.count(<-ended)
	}
	select {
	case <-settled:
	case <-ctx.Done():
	}
	r.kill(nil)
	r.following.Wait()
	return result
}

// chosen makes a run of each script that is chosen for a stage.
func (r *Runner) chosen(stage agentpb.Timing_Stage, chosen func(*agentpb.WorkspaceAgentScript) bool) (runs []*run) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.scripts {
		if chosen(s) {
			runs = append(runs, newRun(s, stage))
		}
	}
	return runs
}

// beside runs f beside the caller, unless the runner was stopped.
func (r *Runner) beside(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.stopped {
		r.following.Go(f)
	}
}

// begin runs runs at the same time. Each outcome comes when the script has ended; settled is closed when all have been reported.
func (r *Runner) begin(ctx context.Context, runs []*run) (ended <-chan outcome, settled <-chan struct{}) {
	outcomes := make(chan outcome, len(runs))
	var reporting sync.WaitGroup
	for _, run := range runs {
		reporting.Add(1)
		beside := r.beside
		if run.stage == agentpb.Timing_STOP { // and Stop waits for us
			beside = r.following.Go
		}
		beside(func() { outcomes <- r.run(ctx, run, reporting.Done) })
	}
	reported := make(chan struct{})
	go func() {
		reporting.Wait()
		close(reported)
	}()
	return outcomes, reported
}

// Result tells how the scripts of one stage ended. Cron scripts have none.
type Result struct {
	Stage    agentpb.Timing_Stage
	TimedOut int // scripts that ran out of time
	Failed   int // scripts that could not be started or exited with another code than 0
}

func (r *Result) count(o outcome) {
	switch o.status {
	case agentpb.Timing_TIMED_OUT:
		r.TimedOut++
	case agentpb.Timing_EXIT_FAILURE:
		r.Failed++
	}
}

// State returns the lifecycle state that the workspace is in after this stage.
func (r Result) State() agentpb.Lifecycle_State {
	timeout, failure, fine := agentpb.Lifecycle_START_TIMEOUT, agentpb.Lifecycle_START_ERROR, agentpb.Lifecycle_READY
	if r.Stage == agentpb.Timing_STOP {
		timeout, failure, fine = agentpb.Lifecycle_SHUTDOWN_TIMEOUT, agentpb.Lifecycle_SHUTDOWN_ERROR, agentpb.Lifecycle_OFF
	}
	switch {
	case r.TimedOut > 0:
		return timeout
	case r.Failed > 0:
		return failure
	}
	return fine
}
