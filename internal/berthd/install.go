package berthd

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/term"

	"github.com/berthd/berth/account"
	"github.com/berthd/berth/internal/service"
	"github.com/berthd/berth/wire"
)

const installText = `berthd install: have systemd start berthd, now and at each boot.

  sudo berthd install --url https://berth.example.com --token-file box.token
  berthd install --user-unit --url ... --token-file ...      for you alone, without root

It shows what it will do, and asks. What is as it should be is left alone, so it may be run again: to change a setting, or after an upgrade.

`

const uninstallText = `berthd uninstall: stop berthd, and take away what berthd install made.

`

// serviceFlags are the flags that install and uninstall share.
type serviceFlags struct {
	userUnit, yes, dryRun bool
	root                  string
}

func (s *serviceFlags) bind(fs *flag.FlagSet) {
	fs.BoolVar(&s.userUnit, "user-unit", false, "a service of your own systemd, without root")
	fs.BoolVar(&s.yes, "yes", false, "do not ask")
	fs.BoolVar(&s.dryRun, "dry-run", false, "show what would be done, and do nothing")
	fs.StringVar(&s.root, "root", "", "the `directory` of a system that does not run, such as an image that is being made; nothing is started")
}

// open finds the service that the flags are about.
func (s *serviceFlags) open(ctx context.Context, env environment) (*service.Service, error) {
	if s.userUnit {
		home := env["HOME"]
		if !filepath.IsAbs(home) || s.root != "" {
			return nil, usagef("--user-unit needs HOME, and goes with no --root")
		}
		if env["XDG_RUNTIME_DIR"] == "" { // as after su, where systemctl would not find the user's systemd
			if err := os.Setenv("XDG_RUNTIME_DIR", fmt.Sprintf("/run/user/%d", os.Getuid())); err != nil {
				return nil, err
			}
		}
		found, err := service.User(ctx, home, cmp.Or(env["XDG_CONFIG_HOME"], filepath.Join(home, ".config")), cmp.Or(env["XDG_STATE_HOME"], filepath.Join(home, ".local/state")))
		return found, explainSystemd(err)
	}
	if os.Getuid() != 0 {
		return nil, usagef("only root installs a service of the machine: use sudo, or --user-unit for a service of your own")
	}
	if s.root != "" {
		var err error
		if s.root, err = filepath.Abs(s.root); err != nil {
			return nil, err
		}
	}
	found, err := service.System(ctx, s.root)
	return found, explainSystemd(err)
}

func explainSystemd(err error) error {
	if errors.Is(err, service.ErrNoSystemd) {
		return fmt.Errorf("%w: have whatever starts programs here run \"berthd run\", with BERTH_URL and BERTH_TOKEN_FILE set; in a container make it the entry point", err)
	}
	return err
}

// notInstalled are the settings of run that install has none of: the token is handed over otherwise, and the others are no service's.
var notInstalled = []string{"token-file", "credential", "status-json", "no-reap"}

// recorder is a flag of run that remembers what it was given.
type recorder struct {
	flag.Value
	given *string
}

func (r recorder) Set(text string) error {
	if err := r.Value.Set(text); err != nil {
		return err
	}
	if list, ok := r.Value.(*headerList); ok {
		text = list.pairs()
	}
	*r.given = text
	return nil
}

func (r recorder) IsBoolFlag() bool {
	b, ok := r.Value.(interface{ IsBoolFlag() bool })
	return ok && b.IsBoolFlag()
}

// install is the verb that makes berthd a service.
func (p process) install(ctx context.Context) error {
	fs := flag.NewFlagSet("berthd install", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	var common serviceFlags
	common.bind(fs)
	createUser := fs.Bool("create-user", false, "make the user that --user names, if there is none")
	noStart := fs.Bool("no-start", false, "leave the start to the next boot")
	encrypt := fs.Bool("encrypt", false, "have systemd keep the token encrypted to this machine")
	tokenFile := fs.String("token-file", "", "`file` with the token, - for standard input, else BERTH_TOKEN; berthd gets a copy that only root can read")
	given := map[string]*string{}
	var checked settings
	run := flags(&checked)
	for _, o := range options {
		if slices.Contains(notInstalled, o.name) {
			continue
		}
		text := ""
		given[o.name] = &text
		fs.Var(recorder{run.Lookup(o.name).Value, &text}, o.name, o.usage)
	}
	if err := fs.Parse(p.args); errors.Is(err, flag.ErrHelp) {
		fmt.Fprint(p.stdout, installText, "Flags:\n")
		printFlags(p.stdout, fs, func(name string) bool { return given[name] == nil })
		fmt.Fprint(p.stdout, "\nAll flags of berthd run but --", strings.Join(notInstalled, ", --"), " become settings of the service: see berthd run --help.\n")
		return err
	} else if err != nil {
		return usagef("%w: see berthd install --help", err)
	}
	if fs.NArg() > 0 {
		return usagef("install takes flags alone, not %q: see berthd install --help", fs.Arg(0))
	}
	if err := checked.server.check(); err != nil {
		return err
	}
	s, err := common.open(ctx, p.env)
	if err != nil {
		return err
	}
	request := service.Request{Settings: service.Settings{}, Encrypt: *encrypt, NoStart: *noStart}
	fs.Visit(func(f *flag.Flag) {
		if text, ok := given[f.Name]; ok {
			request.Settings[variable(f.Name)] = *text
		}
	})
	for _, o := range options {
		// What else is in the environment may be that of a terminal in a workspace.
		if _, value := p.env.first(o.env, o.fallback); o.reach && value != "" && given[o.name] != nil && *given[o.name] == "" {
			request.Settings[o.env] = value
		}
	}
	for _, name := range []string{"ca-file", "client-cert", "client-key"} {
		if path := request.Settings[variable(name)]; path != "" { // the service starts elsewhere
			if request.Settings[variable(name)], err = filepath.Abs(path); err != nil {
				return err
			}
		}
	}
	if request.Token, err = p.installToken(*tokenFile, common.yes || common.dryRun); err != nil {
		return err
	}
	if request.Program, err = os.Executable(); err != nil {
		return fmt.Errorf("cannot find berthd's own program: %w", err)
	}
	if request.NewUser, err = common.newUser(request.Settings, *createUser); err != nil {
		return err
	}
	if err := checkService(s, request); err != nil {
		return err
	}
	plan, err := s.Install(ctx, request)
	if err != nil {
		return err
	}
	if done, err := p.carryOut(ctx, common, plan); err != nil || !done {
		return err
	}
	if status := s.Status(ctx); status != "" {
		fmt.Fprintf(p.stdout, "berthd says: %s\n", status)
	}
	if common.userUnit && !lingers() {
		fmt.Fprintln(p.stdout, "It ends when you log out, unless you say: loginctl enable-linger")
	}
	return nil
}

// uninstall is the verb that undoes install.
func (p process) uninstall(ctx context.Context) error {
	fs := flag.NewFlagSet("berthd uninstall", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	var common serviceFlags
	common.bind(fs)
	purge := fs.Bool("purge", false, "remove the state and the logs, too: host key, spool, and what scripts keep")
	if err := fs.Parse(p.args); errors.Is(err, flag.ErrHelp) {
		fmt.Fprint(p.stdout, uninstallText, "Flags:\n")
		printFlags(p.stdout, fs, func(string) bool { return true })
		return err
	} else if err != nil {
		return usagef("%w: see berthd uninstall --help", err)
	}
	if fs.NArg() > 0 {
		return usagef("uninstall takes flags alone, not %q: see berthd uninstall --help", fs.Arg(0))
	}
	s, err := common.open(ctx, p.env)
	if err != nil {
		return err
	}
	if group, err := os.ReadFile("/proc/self/cgroup"); err == nil && strings.Contains(string(group), "/"+service.UnitName) && !common.dryRun {
		return usagef("this terminal is berthd's and would end in the midst of it: systemd-run berthd uninstall --yes does it behind you")
	}
	plan, err := s.Uninstall(ctx, *purge)
	if err != nil {
		return err
	}
	signal.Ignore(syscall.SIGHUP) // whose terminal it ends may be one of berthd's after all
	_, err = p.carryOut(ctx, common, plan)
	return err
}

// carryOut shows a plan, asks, and does it. It tells whether it was done.
func (p process) carryOut(ctx context.Context, how serviceFlags, plan *service.Plan) (done bool, err error) {
	for _, note := range plan.Notes {
		fmt.Fprintf(p.stdout, "Note: %s\n", note)
	}
	if plan.Empty() {
		fmt.Fprintln(p.stdout, "There is nothing to do.")
		return true, nil
	}
	fmt.Fprintln(p.stdout, "This is to be done:")
	plan.Show(p.stdout)
	if how.dryRun {
		return false, nil
	}
	if !how.yes {
		if !isTerminal(p.stdin) {
			return false, usagef("there is nobody to ask: --yes goes on without")
		}
		fmt.Fprint(p.stdout, "Go on? [y/N] ")
		line, err := bufio.NewReader(p.stdin).ReadString('\n')
		if answer := strings.ToLower(strings.TrimSpace(line)); err != nil || answer != "y" && answer != "yes" {
			return false, errors.New("nothing was done")
		}
	}
	if err := plan.Do(ctx); err != nil {
		return false, fmt.Errorf("%w (what was done before stays; once that is mended, say the same again)", err)
	}
	fmt.Fprintln(p.stdout, "Done.")
	return true, nil
}

func isTerminal(r io.Reader) bool {
	file, ok := r.(*os.File)
	return ok && term.IsTerminal(int(file.Fd()))
}

// maxToken is what a token file has room for, as for run.
const maxToken = 16 << 10

// installToken reads the token to install, empty if none is given.
func (p process) installToken(path string, asksNobody bool) (wire.Secret, error) {
	var text []byte
	var err error
	switch {
	case path == "":
		text = []byte(p.env[envToken])
	case path == "-" && !asksNobody:
		return "", usagef("--token-file - leaves nothing to answer a question with: add --yes")
	case path == "-":
		text, err = io.ReadAll(io.LimitReader(p.stdin, maxToken+1))
	default:
		text, err = readAtMost(path, maxToken+1)
	}
	token := strings.TrimSpace(string(text))
	switch {
	case err != nil:
		return "", fmt.Errorf("cannot read the token: %w", err)
	case path != "" && token == "":
		return "", usagef("there is no token in %s", path)
	case len(text) > maxToken || strings.ContainsAny(token, "\r\n\x00"):
		return "", usagef("what was given as the token is none: it is one line of at most %d bytes", maxToken)
	}
	return wire.Secret(token), nil
}

func readAtMost(path string, limit int64) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return io.ReadAll(io.LimitReader(file, limit))
}

// newUser returns the user that is to be made, empty if none is.
func (s *serviceFlags) newUser(set service.Settings, create bool) (string, error) {
	name := set[variable("user")]
	if name == "" {
		if create {
			return "", usagef("--create-user needs --user NAME")
		}
		return "", nil
	}
	if s.userUnit {
		return "", usagef("a service of your own runs as you: --user goes without --user-unit")
	}
	if _, ok := set[variable("log-dir")]; !ok {
		set[variable("log-dir")] = "" // the machine's is closed to the user
	}
	for u := range account.Entries(filepath.Join(s.root, "/etc/passwd")) {
		if u.Name != name && fmt.Sprint(u.UID) != name {
			continue
		}
		if s.root == "" {
			if _, err := account.Find(name); err != nil {
				return "", usagef("%w", err)
			}
		}
		return "", nil
	}
	if !create {
		return "", usagef("there is no user %q: add --create-user, or name another", name)
	}
	return name, nil
}

// checkService finds out before anything is changed whether berthd could start with the settings.
func checkService(s *service.Service, r service.Request) error {
	for name, value := range r.Settings {
		if strings.ContainsAny(value, "\n\r\x00") {
			return usagef("%s has more than one line", name)
		}
	}
	set, err := s.Settings()
	if err != nil {
		return err
	}
	env := environment(set)
	for name, value := range r.Settings {
		env[name] = value
	}
	env["HOME"] = "/" // what the unit says of the state is not looked at
	checked, err := parseSettings(nil, env, false)
	if err != nil {
		return err
	}
	if _, err := checked.server.parse(); err != nil {
		return err
	}
	if checked.identity.auth == "token" && r.Token == "" && checked.identity.token == "" && checked.identity.tokenFile == "" && !s.HasToken() {
		return usagef("there is no token: give one by --token-file or BERTH_TOKEN, or say --auth auto on a machine of a cloud")
	}
	return nil
}

// variable returns the variable of a flag of run.
func variable(name string) string {
	return options[slices.IndexFunc(options, func(o option) bool { return o.name == name })].env
}

// lingers tells whether the user's systemd runs without a login.
func lingers() bool {
	name := fmt.Sprint(os.Getuid())
	if u, err := account.Named(name); err == nil {
		name = u.Name
	}
	_, err := os.Stat(filepath.Join("/var/lib/systemd/linger", name))
	return !errors.Is(err, fs.ErrNotExist)
}

// printFlags writes the flags that are wanted.
func printFlags(w io.Writer, fs *flag.FlagSet, wanted func(name string) bool) {
	fs.VisitAll(func(f *flag.Flag) {
		if wanted(f.Name) {
			heading, help := describe(f)
			fmt.Fprintf(w, "  %s\n        %s\n", heading, help)
		}
	})
}
