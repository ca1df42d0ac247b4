package berthd

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/term"

	"github.com/berthd/berth/containers"
)

// exitNotRun is the exit code for what could not be run in a container: the protocol's for failures inside of an agent.
const exitNotRun = exitStatus(229)

// What a command in a container gets to leave by itself when its terminal is gone, and what the engine then gets to kill it. Whoever ended the terminal
// gives us 3 s.
const (
	lastWord = 1500 * time.Millisecond
	lastKill = time.Second
)

// containerExec is the internal verb that runs a command in a container, as if it ran here: on the terminal, or the pipes, that the verb is given. It passes on the
// terminal's size and signals, and exits as the command did. So whatever runs programs runs them in containers too, and need not know.
func (p process) containerExec(ctx context.Context) error {
	var engine, container string
	var cmd containers.Command
	fs := flag.NewFlagSet("berthd container-exec", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringVar(&engine, "engine", "", "")
	fs.StringVar(&container, "container", "", "")
	fs.StringVar(&cmd.User, "user", "", "")
	// Names only: everybody can read a command line.
	fs.Func("env", "", func(names string) error {
		for name := range strings.SplitSeq(names, ",") {
			if value, ok := p.env[name]; ok {
				cmd.Env = append(cmd.Env, name+"="+value)
			}
		}
		return nil
	})
	if err := fs.Parse(p.args); err != nil {
		return usagef("%w: berthd starts this verb by itself", err)
	}
	if engine == "" || container == "" || fs.NArg() > 1 {
		return usagef("container-exec needs --engine, --container and at most one command line: berthd starts this verb by itself")
	}
	cmd.Line = fs.Arg(0)

	// What nobody reads any more ends the command, not us.
	signal.Ignore(syscall.SIGPIPE)
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGWINCH, syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGALRM)
	defer signal.Stop(signals)

	tty, _ := p.stdin.(*os.File)
	if tty != nil && term.IsTerminal(int(tty.Fd())) {
		cmd.Terminal = true
		cmd.Rows, cmd.Cols = sizeOf(tty)
		before, err := term.MakeRaw(int(tty.Fd()))
		if err != nil {
			return fmt.Errorf("cannot use the terminal: %w", err)
		}
		defer term.Restore(int(tty.Fd()), before)
	}
	proc, err := containers.Start(ctx, engine, container, cmd)
	if err != nil {
		return notRun{err}
	}
	defer proc.Close()
	run := containerRun{Process: proc, terminal: cmd.Terminal, tty: tty}
	return run.follow(ctx, p, signals)
}

// notRun is why nothing was run in a container.
type notRun struct{ error }

// Unwrap gives the cause.
func (e notRun) Unwrap() error { return e.error }

// containerRun is a command in a container while it runs.
type containerRun struct {
	*containers.Process
	terminal bool
	tty      *os.File
}

// follow passes on everything until the command has ended, and returns its exit code as an error. No question to the engine is waited for meanwhile: one
// that is slow, or asked too early or too late, delays neither output nor a hang-up.
func (r containerRun) follow(ctx context.Context, p process, signals <-chan os.Signal) error {
	var asking sync.WaitGroup
	defer asking.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	typed := make(chan struct{})
	go func() {
		defer close(typed)
		// Either side may have gone; the other notices by itself.
		_, _ = io.Copy(r, p.stdin)
		_ = r.CloseWrite()
	}()
	broken := make(chan struct{}, 1)
	written := make(chan error, 1)
	go func() {
		written <- r.Copy(&outlet{to: p.stdout, broken: broken}, &outlet{to: p.stderr, broken: broken})
	}()
	resized := make(chan struct{}, 1)
	if r.terminal {
		resized <- struct{}{}
		asking.Go(func() { r.keepSize(ctx, resized) })
	}
	pass := func(sig syscall.Signal) { asking.Go(func() { r.pass(ctx, sig) }) }

	var enough <-chan time.Time
	hangUp := func() {
		if enough == nil {
			enough = time.After(lastWord)
			pass(syscall.SIGHUP)
		}
	}
	var left <-chan struct{} // closed when a terminal has gone; that pipes have ended means no more than that
	if r.terminal {
		left = typed
	}
	for {
		select {
		case sig := <-signals:
			switch {
			case sig == syscall.SIGWINCH && r.terminal:
				select {
				case resized <- struct{}{}:
				default:
				}
			case sig == syscall.SIGHUP && r.terminal:
				hangUp()
			case sig != syscall.SIGWINCH:
				pass(sig.(syscall.Signal))
			}
		case <-left:
			left = nil
			hangUp()
		case <-broken:
			pass(syscall.SIGPIPE)
		case <-enough:
			kill, done := context.WithTimeout(ctx, lastKill)
			defer done()
			r.pass(kill, syscall.SIGKILL)
			return exitStatus(128 + int(syscall.SIGKILL))
		case err := <-written:
			if err != nil {
				return notRun{err}
			}
			code, err := r.Wait(ctx)
			if err != nil {
				return notRun{err}
			}
			return exitStatus(code)
		}
	}
}

// keepSize gives the command's terminal our own's size whenever that may have changed, until ctx is done.
func (r containerRun) keepSize(ctx context.Context, resized <-chan struct{}) {
	for {
		select {
		case <-resized:
		case <-ctx.Done():
			return
		}
		if rows, cols := sizeOf(r.tty); rows > 0 && cols > 0 {
			// The next change of size tries again.
			_ = r.Resize(ctx, rows, cols)
		}
	}
}

// pass passes a signal on. A command that is not reached by it has ended, or its engine has, which shows by itself.
func (r containerRun) pass(ctx context.Context, sig syscall.Signal) { _ = r.Signal(ctx, sig) }

// sizeOf returns a terminal's size, zeros if it is gone.
func sizeOf(tty *os.File) (rows, cols uint16) {
	c, r, err := term.GetSize(int(tty.Fd()))
	if err != nil {
		return 0, 0
	}
	return uint16(r), uint16(c)
}

// outlet writes as long as somebody reads, and swallows the rest: a command whose output is not taken would stand still.
type outlet struct {
	to     io.Writer
	broken chan<- struct{}
	gone   bool
}

// Write implements io.Writer. It is used by one goroutine.
func (o *outlet) Write(b []byte) (int, error) {
	if o.gone {
		return len(b), nil
	}
	if _, err := o.to.Write(b); err != nil {
		o.gone = true
		select {
		case o.broken <- struct{}{}:
		default:
		}
	}
	return len(b), nil
}
