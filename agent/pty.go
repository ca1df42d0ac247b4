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
	"github.com/berthd/berth/wire"
)

const (
	// ptyIdle is how long a terminal lives on with nobody attached. Stock clients rely on it.
	ptyIdle = 5 * time.Minute
	// ptyInitTimeout bounds how long a connection may take to say which terminal it wants.
	ptyInitTimeout = 10 * time.Second
	// maxPTYConns bounds connections at one time; each is a goroutine pair and a viewer's screen.
	maxPTYConns = 256
)

// terminals is where the agent's terminals live.
type terminals interface {
	Attach(context.Context, ptyhost.AttachRequest) (*ptyhost.Attachment, error)
}

// ptyServer lets clients attach to terminals by id on the node's port 2.
type ptyServer struct {
	terminals terminals
	command   func(line string, clientEnv []string) (shell.Spec, error)
	// connected reports a client that came; the function it returns reports that it left.
	connected func(ip string) (left func(exit int, reason string))
	log       *slog.Logger

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
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()

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
	if err := conn.SetReadDeadline(time.Now().Add(ptyInitTimeout)); err != nil {
		return err
	}
	init, err := wire.ReadPTYInit(conn)
	if err != nil {
		return err
	}
	if err := conn.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	att, err := s.open(ctx, init)
	if err != nil {
		// The person in front of the client sees nothing but what is written here.
		fmt.Fprintf(conn, "%v\r\n", err)
		return err
	}
	defer att.Close()

	// Whichever direction ends first ends the other: closing conn and att frees both.
	input := make(chan error, 1)
	go func() {
		input <- feed(att, conn)
		att.Close()
	}()
	_, outErr := io.Copy(conn, att)
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

// open attaches to the terminal with the id asked for, and starts it if there is none.
func (s *ptyServer) open(ctx context.Context, init wire.PTYInit) (*ptyhost.Attachment, error) {
	if init.Container != "" {
		return nil, errors.New("cannot open a terminal in a container: this agent opens terminals on the machine only")
	}
	spec, err := s.command(init.Command, nil)
	if err != nil {
		return nil, err
	}
	spec.Env = terminalEnv(spec.Env)
	return s.terminals.Attach(ctx, ptyhost.AttachRequest{
		ID:     init.ID.String(),
		Size:   ptyhost.Size{Rows: init.Height, Cols: init.Width},
		Create: &ptyhost.CreateRequest{Argv: spec.Argv, Dir: spec.Dir, Env: spec.Env, IdleTimeout: ptyIdle},
	})
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
