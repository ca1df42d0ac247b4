package tailnet

import (
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"tailscale.com/net/stun"
	"tailscale.com/tailcfg"
)

// answerDelay gives the library time to note that it has sent the request. An answer
// that overtakes the note, which on loopback it does, reads as a socket that cannot send.
const answerDelay = 10 * time.Millisecond

// loopbackSTUN answers STUN on loopback, for nodes whose relay map names no STUN
// server. The library takes a look at the network in which it sent no STUN packet
// for a socket that cannot send, and opens its sockets anew at every further look;
// with the relay away that is in a tight loop, and direct paths stall. What it
// learns here is its address on loopback, which serves peers on the same machine.
type loopbackSTUN struct {
	mu   sync.Mutex
	conn *net.UDPConn
	done chan struct{}
}

// node returns the responder as a node of a relay map. It is started when first
// asked for.
func (l *loopbackSTUN) node() (*tailcfg.DERPNode, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conn == nil {
		conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			return nil, fmt.Errorf("cannot answer STUN on loopback: %w", err)
		}
		l.conn, l.done = conn, make(chan struct{})
		go l.serve()
	}
	port := l.conn.LocalAddr().(*net.UDPAddr).Port
	return &tailcfg.DERPNode{HostName: "127.0.0.1", IPv4: "127.0.0.1", IPv6: noAddress, STUNPort: port, STUNOnly: true}, nil
}

func (l *loopbackSTUN) serve() {
	defer close(l.done)
	var buf [1500]byte // no request is longer than a packet
	for {
		n, from, err := l.conn.ReadFromUDPAddrPort(buf[:])
		if err != nil {
			return
		}
		if id, err := stun.ParseBindingRequest(buf[:n]); err == nil {
			<-time.After(answerDelay)
			// A lost answer is asked for again.
			_, _ = l.conn.WriteToUDPAddrPort(stun.Response(id, netip.AddrPortFrom(from.Addr().Unmap(), from.Port())), from)
		}
	}
}

func (l *loopbackSTUN) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conn != nil {
		l.conn.Close()
		<-l.done
	}
}
