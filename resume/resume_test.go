package resume

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// road is a listener that is reached over connections which the test breaks.
type road struct {
	t       *testing.T
	conns   chan net.Conn
	closed  chan struct{}
	once    sync.Once
	mu      sync.Mutex
	blocked bool
	open    []net.Conn
	dials   int
}

func newRoad(t *testing.T) *road {
	return &road{t: t, conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (r *road) Accept() (net.Conn, error) {
	select {
	case c := <-r.conns:
		return c, nil
	case <-r.closed:
		return nil, net.ErrClosed
	}
}

func (r *road) Close() error   { r.once.Do(func() { close(r.closed) }); return nil }
func (r *road) Addr() net.Addr { return &net.TCPAddr{} }

var errBlocked = errors.New("the road is blocked")

func (r *road) dial(ctx context.Context) (net.Conn, error) {
	near, far := net.Pipe()
	r.mu.Lock()
	r.dials++
	if r.blocked {
		r.mu.Unlock()
		return nil, errBlocked
	}
	r.open = append(r.open, near, far)
	r.mu.Unlock()
	select {
	case r.conns <- far:
		return near, nil
	case <-r.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// block breaks every connection, and lets no other be made.
func (r *road) block() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.blocked = true
	for _, c := range r.open {
		c.Close()
	}
	r.open = nil
}

func (r *road) unblock() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.blocked = false
}

// streams opens a stream over a road and returns both ends; both are gone when the test ends.
func streams(t *testing.T, r *road, cfg Config, cl Client) (l *Listener, near *Conn, far net.Conn) {
	t.Helper()
	l = Listen(r, cfg)
	t.Cleanup(l.Shutdown)
	cl.Dial = r.dial
	near, err := cl.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { near.Close() })
	far, err = l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { far.Close() })
	return l, near, far
}

func say(t *testing.T, to, from net.Conn, words string) {
	t.Helper()
	if _, err := io.WriteString(to, words); err != nil {
		t.Fatal(err)
	}
	hear(t, from, words)
}

func hear(t *testing.T, from net.Conn, words string) {
	t.Helper()
	got := make([]byte, len(words))
	if n, err := io.ReadFull(from, got); string(got) != words {
		t.Fatalf("got %q, %v; want %q", got[:n], err, words)
	}
}

func (l *Listener) count() (sessions, free int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.sessions), l.free
}

func TestTakenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRoad(t)
		var told []string
		l, near, far := streams(t, r, Config{}, Client{
			Lost: func(patience time.Duration, _ error) { told = append(told, "lost, kept for "+patience.String()) },
			Back: func() { told = append(told, "back") },
		})
		say(t, near, far, "before")
		say(t, far, near, "before")

		r.block()
		for _, c := range []net.Conn{near, far} {
			if _, err := io.WriteString(c, "during "); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(9 * time.Minute)
		if n, _ := l.count(); n != 1 {
			t.Errorf("%d sessions while the client is away", n)
		}
		r.unblock()

		hear(t, far, "during ")
		hear(t, near, "during ")
		if want := []string{"lost, kept for 10m0s", "back"}; len(told) != 2 || told[0] != want[0] || told[1] != want[1] {
			t.Errorf("told %q, want %q", told, want)
		}

		// Half of it ends while there is no connection, and the other goes on.
		r.block()
		near.CloseWrite()
		r.unblock()
		if rest, err := io.ReadAll(far); err != nil || len(rest) > 0 {
			t.Errorf("after the end of one direction: %q, %v", rest, err)
		}
		say(t, far, near, "still here")
		if len(told) != 2 {
			t.Errorf("a break of a moment is told: %q", told)
		}
		io.WriteString(far, "last")
		far.Close()
		if rest, err := io.ReadAll(near); err != nil || string(rest) != "last" {
			t.Errorf("at the end: %q, %v", rest, err)
		}
		near.Close()
		synctest.Wait()
		if n, free := l.count(); n != 0 || free != memory {
			t.Errorf("%d sessions and %d bytes free are left", n, free)
		}
	})
}

func TestForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRoad(t)
		_, near, far := streams(t, r, Config{Patience: time.Minute}, Client{})
		say(t, near, far, "hello")
		start := time.Now()
		r.block()
		if _, err := far.Read(make([]byte, 1)); !errors.Is(err, errForgotten) || time.Since(start) < time.Minute {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		r.unblock()
		if _, err := near.Read(make([]byte, 1)); !errors.Is(err, ErrUnknown) {
			t.Errorf("the client is told %v", err)
		}
		if _, err := near.Write([]byte("x")); !errors.Is(err, ErrUnknown) {
			t.Errorf("writing gives %v", err)
		}
	})
}

func TestAwayForTooLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRoad(t)
		_, near, _ := streams(t, r, Config{Patience: time.Minute}, Client{})
		start := time.Now()
		r.block()
		_, err := near.Read(make([]byte, 1))
		if !errors.Is(err, ErrAway) || !errors.Is(err, errBlocked) {
			t.Errorf("the client is told %v", err)
		}
		if took := time.Since(start); took < time.Minute || took > 2*time.Minute || r.dials > 100 {
			t.Errorf("it tried %d times in %v", r.dials, took)
		}
	})
}

// A client that is asleep neither speaks nor hangs up.
func TestSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := Listen(newRoad(t), Config{Patience: time.Minute})
		t.Cleanup(l.Shutdown)
		r := l.under.(*road)
		conn, err := r.dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.Write(hello{}.append(nil))
		if a, err := readAnswer(conn); err != nil || a.window != maxWindow || a.patience != time.Minute {
			t.Fatalf("%+v, %v", a, err)
		}
		far, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer far.Close()
		start := time.Now()
		go io.Copy(io.Discard, conn)
		if _, err := far.Read(make([]byte, 1)); !errors.Is(err, errForgotten) || time.Since(start) != maxSilence+time.Minute {
			t.Errorf("%v after %v", err, time.Since(start))
		}
	})
}

// A client that says nothing at all, or something else, costs a connection for some seconds.
func TestNoHello(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRoad(t)
		l := Listen(r, Config{})
		t.Cleanup(l.Shutdown)
		for _, words := range []string{"", "SSH-2.0-OpenSSH_9.9\r\n and more than a hello has"} {
			conn, err := r.dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			go io.WriteString(conn, words)
			start := time.Now()
			if got, err := io.ReadAll(conn); err != nil || len(got) > 0 || time.Since(start) > handshakeTimeout {
				t.Errorf("%q: %q, %v after %v", words, got, err, time.Since(start))
			}
			conn.Close()
		}
	})
}

func TestProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRoad(t)
		answered := make(chan bool, 1)
		first := true
		_, near, far := streams(t, r, Config{}, Client{Probe: func(ctx context.Context, heard *atomic.Bool, ask func()) {
			if !first {
				<-ctx.Done()
				return
			}
			first = false
			time.Sleep(time.Second)
			heard.Store(false)
			ask()
			synctest.Wait()
			answered <- heard.Load()
		}})
		if !<-answered {
			t.Error("a question is not answered")
		}
		say(t, near, far, "on another connection")
		if r.dials != 2 {
			t.Errorf("%d connections were made; the probe gave up the first", r.dials)
		}
	})
}

func TestBackPressure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRoad(t)
		_, near, far := streams(t, r, Config{}, Client{})
		var written atomic.Int64
		done := make(chan error, 1)
		data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
		go func() {
			for range 16 {
				n, err := near.Write(data)
				written.Add(int64(n))
				if err != nil {
					done <- err
					return
				}
			}
			done <- near.CloseWrite()
		}()
		for _, away := range []bool{false, true} {
			if away {
				r.block()
			}
			time.Sleep(time.Minute)
			if n := written.Load(); n > maxWindow {
				t.Errorf("%d bytes are taken while nobody reads, away %v", n, away)
			}
		}
		near.SetWriteDeadline(time.Now().Add(time.Second))
		if err := <-done; !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a write that has a deadline gives %v", err)
		}
		near.SetWriteDeadline(time.Time{})
		far.SetReadDeadline(time.Now().Add(-time.Second))
		if _, err := far.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a read that has a deadline gives %v", err)
		}
		far.SetReadDeadline(time.Time{})
		r.unblock()
		near.CloseWrite()
		n, err := io.Copy(io.Discard, far)
		if err != nil || n != int64(near.out.end) || n < written.Load() {
			t.Errorf("%d bytes arrived of %d: %v", n, near.out.end, err)
		}
	})
}

// Who is not who made a session cannot take it up, even with its id.
func TestOtherPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRoad(t)
		var peer atomic.Value
		peer.Store("one")
		_, near, far := streams(t, r, Config{Peer: func(net.Addr) string { return peer.Load().(string) }}, Client{})
		for _, other := range []string{"two", ""} {
			peer.Store(other)
			conn, err := r.dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			conn.Write(hello{session: near.session}.append(nil))
			if a, err := readAnswer(conn); err != nil || a.verdict != unknownSession {
				t.Errorf("%q is told %v, %v", other, a, err)
			}
			conn.Close()
		}
		if _, err := (Client{Dial: r.dial}).Open(t.Context()); !errors.Is(err, ErrNotServed) {
			t.Errorf("nobody is told %v", err)
		}
		peer.Store("one")
		say(t, near, far, "undisturbed")
	})
}

func TestCrowded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRoad(t)
		l, first, firstFar := streams(t, r, Config{}, Client{})
		r.block()
		synctest.Wait()
		r.unblock()
		first.fail(errors.New("asleep"))
		reserved := 0
		for range maxSessions {
			c, err := Client{Dial: r.dial}.Open(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			far, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer far.Close()
			reserved += 2 * c.window
		}
		if _, err := firstFar.Read(make([]byte, 1)); !errors.Is(err, errCrowded) {
			t.Errorf("the first, which is away, is told %v", err)
		}
		if _, err := (Client{Dial: r.dial}).Open(t.Context()); !errors.Is(err, ErrNotServed) {
			t.Errorf("one more is told %v", err)
		}
		if most := memory + 2*minWindow*maxSessions; reserved > most {
			t.Errorf("all windows add up to %d bytes, more than %d", reserved, most)
		}
	})
}

func TestNotServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, other := range []func(net.Conn){
			func(c net.Conn) { c.Close() },
			func(c net.Conn) {
				io.WriteString(c, "SSH-2.0-OpenSSH_9.9\r\nand some more than an answer has")
				c.Close()
			},
			func(c net.Conn) { io.Copy(io.Discard, c); c.Close() }, // it waits for something else
		} {
			_, err := Client{Dial: func(context.Context) (net.Conn, error) {
				near, far := net.Pipe()
				go func() { io.CopyN(io.Discard, far, int64(helloSize)); other(far) }()
				return near, nil
			}}.Open(t.Context())
			if !errors.Is(err, ErrNotServed) {
				t.Errorf("it is told %v", err)
			}
		}
		if _, err := (Client{Dial: func(context.Context) (net.Conn, error) { return nil, errBlocked }}).Open(t.Context()); !errors.Is(err, errBlocked) || errors.Is(err, ErrNotServed) {
			t.Errorf("a road that is blocked gives %v", err)
		}
	})
}

// Shutdown delivers the last bytes of what was closed, cuts the rest off, and leaves nothing behind.
// TestClosedTwice: whoever closes a stream that is being closed may leave the network after that, too.
func TestClosedTwice(t *testing.T) {
	r := newRoad(t)
	_, near, _ := streams(t, r, Config{}, Client{})
	first := make(chan struct{})
	go func() {
		defer close(first)
		near.Close()
	}()
	for { // until it is being closed
		if _, err := near.Write([]byte("x")); errors.Is(err, net.ErrClosed) {
			break
		}
	}
	if err := near.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed again: %v", err)
	}
	if !near.isOver() {
		t.Error("the second Close has not waited for the goodbye")
	}
	<-first
}

func TestShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRoad(t)
		l, near, far := streams(t, r, Config{}, Client{})
		io.WriteString(far, "goodbye")
		far.Close()
		other, err := Client{Dial: r.dial}.Open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		otherFar, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		go near.CloseWrite()
		l.Shutdown()
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("accepting gives %v", err)
		}
		if got, err := io.ReadAll(near); err != nil || string(got) != "goodbye" {
			t.Errorf("%q, %v", got, err)
		}
		if _, err := otherFar.Read(make([]byte, 1)); !errors.Is(err, errStopped) {
			t.Errorf("the one that was open is told %v", err)
		}
		r.block()
	})
}

// TestBulk moves bytes both ways over TCP while connections break at any point.
func TestBulk(t *testing.T) {
	under, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := Listen(under, Config{})
	defer l.Shutdown()
	const size = 16 << 20
	var dials atomic.Int32
	random := rand.New(rand.NewPCG(1, 2))
	near, err := Client{Dial: func(ctx context.Context) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", under.Addr().String())
		if err != nil {
			return nil, err
		}
		if n := dials.Add(1); n > 20 {
			return conn, nil
		}
		return &fragile{Conn: conn, left: 1 + random.Int64N(size/4)}, nil
	}}.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	for i, ends := range [][2]net.Conn{{near, far}, {far, near}} {
		var sent [32]byte
		written := make(chan struct{})
		work.Go(func() {
			defer close(written)
			data := make([]byte, size)
			source := rand.NewChaCha8([32]byte{byte(i)})
			source.Read(data)
			sent = sha256.Sum256(data)
			for len(data) > 0 {
				n := min(len(data), 1+random32(source)%100_000)
				if _, err := ends[0].Write(data[:n]); err != nil {
					t.Error(err)
					return
				}
				data = data[n:]
			}
			ends[0].(*Conn).CloseWrite()
		})
		work.Go(func() {
			sum := sha256.New()
			n, err := io.Copy(sum, ends[1])
			<-written
			if err != nil || n != size || !bytes.Equal(sum.Sum(nil), sent[:]) {
				t.Errorf("direction %d: %d bytes, %v", i, n, err)
			}
		})
	}
	work.Wait()
	near.Close()
	far.Close()
	if n := dials.Load(); n < 5 {
		t.Errorf("only %d connections were needed", n)
	}
	l.Shutdown()
	if n, free := l.count(); n != 0 || free != memory {
		t.Errorf("%d sessions and %d bytes free are left", n, free)
	}
}

func random32(s *rand.ChaCha8) int { return int(s.Uint64() >> 33) }

// fragile is a connection that breaks after some bytes.
type fragile struct {
	net.Conn
	left int64
	mu   sync.Mutex
}

func (f *fragile) spend(n int) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.left -= int64(n)
	return f.left > 0
}

func (f *fragile) Read(p []byte) (int, error) {
	n, err := f.Conn.Read(p)
	if !f.spend(n) {
		f.Close()
	}
	return n, err
}

func (f *fragile) Write(p []byte) (int, error) {
	if !f.spend(len(p)) {
		f.Conn.Write(p[:len(p)/2])
		f.Close()
		return len(p) / 2, net.ErrClosed
	}
	return f.Conn.Write(p)
}
