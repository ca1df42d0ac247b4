// Package rpc carries the RPC services over one byte stream: a yamux session in which every call
// has a stream of its own with one dRPC exchange on it.
//
// A caller uses [NewClient], whose result the generated constructors take
// (agentpb.NewDRPCAgentClient); a server registers its services on a drpcmux.Mux and calls [Serve].
//
// Lower down, one call reads on its yamux stream, caller first:
//
//	Invoke(name) Message(request) CloseSend        unary
//	                Message(response) CloseSend, or Error(8-byte code, text)
//
// and on the connection yamux frames of 12-byte headers; the side that dialled is the yamux client
// and opens all streams.
package rpc

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"
	"golang.org/x/sync/errgroup"
	"storj.io/drpc"
	"storj.io/drpc/drpcconn"
	"storj.io/drpc/drpcerr"
	"storj.io/drpc/drpcmanager"
	"storj.io/drpc/drpcserver"
	"storj.io/drpc/drpcwire"

	"github.com/berthd/berth/wire"
)

// config is the session's shape, which stock peers use too.
func config() *yamux.Config {
	return &yamux.Config{
		// Peers open that many streams before the first is accepted. A stream's window is taken in before
		// anybody reads it, so with the calls that are served a session may hold some 80 MiB.
		AcceptBacklog:          256,
		EnableKeepAlive:        true,
		KeepAliveInterval:      30 * time.Second,
		ConnectionWriteTimeout: 10 * time.Second,
		MaxStreamWindowSize:    256 << 10,
		StreamOpenTimeout:      75 * time.Second,
		StreamCloseTimeout:     5 * time.Minute,
		// A session's end reaches every caller as an error; what yamux would log adds nothing.
		LogOutput: io.Discard,
	}
}

func managerOptions() drpcmanager.Options {
	return drpcmanager.Options{Reader: drpcwire.ReaderOptions{MaximumBufferSize: wire.MaxMessage}}
}

// Client is the calling side of a session. Calls may run at the same time. A unary method that the other side
// turned out to lack is not asked for again: the session answers as the other side did.
type Client struct {
	session *yamux.Session
	streams *streams
	absent  sync.Map // the error of each method that the other side lacks, by name
}

var _ drpc.Conn = (*Client)(nil)

// NewClient starts a session on conn, which it owns from then on.
func NewClient(conn net.Conn) (*Client, error) {
	open := new(streams)
	session, err := yamux.Client(endingConn{conn, open}, config())
	if err != nil {
		return nil, fmt.Errorf("cannot start an RPC session: %w", err)
	}
	return &Client{session: session, streams: open}, nil
}

// Ping measures one round trip; it fails after 10 s without an answer.
func (c *Client) Ping() (time.Duration, error) { return c.session.Ping() }

// Close ends the session and with it every call.
func (c *Client) Close() error { return c.session.Close() }

// Closed is closed when the session has ended, from either side.
func (c *Client) Closed() <-chan struct{} { return c.session.CloseChan() }

func (c *Client) open() (*drpcconn.Conn, error) {
	stream, err := c.session.OpenStream()
	if err != nil {
		return nil, fmt.Errorf("cannot open an RPC stream: %w", err)
	}
	return drpcconn.NewWithOptions(c.streams.add(stream), drpcconn.Options{Manager: managerOptions()}), nil
}

// Invoke implements [drpc.Conn] for unary calls.
func (c *Client) Invoke(ctx context.Context, rpc string, enc drpc.Encoding, in, out drpc.Message) error {
	if err, ok := c.absent.Load(rpc); ok {
		return err.(error)
	}
	conn, err := c.open()
	if err != nil {
		return err
	}
	defer conn.Close()
	if err = conn.Invoke(ctx, rpc, enc, in, out); Unimplemented(err) {
		c.absent.Store(rpc, err)
	}
	return err
}

// NewStream implements [drpc.Conn] for streaming calls. The call's yamux stream lives as long as it.
func (c *Client) NewStream(ctx context.Context, rpc string, enc drpc.Encoding) (drpc.Stream, error) {
	conn, err := c.open()
	if err != nil {
		return nil, err
	}
	stream, err := conn.NewStream(ctx, rpc, enc)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	context.AfterFunc(stream.Context(), func() { conn.Close() })
	return stream, nil
}

// ErrUnimplemented is what a handler returns for a method that the caller's version lacks.
var ErrUnimplemented = drpcerr.WithCode(errors.New("Unimplemented"), wire.CodeUnimplemented)

// Code returns the code of an error that came over the wire, 0 when it has none.
func Code(err error) uint64 { return drpcerr.Code(err) }

// Unimplemented tells whether err means that the other side lacks the method.
func Unimplemented(err error) bool {
	return err != nil && (drpcerr.Code(err) == wire.CodeUnimplemented || strings.Contains(err.Error(), "unknown rpc: "))
}

// Unavailable marks an error that is the server's own trouble: the same call may succeed later.
func Unavailable(err error) error { return drpcerr.WithCode(err, wire.CodeUnavailable) }

// ServeOptions says how a server watches its caller.
type ServeOptions struct {
	// PingInterval is the time between probes, PingTimeout how long none may succeed before the
	// caller counts as dead. A zero PingInterval means no probes.
	PingInterval, PingTimeout time.Duration
	// Alive, if set, is called after each successful probe.
	Alive func()
	// WriteTimeout is how long an answer may wait for a caller that does not read before its call
	// ends; 0 means 30 s. Until then up to a window of 256 KiB has already been taken.
	WriteTimeout time.Duration
}

// What one session may hold in memory, so that no caller can use up a server.
const (
	// maxCalls is how many calls of one session are served at a time; more wait. Stock agents have about
	// 15, clients fewer.
	maxCalls = 64
	// maxLarge is how many of them may hold a request of more than smallRequest, up to
	// [wire.MaxMessage], at a time; others wait to be read on. Large are logs and context, of which
	// agents send one at a time.
	maxLarge     = 4
	smallRequest = 64 << 10
)

// Why [Serve] ended a session.
var (
	// ErrDead: the caller stopped answering probes.
	ErrDead = errors.New("no answer to probes")
	// ErrProtocol: what the caller sent is no session.
	ErrProtocol = errors.New("the caller does not speak the protocol")
)

// Serve answers the calls of one session on conn until the caller ends it, is at fault ([ErrDead],
// [ErrProtocol]), or ctx is done. It closes conn and returns when every call has returned; a caller
// that leaves is no error. If conn has a method Fail(reason string) error, a caller that breaks the
// protocol is told so by it, in place of Close.
func Serve(ctx context.Context, conn net.Conn, handler drpc.Handler, opts ServeOptions) error {
	watched := &watchedConn{Conn: conn}
	shape := config()
	// Probes do the same more often. The keepalive of yamux ends the session at the first ping that is late,
	// and does not say that this was it.
	shape.EnableKeepAlive = opts.PingInterval == 0
	open := new(streams)
	session, err := yamux.Server(endingConn{watched, open}, shape)
	if err != nil {
		return fmt.Errorf("cannot start an RPC session: %w", err)
	}
	timeout := cmp.Or(opts.WriteTimeout, 30*time.Second)
	server := drpcserver.NewWithOptions(handler, drpcserver.Options{Manager: managerOptions()})
	group, ctx := errgroup.WithContext(ctx)
	closed := make(chan struct{})
	end := func() {
		defer close(closed)
		// A session that ended by itself is about to close the connection, or did: the reason is its own.
		if !session.IsClosed() {
			watched.ending.Store(true)
		}
		session.Close()
	}
	stop := context.AfterFunc(ctx, end)
	calls, large := make(chan struct{}, maxCalls), make(chan struct{}, maxLarge)
	group.Go(func() error {
		for {
			select {
			case calls <- struct{}{}:
			case <-ctx.Done():
				return errEnded
			case <-session.CloseChan():
				return errEnded
			}
			stream, err := session.AcceptStreamWithContext(ctx)
			if err != nil {
				return errEnded
			}
			group.Go(func() error {
				defer func() { <-calls }()
				// A failed call has been answered on its stream; the session goes on.
				call := &callConn{stream: open.add(stream), timeout: timeout, ctx: ctx, large: large}
				defer call.Close()
				defer call.answered()
				_ = server.ServeOne(ctx, call)
				return nil
			})
		}
	})
	if opts.PingInterval > 0 {
		answered := make(chan struct{})
		group.Go(func() error { return ping(ctx, session, opts.PingInterval, answered) })
		group.Go(func() error { return probe(ctx, session, opts, answered) })
	}
	err = group.Wait()
	if stop() {
		end()
	}
	<-closed
	if watched.failed.Load() {
		return ErrProtocol
	}
	if errors.Is(err, errEnded) || ctx.Err() != nil && !errors.Is(err, ErrDead) {
		return nil
	}
	return err
}

// watchedConn tells why its session closes it: because it is over, or because of what came over it.
type watchedConn struct {
	net.Conn
	ending atomic.Bool // the session is being ended from here
	broken atomic.Bool // the connection is
	failed atomic.Bool // neither: the caller broke the protocol
}

func (c *watchedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err != nil {
		c.broken.Store(true)
	}
	return n, err
}

func (c *watchedConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	if err != nil {
		c.broken.Store(true)
	}
	return n, err
}

func (c *watchedConn) Close() error {
	if c.ending.Load() || c.broken.Load() {
		return c.Conn.Close()
	}
	c.failed.Store(true)
	if conn, ok := c.Conn.(interface{ Fail(reason string) error }); ok {
		return conn.Fail("protocol error")
	}
	return c.Conn.Close()
}

// callConn is a call's stream. Its writes do not wait for ever, so that a caller which answers probes
// but never reads cannot hold what serves it; its reads wait for their turn when they become large.
type callConn struct {
	*stream
	timeout time.Duration
	ctx     context.Context // of the session
	large   chan struct{}   // a place for each that is large

	mu   sync.Mutex
	read int  // since the last answer
	held bool // a place in large
}

func (c *callConn) Read(p []byte) (int, error) {
	n, err := c.stream.Read(p)
	c.mu.Lock()
	c.read += n
	wait := c.read > smallRequest && !c.held
	c.mu.Unlock()
	if !wait {
		return n, err
	}
	select {
	case c.large <- struct{}{}:
	case <-c.ctx.Done():
		return n, c.ctx.Err()
	}
	c.mu.Lock()
	c.held = true
	c.mu.Unlock()
	return n, err
}

func (c *callConn) Write(p []byte) (int, error) {
	c.answered()
	if err := c.SetWriteDeadline(time.Now().Add(c.timeout)); err != nil {
		return 0, err
	}
	return c.stream.Write(p)
}

// answered gives back the place of a request that has been dealt with.
func (c *callConn) answered() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.read = 0
	if c.held {
		c.held = false
		<-c.large
	}
}

// errEnded ends the group of a session that is over.
var errEnded = errors.New("session ended")

// ping pings at each interval and tells which pings came back.
func ping(ctx context.Context, session *yamux.Session, interval time.Duration, answered chan<- struct{}) error {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		if _, err := session.Ping(); err == nil {
			select {
			case answered <- struct{}{}:
			case <-ctx.Done():
				return nil
			}
		}
		select {
		case <-ticker.C:
		case <-session.CloseChan():
			return errEnded
		case <-ctx.Done():
			return nil
		}
	}
}

// probe gives the caller up when no ping came back for the timeout.
func probe(ctx context.Context, session *yamux.Session, opts ServeOptions, answered <-chan struct{}) error {
	dead := time.NewTimer(opts.PingTimeout)
	defer dead.Stop()
	for {
		select {
		case <-answered:
			dead.Reset(opts.PingTimeout)
			if opts.Alive != nil {
				opts.Alive()
			}
		case <-dead.C:
			return ErrDead
		case <-session.CloseChan():
			return errEnded
		case <-ctx.Done():
			return nil
		}
	}
}
