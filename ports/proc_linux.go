package ports

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strconv"
)

// procNet reads the tables of sockets in /proc/PID/net. They hold every connection as well, so it costs what there are of those.
type procNet struct{}

func (procNet) String() string { return "/proc/net" }

func (procNet) sockets(ctx context.Context, ns *namespace, all []socket) ([]socket, error) {
	dir := "/proc/self/net/"
	if ns.pid != 0 {
		dir = fmt.Sprintf("/proc/%d/net/", ns.pid)
	}
	for _, table := range []struct {
		name, network string
		state         byte
	}{
		{"tcp", "tcp", stateListen},
		{"tcp6", "tcp", stateListen},
		{"udp", "udp", stateClose},
		{"udp6", "udp", stateClose},
	} {
		f, err := os.Open(dir + table.name)
		if errors.Is(err, fs.ErrNotExist) && table.name != "tcp" { // no IPv6
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("cannot read the table of %s sockets: %w", table.name, err)
		}
		lines := bufio.NewScanner(f)
		for lines.Scan() && ctx.Err() == nil {
			s, ok := parseTable(lines.Bytes(), table.state)
			if !ok || s.local.Port() == 0 { // of another kind, or not bound
				continue
			}
			s.network, s.space = table.network, ns.id
			all = append(all, s)
		}
		f.Close()
		if err := lines.Err(); err != nil {
			return nil, fmt.Errorf("cannot read the table of %s sockets: %w", table.name, err)
		}
	}
	return all, ctx.Err()
}

// parseTable reads one line of such a table, as proc_pid_net(5) has it, if its socket is in the given state.
func parseTable(line []byte, state byte) (socket, bool) {
	var s socket
	for column := 0; ; column++ {
		line = bytes.TrimLeft(line, " ")
		end := bytes.IndexByte(line, ' ')
		if end < 0 {
			end = len(line)
		}
		if end == 0 {
			return socket{}, false
		}
		field := string(line[:end])
		line = line[end:]
		switch column {
		case 1: // its own address
			var ok bool
			if s.local, ok = parseEndpoint(field); !ok {
				return socket{}, false
			}
		case 3:
			if got, err := strconv.ParseUint(field, 16, 8); err != nil || byte(got) != state {
				return socket{}, false
			}
		case 7:
			uid, err := strconv.ParseUint(field, 10, 32)
			if err != nil {
				return socket{}, false
			}
			s.uid = uint32(uid)
		case 9:
			inode, err := strconv.ParseUint(field, 10, 32)
			if err != nil {
				return socket{}, false
			}
			s.key.inode = uint32(inode)
			return s, true
		}
	}
}

// parseEndpoint reads an address and a port in hexadecimal digits. The address is printed as words of the machine, the port as a number.
func parseEndpoint(text string) (netip.AddrPort, bool) {
	const word = 8 // digits
	digits := len(text) - len(":0000")
	if digits != word && digits != 4*word || text[digits] != ':' {
		return netip.AddrPort{}, false
	}
	port, err := strconv.ParseUint(text[digits+1:], 16, 16)
	if err != nil {
		return netip.AddrPort{}, false
	}
	var b [16]byte
	for i := 0; i < digits; i += word {
		n, err := strconv.ParseUint(text[i:i+word], 16, 32)
		if err != nil {
			return netip.AddrPort{}, false
		}
		binary.NativeEndian.PutUint32(b[i/2:], uint32(n))
	}
	addr, _ := netip.AddrFromSlice(b[:digits/2])
	return netip.AddrPortFrom(addr.Unmap(), uint16(port)), true
}

// bestSource is netlink if it finds a listener that we know of: a sandbox may answer and know nothing.
func bestSource(log *slog.Logger) source {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Warn("cannot probe for listening ports by netlink; reading /proc/net", "err", err)
		return procNet{}
	}
	defer l.Close()
	var own namespace
	defer own.close()
	d := new(diag)
	sockets, err := d.sockets(context.Background(), &own, nil)
	for _, s := range sockets {
		if s.network == "tcp" && net.TCPAddrFromAddrPort(s.local).String() == l.Addr().String() {
			return d
		}
	}
	log.Info("netlink does not tell which ports listen; reading /proc/net", "err", err)
	return procNet{}
}
