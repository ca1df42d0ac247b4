// Package berthd is the command line of the workspace agent, for cmd/berthd and for `berth up`, which
// runs an agent from its own binary.
//
// [Main] is all of it: arguments and environment in, exit code out.
package berthd

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/berthd/berth/scripts/hold"
)

// Exit codes. Those of sysexits.h are used where they fit, so that a supervisor can tell what
// helps: another start, or a person.
const (
	ExitOK       = 0
	ExitFailure  = 1  // something failed that berthd has no better word for
	ExitUsage    = 64 // a flag or setting is wrong or missing
	ExitNoAgent  = 69 // report: no berthd answers here
	ExitState    = 73 // the state directory cannot be made or written to
	ExitRestart  = 75 // SIGHUP: start again; terminals live on
	ExitBusy     = 76 // another berthd runs with this state directory
	ExitRefused  = 77 // the token is lost, or refused and --exit-on-refused is set; terminals live on
	exitCodeHelp = `Exit codes:
  0   stopped as told
  1   failed
  64  a flag or setting is wrong or missing
  69  report: no berthd answers at the socket
  73  the state directory cannot be made or written to
  75  SIGHUP: to be started again; terminals live on
  76  another berthd runs with this state directory
  77  a token that was good is refused and cannot be had anew, or any is and
      --exit-on-refused is set; terminals live on
`
)

const usageText = `berthd is the workspace agent of berth.

  berthd [run] [flags]      run the agent (agent is another name for run)
  berthd install [flags]    have systemd start berthd, now and at each boot
  berthd uninstall [flags]  undo that
  berthd report [flags]     tell what an app in this workspace is doing
  berthd mcp [flags]        let a coding assistant tell what it is doing
  berthd git-ssh            ssh for git, with the key that the server keeps
  berthd git-askpass        answer git's questions with a login that the server keeps
  berthd external-auth      print such a login
  berthd upgrade            put the berthd that the server hosts into the place of this one
  berthd doctor             find out what is wrong here, and how to mend it
  berthd stat               how much of the processor, memory and disk is used
  berthd version            say which berthd this is
  berthd VERB --help        show the flags of a verb, with their variables

Example:
  BERTH_URL=https://berth.example.com BERTH_TOKEN=... berthd

` + exitCodeHelp

// usageError is a mistake in arguments or settings.
type usageError struct{ error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// process is what a verb runs with.
type process struct {
	args           []string
	env            environment
	stdin          io.Reader
	stdout, stderr io.Writer
}

// Main runs berthd with args, without the program's name, and env as of os.Environ. It returns the
// exit code. Signals end the verb run: SIGINT and SIGTERM stop the workspace, SIGHUP makes berthd
// leave so that it can be started again.
func Main(ctx context.Context, args, env []string, stdin io.Reader, stdout, stderr io.Writer) int {
	verb, rest := "run", args
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		verb, rest = args[0], args[1:]
	}
	p := process{args: rest, env: newEnvironment(env), stdin: stdin, stdout: stdout, stderr: stderr}
	if isGitPrompt(args) {
		verb, p.args = "git-askpass", args
	}
	var err error
	switch {
	case len(args) > 0 && (args[0] == "--version" || args[0] == "-version"):
		p.version()
	case len(args) == 0 && filepath.Base(os.Args[0]) == "coder":
		// Somebody in a session tries the name out; the agent is started as "coder agent".
		fmt.Fprint(stdout, usageText)
	case len(args) == 1 && (args[0] == "--help" || args[0] == "-h" || args[0] == "help"):
		fmt.Fprint(stdout, usageText)
		fmt.Fprint(stdout, "\nFlags of run:\n")
		printOptions(stdout)
	case verb == "run" || verb == "agent":
		if err = p.run(ctx, args, verb == "agent"); errors.Is(err, errInPlace) {
			err = p.restartInPlace(args)
		}
	case verb == "install":
		err = p.install(ctx)
	case verb == "uninstall":
		err = p.uninstall(ctx)
	case verb == "ptyhost":
		err = p.ptyhost(ctx)
	case verb == "hold-script":
		err = hold.RunProcess()
	case verb == "sftp-server":
		err = p.sftpServer()
	case verb == "user-check":
		err = p.userCheck()
	case verb == "container-exec":
		err = p.containerExec(ctx)
	case verb == "git-ssh" || verb == "gitssh":
		err = p.gitSSH(ctx)
	case verb == "git-askpass":
		err = p.gitAskpass(ctx)
	case verb == "external-auth":
		err = p.externalAuth(ctx)
	case verb == "doctor":
		err = p.doctor(ctx)
	case verb == "stat":
		err = p.stat(ctx)
	case verb == "mcp":
		err = p.mcp(ctx)
	case verb == "report":
		err = p.report(ctx)
	case verb == "upgrade":
		err = p.upgrade(ctx)
	case verb == "version":
		p.version()
	default:
		err = usagef("there is no verb %q: see berthd --help", verb)
	}
	return p.exit(err)
}

// exit says what went wrong in one line and returns its code.
func (p process) exit(err error) int {
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return ExitOK
	}
	code := exitCode(err)
	var ran exitStatus
	if code != ExitRestart && !errors.As(err, &ran) {
		fmt.Fprintf(p.stderr, "berthd: %v\n", err)
	}
	return code
}
