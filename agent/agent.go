package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/berthd/berth/client"
	"github.com/berthd/berth/containers"
	"github.com/berthd/berth/identity"
	"github.com/berthd/berth/mask"
	"github.com/berthd/berth/ports"
	"github.com/berthd/berth/ptyhost"
	"github.com/berthd/berth/reporter"
	"github.com/berthd/berth/scripts"
	"github.com/berthd/berth/scripts/hold"
	"github.com/berthd/berth/shell"
	"github.com/berthd/berth/speedtest"
	"github.com/berthd/berth/sshd"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

// Budgets for stopping the stages, from the inside out: each is a few times what the work needs on a busy
// machine. What may take long, stop scripts and last reports, is bounded by Services.ShutdownTimeout too.
const (
	// workspaceMargin is what the workspace stage gets beyond the time that stop scripts have.
	workspaceMargin = 2 * time.Second
	serviceBudget   = 5 * time.Second // SSH gives its sessions 3 s to end by themselves
	meshBudget      = 3 * time.Second
	terminalsBudget = 5 * time.Second
	flushBudget     = 5 * time.Second
	// restartFlush is flushBudget for a berthd that starts again: nobody should notice.
	restartFlush   = time.Second
	linkBudget     = 2 * time.Second
	reporterBudget = 2 * time.Second
)

// Run runs an agent until ctx is done and everything is wound up, and returns nil then. It returns
// an error wrapping [ErrRefused] if the configuration asks for that, and others only if the agent
// cannot run on this machine. Cancelling ctx with the cause [ErrRestart] keeps the terminals.
func Run(ctx context.Context, cfg Config) (err error) {
	if err := cfg.check(); err != nil {
		return err
	}
	cfg = cfg.withDefaults()
	cfg.Life.tellLast(cfg.Log)
	event := func(e Event) {
		e.Time = time.Now()
		cfg.Life.tell(e)
		cfg.Event(e)
	}
	unhook := context.AfterFunc(ctx, cfg.Life.stopping)
	defer func() {
		unhook()
		cfg.Life.end(parting(context.Cause(ctx), err))
	}()
	defer event(Event{Step: StepStopped})
	var owners claims
	for {
		a, err := build(ctx, cfg, event)
		if err != nil {
			return err
		}
		a.claims = &owners
		err = runStages(ctx, cfg.Log, a.stages())
		if !errors.Is(err, errAgentChanged) && !errors.Is(err, errReinit) || ctx.Err() != nil {
			return err
		}
		cfg.Log.Info("starting anew", "reason", err)
	}
}

// agent is one identity's run: what it is made of, and what becomes known while it runs.
type agent struct {
	cfg  Config
	log  *slog.Logger
	emit func(Event)
	// restarting tells, once the agent stops, that berthd is to be started again: the workspace goes on.
	restarting func() bool
	claims     *claims

	parts
	known
}

// parts are built before anything starts.
type parts struct {
	server    *client.Client
	link      *link
	mask      *mask.Masker // of the secrets that the agent comes to know
	reporter  *reporter.Reporter
	shell     *shell.Workspace
	scripts   *scripts.Runner
	terminals *terminalHost
	local     *localAPI
	ssh       *sshd.Server
	pty       *ptyServer
	api       *api
	ports     *ports.Lister
	lister    *containers.Lister
	view      *containerView
	debug     []*debugServer
}

// known is what the server and the machine tell us as we go.
type known struct {
	secret    atomic.Pointer[wire.Secret] // the session token
	manifest  atomic.Pointer[agentpb.Manifest]
	banners   atomic.Pointer[[]string]
	joined    atomic.Bool  // that the mesh was joined has been told
	meshDebug atomic.Bool  // the mesh logs all it does
	changed   atomic.Bool  // the server gave us another id
	online    atomic.Bool  // a link is up that has given its manifest
	spoken    wire.Version // with the server, on the last link; the link's own

	first   *later[*agentpb.Manifest]
	mesh    *later[*mesh]
	serving *later[*mesh]     // mesh, once all services listen
	leaving *later[time.Time] // by when all is to be over; it comes before closing ends
	closing context.Context   // ends when the workspace closes to peers
	close   context.CancelFunc
}

// build makes every part; nothing runs yet.
func build(ctx context.Context, cfg Config, event func(Event)) (*agent, error) {
	a := &agent{cfg: cfg, log: cfg.Log, emit: event}
	a.first, a.mesh, a.serving = newLater[*agentpb.Manifest](), newLater[*mesh](), newLater[*mesh]()
	a.leaving = newLater[time.Time]()
	a.closing, a.close = context.WithCancel(context.Background())
	a.restarting = func() bool { return errors.Is(context.Cause(ctx), ErrRestart) || a.link.refused.Load() }

	socket, err := cfg.State.SocketPath(terminalsSocket)
	if err != nil {
		return nil, err
	}
	local, err := cfg.State.SocketPath(LocalSocket)
	if err != nil {
		return nil, err
	}
	held, err := cfg.State.SocketPath(scripts.HoldName)
	if err != nil {
		return nil, err
	}
	hostKey, err := sshd.HostKey(cfg.State.dir)
	if err != nil {
		return nil, err
	}
	a.server, err = client.New(client.Config{URL: cfg.Server.URL, Token: a.token, HTTP: cfg.Server.HTTP, Header: cfg.Server.Header})
	if err != nil {
		return nil, err
	}
	a.mask = mask.New()
	a.reporter, err = reporter.Open(reporter.Config{Dir: cfg.State.Path("spool"), PatchAppStatus: a.patchAppStatus, Mask: a.mask, Log: cfg.Log})
	if err != nil {
		return nil, err
	}

	a.link = &link{
		dial:      func(ctx context.Context) (session, error) { return a.dial(ctx) },
		onRefused: cfg.OnRefused,
		renews:    cfg.Identity.Renews(),
		event:     event,
		trouble:   &trouble{log: cfg.Log},
		flapping:  &trouble{log: cfg.Log},
		log:       cfg.Log,
		wall:      time.Now,
		closing:   a.closing.Done(),
	}
	a.link.over, a.link.giveUp = context.WithCancel(context.Background())
	a.shell = shell.New(shell.Config{
		User:      cfg.User,
		AgentPath: cfg.Helpers.Program,
		URL:       cfg.Server.URL.String(),
		BinDir:    scripts.BinDir(cfg.Dirs.ScriptData),
		LastDir:   cfg.Helpers.Dir,
		Fixed:     cfg.Helpers.Env,
		Log:       cfg.Log,
	})
	holder := cfg.HoldScript
	if bootID() == "" {
		holder = nil // a later berthd could not tell whether they are of this boot, and would start others beside them
	}
	a.scripts = scripts.New(scripts.Config{
		Shell: a.shell,
		Logs:  a.reporter.Writer,
		Stream: func(source uuid.UUID, level agentpb.Log_Level, id uuid.UUID, kept uint64) hold.Taker {
			return a.reporter.Stream(source, level, id, kept)
		},
		Forget:    a.reporter.Forget,
		Completed: a.reporter.ScriptCompleted,
		Progress:  a.noteProgress,
		LogDir:    cfg.Dirs.Logs,
		DataDir:   cfg.Dirs.ScriptData,
		Holder:    holder,
		HoldDir:   filepath.Dir(held),
		Mask:      a.mask,
		Log:       cfg.Log,
	})
	a.terminals = &terminalHost{
		socket: socket, user: cfg.User, start: cfg.StartTerminals, log: cfg.Log,
		idle:       idleTimes{unnamed: cfg.Services.TerminalIdleTimeout, named: cfg.Services.NamedTerminalIdleTimeout},
		scrollback: cfg.Services.TerminalScrollback,
	}
	a.local = &localAPI{
		path: local, user: cfg.User, server: cfg.Server.URL.String(), token: a.token, manifest: a.manifest.Load,
		appStatus: a.reporter.AppStatus, about: a.about, hide: a.mask.Add, log: cfg.Log, ready: make(chan struct{}),
	}
	a.lister = containers.New(containers.Config{User: cfg.User, Log: cfg.Log.With("part", "containers")})
	inContainer := &containerShells{refusal: noContainers(cfg), program: cfg.Helpers.Program, find: a.lister.Find, command: a.shell.Command}
	a.pty = &ptyServer{
		terminals: a.terminals, command: a.shell.Command, container: inContainer.spec, connected: a.connectedPTY, keeps: a.keepsTerminals,
		log: cfg.Log.With("part", "pty"),
	}
	sftp := ""
	if cfg.User != nil {
		sftp = "exec " + shell.Quote(cfg.Helpers.Program) + " sftp-server"
	}
	a.ssh, err = sshd.New(sshd.Config{
		HostKey:   hostKey,
		Terminals: a.terminals,
		Keep:      cfg.Services.SSHTerminalGrace,
		Command:   a.shell.Command,
		User:      cfg.User,
		SFTP:      sftp,
		Banner:    a.greet,
		JetBrains: a.jetBrains,
		Report:    a.connectedSSH,

		ContainerCommand: inContainer.spec,
		Block: sshd.Block{
			FileTransfer:  cfg.Services.BlockFileTransfer,
			LocalForward:  cfg.Services.BlockLocalPortForwards,
			RemoteForward: cfg.Services.BlockReversePortForwards,
		},
		KeepAlive: cfg.Services.SSHMaxTimeout / 3,
		Log:       cfg.Log.With("part", "sshd"),
	})
	if err != nil {
		return nil, errors.Join(err, a.reporter.Close())
	}
	a.terminals.ssh = a.ssh
	a.meshDebug.Store(cfg.Mesh.Debug)
	a.makeAPI()
	return a, nil
}

// makeAPI makes what shows the agent from inside: its HTTP API, and the same in part for this machine.
func (a *agent) makeAPI() {
	a.view = &containerView{
		refusal:  noContainers(a.cfg),
		list:     a.lister.List,
		watch:    a.lister.Watch,
		manifest: a.manifest.Load,
		expand:   a.shell.Expand,
		home:     a.shell.Home,
		user:     a.cfg.User,
		command:  a.shell.Command,
		logs:     a.reporter.Writer,
		log:      a.log.With("part", "containers"),
	}
	a.ports = ports.New(ports.Config{HidePIDs: []int{os.Getpid()}, Containers: a.lister.Known, Log: a.log.With("part", "ports")})
	a.api = &api{
		user:       a.cfg.User,
		ports:      a.ports,
		containers: a.view,
		terminals:  a.terminals,
		manifest:   a.manifest.Load,
		self:       a.self,
		mesh:       a.showMesh,
		meshDebug:  &a.meshDebug,
		metrics:    a.showMetrics,
		logs:       a.cfg.Tail,
		scriptLog:  a.scripts.OpenLog,
		mask:       a.mask,
		log:        a.log.With("part", "api"),
	}
	a.debug = debugServers(a.cfg.Debug, a.api, a.log)
}

// noContainers says why containers are not shown nor entered, "" if they are.
func noContainers(cfg Config) string {
	if cfg.Services.NoDevcontainers {
		return "Dev Container feature not enabled."
	}
	return ""
}

// stages lists the nested lifetimes from the outside in.
func (a *agent) stages() []stage {
	return []stage{
		{name: "reporter", run: a.runReporter, budget: reporterBudget},
		{name: "heartbeat", run: a.runHeartbeat, budget: time.Second},
		{name: "memory", run: a.watchMemory, budget: time.Second},
		{name: "link", run: a.link.run, budget: linkBudget},
		{name: "owner", run: a.runReinit, budget: linkBudget},
		{name: "last reports", run: a.runFlush, budget: flushBudget + time.Second},
		{name: "local socket", run: a.local.run, ready: a.local.ready, budget: time.Second},
		{name: "debug listeners", run: a.runDebug, budget: time.Second},
		{name: "terminals", run: a.runTerminals, budget: terminalsBudget},
		{name: "workspace", run: a.runWorkspace, budget: a.cfg.Services.ShutdownTimeout + workspaceMargin},
		{name: "containers", run: a.lister.Run, budget: time.Second},
		{name: "mesh", run: a.runNode, ready: a.mesh.come, budget: meshBudget},
		a.service("ssh on port 22", wire.PortSSHStandard, a.ssh.Serve),
		a.service("ssh", wire.PortSSH, a.ssh.Serve),
		a.service("resumed ssh", wire.PortResume, a.serveResumed),
		a.service("pty", wire.PortPTY, a.pty.serve),
		a.service("speed test", wire.PortSpeedtest, speedtest.Serve),
		{name: "dev containers", run: a.view.run, budget: serviceBudget},
		a.service("api", wire.PortHTTP, a.api.serve),
		{name: "open", run: a.runOpen, budget: time.Second},
	}
}

// service is the stage of something that listens on the node.
func (a *agent) service(name string, port uint16, serve func(context.Context, net.Listener) error) stage {
	listening := make(chan struct{})
	return stage{name: name, ready: listening, budget: serviceBudget, run: func(ctx context.Context) error {
		up, ok := a.mesh.wait(ctx)
		if !ok {
			return nil
		}
		l, err := up.node.Listen(port)
		if err != nil {
			return fmt.Errorf("cannot listen on tailnet port %d: %w", port, err)
		}
		close(listening)
		return serve(ctx, l)
	}}
}

// dial proves who we are and opens the link.
func (a *agent) dial(ctx context.Context) (session, error) {
	token, err := a.cfg.Identity.Token(ctx)
	if err != nil {
		return nil, identityProblem(err)
	}
	a.secret.Store(&token)
	a.mask.Add(token)
	up, err := a.server.ConnectAgent(ctx)
	if err != nil {
		return nil, err
	}
	return duties{a, up}, nil
}

// identityProblem keeps what failed on this machine (a metadata service, a token file) from being
// explained as a trouble with the control server: its own words name the cause and the fix.
func identityProblem(err error) error {
	var f *identity.Failure
	if !errors.As(err, &f) {
		return err
	}
	problem := &client.Problem{Kind: client.KindMachine, Cause: f.Cause, Fix: f.Fix}
	if behind := f.Unwrap(); behind != nil {
		return fmt.Errorf("%w: %v", problem, behind)
	}
	return problem
}

// token returns the session token in use, "" before there is one.
func (a *agent) token() wire.Secret {
	if t := a.secret.Load(); t != nil {
		return *t
	}
	return ""
}

// runReporter keeps the reporter open for all others.
func (a *agent) runReporter(ctx context.Context) error {
	<-ctx.Done()
	return a.reporter.Close()
}

// runFlush gives reports a last chance to be delivered: it stops when everybody who reports has,
// and while the link is still up.
func (a *agent) runFlush(ctx context.Context) error {
	<-ctx.Done()
	budget := flushBudget
	switch {
	case a.changed.Load():
		return nil // of an agent that is no more nobody wants to hear
	case a.restarting():
		budget = restartFlush // the spool keeps logs for the next berthd; that sessions ended, only we know
	}
	flushCtx, cancel := context.WithTimeout(a.link.over, a.inTime(budget))
	defer cancel()
	if err := a.reporter.Flush(flushCtx); err != nil {
		a.log.Warn("not everything could be reported; what is left is sent after the next start", "error", err)
	}
	return nil
}

// runTerminals makes sure that the terminals' process lives before anybody needs it, and ends it
// with the workspace.
func (a *agent) runTerminals(ctx context.Context) error {
	if a.cfg.User != nil {
		a.endRootsTerminals(ctx)
	}
	if err := a.terminals.ensure(ctx); err != nil && ctx.Err() == nil {
		a.log.Warn("terminals do not work yet; trying again when one is opened", "error", err)
	}
	a.terminals.watch(ctx)
	if a.keepsTerminals() {
		return nil
	}
	endCtx, cancel := context.WithTimeout(context.Background(), a.inTime(terminalsBudget-time.Second))
	defer cancel()
	if err := a.terminals.end(endCtx); err != nil {
		a.log.Warn("cannot end the terminals", "error", err)
	}
	return nil
}

// endRootsTerminals ends what is left of a time when the workspace was root's own: nobody reaches those
// terminals any more, and they are root's.
func (a *agent) endRootsTerminals(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, terminalsBudget)
	defer cancel()
	socket, err := SocketPath(a.cfg.State.dir, terminalsSocket)
	if err == nil {
		err = ptyhost.Dial(socket).Shutdown(ctx)
	}
	switch {
	case err == nil:
		a.log.Info("ended the terminals that ran as root", "user", a.cfg.User)
	case !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ECONNREFUSED):
		a.log.Warn("there may be terminals left that run as root", "error", err)
	}
}

// keepsTerminals reports whether terminals live on, once the agent stops.
func (a *agent) keepsTerminals() bool { return a.restarting() || a.changed.Load() }

// patchAppStatus tells an app's status to a server that has no RPC for it.
func (a *agent) patchAppStatus(ctx context.Context, status *agentpb.UpdateAppStatusRequest) error {
	return a.server.PatchAppStatus(ctx, wire.PatchAppStatus{
		AppSlug: status.GetSlug(), State: appStateName(status.GetState()), Message: status.GetMessage(), URI: status.GetUri(),
	})
}

// showMetrics writes the agent's own gauges for Prometheus.
func (a *agent) showMetrics(w io.Writer) {
	ssh := a.ssh.Counts()
	writeMetric(w, "gauge", "berthd_ssh_sessions", "SSH sessions that are open.", float64(ssh.SSH))
	writeMetric(w, "gauge", "berthd_vscode_sessions", "VS Code sessions that are open.", float64(ssh.VSCode))
	writeMetric(w, "gauge", "berthd_jetbrains_connections", "JetBrains connections that are open.", float64(ssh.JetBrains))
	writeMetric(w, "gauge", "berthd_pty_connections", "Clients attached to terminals.", float64(a.pty.sessions()))
}

// stateName is a lifecycle state as the protocol's JSON has it.
func stateName(s agentpb.Lifecycle_State) string { return strings.ToLower(s.String()) }
