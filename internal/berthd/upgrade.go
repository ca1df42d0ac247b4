package berthd

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/berthd/berth/agent"
	"github.com/berthd/berth/internal/upgrade"
)

const upgradeHelp = `berthd upgrade: put the berthd that the control server hosts into the place of the installed one.

Terminals live on. A berthd that does not come up in time is replaced by the one before.

  --check            only say what there is
  --now              do not wait for commands and file transfers over SSH to end
  --wait TIME        wait for them at most this long (default 10m), then go on
  --timeout TIME     how long the new berthd may take to come up (default 1m)
  --previous         go back to the berthd before the last upgrade
  --file PATH        take this archive instead of the server's
  --sha256 HEX       what the archive's SHA-256 must be (default: what the server says)
  --socket PATH      the running berthd's socket (default: where berthd of this user has it)

The server is found as sessions find it, else by the variables of berthd run, else it is that of the running berthd.
`

const (
	// upgradePoll is how often a berthd is asked whether it is ready, or still busy.
	upgradePoll = 100 * time.Millisecond
	// leaveTimeout is what a berthd may take to leave for another: its parts stop within half of that.
	leaveTimeout = 30 * time.Second
	// supervisorTimeout is how long a service manager may take to start a berthd that has ended: the pause of our unit for systemd
	// is 5 s. Where there is none that we know of, somebody else may still start it at once.
	supervisorTimeout = 15 * time.Second
	loneTimeout       = 2 * time.Second
)

// upgradeOptions are the flags of the verb.
type upgradeOptions struct {
	check, now, previous bool
	wait, timeout        time.Duration
	file, sha256         string
	at                   string // the socket of the berthd that runs
	record               string // where run, which started this verb, wants to read of a failure
}

func (p process) upgrade(ctx context.Context) error {
	var o upgradeOptions
	fs := flag.NewFlagSet("berthd upgrade", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.BoolVar(&o.check, "check", false, "")
	fs.BoolVar(&o.now, "now", false, "")
	fs.DurationVar(&o.wait, "wait", 10*time.Minute, "")
	fs.DurationVar(&o.timeout, "timeout", time.Minute, "")
	fs.BoolVar(&o.previous, "previous", false, "")
	fs.StringVar(&o.file, "file", "", "")
	fs.StringVar(&o.sha256, "sha256", "", "")
	fs.StringVar(&o.at, "socket", "", "")
	fs.StringVar(&o.record, "record", "", "")
	switch err := fs.Parse(p.args); {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(p.stdout, upgradeHelp)
		return err
	case err != nil:
		return usagef("%w: see berthd upgrade --help", err)
	case fs.NArg() > 0:
		return usagef("%q is no flag: see berthd upgrade --help", fs.Arg(0))
	case o.wait < 0 || o.timeout <= 0:
		return usagef("--wait and --timeout must be times that are not negative, such as 30s")
	}
	var err error
	if o.at, err = p.socket(o.at); err != nil {
		return err
	}
	r, err := findRunning(ctx, o.at)
	if err != nil {
		return err
	}
	u := upgrader{process: p, upgradeOptions: o, running: r}
	version, err := u.run(ctx)
	if err != nil && o.record != "" {
		err = errors.Join(err, writeRefused(o.record, refused{Version: version, Cause: err.Error()}))
	}
	return err
}

// upgrader is one upgrade.
type upgrader struct {
	process
	upgradeOptions
	running *running // nil: there is none
}

func (u upgrader) say(format string, args ...any) { fmt.Fprintf(u.stdout, format+"\n", args...) }

// run does it, and returns the version it is about, as soon as that is known.
func (u upgrader) run(ctx context.Context) (version string, err error) {
	program, now, err := u.installed()
	if err != nil {
		return "", err
	}
	if u.running != nil {
		u.say("berthd %s runs here, from %s", now, program)
	} else {
		u.say("no berthd answers at %s; the one at %s is looked at", u.at, program)
	}
	var source upgrade.Source
	if u.file == "" && !u.previous {
		if source, err = u.source(ctx); err != nil {
			return "", err
		}
		if version, err = source.Version(ctx); err != nil {
			return "", err
		}
		u.say("%s hosts %s", source.URL, version)
		if version == now {
			u.say("that is the same: nothing to do")
			return version, nil
		}
		if u.check {
			u.say("berthd upgrade installs it")
			return version, nil
		}
	}
	next, err := u.candidate(ctx, source, program)
	if err != nil {
		return version, err
	}
	defer next.Discard()
	if version != "" && next.Version != version {
		return version, fmt.Errorf("the server says %s, but what it hosts is %s: let its operator host one release as a whole", version, next.Version)
	}
	version = next.Version
	if u.check {
		u.say("%s runs here; berthd upgrade installs it", version)
		return version, nil
	}
	if u.running == nil {
		if _, err := next.Install(); err != nil {
			return version, err
		}
		u.say("%s is installed, for the next start", version)
		return version, nil
	}
	if err := u.awaitCommands(ctx); err != nil {
		return version, err
	}
	undo, err := next.Install()
	if err != nil {
		return version, err
	}
	began := time.Now()
	if err := u.change(ctx, version); err != nil {
		return version, u.goBack(ctx, version, undo, err)
	}
	u.say("%s serves after %s; terminals live on", version, time.Since(began).Round(10*time.Millisecond))
	return version, nil
}

// installed finds the program that is to be replaced, and its version.
func (u upgrader) installed() (program, now string, err error) {
	if u.running != nil {
		return u.running.program, u.running.Version, nil
	}
	if program, err = os.Executable(); err != nil {
		return "", "", fmt.Errorf("cannot find berthd's own program: %w", err)
	}
	return program, version, checkProgram(program)
}

// checkProgram refuses to replace what is more than berthd.
func checkProgram(program string) error {
	if filepath.Base(program) == "berth" {
		return fmt.Errorf("this berthd is a part of %s: upgrade that", program)
	}
	return nil
}

// source finds the control server.
func (u upgrader) source(ctx context.Context) (upgrade.Source, error) {
	s, err := u.agentSettings()
	if err != nil {
		return upgrade.Source{}, err
	}
	if s.server.url == "" && u.running != nil {
		s.server.url = u.running.Server
	}
	server, err := s.reach(ctx)
	if err != nil {
		return upgrade.Source{}, err
	}
	return upgrade.Source{URL: server.URL, HTTP: server.HTTP, Header: server.Header}, nil
}

func (u upgrader) candidate(ctx context.Context, source upgrade.Source, program string) (*upgrade.Candidate, error) {
	switch {
	case u.previous:
		return upgrade.Previous(program)
	case u.file != "":
		return upgrade.Open(u.file, program, u.sha256)
	}
	return source.Fetch(ctx, program, u.sha256)
}

// awaitCommands waits until a restart ends nobody's command, within --wait.
func (u upgrader) awaitCommands(ctx context.Context) error {
	if u.now {
		return nil
	}
	told := false
	for deadline := time.Now().Add(u.wait); time.Now().Before(deadline); {
		about, err := agent.AskAbout(ctx, u.at)
		if err != nil {
			return err
		}
		if about.Commands == 0 {
			return nil
		}
		if !told {
			told = true
			u.say("waiting for commands and file transfers over SSH to end (%d now), at most %s; --now does not wait", about.Commands, u.wait)
		}
		if !pauseFor(ctx, upgradePoll) {
			return ctx.Err()
		}
	}
	return nil
}

// change has the running process become what is installed now, and waits until that is as ready as the one before.
func (u upgrader) change(ctx context.Context, version string) error {
	if err := u.running.process.Signal(syscall.SIGUSR2); err != nil {
		return fmt.Errorf("cannot tell berthd (process %d) to start anew: %w", u.running.PID, err)
	}
	return u.await(ctx, u.timeout, version, u.running.Reachable)
}

// await waits until a version answers, and can be reached if reachable. A process that has ended is given the time that another needs to come.
func (u upgrader) await(ctx context.Context, limit time.Duration, version string, reachable bool) error {
	missing := "it does not answer"
	began, gone := time.Now(), false
	for deadline := began.Add(limit); time.Now().Before(deadline); {
		if !gone && u.running.ended() {
			gone = true
			if again := time.Now().Add(u.running.restarts()); again.Before(deadline) {
				deadline, missing = again, "it ended"
			}
		}
		about, err := agent.AskAbout(ctx, u.at)
		switch {
		case err == nil && about.Version == version && (about.Reachable || !reachable):
			return nil
		case gone: // and the other is not there yet
		case err != nil:
			missing = "it does not answer"
		case about.Version != version:
			missing = about.Version + " answers"
		default:
			missing = "it answers, but cannot be reached by the mesh"
		}
		if !pauseFor(ctx, upgradePoll) {
			return ctx.Err()
		}
	}
	return fmt.Errorf("%s did not come up within %s: %s", version, time.Since(began).Round(time.Second), missing)
}

// goBack puts the former berthd back and sees to it that it runs.
func (u upgrader) goBack(ctx context.Context, version string, undo func() error, cause error) error {
	ctx = context.WithoutCancel(ctx) // whoever does not want to wait does not want no berthd at all either
	if err := undo(); err != nil {
		return fmt.Errorf("%w; and the former berthd cannot be put back: %w", cause, err)
	}
	if err := u.revive(ctx); err != nil {
		return fmt.Errorf("%w; the former berthd is installed again, but %w: start it, and look into its log", cause, err)
	}
	return fmt.Errorf("%w; %s is back, and terminals live on: look into the log for what %s had to say", cause, u.running.Version, version)
}

// revive has the former berthd run again, whatever became of the process.
func (u upgrader) revive(ctx context.Context) error {
	if u.running.process.Signal(syscall.SIGUSR2) == nil && u.await(ctx, leaveTimeout, u.running.Version, false) == nil {
		return nil
	}
	if u.running.process.Kill() == nil && u.await(ctx, supervisorTimeout, u.running.Version, false) == nil { // it hung; terminals are another process
		return nil
	}
	if err := u.running.start(); err != nil {
		return err
	}
	return u.await(ctx, u.timeout, u.running.Version, false)
}

func pauseFor(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// running is a berthd that runs, and what it takes to start it again as it was started.
type running struct {
	agent.About
	process *os.Process // this one, whatever its number may stand for one day
	program string
	argv    []string
	environ []string
	dir     string
	output  *os.File // where it logs to
}

// findRunning asks who listens on socket. It returns nil if nobody does.
func findRunning(ctx context.Context, socket string) (*running, error) {
	about, err := agent.AskAbout(ctx, socket)
	if err != nil {
		if _, statErr := os.Stat(socket); errors.Is(statErr, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
			return nil, nil
		}
		return nil, err
	}
	self, err := os.FindProcess(about.PID)
	if err != nil {
		return nil, fmt.Errorf("cannot find the running berthd (process %d): %w: run this in its container", about.PID, err)
	}
	proc := fmt.Sprintf("/proc/%d/", about.PID)
	program, err := os.Readlink(proc + "exe")
	if err != nil {
		return nil, fmt.Errorf("cannot find the program of the running berthd (process %d): %w: run this as its user (sudo), in its container", about.PID, err)
	}
	r := &running{About: about, process: self, program: strings.TrimSuffix(program, " (deleted)")}
	if err := checkProgram(r.program); err != nil {
		return nil, err
	}
	argv, argvErr := os.ReadFile(proc + "cmdline")
	environ, environErr := os.ReadFile(proc + "environ")
	dir, dirErr := os.Readlink(proc + "cwd")
	if err := cmp.Or(argvErr, environErr, dirErr); err != nil {
		return nil, fmt.Errorf("cannot tell how the running berthd was started: %w: run this as its user (sudo)", err)
	}
	r.argv, r.environ, r.dir = nulled(argv), nulled(environ), dir
	r.output, _ = os.OpenFile(proc+"fd/2", os.O_WRONLY|os.O_APPEND, 0) // a socket cannot be opened; then a service manager starts it
	return r, nil
}

// ended tells whether the process is gone, or waits for a parent that does not care, as the first of many containers does not.
func (r *running) ended() bool {
	if errors.Is(r.process.Signal(syscall.Signal(0)), os.ErrProcessDone) {
		return true
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", r.PID))
	state := stat[bytes.LastIndexByte(stat, ')')+1:] // the command before it may hold anything
	return err == nil && bytes.HasPrefix(state, []byte(" Z"))
}

// restarts is how long whoever started it may take to start it again.
func (r *running) restarts() time.Duration {
	// systemd gives the first to all that it starts; the second is from our init.
	if env := newEnvironment(r.environ); env["INVOCATION_ID"] != "" || env[envInit] != "" {
		return supervisorTimeout
	}
	return loneTimeout
}

func nulled(b []byte) []string { return strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00") }

// start starts berthd as it was started, in a session of its own.
func (r *running) start() error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("cannot start berthd: %w", err)
	}
	defer null.Close()
	p, err := os.StartProcess(r.program, r.argv, &os.ProcAttr{
		Dir: r.dir, Env: r.environ, Files: []*os.File{null, cmp.Or(r.output, null), cmp.Or(r.output, null)}, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return fmt.Errorf("cannot start berthd: %w", err)
	}
	return p.Release()
}

// refused is what run reads of an upgrade that failed, so as not to try it again and again.
type refused struct {
	Version string `json:"version"`
	Cause   string `json:"cause"`
}

func writeRefused(path string, r refused) error {
	b, err := json.Marshal(r)
	if err == nil {
		err = os.WriteFile(path, b, 0o600)
	}
	if err != nil {
		return fmt.Errorf("cannot note that the upgrade failed: %w", err)
	}
	return nil
}

// maxRefused bounds the note that is read: a version and a sentence.
const maxRefused = 16 << 10

// readRefused returns the zero value if there is no note, or none that can be read.
func readRefused(path string, log *slog.Logger) (r refused) {
	f, err := os.Open(path)
	if err != nil {
		return refused{}
	}
	defer f.Close()
	if err := json.NewDecoder(io.LimitReader(f, maxRefused)).Decode(&r); err != nil {
		log.Warn("cannot read why the last upgrade failed; it may be tried again", "error", err)
		return refused{}
	}
	return r
}
