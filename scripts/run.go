package scripts

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
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
	// maxArgument is the longest text that Linux lets a program be given as one argument (MAX_ARG_STRLEN, with its closing zero).
	maxArgument = 128<<10 - 1
)

// Why a script's context ends.
var (
	errNoTime   = errors.New("the script ran out of its own time")
	errNoBudget = errors.New("the script ran out of the time that all stop scripts have")
)

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
	spec, cleanUp, err := r.command(s, source)
	if err != nil {
		return o, err
	}
	defer cleanUp()
	timeout := s.GetTimeout().AsDuration()
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, timeout, errNoTime)
		defer cancel()
	}
	cmd := spec.Cmd(ctx)
	cmd.WaitDelay = r.hangupGrace
	var hungUp time.Time
	var tree *tree
	cmd.Cancel = func() error {
		hungUp, tree = time.Now(), newTree(cmd.Process.Pid)
		err := shell.Signal(cmd.Process, 0)
		tree.signal(syscall.SIGHUP)
		return err
	}
	cmd.Stdout, cmd.Stderr = files.stdout.write, files.stderr.write
	if err := cmd.Start(); err != nil {
		return o, fmt.Errorf("cannot start the script: %w%s", err, hint(spec, err))
	}
	files.closeWriteEnds()
	stopKill := context.AfterFunc(r.alive, func() { _ = shell.Signal(cmd.Process, syscall.SIGKILL) })
	err = shell.Wait(cmd)
	stopKill()
	o.end = time.Now()
	o.code = cmd.ProcessState.ExitCode()
	var note string
	switch {
	case err == nil:
		o.status = agentpb.Timing_OK
	case errors.Is(context.Cause(ctx), errNoTime):
		o.status = agentpb.Timing_TIMED_OUT
		note = fmt.Sprintf("the script was ended because it ran for longer than %s", timeout)
	case errors.Is(context.Cause(ctx), errNoBudget):
		o.status = agentpb.Timing_TIMED_OUT
		note = "the script was ended because the time for all stop scripts is over; --shutdown-timeout of berthd gives them more"
	case strings.Contains(s.GetScript(), "\r\n"):
		note = "the script has the line ends of Windows (CR LF), which may be why it failed: save it with LF alone"
	}
	if note != "" {
		r.note(source, agentpb.Log_ERROR, "[berth: "+note+"]")
	}
	if tree != nil { // what the process left behind has been hung up too
		r.following.Go(func() { r.end(tree, hungUp) })
	}
	return o, nil
}

// hint says how to mend a script that could not be started.
func hint(spec shell.Spec, err error) string {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		return fmt.Sprintf("; install %s as a program that can be run, or correct the script's first line", spec.Argv[0])
	}
	return ""
}

// command builds the command of s and makes the directories that its environment names. What it leaves on the disk for the command is removed by cleanUp.
func (r *Runner) command(s *agentpb.WorkspaceAgentScript, source uuid.UUID) (spec shell.Spec, cleanUp func(), err error) {
	data := filepath.Join(r.cfg.DataDir, dataName, source.String())
	bin := BinDir(r.cfg.DataDir)
	for _, dir := range []string{data, bin} {
		if err := r.cfg.Shell.Do(func() error { return os.MkdirAll(dir, 0o700) }); err != nil {
			return shell.Spec{}, nil, fmt.Errorf("cannot make a script's directory: %w", err)
		}
	}
	spec, err = r.cfg.Shell.Command(s.GetScript(), []string{
		"CODER_SCRIPT_DATA_DIR=" + data, "BERTH_SCRIPT_DATA_DIR=" + data,
		"CODER_SCRIPT_BIN_DIR=" + bin, "BERTH_SCRIPT_BIN_DIR=" + bin,
	})
	if err != nil || asText(s.GetScript(), spec.Argv) {
		return spec, func() {}, err
	}
	var path string
	err = r.cfg.Shell.Do(func() (err error) {
		path, err = writeText(data, s.GetScript())
		return err
	})
	if err != nil {
		return shell.Spec{}, nil, err
	}
	spec.Argv = append(spec.Argv[:len(spec.Argv)-2], path) // in the place of -c and the text
	return spec, func() { r.cfg.Shell.Do(func() error { return os.Remove(path) }) }, nil
}

// takesText are the interpreters that run what stands behind -c. It makes others check a file's syntax, or is nothing to them: they are given the script as
// a file, as the kernel would.
var takesText = []string{"sh", "ash", "bash", "csh", "dash", "elvish", "fish", "ksh", "ksh93", "lksh", "mksh", "nu", "pwsh", "rbash", "tcsh", "xonsh", "yash", "zsh"}

// asText tells whether a script may follow its interpreter's -c.
func asText(text string, argv []string) bool {
	if len(text) > maxArgument {
		return false
	}
	if !strings.HasPrefix(strings.TrimSpace(text), "#!") {
		return true // by the login shell
	}
	for _, word := range argv {
		name := filepath.Base(word)
		if name == "env" || name == "busybox" || strings.HasPrefix(word, "-") || strings.Contains(word, "=") {
			continue // what leads to the interpreter
		}
		return slices.Contains(takesText, name) || strings.HasPrefix(name, "python") || strings.HasPrefix(name, "pypy")
	}
	return true
}

// writeText puts a script into a file of its own.
func writeText(dir, text string) (path string, err error) {
	file, err := os.CreateTemp(dir, ".script-")
	if err == nil {
		_, err = file.WriteString(text)
		err = errors.Join(err, file.Close())
		if err != nil {
			os.Remove(file.Name())
		}
	}
	if err != nil {
		return "", fmt.Errorf("cannot put the script into a file for its interpreter: %w", err)
	}
	return file.Name(), nil
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

// OpenLog opens what is kept of all that the script with this log source has printed. It is an [fs.ErrNotExist] if there
// is no such script, or it has not run.
func (r *Runner) OpenLog(source uuid.UUID) (file *os.File, err error) {
	r.mu.Lock()
	scripts := r.scripts
	r.mu.Unlock()
	for _, s := range scripts {
		if bytes.Equal(s.GetLogSourceId(), source[:]) {
			err := r.cfg.Shell.Do(func() (err error) { // as when it was made
				file, err = os.OpenFile(r.logPath(s, source), os.O_RDONLY|syscall.O_NONBLOCK, 0)
				return err
			})
			return file, err
		}
	}
	return nil, fs.ErrNotExist
}

func (r *Runner) logPath(s *agentpb.WorkspaceAgentScript, source uuid.UUID) string {
	if path := r.cfg.Shell.Expand(s.GetLogPath(), r.cfg.LogDir); path != "" {
		return path
	}
	return filepath.Join(r.cfg.LogDir, "coder-script-"+source.String()+".log")
}

// openLog opens the log file of s. A script runs without one rather than not at all.
func (r *Runner) openLog(s *agentpb.WorkspaceAgentScript, source uuid.UUID) *os.File {
	path := r.logPath(s, source)
	var file *os.File
	err := r.cfg.Shell.Do(func() (err error) { // a link that was laid there leads no further than the script itself could go
		file, err = openAppend(path)
		return err
	})
	if err != nil {
		r.cfg.Log.Warn("a script runs without a log file", "script", name(s), "err", err)
		return nil
	}
	return file
}

// openAppend opens a log file, and makes it if need be.
func openAppend(path string) (*os.File, error) {
	flags := os.O_CREATE | os.O_WRONLY | os.O_APPEND
	if info, err := os.Stat(path); err == nil && info.Size() > maxOldLog {
		flags |= os.O_TRUNC
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	return os.OpenFile(path, flags, 0o600)
}
