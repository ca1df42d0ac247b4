package sshd

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"time"

	glssh "github.com/gliderlabs/ssh"
	"golang.org/x/crypto/ssh"
)

// connection is one client's. It owns what must go with it: forwarded listeners, the agent socket, every goroutine started for it. Whatever is
// opened for it closes itself when ctx is done.
type connection struct {
	srv       *Server
	remote    net.Addr
	transport *transport
	life      context.Context // done when the server has been told to stop
	ctx       context.Context // done when the connection is
	cancel    context.CancelFunc

	channels  atomic.Int64
	keepAlive sync.Once
	forwards  forwards
	agent     agentSocket

	mu     sync.Mutex
	closed bool
	asked  chan struct{}   // not nil while the client is asked whether it is there; closed when it answers
	ssh    *ssh.ServerConn // set with the first channel
	work   sync.WaitGroup
	silent atomic.Bool // closed by us, since it did not answer
}

// serveConn serves one connection until it or life ends, and returns when nothing of it is left.
func (s *Server) serveConn(life context.Context, raw net.Conn) {
	c := &connection{srv: s, remote: raw.RemoteAddr(), transport: newTransport(raw), life: life}
	c.ctx, c.cancel = context.WithCancel(life)
	stop := context.AfterFunc(c.ctx, func() { raw.Close() })
	defer func() {
		c.cancel()
		stop()
		raw.Close()
		c.wait()
	}()

	handshake := time.AfterFunc(s.limits.handshake, func() {
		s.cfg.Log.Debug("dropped an SSH client that did not finish its handshake", "remote", c.remote)
		raw.Close()
	})
	defer handshake.Stop()

	// One gliderlabs server for each connection: its handlers are then methods of the connection, and nothing has to be looked up.
	gl := &glssh.Server{
		HostSigners: []glssh.Signer{s.cfg.HostKey},
		Version:     "berth",
		ServerConfigCallback: func(glssh.Context) *ssh.ServerConfig {
			return &ssh.ServerConfig{Config: ssh.Config{Ciphers: ciphers}, AuthLogCallback: func(_ ssh.ConnMetadata, _ string, err error) {
				if err == nil {
					handshake.Stop()
				}
			}}
		},
		ConnectionFailedCallback: func(_ net.Conn, err error) {
			s.cfg.Log.Debug("an SSH handshake failed", "remote", c.remote, "err", err)
		},
		ChannelHandlers: map[string]glssh.ChannelHandler{
			"session":                        c.channel(c.session),
			"direct-tcpip":                   c.channel(c.directTCP),
			"direct-streamlocal@openssh.com": c.channel(c.directUnix),
		},
		RequestHandlers: map[string]glssh.RequestHandler{
			"tcpip-forward":                          c.request(c.forwardTCP),
			"cancel-tcpip-forward":                   c.request(c.cancelForwardTCP),
			"streamlocal-forward@openssh.com":        c.request(c.forwardUnix),
			"cancel-streamlocal-forward@openssh.com": c.request(c.cancelForwardUnix),
		},
	}
	s.shield("connection", func() { gl.HandleConn(c.transport) })
}

// enter counts a goroutine in that wait will wait for. It refuses once the connection is being torn down; leave counts it out.
func (c *connection) enter() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return false
	}
	c.work.Add(1)
	return true
}

func (c *connection) leave() { c.work.Done() }

func (c *connection) wait() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.work.Wait()
}

// run runs f on a goroutine that serveConn waits for; f must end soon after c.ctx is done. It reports false, and runs nothing, once the connection
// is being torn down.
func (c *connection) run(what string, f func()) bool {
	if !c.enter() {
		return false
	}
	go func() {
		defer c.leave()
		c.srv.shield(what, f)
	}()
	return true
}

// channel makes a channel handler of handle, which must return when the channel is done with.
func (c *connection) channel(handle func(*ssh.ServerConn, ssh.NewChannel)) glssh.ChannelHandler {
	return func(_ *glssh.Server, conn *ssh.ServerConn, nc ssh.NewChannel, _ glssh.Context) {
		if !c.enter() {
			return
		}
		defer c.leave()
		c.keepAlive.Do(func() {
			c.setSSH(conn)
			c.run("keep-alive", c.keepAlives)
		})
		defer c.channels.Add(-1)
		if c.channels.Add(1) > maxChannels {
			nc.Reject(ssh.ResourceShortage, "too many channels on this connection")
			return
		}
		c.srv.shield("channel "+nc.ChannelType(), func() { handle(conn, nc) })
	}
}

// request makes a global request handler of handle.
func (c *connection) request(handle func(*ssh.ServerConn, []byte) (bool, []byte)) glssh.RequestHandler {
	return func(ctx glssh.Context, _ *glssh.Server, req *ssh.Request) (ok bool, payload []byte) {
		conn, found := ctx.Value(glssh.ContextKeyConn).(*ssh.ServerConn)
		if !found || !c.enter() {
			return false, nil
		}
		defer c.leave()
		c.srv.shield("request "+req.Type, func() { ok, payload = handle(conn, req.Payload) })
		return ok, payload
	}
}

func (c *connection) setSSH(conn *ssh.ServerConn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ssh = conn
}

// keepAlives asks the client now and then whether it lives, and closes the connection of one that is silent for long.
func (c *connection) keepAlives() {
	tick := time.NewTicker(c.srv.cfg.KeepAlive)
	defer tick.Stop()
	var answered <-chan struct{} // to what was asked last
	for missed := 0; missed < keepAliveTries; {
		select {
		case <-c.ctx.Done():
			return
		case <-tick.C:
		}
		select {
		case <-answered:
			answered, missed = nil, 0
		default:
		}
		if answered == nil {
			answered = c.ask()
			continue
		}
		missed++
	}
	c.srv.cfg.Log.Info("closed the connection of an SSH client that no longer answers", "remote", c.remote)
	c.silent.Store(true)
	c.cancel()
}

// ask asks the client whether it is there, unless it is being asked already. What it returns is closed by any answer, a refusal too.
func (c *connection) ask() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.asked != nil {
		return c.asked
	}
	answered := make(chan struct{})
	if c.closed || c.ssh == nil {
		return answered
	}
	c.asked = answered
	c.work.Go(func() {
		// It ends with the connection, which serveConn closes before it waits.
		_, _, err := c.ssh.SendRequest("keepalive@openssh.com", true, nil)
		c.mu.Lock()
		defer c.mu.Unlock()
		c.asked = nil
		if err == nil {
			close(answered)
		}
	})
	return answered
}

// silentSince returns the zero time if the client is there, else when it was heard last.
func (c *connection) silentSince(ctx context.Context) time.Time {
	before := c.transport.heardAt()
	if time.Since(before) < probeFresh {
		return time.Time{}
	}
	limit := time.NewTimer(probeTimeout)
	defer limit.Stop()
	select {
	case <-c.ask():
		return time.Time{}
	case <-limit.C:
	case <-ctx.Done():
	case <-c.ctx.Done():
	}
	if heard := c.transport.heardAt(); heard.After(before) { // it says something else first
		return time.Time{}
	}
	return before
}

// cut reports whether the connection ended without the client having left.
func (c *connection) cut() bool { return c.life.Err() != nil || c.silent.Load() || c.transport.cut() }
