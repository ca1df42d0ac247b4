package tailnet

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/coder/websocket"
	"tailscale.com/tailcfg"

	"github.com/berthd/berth/wire"
)

// The library builds its relay clients itself and leaves no hook for headers,
// proxies, certificates, plain http for one relay and https for another, or
// WebSocket. So the relay map it gets names a listener on loopback in place of
// every relay; behind it this package connects in whatever way the relay needs
// and copies bytes. The relay protocol runs inside the stream, so the front never
// looks at it. The leg to the front is plain http, chosen for the whole process
// by TS_DEBUG_USE_DERP_HTTP: all relays are fronted, so nothing else is meant by it.
//
// The front also makes the relay path faster: the library writes each packet
// with a system call of its own, which on loopback is cheap, and the front
// passes on what has gathered in one.

const (
	// relayDialTimeout bounds the way from request to relay; the library gives
	// up after ten seconds.
	relayDialTimeout = 9 * time.Second
	// spliceBuffer takes four of our largest packets.
	spliceBuffer = 64 << 10
	// websocketMessage is what is sent as one WebSocket message: servers stop
	// reading at 32 KiB.
	websocketMessage = 16 << 10
	// frontRequestTimeout bounds the wait for the request of a local client.
	frontRequestTimeout = 5 * time.Second
	// maxFrontRequest bounds that request. Any user of this machine can connect;
	// the library's requests have some 200 bytes.
	maxFrontRequest = 16 << 10
)

// relayFront stands in for every relay, on loopback.
type relayFront struct {
	cfg      *Config
	log      *slog.Logger
	changed  func() // called when a region falls back to WebSocket
	listener net.Listener
	// secret is part of the name that requests must ask for, so that no other
	// user of this machine relays with our headers.
	secret string
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex
	regions map[int]*region
	forced  map[int]string // region to the reason for WebSocket
	failing map[int]bool   // regions whose last attempt failed
	conns   map[net.Conn]int
}

func newRelayFront(cfg *Config, changed func()) (*relayFront, error) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("cannot listen on 127.0.0.1, which a tailnet node needs to reach its relays: %w", err)
	}
	f := &relayFront{
		cfg: cfg, log: cfg.Log, changed: changed, listener: l, secret: strings.ToLower(rand.Text()),
		forced: make(map[int]string), failing: make(map[int]bool), conns: make(map[net.Conn]int),
	}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	f.wg.Go(f.serve)
	return f, nil
}

// close ends every relay connection.
func (f *relayFront) close() {
	f.cancel()
	f.listener.Close()
	f.drop(func(int) bool { return true })
	f.wg.Wait()
}

// set replaces the regions and ends connections to relays that have changed.
func (f *relayFront) set(regions map[int]*region) {
	f.mu.Lock()
	old := f.regions
	f.regions = regions
	for id := range f.forced {
		if !sameRelays(old[id], regions[id]) {
			delete(f.forced, id)
		}
	}
	f.mu.Unlock()
	f.drop(func(id int) bool { return !sameRelays(old[id], regions[id]) })
}

func sameRelays(a, b *region) bool {
	if a == nil || b == nil || len(a.nodes) != len(b.nodes) {
		return false
	}
	for i := range a.nodes {
		if a.nodes[i] != b.nodes[i] {
			return false
		}
	}
	return true
}

// drop ends the connections of some regions; the library opens them again.
func (f *relayFront) drop(which func(region int) bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for c, id := range f.conns {
		if which(id) {
			c.Close()
		}
	}
}

// node is the relay of a region as the library sees it.
func (f *relayFront) node(id int) *tailcfg.DERPNode {
	return &tailcfg.DERPNode{
		Name: strconv.Itoa(id), RegionID: id, HostName: fmt.Sprintf("%d.%s.invalid", id, f.secret),
		IPv4: "127.0.0.1", IPv6: noAddress, STUNPort: -1,
		DERPPort: f.listener.Addr().(*net.TCPAddr).Port,
	}
}

// region tells which region a request is for.
func (f *relayFront) region(host string) (*region, error) {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	id, rest, _ := strings.Cut(host, ".")
	if subtle.ConstantTimeCompare([]byte(rest), []byte(f.secret+".invalid")) != 1 {
		return nil, errors.New("not for this node")
	}
	number, err := strconv.Atoi(id)
	if err != nil {
		return nil, fmt.Errorf("cannot read region %q", id)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	r, ok := f.regions[number]
	if !ok {
		return nil, fmt.Errorf("region %d is not in the relay map", number)
	}
	return r, nil
}

// forcedWebsocket tells the regions that WebSocket was needed for, and why.
func (f *relayFront) forcedWebsocket() map[int32]string {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := make(map[int32]string, len(f.forced))
	for id, why := range maps.All(f.forced) {
		m[int32(id)] = why
	}
	return m
}

func (f *relayFront) serve() {
	for {
		conn, err := f.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			f.log.Warn("cannot accept a relay connection on loopback", "err", err)
			select {
			case <-f.ctx.Done():
				return
			case <-time.After(time.Second): // out of descriptors, most likely
			}
			continue
		}
		f.wg.Go(func() { f.handle(conn) })
	}
}

// handle serves one connection of the library.
func (f *relayFront) handle(local net.Conn) {
	defer local.Close()
	f.track(local, 0)
	defer f.untrack(local)
	local.SetReadDeadline(time.Now().Add(frontRequestTimeout))
	limited := &io.LimitedReader{R: local, N: maxFrontRequest}
	buffered := bufio.NewReader(limited)
	req, err := http.ReadRequest(buffered)
	if err != nil {
		return
	}
	limited.N = math.MaxInt64 // from here on it is a stream
	local.SetReadDeadline(time.Time{})
	reg, err := f.region(req.Host)
	if err != nil {
		f.log.Debug("relay request refused", "err", err)
		io.WriteString(local, "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
		return
	}
	f.track(local, reg.id)

	ctx, cancel := context.WithCancel(f.ctx)
	defer cancel()
	remote, size, err := f.connect(ctx, cancel, reg)
	if err != nil {
		f.note(reg, err)
		fmt.Fprintf(local, "HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
		return
	}
	defer remote.Close()
	f.note(reg, nil)
	if _, err := io.WriteString(local, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n\r\n"); err != nil {
		return
	}
	splice(struct {
		io.Reader
		io.WriteCloser
	}{buffered, local}, remote, size)
}

// note takes in how an attempt to reach a region ended. The library tries again
// every few seconds, so that it cannot be reached is told once until it was.
func (f *relayFront) note(reg *region, err error) {
	f.mu.Lock()
	told := f.failing[reg.id]
	f.failing[reg.id] = err != nil
	f.mu.Unlock()
	if err == nil || f.ctx.Err() != nil {
		return
	}
	level := slog.LevelInfo
	if told {
		level = slog.LevelDebug
	}
	f.log.Log(f.ctx, level, "cannot reach a relay; trying on", "region", reg.name, "err", err)
}

func (f *relayFront) track(c net.Conn, region int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.conns[c] = region
	if f.ctx.Err() != nil {
		c.Close()
	}
}

func (f *relayFront) untrack(c net.Conn) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.conns, c)
}

// connect opens a relay stream to the first relay of a region that answers.
// The stream lives in ctx. The number is the most that may be written at once.
func (f *relayFront) connect(ctx context.Context, cancel func(), reg *region) (io.ReadWriteCloser, int, error) {
	limit := time.AfterFunc(relayDialTimeout, cancel)
	defer limit.Stop()
	var errs []error
	for _, node := range reg.nodes {
		f.mu.Lock()
		_, forced := f.forced[reg.id]
		f.mu.Unlock()
		if !forced && !f.cfg.ForceWebsocket {
			conn, reason, err := f.upgrade(ctx, node)
			if err == nil {
				return conn, spliceBuffer, nil
			}
			errs = append(errs, err)
			if reason == "" {
				continue
			}
			f.mu.Lock()
			f.forced[reg.id] = reason
			f.mu.Unlock()
			f.log.Info("relay is reached over WebSocket", "region", reg.name, "reason", reason)
			f.changed()
		}
		conn, err := f.websocket(ctx, node)
		if err == nil {
			return conn, websocketMessage, nil
		}
		errs = append(errs, err)
	}
	return nil, 0, errors.Join(errs...)
}

// upgrade opens a stream the plain way. A reason says that something on the way
// does not let it pass, so that WebSocket may do better.
func (f *relayFront) upgrade(ctx context.Context, node relayNode) (_ io.ReadWriteCloser, reason string, _ error) {
	u := node.url(wire.PathDERP)
	req := (&http.Request{Method: http.MethodGet, URL: u, Header: f.cfg.header()}).WithContext(ctx)
	req.Header.Set("Upgrade", "DERP")
	req.Header.Set("Connection", "Upgrade")
	resp, err := f.cfg.transport(node).RoundTrip(req)
	if err != nil {
		return nil, "", fmt.Errorf("cannot reach the relay at %s: %w", u.Host, err)
	}
	if resp.StatusCode == http.StatusSwitchingProtocols {
		if conn, ok := resp.Body.(io.ReadWriteCloser); ok {
			return conn, "", nil
		}
	}
	resp.Body.Close()
	err = fmt.Errorf("the relay at %s answered %s to a connection upgrade", u.Host, resp.Status)
	if resp.StatusCode/100 == 4 || resp.ProtoMajor == 2 {
		return nil, err.Error(), err
	}
	return nil, "", err
}

func (f *relayFront) websocket(ctx context.Context, node relayNode) (io.ReadWriteCloser, error) {
	u := node.url(wire.PathDERP)
	// A redirect is not followed, here as in upgrade: headers are for this relay,
	// and the WebSocket package would follow any number of them.
	stay := func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	conn, _, err := websocket.Dial(ctx, u.String(), &websocket.DialOptions{
		HTTPClient:      &http.Client{Transport: f.cfg.transport(node), CheckRedirect: stay},
		HTTPHeader:      f.cfg.header(),
		Subprotocols:    []string{"derp"},
		CompressionMode: websocket.CompressionDisabled, // packets are encrypted
	})
	if err != nil {
		return nil, fmt.Errorf("cannot reach the relay at %s over WebSocket: %w", u.Host, err)
	}
	// The relay protocol bounds its frames itself, and the stream is bytes.
	conn.SetReadLimit(-1)
	return websocket.NetConn(ctx, conn, websocket.MessageBinary), nil
}

// splice copies both ways until either ends, then ends both. size is the most
// written to remote at once.
func splice(local, remote io.ReadWriteCloser, size int) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		copyUpTo(remote, local, size)
		remote.Close()
		local.Close()
	}()
	copyUpTo(local, remote, spliceBuffer)
	local.Close()
	remote.Close()
	<-done
}

// copyUpTo copies with a buffer of its own size: [io.CopyBuffer] would let
// either side choose another.
func copyUpTo(w io.Writer, r io.Reader, size int) {
	buf := make([]byte, size)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}
