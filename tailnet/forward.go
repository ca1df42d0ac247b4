package tailnet

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"tailscale.com/types/nettype"
)

const (
	// loopbackDialTimeout bounds a dial on this machine; the peer's own
	// connection attempt gives up later.
	loopbackDialTimeout = 5 * time.Second
	// claimTimeout is how long a peer may take to complete a handshake that
	// loopback has already answered.
	claimTimeout = 30 * time.Second
	// A UDP flow ends when nothing has passed for so long, sooner for DNS.
	udpIdle, udpIdleDNS = 2 * time.Minute, 30 * time.Second
	portDNS             = 53
	// maxForwards bounds the UDP flows forwarded at once: each costs a socket.
	maxForwards = 4096
)

// MaxDatagram is the longest UDP datagram, in bytes, that agents forward, stock
// ones too: what an Ethernet carries. Longer ones are lost.
const MaxDatagram = 1500

// loopbackAddrs are tried in this order.
var loopbackAddrs = []string{"127.0.0.1", "::1"}

// acceptTCP decides about a new connection, in a goroutine of its own. For a
// port without a listener the handshake waits until a service on loopback has
// answered, so that the peer sees a refusal as one.
func (n *Node) acceptTCP(src, dst netip.AddrPort) (handler func(net.Conn), intercept bool) {
	if l := n.ports.get(dst.Port()); l != nil {
		return func(c net.Conn) { l.deliver(named(c, src, dst)) }, true
	}
	if !n.cfg.ForwardLoopback {
		return nil, true // refused
	}
	backend, err := dialLoopback(n.ctx, dst.Port())
	if err != nil {
		n.log.Debug("port refused", "port", dst.Port(), "peer", src, "err", err)
		return nil, true
	}
	// A handshake that fails is not told, so a connection that nobody claims is closed in the end.
	unclaimed := time.AfterFunc(claimTimeout, func() { backend.Close() })
	return func(c net.Conn) {
		if !unclaimed.Stop() {
			c.Close()
			return
		}
		n.spawnWith(c, backend, func() { forwardTCP(n.ctx, c, backend) })
	}, true
}

// spawnWith is spawn for work that owns two connections.
func (n *Node) spawnWith(a, b io.Closer, f func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		a.Close()
		b.Close()
		return
	}
	n.wg.Go(f)
}

func named(c net.Conn, src, dst netip.AddrPort) net.Conn {
	if t, ok := c.(*gonet.TCPConn); ok {
		return &conn{TCPConn: t, local: net.TCPAddrFromAddrPort(dst), remote: net.TCPAddrFromAddrPort(src)}
	}
	return c
}

func dialLoopback(ctx context.Context, port uint16) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, loopbackDialTimeout)
	defer cancel()
	var d net.Dialer
	var errs []error
	for _, host := range loopbackAddrs {
		c, err := d.DialContext(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(int(port))))
		if err == nil {
			return c, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// forwardTCP copies both ways and passes on the end of each way by itself.
func forwardTCP(ctx context.Context, peer, backend net.Conn) {
	stop := context.AfterFunc(ctx, func() {
		peer.Close()
		backend.Close()
	})
	defer stop()
	defer peer.Close()
	defer backend.Close()
	var wg sync.WaitGroup
	wg.Go(func() { copyHalf(backend, peer) })
	copyHalf(peer, backend)
	wg.Wait()
}

// copyHalf copies one way and then closes that way only. A failure ends both:
// the far side would otherwise take a cut stream for a whole one.
func copyHalf(to, from net.Conn) {
	if _, err := io.Copy(to, from); err != nil {
		to.Close()
		from.Close()
		return
	}
	if w, ok := to.(interface{ CloseWrite() error }); ok {
		w.CloseWrite()
	}
}

// acceptUDP decides about a new flow. It is called on the packet path and must
// not block.
func (n *Node) acceptUDP(src, dst netip.AddrPort) (handler func(nettype.ConnPacketConn), intercept bool) {
	if !n.cfg.ForwardLoopback {
		return nil, true
	}
	return func(peer nettype.ConnPacketConn) {
		defer peer.Close()
		select {
		case n.udpFlows <- struct{}{}:
			defer func() { <-n.udpFlows }()
		default:
			return
		}
		if err := forwardUDP(n.ctx, peer, dst.Port()); err != nil {
			n.log.Debug("cannot forward UDP", "port", dst.Port(), "peer", src, "err", err)
		}
	}, true
}

// forwardUDP carries one flow to the first loopback address with a service,
// until nothing has passed for a while. Only the refusal of a datagram tells
// that there is none, so the datagram that is refused is sent again to the next
// address.
func forwardUDP(ctx context.Context, peer net.Conn, port uint16) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	f := &udpFlow{peer: peer, quiet: udpIdle}
	if port == portDNS {
		f.quiet = udpIdleDNS
	}
	f.idle = time.AfterFunc(f.quiet, cancel)
	defer f.idle.Stop()
	defer context.AfterFunc(ctx, func() { peer.SetReadDeadline(time.Now()) })()
	first := make([]byte, MaxDatagram+1)
	size, err := readDatagram(peer, first)
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	var errs []error
	for _, host := range loopbackAddrs {
		backend, err := net.Dial("udp", net.JoinHostPort(host, strconv.Itoa(int(port))))
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if f.backend.Swap(&backend) == nil {
			wg.Go(func() {
				defer cancel()
				f.send()
			})
		}
		err = f.exchange(ctx, backend, first[:size])
		if !errors.Is(err, syscall.ECONNREFUSED) || f.answered {
			return nil
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// readDatagram reads the next datagram that may be forwarded. A longer one
// would arrive without its end, which its receiver could not tell from a whole
// one, so it is lost instead. buf has room for one byte more than is allowed.
func readDatagram(c net.Conn, buf []byte) (int, error) {
	for {
		size, err := c.Read(buf)
		if err != nil || size < len(buf) {
			return size, err
		}
	}
}

// udpFlow is one flow between a peer and the backend that is tried or has answered.
type udpFlow struct {
	peer     net.Conn
	backend  atomic.Pointer[net.Conn]
	idle     *time.Timer // ends the flow
	quiet    time.Duration
	answered bool
}

// send carries the peer's datagrams to whatever backend there is by then. A
// refusal shows where its answers are read.
func (f *udpFlow) send() {
	buf := make([]byte, MaxDatagram+1)
	for {
		size, err := readDatagram(f.peer, buf)
		if err != nil {
			return
		}
		f.idle.Reset(f.quiet)
		(*f.backend.Load()).Write(buf[:size])
	}
}

// exchange sends the backend the first datagram and carries its answers to the
// peer, until ctx ends or the backend refuses.
func (f *udpFlow) exchange(ctx context.Context, backend net.Conn, first []byte) error {
	defer backend.Close()
	defer context.AfterFunc(ctx, func() { backend.SetReadDeadline(time.Now()) })()
	if _, err := backend.Write(first); err != nil {
		return err
	}
	buf := make([]byte, MaxDatagram+1)
	for {
		size, err := readDatagram(backend, buf)
		if err != nil {
			return err
		}
		f.answered = true
		f.idle.Reset(f.quiet)
		if _, err := f.peer.Write(buf[:size]); err != nil {
			return err
		}
	}
}
