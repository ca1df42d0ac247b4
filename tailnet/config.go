package tailnet

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
)

// Config says what a [Node] is and how it reaches its relays.
type Config struct {
	// Prefixes are the node's own addresses, /128 each, the one it dials from
	// first. Required.
	Prefixes []netip.Prefix
	// NodeID is the opaque number the node publishes. Zero picks a random one.
	NodeID int64
	// RelayOnly starts the node as [Node.SetRelayOnly] would.
	RelayOnly bool
	// ListenPort is the UDP port for direct paths. Zero lets the system choose.
	ListenPort uint16
	// ForwardLoopback hands TCP and UDP to ports without a listener to the same
	// port of 127.0.0.1, then of ::1. It opens every loopback service of the
	// machine to every peer, which is what an agent is for and a client is not.
	ForwardLoopback bool

	// AccessURL is the control server's address. The nodes of embedded relays
	// in a relay map are reached there, whatever the map says.
	AccessURL *url.URL
	// DialRelay opens the TCP connection to a relay, or to the proxy before it.
	// Nil dials with package net.
	DialRelay func(ctx context.Context, network, addr string) (net.Conn, error)
	// Proxy picks the HTTP proxy for a relay. Nil reads the environment, as
	// [http.ProxyFromEnvironment] does.
	Proxy func(*http.Request) (*url.URL, error)
	// TLS is used for relays reached over https. Nil trusts the system's roots.
	TLS *tls.Config
	// Header is asked at each connection to a relay for headers to send along.
	Header func() http.Header
	// ForceWebsocket reaches relays over WebSocket from the start, rather than
	// after an answer that shows the plain upgrade does not pass.
	ForceWebsocket bool

	// Log receives what the node does. Nil discards it.
	Log *slog.Logger
}

func (c *Config) check() error {
	if len(c.Prefixes) == 0 {
		return errors.New("cannot make a tailnet node without an address")
	}
	for _, p := range c.Prefixes {
		if !p.Addr().Is6() || p.Addr().Is4In6() || !p.IsSingleIP() {
			return fmt.Errorf("cannot use %v as a tailnet address: it must be one IPv6 address (/128)", p)
		}
	}
	return nil
}
