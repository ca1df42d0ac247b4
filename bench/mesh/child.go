package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/berthd/berth/tailnet"
	"github.com/berthd/berth/tailnet/relay"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/tailnetpb"
)

// settings is the first line a child reads.
type settings struct {
	Relay       string
	RelayOnly   bool
	Seconds     float64
	MemoryLimit int64
}

// message is a line between the nodes, by way of the parent.
type message struct {
	Node   *tailnetpb.Node `json:",omitempty"`
	Ready  bool            `json:",omitempty"`
	Result *result         `json:",omitempty"`
}

var (
	serverID = uuid.MustParse("11111111-2222-4333-8444-555555555555")
	clientID = uuid.MustParse("66666666-7777-4888-9999-aaaaaaaaaaaa")
)

const (
	port = 3
	// The first byte of a connection says what it is for.
	kindUp, kindDown, kindEcho = 'u', 'd', 'e'
	block                      = 64 << 10
	pings                      = 2000
)

func child(role string) error {
	in := bufio.NewScanner(os.Stdin)
	in.Buffer(nil, 1<<20)
	if !in.Scan() {
		return io.ErrUnexpectedEOF
	}
	var s settings
	if err := json.Unmarshal(in.Bytes(), &s); err != nil {
		return err
	}
	if s.MemoryLimit > 0 {
		debug.SetMemoryLimit(s.MemoryLimit)
	}
	switch role {
	case "relay":
		return serveRelay(in)
	case "server":
		return serve(s, &link{in: in, peer: clientID})
	case "client":
		return measureAll(s, &link{in: in, peer: serverID})
	}
	return fmt.Errorf("unknown role %q", role)
}

func serveRelay(in *bufio.Scanner) error {
	r := relay.New(nil, nil)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	go http.Serve(l, r.Handler())
	if err := json.NewEncoder(os.Stdout).Encode(l.Addr().String()); err != nil {
		return err
	}
	in.Scan() // until the parent goes away
	return nil
}

// link is a coordination stream to the one other node.
type link struct {
	in   *bufio.Scanner
	peer uuid.UUID
	mu   sync.Mutex
}

func (l *link) say(m message) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return json.NewEncoder(os.Stdout).Encode(m)
}

func (l *link) Send(r *tailnetpb.CoordinateRequest) error {
	if u := r.GetUpdateSelf(); u != nil {
		return l.say(message{Node: u.GetNode()})
	}
	if len(r.GetReadyForHandshake()) > 0 {
		return l.say(message{Ready: true})
	}
	return nil
}

func (l *link) Recv() (*tailnetpb.CoordinateResponse, error) {
	if !l.in.Scan() {
		return nil, io.EOF
	}
	var m message
	if err := json.Unmarshal(l.in.Bytes(), &m); err != nil {
		return nil, err
	}
	u := &tailnetpb.CoordinateResponse_PeerUpdate{Id: l.peer[:], Node: m.Node, Kind: tailnetpb.CoordinateResponse_PeerUpdate_NODE}
	if m.Ready {
		u.Kind = tailnetpb.CoordinateResponse_PeerUpdate_READY_FOR_HANDSHAKE
	}
	return &tailnetpb.CoordinateResponse{PeerUpdates: []*tailnetpb.CoordinateResponse_PeerUpdate{u}}, nil
}

func (l *link) CloseSend() error { return nil }
func (l *link) Close() error     { return os.Stdin.Close() }

func newNode(s settings, id uuid.UUID) (*tailnet.Node, error) {
	n, err := tailnet.New(tailnet.Config{Prefixes: wire.AgentPrefixes(id), RelayOnly: s.RelayOnly})
	if err != nil {
		return nil, err
	}
	host, p, err := net.SplitHostPort(s.Relay)
	if err != nil {
		return nil, err
	}
	relayPort, err := strconv.Atoi(p)
	if err != nil {
		return nil, err
	}
	return n, n.SetDERPMap(&tailnetpb.DERPMap{Regions: map[int64]*tailnetpb.DERPMap_Region{1: {
		RegionId: 1, Nodes: []*tailnetpb.DERPMap_Region_Node{{HostName: host, DerpPort: int32(relayPort), StunPort: -1, ForceHttp: true}},
	}}})
}

func serve(s settings, l *link) error {
	n, err := newNode(s, serverID)
	if err != nil {
		return err
	}
	listener, err := n.Listen(port)
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			go serveConn(c)
		}
	}()
	err = n.CoordinateAgent(context.Background(), l)
	if l.in.Err() == nil {
		return nil // the parent has closed our input: all is measured
	}
	return err
}

func serveConn(c net.Conn) {
	defer c.Close()
	kind := make([]byte, 1)
	if _, err := io.ReadFull(c, kind); err != nil {
		return
	}
	buf := make([]byte, block)
	switch kind[0] {
	case kindUp:
		for {
			if _, err := c.Read(buf); err != nil {
				return
			}
		}
	case kindDown:
		for {
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
	case kindEcho:
		for {
			if _, err := io.ReadFull(c, buf[:1]); err != nil {
				return
			}
			if _, err := c.Write(buf[:1]); err != nil {
				return
			}
		}
	}
}

func measureAll(s settings, l *link) error {
	n, err := newNode(s, clientID)
	if err != nil {
		return err
	}
	go n.CoordinateClient(context.Background(), l, serverID)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	to := wire.AgentAddr(serverID)
	if err := n.AwaitReachable(ctx, to); err != nil {
		return err
	}
	if !s.RelayOnly {
		if err := awaitDirect(ctx, n, to); err != nil {
			return err
		}
	}
	var r result
	length := time.Duration(s.Seconds * float64(time.Second))
	if r.P50, r.P99, err = roundTrips(n, to); err != nil {
		return err
	}
	for _, t := range []struct {
		kind  byte
		speed *float64
	}{{kindUp, &r.Up}, {kindDown, &r.Down}} {
		bytes, took, err := transfer(n, to, t.kind, length)
		if err != nil {
			return err
		}
		r.Bytes += bytes
		*t.speed = float64(bytes) / 1e6 / took.Seconds()
	}
	p, err := n.Ping(ctx, to)
	if err != nil {
		return err
	}
	r.Direct = p.Direct.IsValid()
	return l.say(message{Result: &r})
}

func awaitDirect(ctx context.Context, n *tailnet.Node, to netip.Addr) error {
	for {
		one, cancel := context.WithTimeout(ctx, time.Second)
		p, err := n.Ping(one, to)
		cancel()
		if err == nil && p.Direct.IsValid() {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.New("no direct path came up")
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func open(n *tailnet.Node, to netip.Addr, kind byte) (net.Conn, error) {
	c, err := n.DialTCP(context.Background(), netip.AddrPortFrom(to, port))
	if err != nil {
		return nil, err
	}
	_, err = c.Write([]byte{kind})
	return c, err
}

// transfer moves bytes one way for a while.
func transfer(n *tailnet.Node, to netip.Addr, kind byte, length time.Duration) (bytes int64, took time.Duration, err error) {
	c, err := open(n, to, kind)
	if err != nil {
		return 0, 0, err
	}
	defer c.Close()
	move := c.Write
	if kind == kindDown {
		move = c.Read
	}
	buf := make([]byte, block)
	start := time.Now()
	for time.Since(start) < length {
		size, err := move(buf)
		if err != nil {
			return 0, 0, err
		}
		bytes += int64(size)
	}
	return bytes, time.Since(start), nil
}

// roundTrips sends single bytes there and back and returns microseconds.
func roundTrips(n *tailnet.Node, to netip.Addr) (p50, p99 float64, err error) {
	c, err := open(n, to, kindEcho)
	if err != nil {
		return 0, 0, err
	}
	defer c.Close()
	times := make([]time.Duration, pings)
	b := make([]byte, 1)
	for i := range times {
		start := time.Now()
		if _, err := c.Write(b); err != nil {
			return 0, 0, err
		}
		if _, err := io.ReadFull(c, b); err != nil {
			return 0, 0, err
		}
		times[i] = time.Since(start)
	}
	slices.Sort(times)
	µs := func(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
	return µs(times[len(times)/2]), µs(times[len(times)*99/100]), nil
}
