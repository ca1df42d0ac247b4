package ports

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// diag asks the kernel by NETLINK_SOCK_DIAG (sock_diag(7)).
type diag struct{}

func (diag) String() string { return "netlink" }

// diagTimeout bounds one dump, which takes well under a millisecond. Some sandboxes accept the request and never answer.
const diagTimeout = 2 * time.Second

// Socket states, as the kernel numbers them (include/net/tcp_states.h).
const (
	stateClose  = 7 // a UDP socket that is not connected
	stateListen = 10
)

func (diag) sockets(ctx context.Context) ([]socket, error) {
	conn, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, nil)
	if err != nil {
		return nil, fmt.Errorf("cannot ask the kernel for its sockets: %w", err)
	}
	defer conn.Close()
	deadline := time.Now().Add(diagTimeout)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	if err := conn.SetDeadline(deadline); err != nil {
		return nil, fmt.Errorf("cannot ask the kernel for its sockets: %w", err)
	}
	var all []socket
	for _, q := range []struct {
		network          string
		family, protocol uint8
		state            uint
	}{
		{"tcp", unix.AF_INET, unix.IPPROTO_TCP, stateListen},
		{"tcp", unix.AF_INET6, unix.IPPROTO_TCP, stateListen},
		{"udp", unix.AF_INET, unix.IPPROTO_UDP, stateClose},
		{"udp", unix.AF_INET6, unix.IPPROTO_UDP, stateClose},
	} {
		replies, err := conn.Execute(netlink.Message{
			Header: netlink.Header{Type: unix.SOCK_DIAG_BY_FAMILY, Flags: netlink.Request | netlink.Dump},
			Data:   diagRequest(q.family, q.protocol, 1<<q.state),
		})
		// A kernel without IPv6, or without the module for UDP, has no such sockets.
		if q.family == unix.AF_INET6 && errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("cannot ask the kernel for its %s sockets: %w", q.network, err)
		}
		for _, r := range replies {
			s, err := parseDiag(r.Data)
			if err != nil {
				return nil, err
			}
			if s.local.Port() == 0 { // not bound
				continue
			}
			s.network = q.network
			all = append(all, s)
		}
	}
	return all, nil
}

// Sizes of struct inet_diag_req_v2 and struct inet_diag_msg (include/uapi/linux/inet_diag.h).
const (
	diagRequestSize = 56
	diagMessageSize = 72
)

// diagRequest encodes a struct inet_diag_req_v2 that asks for every socket in one of states, a bit set.
func diagRequest(family, protocol uint8, states uint32) []byte {
	b := make([]byte, diagRequestSize)
	b[0], b[1] = family, protocol
	binary.NativeEndian.PutUint32(b[4:], states)
	return b
}

// parseDiag decodes a struct inet_diag_msg: family, state, timer and retransmits (a byte each); source and destination port (big-endian); source and
// destination address (16 bytes each); interface; cookie; then expiry, both queues, uid and inode.
func parseDiag(b []byte) (socket, error) {
	if len(b) < diagMessageSize {
		return socket{}, fmt.Errorf("cannot read a socket of %d bytes from the kernel", len(b))
	}
	var addr netip.Addr
	switch b[0] {
	case unix.AF_INET:
		addr = netip.AddrFrom4([4]byte(b[8:12]))
	case unix.AF_INET6:
		addr = netip.AddrFrom16([16]byte(b[8:24])).Unmap()
	default:
		return socket{}, fmt.Errorf("cannot read a socket of address family %d from the kernel", b[0])
	}
	return socket{
		local: netip.AddrPortFrom(addr, binary.BigEndian.Uint16(b[4:])),
		uid:   binary.NativeEndian.Uint32(b[64:]),
		key:   socketKey{inode: binary.NativeEndian.Uint32(b[68:]), cookie: binary.NativeEndian.Uint64(b[44:])},
	}, nil
}
