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

	"github.com/google/uuid"

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
		if s.conns.Add(1) > maxPTYConns {
			s.conns.Add(-1)
			conn.Close()
			s.log.Warn("refused a terminal: too many are connected", "limit", maxPTYConns)
			continue
		}
		handlers.Go(func() {
			defer s.conns.Add(-1)
			s.handle(ctx, conn)
		})
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
		// The person in front of a stock client sees nothing but what is written here.
		text := fmt.Appendf(nil, "%v\r\n", err)
		if init.Ending {
			text = wire.AppendPTYEnding(text, wire.PTYEnding{Code: noExitCode, Reason: err.Error()})
		}
		conn.SetWriteDeadline(time.Now().Add(ptyEndingTimeout))
		_, _ = conn.Write(text) // who left needs no reason
		return err
	}
	defer att.Close()
	leave := context.AfterFunc(ctx, func() {
		conn.SetWriteDeadline(time.Now().Add(ptyEndingTimeout))
		att.Close()
	})
	defer leave()

	// Whichever direction ends first ends the other: closing conn and att frees both.
	input := make(chan error, 1)
	go func() {
		input <- feed(att, conn)
		att.Close()
	}()
	_, outErr := io.Copy(conn, att)
	if ending, ok := s.ending(ctx, att, outErr); ok && init.Ending {
		conn.SetWriteDeadline(time.Now().Add(ptyEndingTimeout))
		_, _ = conn.Write(wire.AppendPTYEnding(nil, ending)) // who left needs no reason
	}
	conn.Close()
	inErr := <-input
	if errors.Is(outErr, net.ErrClosed) || errors.Is(outErr, io.EOF) {
		outErr = nil
	}
	if outErr == nil && inErr != nil && !errors.Is(inErr, net.ErrClosed) && !errors.Is(inErr, ptyhost.ErrHostGone) {
		return inErr
	}
	return outErr
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
	id, err := s.find(ctx, init)
	if err != nil {
		return nil, err
	}
	req := ptyhost.AttachRequest{ID: id, Size: ptyhost.Size{Rows: init.Height, Cols: init.Width}, ReadOnly: init.ReadOnly, View: init.View, After: init.After, Got: init.Got}
	if !init.Existing {
		spec, err := s.specOf(ctx, init)
		if err != nil {
			return nil, err
		}
		req.Create = &ptyhost.CreateRequest{
			Name: init.Name, Argv: spec.Argv, Dir: spec.Dir, Env: terminalEnv(spec.Env), IdleTimeout: s.terminals.idle.of(init.Name),
		}
	}
	att, err := s.terminals.Attach(ctx, req)
	if errors.Is(err, ptyhost.ErrNoSession) {
		return nil, fmt.Errorf("there is no terminal %s: it has ended, or never was%s", cmp.Or(init.Name, init.ID.String()), s.terminals.lostAt())
	}
	return att, err
}

// find returns the id of the terminal that a client means. Clients make ids from names, so after a rename the id alone
// can mean two terminals: the one whose name it was, and the one that has that name now.
func (s *ptyServer) find(ctx context.Context, init wire.PTYInit) (string, error) {
	id := init.ID.String()
	if init.Name == "" {
		return id, nil
	}
	all, err := s.terminals.list(ctx)
	if err != nil {
		return "", err
	}
	var named, known *ptyhost.SessionInfo
	for i := range all {
		if all[i].Name == init.Name {
			named = &all[i]
		}
		if all[i].ID == id {
			known = &all[i]
		}
	}
	switch {
	case init.Existing && known != nil: // it comes back to a terminal that may have been renamed meanwhile
		return id, nil
	case named != nil:
		return named.ID, nil
	case known != nil && known.Name != "":
		return uuid.NewString(), nil
	}
	return id, nil
}

// specOf is how the program of a new terminal is started.
func (s *ptyServer) specOf(ctx context.Context, init wire.PTYInit) (shell.Spec, error) {
	if init.Container == "" {
		return s.command(init.Command, nil)
	}
	return s.container(ctx, sshd.Container{Name: init.Container, User: init.ContainerUser}, init.Command, nil)
}

// typist is the side of an attachment that takes input.
type typist interface {
	io.Writer
	Resize(ptyhost.Size) error
}

// feed passes on what a client types and how large its window is. It returns nil when the client left.
func feed(t typist, conn io.Reader) error {
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
			if _, err := io.WriteString(t, req.Data); err != nil {
				return err
			}
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
