package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"
	"github.com/mattn/go-runewidth"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/berthd/berth/wire"
)

const (
	defaultSession = "main"

	// attachTimeout is how long one attempt to attach again may take before the next.
	attachTimeout = 15 * time.Second
	// maxRefused is how many attachments in a row may end at once before a byte ever came: half a minute.
	maxRefused = 10
	// goodbyeTimeout bounds waiting for the agent to notice that a viewer leaves.
	goodbyeTimeout = time.Second
	// askTimeout is how long an agent may take to say whether it lists terminals, once a stream ended.
	askTimeout = 5 * time.Second
)

func (p *program) shellCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "shell NAME [SESSION]",
		Short: "Open a terminal that can be left and taken up again",
		Long: `Open a terminal on an agent that lives on when it is left: with ~. after Enter, with a
closed window, or because the network went away. The same command takes it up again, from
anywhere, with the screen as it was. SESSION names one of several; the default is "main".

A lost connection comes back by itself. The exit code is that of the program in the terminal.`,
		Example: `  berth shell demo
  berth shell demo build             # a second one
  ~.                                 # after Enter: leave it running
  berth shell demo --list            # what is running
  berth shell demo build --read-only # watch, without typing
  berth shell demo build --rename test
  berth shell demo test --close      # end it and its program`,
		Args:              wantArgs(1, 2),
		ValidArgsFunction: p.sessionNames,
	}
	flags := cmd.Flags()
	command := flags.StringP("command", "c", "", "run this instead of a login shell, if the session is new")
	readOnly := flags.BoolP("read-only", "r", false, "watch an existing session: what is typed and this window's size change nothing")
	container := flags.String("container", "", "open the terminal in this container of the workspace")
	user := flags.String("user", "", "as this user of the container")
	list := flags.BoolP("list", "l", false, "list the sessions")
	rename := flags.String("rename", "", "give SESSION another name")
	closing := flags.Bool("close", false, "end SESSION and its program")
	output := outputFlag(cmd)
	wait, now := waitFlag(cmd), nowFlag(cmd)
	cmd.MarkFlagsMutuallyExclusive("list", "rename", "close")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		name, session := args[0], ""
		if len(args) == 2 {
			session = args[1]
		}
		renames := flags.Changed("rename")
		for _, flag := range []string{"command", "read-only", "user", "container"} {
			if flags.Changed(flag) && (*list || (renames || *closing) && flag != "container") {
				return usageError(cmd, fmt.Errorf("cannot use --%s with --list, --rename or --close: it is for opening a session", flag))
			}
		}
		switch {
		case *user != "" && *container == "":
			return usageError(cmd, errors.New("cannot use --user alone: it is a user of the --container"))
		case *list && session != "":
			return usageError(cmd, errors.New("cannot list one session: --list shows all"))
		case *list:
			return p.listTerminals(cmd.Context(), name, *wait, *output)
		case (renames || *closing) && session == "":
			return usageError(cmd, errors.New("cannot tell which session: name it after NAME; --list shows them"))
		case renames:
			return p.renameTerminal(cmd.Context(), name, sessionKey(session, *container), sessionKey(*rename, *container), *wait)
		case *closing:
			return p.closeTerminal(cmd.Context(), name, sessionKey(session, *container), *wait)
		case !term.IsTerminal(int(p.in.Fd())) || !term.IsTerminal(int(p.out.Fd())):
			return errors.New("cannot open a terminal: standard input and output must be one; for a pipe use \"berth ssh\"")
		}
		m, err := p.enter(cmd.Context(), name, *wait, *now)
		if err != nil {
			return err
		}
		defer m.Close()
		init := sessionInit(m.agent.Name, session, *container)
		init.Command, init.ContainerUser, init.ReadOnly = *command, *user, *readOnly
		init.Existing = init.Existing || *readOnly
		s := &shell{mesh: m, in: p.in, out: p.out, init: init, sent: newOutbox()}
		return p.showEnd(s, session, s.run(cmd.Context()))
	}
	return cmd
}

// sessionSpace is the name space of sessions, drawn once.
var sessionSpace = uuid.MustParse("6d1c1d2c-5f0e-4a53-9a0c-1f1f3f1d7c52")

// sessionInit says which terminal a session's name means. The name finds it at an agent that knows names, else the
// id derived from it does, from anywhere. It goes by the name of the agent: a workspace that is built anew is
// another agent of that name, and its terminals live on. An id as --list shows it means what has it.
func sessionInit(agent, session, container string) wire.PTYInit {
	if id, err := uuid.Parse(session); err == nil {
		return wire.PTYInit{ID: id, Container: container, Existing: true, Ending: true}
	}
	if session == "" {
		session = defaultSession
	}
	session = sessionKey(session, container)
	return wire.PTYInit{ID: uuid.NewSHA1(sessionSpace, []byte(agent+"/"+session)), Name: session, Container: container, Ending: true}
}

// sessionKey is the name that the agent knows a session by. An id is one everywhere, and no name stays none.
func sessionKey(session, container string) string {
	if _, err := uuid.Parse(session); err == nil || session == "" || container == "" {
		return session
	}
	return container + "/" + session
}

// showEnd says how a view of a session ended where the screen does not, and turns it into an exit code.
func (p *program) showEnd(s *shell, session string, err error) error {
	var end signalled
	var ending *endedError
	switch {
	case errors.Is(err, errLeave):
		again := "berth shell " + shellQuote(clean(s.mesh.agent.Name))
		if session != "" && session != defaultSession {
			again += " " + shellQuote(clean(session))
		}
		if s.init.Container != "" {
			again += " --container " + shellQuote(clean(s.init.Container))
		}
		fmt.Fprintf(p.errOut, "left it running; take it up again with: %s\n", again)
		return nil
	case errors.As(err, &end):
		return &exitError{128 + int(end.signal), nil}
	case errors.As(err, &ending):
		if text := ending.text(); text != "" {
			err = errors.New(text)
		} else {
			err = nil
		}
		if ending.Code == 0 && err == nil {
			return nil
		}
		return &exitError{exitStatus(ending.Code), err}
	}
	return err
}

// endedError is the end of a session's program, or why there is none.
type endedError struct{ wire.PTYEnding }

func (e *endedError) Error() string { return fmt.Sprintf("the session ended with code %d", e.Code) }

// text says what the exit code does not.
func (e *endedError) text() string {
	switch {
	case e.Reason != "":
		return "the session ended: " + e.Reason
	case e.Signal != "":
		return "the program was ended by SIG" + e.Signal
	}
	return ""
}

// shell is one person's view of a terminal session.
type shell struct {
	mesh    *mesh
	in, out *os.File
	init    wire.PTYInit
	traces  traces // of the session's programs on our terminal
	view    string // the last stream that showed anything, and how many bytes of it did
	got     uint64

	heard atomic.Bool // output came since the last probe
	names atomic.Bool // the agent said that it knows names, and so endings
	stock atomic.Bool // the agent said that it does not
	sent  *outbox
}

// run shows the session until it ends (nil or *endedError), is left (errLeave) or this process is told to end (signalled).
func (s *shell) run(ctx context.Context) error {
	modes := modesOf(s.in)
	local, err := openTerminal(s.in, s.out)
	if err != nil {
		return err
	}
	guard := startGuard(s.out, modes)
	s.traces.switched = guard.switched
	io.WriteString(s.out, saveTitle)
	defer func() {
		io.WriteString(s.out, s.traces.undo())
		local.Close()
		guard.dismiss()
	}()
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	go s.input(stop)
	go s.watch(ctx, stop, local)

	wait, refused := minRedial, 0
	for again := false; ; again = true {
		start := time.Now()
		err := s.attach(ctx, local.Size(), again)
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err == nil, errors.As(err, new(*endedError)):
			return err
		case !again && !errors.Is(err, errAttachmentLost):
			return err
		case time.Since(start) > maxRedial:
			wait, refused = minRedial, 0
		case s.view == "" && errors.Is(err, errAttachmentLost):
			if refused++; refused == maxRefused {
				return fmt.Errorf("cannot open a terminal: agent %s takes the connection and closes it without a word; its log says why", s.mesh.agent.Name)
			}
		default:
			refused = 0
		}
		s.notice(fmt.Sprintf("the connection to %s is lost; trying again (~. leaves)", s.mesh.agent.Name), local.Size())
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(wait):
		}
		wait = min(2*wait, maxRedial)
	}
}

// errAttachmentLost says that a terminal was attached and then the connection broke.
var errAttachmentLost = errors.New("the connection broke")

// attach shows the session until its program ends (nil if nobody says how, else *endedError) or the connection breaks.
func (s *shell) attach(ctx context.Context, size windowSize, again bool) error {
	dialing, cancel := context.WithTimeout(ctx, attachTimeout)
	defer cancel()
	conn, err := s.mesh.dial(dialing, wire.PortPTY)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() {
		// The mesh is left next: without the agent's answer to the end of input it might not learn that this viewer is gone, and keep its size.
		conn.SetDeadline(time.Now().Add(goodbyeTimeout))
		s.sent.leave()
	})()
	init := s.request(size)
	if err := wire.WritePTYInit(conn, init); err != nil {
		return err
	}
	stop := s.sent.serve(conn)
	defer func() {
		conn.Close() // which ends a write that waits
		stop()
	}()
	probing, cancelProbe := context.WithCancel(ctx)
	defer cancelProbe()
	go func() {
		s.mesh.probe(probing, &s.heard, s.sent.probe)
		conn.Close()
	}()
	if !s.names.Load() && !s.stock.Load() {
		go s.ask(probing)
	}

	return s.copyOut(ctx, conn, init.View, again)
}

// request is what is asked of the agent at the next attachment.
func (s *shell) request(size windowSize) wire.PTYInit {
	init := s.init
	init.Height, init.Width = size.Rows, size.Cols
	init.View, init.After, init.Got = uuid.NewString(), s.view, s.got
	init.Existing = init.Existing || s.view != "" // what a person was in does not begin anew behind their back
	return init
}

// copyOut shows a stream to its end, and says what that means as attach does.
func (s *shell) copyOut(ctx context.Context, stream io.Reader, view string, again bool) error {
	var output wire.PTYOutput
	first := true
	buf := make([]byte, inputSize)
	for {
		n, err := stream.Read(buf)
		if ctx.Err() != nil { // the view is over; only the agent's end is waited for
			if err != nil {
				return ctx.Err()
			}
			continue
		}
		if n > 0 {
			s.heard.Store(true)
			if first {
				// An agent that has no such terminal says so in the stream too, for stock clients. The screen is not the place.
				if refusal, ok := refusalIn(buf[:n]); ok {
					return refusal
				}
				if again {
					io.WriteString(s.out, "\x1b[H\x1b[2J") // the notice and whatever stood beside it
				}
				first = false
				s.view, s.got = view, 0
			}
			s.got += uint64(n)
			if err := s.show(output.Next(buf[:n])); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return s.ended(ctx, &output)
		case err != nil:
			return fmt.Errorf("%w: %v", errAttachmentLost, err)
		}
	}
}

// refusalIn finds that an agent refuses a terminal: the reason as text, and then the ending with as much of it as fits.
func refusalIn(stream []byte) (*endedError, bool) {
	rest, ending, ok := wire.CutPTYEnding(stream)
	reason, line := strings.CutSuffix(string(rest), "\r\n")
	if !ok || !line || ending.Reason == "" || !strings.HasPrefix(reason, ending.Reason) {
		return nil, false
	}
	ending.Reason = reason
	return &endedError{ending}, true
}

func (s *shell) show(output []byte) error {
	s.traces.see(output)
	_, err := s.out.Write(output)
	return err
}

// ended tells what the end of a stream means. Agents that know of endings send one unless they were cut off; with others, nobody can tell.
func (s *shell) ended(ctx context.Context, output *wire.PTYOutput) error {
	rest, ending, ok := output.End()
	if err := s.show(rest); err != nil {
		return err
	}
	if ok {
		return &endedError{ending}
	}
	if !s.names.Load() && !s.stock.Load() {
		asking, cancel := context.WithTimeout(ctx, askTimeout)
		defer cancel()
		s.ask(asking)
	}
	if s.stock.Load() {
		return nil
	}
	return fmt.Errorf("%w: the agent closed it", errAttachmentLost)
}

// ask learns whether the agent lists terminals: those that do also say how each ended.
func (s *shell) ask(ctx context.Context) {
	_, err := newTerminalsAPI(s.mesh).list(ctx)
	switch {
	case err == nil:
		s.names.Store(true)
	case errors.Is(err, errNoTerminals):
		s.stock.Store(true)
	}
}

// input sends what is typed. It ends with the process: a read from a terminal cannot be broken off.
func (s *shell) input(stop context.CancelCauseFunc) {
	send := s.sent.put
	if s.init.ReadOnly {
		send = func(text string) {
			if ctrlC.MatchString(text) { // there is nothing else that it could interrupt
				stop(errLeave)
			}
		}
	}
	err := copyInput(&runes{send: send}, s.in)
	if err == nil || !errors.Is(err, errLeave) {
		// The end of input is a closed window: the session lives on.
		err = errLeave
	}
	stop(err)
}

// ctrlC matches Ctrl-C as terminals send it, and in the form that programs can ask for (kitty's keyboard protocol): the key, the
// modifiers less one, of which 4 is Ctrl and 64 and 128 are locks, and that it was pressed.
var ctrlC = regexp.MustCompile(`\x03|\x1b\[99(?::[0-9:]*)?;(?:5|69|133|197)(?::[12])?(?:;[0-9:]*)?u`)

// runes cuts a byte stream into text: JSON carries characters, so one that came in halves must wait.
type runes struct {
	send func(string)
	rest []byte
}

func (r *runes) Write(p []byte) (int, error) {
	data := append(r.rest, p...)
	whole := len(data)
	// A character has four bytes at most; an incomplete one is among the last three.
	for i := max(0, len(data)-utf8.UTFMax+1); i < len(data); i++ {
		if utf8.RuneStart(data[i]) && !utf8.FullRune(data[i:]) {
			whole = i
			break
		}
	}
	if whole > 0 {
		r.send(string(data[:whole]))
	}
	r.rest = append([]byte(nil), data[whole:]...)
	return len(p), nil
}

// watch passes on the size of the window, and ends the view when this process is told to.
func (s *shell) watch(ctx context.Context, stop context.CancelCauseFunc, local *terminal) {
	ends := make(chan os.Signal, 1)
	signal.Notify(ends, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT)
	defer signal.Stop(ends)
	for {
		select {
		case <-ctx.Done():
			return
		case size := <-local.Resized():
			s.sent.resize(size) // a watcher's too: what it is shown is drawn for it
		case got := <-ends:
			stop(signalled{got.(syscall.Signal)})
			// The second one does not wait for a terminal that takes no output; the guard tidies up.
			signal.Stop(ends)
		}
	}
}

// notice shows one line at the foot of the screen and puts the cursor back. Whatever the program was in the
// middle of when the connection broke is ended first; the snapshot that follows brings all of it back.
func (s *shell) notice(text string, size windowSize) {
	text = runewidth.Truncate(" berth: "+clean(text)+" ", int(size.Cols), "…")
	fmt.Fprintf(s.out, "%s\x1b7\x1b[?2026l\x1b[?6l\x1b(B\x0f\x1b[999;1H\x1b[0;7m%s\x1b[0m\x1b[K\x1b8", endSequence, text)
}
