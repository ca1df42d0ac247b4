package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/berthd/berth/ptyhost"
	"github.com/berthd/berth/shell"
	"github.com/berthd/berth/sshd"
	"github.com/berthd/berth/wire"
)

const (
	// ptyInitTimeout bounds how long a connection may take to say which terminal it wants.
	ptyInitTimeout = 10 * time.Second
	// maxPTYConns bounds connections at one time; each is a goroutine pair and a viewer's screen.
	maxPTYConns = 256
	// maxRefusals bounds those beyond, which are told that they are too many; any more are closed without a word.
	maxRefusals = 16
	// ptyEndingTimeout bounds telling a client why its terminal ended when it does not read.
	ptyEndingTimeout = 2 * time.Second
	// noExitCode is the exit code in the ending of a terminal that has none, as ssh has it.
	noExitCode = 255
)

// ptyServer lets clients attach to terminals by id on the node's port 2.
type ptyServer struct {
	terminals *terminalHost
	command   func(line string, clientEnv []string) (shell.Spec, error)
	container func(ctx context.Context, in sshd.Container, line string, clientEnv []string) (shell.Spec, error)
	// connected reports a client that came; the function it returns reports that it left.
	connected func(ip string) (left func(exit int, reason string))
	// keeps reports whether terminals outlive this server, once it ends.
	keeps func() bool
	log   *slog.Logger

	conns atomic.Int64 // connected now
}

// serve attaches clients that connect to l until ctx is done.
func (s *ptyServer) serve(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	var handlers sync.WaitGroup
	defer handlers.Wait()
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("cannot accept terminals: %w", err)
		}
		connected := s.conns.Add(1)
		if connected > maxPTYConns {
			s.log.Warn("refused a terminal: too many are connected", "limit", maxPTYConns)
		}
		if connected > maxPTYConns+maxRefusals {
			s.conns.Add(-1)
			conn.Close()
			continue
		}
		handlers.Go(func() {
			defer s.conns.Add(-1)
			if connected > maxPTYConns {
				s.turnAway(ctx, conn)
				return
			}
			s.handle(ctx, conn)
		})
	}
}

// turnAway tells a client that it is one too many. What it sent is read first: closing would cut the answer off otherwise.
func (s *ptyServer) turnAway(ctx context.Context, conn net.Conn) {
	defer conn.Close()
	if init, err := receiveInit(ctx, conn); err == nil {
		refuse(conn, fmt.Errorf("%d clients are connected to terminals here, the most there may be; close one and try again", maxPTYConns), init.Ending)
	}
}

// sessions returns how many clients are connected.
func (s *ptyServer) sessions() int64 { return s.conns.Load() }

func (s *ptyServer) handle(ctx context.Context, conn net.Conn) {
	defer conn.Close()
	peer := hostOf(conn.RemoteAddr())
	left := s.connected(peer)
	err := s.attach(ctx, conn)
	switch {
	case ctx.Err() != nil:
		left(1, "server_shutdown")
	case err != nil:
		s.log.Warn("a terminal ended badly", "peer", peer, "error", err)
		left(1, reasonOf(err))
	default:
		left(0, "graceful")
	}
}

// reasonOf is how the protocol words the end of a terminal's connection.
func reasonOf(err error) string {
	var network net.Error
	if errors.As(err, &network) || errors.Is(err, io.ErrUnexpectedEOF) {
		return "network_error"
	}
	return err.Error()
}

// attach connects conn with the terminal it asks for, until the program ends or the client leaves.
func (s *ptyServer) attach(ctx context.Context, conn net.Conn) error {
	init, err := receiveInit(ctx, conn)
	if err != nil {
		return err
	}
	att, err := s.open(ctx, init)
	if err != nil {
		refuse(conn, err, init.Ending)
		return err
	}
	defer att.Close()
	leave := context.AfterFunc(ctx, func() {
		conn.SetWriteDeadline(time.Now().Add(ptyEndingTimeout))
		att.Close()
	})
	defer leave()
	if !init.ReadOnly {
		s.terminals.takenUp(ctx, att.Info())
	}

	// Whichever direction ends first ends the other: closing conn and att frees both.
	input := make(chan error, 1)
	go func() {
		input <- feed(att, fromClient(conn, init))
		att.Close()
	}()
	_, outErr := io.Copy(conn, att)
	if ending, ok := s.ending(ctx, att, outErr); ok && init.Ending {
		conn.SetWriteDeadline(time.Now().Add(ptyEndingTimeout))
		_, _ = conn.Write(wire.AppendPTYEnding(nil, ending)) // who left needs no reason
	}
	conn.Close()
	att.Close()
	inErr := <-input
	if errors.Is(outErr, net.ErrClosed) || errors.Is(outErr, io.EOF) {
		outErr = nil
	}
	if outErr == nil && inErr != nil && !errors.Is(inErr, net.ErrClosed) && !errors.Is(inErr, ptyhost.ErrHostGone) {
		return inErr
	}
	return outErr
}

// refuse tells a client why there is no terminal: the person in front of a stock one sees nothing but this text.
func refuse(conn net.Conn, why error, ending bool) {
	text := fmt.Appendf(nil, "%v\r\n", why)
	if ending {
		text = wire.AppendPTYEnding(text, wire.PTYEnding{Code: noExitCode, Reason: why.Error()})
	}
	conn.SetWriteDeadline(time.Now().Add(ptyEndingTimeout))
	_, _ = conn.Write(text) // who left needs no reason
}

// receiveInit reads what a client wants, in bounded time.
func receiveInit(ctx context.Context, conn net.Conn) (wire.PTYInit, error) {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if err := conn.SetReadDeadline(time.Now().Add(ptyInitTimeout)); err != nil {
		return wire.PTYInit{}, err
	}
	init, err := wire.ReadPTYInit(conn)
	if err != nil {
		return wire.PTYInit{}, err
	}
	return init, conn.SetReadDeadline(time.Time{})
}

// ending is why a terminal's output is at its end, if that is so: a connection may also just break.
func (s *ptyServer) ending(ctx context.Context, att *ptyhost.Attachment, outErr error) (wire.PTYEnding, bool) {
	switch {
	case outErr == nil:
		status, err := att.Wait()
		return wire.PTYEnding{Code: status.Code, Signal: status.Signal, Reason: status.Reason}, err == nil
	case errors.Is(outErr, ptyhost.ErrHostGone):
		return wire.PTYEnding{Code: noExitCode, Reason: "the process that owns the terminals was killed"}, true
	case ctx.Err() != nil && !s.keeps():
		return wire.PTYEnding{Code: noExitCode, Reason: "the workspace stopped"}, true
	}
	return wire.PTYEnding{}, false
}

// open attaches to the terminal that is asked for, and starts it if there is none and the client did not ask for
// one that exists.
func (s *ptyServer) open(ctx context.Context, init wire.PTYInit) (*ptyhost.Attachment, error) {
	req := ptyhost.AttachRequest{
		ID: init.ID.String(), Name: init.Name, Container: init.Container, Size: ptyhost.Size{Rows: init.Height, Cols: init.Width}, ReadOnly: init.ReadOnly,
		View: init.View, After: init.After, Got: init.Got,
	}
	att, err := s.terminals.Attach(ctx, req) // what is there already needs no container engine that answers
	if errors.Is(err, ptyhost.ErrNoSession) && !init.Existing {
		var spec shell.Spec
		if spec, err = s.specOf(ctx, init); err != nil {
			return nil, err
		}
		req.Create = &ptyhost.CreateRequest{
			Name: init.Name, Container: init.Container, Argv: spec.Argv, Dir: spec.Dir, Env: terminalEnv(spec.Env), IdleTimeout: s.terminals.idle.of(init.Name),
		}
		att, err = s.terminals.Attach(ctx, req)
	}
	if errors.Is(err, ptyhost.ErrNoSession) {
		return nil, fmt.Errorf("there is no terminal %s: it has ended, or never was%s", cmp.Or(init.Name, init.ID.String()), s.terminals.lostAt())
	}
	return att, err
}

// specOf is how the program of a new terminal is started.
func (s *ptyServer) specOf(ctx context.Context, init wire.PTYInit) (shell.Spec, error) {
	if init.Container == "" {
		return s.command(init.Command, nil)
	}
	return s.container(ctx, sshd.Container{Name: init.Container, User: init.ContainerUser}, init.Command, nil)
}

// maxSilence is how long a client of berth may say nothing: it asks whether the agent is there every 2 s, so after this it is gone, its machine
// asleep or its network another. Without this it would stay a viewer, with its size, until the network stack gives up after two hours.
const maxSilence = 30 * time.Second

// fromClient is what a client sends. Stock clients may be silent for as long as they like.
func fromClient(conn net.Conn, init wire.PTYInit) io.Reader {
	if init.Ending {
		return talkative{conn}
	}
	return conn
}

// talkative reads from a connection whose other side is gone when it says nothing.
type talkative struct{ net.Conn }

func (t talkative) Read(p []byte) (int, error) {
	if err := t.SetReadDeadline(time.Now().Add(maxSilence)); err != nil {
		return 0, err
	}
	return t.Conn.Read(p)
}

// typist is the side of an attachment that takes input.
type typist interface {
	io.WriteCloser
	Resize(ptyhost.Size) error
}

// typeAhead is how many requests wait for a program that does not read, so that what follows them, a new size or the client's leaving, is
// noticed: some keystrokes each, and [wire.MaxPTYRequest] at most.
const typeAhead = 16

// lastWords is how long what a client typed before it left may take to reach the program.
const lastWords = time.Second

// feed passes on what a client types and how large its window is. It returns nil when the client left.
func feed(t typist, conn io.Reader) error {
	typed := make(chan string, typeAhead)
	written := make(chan error, 1)
	go func() {
		var err error
		for data := range typed {
			if err == nil {
				_, err = io.WriteString(t, data)
			}
		}
		written <- err
	}()
	err := receive(t, conn, typed)
	close(typed)
	late := time.AfterFunc(lastWords, func() { t.Close() })
	writeErr := <-written
	if err == nil && late.Stop() {
		err = writeErr
	}
	return err
}

// receive sorts what a client sends, until it leaves.
func receive(t typist, conn io.Reader, typed chan<- string) error {
	requests := wire.NewPTYRequestReader(conn)
	for {
		req, err := requests.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if req.Data != "" {
			typed <- req.Data
		}
		if req.Height != 0 && req.Width != 0 {
			if err := t.Resize(ptyhost.Size{Rows: req.Height, Cols: req.Width}); err != nil {
				return err
			}
		}
	}
}

// terminalEnv adds to an environment what a terminal that nobody described is: its kind, and a UTF-8
// locale where there is none. Of two of one name the later counts.
func terminalEnv(env []string) []string {
	value := map[string]string{}
	for _, pair := range env {
		if name, v, ok := strings.Cut(pair, "="); ok {
			value[name] = v
		}
	}
	env = append(slices.Clone(env), "TERM=xterm-256color")
	locale := cmp.Or(value["LC_ALL"], value["LC_CTYPE"], value["LANG"])
	utf8 := strings.Contains(strings.ReplaceAll(strings.ToUpper(locale), "-", ""), "UTF8")
	if utf8 || value["LC_ALL"] != "" {
		return env
	}
	if runtime.GOOS == "darwin" {
		return append(env, "LC_CTYPE=UTF-8")
	}
	return append(env, "LC_CTYPE=C.UTF-8")
}
