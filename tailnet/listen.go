package tailnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
)

// acceptWithin is how long a connection waits for its service to accept it.
const acceptWithin = time.Second

// portTable holds the listeners of a node.
type portTable struct {
	mu        sync.Mutex
	closed    bool
	listeners map[uint16]*listener
}

func newPortTable() *portTable { return &portTable{listeners: make(map[uint16]*listener)} }

func (t *portTable) get(port uint16) *listener {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.listeners[port]
}

func (t *portTable) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	for _, l := range t.listeners {
		l.stop()
	}
}

// listener is one TCP port of the node.
type listener struct {
	table *portTable
	addr  *net.TCPAddr
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
	// stack accepts in the place of the flow handler; see [Node.Listen].
	stack net.Listener
}

// Listen accepts TCP connections to a port on all the node's addresses.
func (n *Node) Listen(port uint16) (net.Listener, error) {
	t := n.ports
	t.mu.Lock()
	defer t.mu.Unlock()
	addr := netip.AddrPortFrom(n.cfg.Prefixes[0].Addr(), port)
	if t.closed {
		return nil, fmt.Errorf("cannot listen on %v: %w", addr, net.ErrClosed)
	}
	if t.listeners[port] != nil {
		return nil, fmt.Errorf("cannot listen on %v: the port is taken", addr)
	}
	l := &listener{table: t, addr: net.TCPAddrFromAddrPort(addr), conns: make(chan net.Conn), done: make(chan struct{})}
	if viaRange.Contains(addr.Addr()) {
		// One agent id in 65,536 gives an address in a range for which the
		// stack refuses connections before it asks us. Its own listeners are
		// asked earlier; ports without one cannot be forwarded there.
		sl, err := n.engine.stack.ListenTCP("tcp6", addr.String())
		if err != nil {
			return nil, fmt.Errorf("cannot listen on %v: %w", addr, err)
		}
		l.stack = sl
		n.spawn(l.pump)
	}
	t.listeners[port] = l
	return l, nil
}

// viaRange is where the stack keeps IPv4 networks mapped into IPv6.
var viaRange = netip.MustParsePrefix("fd7a:115c:a1e0:b1a::/64")

// pump takes connections from the stack's own listener.
func (l *listener) pump() {
	for {
		c, err := l.stack.Accept()
		if err != nil {
			return
		}
		l.deliver(&conn{TCPConn: c.(*gonet.TCPConn), local: c.LocalAddr(), remote: c.RemoteAddr()})
	}
}

// deliver hands a connection to whoever accepts, or closes it.
func (l *listener) deliver(c net.Conn) {
	limit := time.NewTimer(acceptWithin)
	defer limit.Stop()
	select {
	case l.conns <- c:
	case <-l.done:
		c.Close()
	case <-limit.C:
		c.Close()
	}
}

// Accept implements [net.Listener].
func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, &net.OpError{Op: "accept", Net: "tcp", Addr: l.addr, Err: net.ErrClosed}
	}
}

// Addr implements [net.Listener].
func (l *listener) Addr() net.Addr { return l.addr }

// Close implements [net.Listener].
func (l *listener) Close() error {
	l.table.mu.Lock()
	if l.table.listeners[uint16(l.addr.Port)] == l {
		delete(l.table.listeners, uint16(l.addr.Port))
	}
	l.table.mu.Unlock()
	return l.stop()
}

func (l *listener) stop() error {
	err := net.ErrClosed
	l.once.Do(func() {
		err = nil
		close(l.done)
		if l.stack != nil {
			l.stack.Close()
		}
	})
	return err
}

// conn is a TCP connection with addresses that it knows even before the
// handshake is over. It has CloseRead and CloseWrite.
type conn struct {
	*gonet.TCPConn
	local, remote net.Addr
}

func (c *conn) LocalAddr() net.Addr  { return c.local }
func (c *conn) RemoteAddr() net.Addr { return c.remote }

// DialTCP connects to a peer's port. The connection has CloseWrite. If the
// peer refuses, the error is [syscall.ECONNREFUSED].
func (n *Node) DialTCP(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	c, err := n.engine.stack.DialContextTCPWithBind(ctx, n.cfg.Prefixes[0].Addr(), to)
	if op := new(net.OpError); errors.As(err, &op) && op.Err.Error() == (&tcpip.ErrConnectionRefused{}).String() {
		err = syscall.ECONNREFUSED // the stack has only a text for it
	}
	if err != nil {
		return nil, fmt.Errorf("cannot connect to %v over the mesh: %w", to, err)
	}
	return &conn{TCPConn: c, local: c.LocalAddr(), remote: net.TCPAddrFromAddrPort(to)}, nil
}

// DialUDP makes a socket that speaks with a peer's port only.
func (n *Node) DialUDP(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	c, err := n.engine.stack.DialContextUDPWithBind(ctx, n.cfg.Prefixes[0].Addr(), to)
	if err != nil {
		return nil, fmt.Errorf("cannot reach %v over the mesh: %w", to, err)
	}
	return c, nil
}
