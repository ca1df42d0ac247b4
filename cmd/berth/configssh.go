package main

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// hostSuffix is what agents' names end in as OpenSSH host names.
const hostSuffix = ".berth"

// sshFileName is the file beside ~/.ssh/config that holds everything berth has to say to OpenSSH.
const sshFileName = "berth_config"

// The lines of ~/.ssh/config that are berth's.
const (
	includeBegin = "# berth: begin (berth config-ssh --remove takes this out)"
	includeEnd   = "# berth: end"
)

// name is what an agent or host may be called on a command line: what servers allow, and nothing that
// a shell, OpenSSH or a terminal would read as more than a name.
var nameForm = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]{0,126}[A-Za-z0-9])?$`)

func checkName(name string) error {
	if !nameForm.MatchString(name) {
		return fmt.Errorf("cannot use %q as the name of an agent: it must be letters, digits, dots, dashes and underscores, and begin and end with a letter or digit", name)
	}
	return nil
}

func (p *program) configSSHCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "config-ssh",
		Short: "Let OpenSSH (ssh, scp, rsync, editors) reach agents as NAME" + hostSuffix,
		Long: `Let OpenSSH reach agents as NAME` + hostSuffix + `. All of it stands in a file of its own,
~/.ssh/` + sshFileName + `, which one Include line at the top of ~/.ssh/config names. It covers agents
yet to come, so it is run once. The change is shown first; on a terminal it is asked for.`,
		Example: `  berth config-ssh --dry-run
  berth config-ssh && ssh demo` + hostSuffix + `
  berth config-ssh --remove`,
		Args:              wantArgs(0, 0),
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	dryRun := cmd.Flags().Bool("dry-run", false, "show the change and do nothing")
	remove := cmd.Flags().Bool("remove", false, "take it all out again")
	yes := cmd.Flags().BoolP("yes", "y", false, "do not ask")
	configFile := cmd.Flags().String("ssh-config-file", "", "the file OpenSSH reads (default ~/.ssh/config)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		config := *configFile
		if config == "" {
			home, err := os.UserHomeDir()
			if err != nil {
				return fmt.Errorf("cannot find ~/.ssh: %w", err)
			}
			config = filepath.Join(home, ".ssh", "config")
		}
		changes, err := p.planSSH(config, *remove)
		if err != nil {
			return err
		}
		return p.applySSH(changes, *dryRun, *yes)
	}
	return cmd
}

// change is a file before and after. Nil data is a file that is not there.
type change struct {
	path          string
	before, after []byte
	mode          fs.FileMode
}

func (c change) needed() bool { return string(c.before) != string(c.after) }

// planSSH returns what has to change for OpenSSH to know berth, or to forget it.
func (p *program) planSSH(config string, remove bool) ([]change, error) {
	config, err := filepath.Abs(config)
	if err != nil {
		return nil, err
	}
	// Some keep their configuration elsewhere and link to it; the link must stay one.
	if real, err := filepath.EvalSymlinks(config); err == nil {
		config = real
	}
	own := filepath.Join(filepath.Dir(config), sshFileName)
	main, err := readChange(config)
	if err != nil {
		return nil, err
	}
	hosts, err := readChange(own)
	if err != nil {
		return nil, err
	}
	if remove {
		main.after, hosts.after = withoutInclude(main.before), nil
		if len(main.after) == 0 {
			main.after = nil
		}
		return []change{main, hosts}, nil
	}
	proxy, err := p.proxyCommand()
	if err != nil {
		return nil, err
	}
	include, err := sshQuote(own)
	if err != nil {
		return nil, err
	}
	hosts.after = []byte(hostsFile(proxy))
	main.after = withInclude(main.before, include)
	// The included file comes first, so that the line never names one that is missing.
	return []change{hosts, main}, nil
}

func readChange(path string) (change, error) {
	c := change{path: path, mode: 0o600}
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return c, nil
	}
	if err != nil {
		return c, fmt.Errorf("cannot read the SSH configuration: %w", err)
	}
	c.mode = info.Mode().Perm()
	if c.before, err = os.ReadFile(path); err != nil {
		return c, fmt.Errorf("cannot read the SSH configuration: %w", err)
	}
	return c, nil
}

// withInclude puts the Include line first: below a Host line it would hold for that host only.
func withInclude(config []byte, path string) []byte {
	block := includeBegin + "\nInclude " + path + "\n" + includeEnd + "\n"
	rest := withoutInclude(config)
	if len(rest) > 0 {
		block += "\n"
	}
	return append([]byte(block), rest...)
}

// withoutInclude takes berth's lines out and leaves every other byte alone. Without an end line only
// the lines that are surely berth's go.
func withoutInclude(config []byte) []byte {
	before, rest, found := strings.Cut(string(config), includeBegin+"\n")
	if !found {
		return config
	}
	block, after, ended := strings.Cut(rest, includeEnd+"\n")
	if !ended || strings.Count(block, "\n") != 1 {
		line, tail, _ := strings.Cut(rest, "\n")
		if !strings.HasPrefix(line, "Include ") {
			tail = rest
		}
		after = tail
	} else {
		after = strings.TrimPrefix(after, "\n")
	}
	return []byte(before + after)
}

// proxyCommand returns the command line by which OpenSSH reaches a host, as the words of a shell
// command without the host.
func (p *program) proxyCommand() ([]string, error) {
	binary, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("cannot find this program's path: %w", err)
	}
	if runByGo(binary) {
		return nil, errors.New("cannot configure OpenSSH for a program that \"go run\" deletes; build it first: go build -o ~/bin/berth ./cmd/berth")
	}
	words := []string{binary}
	if p.url != "" {
		words = append(words, "--url", p.url)
	}
	for _, file := range []struct{ flag, path string }{{"--token-file", p.tokenFile}, {"--ca-file", p.http.CAFile}, {"--client-cert", p.http.CertFile}, {"--client-key", p.http.KeyFile}} {
		if file.path == "" {
			continue
		}
		abs, err := filepath.Abs(file.path)
		if err != nil {
			return nil, err
		}
		words = append(words, file.flag, abs)
	}
	for _, w := range words {
		if strings.ContainsFunc(w, hidden) {
			return nil, fmt.Errorf("cannot write %q into an SSH configuration: it holds a character that is not printable", w)
		}
	}
	return words, nil
}

// runByGo tells whether the program is the temporary build of `go run`, …/go-build123/b001/exe/berth.
func runByGo(binary string) bool {
	return strings.Contains(binary, string(filepath.Separator)+"go-build") && filepath.Base(filepath.Dir(binary)) == "exe"
}

// OpenSSH's own signs of life end a connection that the mesh does not carry any more, of agents that cannot take it up again. They
// leave a connection more time than the 10 minutes it can be taken up in: what a person has for all hosts is meant
// for connections that are dead after a minute.
const (
	aliveInterval = 60 // seconds
	aliveCount    = 15
)

// hostsFile is the content of berth's own file. %h stands in single quotes, and a host name that holds
// one is not matched, so no name that someone was talked into typing becomes shell code; berth then
// refuses what is no agent's name.
func hostsFile(proxy []string) string {
	var words []string
	for _, w := range proxy {
		// Before the shell sees the line, OpenSSH replaces what follows a percent sign.
		words = append(words, strings.ReplaceAll(shellQuote(w), "%", "%%"))
	}
	return `# Written by "berth config-ssh"; your changes here would be lost.
# There is no host key to check: the mesh proves who answers before SSH begins.
Host *` + hostSuffix + ` "!*'*"
	ProxyCommand ` + strings.Join(words, " ") + ` ssh --stdio -- '%h'
	StrictHostKeyChecking no
	UserKnownHostsFile /dev/null
	GlobalKnownHostsFile /dev/null
	LogLevel ERROR
	ServerAliveInterval ` + strconv.Itoa(aliveInterval) + `
	ServerAliveCountMax ` + strconv.Itoa(aliveCount) + `
`
}

// sshQuote returns a path as an argument of an OpenSSH configuration line. Include expands patterns
// and has no way to escape them.
func sshQuote(path string) (string, error) {
	if strings.ContainsFunc(path, hidden) || strings.ContainsAny(path, `"*?[]\%$`) {
		return "", fmt.Errorf("cannot include %q in an SSH configuration: its path holds a character that OpenSSH reads as a pattern", path)
	}
	return `"` + path + `"`, nil
}

// applySSH shows the changes and makes them.
func (p *program) applySSH(changes []change, dryRun, yes bool) error {
	any := false
	for _, c := range changes {
		if c.needed() {
			any = true
			fmt.Fprint(p.out, c.String())
		}
	}
	if !any {
		fmt.Fprintln(p.errOut, "nothing to change")
		return nil
	}
	if dryRun {
		return nil
	}
	if !yes && term.IsTerminal(int(p.in.Fd())) {
		fmt.Fprint(p.errOut, "make this change? [Y/n] ")
		line, err := bufio.NewReader(p.in).ReadString('\n')
		if answer := strings.ToLower(strings.TrimSpace(line)); err != nil || answer != "" && answer != "y" && answer != "yes" {
			return &exitError{exitFailed, errors.New("nothing was changed")}
		}
	}
	for _, c := range changes {
		if err := c.apply(); err != nil {
			return err
		}
	}
	fmt.Fprintf(p.errOut, "done; try: ssh NAME%s\n", hostSuffix)
	return nil
}

func (c change) apply() error {
	switch {
	case !c.needed():
		return nil
	case c.after == nil:
		if err := os.Remove(c.path); err != nil {
			return fmt.Errorf("cannot change the SSH configuration: %w", err)
		}
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(c.path), 0o700); err != nil {
		return fmt.Errorf("cannot change the SSH configuration: %w", err)
	}
	if err := replaceFile(c.path, c.after, c.mode); err != nil {
		return fmt.Errorf("cannot change the SSH configuration: %w", err)
	}
	return nil
}

// String shows the lines that go and come. Lines that both have at the end are left out.
func (c change) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "--- %s\n", c.path)
	before, after := lines(c.before), lines(c.after)
	for len(before) > 0 && len(after) > 0 && before[len(before)-1] == after[len(after)-1] {
		before, after = before[:len(before)-1], after[:len(after)-1]
	}
	for len(before) > 0 && len(after) > 0 && before[0] == after[0] {
		before, after = before[1:], after[1:]
	}
	for _, l := range before {
		fmt.Fprintf(&b, "- %s\n", cleanIndented(l))
	}
	for _, l := range after {
		fmt.Fprintf(&b, "+ %s\n", cleanIndented(l))
	}
	return b.String()
}

func lines(data []byte) []string {
	if len(data) == 0 {
		return nil
	}
	return strings.Split(strings.TrimSuffix(string(data), "\n"), "\n")
}

func cleanIndented(line string) string {
	return clean(strings.ReplaceAll(line, "\t", "    "))
}
