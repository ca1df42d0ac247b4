// Package scripts runs the start, stop and cron scripts of a workspace.
//
// A [Runner] is made with [New]. [Runner.Start] runs the start scripts and then follows the cron
// tables; [Runner.Stop] ends what runs, runs the stop scripts and returns when nothing is left
// behind. What a script prints goes line by line to its log source and raw to its log file.
//
// A script is done when its process exits. A child that it left in the background may go on
// printing: its output is followed, and a warning in the log names it.
package scripts

import (
	"context"
	"io"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/berthd/berth/shell"
	"github.com/berthd/berth/wire/agentpb"
)

// Config says what scripts run with.
type Config struct {
	// Shell builds the commands. It must have a manifest before a script runs.
	Shell *shell.Workspace
	// Logs opens a stream of a log source. Nil discards what scripts print.
	Logs func(source uuid.UUID, level agentpb.Log_Level) io.WriteCloser
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
	hangUp, kill   context.CancelFunc

	following sync.WaitGroup // every goroutine

	pipeGrace, hangupGrace time.Duration

	mu      sync.Mutex
	scripts []*agentpb.WorkspaceAgentScript
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
	r := &Runner{cfg: cfg, pipeGrace: pipeGrace, hangupGrace: shell.HangupGrace}
	r.alive, r.kill = context.WithCancel(context.Background())
	r.running, r.hangUp = context.WithCancel(r.alive)
	return r
}

type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }
func (discard) Close() error                { return nil }

// Start runs all start scripts at the same time, returns when they have ended, and from then on
// runs cron scripts when they are due. When ctx ends it hangs up those that still run and returns
// without waiting for them. It is to be called once, instead of [Runner.Adopt].
func (r *Runner) Start(ctx context.Context, scripts []*agentpb.WorkspaceAgentScript) Result {
	r.mu.Lock()
	r.scripts = scripts
	r.mu.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(r.running, cancel)()
	result, _ := r.runAll(ctx, agentpb.Timing_START, (*agentpb.WorkspaceAgentScript).GetRunOnStart)
	if ctx.Err() == nil {
		r.followCron()
	}
	return result
}

// Adopt takes over scripts whose start has been run by an earlier process: cron scripts run when
// they are due, and Stop knows what to run.
func (r *Runner) Adopt(scripts []*agentpb.WorkspaceAgentScript) {
	r.mu.Lock()
	r.scripts = scripts
	r.mu.Unlock()
	r.followCron()
}

// stopMargin is how much of Stop's time is left for hung-up scripts to end before they are killed.
const stopMargin = 2 * time.Second

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
	defer context.AfterFunc(ctx, r.kill)()
	runCtx, cancel := ctx, context.CancelFunc(func() {})
	if deadline, ok := ctx.Deadline(); ok {
		runCtx, cancel = context.WithDeadlineCause(ctx, deadline.Add(-min(stopMargin, time.Until(deadline)/4)), errNoBudget)
	}
	defer cancel()
	result, settled := r.runAll(runCtx, agentpb.Timing_STOP, (*agentpb.WorkspaceAgentScript).GetRunOnStop)
	select {
	case <-settled:
	case <-ctx.Done():
	}
	r.kill()
	r.following.Wait()
	return result
}

// runAll runs the chosen scripts and waits until all have ended. Start scripts are not waited for
// once ctx has ended: nobody asks any more how they did. The channel is closed when all runs have
// been reported.
func (r *Runner) runAll(ctx context.Context, stage agentpb.Timing_Stage, chosen func(*agentpb.WorkspaceAgentScript) bool) (Result, <-chan struct{}) {
	result := Result{Stage: stage}
	var reporting sync.WaitGroup
	ended := make(chan outcome)
	gone := make(chan struct{})
	defer close(gone)
	var count int
	r.mu.Lock()
	for _, s := range r.scripts {
		if !chosen(s) || (r.stopped && stage != agentpb.Timing_STOP) {
			continue
		}
		count++
		reporting.Add(1)
		r.following.Go(func() {
			o := r.run(ctx, s, stage, reporting.Done)
			select {
			case ended <- o:
			case <-gone:
			}
		})
	}
	r.mu.Unlock()
	reported := make(chan struct{})
	go func() {
		reporting.Wait()
		close(reported)
	}()
	var cut <-chan struct{}
	if stage == agentpb.Timing_START {
		cut = ctx.Done()
	}
	for range count {
		select {
		case o := <-ended:
			result.count(o)
		case <-cut:
			result.Failed++
			return result, reported
		}
	}
	return result, reported
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
