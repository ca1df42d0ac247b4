package sshd

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// transport is a client's connection as the SSH library has it. It takes no deadlines: gliderlabs sets one before each read and write, always none
// here, and on a tailnet connection each costs a timer. It sends a packet in one piece, notes when the client was heard, and how the connection ended.
type transport struct {
	net.Conn
	heard atomic.Int64 // nanoseconds since 1970

	writing sync.Mutex
	held    []byte // of flowBuffers; nil for nothing
	late    *time.Timer

	mu                sync.Mutex
	readErr, writeErr error // the first of each
}

const (
	// libraryBuffer is the size of the buffer that the SSH library writes through: a packet that is longer comes in several writes.
	libraryBuffer = 4096
	// heldFor is far longer than the library takes from one of these to the next, and too short to be felt.
	heldFor = time.Millisecond
)

func newTransport(conn net.Conn) *transport {
	t := &transport{Conn: conn}
	t.heard.Store(time.Now().UnixNano())
	return t
}

func (*transport) SetDeadline(time.Time) error { return nil }

func (t *transport) Read(p []byte) (int, error) {
	n, err := t.Conn.Read(p)
	if n > 0 {
		t.heard.Store(time.Now().UnixNano())
	}
	if err != nil {
		t.note(&t.readErr, err)
	}
	return n, err
}

// Write sends p, behind what is held. A write that fills the library's buffer is the beginning of a packet, with all but few ciphers: it is
// held for the rest to come, for on the mesh it would cost as much alone as with that.
func (t *transport) Write(p []byte) (int, error) {
	t.writing.Lock()
	defer t.writing.Unlock()
	if len(p) == libraryBuffer && t.held == nil {
		t.held = append(flowBuffers.Get().(*[flowSize]byte)[:0], p...)
		if t.late == nil {
			t.late = time.AfterFunc(heldFor, t.sendLate)
		} else {
			t.late.Reset(heldFor)
		}
		return len(p), nil
	}
	var err error
	if len(t.held)+len(p) <= flowSize && t.held != nil {
		t.held = append(t.held, p...)
		err = t.sendHeld()
	} else if err = t.sendHeld(); err == nil {
		err = t.send(p)
	}
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// sendLate sends the beginning of a packet that was a whole one.
func (t *transport) sendLate() {
	t.writing.Lock()
	defer t.writing.Unlock()
	t.sendHeld() // an error comes again with the next write
}

func (t *transport) sendHeld() error {
	if t.held == nil {
		return nil
	}
	t.late.Stop()
	err := t.send(t.held)
	flowBuffers.Put((*[flowSize]byte)(t.held[:flowSize]))
	t.held = nil
	return err
}

func (t *transport) send(p []byte) error {
	_, err := t.Conn.Write(p)
	if err != nil {
		t.note(&t.writeErr, err)
	}
	return err
}

func (t *transport) note(first *error, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if *first == nil {
		*first = err
	}
}

// heardAt is when bytes came last.
func (t *transport) heardAt() time.Time { return time.Unix(0, t.heard.Load()) }

// cut reports whether the connection broke. It did not if its end came as one should: with SSH's own goodbye, after which nothing is read, or at
// least with the end of the stream. Linux tells of a reset once, and that may be a write; a read then finds the end of the stream.
func (t *transport) cut() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.readErr == nil:
		return false
	case errors.Is(t.readErr, io.EOF):
		return errors.Is(t.writeErr, syscall.ECONNRESET) || errors.Is(t.writeErr, syscall.ETIMEDOUT)
	}
	return true
}
