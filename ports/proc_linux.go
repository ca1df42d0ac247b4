package ports

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"

	"github.com/cakturk/go-netstat/netstat"
)

// procNet reads /proc/net, and finds owners by itself.
type procNet struct{}

func (procNet) String() string { return "/proc/net" }

func (procNet) sockets(ctx context.Context) ([]socket, error) {
	listening := func(e *netstat.SockTabEntry) bool { return e.State == netstat.Listen }
	bound := func(e *netstat.SockTabEntry) bool { return e.State == netstat.Close && e.LocalAddr.Port != 0 }
	var all []socket
	for _, table := range []struct {
		network string
		read    func(netstat.AcceptFn) ([]netstat.SockTabEntry, error)
		accept  netstat.AcceptFn
	}{
		{"tcp", netstat.TCPSocks, listening},
		{"tcp", netstat.TCP6Socks, listening},
		{"udp", netstat.UDPSocks, bound},
		{"udp", netstat.UDP6Socks, bound},
	} {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		entries, err := table.read(table.accept)
		if errors.Is(err, fs.ErrNotExist) { // no IPv6
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("cannot read the %s sockets in /proc/net: %w", table.network, err)
		}
		for _, e := range entries {
			addr, ok := netip.AddrFromSlice(e.LocalAddr.IP)
			if !ok {
				continue
			}
			s := socket{network: table.network, local: netip.AddrPortFrom(addr.Unmap(), e.LocalAddr.Port), uid: e.UID}
			if e.Process != nil {
				s.pid = e.Process.Pid
			}
			all = append(all, s)
		}
	}
	return all, nil
}

// bestSource is netlink if it finds a listener that we know of: a sandbox may answer and know nothing.
func bestSource(log *slog.Logger) source {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Warn("cannot probe for listening ports by netlink; reading /proc/net", "err", err)
		return procNet{}
	}
	defer l.Close()
	sockets, err := diag{}.sockets(context.Background())
	for _, s := range sockets {
		if s.network == "tcp" && net.TCPAddrFromAddrPort(s.local).String() == l.Addr().String() {
			return diag{}
		}
	}
	log.Info("netlink does not tell which ports listen; reading /proc/net", "err", err)
	return procNet{}
}
