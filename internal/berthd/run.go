package berthd

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"runtime/debug"
	"sync"
	"syscall"

	"github.com/berthd/berth/agent"
	"github.com/berthd/berth/identity"
	"github.com/berthd/berth/oom"
	"github.com/berthd/berth/tailnet"
)

// errRestart is how run tells that it was asked to leave for another start.
var errRestart = errors.New("berthd is to be started again")

// garbagePercent is how much garbage may gather beside what is in use. The mesh keeps tens of megabytes that it hardly
// ever touches: with Go's 100 as much garbage would gather, and be touched. Before there is a mesh it would only slow the start.
const garbagePercent = 50

// run is the verb that runs the agent. whole are the arguments Main had; with stock, flags may be
// those of the stock agent.
func (p process) run(ctx context.Context, whole []string, stock bool) error {
	s, err := parseSettings(p.args, p.env, stock)
	if errors.Is(err, flag.ErrHelp) {
		fmt.Fprint(p.stdout, "berthd run: run the agent.\n\n")
		printOptions(p.stdout)
		fmt.Fprint(p.stdout, "\n", exitCodeHelp)
		return err
	}
	if err != nil {
		return err
	}
	if p.isInit() && !s.noReap {
		return runInit(whole, p.env.list())
	}
	user, err := s.findUser()
	if err != nil {
		return err
	}
	if p.env[envInPlace] != "" {
		adoptChildren()
	}
	if p.env["GOMEMLIMIT"] == "" {
		debug.SetMemoryLimit(tailnet.MemoryLimit)
	}
	tail := &agent.LogTail{}
	log, closeLog, err := newLog(s.output, p.stderr, tail)
	if err != nil {
		return err
	}
	defer closeLog()
	for _, name := range s.ignored {
		log.Warn("a flag of the stock agent has no effect here", "flag", "--"+name)
	}
	steps, err := openSteps(s.output.statusJSON, log)
	if err != nil {
		return err
	}
	defer steps.close()

	systemd := openSupervisor(p.env, log)
	defer systemd.close()

	ctx, release := withSignals(ctx, s.stock, log)
	defer release()
	var follow *follower
	var exam *examination
	cfg, exchange, err := s.agentConfig(ctx, log, p.endsContainer(), func(e agent.Event) {
		steps.tell(e)
		follow.tell(e)
		systemd.tell(e)
		exam.hear(e)
		if e.Step == agent.StepTailnet && p.env["GOGC"] == "" {
			debug.SetGCPercent(garbagePercent)
		}
	})
	if err != nil {
		return err
	}
	state, err := s.openState(log)
	if err != nil {
		return stateError{err}
	}
	defer state.Close()
	exchange.ProofKey = state.Path(proofKeyFile)
	if err := state.Lend(user); err != nil {
		return stateError{err}
	}
	socket, err := state.SocketPath(agent.LocalSocket)
	if err != nil {
		return stateError{err}
	}
	if err := prepareEnvironment(socket); err != nil {
		return err
	}
	cfg.State, cfg.User, cfg.Tail, cfg.Heartbeat = state, user, tail, systemd.heartbeat()
	self := selfCommand(whole)
	if err := checkUser(ctx, self, user, state.OwnPath(".")); err != nil {
		return err
	}
	if cfg.Helpers, err = s.helpers(state, user); err != nil && user != nil {
		return stateError{err} // it is what serves files as the user
	} else if err != nil {
		log.Warn("git and others in the workspace cannot use the server's credentials", "error", err)
	}
	if err := oom.Protect(); err != nil {
		log.Debug("berthd is as likely a victim as what runs in the workspace", "error", err)
	}
	cfg.StartTerminals = func(socket string) error {
		return startTerminals(self, socket, user, state.Path("ptyhost.log"), log)
	}
	cfg.HoldScript = func() []*exec.Cmd { return scriptHolders(self, log) }

	if follow = s.follower(self, cfg.Server, state, socket, log); follow != nil {
		var following sync.WaitGroup
		defer following.Wait()
		following.Go(func() { follow.run(ctx) })
	}
	defer context.AfterFunc(ctx, func() {
		systemd.stopping(context.Cause(ctx), s.services.shutdownTimeout)
	})()
	cfg.Life = agent.BeginLife(state)
	keepCrash(cfg.Life, log)
	log.Info("berthd starts", "version", version, "server", cfg.Server.URL, "identity", cfg.Identity, "state", s.dirs.state)
	if user != nil {
		log.Info("the workspace belongs to another user", "user", user)
	}
	exam = newExamination(s.patient(cfg), log, systemd.tell)
	examining := exam.start(ctx)
	defer examining()
	if err := agent.Run(ctx, cfg); err != nil {
		if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
			return stateError{fmt.Errorf("%w: make room there, or choose another --state-dir", err)}
		}
		return err
	}
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, errInPlace) && !s.output.statusInherited():
		return errInPlace
	case errors.Is(cause, agent.ErrRestart):
		return errRestart
	}
	return nil
}

// openState takes hold of the state directory. A stock agent needs none: started as one is, where nobody
// said which to use, berthd goes on in a new directory when the default cannot be had. The home of a
// container's user may not be writable, or be shared by several agents of one workspace.
func (s *settings) openState(log *slog.Logger) (*agent.State, error) {
	err := errNoPlace
	if s.dirs.state != "" {
		var state *agent.State
		if state, err = agent.OpenState(s.dirs.state); err == nil || !s.stock || !s.dirs.stateByDefault {
			return state, err
		}
	}
	dir, tempErr := os.MkdirTemp("", "berthd-")
	if tempErr != nil {
		return nil, errors.Join(err, tempErr)
	}
	log.Warn("the default state directory cannot be used; a new one takes its place, which the next start will not find",
		"state", dir, "error", err, "fix", "set BERTH_STATE_DIR to a directory that is writable and only this agent's")
	s.dirs.state = dir
	return agent.OpenState(dir)
}

// keepCrash has the runtime write what it says of a crash into a file too, for the next berthd to tell.
func keepCrash(life *agent.Life, log *slog.Logger) {
	f, err := life.CrashOutput()
	if err == nil {
		err = errors.Join(debug.SetCrashOutput(f, debug.CrashOptions{}), f.Close())
	}
	if err != nil {
		log.Debug("the next berthd will not know of a crash", "error", err)
	}
}

// agentConfig turns settings into what the agent takes, checked. The exchanger that its identity uses
// has no proof key yet.
func (s *settings) agentConfig(ctx context.Context, log *slog.Logger, endsContainer bool, tell func(agent.Event)) (agent.Config, *identity.Exchanger, error) {
	server, err := s.reach(ctx)
	if err != nil {
		return agent.Config{}, nil, err
	}
	exchange := exchanger(server)
	cfg := agent.Config{
		Server:    server,
		OnRefused: s.onRefused(endsContainer),
		Dirs:      agent.Dirs{Logs: s.dirs.logs, ScriptData: s.dirs.scriptData},
		Services: agent.Services{
			SSHMaxTimeout:            s.services.sshMaxTimeout,
			SSHResumeWindow:          s.services.sshResumeWindow,
			BlockFileTransfer:        s.services.blockFileTransfer,
			BlockReversePortForwards: s.services.blockReverse,
			BlockLocalPortForwards:   s.services.blockLocal,
			NoDevcontainers:          !s.services.devcontainers,
			TerminalIdleTimeout:      s.services.terminalIdle,
			NamedTerminalIdleTimeout: s.services.namedTerminalIdle,
			SSHTerminalGrace:         s.services.sshGrace,
			TerminalScrollback:       int(s.services.scrollback),
			ShutdownTimeout:          s.services.shutdownTimeout,
		},
		Mesh:      agent.Mesh{ListenPort: uint16(s.services.listenPort), RelayOnly: s.services.relayOnly, Debug: s.services.tailnetDebug},
		Debug:     agent.Debug{Pprof: s.output.pprof, Prometheus: s.output.prometheus, Status: s.output.debug},
		Version:   version,
		Subsystem: s.subsystems(),
		Log:       log,
		Event:     tell,
	}
	cfg.Identity, err = s.identity.source(exchange, log, tell)
	return cfg, exchange, err
}

// prepareEnvironment makes the process environment what children may inherit: no credentials of
// ours, nothing by which they could speak to systemd for us, and the way to report to us.
func prepareEnvironment(socket string) error {
	for _, name := range []string{envToken, envTokenFallback, identity.EnvCredentials, "BERTH_HEADER", "CODER_AGENT_HEADER", envNotify, envWatchdog, envWatchdogPID, envInit, envInPlace} {
		if err := os.Unsetenv(name); err != nil {
			return fmt.Errorf("cannot clear %s: %w", name, err)
		}
	}
	return os.Setenv(agent.EnvSocket, socket)
}

// withSignals returns a context that SIGINT and SIGTERM end, SIGHUP ends with the cause
// [agent.ErrRestart], and SIGUSR2 with the cause errInPlace. To the stock agent, which nobody starts again, SIGHUP means
// the same as the first two.
// The first signal counts. More of them change nothing: who stops a container or presses Ctrl-C may
// send two where one was meant, and stop scripts are to run to their end.
func withSignals(ctx context.Context, stock bool, log *slog.Logger) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGUSR2)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for sig := range signals {
			switch {
			case ctx.Err() != nil:
				log.Info("stopping already; only SIGKILL ends berthd at once", "signal", sig)
			case sig == syscall.SIGUSR2:
				log.Info("another berthd takes the place of this one", "signal", sig)
				cancel(errInPlace)
			case sig == syscall.SIGHUP && !stock:
				log.Info("stopping, to be started again", "signal", sig)
				cancel(agent.ErrRestart)
			default:
				log.Info("stopping", "signal", sig)
				cancel(nil)
			}
		}
	}()
	return ctx, func() {
		signal.Stop(signals)
		close(signals)
		<-done
		cancel(nil)
	}
}

// stateError marks what is wrong with the state directory.
type stateError struct{ error }

// Unwrap gives the cause.
func (e stateError) Unwrap() error { return e.error }

func exitCode(err error) int {
	var usage usageError
	var state stateError
	var ran exitStatus
	switch {
	case errors.As(err, &ran):
		return int(ran)
	case errors.As(err, new(notRun)):
		return int(exitNotRun)
	case errors.As(err, &usage):
		return ExitUsage
	case errors.Is(err, agent.ErrStateBusy):
		return ExitBusy
	case errors.As(err, &state):
		return ExitState
	case errors.Is(err, agent.ErrRefused):
		return ExitRefused
	case errors.Is(err, errRestart):
		return ExitRestart
	case errors.Is(err, errNoAgent):
		return ExitNoAgent
	}
	return ExitFailure
}
