package ptyhost

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/berthd/berth/account"
)

// ensureTimeout is how long a host that was just started may take to answer, when the caller's context sets no earlier end.
const ensureTimeout = 10 * time.Second

// Client reaches the host behind one socket. It holds no connection: every attachment and call dials its own, so it is safe for concurrent use
// and survives the host being replaced.
type Client struct {
	socket string
	user   *account.User
}

// Dial returns a client of the host that listens on socket. It does not connect yet.
func Dial(socket string) *Client { return DialAs(nil, socket) }

// DialAs is [Dial] for the terminals of another user. The socket may lie where they can replace it, so a host that does not run as them is refused:
// its programs would not either.
func DialAs(user *account.User, socket string) *Client { return &Client{socket, user} }

// link is a connection to the host after the handshake.
type link struct {
	conn    net.Conn
	r       *bufio.Reader
	stop    func() bool // ends ctx's power over the connection
	version int         // the host's
}

// open connects and sends hello and one request. A request of no bytes only says hello. A host that dies meanwhile resets the connection; dialling
// again then tells that nobody is there, which callers know how to mend.
func (c *Client) open(ctx context.Context, request []byte) (*link, error) {
	l, err := c.try(ctx, request)
	if err != nil && gone(err) {
		return c.try(ctx, request)
	}
	return l, err
}

func (c *Client) try(ctx context.Context, request []byte) (*link, error) {
	conn, err := c.user.DialUnix(ctx, c.socket)
	if err != nil {
		return nil, fmt.Errorf("cannot reach the terminal host: %w", err)
	}
	if err := c.checkHost(conn); err != nil {
		conn.Close()
		return nil, err
	}
	l := &link{conn: conn, r: bufio.NewReaderSize(conn, maxOutput)}
	conn.SetDeadline(time.Now().Add(handshakeTimeout))
	l.stop = context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	if err := l.hello(request); err != nil {
		conn.Close()
		l.stop()
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, fmt.Errorf("cannot talk to the terminal host: %w", err)
	}
	return l, nil
}

// checkHost refuses a host of another user than the one whose terminals are wanted, whatever it would say of itself.
func (c *Client) checkHost(conn net.Conn) error {
	if c.user == nil {
		return nil
	}
	host, err := peer(conn)
	if err == nil && host.Uid != c.user.UID {
		err = fmt.Errorf("refused the terminals at %s: they belong to user %d, not to %s", c.socket, host.Uid, c.user)
	}
	return err
}

func (l *link) hello(request []byte) error {
	if _, err := l.conn.Write(append(appendJSON(nil, frameHello, helloMessage{Version: protocolVersion}), request...)); err != nil {
		return err
	}
	if len(request) == 0 {
		if err := l.conn.(*net.UnixConn).CloseWrite(); err != nil {
			return err
		}
	}
	t, payload, err := readFrame(l.r, nil)
	if err != nil {
		return err
	}
	var hello helloMessage
	if err := json.Unmarshal(payload, &hello); t != frameHello || err != nil || hello.Version < 1 {
		return fmt.Errorf("%w: it did not say hello", errFrame)
	}
	l.version = hello.Version
	return nil
}

// reply waits for a frame of type want and decodes it into v, which may be nil.
func (l *link) reply(want frameType, v any) error {
	for {
		t, payload, err := readFrame(l.r, nil)
		switch {
		case err != nil:
			return err
		case t == frameError:
			return parseError(payload)
		case t != want:
			continue
		case v == nil:
			return nil
		}
		if err := json.Unmarshal(payload, v); err != nil {
			return fmt.Errorf("%w: %v", errFrame, err)
		}
		return nil
	}
}

// call does one request with one reply.
func (c *Client) call(ctx context.Context, request []byte, want frameType, v any) error {
	l, err := c.open(ctx, request)
	if err != nil {
		return err
	}
	defer l.conn.Close()
	defer l.stop()
	return l.reply(want, v)
}

// Attach attaches to a session, creating it first if asked to. ctx covers the handshake only. Besides [ErrNoSession] and [ErrStart] it returns
// the error of dialling the socket, a *net.OpError, if no host is there.
func (c *Client) Attach(ctx context.Context, req AttachRequest) (*Attachment, error) {
	l, err := c.open(ctx, appendJSON(nil, frameAttach, req))
	if err != nil {
		return nil, err
	}
	var reply attachedMessage
	err = l.reply(frameAttached, &reply)
	if !l.stop() {
		err = ctx.Err()
	}
	if err == nil {
		err = l.conn.SetDeadline(time.Time{})
	}
	if err != nil {
		l.conn.Close()
		return nil, err
	}
	return &Attachment{conn: l.conn, r: l.r, reply: reply, ended: make(chan struct{}), room: inputWindow, credit: make(chan struct{}, 1)}, nil
}

// List returns the host's sessions, oldest first.
func (c *Client) List(ctx context.Context) ([]SessionInfo, error) {
	var infos []SessionInfo
	if err := c.call(ctx, appendFrame(nil, frameList, nil), frameSessions, &infos); err != nil {
		return nil, err
	}
	return infos, nil
}

// Kill sends a signal ("TERM", "KILL", "HUP"...) to the foreground program of a session; "" hangs the session up and ends it.
func (c *Client) Kill(ctx context.Context, id, signal string) error {
	return c.call(ctx, appendJSON(nil, frameKill, killMessage{ID: id, Signal: signal}), frameDone, nil)
}

// Rename gives a session another name and the idle timeout of a session so named; see [CreateRequest].
func (c *Client) Rename(ctx context.Context, id, name string, idleTimeout time.Duration) error {
	if err := c.atLeast(ctx, versionRename); err != nil {
		return err
	}
	return c.call(ctx, appendJSON(nil, frameRename, renameMessage{ID: id, Name: name, IdleTimeout: idleTimeout}), frameDone, nil)
}

// Watch returns when the host has ended, however it did, or ctx is done. Of a host too old to be watched it returns [ErrHostOld].
func (c *Client) Watch(ctx context.Context) error {
	if err := c.atLeast(ctx, versionRename); err != nil {
		return err
	}
	return c.untilEnd(ctx, frameWatch)
}

// untilEnd asks for something and waits until the host lets go of the connection.
func (c *Client) untilEnd(ctx context.Context, f frameType) error {
	l, err := c.open(ctx, appendFrame(nil, f, nil))
	if err != nil {
		return err
	}
	defer l.conn.Close()
	defer l.stop()
	if err := l.reply(frameDone, nil); err != nil {
		return err
	}
	if err := l.conn.SetDeadline(time.Time{}); err != nil {
		return err
	}
	if ctx.Err() != nil { // its deadline was just wiped
		return ctx.Err()
	}
	_, err = l.r.ReadByte()
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err == nil || gone(err):
		return nil
	}
	return err
}

// Shutdown ends every session and then the host. It returns when the host has let go of its socket.
func (c *Client) Shutdown(ctx context.Context) error {
	if err := c.untilEnd(ctx, frameShutdown); err != nil {
		return fmt.Errorf("cannot end the terminal host: %w", err)
	}
	return nil
}

// ping reports whether a host answers.
func (c *Client) ping(ctx context.Context) error { return c.atLeast(ctx, 1) }

// atLeast reports whether a host answers that knows the frames of a version.
func (c *Client) atLeast(ctx context.Context, version int) error {
	l, err := c.open(ctx, nil)
	if err != nil {
		return err
	}
	l.stop()
	l.conn.Close()
	if l.version < version {
		return ErrHostOld
	}
	return nil
}

// Ensure finds the living host, or starts one by calling start and waits until it answers. If several processes do so at once, all get the one host
// that won: see [Listen].
func (c *Client) Ensure(ctx context.Context, start func() error) error {
	err := c.ping(ctx)
	if err == nil || !absent(err) {
		return err
	}
	if err := start(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, ensureTimeout)
	defer cancel()
	for wait := 2 * time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		if err = c.ping(ctx); err == nil {
			return nil
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return fmt.Errorf("the terminal host was started but does not answer on %s; its log tells why: %w", c.socket, err)
		}
	}
}

// absent reports whether err means that no host listens, as opposed to one that cannot be reached.
func absent(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) || gone(err)
}

// Attachment is one viewer of a session: reads give a snapshot of the screen and then live output, writes are typed into the terminal.
// Read, Write and the other methods may be called concurrently with each other, but Read not with itself.
type Attachment struct {
	conn  net.Conn
	r     *bufio.Reader
	reply attachedMessage
	left  int // bytes of the current output frame not yet read

	ended  chan struct{} // closed when reading ended
	finish sync.Once
	status ExitStatus
	err    error // why reading ended, nil after an exit

	mu     sync.Mutex // serialises frames sent, and guards what follows
	room   int        // input that may be sent
	credit chan struct{}
	closed bool
}

// Info describes the session as it was at the attach.
func (a *Attachment) Info() SessionInfo { return a.reply.Info }

// Created reports whether this attach started the session.
func (a *Attachment) Created() bool { return a.reply.Created }

// Read reads the snapshot and then output. It returns io.EOF once the program has ended and every byte it wrote was read,
// and an error wrapping [ErrHostGone] if the host went away first.
func (a *Attachment) Read(p []byte) (int, error) {
	for a.left == 0 && len(p) > 0 {
		if err := a.next(); err != nil {
			return 0, a.end(err)
		}
	}
	n, err := a.r.Read(p[:min(len(p), a.left)])
	a.left -= n
	if err != nil {
		err = a.end(err)
	}
	return n, err
}

// WriteTo writes all that Read would give to w. [io.Copy] uses it: nothing is copied on the way.
func (a *Attachment) WriteTo(w io.Writer) (int64, error) {
	var written int64
	for {
		for a.left == 0 {
			if err := a.next(); err != nil {
				if err = a.end(err); errors.Is(err, io.EOF) {
					err = nil
				}
				return written, err
			}
		}
		if a.r.Buffered() == 0 {
			if _, err := a.r.Peek(1); err != nil {
				return written, a.end(err)
			}
		}
		p, err := a.r.Peek(min(a.r.Buffered(), a.left))
		if err != nil {
			return written, a.end(err)
		}
		n, err := w.Write(p)
		written += int64(n)
		a.left -= n
		if _, derr := a.r.Discard(n); derr != nil && err == nil {
			err = derr
		}
		if err != nil {
			return written, err
		}
	}
}

// next reads frames until one of output, of which it reads the header.
func (a *Attachment) next() error {
	select {
	case <-a.ended:
		return io.EOF
	default:
	}
	t, n, err := readHeader(a.r)
	if err != nil {
		return err
	}
	if t == frameOutput {
		a.left = n
		return nil
	}
	payload := make([]byte, min(n, maxOutput))
	if _, err := io.ReadFull(a.r, payload); err != nil {
		return err
	}
	if _, err := a.r.Discard(n - len(payload)); err != nil {
		return err
	}
	switch t {
	case frameAck:
		if len(payload) < 4 {
			return fmt.Errorf("%w: an ack of %d bytes", errFrame, len(payload))
		}
		a.grant(int(binary.BigEndian.Uint32(payload)))
	case frameExit:
		var status ExitStatus
		if err := json.Unmarshal(payload, &status); err != nil {
			return fmt.Errorf("%w: %v", errFrame, err)
		}
		a.finish.Do(func() {
			a.status = status
			close(a.ended)
		})
		return io.EOF
	case frameError:
		return parseError(payload)
	}
	return nil
}

// end turns the error that ended reading into what callers are promised, and remembers it for Wait.
func (a *Attachment) end(err error) error {
	a.mu.Lock()
	closed := a.closed
	a.mu.Unlock()
	a.finish.Do(func() {
		switch {
		case closed, errors.Is(err, net.ErrClosed): // Close closes first and says so then
			a.err = net.ErrClosed
		case gone(err):
			a.err = ErrHostGone
		default:
			a.err = fmt.Errorf("%w: %w", ErrHostGone, err)
		}
		close(a.ended)
	})
	if a.err != nil {
		return a.err
	}
	return io.EOF
}

func (a *Attachment) grant(n int) {
	a.mu.Lock()
	a.room = min(a.room+n, inputWindow)
	a.mu.Unlock()
	a.signalCredit()
}

func (a *Attachment) signalCredit() {
	select {
	case a.credit <- struct{}{}:
	default:
	}
}

// Write types p into the terminal. It blocks while more than 64 KiB wait for the program to read them, until the program ends or Close.
func (a *Attachment) Write(p []byte) (int, error) {
	written := 0
	for written < len(p) {
		n, err := a.writeSome(p[written:])
		written += n
		if err != nil {
			return written, err
		}
		if n > 0 {
			continue
		}
		select {
		case <-a.credit:
		case <-a.ended:
			return written, a.closedError()
		}
	}
	return written, nil
}

func (a *Attachment) writeSome(p []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	n := min(len(p), a.room)
	if n == 0 && !a.closed {
		return 0, nil
	}
	a.room -= n
	if a.room > 0 { // for another writer, whom one signal may have left waiting
		a.signalCredit()
	}
	return n, a.send(appendFrame(nil, frameInput, p[:n]))
}

// send writes frames; the lock is held.
func (a *Attachment) send(frames []byte) error {
	if a.closed {
		return net.ErrClosed
	}
	_, err := a.conn.Write(frames)
	if err != nil && gone(err) {
		return a.closedErrorLocked()
	}
	return err
}

// closedError says why nothing can be written any more.
func (a *Attachment) closedError() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.closedErrorLocked()
}

func (a *Attachment) closedErrorLocked() error {
	if a.closed {
		return net.ErrClosed
	}
	return fmt.Errorf("cannot write to the terminal: the session ended: %w", syscall.EPIPE)
}

// Resize says that the viewer's window has a new size.
func (a *Attachment) Resize(size Size) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.send(appendSize(nil, size.clamped()))
}

// Signal sends a signal, named as in SSH ("INT", "TERM", "KILL"...), to the session's foreground process group.
// An unknown name means KILL.
func (a *Attachment) Signal(name string) error {
	if name == "" || len(name) > 16 {
		name = "KILL"
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.send(appendFrame(nil, frameSignal, []byte(name)))
}

// Wait waits for the program to end. It returns [ErrHostGone] if the host went away first and net.ErrClosed after Close.
// The output must be read meanwhile: the program's end comes after all of it.
func (a *Attachment) Wait() (ExitStatus, error) {
	<-a.ended
	return a.status, a.err
}

// Close detaches. The session goes on, unless it was created with KillOnDetach and this was its last viewer.
// A second Close returns net.ErrClosed.
func (a *Attachment) Close() error {
	// Closing first frees a send that holds the lock.
	err := a.conn.Close()
	a.mu.Lock()
	a.closed = true
	a.mu.Unlock()
	a.finish.Do(func() {
		a.err = net.ErrClosed
		close(a.ended)
	})
	return err
}
