package doctor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/berthd/berth/agent"
	"github.com/berthd/berth/client"
)

const (
	// largeRequest is more than two packets of any network, and less than any server's limit of headers; in bytes.
	largeRequest = 3000
	// stall is for how long a request may not be answered until its packets count as lost: TCP has sent them four times.
	stall = 3 * time.Second
	// headers are those of IPv4 and TCP; in bytes.
	headers = 40
)

// segments are the sizes that are tried when large packets are lost, each that of a common kind of network, in bytes.
var segments = []int{1440, 1400, 1360, 1280, 1200, 1000, 536}

// mtu finds out whether large packets reach the server. Where they are lost and no router says so (ICMP is dropped on the
// way), TCP sends them again and again: a request of one packet is answered, and a larger one hangs.
func (n *network) mtu(ctx context.Context) Check {
	switch err := n.large(ctx, 0); {
	case err == nil:
		if notes := agent.InterfaceNotes(); len(notes) > 0 {
			return Check{Status: Warn, Cause: strings.Join(notes, " "), Fix: "raise the interface's MTU, or choose --relay-only"}
		}
		return Check{Status: OK, Detail: "large packets reach the server"}
	case !hangs(err):
		return Check{Status: Skip, Detail: "see server"}
	}
	passes := make([]bool, len(segments))
	var wg sync.WaitGroup
	for i, size := range segments {
		wg.Go(func() { passes[i] = n.large(ctx, size) == nil })
	}
	wg.Wait()
	for i, size := range segments {
		if passes[i] {
			return Check{Status: Fail, Cause: fmt.Sprintf("large packets are lost on the way to the server, and nobody says so: those of %d bytes arrive", size+headers),
				Fix: fmt.Sprintf(`let ICMP "fragmentation needed" and "packet too big" through, or set the MTU: ip link set dev <interface> mtu %d`, size+headers)}
		}
	}
	return Check{Status: Skip, Detail: "see server"}
}

// hangs tells whether there was no answer, rather than a bad one.
func hangs(err error) bool {
	var late net.Error
	return errors.As(err, &late) && late.Timeout() || errors.Is(err, context.DeadlineExceeded)
}

// large makes a request of several packets, on a connection of its own. Segments are of at most so many bytes in both
// directions; 0 leaves that to the system. Any answer is a good one.
func (n *network) large(ctx context.Context, segment int) error {
	ctx, cancel := context.WithTimeout(ctx, stall)
	defer cancel()
	own, ok := n.Server.HTTP.Transport.(*http.Transport)
	if !ok {
		return errors.ErrUnsupported
	}
	transport := own.Clone()
	defer transport.CloseIdleConnections()
	transport.DialContext = (&net.Dialer{Control: func(_, _ string, conn syscall.RawConn) (err error) {
		if segment > 0 {
			err = errors.Join(conn.Control(func(fd uintptr) {
				err = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_MAXSEG, segment)
			}), err)
		}
		return err
	}}).DialContext
	header := n.Server.Header.Clone()
	if header == nil {
		header = http.Header{}
	}
	header.Set("X-Berth-Padding", strings.Repeat("x", largeRequest))
	c, err := n.client(transport, header)
	if err != nil {
		return err
	}
	if _, err = c.BuildInfo(ctx); err != nil && !hangs(err) && client.Explain(err).Kind != client.KindUnreachable {
		return nil
	}
	return err
}
