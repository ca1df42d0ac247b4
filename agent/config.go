package agent

import (
	"crypto/tls"
	"errors"
	"log/slog"
	"net/http"
	"net/url"
	"os/exec"
	"time"

	"github.com/berthd/berth/account"
	"github.com/berthd/berth/identity"
)

// Config says what an agent is. Server.URL, Identity and State are required.
type Config struct {
	Server Server
	// Identity yields the session token, anew before every attempt to link.
	Identity identity.Source
	// OnRefused says when [Run] returns [ErrRefused] because the server refuses the token.
	OnRefused RefusedPolicy

	// State is held by the caller, and closed by it after Run has returned. It is lent to User.
	State *State
	// Life was begun with it; nil lets Run begin it.
	Life *Life
	// User is whom the workspace belongs to, and all in it runs as; nil is the user that this process
	// runs as.
	User *account.User
	// Dirs are the other places the agent writes to.
	Dirs Dirs
	// StartTerminals starts the process that owns the terminals, listening on the given Unix socket.
	// It returns when the process was started and does not wait for it. Nil means that
	// something else runs one there.
	StartTerminals func(socket string) error
	// HoldScript makes commands of processes that hold a script (hold.RunProcess), of which the first that works is used. With it
	// scripts outlive a berthd that is restarted or killed. Nil: they end with it.
	HoldScript func() []*exec.Cmd
	Services   Services
	Mesh       Mesh
	Debug      Debug
	Helpers    Helpers

	// Version is berthd's own, a semantic version with a leading "v".
	Version string
	// Subsystem names what berthd runs inside of, as the protocol lists it: envbox, envbuilder or exectrace.
	Subsystem []string

	// Log receives what happens; nil discards it. Tail is what /debug/logs shows; nil means nothing.
	Log  *slog.Logger
	Tail *LogTail
	// Event is told each step; nil discards it. It must not block.
	Event     func(Event)
	Heartbeat Heartbeat
}

// Server is the control server and the way to it.
type Server struct {
	URL *url.URL
	// HTTP makes the API calls and the link; TLS and Header hold for the relay too.
	HTTP   *http.Client
	TLS    *tls.Config
	Header http.Header
}

// Dirs are directories; empty means below the state directory.
type Dirs struct {
	// Logs is where scripts log to, ScriptData where each keeps its own files.
	Logs, ScriptData string
}

// Services says how the workspace's services behave.
type Services struct {
	// SSHMaxTimeout is after how long without any answer an SSH client counts as gone; 0 means 72 h.
	SSHMaxTimeout time.Duration
	// SSHResumeWindow is how long an SSH connection of berth's own client is kept while its network is away; 0 means 10 minutes.
	SSHResumeWindow          time.Duration
	BlockFileTransfer        bool
	BlockReversePortForwards bool
	BlockLocalPortForwards   bool
	// NoDevcontainers switches off what the HTTP API tells of containers.
	NoDevcontainers bool
	// TerminalIdleTimeout and NamedTerminalIdleTimeout are how long a terminal on port 2 lives on with nobody
	// attached, without a name and with one; 0 means for ever.
	TerminalIdleTimeout      time.Duration
	NamedTerminalIdleTimeout time.Duration
	// SSHTerminalGrace is how long the terminal of an SSH session that was cut off waits to be taken up again; 0 ends it at once.
	SSHTerminalGrace time.Duration
	// TerminalScrollback is how many lines that left the screen a terminal keeps, within 4 MiB; 0 means 10,000.
	TerminalScrollback int
	// ShutdownTimeout is how long it may take from the order to stop until all is over, stop scripts included; 0 means a minute.
	ShutdownTimeout time.Duration
}

// Mesh says how the agent joins the tailnet.
type Mesh struct {
	// ListenPort is the UDP port for direct paths; 0 lets the system choose.
	ListenPort uint16
	// RelayOnly keeps to the relay even if the server allows direct paths.
	RelayOnly bool
	// Debug lets the mesh log all it does, whatever the level of Log.
	Debug bool
}

// Helpers are what programs in the workspace get of berthd. The zero value is nothing.
type Helpers struct {
	// Program answers as git's ssh command and askpass; "" leaves git alone.
	Program string
	// Dir is put last in PATH: what is in it stands in for no program of the workspace.
	Dir string
	// Env are NAME=value pairs by which those programs reach the control server as berthd does.
	Env []string
}

// Debug lists where this machine can look into the agent: host:port of loopback, or unix:PATH. Empty
// means nowhere.
type Debug struct {
	Pprof string
	// Prometheus may be an address that others reach.
	Prometheus string
	// Status shows what the HTTP API on the mesh has under /debug.
	Status string
}

// RefusedPolicy says what a refused token leads to. Whatever it is, the identity is asked anew at once
// when the server says 401 or 403, and terminals live on when Run returns for it.
type RefusedPolicy int

const (
	// StayWhenRefused tries for ever: the token may become good, or another may come.
	StayWhenRefused RefusedPolicy = iota
	// ExitWhenLost returns when a token that had been good is refused for 20 s, and the identity does
	// not renew itself: whatever starts berthd again may have another token for it.
	ExitWhenLost
	// ExitWhenRefused returns at the second refusal in a row.
	ExitWhenRefused
)

var (
	// ErrRefused is returned (wrapped) by [Run] when the server refused the token and
	// [Config.OnRefused] says so.
	ErrRefused = errors.New("the server refused this agent's token")

	// ErrRestart is the cause to cancel Run's context with when berthd is about to start again:
	// terminals live on, and neither stop nor start scripts run.
	ErrRestart = errors.New("berthd restarts")
)

func (c Config) check() error {
	switch {
	case c.Server.URL == nil:
		return errors.New("cannot run an agent without the server's URL")
	case c.Identity == nil:
		return errors.New("cannot run an agent without an identity")
	case c.State == nil:
		return errors.New("cannot run an agent without a state directory")
	case c.User != nil && c.Helpers.Program == "":
		return errors.New("cannot run an agent for another user without a program that they can run")
	}
	return nil
}

func (c Config) withDefaults() Config {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Life == nil {
		c.Life = BeginLife(c.State)
	}
	if c.Tail == nil {
		c.Tail = &LogTail{}
	}
	if c.Event == nil {
		c.Event = func(Event) {}
	}
	if c.Server.HTTP == nil {
		c.Server.HTTP = http.DefaultClient
	}
	if c.Dirs.Logs == "" {
		c.Dirs.Logs = c.State.OwnPath("log")
	}
	if c.Dirs.ScriptData == "" {
		c.Dirs.ScriptData = c.State.own
	}
	if c.Services.SSHMaxTimeout == 0 {
		c.Services.SSHMaxTimeout = 72 * time.Hour
	}
	if c.Services.ShutdownTimeout == 0 {
		c.Services.ShutdownTimeout = time.Minute
	}
	if c.Version == "" {
		c.Version = "v0.0.0-devel"
	}
	return c
}
