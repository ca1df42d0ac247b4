package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"
	"golang.org/x/term"

	"github.com/berthd/berth/wire"
)

const (
	// keepaliveInterval is how often a quiet SSH connection is probed, keepaliveTimeout when it is
	// given up. The mesh carries a connection through minutes without network; nobody waits longer.
	keepaliveInterval = 15 * time.Second
	keepaliveTimeout  = 3 * time.Minute
)

func (p *program) sshCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ssh NAME [-- COMMAND...]",
		Short: "Open a shell on an agent, or run a command there",
		Long: `Open a shell on an agent, or run a command there, over the mesh.

Without a command, or with -t, a terminal is used if standard input and output are one. Else
the three streams are carried as they are. One word of COMMAND is a line for the shell there; several
are a program and its arguments, which reach it unchanged. The exit code is the command's own, or 255 if it
could not be reached. On a terminal, ~. after Enter hangs up.

With --container, all of it happens in a container beside the agent ("berth containers NAME" lists
them). For OpenSSH, "ssh -o SetEnv=CODER_CONTAINER=CONTAINER NAME.berth" does the same. Options of berth stand
before or after NAME; the first word that is none begins COMMAND.`,
		Example: `  berth ssh demo
  berth ssh demo -- uname -a
  berth ssh demo -- 'cd /srv && ls *.log | wc -l'
  tar c . | berth ssh demo -- tar x -C /srv
  berth ssh demo -t top
  berth ssh demo --container web --user app`,
		Args:              wantArgs(1, -1),
		ValidArgsFunction: p.agentNames,
	}
	// What follows the first word of the command is the command's: its flags are not ours.
	// Only completion must see past NAME, to offer what an option behind it takes.
	cmd.Flags().SetInterspersed(p.completes)
	var in inContainer
	cmd.Flags().StringVar(&in.name, "container", "", "go into this container, by its name, its id or ENGINE/NAME")
	cmd.Flags().StringVar(&in.user, "user", "", "who to be in the container (default: as its image says)")
	cmd.RegisterFlagCompletionFunc("container", p.containerNames)
	tty := cmd.Flags().BoolP("tty", "t", false, "use a terminal for a command too")
	noTTY := cmd.Flags().BoolP("no-tty", "T", false, "never use a terminal")
	stdio := cmd.Flags().Bool("stdio", false, "carry an SSH connection over standard input and output, as a ProxyCommand")
	wait, now := waitFlag(cmd), nowFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		name, command := args[0], args[1:]
		if len(command) > 0 && strings.HasPrefix(command[0], "-") {
			// As with OpenSSH, options may follow the name.
			if err := cmd.Flags().Parse(command); err != nil {
				return usageError(cmd, err)
			}
			command = cmd.Flags().Args()
		}
		if help, _ := cmd.Flags().GetBool("help"); help {
			return cmd.Help()
		}
		if in.user != "" && in.name == "" {
			return usageError(cmd, errors.New("cannot be another user without --container: berthd runs everything as its own user"))
		}
		if err := checkName(name); err != nil {
			return &exitError{exitTransport, err}
		}
		if *stdio {
			if len(command) > 0 {
				return usageError(cmd, errors.New("cannot run a command with --stdio: the SSH client does that"))
			}
			if in.name != "" {
				return usageError(cmd, errors.New("cannot go into a container with --stdio: give the SSH client -o SetEnv=CODER_CONTAINER=NAME"))
			}
			return p.sshStdio(cmd.Context(), name, *wait, *now)
		}
		terminal := !*noTTY && (*tty || len(command) == 0) &&
			term.IsTerminal(int(p.in.Fd())) && term.IsTerminal(int(p.out.Fd()))
		return p.ssh(cmd.Context(), name, in, commandLine(command), terminal, *wait, *now)
	}
	return cmd
}

// commandLine returns what the remote shell is to run. The words of a program's arguments are quoted, so
// that sh -c 'exit 7' means there what it means here.
func commandLine(words []string) string {
	if len(words) == 1 {
		return words[0]
	}
	quoted := make([]string, len(words))
	for i, w := range words {
		quoted[i] = shellQuote(w)
	}
	return strings.Join(quoted, " ")
}

// ssh runs a command, or a login shell if it is empty, and ends as that does.
func (p *program) ssh(ctx context.Context, name string, in inContainer, command string, terminal bool, wait time.Duration, now bool) error {
	m, err := p.enter(ctx, name, wait, now)
	if err != nil {
		return &exitError{exitTransport, err}
	}
	defer m.Close()
	dialing, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	stream, err := p.openSSH(dialing, m)
	if err != nil {
		return &exitError{exitTransport, err}
	}
	defer stream.Close()
	client, err := speakSSH(dialing, m, stream)
	if err != nil {
		return &exitError{exitTransport, err}
	}
	defer client.Close()

	session, err := client.NewSession()
	if err != nil {
		return &exitError{exitTransport, fmt.Errorf("cannot open a session on %s: %w", name, err)}
	}
	defer session.Close()
	if err := in.ask(session); err != nil {
		return &exitError{exitTransport, fmt.Errorf("cannot go into container %s of %s: %w", in.name, name, err)}
	}
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	if !resumes(stream) { // what is taken up again notices itself when it cannot be
		go keepAlive(ctx, client)
	}
	if terminal {
		err = p.runTerminal(ctx, stop, session, command)
	} else {
		err = p.runStreams(ctx, stop, session, command)
	}
	return sshResult(ctx, name, err)
}

// dialSSH opens an SSH connection to the agent. There is nothing to log in with and no host key to
// compare: WireGuard has proven both ends already, and the agent lets in whom the coordinator lets through.
func dialSSH(ctx context.Context, m *mesh) (*ssh.Client, error) {
	conn, err := m.dial(ctx, wire.PortSSH)
	if err != nil {
		return nil, err
	}
	return speakSSH(ctx, m, conn)
}

// speakSSH is dialSSH over a connection that is there.
func speakSSH(ctx context.Context, m *mesh, conn net.Conn) (*ssh.Client, error) {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	c, channels, requests, err := ssh.NewClientConn(conn, m.agent.Name, &ssh.ClientConfig{
		User:            "berth",
		HostKeyCallback: ssh.InsecureIgnoreHostKey(),
	})
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("cannot speak SSH with agent %s: %w", m.agent.Name, err)
	}
	return ssh.NewClient(c, channels, requests), nil
}

// keepAlive closes the connection when its other end is gone for good.
func keepAlive(ctx context.Context, client *ssh.Client) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(keepaliveInterval):
		}
		gone := time.AfterFunc(keepaliveTimeout, func() { client.Close() })
		// Any answer will do; agents refuse the request, which shows that they live.
		_, _, err := client.SendRequest("keepalive@openssh.com", true, nil)
		gone.Stop()
		if err != nil {
			return
		}
	}
}

// errHangUp ends a session because the person said so.
var errHangUp = errors.New("hung up")

// signalled ends a session because this process was told to end.
type signalled struct{ signal syscall.Signal }

func (s signalled) Error() string { return "ended by " + s.signal.String() }

// sshResult turns the end of a session into an exit code.
func sshResult(ctx context.Context, name string, err error) error {
	var exit *ssh.ExitError
	var end signalled
	switch {
	case err == nil:
		return nil
	case errors.As(err, &exit):
		if s := exit.Signal(); s != "" {
			return &exitError{exitTransport, fmt.Errorf("the command on %s was ended by SIG%s", name, s)}
		}
		return &exitError{exitStatus(exit.ExitStatus()), nil}
	case errors.Is(context.Cause(ctx), errHangUp):
		return &exitError{exitTransport, nil}
	case errors.As(context.Cause(ctx), &end):
		return &exitError{128 + int(end.signal), nil}
	}
	return &exitError{exitTransport, sshBroke(name, err)}
}

// exitStatus fits a remote exit status, which has 32 bits, into ours: what is not zero stays so.
func exitStatus(code int) int {
	if code != 0 && code&0xff == 0 {
		return exitFailed
	}
	return code & 0xff
}

// sshSignals are those that make sense to pass on, by their SSH names.
var sshSignals = map[os.Signal]ssh.Signal{
	syscall.SIGINT: ssh.SIGINT, syscall.SIGTERM: ssh.SIGTERM, syscall.SIGHUP: ssh.SIGHUP,
	syscall.SIGQUIT: ssh.SIGQUIT, syscall.SIGUSR1: ssh.SIGUSR1, syscall.SIGUSR2: ssh.SIGUSR2,
}

// forwardSignals passes signals of this process to the remote command. The second of those that ask to
// end, or a closed window, ends the session: the command may not listen, or not be reachable.
func forwardSignals(ctx context.Context, stop context.CancelCauseFunc, session *ssh.Session) (undo func()) {
	incoming := make(chan os.Signal, 4) // a few may come before the first is passed on
	for s := range sshSignals {
		signal.Notify(incoming, s)
	}
	go func() {
		asked := false
		for {
			select {
			case <-ctx.Done():
				return
			case s := <-incoming:
				// Sending may block on a dead path, so the decision to leave comes first.
				if s == syscall.SIGHUP || asked {
					stop(signalled{s.(syscall.Signal)})
				}
				asked = s == syscall.SIGINT || s == syscall.SIGTERM || s == syscall.SIGQUIT
				go session.Signal(sshSignals[s])
			}
		}
	}()
	return func() { signal.Stop(incoming) }
}

// runStreams runs a command whose three streams are ours.
func (p *program) runStreams(ctx context.Context, stop context.CancelCauseFunc, session *ssh.Session, command string) error {
	// A pipe rather than session.Stdin: the session must end with the command, not with our input.
	in, err := session.StdinPipe()
	if err != nil {
		return err
	}
	session.Stdout, session.Stderr = p.out, p.errOut
	defer forwardSignals(ctx, stop, session)()
	if err := start(session, command); err != nil {
		return err
	}
	go func() {
		io.Copy(in, p.in)
		in.Close()
	}()
	return wait(ctx, session)
}

func start(session *ssh.Session, command string) error {
	if command == "" {
		return session.Shell()
	}
	return session.Start(command)
}

// wait waits for the command, or for ctx to end it.
func wait(ctx context.Context, session *ssh.Session) error {
	done := make(chan error, 1)
	go func() { done <- session.Wait() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// runTerminal runs a command on a terminal of its own that shows in ours.
func (p *program) runTerminal(ctx context.Context, stop context.CancelCauseFunc, session *ssh.Session, command string) error {
	local, err := openTerminal(p.in, p.out)
	if err != nil {
		return err
	}
	defer local.Close()
	size := local.Size()
	// The remote side sets the modes of a fresh terminal; only that we speak UTF-8 is ours to say.
	modes := ssh.TerminalModes{ssh.IUTF8: 1}
	if err := session.RequestPty(terminalType(), int(size.Rows), int(size.Cols), modes); err != nil {
		return fmt.Errorf("cannot get a terminal: %w", err)
	}
	in, err := session.StdinPipe()
	if err != nil {
		return err
	}
	session.Stdout, session.Stderr = p.out, p.errOut
	if err := start(session, command); err != nil {
		return err
	}
	ends := make(chan os.Signal, 1)
	signal.Notify(ends, syscall.SIGTERM, syscall.SIGHUP)
	defer signal.Stop(ends)
	go func() {
		for {
			select {
			case <-ctx.Done():
				return
			case size := <-local.Resized():
				session.WindowChange(int(size.Rows), int(size.Cols))
			case s := <-ends:
				stop(signalled{s.(syscall.Signal)})
			}
		}
	}()
	go func() {
		err := copyInput(in, p.in)
		in.Close()
		if errors.Is(err, errLeave) {
			stop(errHangUp)
		}
	}()
	return wait(ctx, session)
}

func terminalType() string {
	if t := os.Getenv("TERM"); t != "" {
		return t
	}
	return "xterm-256color"
}

// sshStdio carries the bytes of an SSH connection, for another SSH client.
func (p *program) sshStdio(ctx context.Context, name string, wait time.Duration, now bool) error {
	ctx, stop := untilInterrupt(ctx)
	defer stop()
	m, err := p.enter(ctx, name, wait, now)
	if err != nil {
		return &exitError{exitTransport, err}
	}
	defer m.Close()
	dialing, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	conn, err := p.openSSH(dialing, m)
	if err != nil {
		return &exitError{exitTransport, err}
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	go func() {
		io.Copy(conn, p.in)
		closeWrite(conn)
	}()
	if _, err := io.Copy(p.out, conn); err != nil && !errors.Is(err, syscall.EPIPE) && ctx.Err() == nil {
		return &exitError{exitTransport, sshBroke(name, err)}
	}
	return nil
}

// closeWrite ends one direction of a connection, or all of it where that cannot be done.
func closeWrite(conn net.Conn) {
	if half, ok := conn.(interface{ CloseWrite() error }); ok {
		half.CloseWrite()
		return
	}
	conn.Close()
}
