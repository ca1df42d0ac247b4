// Package tailnet gives a process an address on a private WireGuard network.
//
// [New] makes a [Node]: a WireGuard peer with its own TCP/IP stack inside the
// process. It needs no TUN device and no privilege, and changes neither the
// routes nor the DNS of the host. Feed it a relay map ([Node.SetDERPMap]) and a
// coordination stream ([Node.CoordinateAgent] or [Node.CoordinateClient]); then
// [Node.Listen] and [Node.DialTCP] work as package net's do.
//
// Packets go straight between nodes over UDP where the network lets them, and
// through a relay (package tailnet/relay serves one) where it does not. The
// path may change at any time without an open connection noticing.
//
// Every call into tailscale.com on the way to that is made in this package, for
// its packages promise no stable API.
package tailnet
