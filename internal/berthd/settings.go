package berthd

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/berthd/berth/client"
	"github.com/berthd/berth/identity"
	"github.com/berthd/berth/wire"
)

// settings are what run takes from flags and variables, as given.
type settings struct {
	server   serverSettings
	identity identitySettings
	dirs     dirSettings
	services serviceSettings
	output   outputSettings
	user     string // whom the workspace belongs to
	// stock tells that berthd was started as the stock agent is. The scripts that do so start it once.
	stock bool
	// autoUpgrade has berthd follow the version that the server hosts.
	autoUpgrade bool
	// noReap keeps process 1 from being an init.
	noReap bool
	// ignored are the stock agent's flags that were given and have no effect.
	ignored []string
}

type serverSettings struct {
	url           string
	header        headerList
	headerCommand string
	reach         client.HTTPConfig
}

type identitySettings struct {
	auth          string
	token         wire.Secret // from the environment only
	tokenFile     string
	credential    string
	credentials   string // the directory that systemd keeps them in
	agentName     string
	exitOnRefused *bool // nil when nothing is said
}

type dirSettings struct {
	state, logs, scriptData string
	stateByDefault          bool // nobody said which
}

type serviceSettings struct {
	devcontainers     bool
	coderCommand      bool
	sshMaxTimeout     time.Duration
	sshResumeWindow   time.Duration
	shutdownTimeout   time.Duration
	terminalIdle      time.Duration
	namedTerminalIdle time.Duration
	sshGrace          time.Duration
	scrollback        uint
	listenPort        uint
	relayOnly         bool
	tailnetDebug      bool
	blockFileTransfer bool
	blockReverse      bool
	blockLocal        bool
}

type outputSettings struct {
	logFormat      string
	logLevel       slog.Level
	logHuman       string
	logJSON        string
	logStackdriver string
	statusJSON     string
	subsystem      string
	pprof          string
	prometheus     string
	debug          string
}

// Secrets have no flag: what is in argv, every user of the machine can read.
const (
	envToken         = "BERTH_TOKEN"
	envTokenFallback = "CODER_AGENT_TOKEN"
)

// option is one setting: a flag, the variable it can be given by, and the stock agent's variable
// that stands in for both. docs/settings.md shows all of them.
type option struct {
	name     string
	env      string
	fallback string
	// stock is the flag that the stock agent has for it, which the verb agent takes too.
	stock string
	// reach tells that it says how to reach the server, and as whom: verbs that ask it read those.
	reach bool
	usage string
	bind  func(*flag.FlagSet, *settings, string, string)
}

func text(field func(*settings) *string, preset string) func(*flag.FlagSet, *settings, string, string) {
	return func(fs *flag.FlagSet, s *settings, name, usage string) { fs.StringVar(field(s), name, preset, usage) }
}

func toggle(field func(*settings) *bool) func(*flag.FlagSet, *settings, string, string) {
	return func(fs *flag.FlagSet, s *settings, name, usage string) { fs.BoolVar(field(s), name, false, usage) }
}

// choice is a toggle that tells whether it was given.
func choice(field func(*settings) **bool) func(*flag.FlagSet, *settings, string, string) {
	return func(fs *flag.FlagSet, s *settings, name, usage string) {
		fs.BoolFunc(name, usage, func(text string) error {
			on, err := strconv.ParseBool(text)
			*field(s) = &on
			return err
		})
	}
}

// toggleOff is a toggle that is on until it is switched off.
func toggleOff(field func(*settings) *bool) func(*flag.FlagSet, *settings, string, string) {
	return func(fs *flag.FlagSet, s *settings, name, usage string) { fs.BoolVar(field(s), name, true, usage) }
}

func span(field func(*settings) *time.Duration, preset time.Duration) func(*flag.FlagSet, *settings, string, string) {
	return func(fs *flag.FlagSet, s *settings, name, usage string) { fs.DurationVar(field(s), name, preset, usage) }
}

var options = []option{
	{name: "url", env: "BERTH_URL", fallback: "CODER_AGENT_URL", stock: "agent-url", reach: true,
		usage: "`URL` of the control server",
		bind:  text(func(s *settings) *string { return &s.server.url }, "")},
	{name: "auth", env: "BERTH_AUTH", fallback: "CODER_AGENT_AUTH", stock: "auth", reach: true,
		usage: "how to prove who this is: token, auto (a token if there is one, else the cloud that is found), aws-instance-identity, azure-instance-identity, google-instance-identity or kubernetes-service-account",
		bind:  text(func(s *settings) *string { return &s.identity.auth }, "token")},
	{name: "token-file", env: "BERTH_TOKEN_FILE", fallback: "CODER_AGENT_TOKEN_FILE", stock: "agent-token-file", reach: true,
		usage: "`file` that holds the token, read anew at each connection (the token itself goes into BERTH_TOKEN only)",
		bind:  text(func(s *settings) *string { return &s.identity.tokenFile }, "")},
	{name: "credential", env: "BERTH_CREDENTIAL", reach: true,
		usage: "`name` of the systemd credential with the token; where there is one, it is used before all else",
		bind:  text(func(s *settings) *string { return &s.identity.credential }, "agent-token")},
	{name: "agent-name", env: "BERTH_AGENT_NAME", fallback: "CODER_AGENT_NAME", stock: "agent-name", reach: true,
		usage: "`name` of this agent, where one machine has several",
		bind:  text(func(s *settings) *string { return &s.identity.agentName }, "")},
	{name: "exit-on-refused", env: "BERTH_EXIT_ON_REFUSED",
		usage: "exit with 77 when the server refuses the token twice; false never does. Without it, berthd leaves when a token was good, is refused for 20 s and cannot be had anew, unless it is process 1 or was called by the verb agent",
		bind:  choice(func(s *settings) **bool { return &s.identity.exitOnRefused })},
	{name: "header", env: "BERTH_HEADER", fallback: "CODER_AGENT_HEADER", stock: "agent-header", reach: true,
		usage: "`key=value` header for every request to the server and relay; repeatable, in the variable separated by commas",
		bind:  func(fs *flag.FlagSet, s *settings, name, usage string) { fs.Var(&s.server.header, name, usage) }},
	{name: "header-command", env: "BERTH_HEADER_COMMAND", fallback: "CODER_AGENT_HEADER_COMMAND", stock: "agent-header-command", reach: true,
		usage: "shell `command` that prints such headers, one a line; run once at start, with CODER_URL",
		bind:  text(func(s *settings) *string { return &s.server.headerCommand }, "")},
	{name: "ca-file", env: "BERTH_CA_FILE", reach: true,
		usage: "PEM `file` of certificates to trust beside the system's",
		bind:  text(func(s *settings) *string { return &s.server.reach.CAFile }, "")},
	{name: "client-cert", env: "BERTH_CLIENT_CERT", reach: true,
		usage: "PEM `file` of the certificate, with its chain, by which a proxy in front of the server knows this machine; read anew for each connection",
		bind:  text(func(s *settings) *string { return &s.server.reach.CertFile }, "")},
	{name: "client-key", env: "BERTH_CLIENT_KEY", reach: true,
		usage: "PEM `file` of its key, where that is another file",
		bind:  text(func(s *settings) *string { return &s.server.reach.KeyFile }, "")},
	{name: "state-dir", env: "BERTH_STATE_DIR",
		usage: "`directory` for what outlives a restart (default /var/lib/berthd for root, else $XDG_STATE_HOME/berthd)",
		bind:  text(func(s *settings) *string { return &s.dirs.state }, "")},
	{name: "user", env: "BERTH_USER",
		usage: "`name` or number of the user that everything in the workspace runs as; only for a berthd that is root",
		bind:  text(func(s *settings) *string { return &s.user }, "")},
	{name: "log-dir", env: "BERTH_LOG_DIR", fallback: "CODER_AGENT_LOG_DIR", stock: "log-dir",
		usage: "`directory` for the logs of scripts (default log in the state directory)",
		bind:  text(func(s *settings) *string { return &s.dirs.logs }, "")},
	{name: "script-data-dir", env: "BERTH_SCRIPT_DATA_DIR", fallback: "CODER_AGENT_SCRIPT_DATA_DIR", stock: "script-data-dir",
		usage: "`directory` for what scripts keep (default the state directory)",
		bind:  text(func(s *settings) *string { return &s.dirs.scriptData }, "")},
	{name: "ssh-max-timeout", env: "BERTH_SSH_MAX_TIMEOUT", fallback: "CODER_AGENT_SSH_MAX_TIMEOUT", stock: "ssh-max-timeout",
		usage: "how long an SSH client may stay silent before it counts as gone",
		bind:  span(func(s *settings) *time.Duration { return &s.services.sshMaxTimeout }, 72*time.Hour)},
	{name: "ssh-resume-window", env: "BERTH_SSH_RESUME_WINDOW",
		usage: "how long an SSH connection made by way of berth is kept while its network is away",
		bind:  span(func(s *settings) *time.Duration { return &s.services.sshResumeWindow }, 10*time.Minute)},
	{name: "shutdown-timeout", env: "BERTH_SHUTDOWN_TIMEOUT",
		usage: "how long it may take to stop, all stop scripts included, which run at the same time",
		bind:  span(func(s *settings) *time.Duration { return &s.services.shutdownTimeout }, time.Minute)},
	{name: "terminal-idle-timeout", env: "BERTH_TERMINAL_IDLE_TIMEOUT",
		usage: "how long a terminal that has no name lives on with nobody attached; 0 means for ever",
		bind:  span(func(s *settings) *time.Duration { return &s.services.terminalIdle }, 5*time.Minute)},
	{name: "named-terminal-idle-timeout", env: "BERTH_NAMED_TERMINAL_IDLE_TIMEOUT",
		usage: "the same for a terminal that has one, as those of berth shell do",
		bind:  span(func(s *settings) *time.Duration { return &s.services.namedTerminalIdle }, 0)},
	{name: "ssh-terminal-grace", env: "BERTH_SSH_TERMINAL_GRACE",
		usage: "how long the terminal of an SSH session that was cut off waits to be taken up by berth shell; 0 ends it at once",
		bind:  span(func(s *settings) *time.Duration { return &s.services.sshGrace }, 5*time.Minute)},
	{name: "terminal-scrollback", env: "BERTH_TERMINAL_SCROLLBACK",
		usage: "how many `lines` that left a terminal's screen are kept, within 4 MiB; 0 means 10000",
		bind: func(fs *flag.FlagSet, s *settings, name, usage string) {
			fs.UintVar(&s.services.scrollback, name, 0, usage)
		}},
	{name: "tailnet-listen-port", env: "BERTH_TAILNET_LISTEN_PORT", fallback: "CODER_AGENT_TAILNET_LISTEN_PORT", stock: "tailnet-listen-port",
		usage: "UDP `port` for direct paths; 0 lets the system choose",
		bind: func(fs *flag.FlagSet, s *settings, name, usage string) {
			fs.UintVar(&s.services.listenPort, name, 0, usage)
		}},
	{name: "relay-only", env: "BERTH_RELAY_ONLY",
		usage: "never use direct paths",
		bind:  toggle(func(s *settings) *bool { return &s.services.relayOnly })},
	{name: "tailnet-debug", env: "BERTH_TAILNET_DEBUG", fallback: "CODER_MAGICSOCK_DEBUG_LOGGING",
		usage: "log all that the mesh does, whatever --log-level says",
		bind:  toggle(func(s *settings) *bool { return &s.services.tailnetDebug })},
	{name: "devcontainers", env: "BERTH_DEVCONTAINERS", fallback: "CODER_AGENT_DEVCONTAINERS_ENABLE", stock: "devcontainers-enable",
		usage: "show containers, and let dev containers be made anew",
		bind:  toggleOff(func(s *settings) *bool { return &s.services.devcontainers })},
	{name: "coder-command", env: "BERTH_CODER_COMMAND",
		usage: "give sessions a command named coder, which is berthd, at the end of their PATH",
		bind:  toggle(func(s *settings) *bool { return &s.services.coderCommand })},
	{name: "block-file-transfer", env: "BERTH_BLOCK_FILE_TRANSFER", fallback: "CODER_AGENT_BLOCK_FILE_TRANSFER", stock: "block-file-transfer",
		usage: "refuse sftp, scp, rsync and nc over SSH",
		bind:  toggle(func(s *settings) *bool { return &s.services.blockFileTransfer })},
	{name: "block-reverse-port-forwarding", env: "BERTH_BLOCK_REVERSE_PORT_FORWARDING", fallback: "CODER_AGENT_BLOCK_REVERSE_PORT_FORWARDING", stock: "block-reverse-port-forwarding",
		usage: "refuse ssh -R",
		bind:  toggle(func(s *settings) *bool { return &s.services.blockReverse })},
	{name: "block-local-port-forwarding", env: "BERTH_BLOCK_LOCAL_PORT_FORWARDING", fallback: "CODER_AGENT_BLOCK_LOCAL_PORT_FORWARDING", stock: "block-local-port-forwarding",
		usage: "refuse ssh -L",
		bind:  toggle(func(s *settings) *bool { return &s.services.blockLocal })},
	{name: "auto-upgrade", env: "BERTH_AUTO_UPGRADE",
		usage: "follow the server: put the berthd that it hosts into the place of this one whenever that is another version",
		bind:  toggle(func(s *settings) *bool { return &s.autoUpgrade })},
	{name: "no-reap", env: "BERTH_NO_REAP", stock: "no-reap",
		usage: "as process 1 of a container, do not be an init that waits for orphans and has berthd as its child",
		bind:  toggle(func(s *settings) *bool { return &s.noReap })},
	{name: "subsystem", env: "BERTH_SUBSYSTEM", fallback: "CODER_AGENT_SUBSYSTEM",
		usage: "what berthd runs inside of: envbox, envbuilder, exectrace, separated by commas",
		bind:  text(func(s *settings) *string { return &s.output.subsystem }, "")},
	{name: "log-format", env: "BERTH_LOG_FORMAT",
		usage: "text or json, on standard error",
		bind:  text(func(s *settings) *string { return &s.output.logFormat }, "text")},
	{name: "log-level", env: "BERTH_LOG_LEVEL",
		usage: "`level` from which on to log: debug, info, warn or error",
		bind: func(fs *flag.FlagSet, s *settings, name, usage string) {
			fs.TextVar(&s.output.logLevel, name, slog.LevelInfo, usage)
		}},
	{name: "log-human", env: "BERTH_LOG_HUMAN", fallback: "CODER_AGENT_LOGGING_HUMAN", stock: "log-human",
		usage: "`file` that gets the log as text too; /dev/stderr takes the place of --log-format",
		bind:  text(func(s *settings) *string { return &s.output.logHuman }, "")},
	{name: "log-json", env: "BERTH_LOG_JSON", fallback: "CODER_AGENT_LOGGING_JSON", stock: "log-json",
		usage: "`file` that gets the log as JSON too",
		bind:  text(func(s *settings) *string { return &s.output.logJSON }, "")},
	{name: "log-stackdriver", env: "BERTH_LOG_STACKDRIVER", fallback: "CODER_AGENT_LOGGING_STACKDRIVER", stock: "log-stackdriver",
		usage: "`file` that gets the log as Google Cloud's agents read it too",
		bind:  text(func(s *settings) *string { return &s.output.logStackdriver }, "")},
	{name: "pprof-address", env: "BERTH_PPROF_ADDRESS", fallback: "CODER_AGENT_PPROF_ADDRESS", stock: "pprof-address",
		usage: "loopback `address`, or unix:PATH, that serves Go's profiles",
		bind:  text(func(s *settings) *string { return &s.output.pprof }, "")},
	{name: "prometheus-address", env: "BERTH_PROMETHEUS_ADDRESS", fallback: "CODER_AGENT_PROMETHEUS_ADDRESS", stock: "prometheus-address",
		usage: "`address`, or unix:PATH, that serves metrics",
		bind:  text(func(s *settings) *string { return &s.output.prometheus }, "")},
	{name: "debug-address", env: "BERTH_DEBUG_ADDRESS", fallback: "CODER_AGENT_DEBUG_ADDRESS", stock: "debug-address",
		usage: "loopback `address`, or unix:PATH, that serves the log, the manifest and the state of the mesh",
		bind:  text(func(s *settings) *string { return &s.output.debug }, "")},
	{name: "status-json", env: "BERTH_STATUS_JSON",
		usage: "file descriptor number or `file` that gets one JSON line a step: identity, exchange, linked, tailnet, ready, trouble, lost, stopped",
		bind:  text(func(s *settings) *string { return &s.output.statusJSON }, "")},
}

// leftOut are the stock agent's flags that have no counterpart; docs/settings.md says why. The verb
// agent takes them, and does not do what they ask for.
var leftOut = []string{
	"devcontainers-project-discovery-enable",
	"devcontainers-discovery-autostart-enable",
	"socket-server-enabled",
	"socket-path",
	"boundary-log-proxy-socket-path",
}

// ignored is a flag that is taken, with or without a value, and changes nothing.
type ignored struct {
	name string
	s    *settings
}

func (i ignored) String() string { return "" }
func (i ignored) IsBoolFlag() bool {
	return i.name != "socket-path" && i.name != "boundary-log-proxy-socket-path"
}
func (i ignored) Set(string) error {
	i.s.ignored = append(i.s.ignored, i.name)
	return nil
}

// flags returns the flag set of run, bound to s.
func flags(s *settings) *flag.FlagSet {
	fs := flag.NewFlagSet("berthd run", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	for _, o := range options {
		o.bind(fs, s, o.name, o.usage)
	}
	return fs
}

// stockFlags adds the stock agent's flags to those of run.
func stockFlags(fs *flag.FlagSet, s *settings) {
	for _, o := range options {
		if o.stock != "" && o.stock != o.name {
			fs.Var(fs.Lookup(o.name).Value, o.stock, o.usage)
		}
	}
	for _, name := range leftOut {
		fs.Var(ignored{name, s}, name, "")
	}
}

// printOptions writes every flag with its variables.
func printOptions(w io.Writer) {
	fs := flags(&settings{})
	for _, o := range options {
		f := fs.Lookup(o.name)
		heading, help := describe(f)
		names := o.env
		if o.fallback != "" {
			names += ", else " + o.fallback
		}
		if f.DefValue != "" && f.DefValue != "false" && f.DefValue != "0" {
			help += " (default " + f.DefValue + ")"
		}
		fmt.Fprintf(w, "  %s\n        %s\n        $%s\n", heading, help, names)
	}
}

// describe returns how a flag is given, and what for.
func describe(f *flag.Flag) (heading, help string) {
	value, help := flag.UnquoteUsage(f)
	if b, ok := f.Value.(interface{ IsBoolFlag() bool }); ok && b.IsBoolFlag() {
		value = ""
	}
	return strings.TrimSpace("--" + f.Name + " " + value), help
}

// parseSettings reads flags, then variables, then the stock agent's variables: the first that says
// something wins. With stock, the stock agent's flags are taken too.
func parseSettings(args []string, env environment, stock bool) (*settings, error) {
	s := &settings{stock: stock}
	fs := flags(s)
	if stock {
		stockFlags(fs, s)
	}
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil, err
		}
		return nil, usagef("%w: see berthd run --help", err)
	}
	if fs.NArg() > 0 {
		return nil, usagef("there is no verb or flag %q: see berthd --help", fs.Arg(0))
	}
	given := map[string]bool{}
	fs.Visit(func(f *flag.Flag) { given[f.Name] = true })
	for _, o := range options {
		if given[o.name] || stock && given[o.stock] {
			continue
		}
		if err := o.fromEnvironment(fs, env); err != nil {
			return nil, err
		}
	}
	s.identity.readToken(env)
	if s.dirs.state == "" {
		dir, err := defaultStateDir(os.Getuid(), env)
		if err != nil && !stock {
			return nil, err
		}
		s.dirs.state, s.dirs.stateByDefault = dir, true
	}
	return s, s.check()
}

// parseServer reads from variables how to reach the server, and as whom. What else is set, rightly or
// not, matters to run alone.
func parseServer(env environment) (*settings, error) {
	s := &settings{}
	fs := flags(s)
	for _, o := range options {
		if !o.reach {
			continue
		}
		if err := o.fromEnvironment(fs, env); err != nil {
			return nil, err
		}
	}
	s.identity.readToken(env)
	return s, s.server.check()
}

// fromEnvironment sets the option if one of its variables does.
func (o option) fromEnvironment(fs *flag.FlagSet, env environment) error {
	name, value := env.first(o.env, o.fallback)
	if name == "" {
		return nil
	}
	if err := fs.Set(o.name, value); err != nil {
		return usagef("cannot use %s=%s: %w", name, value, err)
	}
	return nil
}

func (s *identitySettings) readToken(env environment) {
	_, token := env.first(envToken, envTokenFallback)
	s.token = wire.Secret(token)
	s.credentials = env[identity.EnvCredentials]
}

func (s *serverSettings) check() error {
	if s.header.bad != nil {
		return usagef("cannot use a header (--header, BERTH_HEADER or CODER_AGENT_HEADER): %w", s.header.bad)
	}
	return nil
}

func (s *settings) check() error {
	if err := s.server.check(); err != nil {
		return err
	}
	if s.services.sshMaxTimeout < 0 || s.services.sshResumeWindow < 0 || s.services.shutdownTimeout < 0 {
		return usagef("--ssh-max-timeout, --ssh-resume-window and --shutdown-timeout cannot be negative: 0 means their default")
	}
	if s.services.terminalIdle < 0 || s.services.namedTerminalIdle < 0 {
		return usagef("--terminal-idle-timeout and --named-terminal-idle-timeout cannot be negative: 0 means for ever")
	}
	if s.services.sshGrace < 0 {
		return usagef("--ssh-terminal-grace cannot be negative: 0 ends the terminal of an SSH session with its connection")
	}
	if s.services.scrollback > math.MaxInt32 {
		return usagef("--terminal-scrollback %d is more than any terminal has", s.services.scrollback)
	}
	if s.services.listenPort > 65535 {
		return usagef("--tailnet-listen-port %d is no port: 65535 is the highest", s.services.listenPort)
	}
	if s.output.logFormat != "text" && s.output.logFormat != "json" {
		return usagef("--log-format %q is neither text nor json", s.output.logFormat)
	}
	for _, name := range s.subsystems() {
		switch name {
		case "envbox", "envbuilder", "exectrace":
		default:
			return usagef("--subsystem %q is none of envbox, envbuilder and exectrace", name)
		}
	}
	return nil
}

func (s *settings) subsystems() []string {
	return strings.FieldsFunc(s.output.subsystem, func(r rune) bool { return r == ',' || r == ' ' })
}

// parse checks the URL, which more than anything else is typed wrong.
func (s *serverSettings) parse() (*url.URL, error) {
	if s.url == "" {
		return nil, usagef("the control server's URL is missing: set --url or BERTH_URL (or CODER_AGENT_URL), such as https://berth.example.com")
	}
	u, err := url.Parse(s.url)
	if err != nil {
		// The error repeats the URL, which may hold a password.
		return nil, usagef("the control server's URL cannot be read: give it as https://berth.example.com")
	}
	switch {
	case u.User != nil:
		return nil, usagef("the control server's URL holds a user name or password: take it out, and put a token into BERTH_TOKEN")
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, usagef("the control server's URL %q does not begin with http:// or https://", s.url)
	case u.Host == "":
		return nil, usagef("the control server's URL %q names no host", s.url)
	case u.RawQuery != "" || u.Fragment != "":
		return nil, usagef("the control server's URL %q must end before any ? or #", s.url)
	}
	return u, nil
}

// stateDir is where an agent of this user keeps its state, as far as the environment tells.
func stateDir(env environment) (string, error) {
	if dir := env["BERTH_STATE_DIR"]; dir != "" {
		return dir, nil
	}
	return defaultStateDir(os.Getuid(), env)
}

var errNoPlace = usagef("there is no place for state: set --state-dir or BERTH_STATE_DIR, or HOME")

// defaultStateDir is where an agent keeps its state unless it is told.
func defaultStateDir(uid int, env environment) (string, error) {
	if uid == 0 && writable("/var/lib") {
		return "/var/lib/berthd", nil
	}
	if dir := env["XDG_STATE_HOME"]; filepath.IsAbs(dir) {
		return filepath.Join(dir, "berthd"), nil
	}
	if home := env["HOME"]; filepath.IsAbs(home) {
		return filepath.Join(home, ".local", "state", "berthd"), nil
	}
	return "", errNoPlace
}

// writable tells whether a directory on a file system that is not read-only can be written to.
func writable(dir string) bool {
	probe, err := os.MkdirTemp(dir, ".berthd-")
	if err != nil {
		return false
	}
	return os.Remove(probe) == nil
}

// headerList collects key=value headers.
type headerList struct {
	http.Header
	// bad is why one cannot be used. Set does not return it: package flag would repeat the value,
	// which may be a credential.
	bad error
}

// String implements flag.Value. Values may be credentials and are not shown.
func (h *headerList) String() string {
	if h == nil || len(h.Header) == 0 {
		return ""
	}
	return strconv.Itoa(len(h.Header)) + " headers"
}

// pairs returns the headers in the form that Set takes. Values are shown.
func (h *headerList) pairs() string {
	var pairs []string
	for key, values := range h.Header {
		for _, value := range values {
			pairs = append(pairs, key+"="+value)
		}
	}
	slices.Sort(pairs)
	return strings.Join(pairs, ",")
}

// Set implements flag.Value: one header, or several separated by commas.
func (h *headerList) Set(list string) error {
	for pair := range strings.SplitSeq(list, ",") {
		h.add(pair)
	}
	return nil
}

// add takes one header.
func (h *headerList) add(pair string) {
	key, value, ok := strings.Cut(pair, "=")
	key = strings.TrimSpace(key)
	switch {
	case !ok || key == "":
		h.bad = errors.New("a header must be key=value")
	case strings.ContainsAny(pair, "\r\n\x00") || strings.ContainsAny(key, " :\t"):
		h.bad = errors.New("a header must be key=value in one line, its key one word")
	default:
		if h.Header == nil {
			h.Header = http.Header{}
		}
		h.Add(key, value)
	}
}
