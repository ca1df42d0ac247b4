package scripts

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/berthd/berth/shell"
	"github.com/berthd/berth/wire/agentpb"
)

const (
	// dataName is the directory in DataDir; scripts written for a stock agent may know it.
	dataName = "coder-script-data"
	// pipeGrace is how long the output of a script may stay open after its process has exited before
	// a child that holds it is reported; the protocol's figure.
	pipeGrace = 10 * time.Second
	// exitUnknown is reported for a script that could not be started.
	exitUnknown = 255
	// maxOldLog is how large a log file of earlier runs may be for a run to go on in it.
	maxOldLog = 16 << 20
	// lastWords is how long a script's end waits for output that is already written to be read. Without
	// a child that holds a pipe open that takes no time; with one this delay is all it costs.
	lastWords = 250 * time.Millisecond
	// groupPoll is how often a hung-up process group is looked at.
	groupPoll = 50 * time.Millisecond
)

// errNoTime is why a script's context ends with its timeout.
var errNoTime = errors.New("the script ran out of time")

// outcome is how one run ended.
type outcome struct {
	start, end time.Time
	code       int
	status     agentpb.Timing_Status
}

// run runs s until its process exits, and sees to the rest in the background: output that is still
// to come, children that are still to die, and the report, after which it calls reported.
func (r *Runner) run(ctx context.Context, s *agentpb.WorkspaceAgentScript, stage agentpb.Timing_Stage, reported func()) outcome {
	source, err := uuid.FromBytes(s.GetLogSourceId())
	if err != nil {
		source = uuid.Nil // its lines go to the server's source for what has none
	}
	o := outcome{start: time.Now(), code: exitUnknown, status: agentpb.Timing_EXIT_FAILURE}
	files, err := r.openFiles(s, source)
	if err == nil {
		o, err = r.execute(ctx, s, source, files, o)
	}
	if err != nil {
		r.note(source, agentpb.Log_ERROR, err.Error())
		r.cfg.Log.Warn("a script could not be run", "script", name(s), "err", err)
		o.end = time.Now()
		r.report(s, stage, o)
		reported()
		return o
	}
	// All that the process itself wrote is in the pipes by now. It comes before what is said or run next.
	files.drained(lastWords, r.alive.Done())
	r.following.Go(func() {
		defer reported()
		if files.drained(r.pipeGrace, r.alive.Done()) {
			r.report(s, stage, o)
			return
		}
		final := o
		if r.alive.Err() == nil {
			if o.status == agentpb.Timing_OK {
				final.status = agentpb.Timing_PIPES_LEFT_OPEN
			}
			r.note(source, agentpb.Log_WARN, fmt.Sprintf("[berth: the script has ended, but %s its output open; what comes is still shown]", files.holders()))
		}
		r.report(s, stage, final)
	})
	return o
}

func (r *Runner) report(s *agentpb.WorkspaceAgentScript, stage agentpb.Timing_Stage, o outcome) {
	r.cfg.Completed(&agentpb.Timing{
		ScriptId: s.GetId(),
		Start:    timestamppb.New(o.start),
		End:      timestamppb.New(o.end),
		ExitCode: int32(o.code),
		Stage:    stage,
		Status:   o.status,
	})
}

// execute starts s and waits for its process.
func (r *Runner) execute(ctx context.Context, s *agentpb.WorkspaceAgentScript, source uuid.UUID, files *files, o outcome) (outcome, error) {
	defer files.closeWriteEnds()
	r.following.Go(func() { files.follow(r.alive) })
	spec, err := r.command(s, source)
	if err != nil {
		return o, err
	}
	if timeout := s.GetTimeout().AsDuration(); timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, timeout, errNoTime)
		defer cancel()
	}
	cmd := spec.Cmd(ctx)
	var hungUp time.Time
	hangUp := cmd.Cancel
	cmd.Cancel = func() error {
		hungUp = time.Now()
		return hangUp()
	}
	cmd.Stdout, cmd.Stderr = files.stdout.write, files.stderr.write
	if err := cmd.Start(); err != nil {
		return o, fmt.Errorf("cannot start the script: %w", err)
	}
	files.closeWriteEnds()
	stopKill := context.AfterFunc(r.alive, func() { _ = shell.Signal(cmd.Process, syscall.SIGKILL) })
	err = cmd.Wait()
	stopKill()
	o.end = time.Now()
	o.code = cmd.ProcessState.ExitCode()
	switch {
	case err == nil:
		o.status = agentpb.Timing_OK
	case errors.Is(context.Cause(ctx), errNoTime):
		o.status = agentpb.Timing_TIMED_OUT
		r.note(source, agentpb.Log_ERROR, fmt.Sprintf("[berth: the script was ended because it ran for longer than %s]", s.GetTimeout().AsDuration()))
	}
	if !hungUp.IsZero() { // what the process left of its group has been hung up too
		r.following.Go(func() { r.endGroup(cmd, time.Until(hungUp.Add(shell.HangupGrace))) })
	}
	return o, nil
}

// endGroup waits for the rest of a hung-up process group, and kills what does not end in time.
func (r *Runner) endGroup(cmd *exec.Cmd, grace time.Duration) {
	deadline := time.NewTimer(grace)
	defer deadline.Stop()
	tick := time.NewTicker(groupPoll)
	defer tick.Stop()
	for {
		if errors.Is(shell.Signal(cmd.Process, syscall.Signal(0)), os.ErrProcessDone) {
			return
		}
		select {
		case <-tick.C:
			continue
		case <-deadline.C:
		case <-r.alive.Done():
		}
		_ = shell.Signal(cmd.Process, syscall.SIGKILL) // gone meanwhile is as good
		return
	}
}

// command builds the command of s and makes the directories that its environment names.
func (r *Runner) command(s *agentpb.WorkspaceAgentScript, source uuid.UUID) (shell.Spec, error) {
	data := filepath.Join(r.cfg.DataDir, dataName, source.String())
	bin := BinDir(r.cfg.DataDir)
	for _, dir := range []string{data, bin} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return shell.Spec{}, fmt.Errorf("cannot make a script's directory: %w", err)
		}
	}
	return r.cfg.Shell.Command(s.GetScript(), []string{
		"CODER_SCRIPT_DATA_DIR=" + data, "BERTH_SCRIPT_DATA_DIR=" + data,
		"CODER_SCRIPT_BIN_DIR=" + bin, "BERTH_SCRIPT_BIN_DIR=" + bin,
	})
}

// note adds a line of ours to a script's log.
func (r *Runner) note(source uuid.UUID, level agentpb.Log_Level, text string) {
	w := r.cfg.Logs(source, level)
	_, err := io.WriteString(w, text+"\n")
	if err := errors.Join(err, w.Close()); err != nil {
		r.cfg.Log.Warn("cannot write to a script's log", "source", source, "err", err)
	}
}

// name says which script is meant.
func name(s *agentpb.WorkspaceAgentScript) string {
	if n := s.GetDisplayName(); n != "" {
		return n
	}
	id, err := uuid.FromBytes(s.GetId())
	if err != nil {
		return "without an id"
	}
	return id.String()
}

// openLog opens the log file of s. A script runs without one rather than not at all.
func (r *Runner) openLog(s *agentpb.WorkspaceAgentScript, source uuid.UUID) *os.File {
	path := r.cfg.Shell.Expand(s.GetLogPath(), r.cfg.LogDir)
	if path == "" {
		path = filepath.Join(r.cfg.LogDir, "coder-script-"+source.String()+".log")
	}
	flags := os.O_CREATE | os.O_WRONLY | os.O_APPEND
	if info, err := os.Stat(path); err == nil && info.Size() > maxOldLog {
		flags |= os.O_TRUNC
	}
	err := os.MkdirAll(filepath.Dir(path), 0o700)
	if err == nil {
		var file *os.File
		if file, err = os.OpenFile(path, flags, 0o600); err == nil {
			return file
		}
	}
	r.cfg.Log.Warn("a script runs without a log file", "script", name(s), "err", err)
	return nil
}
