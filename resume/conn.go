package resume

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// maxSilence is how long the other side of a connection may say nothing to the listening side: clients ask
	// every few seconds, so after this the connection is dead, the client asleep or its network another.
	maxSilence = 30 * time.Second
	// goodbyeTimeout bounds waiting for the other side to take the last bytes, and to hang up.
	goodbyeTimeout = time.Second
)

// Conn is one end of a stream. It implements [net.Conn], has CloseWrite, and its methods may be called concurrently.
type Conn struct {
	session       id
	window        int
	local, remote net.Addr
	finish        func() // waits, after Close, until the last bytes are taken; nil on the listening side

	mu      sync.Mutex
	changed sync.Cond // signals every change of what follows

	out      queue  // from what the other side has taken to what was written last
	outEnded bool   // nothing more is written
	next     uint64 // the number of the byte that is sent next
	acked    uint64 // how much the other side has taken; one more than out.end with the end

	in      queue // what arrived and was not read
	inEnded bool  // nothing more comes
	told    uint64

	asks    bool // an ask is to be sent
	answers bool // an ack is to be sent, news or not
	closed  bool // by whom the stream is for
	err     error
	carrier *carrier

	readBy, writeBy deadline
}

// carrier is a connection that carries a stream for a while.
type carrier struct {
	net.Conn
	r       *bufio.Reader
	silence time.Duration // how long the other side may say nothing; 0 for ever
	heard   atomic.Bool   // anything came
	err     error         // why it is over; guarded by the Conn's mutex
}

func newConn(conn net.Conn, session id, window int) *Conn {
	c := &Conn{session: session, window: window, local: conn.LocalAddr(), remote: conn.RemoteAddr()}
	c.changed.L = &c.mu
	return c
}

// LocalAddr and RemoteAddr are those of the first connection.
func (c *Conn) LocalAddr() net.Addr  { return c.local }
func (c *Conn) RemoteAddr() net.Addr { return c.remote }

// Read reads from the stream. It waits while there is no connection.
func (c *Conn) Read(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		switch {
		case c.closed:
			return 0, net.ErrClosed
		case c.readBy.passed():
			return 0, os.ErrDeadlineExceeded
		case len(p) == 0:
			return 0, nil
		case c.in.len() > 0:
			n := c.in.copy(p, c.in.start)
			c.in.discard(c.in.start + uint64(n))
			c.changed.Broadcast()
			return n, nil
		case c.inEnded:
			return 0, io.EOF
		case c.err != nil:
			return 0, c.err
		}
		c.changed.Wait()
	}
}

// Write writes to the stream. It waits while the other side has not taken what came before, beyond the window.
func (c *Conn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	written := 0
	for {
		switch {
		case c.closed || c.outEnded:
			return written, net.ErrClosed
		case c.err != nil:
			return written, c.err
		case c.writeBy.passed():
			return written, os.ErrDeadlineExceeded
		case len(p) == 0:
			return written, nil
		case c.out.len() < c.window:
			n := min(len(p), c.window-c.out.len())
			c.out.append(p[:n])
			written += n
			p = p[n:]
			c.changed.Broadcast()
			continue
		}
		c.changed.Wait()
	}
}

// CloseWrite ends one direction: the other side reads to the end of what was written.
func (c *Conn) CloseWrite() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.outEnded || c.closed {
		return net.ErrClosed
	}
	c.outEnded = true
	c.changed.Broadcast()
	return nil
}

// Close ends both directions. What was written before is still delivered if the other side can be reached in time: on
// the listening side as long as the session is kept, on the client's within a moment, which Close waits for, also
// when it is called again.
func (c *Conn) Close() error {
	if c.finish != nil {
		defer c.finish()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	c.closed, c.outEnded = true, true
	c.in.discard(c.in.end)
	c.readBy.clear()
	c.writeBy.clear()
	c.changed.Broadcast()
	return nil
}

// SetDeadline implements [net.Conn], as SetReadDeadline and SetWriteDeadline do.
func (c *Conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

func (c *Conn) SetReadDeadline(t time.Time) error  { return c.setDeadline(&c.readBy, t) }
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.setDeadline(&c.writeBy, t) }

func (c *Conn) setDeadline(d *deadline, t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	d.clear()
	if d.at = t; !t.IsZero() {
		d.timer = time.AfterFunc(time.Until(t), func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.changed.Broadcast()
		})
	}
	c.changed.Broadcast()
	return nil
}

// deadline is when something is waited for no longer; the zero value is never.
type deadline struct {
	at    time.Time
	timer *time.Timer
}

func (d *deadline) passed() bool { return !d.at.IsZero() && !time.Now().Before(d.at) }

func (d *deadline) clear() {
	if d.timer != nil {
		d.timer.Stop()
	}
	*d = deadline{}
}

// fail ends the stream at this end. Only the first reason counts.
func (c *Conn) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
	}
	c.out.discard(c.out.end)
	if c.carrier != nil {
		c.carrier.Close()
	}
	c.changed.Broadcast()
}

// taken is how much of the other side's stream has been taken here.
func (c *Conn) taken() uint64 {
	if c.inEnded && c.in.len() == 0 {
		return c.in.end + 1
	}
	return c.in.start
}

// received is how much of it has arrived.
func (c *Conn) received() uint64 {
	if c.inEnded {
		return c.in.end + 1
	}
	return c.in.end
}

// sendable is the number behind the last that can be sent.
func (c *Conn) sendable() uint64 {
	if c.outEnded {
		return c.out.end + 1
	}
	return c.out.end
}

// over reports whether nothing is left to do, for this side or because it failed.
func (c *Conn) over() bool {
	done := c.outEnded && c.acked == c.sendable() && c.inEnded && c.in.len() == 0 && c.told == c.taken()
	return done || c.err != nil
}

// isOver is over for those who do not hold the mutex.
func (c *Conn) isOver() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.over()
}

// adopt makes k the carrier, once the one before has gone, and returns how much has arrived until then. It is called
// before the other side is told that number.
func (c *Conn) adopt(k *carrier) (received uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.carrier != nil {
		c.carrier.Close()
		c.changed.Wait()
	}
	c.carrier = k
	return c.received()
}

// drop undoes adopt.
func (c *Conn) drop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.carrier.Close()
	c.carrier = nil
	c.changed.Broadcast()
}

// carry moves the stream over the carrier, which was adopted, until it breaks or the stream is over. received is what the
// other side says of what it has.
func (c *Conn) carry(k *carrier, received uint64) error {
	c.mu.Lock()
	if received < c.acked || received > c.sendable() {
		err := fmt.Errorf("%w: it claims to have %d bytes of %d to %d", errViolation, received, c.acked, c.sendable())
		c.mu.Unlock()
		c.fail(err)
		return err
	}
	c.next = received
	c.answers = true // what it was told on the connection before may be lost
	c.mu.Unlock()

	reading := make(chan struct{})
	go func() {
		defer close(reading)
		err := c.receive(k)
		if errors.Is(err, errViolation) {
			c.fail(err)
		}
		k.Close() // which ends a write that waits
		c.mu.Lock()
		defer c.mu.Unlock()
		k.err = err
		c.changed.Broadcast()
	}()
	err := c.send(k)
	if err == nil {
		// The stream is over: the other side may still have to learn that, and hangs up then.
		if half, ok := k.Conn.(interface{ CloseWrite() error }); ok {
			err = half.CloseWrite()
		}
		hangUp := time.AfterFunc(goodbyeTimeout, func() { k.Close() })
		<-reading
		hangUp.Stop()
	}
	k.Close()
	<-reading
	return err
}

// receive takes frames until the carrier breaks.
func (c *Conn) receive(k *carrier) error {
	buf := (*[chunkSize]byte)(nil)
	free := func() {
		if buf != nil {
			chunks.Put(buf)
			buf = nil
		}
	}
	defer free()
	room := func() []byte {
		buf = chunks.Get().(*[chunkSize]byte)
		return buf[:maxData]
	}
	for {
		if k.silence > 0 {
			if err := k.SetReadDeadline(time.Now().Add(k.silence)); err != nil {
				return err
			}
		}
		f, err := readFrame(k.r, room)
		if err != nil {
			return err
		}
		k.heard.Store(true)
		if err := c.take(f); err != nil {
			return err
		}
		free() // an idle connection holds no memory
	}
}

// take does what a frame says.
func (c *Conn) take(f frame) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch f.kind {
	case frameData, frameEnd:
		switch {
		case c.inEnded:
			return fmt.Errorf("%w: it sends something behind its end", errViolation)
		case c.in.len()+len(f.data) > c.window:
			return fmt.Errorf("%w: it sends more than the %d bytes that may be on the way", errViolation, c.window)
		}
		c.in.append(f.data)
		c.inEnded = f.kind == frameEnd
		if c.closed {
			c.in.discard(c.in.end)
		}
	case frameAck, frameAsk:
		if f.taken > c.next {
			return fmt.Errorf("%w: it claims to have taken %d bytes of %d", errViolation, f.taken, c.next)
		}
		if f.taken > c.acked {
			c.acked = f.taken
			c.out.discard(max(c.out.start, min(f.taken, c.out.end)))
		}
		c.answers = c.answers || f.kind == frameAsk
	}
	c.changed.Broadcast()
	return nil
}

// send sends what there is to send until the carrier breaks, which is an error, or the stream is over.
func (c *Conn) send(k *carrier) error {
	for {
		c.mu.Lock()
		for k.err == nil && !c.over() && !c.due() {
			c.changed.Wait()
		}
		if err := errors.Join(c.err, k.err); err != nil || c.over() {
			c.mu.Unlock()
			return err
		}
		buf := batches.Get().(*[batchSize]byte)
		b := buf[:0]
		for c.due() && len(b)+chunkSize <= batchSize {
			b = c.nextFrame(b)
		}
		c.mu.Unlock()
		_, err := k.Write(b)
		batches.Put(buf)
		if err != nil {
			return err
		}
	}
}

// due reports whether there is a frame to send.
func (c *Conn) due() bool {
	// An ack frees memory at the other side and lets it send on. A quarter of the window is early enough for that, and late
	// enough to cost nothing; the rest is told when somebody asks.
	news := c.taken()-c.told >= uint64(c.window/4) || c.taken() > c.told && c.inEnded
	return c.asks || c.answers || news || c.next < c.sendable()
}

// nextFrame appends the next frame to b, which has room for the largest, and notes that it is sent. Acks come first: they are small and others wait for them.
func (c *Conn) nextFrame(b []byte) []byte {
	switch {
	case c.asks || c.answers || c.next == c.sendable() || c.taken()-c.told >= uint64(c.window/4):
		kind := byte(frameAck)
		if c.asks {
			kind = frameAsk
		}
		c.asks, c.answers, c.told = false, false, c.taken()
		return appendTaken(b, kind, c.told)
	case c.next == c.out.end:
		c.next++
		return append(b, frameEnd)
	}
	at := len(b) + dataHeader
	n := c.out.copy(b[at:at+maxData], c.next)
	b = binary.BigEndian.AppendUint32(append(b, frameData), uint32(n))
	c.next += uint64(n)
	return b[:at+n]
}

// ask wants a sign of life from the other side.
func (c *Conn) ask() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asks = true
	c.changed.Broadcast()
}
