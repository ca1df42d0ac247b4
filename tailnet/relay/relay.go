// Package relay serves DERP, the relay of last resort between tailnet nodes,
// and STUN, by which nodes learn their public addresses.
//
// [New] makes a [Server]; mount [Server.Handler] at the root of a web server,
// for nodes always ask for /derp there. It relays for whoever connects:
// packets are encrypted end to end, and a node can be reached only by someone
// who knows its key. The web server must not offer HTTP/2, which has no
// connection upgrade.
package relay

import (
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"

	"tailscale.com/derp/derpserver"
	"tailscale.com/envknob"
	"tailscale.com/types/key"
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
	derp *derpserver.Server
	log  *slog.Logger

	mu     sync.Mutex
	closed bool
	stun   []net.PacketConn
	wg     sync.WaitGroup
}

// New makes a relay. A nil log discards.
func New(log *slog.Logger) *Server {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	logf := func(format string, args ...any) {
		log.Debug("relay: " + strings.TrimSpace(fmt.Sprintf(format, args...)))
	}
	return &Server{derp: derpserver.New(key.NewNode(), logf), log: log}
}

// Handler serves /derp, over a plain upgrade or WebSocket, and the probes below
// it by which nodes measure the way here.
func (s *Server) Handler() http.Handler {
	relay := derpserver.AddWebSocketSupport(s.derp, derpserver.Handler(s.derp))
	mux := http.NewServeMux()
	mux.HandleFunc("/derp", func(w http.ResponseWriter, r *http.Request) {
		switch strings.ToLower(r.Header.Get("Upgrade")) {
		case "derp", "websocket":
			relay.ServeHTTP(w, r)
		default:
			// The library answers the same, but writes what the client sent
			// to the process's standard log.
			http.Error(w, "DERP requires connection upgrade", http.StatusUpgradeRequired)
		}
	})
	mux.HandleFunc("/derp/latency-check", derpserver.ProbeHandler)
	mux.HandleFunc("/derp/probe", derpserver.ProbeHandler)
	return mux
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
