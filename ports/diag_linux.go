package ports

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// diag asks the kernel by NETLINK_SOCK_DIAG (sock_diag(7)). It speaks netlink by plain system calls: with thousands of listeners, a library that copies
// each answer and looks at its size beforehand takes four times as long.
type diag struct {
	buf, message []byte // room for an answer and for a request
	seq          uint32
}

func (*diag) String() string { return "netlink" }

const (
	// diagTimeout bounds one dump, which takes well under a millisecond. Some sandboxes accept the request and never answer.
	diagTimeout = 2 * time.Second
	// diagBuffer holds the longest piece that a kernel makes of a dump.
	diagBuffer = 32 << 10
)

// Socket states, as the kernel numbers them (include/net/tcp_states.h).
const (
	stateClose  = 7 // a UDP socket that is not connected
	stateListen = 10
)

// diagTCP is TCPDIAG_GETSOCK (include/uapi/linux/inet_diag.h), the older request for TCP sockets. It asks for both families at once: what a dump costs on
// a machine with few sockets is that the kernel goes through its whole hash table.
const diagTCP = 18

func (d *diag) sockets(ctx context.Context, ns *namespace, all []socket) ([]socket, error) {
	if ns.conn == nil {
		conn, err := dialDiag(ns.pid)
		if err != nil {
			return nil, fmt.Errorf("cannot ask the kernel for its sockets: %w", err)
		}
		ns.conn = conn
	}
	for _, q := range []struct {
		network string
		request []byte
		lacking bool // there may be a kernel that does not know of such sockets
	}{
		{"tcp", tcpRequest, false},
		{"udp", udpRequest, false},
		{"udp", udp6Request, true},
	} {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		before := len(all)
		var err error
		all, err = d.dump(ns.conn, q.request, all)
		// A kernel without IPv6 has none. One without the module for UDP has them and cannot tell: the tables in /proc do.
		if err != nil && !(q.lacking && errors.Is(err, unix.ENOENT)) {
			ns.hangUp() // what is left of an answer would be taken for the next one
			return nil, fmt.Errorf("cannot ask the kernel for its %s sockets: %w", q.network, err)
		}
		found := all[before:]
		for i := range found {
			found[i].network, found[i].space = q.network, ns.id
		}
	}
	return all, nil
}

// dump sends a request and appends the sockets in the answer to all.
func (d *diag) dump(conn *diagConn, request []byte, all []socket) ([]socket, error) {
	d.seq++
	d.message = append(d.message[:0], request...)
	binary.NativeEndian.PutUint32(d.message[8:], d.seq)
	if err := unix.Sendto(conn.fd, d.message, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return all, err
	}
	if d.buf == nil {
		d.buf = make([]byte, diagBuffer)
	}
	for {
		n, err := unix.Read(conn.fd, d.buf)
		switch {
		case errors.Is(err, unix.EINTR): // of the Go runtime, which interrupts a read with a timeout
			continue
		case errors.Is(err, unix.EAGAIN):
			return all, fmt.Errorf("no answer within %v", diagTimeout)
		case err != nil:
			return all, err
		}
		var done bool
		if all, done, err = parseDump(d.buf[:n], d.seq, all); done || err != nil {
			return all, err
		}
	}
}

// parseDump appends the sockets of one piece of an answer to all, and reports whether it was the last. A piece is made of messages (netlink(7)).
func parseDump(b []byte, seq uint32, all []socket) (_ []socket, done bool, err error) {
	for len(b) >= unix.NLMSG_HDRLEN {
		size := binary.NativeEndian.Uint32(b)
		if size < unix.NLMSG_HDRLEN || uint64(size) > uint64(len(b)) {
			return all, true, fmt.Errorf("cannot read a message of %d bytes from the kernel", size)
		}
		kind, answers, body := binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint32(b[8:]), b[unix.NLMSG_HDRLEN:size]
		b = b[min((int(size)+3)&^3, len(b)):]
		switch {
		case answers != seq:
			continue
		case kind == unix.NLMSG_DONE || kind == unix.NLMSG_ERROR:
			if len(body) >= 4 {
				if code := int32(binary.NativeEndian.Uint32(body)); code < 0 {
					return all, true, unix.Errno(-code)
				}
			}
			return all, true, nil
		case kind != unix.SOCK_DIAG_BY_FAMILY && kind != diagTCP:
			continue
		}
		s, err := parseDiag(body)
		if err != nil {
			return all, true, err
		}
		if s.local.Port() != 0 { // else it is not bound
			all = append(all, s)
		}
	}
	return all, false, nil
}

// diagConn is a connection to the kernel. It stays in the network namespace that it was opened in.
type diagConn struct{ fd int }

func (c *diagConn) close() { unix.Close(c.fd) }

// dialDiag opens a connection in the network namespace of a process; 0 is our own.
func dialDiag(pid int) (*diagConn, error) {
	var conn *diagConn
	open := func() error {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
		if err != nil {
			return err
		}
		timeout := unix.NsecToTimeval(int64(diagTimeout))
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
			unix.Close(fd)
			return err
		}
		conn = &diagConn{fd}
		return nil
	}
	if pid == 0 {
		return conn, open()
	}
	err := visit(pid, open)
	return conn, err
}

// visit runs do in the network namespace of a process, on a thread that nothing else runs on meanwhile.
func visit(pid int, do func() error) error {
	there, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return err
	}
	defer there.Close()
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		done <- func() error {
			here, err := os.Open("/proc/thread-self/ns/net")
			if err != nil {
				runtime.UnlockOSThread()
				return err
			}
			defer here.Close()
			if err := unix.Setns(int(there.Fd()), unix.CLONE_NEWNET); err != nil {
				runtime.UnlockOSThread()
				return fmt.Errorf("cannot enter a network namespace: %w", err)
			}
			err = do()
			// A thread that cannot go back ends with this goroutine, which keeps it to itself.
			if unix.Setns(int(here.Fd()), unix.CLONE_NEWNET) == nil {
				runtime.UnlockOSThread()
			}
			return err
		}()
	}()
	return <-done
}

// diagMessageSize is that of a struct inet_diag_msg (include/uapi/linux/inet_diag.h).
const diagMessageSize = 72

// The requests: for TCP sockets that listen and for UDP sockets that are not connected.
var (
	tcpRequest  = diagMessage(diagTCP, unix.AF_INET, 0, stateListen)
	udpRequest  = diagMessage(unix.SOCK_DIAG_BY_FAMILY, unix.AF_INET, unix.IPPROTO_UDP, stateClose)
	udp6Request = diagMessage(unix.SOCK_DIAG_BY_FAMILY, unix.AF_INET6, unix.IPPROTO_UDP, stateClose)
)

// diagMessage encodes a request for every socket in a state: a header (netlink(7)), and a struct inet_diag_req_v2 or, for diagTCP, a struct inet_diag_req.
// Both begin with a family and, in the one, a protocol; both name a socket in 48 bytes and a set of states in 4, in different order.
func diagMessage(kind uint16, family, protocol uint8, state uint) []byte {
	size, states := 56, 4
	if kind == diagTCP {
		size, states = 60, 52
	}
	b := make([]byte, unix.NLMSG_HDRLEN+size)
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	binary.NativeEndian.PutUint16(b[4:], kind)
	binary.NativeEndian.PutUint16(b[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	body := b[unix.NLMSG_HDRLEN:]
	body[0], body[1] = family, protocol
	binary.NativeEndian.PutUint32(body[states:], 1<<state)
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
