// Command berth reaches workspaces over the mesh and runs a control server.
//
// `berth up` shows everything at work on one machine; `berth serve` is a control server to keep;
// every other verb talks to one. The server and the token come from flags, the environment or the
// file that up and serve leave, in that order: see access.go.
//
// Of the two functions that matter, [run] turns a command line into an exit code, and [joinMesh]
// turns a server and an agent into connections.
//
// Exit codes: 0 done; 1 failed; 2 wrong usage; 130 interrupted. `berth ssh` exits as the remote
// command did, or with 255 if it could not be reached; `berth shell` as the program in the terminal did,
// or with 0 if that was left running.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/berthd/berth/client"
)

func main() { os.Exit(run(arguments(os.Args), os.Stdin, os.Stdout, os.Stderr)) }

// Exit codes beside those of `berth ssh`.
const (
	exitFailed      = 1
	exitUsage       = 2
	exitInterrupted = 130 // 128 + SIGINT, as shells say it
	exitTransport   = 255 // as OpenSSH
)

// exitError ends the program with a code of its own. With a nil error nothing is printed.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// program is one run of berth: its streams and what every verb may need of the command line.
type program struct {
	in, out, errOut *os.File

	url       string
	tokenFile string
	http      client.HTTPConfig
	verbose   bool
	completes bool // it was started by a shell's Tab
}

// run runs one command line and returns its exit code.
func run(args []string, in, out, errOut *os.File) int {
	if len(args) > 0 && args[0] == childVerb {
		return runChild(args[1:], out, errOut)
	}
	p := &program{in: in, out: out, errOut: errOut}
	p.completes = len(args) > 0 && (args[0] == cobra.ShellCompRequestCmd || args[0] == cobra.ShellCompNoDescRequestCmd)
	root := p.command()
	root.SetArgs(args)
	return finish(root.ExecuteContext(context.Background()), errOut)
}

// finish prints an error and turns it into an exit code.
func finish(err error, errOut *os.File) int {
	if err == nil {
		return 0
	}
	var exit *exitError
	if errors.As(err, &exit) {
		if exit.err != nil {
			fmt.Fprintln(errOut, "berth:", clean(exit.err.Error()))
		}
		return exit.code
	}
	fmt.Fprintln(errOut, "berth:", clean(err.Error()))
	return exitFailed
}

// command returns the whole command tree.
func (p *program) command() *cobra.Command {
	root := &cobra.Command{
		Use:   "berth",
		Short: "Reach workspaces over a private mesh, and run the server that joins them",
		Long: `berth reaches workspaces (machines that run berthd) over a private mesh, and runs
the control server that joins them.

The server is named by --url, BERTH_URL, or what "berth up" or "berth serve" left; the token
comes from --token-file, BERTH_TOKEN, or the same place. A token is never an argument.`,
		Example: `  berth up                  # everything on this machine, to try it
  berth ssh demo            # a shell on the agent "demo"
  berth shell demo          # a terminal that can be left and taken up again
  berth forward demo 8080   # its port 8080 on this machine
  berth ports demo -w       # what listens there, as it changes`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          knownVerb,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetOut(p.out)
	root.SetErr(p.errOut)
	flags := root.PersistentFlags()
	flags.StringVar(&p.url, "url", "", "URL of the control server (BERTH_URL)")
	flags.StringVar(&p.tokenFile, "token-file", "", "file that holds the session token (or its text in BERTH_TOKEN)")
	flags.StringVar(&p.http.CAFile, "ca-file", "", "PEM file of certificates to trust beside the system's (BERTH_CA_FILE)")
	flags.StringVar(&p.http.CertFile, "client-cert", "", "PEM file of the certificate that a proxy in front of the server wants (BERTH_CLIENT_CERT)")
	flags.StringVar(&p.http.KeyFile, "client-key", "", "PEM file of its key, where that is another file (BERTH_CLIENT_KEY)")
	flags.BoolVarP(&p.verbose, "verbose", "v", false, "log what happens to standard error")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageError(cmd, err)
	})

	const reach, look, operate = "reach", "look", "operate"
	root.AddGroup(
		&cobra.Group{ID: reach, Title: "Reach a workspace:"},
		&cobra.Group{ID: look, Title: "Look at it:"},
		&cobra.Group{ID: operate, Title: "Run a server:"},
	)
	add := func(group string, commands ...*cobra.Command) {
		for _, c := range commands {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	add(reach, p.sshCommand(), p.shellCommand(), p.forwardCommand(), p.configSSHCommand())
	add(look, p.statusCommand(), p.portsCommand(), p.containersCommand(), p.logsCommand(), p.pingCommand(), p.speedtestCommand())
	add(operate, p.upCommand(), p.serveCommand(), p.agentCommand())
	root.AddCommand(p.versionCommand())
	return root
}

// usageError says what is wrong with a command line and where its usage is shown.
func usageError(cmd *cobra.Command, err error) error {
	return &exitError{exitUsage, fmt.Errorf("%w; see %s --help", err, cmd.CommandPath())}
}

// knownVerb refuses what is no verb, and names those that are close to it.
func knownVerb(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	err := fmt.Errorf("cannot %q: there is no such verb", args[0])
	cmd.SuggestionsMinimumDistance = 2 // two letters swapped
	if close := cmd.SuggestionsFor(args[0]); len(close) > 0 {
		err = fmt.Errorf("%w; did you mean %s", err, strings.Join(close, " or "))
	}
	return usageError(cmd, err)
}

// wantArgs is a cobra check of the number of arguments whose error shows the usage line; max < 0 is no limit.
func wantArgs(least, most int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) >= least && (most < 0 || len(args) <= most) {
			return nil
		}
		return usageError(cmd, fmt.Errorf("cannot understand %d arguments: the form is %q", len(args), cmd.UseLine()))
	}
}
