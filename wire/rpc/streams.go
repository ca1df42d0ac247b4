package rpc

import (
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/yamux"
)

// streams are the open streams of a session, which end at once when it does. By itself yamux ends them
// only when the connection is closed, and has each Read and Write that waits turn in a loop until then:
// for seconds, where a WebSocket says goodbye to a peer that is gone.
type streams struct {
	mu   sync.Mutex // protects the following
	open map[*stream]struct{}
	over bool
}

// past is a deadline that is over.
var past = time.Unix(1, 0)

func (s *streams) add(y *yamux.Stream) *stream {
	one := &stream{y, s}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over {
		y.SetDeadline(past)
		return one
	}
	if s.open == nil {
		s.open = make(map[*stream]struct{})
	}
	s.open[one] = struct{}{}
	return one
}

// end wakes whoever waits for a stream.
func (s *streams) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over = true
	for one := range s.open {
		one.Stream.SetDeadline(past)
	}
	s.open = nil
}

func (s *streams) ended() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.over
}

// stream is one of them.
type stream struct {
	*yamux.Stream
	all *streams
}

// Read implements [io.Reader].
func (s *stream) Read(p []byte) (int, error) {
	n, err := s.Stream.Read(p)
	if errors.Is(err, yamux.ErrTimeout) && s.all.ended() {
		err = io.EOF
	}
	return n, err
}

// Write implements [io.Writer].
func (s *stream) Write(p []byte) (int, error) {
	n, err := s.Stream.Write(p)
	if errors.Is(err, yamux.ErrTimeout) && s.all.ended() {
		err = yamux.ErrSessionShutdown
	}
	return n, err
}

// SetWriteDeadline shadows the stream's, so that none takes the place of the end.
func (s *stream) SetWriteDeadline(t time.Time) error {
	s.all.mu.Lock()
	defer s.all.mu.Unlock()
	if s.all.over {
		return yamux.ErrSessionShutdown
	}
	return s.Stream.SetWriteDeadline(t)
}

// Close implements [io.Closer].
func (s *stream) Close() error {
	s.all.mu.Lock()
	delete(s.all.open, s)
	s.all.mu.Unlock()
	return s.Stream.Close()
}

// endingConn is the connection of a session. Closing it is the first thing that yamux does at the end.
type endingConn struct {
	net.Conn
	streams *streams
}

// Close implements [io.Closer].
func (c endingConn) Close() error {
	c.streams.end()
	return c.Conn.Close()
}
