package sshd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/berthd/berth/account"
	"github.com/berthd/berth/ptyhost"
	"github.com/berthd/berth/shell"
)

// Terminals starts and reaches terminals; *ptyhost.Client is one.
type Terminals interface {
	Attach(ctx context.Context, req ptyhost.AttachRequest) (*ptyhost.Attachment, error)
	Kill(ctx context.Context, id, signal string) error
}

// Config is what a [Server] needs. HostKey, Terminals and Command must be set.
type Config struct {
	// HostKey identifies the workspace to clients; see [HostKey].
	HostKey ssh.Signer

	// Terminals runs the sessions that ask for a PTY.
	Terminals Terminals

	// Keep is how long the terminal of a client that was cut off waits to be taken up again. Zero ends it with its connection.
	Keep time.Duration

	// Command says how a command line is started; the empty line is the login shell. clientEnv is what the client sent, already
	// filtered, as NAME=value. An error (such as a manifest that has not come yet) is shown to the user.
	Command func(line string, clientEnv []string) (shell.Spec, error)

	// User is whom Command runs things as, and whom the sockets belong to that clients ask for; nil is the user that this process runs as.
	User *account.User

	// SFTP is a command line that calls [ServeSFTP] in a process of its own. It is run by Command, since file transfer is then held to what
	// the user, and their login shell, may. Empty serves SFTP in this process.
	SFTP string

	// ContainerCommand is Command for a session that asks to be in a container. Optional; without it such sessions are refused.
	ContainerCommand func(ctx context.Context, in Container, line string, clientEnv []string) (shell.Spec, error)

	// Banner writes what a person sees before the login shell of a terminal starts, with CR LF at line ends. Optional.
	Banner func(w io.Writer)

	// JetBrains says whether a JetBrains program listens on a local port. Each forwarded connection to such a port counts as one JetBrains
	// session. Optional.
	JetBrains func(port uint16) bool

	// Report is told of each session when it starts, and through done of its end. Optional; a panic in it ends nothing.
	Report func(Connection) (done func(exit int, reason string))

	// Block switches services off.
	Block Block

	// KeepAlive is how often a client is asked whether it still lives; its connection is closed when three in a row go
	// unanswered. Zero means a day: a laptop may sleep, and the transport below has its own, shorter, idea of death. See also [Server.Held].
	KeepAlive time.Duration

	// Log is where the server writes; nil discards.
	Log *slog.Logger
}

// Container is where a session asks to be (agent-services.md §2.2 of the protocol).
type Container struct {
	Name string // or its id; empty means the machine itself
	User string // empty leaves it to the container
}

// Block lists what is refused.
type Block struct {
	FileTransfer  bool // the sftp subsystem and commands named nc, rsync, scp or sftp
	LocalForward  bool // direct-tcpip and direct-streamlocal
	RemoteForward bool // tcpip-forward, streamlocal-forward and X11
}

// SessionType is the kind of client behind a session, as the client says.
type SessionType string

// The session types that are told apart. Anything else is SessionOther: it works, and is counted as nothing.
const (
	SessionSSH       SessionType = "ssh"
	SessionVSCode    SessionType = "vscode"
	SessionJetBrains SessionType = "jetbrains"
	SessionOther     SessionType = "other"
)

// Connection describes a session (or one forwarded connection of a JetBrains client) to [Config.Report].
type Connection struct {
	Type     SessionType
	Remote   net.Addr
	Terminal bool // it has one, which outlives it
}

// Counts is how many there are of each thing now.
type Counts struct {
	SSH, VSCode int64 // sessions by type
	JetBrains   int64 // forwarded connections to JetBrains programs
	Commands    int64 // of the sessions of type SSH those without a terminal: commands and file transfers
	Connections int64 // connections, those still in their handshake included
}

// Limits on one server. They bound what a client that misbehaves can cost; an ordinary one stays far below.
const (
	// A handshake over a slow relay takes a few seconds; sshd's own default is 120 s.
	handshakeTimeout = 30 * time.Second
	// Four handshakes a second of clients that never finish are needed to hold this many.
	maxConnections = 1024
	// VS Code with 200 forwarded connections is the greediest honest client known.
	maxChannels = 1024
	maxForwards = 256
	// shutdownBudget is what running sessions get to end by themselves once the server has been told to stop.
	shutdownBudget = 3 * time.Second
	keepAliveTries = 3
)

type limits struct {
	handshake, shutdown time.Duration
	connections         int64
}

// Server serves SSH. Make one with [New].
type Server struct {
	cfg    Config
	limits limits
	counts struct{ ssh, vscode, jetbrains, commands, connections atomic.Int64 }

	displays displays

	mu    sync.Mutex
	jobs  map[*job]struct{} // commands without a terminal, the ones whose channel has gone included
	holds map[string]*hold  // terminals that clients are attached to, by id
}

// New checks cfg and returns a server that serves nothing yet.
func New(cfg Config) (*Server, error) {
	switch {
	case cfg.HostKey == nil:
		return nil, errors.New("cannot make an SSH server without a host key")
	case cfg.Terminals == nil:
		return nil, errors.New("cannot make an SSH server without terminals")
	case cfg.Command == nil:
		return nil, errors.New("cannot make an SSH server without a way to start commands")
	case cfg.User != nil && cfg.SFTP == "":
		return nil, errors.New("cannot make an SSH server for another user without a program that serves SFTP as them")
	}
	if cfg.KeepAlive == 0 {
		cfg.KeepAlive = 24 * time.Hour
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Server{
		cfg:      cfg,
		limits:   limits{handshake: handshakeTimeout, shutdown: shutdownBudget, connections: maxConnections},
		displays: displays{most: maxDisplays, open: make(map[int]*display)},
		jobs:     make(map[*job]struct{}),
		holds:    make(map[string]*hold),
	}, nil
}

// Serve accepts connections on l until ctx is done, and closes l. It then hangs up on every command (SIGHUP to its group), gives sessions a few
// seconds to end, closes what is left and returns nil once every connection is gone. Any other end of l is an error.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	// Connections outlive ctx by the shutdown budget.
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	var conns sync.WaitGroup
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer func() {
		stop()
		l.Close()
		s.hangUp()
		end()
		conns.Wait()
	}()
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			if retry(ctx, err) {
				continue
			}
			return fmt.Errorf("cannot accept SSH connections: %w", err)
		}
		if s.counts.connections.Add(1) > s.limits.connections {
			s.counts.connections.Add(-1)
			s.cfg.Log.Warn("refused an SSH connection: too many are open", "remote", conn.RemoteAddr(), "limit", s.limits.connections)
			conn.Close()
			continue
		}
		conns.Go(func() {
			defer s.counts.connections.Add(-1)
			s.serveConn(life, conn)
		})
	}
}

// retry reports whether accepting may be tried again after err, having waited a little: a process out of descriptors gets some back.
func retry(ctx context.Context, err error) bool {
	if t, ok := errors.AsType[interface {
		error
		Temporary() bool
	}](err); !ok || !t.Temporary() {
		return false
	}
	select {
	case <-ctx.Done():
		return false
	case <-time.After(100 * time.Millisecond):
		return true
	}
}

// Counts returns how many sessions and connections there are.
func (s *Server) Counts() Counts {
	return Counts{
		SSH:         s.counts.ssh.Load(),
		VSCode:      s.counts.vscode.Load(),
		JetBrains:   s.counts.jetbrains.Load(),
		Commands:    s.counts.commands.Load(),
		Connections: s.counts.connections.Load(),
	}
}

// begin counts and reports a session. The function it returns does so for its end and is called once.
func (s *Server) begin(c Connection) func(exit int, reason string) {
	var gauges []*atomic.Int64
	switch c.Type {
	case SessionSSH:
		gauges = append(gauges, &s.counts.ssh)
		if !c.Terminal {
			gauges = append(gauges, &s.counts.commands)
		}
	case SessionVSCode:
		gauges = append(gauges, &s.counts.vscode)
	case SessionJetBrains:
		gauges = append(gauges, &s.counts.jetbrains)
	}
	for _, gauge := range gauges {
		gauge.Add(1)
	}
	var done func(int, string)
	if s.cfg.Report != nil {
		s.shield("report", func() { done = s.cfg.Report(c) })
	}
	return func(exit int, reason string) {
		for _, gauge := range gauges {
			gauge.Add(-1)
		}
		if done != nil {
			s.shield("report", func() { done(exit, reason) })
		}
	}
}

// shield runs f and turns a panic into a log line: what one peer or one callback can break must not end everybody's sessions.
func (s *Server) shield(what string, f func()) {
	defer func() {
		if p := recover(); p != nil {
			s.cfg.Log.Error("recovered from a panic in the SSH server", "in", what, "panic", p)
		}
	}()
	f()
}
