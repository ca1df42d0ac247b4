// Package shell knows how a command is started in a workspace: with which shell, in which
// directory, with which environment.
//
// The agent makes one [Workspace] with [New] and feeds it each manifest by [Workspace.Update];
// everything that starts a process there (SSH sessions, terminals, scripts, metadata) asks
// [Workspace.Command] for a [Spec] and starts that.
package shell

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/berthd/berth/account"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

// ErrNoManifest is returned by [Workspace.Command] before the first manifest has arrived.
var ErrNoManifest = errors.New("cannot start a command: the control server has not sent the workspace's manifest yet")

// HangupGrace is how long a process group has to end after its SIGHUP before it is killed.
const HangupGrace = 10 * time.Second

// Config says what does not change while the agent runs. The zero value works.
type Config struct {
	// User is whom commands run as; nil is the user that this process runs as.
	User *account.User
	// AgentPath is a program that answers as git's ssh command and askpass. Empty for none.
	AgentPath string
	// URL is the control server's, exported so that helpers in the workspace find it.
	URL string
	// BinDir is put first in PATH, so that scripts can leave commands there. Empty for none.
	BinDir string
	// LastDir is put last in PATH. Empty for none.
	LastDir string
	// Fixed are NAME=value pairs that no client can change.
	Fixed []string
	// Log gets what could not be honoured; nil discards it.
	Log *slog.Logger
}

// Workspace builds commands. Its methods may be called at the same time.
type Workspace struct {
	cfg     Config
	environ environment // the agent process's own
	account account.User
	current atomic.Pointer[manifest]
}

// manifest is what a command needs of the manifest in force. It is never changed once stored.
type manifest struct {
	directory string       // expanded; empty when the manifest names none
	fixed     environment  // wins over the client's variables
	template  environment  // wins over fixed
	secrets   []secretPair // win over template
}

type secretPair struct {
	name  string
	value wire.Secret
}

// New returns a workspace. Its commands start from the environment that the process has at this moment.
func New(cfg Config) *Workspace {
	return newWorkspace(cfg, os.Environ(), "/etc/passwd")
}

func newWorkspace(cfg Config, environ []string, passwd string) *Workspace {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	env := environment{}
	env.addAll(environ, func(name string) bool { return !serviceVariables[name] })
	w := &Workspace{cfg: cfg, environ: env}
	if cfg.User != nil {
		env.become(cfg.User)
		w.account = *cfg.User
	} else {
		w.account = lookUp(passwd, os.Getuid(), env)
	}
	return w
}

// String names the user. The environments that a Workspace holds have credentials and never print.
func (w *Workspace) String() string { return "workspace of " + w.account.Name }

// GoString implements [fmt.GoStringer], for %#v.
func (w *Workspace) GoString() string { return w.String() }

// Update puts a manifest and the session token in force for commands started from now on.
func (w *Workspace) Update(m *agentpb.Manifest, token wire.Secret) {
	next := &manifest{
		directory: w.Expand(m.GetDirectory(), w.account.Home),
		fixed:     w.fixed(m, token),
		template:  environment{},
	}
	for name, value := range m.GetEnvironmentVariables() {
		next.template.add(name, os.Expand(value, w.environ.lookup))
	}
	for _, s := range m.GetSecrets() {
		name, value := s.GetEnvName(), string(s.GetValue())
		switch {
		case name == "":
		case !validVariable(name, value):
			w.cfg.Log.Warn("cannot put a secret into the environment: its name or value is not usable there", "name", name)
		default:
			next.secrets = append(next.secrets, secretPair{name, wire.Secret(value)})
		}
	}
	w.current.Store(next)
}

// fixed lists what neither the client nor the agent's own environment can change.
func (w *Workspace) fixed(m *agentpb.Manifest, token wire.Secret) environment {
	id, err := uuid.FromBytes(m.GetWorkspaceId())
	if err != nil {
		id = uuid.Nil // a server without workspaces sends none
	}
	env := environment{
		"CODER":                               "true",
		"BERTH":                               "true",
		"CS_DISABLE_GETTING_STARTED_OVERRIDE": "true",
	}
	for name, value := range map[string]string{
		"WORKSPACE_NAME":       m.GetWorkspaceName(),
		"WORKSPACE_AGENT_NAME": m.GetAgentName(),
		"WORKSPACE_OWNER_NAME": m.GetOwnerUsername(),
		"WORKSPACE_ID":         id.String(),
		"AGENT_TOKEN":          token.Reveal(),
	} {
		env.addBoth(name, value)
	}
	if w.cfg.URL != "" {
		env.addBoth("AGENT_URL", w.cfg.URL)
	}
	env.addAll(w.cfg.Fixed, func(string) bool { return true })
	if uri := m.GetVsCodePortProxyUri(); uri != "" {
		env.add("VSCODE_PROXY_URI", uri)
	}
	if w.cfg.AgentPath != "" {
		// git hands this one to a shell; it takes GIT_ASKPASS as a bare path.
		env.add("GIT_SSH_COMMAND", Quote(w.cfg.AgentPath)+" git-ssh --")
	}
	return env
}

// Directory returns the manifest's directory, expanded but not checked, as the server wants to hear
// it. It is empty when the manifest names none.
func (w *Workspace) Directory() string {
	if m := w.current.Load(); m != nil {
		return m.directory
	}
	return ""
}

// Home returns the user's home directory: $HOME, else the user database's, else "/".
func (w *Workspace) Home() string { return w.account.Home }

// Do does what f does on behalf of the workspace, with the rights that its commands have; see
// [account.User.Do].
func (w *Workspace) Do(f func() error) error { return w.cfg.User.Do(f) }

// Expand makes path absolute: a leading ~ is the home directory, $VAR and ${VAR} come from the
// agent's environment, and what is relative then is joined to base. An empty path stays empty.
func (w *Workspace) Expand(path, base string) string {
	if path == "" {
		return ""
	}
	if rest, ok := strings.CutPrefix(path, "~"); ok {
		path = filepath.Join(w.account.Home, rest)
	}
	path = os.Expand(path, w.environ.lookup)
	if !filepath.IsAbs(path) {
		path = filepath.Join(base, path)
	}
	return filepath.Clean(path)
}

// Command says how to run line: by the login shell's -c, by the interpreter of its #! line if it
// has one, or, when line is empty, as a login shell. Later entries of clientEnv win over earlier
// ones; what it may not set is left out.
func (w *Workspace) Command(line string, clientEnv []string) (Spec, error) {
	m := w.current.Load()
	if m == nil {
		return Spec{}, ErrNoManifest
	}
	if strings.ContainsRune(line, 0) {
		return Spec{}, errors.New("cannot start a command: it contains a NUL byte")
	}
	dir, err := w.startDir(m)
	if err != nil {
		return Spec{}, err
	}
	return Spec{Argv: w.argv(line), Dir: dir, Env: w.env(m, clientEnv), User: w.cfg.User}, nil
}

func (w *Workspace) argv(line string) []string {
	if line == "" {
		return []string{w.account.Shell, "-l"}
	}
	if rest, ok := strings.CutPrefix(strings.TrimSpace(line), "#!"); ok {
		first, _, _ := strings.Cut(rest, "\n")
		if interpreter := strings.Fields(first); len(interpreter) > 0 {
			return append(interpreter, "-c", line)
		}
	}
	return []string{w.account.Shell, "-c", line}
}

func (w *Workspace) startDir(m *manifest) (dir string, err error) {
	err = w.Do(func() error {
		for _, dir = range []string{m.directory, w.account.Home} {
			// The dot is there only for those who may enter.
			if info, err := os.Stat(dir + "/."); dir != "" && err == nil && info.IsDir() {
				return nil
			}
		}
		// A command in the wrong place beats none: a person needs a shell to make the missing home.
		dir = "/"
		return nil
	})
	return dir, err
}

func (w *Workspace) env(m *manifest, clientEnv []string) []string {
	env := w.environ.clone()
	env.addAll(clientEnv, clientMaySet)
	env.add("USER", w.account.Name)
	env.add("LOGNAME", w.account.Name)
	env.add("SHELL", w.account.Shell)
	if env["HOME"] == "" { // a service manager may start the agent without
		env.add("HOME", w.account.Home)
	}
	env.merge(m.fixed)
	env.merge(m.template)
	for _, s := range m.secrets {
		env.add(s.name, s.value.Reveal())
	}
	if w.cfg.AgentPath != "" {
		env.add("GIT_ASKPASS", w.cfg.AgentPath)
	}
	if env["PATH"] == "" {
		env.add("PATH", defaultPath)
	}
	if w.cfg.BinDir != "" {
		env.add("PATH", w.cfg.BinDir+string(os.PathListSeparator)+env["PATH"])
	}
	if w.cfg.LastDir != "" {
		env.add("PATH", env["PATH"]+string(os.PathListSeparator)+w.cfg.LastDir)
	}
	// Programs read these to tell that a person is far away; over the mesh the address says nothing.
	env.add("SSH_CLIENT", "0.0.0.0 0 0")
	env.add("SSH_CONNECTION", "0.0.0.0 0 0.0.0.0 0")
	return env.list()
}

// Spec is a command ready to start. Its Env holds credentials: a Spec prints as its program and
// directory only.
type Spec struct {
	Argv []string // Argv[0] is a path or a name to find in PATH
	Dir  string
	Env  []string // sorted, each name once
	// User is whom it runs as; nil is the user that this process runs as.
	User *account.User
}

// String returns the program and directory.
func (s Spec) String() string {
	if len(s.Argv) == 0 {
		return "nothing"
	}
	return fmt.Sprintf("%s in %s", s.Argv[0], s.Dir)
}

// GoString implements [fmt.GoStringer], for %#v.
func (s Spec) GoString() string { return s.String() }

// LogValue implements [slog.LogValuer].
func (s Spec) LogValue() slog.Value { return slog.StringValue(s.String()) }

// Cmd returns the command as the leader of a new session. When ctx ends its whole process group is
// sent SIGHUP, and SIGKILL to what is left of the process after [HangupGrace].
func (s Spec) Cmd(ctx context.Context) *exec.Cmd {
	cmd := exec.CommandContext(ctx, s.program(), s.Argv[1:]...)
	cmd.Args[0] = s.Argv[0]
	cmd.Dir = s.Dir
	cmd.Env = s.Env
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Credential: s.User.Credential()}
	cmd.Cancel = func() error { return Signal(cmd.Process, syscall.SIGHUP) }
	cmd.WaitDelay = HangupGrace
	return cmd
}

// Installed tells whether there is a program to start.
func (s Spec) Installed() bool { return isExecutable(s.program()) }

// program finds Argv[0] in the PATH that the command will have, which is not this process's.
func (s Spec) program() string {
	name := s.Argv[0]
	if strings.Contains(name, "/") {
		return name
	}
	found := name // exec says that it is not there
	err := s.User.Do(func() error {
		for _, pair := range s.Env {
			path, ok := strings.CutPrefix(pair, "PATH=")
			if !ok {
				continue
			}
			for _, dir := range filepath.SplitList(path) {
				if candidate := filepath.Join(dir, name); isExecutable(candidate) {
					found = candidate
					return nil
				}
			}
		}
		return nil
	})
	if err != nil {
		return name // it cannot be started either, and then the reason is told
	}
	return found
}

// Signal sends sig to the process group that p leads. A group that is gone is [os.ErrProcessDone].
func Signal(p *os.Process, sig syscall.Signal) error {
	err := syscall.Kill(-p.Pid, sig)
	if errors.Is(err, syscall.ESRCH) {
		return os.ErrProcessDone
	}
	return err
}

// isExecutable tells whether path is a file that can be run.
func isExecutable(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}
