// Package relay serves DERP, the relay of last resort between tailnet nodes,
// and STUN, by which nodes learn their public addresses.
//
// [New] makes a [Server]; mount [Server.Handler] at the root of a web server,
// for nodes always ask for /derp there. It takes whoever connects: packets are
// encrypted end to end, and a node can be reached only by someone who knows its
// key. But those whose key nobody vouches for are bounded in number, rate and
// time (see admission.go). The web server must not offer HTTP/2, which has no
// connection upgrade.
package relay

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"

	"github.com/coder/websocket"
	"tailscale.com/derp"
	"tailscale.com/derp/derpserver"
	"tailscale.com/envknob"
	"tailscale.com/types/key"

	"github.com/berthd/berth/wire"
)

// sendQueueDepth is how many packets wait for one slow client before the oldest
// is dropped. The library's default of 32 is less than one burst of a single
// TCP connection in the mesh, so that every burst loses packets; 512 is what
// stock servers use. Nodes of ours send up to 16 KiB a packet through a relay, which
// bounds the queue of one client at 8 MiB.
const sendQueueDepth = 512

func init() {
	envknob.Setenv("TS_DEBUG_DERP_PER_CLIENT_SEND_QUEUE_DEPTH", strconv.Itoa(sendQueueDepth))
}

// Server is a relay. Its key is made at start and lives as long as it does.
type Server struct {
	derp  *derpserver.Server
	log   *slog.Logger
	lobby *lobby

	mu     sync.Mutex
	closed bool
	stun   []net.PacketConn
	wg     sync.WaitGroup
}

// New makes a relay. A nil log discards. known tells whether a node key is that of a node which has
// proved elsewhere that it belongs here; nil takes everybody as such. It is called often, and at the
// same time.
func New(log *slog.Logger, known func(key [32]byte) bool) *Server {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	logf := func(format string, args ...any) {
		log.Debug("relay: " + strings.TrimSpace(fmt.Sprintf(format, args...)))
	}
	return &Server{derp: derpserver.New(key.NewNode(), logf), log: log, lobby: newLobby(known)}
}

// Handler serves /derp, over a plain upgrade or WebSocket, and the probes below
// it by which nodes measure the way here.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc(wire.PathDERP, func(w http.ResponseWriter, r *http.Request) {
		switch strings.ToLower(r.Header.Get("Upgrade")) {
		case "derp":
			s.serve(w, r, s.upgrade)
		case "websocket":
			s.serve(w, r, s.upgradeWebSocket)
		default:
			http.Error(w, "DERP requires connection upgrade", http.StatusUpgradeRequired)
		}
	})
	mux.HandleFunc(wire.PathLatencyCheck, derpserver.ProbeHandler)
	mux.HandleFunc(wire.PathDERP+"/probe", derpserver.ProbeHandler)
	return mux
}

// serve admits a connection, upgrades it, and relays for it until it ends.
func (s *Server) serve(w http.ResponseWriter, r *http.Request, upgrade func(http.ResponseWriter, *http.Request) (*watched, error)) {
	var addr netip.Addr
	if from, err := netip.ParseAddrPort(r.RemoteAddr); err == nil {
		addr = from.Addr().Unmap()
	}
	upgraded := make(chan *watched, 1)
	visitor, err := s.lobby.enter(addr, func() {
		select {
		case c := <-upgraded:
			s.log.Debug("relay: ended the connection of an unknown node", "remote", addr)
			c.Close()
		default: // not that far yet, or gone
		}
	})
	if err != nil {
		w.Header().Set("Retry-After", "5")
		http.Error(w, "too many unknown nodes are connected; try again", http.StatusServiceUnavailable)
		return
	}
	defer visitor.close()
	conn, err := upgrade(w, r)
	if err != nil {
		s.log.Debug("relay: cannot upgrade a connection", "remote", addr, "err", err)
		return
	}
	conn.visitor = visitor
	upgraded <- conn
	s.derp.Accept(r.Context(), conn, bufio.NewReadWriter(bufio.NewReader(conn), bufio.NewWriter(conn)), r.RemoteAddr)
}

// upgrade answers a plain upgrade. A client that asks for a fast start gets no answer.
func (s *Server) upgrade(w http.ResponseWriter, r *http.Request) (*watched, error) {
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, "this connection cannot be upgraded", http.StatusInternalServerError)
		return nil, err
	}
	if r.Header.Get(derp.FastStartHeader) != "1" {
		fmt.Fprintf(rw, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n"+
			"Derp-Version: %d\r\nDerp-Public-Key: %s\r\n\r\n", derp.ProtocolVersion, strings.TrimPrefix(s.derp.PublicKey().String(), "nodekey:"))
		if err := rw.Flush(); err != nil {
			conn.Close()
			return nil, err
		}
	}
	came, err := rw.Reader.Peek(rw.Reader.Buffered())
	if err != nil {
		conn.Close()
		return nil, err
	}
	return &watched{Conn: conn, from: io.MultiReader(strings.NewReader(string(came)), conn)}, nil
}

// upgradeWebSocket answers a WebSocket of the subprotocol derp, from pages of any origin: there is
// nothing that a cookie would open.
func (s *Server) upgradeWebSocket(w http.ResponseWriter, r *http.Request) (*watched, error) {
	c, err := websocket.Accept(w, r, &websocket.AcceptOptions{
		Subprotocols: []string{"derp"}, OriginPatterns: []string{"*"}, CompressionMode: websocket.CompressionDisabled,
	})
	if err != nil {
		return nil, err
	}
	if c.Subprotocol() != "derp" {
		const text = "client must speak the derp subprotocol"
		return nil, errors.Join(errors.New(text), c.Close(websocket.StatusPolicyViolation, text))
	}
	c.SetReadLimit(-1) // what is in it is bounded where it is decoded
	conn := websocket.NetConn(context.Background(), c, websocket.MessageBinary)
	return &watched{Conn: conn, from: conn}, nil
}

// ListenSTUN answers STUN binding requests on a UDP address until Close, and
// returns the address it listens on.
func (s *Server) ListenSTUN(addr string) (netip.AddrPort, error) {
	conn, err := net.ListenPacket("udp", addr)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("cannot serve STUN: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		conn.Close()
		return netip.AddrPort{}, net.ErrClosed
	}
	s.stun = append(s.stun, conn)
	s.wg.Go(func() { s.serveSTUN(conn) })
	return conn.LocalAddr().(*net.UDPAddr).AddrPort(), nil
}

// Close ends every connection and returns when nothing of the relay runs any more.
func (s *Server) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return net.ErrClosed
	}
	s.closed = true
	for _, c := range s.stun {
		c.Close()
	}
	s.mu.Unlock()
	err := s.derp.Close()
	s.wg.Wait()
	return err
}
