package relay

import (
	"errors"
	"net"
	"net/netip"

	"tailscale.com/net/stun"
)

// serveSTUN answers binding requests (RFC 5389) until the socket is closed.
// Whatever is not one is dropped without an answer.
func (s *Server) serveSTUN(conn net.PacketConn) {
	// Binding requests are tens of bytes; longer datagrams are cut and then
	// fail to parse.
	buf := make([]byte, 1500)
	for {
		size, from, err := conn.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			s.log.Debug("relay: cannot read a STUN request", "err", err)
			continue
		}
		if reply := stunReply(buf[:size], from.(*net.UDPAddr).AddrPort()); reply != nil {
			if _, err := conn.WriteTo(reply, from); err != nil {
				s.log.Debug("relay: cannot answer a STUN request", "err", err)
			}
		}
	}
}

// stunReply answers one datagram, nil for what is no binding request.
func stunReply(request []byte, from netip.AddrPort) []byte {
	if !stun.Is(request) {
		return nil
	}
	tx, err := stun.ParseBindingRequest(request)
	if err != nil {
		return nil
	}
	return stun.Response(tx, netip.AddrPortFrom(from.Addr().Unmap(), from.Port()))
}
