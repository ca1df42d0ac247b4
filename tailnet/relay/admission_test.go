package relay

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
	"tailscale.com/derp"
	"tailscale.com/types/key"
)

// register is who is known.
type register struct {
	mu   sync.Mutex
	keys map[[32]byte]bool
}

func (r *register) add(k key.NodePublic) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.keys == nil {
		r.keys = map[[32]byte]bool{}
	}
	r.keys[[32]byte(k.AppendTo(nil))] = true
}

func (r *register) has(k [32]byte) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.keys[k]
}

// serveRelay runs a relay with bounds of the test's choosing.
func serveRelay(t *testing.T, known func([32]byte) bool, change func(*lobby)) string {
	t.Helper()
	s := New(nil, known)
	if change != nil {
		change(s.lobby)
	}
	return serve(t, s)
}

func serve(t *testing.T, s *Server) string {
	t.Helper()
	web := httptest.NewServer(s.Handler())
	t.Cleanup(func() {
		s.Close()
		web.Close()
	})
	return web.Listener.Addr().String()
}

// node is a client of the relay.
type node struct {
	*derp.Client
	key  key.NodePrivate
	conn net.Conn
}

// upgradeRaw asks for a connection and returns it with the answer.
func upgradeRaw(t *testing.T, addr string) (net.Conn, *bufio.Reader, *http.Response) {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	fmt.Fprintf(conn, "GET /derp HTTP/1.1\r\nHost: relay\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n\r\n")
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		t.Fatal(err)
	}
	return conn, r, resp
}

func join(t *testing.T, addr string, k key.NodePrivate) (node, error) {
	t.Helper()
	conn, r, resp := upgradeRaw(t, addr)
	if resp.StatusCode != http.StatusSwitchingProtocols {
		conn.Close()
		return node{}, fmt.Errorf("status %d, Retry-After %q", resp.StatusCode, resp.Header.Get("Retry-After"))
	}
	c, err := derp.NewClient(k, conn, bufio.NewReadWriter(r, bufio.NewWriter(conn)), t.Logf)
	return node{c, k, conn}, err
}

func mustJoin(t *testing.T, addr string) node {
	t.Helper()
	n, err := join(t, addr, key.NewNode())
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// receive reads until a packet comes.
func (n node) receive(t *testing.T) derp.ReceivedPacket {
	t.Helper()
	for {
		m, err := n.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if p, ok := m.(derp.ReceivedPacket); ok {
			return p
		}
	}
}

// reach sends one packet and waits for it. The relay may have dropped some: who is asked for before he
// is registered there is not found.
func reach(t *testing.T, from, to node, text string) {
	t.Helper()
	done := make(chan struct{})
	defer close(done)
	go func() {
		for {
			from.Send(to.key.Public(), []byte(text))
			select {
			case <-done:
				return
			case <-time.After(20 * time.Millisecond):
			}
		}
	}()
	for {
		if p := to.receive(t); string(p.Data) == text {
			return
		}
	}
}

func TestStrangersAreCounted(t *testing.T) {
	var known register
	addr := serveRelay(t, known.has, func(l *lobby) { l.each = 2 })
	first, second := mustJoin(t, addr), mustJoin(t, addr)
	if _, err := join(t, addr, key.NewNode()); err == nil || err.Error() != `status 503, Retry-After "5"` {
		t.Errorf("a third stranger of the address: %v", err)
	}
	// One that has become known makes room, although it said nothing since; so does one that leaves.
	known.add(first.key.Public())
	eventually(t, func() bool {
		third, err := join(t, addr, key.NewNode())
		if err == nil {
			third.conn.Close()
		}
		return err == nil
	})
	eventually(t, func() bool {
		fourth, err := join(t, addr, key.NewNode())
		return err == nil && fourth.conn != nil
	})
	// Those who are in are not affected.
	reach(t, first, second, "still here")
}

func TestStrangersOfAllAddressesAreCounted(t *testing.T) {
	l := newLobby(func([32]byte) bool { return false })
	l.total = 2
	for i := range 2 {
		v, err := l.enter(netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer v.close()
	}
	if _, err := l.enter(netip.MustParseAddr("192.0.2.9"), nil); !errors.Is(err, errTooMany) {
		t.Errorf("a third stranger: %v", err)
	}
}

func TestStrangerHasLittleTime(t *testing.T) {
	var known register
	addr := serveRelay(t, known.has, func(l *lobby) { l.grace = 200 * time.Millisecond })
	k := key.NewNode()
	known.add(k.Public())
	friend, err := join(t, addr, k)
	if err != nil {
		t.Fatal(err)
	}
	silent, _, _ := upgradeRaw(t, addr) // never says who it is
	evicted := func() {
		stranger := mustJoin(t, addr)
		for {
			if _, err := stranger.Recv(); err != nil {
				return
			}
		}
	}
	evicted()
	if _, err := io.Copy(io.Discard, silent); err != nil {
		t.Error(err)
	}
	// A key that becomes known within the time stays, as those do who were known from the start.
	late := mustJoin(t, addr)
	known.add(late.key.Public())
	evicted() // who came later than that
	reach(t, friend, late, "hello")
}

// All strangers share one rate, but a greeting never waits.
func TestStrangersShareRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLobby(func([32]byte) bool { return false })
		begun := time.Now()
		var sent atomic.Int64
		var all sync.WaitGroup
		for range 10 {
			all.Go(func() {
				v, err := l.enter(netip.Addr{}, func() {})
				if err != nil {
					t.Error(err)
					return
				}
				defer v.close()
				piece := make([]byte, 16<<10)
				for range 4 << 20 / len(piece) { // 4 MiB
					if err := v.took(piece); err != nil {
						t.Error(err)
						return
					}
					sent.Add(int64(len(piece)))
				}
			})
		}
		synctest.Wait()
		before := time.Now()
		v, err := l.enter(netip.Addr{}, func() {})
		if err != nil {
			t.Fatal(err)
		}
		defer v.close()
		if err := v.took(make([]byte, 300)); err != nil || time.Since(before) != 0 {
			t.Errorf("a greeting waited %v: %v", time.Since(before), err)
		}
		all.Wait()
		// 40 MiB, of which 4 are at once and 4 a second after that.
		if took := time.Since(begun); took < 8*time.Second || took > 10*time.Second {
			t.Errorf("%d MiB took %v", sent.Load()>>20, took)
		}
	})
}

// Known keys are not held up.
func TestKnownIsNotSlowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := key.NewNode().Public()
		l := newLobby(func(other [32]byte) bool { return other == [32]byte(k.AppendTo(nil)) })
		v, err := l.enter(netip.Addr{}, func() { t.Error("a known node was put out") })
		if err != nil {
			t.Fatal(err)
		}
		defer v.close()
		begun := time.Now()
		raw := k.AppendTo(nil)
		greeting := append([]byte{frameClientInfo, 0, 0, 0, 100}, raw...)
		for _, b := range greeting { // byte by byte, as slow networks bring it
			if err := v.took([]byte{b}); err != nil {
				t.Fatal(err)
			}
		}
		for range 1000 {
			if err := v.took(make([]byte, 16<<10)); err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(begun); took != 0 {
			t.Errorf("16 MiB waited %v", took)
		}
		time.Sleep(2 * strangerGrace) // evict must not run
	})
}

// Strangers that send to strangers that never read: what is queued stays bounded, others get through,
// and those who do not read are disconnected.
func TestStrangersThatNeverRead(t *testing.T) {
	var known register
	addr := serveRelay(t, known.has, nil)
	ka, kb := key.NewNode(), key.NewNode()
	known.add(ka.Public())
	known.add(kb.Public())
	a, err := join(t, addr, ka)
	if err != nil {
		t.Fatal(err)
	}
	b, err := join(t, addr, kb)
	if err != nil {
		t.Fatal(err)
	}
	reach(t, a, b, "before")

	var heap runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&heap)
	before := heap.HeapAlloc

	const pairs = 16
	var sending sync.WaitGroup
	var sent atomic.Int64
	var senders []node
	for range pairs {
		reader, sender := mustJoin(t, addr), mustJoin(t, addr)
		senders = append(senders, sender)
		sending.Go(func() {
			packet := make([]byte, derp.MaxPacketSize)
			for sender.Send(reader.key.Public(), packet) == nil { // until it is closed
				sent.Add(int64(len(packet)))
			}
		})
	}
	// Meanwhile the others are served, and memory is looked at.
	var most uint64
	for i := range 20 {
		reach(t, a, b, fmt.Sprint("meanwhile ", i))
		runtime.GC()
		runtime.ReadMemStats(&heap)
		most = max(most, heap.HeapAlloc)
		time.Sleep(100 * time.Millisecond) // sampling, not waiting
	}
	for _, sender := range senders {
		sender.conn.Close()
	}
	sending.Wait()
	// Unbounded, 16 readers could make it hold 1 GiB. In 2 s and some strangers have 4 MiB and 4 MiB/s;
	// the rest is buffers of this test's own side.
	t.Logf("the heap grew by %d MiB; %d MiB were sent", (most-before)>>20, sent.Load()>>20)
	if most > before+64<<20 {
		t.Errorf("the heap grew from %d to %d MiB", before>>20, most>>20)
	}
}

// A reader whom somebody vouches for is given up, too, when it takes nothing at all; its sender and
// others are not affected.
func TestSlowReaderIsDisconnected(t *testing.T) {
	relay := New(nil, nil)
	addr := serve(t, relay)
	sender, reader, other := mustJoin(t, addr), mustJoin(t, addr), mustJoin(t, addr)
	eventually(t, func() bool { return relay.derp.IsClientConnectedForTest(reader.key.Public()) })
	packet := bytes.Repeat([]byte("x"), derp.MaxPacketSize)
	// The kernel's buffers take some MiB, the queue 512 packets; then a write may wait for 2 s.
	begun := time.Now()
	for relay.derp.IsClientConnectedForTest(reader.key.Public()) {
		if err := sender.Send(reader.key.Public(), packet); err != nil {
			t.Fatal(err)
		}
		if time.Since(begun) > 30*time.Second {
			t.Fatal("the reader is still connected")
		}
	}
	reach(t, sender, other, "hello")
}

func TestRelayOverWebSocket(t *testing.T) {
	var known register
	addr := serveRelay(t, known.has, nil)
	c, _, err := websocket.Dial(t.Context(), "ws://"+addr+"/derp", &websocket.DialOptions{Subprotocols: []string{"derp"}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.CloseNow()
	conn := websocket.NetConn(t.Context(), c, websocket.MessageBinary)
	k := key.NewNode()
	client, err := derp.NewClient(k, conn, bufio.NewReadWriter(bufio.NewReader(conn), bufio.NewWriter(conn)), t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	reach(t, mustJoin(t, addr), node{client, k, conn}, "over a WebSocket")

	other, _, err := websocket.Dial(t.Context(), "ws://"+addr+"/derp", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer other.CloseNow()
	if _, _, err := other.Read(t.Context()); websocket.CloseStatus(err) != websocket.StatusPolicyViolation {
		t.Errorf("a WebSocket without the subprotocol: %v", err)
	}
}

// eventually polls with a limit that only a failure reaches.
func eventually(t *testing.T, ok func() bool) {
	t.Helper()
	for limit := time.Now().Add(30 * time.Second); !ok(); {
		if time.Now().After(limit) {
			t.Fatal("it did not come to pass in 30 s")
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// FuzzConnection sends the relay whatever might come on a connection, in two pieces, before anybody has
// proved anything. Its end is noticed, and nothing is kept of it.
func FuzzConnection(f *testing.F) {
	k := [32]byte(key.NewNode().Public().AppendTo(nil))
	greeting := append([]byte{frameClientInfo, 0, 0, 0, 56 + 32}, k[:]...)
	f.Add([]byte{}, []byte{})
	f.Add(greeting, make([]byte, 56))
	f.Add(greeting[:3], greeting[3:])
	f.Add([]byte{frameClientInfo, 0xff, 0xff, 0xff, 0xff}, greeting)
	f.Add([]byte{4, 0, 1, 0, 32}, make([]byte, 100))
	s := New(nil, func(other [32]byte) bool { return other == k })
	f.Cleanup(func() { s.Close() })
	f.Fuzz(func(t *testing.T, first, second []byte) {
		here, there := net.Pipe()
		v, err := s.lobby.enter(netip.Addr{}, func() {})
		if err != nil {
			t.Fatal(err)
		}
		c := &watched{Conn: there, from: there, visitor: v}
		done := make(chan struct{})
		go func() {
			defer close(done)
			s.derp.Accept(t.Context(), c, bufio.NewReadWriter(bufio.NewReader(c), bufio.NewWriter(c)), "192.0.2.1:7")
		}()
		go io.Copy(io.Discard, here)
		here.SetWriteDeadline(time.Now().Add(30 * time.Second))
		here.Write(first)
		here.Write(second)
		here.Close()
		<-done
		v.close()
		s.lobby.mu.Lock()
		defer s.lobby.mu.Unlock()
		if len(s.lobby.strangers) != 0 || len(s.lobby.addresses) != 0 {
			t.Errorf("%d strangers of %d addresses are left", len(s.lobby.strangers), len(s.lobby.addresses))
		}
	})
}
