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
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/berthd/berth/scripts/hold"
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
	// holderEnd is more than a holder takes to end what ended by itself, and itself.
	holderEnd = 2 * time.Second
	// maxArgument is the longest text that Linux lets a program be given as one argument (MAX_ARG_STRLEN, with its closing zero).
	maxArgument = 128<<10 - 1
)

// errNoBudget is why a stop script's context ends.
var errNoBudget = errors.New("the script ran out of the time that all stop scripts have")

// run is one run of a script.
type run struct {
	id     uuid.UUID
	stage  agentpb.Timing_Stage
	script *agentpb.WorkspaceAgentScript
}

func newRun(s *agentpb.WorkspaceAgentScript, stage agentpb.Timing_Stage) *run {
	return &run{uuid.New(), stage, s}
}

// outcome is how one run ended.
type outcome struct {
	run        uuid.UUID
	start, end time.Time
	code       int
	status     agentpb.Timing_Status
	left       bool          // it has not: another process will know
	settled    chan struct{} // closed when the outcome is remembered; nil: nobody asks
}

// settle says that the outcome need not be told again.
func (o outcome) settle() {
	if o.settled != nil {
		close(o.settled)
	}
}

// run runs a script until its process exits, and sees to the rest in the background: output that is still
// to come, children that are still to die, and the report, after which it calls reported.
func (r *Runner) run(ctx context.Context, run *run, reported func()) outcome {
	t := r.tag(run)
	o := outcome{run: run.id, start: time.Now(), code: exitUnknown, status: agentpb.Timing_EXIT_FAILURE}
	held, err := r.hold(run.script, t)
	if err != nil {
		r.note(t.Source, agentpb.Log_ERROR, err.Error())
		r.cfg.Log.Warn("a script could not be run", "script", t.Name, "err", err)
		o.end = time.Now()
		r.report(t, o)
		reported()
		return o
	}
	return r.follow(ctx, held, t, reported)
}

// follow is run for a script that is held already.
func (r *Runner) follow(ctx context.Context, held *hold.Held, t tag, reported func()) outcome {
	out := r.openOutput(t, held.State.Kept)
	exits, ended := make(chan hold.Exit, 1), make(chan struct{})
	r.following.Go(func() {
		defer close(out.eof)
		out.lost = held.Follow(out.takers, func(e hold.Exit) {
			exits <- e
			close(ended)
		})
	})
	hangUp := sync.OnceValue(func() time.Time {
		_ = held.HangUp() // it fails only if the holder has ended
		return time.Now()
	})
	keepOn := after(ctx, func() {
		if !r.left() {
			hangUp()
		}
	})
	letLive := after(r.alive, func() {
		if r.left() {
			held.Close()
			return
		}
		select {
		case <-ended:
		case <-out.eof:
		case <-time.After(time.Until(hangUp().Add(stopMargin))): // so much every script has to end
		}
		_ = held.Kill()
	})
	var exit hold.Exit
	select {
	case exit = <-exits:
	case <-out.eof:
		select {
		case exit = <-exits:
		default:
			exit = r.cutOff(held, t, out.lost)
		}
	}
	keepOn()
	o, note := judge(ctx, t, exit)
	if o.left = exit.End.IsZero(); !o.left {
		o.settled = make(chan struct{})
	}
	told := held.State.Reported || o.left
	if note != "" && !told {
		r.note(t.Source, agentpb.Log_ERROR, note)
	}
	if exit.LogFailure != "" {
		r.cfg.Log.Warn("a part of a script's output is not in its log file", "script", t.Name, "err", exit.LogFailure)
	}
	// All that the process itself wrote is in the pipes by now. It comes before what is said or run next.
	out.drained(lastWords, r.alive.Done())
	r.following.Go(func() {
		defer letLive()
		if !told {
			r.tell(held, t, o, out)
			if t.Stage == agentpb.Timing_START {
				select {
				case <-o.settled:
				case <-r.alive.Done():
				}
			}
			_ = held.Reported()
		}
		reported()
		<-out.eof
		if r.left() {
			held.Close()
			return
		}
		for i := range out.takers {
			r.cfg.Forget(t.stream(i))
		}
		_ = held.Release()
		held.Wait(r.hangupGrace + holderEnd)
	})
	return o
}

// after is [context.AfterFunc], but stop waits for the end of f if that has begun.
func after(ctx context.Context, f func()) (stop func()) {
	done := make(chan struct{})
	forget := context.AfterFunc(ctx, func() {
		defer close(done)
		f()
	})
	return func() {
		if !forget() {
			<-done
		}
	}
}

// left tells whether what runs is another process's by now.
func (r *Runner) left() bool { return errors.Is(context.Cause(r.alive), errLeft) }

// cutOff is how a script ended whose holder said nothing about it; it has no end if that is for another process to know.
func (r *Runner) cutOff(held *hold.Held, t tag, err error) hold.Exit {
	exit := hold.Exit{Start: held.State.Started, Code: -1, HungUp: true}
	if r.left() {
		return exit
	}
	exit.End = time.Now()
	if r.alive.Err() == nil { // we did not end it
		r.cfg.Log.Error("cannot follow a script any more", "script", t.Name, "err", err)
		r.note(t.Source, agentpb.Log_ERROR, "[berth: what the script prints from here on is lost, and so is how it ends: the process that held it was killed]")
	}
	return exit
}

// judge says how a script ended, and what is to be said about it.
func judge(ctx context.Context, t tag, exit hold.Exit) (o outcome, note string) {
	o = outcome{run: t.Run, start: exit.Start, end: exit.End, code: exit.Code, status: agentpb.Timing_EXIT_FAILURE}
	switch {
	case exit.Failure != "":
		o.code, note = exitUnknown, exit.Failure
	case exit.TimedOut:
		o.status = agentpb.Timing_TIMED_OUT
		note = fmt.Sprintf("[berth: the script was ended because it ran for longer than %s]", t.Timeout)
	case exit.HungUp && errors.Is(context.Cause(ctx), errNoBudget):
		o.status = agentpb.Timing_TIMED_OUT
		note = "[berth: the script was ended because the time for all stop scripts is over; --shutdown-timeout of berthd gives them more]"
	case exit.Code == 0:
		o.status = agentpb.Timing_OK
	case t.Windows:
		note = "[berth: the script has the line ends of Windows (CR LF), which may be why it failed: save it with LF alone]"
	}
	return o, note
}

// tell reports how a script ended, once it is known whether it left its output open.
func (r *Runner) tell(held *hold.Held, t tag, o outcome, out *output) {
	if !out.drained(r.pipeGrace, r.alive.Done()) && r.alive.Err() == nil {
		if o.status == agentpb.Timing_OK {
			o.status = agentpb.Timing_PIPES_LEFT_OPEN
		}
		r.note(t.Source, agentpb.Log_WARN, fmt.Sprintf("[berth: the script has ended, but %s its output open; what comes is still shown]", pipeHolders(held.State)))
	}
	if !r.left() {
		r.report(t, o)
	}
}

func (r *Runner) report(t tag, o outcome) {
	r.cfg.Completed(&agentpb.Timing{
		ScriptId: t.Script,
		Start:    timestamppb.New(o.start),
		End:      timestamppb.New(o.end),
		ExitCode: int32(o.code),
		Stage:    t.Stage,
		Status:   o.status,
	})
}

// command builds the command of s and makes the directories that its environment names. file is what it leaves on the disk for the command, if not empty.
func (r *Runner) command(s *agentpb.WorkspaceAgentScript, source uuid.UUID) (spec shell.Spec, file string, err error) {
	data := filepath.Join(r.cfg.DataDir, dataName, source.String())
	bin := BinDir(r.cfg.DataDir)
	for _, dir := range []string{data, bin} {
		if err := r.cfg.Shell.Do(func() error { return os.MkdirAll(dir, 0o700) }); err != nil {
			return shell.Spec{}, "", fmt.Errorf("cannot make a script's directory: %w", err)
		}
	}
	spec, err = r.cfg.Shell.Command(s.GetScript(), []string{
		"CODER_SCRIPT_DATA_DIR=" + data, "BERTH_SCRIPT_DATA_DIR=" + data,
		"CODER_SCRIPT_BIN_DIR=" + bin, "BERTH_SCRIPT_BIN_DIR=" + bin,
	})
	if err != nil || asText(s.GetScript(), spec.Argv) {
		return spec, "", err
	}
	err = r.cfg.Shell.Do(func() (err error) {
		file, err = writeText(data, s.GetScript())
		return err
	})
	if err != nil {
		return shell.Spec{}, "", err
	}
	spec.Argv = append(spec.Argv[:len(spec.Argv)-2], file) // in the place of -c and the text
	return spec, file, nil
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
