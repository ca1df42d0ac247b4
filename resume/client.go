package resume

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"time"
)

const (
	// dialTimeout is how long one attempt to take a stream up may take: a few round trips over a slow relay.
	dialTimeout = 10 * time.Second
	// Attempts follow each other at this pace. The other side may be back at any time, and an attempt is a packet or two.
	minPause, maxPause = 50 * time.Millisecond, 2 * time.Second
	// noticeAfter is how long a stream may be without a connection before anybody is told.
	noticeAfter = 3 * time.Second
)

var (
	// ErrNotServed says that the other side does not resume streams, or has no room for one more now.
	ErrNotServed = errors.New("the other side does not resume streams")
	// ErrUnknown says that the other side knows the stream no longer.
	ErrUnknown = errors.New("the other side does not know of it any more")
	// ErrAway says that the other side could not be reached for longer than it keeps a stream.
	ErrAway = errors.New("the other side could not be reached in time")
)

// Client opens streams that are taken up again by themselves. Dial is required.
type Client struct {
	// Dial makes a connection to the listener, at first and whenever one broke.
	Dial func(context.Context) (net.Conn, error)
	// Probe, if set, watches a connection and returns when it is dead or ctx is done. heard becomes true whenever something
	// came; ask makes the other side say something. Without it only what the connection says counts.
	Probe func(ctx context.Context, heard *atomic.Bool, ask func())
	// Lost, if set, is told when the stream has been without a connection for some seconds, and why; Back when it goes on.
	Lost func(patience time.Duration, why error)
	Back func()
}

// Open opens a stream. It lives until it is closed, whatever becomes of ctx.
// The error is ErrNotServed (wrapped) if there is no other way than a connection that breaks.
func (cl Client) Open(ctx context.Context) (*Conn, error) {
	conn, err := cl.Dial(ctx)
	if err != nil {
		return nil, err
	}
	k := &carrier{Conn: conn, r: bufio.NewReaderSize(conn, connBuffer)}
	a, err := greet(ctx, k, hello{})
	switch {
	case err != nil:
		conn.Close()
		if ctx.Err() != nil {
			return nil, fmt.Errorf("cannot open a stream: %w", err)
		}
		return nil, fmt.Errorf("%w: %w", ErrNotServed, err)
	case a.verdict != goOn:
		conn.Close()
		return nil, fmt.Errorf("%w: it has too many", ErrNotServed)
	}
	c := newConn(conn, a.session, a.window)
	c.adopt(k)
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan struct{})
	c.finish = func() {
		late := time.AfterFunc(goodbyeTimeout, func() { c.fail(net.ErrClosed); end() })
		<-done
		late.Stop()
		end()
	}
	go func() {
		defer close(done)
		cl.keep(life, c, k, a)
	}()
	return c, nil
}

// greet says hello, and returns the answer.
func greet(ctx context.Context, k *carrier, h hello) (answer, error) {
	if err := k.SetDeadline(time.Now().Add(handshakeTimeout)); err != nil {
		return answer{}, err
	}
	stop := context.AfterFunc(ctx, func() { k.Close() })
	defer stop()
	if _, err := k.Write(h.append(nil)); err != nil {
		return answer{}, err
	}
	a, err := readAnswer(k.r)
	if err != nil {
		return answer{}, err
	}
	return a, k.SetDeadline(time.Time{})
}

// keep carries the stream over one connection after the other until it is over.
func (cl Client) keep(ctx context.Context, c *Conn, k *carrier, a answer) {
	for {
		err := cl.carry(ctx, c, k, a.received)
		c.drop()
		if ctx.Err() != nil || c.isOver() {
			return
		}
		if k, a, err = cl.again(ctx, c, a.patience, err); err != nil {
			c.fail(err)
			return
		}
	}
}

// carry carries the stream over one connection, and watches that.
func (cl Client) carry(ctx context.Context, c *Conn, k *carrier, received uint64) error {
	if cl.Probe == nil {
		return c.carry(k, received)
	}
	ctx, cancel := context.WithCancel(ctx)
	probed := make(chan struct{})
	go func() {
		defer close(probed)
		cl.Probe(ctx, &k.heard, c.ask)
		if ctx.Err() == nil {
			k.Close()
		}
	}()
	err := c.carry(k, received)
	cancel()
	<-probed
	return err
}

// again takes the stream up on another connection, which is then adopted.
func (cl Client) again(ctx context.Context, c *Conn, patience time.Duration, why error) (*carrier, answer, error) {
	lost := time.Now()
	told := make(chan struct{})
	notice := time.AfterFunc(noticeAfter, func() {
		defer close(told)
		if cl.Lost != nil {
			cl.Lost(patience, why)
		}
	})
	quiet := func() bool { // reports whether nobody was told
		if notice.Stop() {
			return true
		}
		<-told
		return false
	}
	for pause := minPause; ; pause = min(2*pause, maxPause) {
		k, a, err := cl.takeUp(ctx, c)
		switch {
		case err == nil:
			if !quiet() && cl.Back != nil {
				cl.Back()
			}
			return k, a, nil
		case ctx.Err() != nil, errors.Is(err, ErrUnknown), c.isOver():
			quiet()
			return nil, answer{}, err
		case time.Since(lost) > patience+maxSilence: // the other side may have noticed as much later
			quiet()
			return nil, answer{}, fmt.Errorf("%w: %w", ErrAway, err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause + rand.N(pause/2)): // so that many streams of one machine do not come back in step
		}
	}
}

// takeUp is one attempt of again.
func (cl Client) takeUp(ctx context.Context, c *Conn) (*carrier, answer, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	conn, err := cl.Dial(ctx)
	if err != nil {
		return nil, answer{}, err
	}
	k := &carrier{Conn: conn, r: bufio.NewReaderSize(conn, connBuffer)}
	a, err := greet(ctx, k, hello{c.session, c.adopt(k)})
	if err == nil && a.verdict != goOn {
		err = ErrUnknown
	}
	if err != nil {
		c.drop()
		return nil, answer{}, err
	}
	return k, a, nil
}
