package sshd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/berthd/berth/account"
)

// A dial that has not succeeded by then is reported as failed; people do not wait for the kernel's two minutes.
const dialTimeout = 30 * time.Second

// directTCP serves a direct-tcpip channel (RFC 4254, section 7.2): a connection from this machine to wherever the client says.
func (c *connection) directTCP(_ *ssh.ServerConn, nc ssh.NewChannel) {
	var p struct {
		Host       string
		Port       uint32
		Origin     string
		OriginPort uint32
	}
	switch err := ssh.Unmarshal(nc.ExtraData(), &p); {
	case err != nil || p.Port > 65535:
		nc.Reject(ssh.ConnectionFailed, "cannot read the address to forward to")
	case c.srv.cfg.Block.LocalForward:
		nc.Reject(ssh.Prohibited, "local port forwarding is disabled")
	default:
		if c.jetBrains(p.Host, uint16(p.Port)) {
			done := c.srv.begin(Connection{Type: SessionJetBrains, Remote: c.remote})
			defer done(0, "normal close")
		}
		c.dial(nc, "tcp", net.JoinHostPort(p.Host, strconv.Itoa(int(p.Port))))
	}
}

// jetBrains reports whether a forwarded connection reaches a JetBrains program of this machine.
func (c *connection) jetBrains(host string, port uint16) bool {
	if c.srv.cfg.JetBrains == nil {
		return false
	}
	if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return false
	}
	return c.srv.cfg.JetBrains(port)
}

// directUnix serves a direct-streamlocal channel: a connection to a Unix socket of this machine.
func (c *connection) directUnix(_ *ssh.ServerConn, nc ssh.NewChannel) {
	var p struct {
		Path     string
		Reserved string
		Unused   uint32
	}
	switch err := ssh.Unmarshal(nc.ExtraData(), &p); {
	case err != nil:
		nc.Reject(ssh.ConnectionFailed, "cannot read the socket to forward to")
	case c.srv.cfg.Block.LocalForward:
		nc.Reject(ssh.Prohibited, "local port forwarding is disabled")
	default:
		c.dial(nc, "unix", p.Path)
	}
}

// dial joins a channel that the client opens with a connection to address.
func (c *connection) dial(nc ssh.NewChannel, network, address string) {
	conn, err := c.connect(network, address)
	if err != nil {
		nc.Reject(ssh.ConnectionFailed, err.Error())
		return
	}
	ch, reqs, err := nc.Accept()
	if err != nil {
		conn.Close()
		return
	}
	c.join(conn.(socket), ch, reqs)
}

// socket is what every TCP and Unix connection of package net is.
type socket interface {
	net.Conn
	source
	CloseWrite() error
}

// connect connects to address, to a Unix socket as the user of the session: it has an owner who lets some in. A port has none.
func (c *connection) connect(network, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(c.ctx, dialTimeout)
	defer cancel()
	if network == "unix" {
		return c.srv.cfg.User.DialUnix(ctx, address)
	}
	return new(net.Dialer).DialContext(ctx, network, address)
}

// join copies both ways until both ends have said EOF or either is closed. The EOF of one end is passed on and leaves the other way open.
func (c *connection) join(conn socket, ch ssh.Channel, reqs <-chan *ssh.Request) {
	defer conn.Close()
	defer ch.Close()
	stop := context.AfterFunc(c.ctx, func() { conn.Close() })
	defer stop()
	// The requests end when the client closes the channel: then nobody is left to send to, but what it sent before is still on its way.
	c.run("forward", func() {
		ssh.DiscardRequests(reqs)
		conn.SetReadDeadline(time.Unix(1, 0))
	})
	var both sync.WaitGroup
	both.Go(func() {
		if err := receive(conn, ch); err != nil {
			conn.Close()
			return
		}
		conn.CloseWrite()
	})
	both.Go(func() {
		if err := send(ch, conn); err != nil {
			ch.Close() // not an EOF: the client is to see that the stream broke
			return
		}
		ch.CloseWrite()
	})
	both.Wait()
}

// forwards are the listeners that a client has asked for, by what it calls them.
type forwards struct {
	mu   sync.Mutex
	open map[string]net.Listener
}

// add keeps l under name, unless the name is taken or there are too many.
func (f *forwards) add(name string, l net.Listener) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, taken := f.open[name]; taken || len(f.open) >= maxForwards {
		return false
	}
	if f.open == nil {
		f.open = make(map[string]net.Listener)
	}
	f.open[name] = l
	return true
}

func (f *forwards) has(name string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, ok := f.open[name]
	return ok
}

// cancel closes the listener called name, if there is one.
func (f *forwards) cancel(name string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	l, ok := f.open[name]
	if ok {
		l.Close()
		delete(f.open, name)
	}
	return ok
}

// forwardTCP answers tcpip-forward (RFC 4254, section 7.1).
func (c *connection) forwardTCP(conn *ssh.ServerConn, payload []byte) (bool, []byte) {
	var p struct {
		Host string
		Port uint32
	}
	if ssh.Unmarshal(payload, &p) != nil || p.Port > 65535 || c.srv.cfg.Block.RemoteForward {
		return false, nil
	}
	host := p.Host
	if host == "*" { // OpenSSH's word for every address, which it sends as such when asked for it by name
		host = ""
	}
	var l net.Listener
	err := c.srv.cfg.User.Do(func() (err error) { // as with sshd, the low ports are for root alone
		l, err = net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(int(p.Port))))
		return err
	})
	if err != nil {
		c.srv.cfg.Log.Info("cannot listen for an SSH client", "remote", c.remote, "err", err)
		return false, nil
	}
	port := uint32(l.Addr().(*net.TCPAddr).Port)
	ok := c.listen(conn, tcpName(p.Host, port), l, "forwarded-tcpip", func(peer net.Addr) []byte {
		origin, _ := peer.(*net.TCPAddr)
		return ssh.Marshal(struct {
			Host       string
			Port       uint32
			Origin     string
			OriginPort uint32
		}{p.Host, port, origin.IP.String(), uint32(origin.Port)})
	})
	if !ok || p.Port != 0 {
		return ok, nil
	}
	return true, ssh.Marshal(struct{ Port uint32 }{port})
}

func (c *connection) cancelForwardTCP(_ *ssh.ServerConn, payload []byte) (bool, []byte) {
	var p struct {
		Host string
		Port uint32
	}
	return ssh.Unmarshal(payload, &p) == nil && c.forwards.cancel(tcpName(p.Host, p.Port)), nil
}

func tcpName(host string, port uint32) string { return fmt.Sprintf("tcp %s %d", host, port) }

// forwardUnix answers streamlocal-forward. Asking twice for the same socket is answered as if it had been once.
func (c *connection) forwardUnix(conn *ssh.ServerConn, payload []byte) (bool, []byte) {
	var p struct{ Path string }
	if ssh.Unmarshal(payload, &p) != nil || c.srv.cfg.Block.RemoteForward {
		return false, nil
	}
	if c.forwards.has(unixName(p.Path)) {
		return true, nil
	}
	l, err := listenUnix(c.srv.cfg.User, p.Path)
	if err != nil {
		c.srv.cfg.Log.Info("cannot listen for an SSH client", "remote", c.remote, "err", err)
		return false, nil
	}
	return c.listen(conn, unixName(p.Path), l, "forwarded-streamlocal@openssh.com", func(net.Addr) []byte {
		return ssh.Marshal(struct{ Path, Reserved string }{p.Path, ""})
	}), nil
}

func (c *connection) cancelForwardUnix(_ *ssh.ServerConn, payload []byte) (bool, []byte) {
	var p struct{ Path string }
	return ssh.Unmarshal(payload, &p) == nil && c.forwards.cancel(unixName(p.Path)), nil
}

func unixName(path string) string { return "unix " + path }

// listenUnix listens on a socket at path that user alone may use. It makes the folder and removes what is at path, but no folder.
func listenUnix(user *account.User, path string) (l net.Listener, err error) {
	if path == "" || strings.ContainsRune(path, 0) || path[0] == '@' { // no abstract sockets: those have no permissions
		return nil, fmt.Errorf("cannot listen on a socket called %q", path)
	}
	err = user.Do(func() error {
		if err := makeWay(path); err != nil {
			return err
		}
		if l, err = user.ListenUnix(path); err != nil {
			return err
		}
		if err := os.Chmod(path, 0o600); err != nil {
			l.Close()
			return err
		}
		return nil
	})
	return l, err
}

// makeWay makes the folder of path and removes what is there, but no folder.
func makeWay(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	switch info, err := os.Lstat(path); {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.IsDir():
		return fmt.Errorf("cannot listen on %s: it is a folder", path)
	}
	return os.Remove(path)
}

// listen opens a channel to the client for each connection that l accepts, until l is cancelled or the connection ends. It owns l.
func (c *connection) listen(conn *ssh.ServerConn, name string, l net.Listener, channel string, extra func(peer net.Addr) []byte) bool {
	if !c.forwards.add(name, l) {
		l.Close()
		return false
	}
	ok := c.run("listener", func() { c.accept(conn, l, channel, extra) })
	if !ok {
		c.forwards.cancel(name)
	}
	return ok
}

func (c *connection) accept(conn *ssh.ServerConn, l net.Listener, channel string, extra func(peer net.Addr) []byte) {
	stop := context.AfterFunc(c.ctx, func() { l.Close() })
	defer stop()
	defer l.Close()
	for {
		peer, err := l.Accept()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) && retry(c.ctx, err) {
				continue
			}
			return
		}
		if !c.run("forward", func() { c.offer(conn, peer, channel, extra(peer.RemoteAddr())) }) {
			peer.Close()
		}
	}
}

// offer joins a connection that came in here with a channel to the client, if it takes it.
func (c *connection) offer(conn *ssh.ServerConn, peer net.Conn, channel string, extra []byte) {
	defer peer.Close()
	defer c.channels.Add(-1)
	if c.channels.Add(1) > maxChannels {
		return
	}
	ch, reqs, err := conn.OpenChannel(channel, extra)
	if err != nil {
		return
	}
	c.join(peer.(socket), ch, reqs)
}
