package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/berthd/berth/wire"
)

const (
	defaultSession = "main"

	// probeInterval is how often an attached terminal looks whether its agent is there. After
	// probesLost misses the person is told and the terminal attached anew.
	probeInterval = 5 * time.Second
	probesLost    = 3
	// attachTimeout is how long one attempt to attach again may take before the next.
	attachTimeout = 15 * time.Second
)

func (p *program) shellCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "shell NAME [SESSION]",
		Short: "Open a terminal that can be left and taken up again",
		Long: `Open a terminal on an agent that lives on when it is left: with ~. after Enter, with a
closed window, or because the network went away. The same command takes it up again, from
anywhere, with the screen as it was. SESSION names one of several; the default is "main".`,
		Example: `  berth shell demo
  berth shell demo build     # a second one
  ~.                         # after Enter: leave it running`,
		Args:              wantArgs(1, 2),
		ValidArgsFunction: p.agentNames,
	}
	command := cmd.Flags().StringP("command", "c", "", "run this instead of a login shell, if the session is new")
	wait := waitFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if !term.IsTerminal(int(p.in.Fd())) || !term.IsTerminal(int(p.out.Fd())) {
			return errors.New("cannot open a terminal: standard input and output must be one; for a pipe use \"berth ssh\"")
		}
		session := defaultSession
		if len(args) == 2 {
			session = args[1]
		}
		m, err := p.reach(cmd.Context(), args[0], *wait)
		if err != nil {
			return err
		}
		defer m.Close()
		s := &shell{mesh: m, in: p.in, out: p.out, command: *command, id: sessionID(m.agent.Name, session)}
		err = s.run(cmd.Context())
		switch {
		case errors.Is(err, errLeave):
			fmt.Fprintf(p.errOut, "left %s running; take it up again with: berth shell %s", clean(session), shellQuote(clean(m.agent.Name)))
			if session != defaultSession {
				fmt.Fprintf(p.errOut, " %s", shellQuote(clean(session)))
			}
			fmt.Fprintln(p.errOut)
			return nil
		case errors.As(err, new(signalled)):
			return &exitError{exitInterrupted, nil}
		}
		return err
	}
	return cmd
}

// sessionSpace is the name space of sessions, drawn once.
var sessionSpace = uuid.MustParse("6d1c1d2c-5f0e-4a53-9a0c-1f1f3f1d7c52")

// sessionID derives the id of a session, so that its name finds it from anywhere. It goes by the name
// of the agent: a workspace that is built anew is another agent of that name, and its terminals live on.
func sessionID(agent, session string) uuid.UUID {
	return uuid.NewSHA1(sessionSpace, []byte(agent+"/"+session))
}

// shell is one person's view of a terminal session.
type shell struct {
	mesh    *mesh
	in, out *os.File
	command string
	id      uuid.UUID
	screen  altScreen // of our terminal

	mu    sync.Mutex // also held while writing to conn
	conn  net.Conn   // the present attachment, nil while there is none
	ahead []byte     // what was typed before the first attachment
	begun bool       // there was one
}

// run shows the session until it ends (nil), is left (errLeave) or this process is told to end.
func (s *shell) run(ctx context.Context) error {
	local, err := openTerminal(s.in, s.out)
	if err != nil {
		return err
	}
	defer func() {
		io.WriteString(s.out, s.screen.leave()+undoModes+"\r\n")
		local.Close()
	}()
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	go s.input(stop)
	go s.watch(ctx, stop, local)

	wait := minRedial
	for attached := false; ; {
		start := time.Now()
		err := s.attach(ctx, local.Size(), attached)
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err == nil:
			return nil
		case !attached && !errors.Is(err, errAttachmentLost):
			return err
		}
		attached = true
		if time.Since(start) > maxRedial {
			wait = minRedial
		}
		s.notice(fmt.Sprintf("the connection to %s is lost; trying again (~. leaves)", s.mesh.agent.Name))
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

// attach shows the session until its program ends (nil) or the connection breaks.
func (s *shell) attach(ctx context.Context, size windowSize, again bool) error {
	dialing, cancel := context.WithTimeout(ctx, attachTimeout)
	defer cancel()
	conn, err := s.mesh.dial(dialing, wire.PortPTY)
	if err != nil {
		return err
	}
	defer s.setConn(nil) // after Close, which ends a write that holds the lock
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	err = wire.WritePTYInit(conn, wire.PTYInit{ID: s.id, Height: size.Rows, Width: size.Cols, Command: s.command})
	if err != nil {
		return err
	}
	s.setConn(conn)
	probing, cancelProbe := context.WithCancel(ctx)
	defer cancelProbe()
	go s.probe(probing, conn)

	buf := make([]byte, inputSize)
	for first := true; ; first = false {
		n, err := conn.Read(buf)
		if n > 0 {
			if first && again {
				io.WriteString(s.out, "\x1b[H\x1b[2J") // the notice and whatever stood beside it
			}
			s.screen.see(buf[:n])
			if _, err := s.out.Write(buf[:n]); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("%w: %v", errAttachmentLost, err)
		}
	}
}

func (s *shell) setConn(conn net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conn = conn
	if conn != nil && !s.begun {
		s.begun = true
		conn.Write(s.ahead) // if it fails, so does the read of this attachment, which tells
		s.ahead = nil
	}
}

// maxAhead bounds what is kept of typing ahead: a few lines.
const maxAhead = 4 << 10

// send writes requests to the present attachment. What comes before the first one is typed ahead and
// kept; between two it is dropped, as a person would not want blind keystrokes to arrive minutes later.
func (s *shell) send(r wire.PTYRequest) {
	data, err := json.Marshal(r)
	if err != nil {
		return
	}
	// The lock keeps requests whole: input, sizes and probes come from different goroutines.
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.conn != nil:
		s.conn.Write(data) // if it fails, so does the read of this attachment, which tells
	case !s.begun && len(s.ahead)+len(data) <= maxAhead:
		s.ahead = append(s.ahead, data...)
	}
}

// input sends what is typed. It ends with the process: a read from a terminal cannot be broken off.
func (s *shell) input(stop context.CancelCauseFunc) {
	err := copyInput(&runes{send: func(text string) { s.send(wire.PTYRequest{Data: text}) }}, s.in)
	if err == nil || !errors.Is(err, errLeave) {
		// The end of input is a closed window: the session lives on.
		err = errLeave
	}
	stop(err)
}

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
	signal.Notify(ends, syscall.SIGTERM, syscall.SIGHUP)
	defer signal.Stop(ends)
	for {
		select {
		case <-ctx.Done():
			return
		case size := <-local.Resized():
			s.send(wire.PTYRequest{Height: size.Rows, Width: size.Cols})
		case got := <-ends:
			stop(signalled{got.(syscall.Signal)})
		}
	}
}

// probe closes the attachment when the agent is gone, which a silent TCP connection does not notice:
// an empty request makes a restarted agent reset it, pings show a dead path.
func (s *shell) probe(ctx context.Context, conn net.Conn) {
	for missed := 0; missed < probesLost; {
		select {
		case <-ctx.Done():
			return
		case <-time.After(probeInterval):
		}
		s.send(wire.PTYRequest{})
		if _, err := pingOnce(ctx, s.mesh); err != nil {
			missed++
			continue
		}
		missed = 0
	}
	conn.Close()
}

// notice shows one line at the foot of the screen and puts the cursor back.
func (s *shell) notice(text string) {
	fmt.Fprintf(s.out, "\x1b7\x1b[999;1H\x1b[7m berth: %s \x1b[0m\x1b[K\x1b8", clean(text))
}
