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
// here, and on a tailnet connection each costs a timer. It notes when the client was heard, and how the connection ended.
type transport struct {
	net.Conn
	heard atomic.Int64 // nanoseconds since 1970

	mu                sync.Mutex
	readErr, writeErr error // the first of each
}

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

func (t *transport) Write(p []byte) (int, error) {
	n, err := t.Conn.Write(p)
	if err != nil {
		t.note(&t.writeErr, err)
	}
	return n, err
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
