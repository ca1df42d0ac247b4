package sshd

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/crypto/ssh"
)

// agentSocket is the socket on which a client's SSH agent is reached. A connection has at most one, made when a session first asks for it and
// removed with the connection. What passes through it is not looked at: a forwarded agent is nobody to trust.
type agentSocket struct {
	mu   sync.Mutex
	path string
}

// open returns the path of the socket.
func (a *agentSocket) open(c *connection, conn *ssh.ServerConn) (string, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.path != "" {
		return a.path, nil
	}
	user := c.srv.cfg.User
	var dir string
	err := user.Do(func() (err error) {
		dir, err = os.MkdirTemp("", "berth-agent-") // 0700
		return err
	})
	if err != nil {
		return "", fmt.Errorf("cannot make a folder for the agent's socket: %w", err)
	}
	remove := func() { user.Do(func() error { return os.RemoveAll(dir) }) }
	path := filepath.Join(dir, "agent.sock")
	l, err := user.ListenUnix(path)
	if err != nil {
		remove()
		return "", fmt.Errorf("cannot listen for the agent: %w", err)
	}
	ok := c.run("agent", func() {
		defer remove()
		c.accept(conn, l, "auth-agent@openssh.com", func(net.Addr) []byte { return nil })
	})
	if !ok {
		l.Close()
		remove()
		return "", net.ErrClosed
	}
	a.path = path
	return path, nil
}
