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
	srv    *Server
	remote net.Addr
	ctx    context.Context // done when the connection is
	cancel context.CancelFunc

	channels  atomic.Int64
	keepAlive sync.Once
	forwards  forwards
	agent     agentSocket

	mu     sync.Mutex
	closed bool
	work   sync.WaitGroup
}

// quietConn takes no deadlines: gliderlabs sets one before each read and write, always none here, and on a tailnet connection each costs a timer.
type quietConn struct{ net.Conn }

func (quietConn) SetDeadline(time.Time) error { return nil }

// serveConn serves one connection until it or life ends, and returns when nothing of it is left.
func (s *Server) serveConn(life context.Context, raw net.Conn) {
	c := &connection{srv: s, remote: raw.RemoteAddr()}
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
			return &ssh.ServerConfig{AuthLogCallback: func(_ ssh.ConnMetadata, _ string, err error) {
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
	s.shield("connection", func() { gl.HandleConn(quietConn{raw}) })
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
		c.keepAlive.Do(func() { c.run("keep-alive", func() { c.keepAlives(conn) }) })
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

// keepAlives asks the client now and then whether it lives. Any answer counts, a refusal too.
func (c *connection) keepAlives(conn *ssh.ServerConn) {
	tick := time.NewTicker(c.srv.cfg.KeepAlive)
	defer tick.Stop()
	answered := make(chan struct{}, 1)
	missed, waiting := 0, false
	for {
		select {
		case <-c.ctx.Done():
			return
		case <-answered:
			missed, waiting = 0, false
		case <-tick.C:
			if waiting {
				if missed++; missed >= keepAliveTries {
					c.srv.cfg.Log.Info("closed the connection of an SSH client that no longer answers", "remote", c.remote)
					c.cancel()
					return
				}
				continue
			}
			waiting = true
			// SendRequest ends with the connection, which serveConn closes before it waits.
			c.run("keep-alive", func() {
				if _, _, err := conn.SendRequest("keepalive@openssh.com", true, nil); err == nil {
					answered <- struct{}{}
				}
			})
		}
	}
}
