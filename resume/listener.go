package resume

import (
	"bufio"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"log/slog"
	"net"
	"sync"
	"time"
)

// Limits of a listener.
const (
	// maxSessions bounds the sessions there are, those without a connection included. One more takes the place of the one that
	// has been without for longest; where all have theirs it is refused.
	maxSessions = 256
	// maxConns bounds the connections there are: one for each session, and as many that say what they want or hand over.
	maxConns = 2 * maxSessions
	// handshakeTimeout is how long a client may take to say what it wants: a few round trips over a slow relay.
	handshakeTimeout = 10 * time.Second

	// maxWindow lets one stream carry 40 MB/s over a path of 100 ms; an SSH channel has half of it on the way at most.
	maxWindow = 4 << 20
	// minWindow is what a stream gets when there is no memory for more.
	minWindow = 64 << 10
	// memory is what the windows of all sessions may add up to, but for the smallest ones. A window is used only while the
	// other side, or the program here, does not take what is sent.
	memory = 64 << 20
	// share is the part of the memory that is free a new session gets at most, so that there is some for the next.
	share = 8
)

// DefaultPatience is how long a session without a connection is kept unless a [Config] says otherwise: as long as it takes
// to carry a laptop from one room to another, and then some.
const DefaultPatience = 10 * time.Minute

// connBuffer is the room for small frames; data is read past it.
const connBuffer = 4 << 10

// Config is how a [Listener] treats its sessions. The zero value is good.
type Config struct {
	// Patience is how long a session without a connection is kept; 0 means [DefaultPatience].
	Patience time.Duration
	// Peer tells who is at an address: only who opened a session takes it up again. Nobody is "". Nil takes the address itself,
	// without a port.
	Peer func(net.Addr) string
	// Log receives what is refused and given up; nil discards it.
	Log *slog.Logger
}

var (
	errForgotten = errors.New("the other side did not come back in time")
	errCrowded   = errors.New("the other side was away, and others needed the place")
	errStopped   = errors.New("the listener was closed")
)

// Listener accepts streams. It implements [net.Listener].
type Listener struct {
	under    net.Listener
	cfg      Config
	accepted chan *Conn
	closing  context.Context
	close    context.CancelFunc
	work     sync.WaitGroup

	mu       sync.Mutex
	sessions map[id]*session
	conns    map[net.Conn]struct{}
	free     int // of the memory
}

// session is a stream, and who may take it up.
type session struct {
	*Conn
	peer     string
	reserved int
	// The rest is guarded by the listener's mutex.
	carriers int // connections that carry it or are about to
	away     time.Time
	expiry   *time.Timer
}

// Listen accepts streams on the connections of l. Close it to end that, and then call Shutdown.
func Listen(l net.Listener, cfg Config) *Listener {
	cfg.Patience = cmp.Or(cfg.Patience, DefaultPatience)
	if cfg.Peer == nil {
		cfg.Peer = host
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	r := &Listener{
		under: l, cfg: cfg, accepted: make(chan *Conn), free: memory,
		sessions: make(map[id]*session), conns: make(map[net.Conn]struct{}),
	}
	r.closing, r.close = context.WithCancel(context.Background())
	r.work.Go(r.run)
	return r
}

func host(addr net.Addr) string {
	name, _, err := net.SplitHostPort(addr.String())
	if err != nil {
		return addr.String()
	}
	return name
}

// Accept returns the next new stream.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.accepted:
		return c, nil
	case <-l.closing.Done():
		return nil, &net.OpError{Op: "accept", Net: "tcp", Addr: l.Addr(), Err: net.ErrClosed}
	}
}

// Addr is that of the listener below.
func (l *Listener) Addr() net.Addr { return l.under.Addr() }

// Close ends accepting, and so every session that has no connection. The others live on until theirs breaks or they are closed.
func (l *Listener) Close() error {
	l.mu.Lock()
	l.close()
	for _, s := range l.sessions {
		if s.carriers == 0 {
			l.forget(s, errStopped)
		}
	}
	l.mu.Unlock()
	return l.under.Close()
}

// Shutdown closes the listener and every stream, and returns when nothing of them runs any more. Streams that
// were closed before get a moment to deliver their last bytes.
func (l *Listener) Shutdown() {
	_ = l.Close() // a second time is none too many
	late := time.AfterFunc(goodbyeTimeout, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		for conn := range l.conns {
			conn.Close()
		}
	})
	defer late.Stop()
	l.work.Wait()
}

// run takes connections until there are none any more.
func (l *Listener) run() {
	defer l.close()
	for {
		conn, err := l.under.Accept()
		if err != nil {
			if l.closing.Err() == nil {
				l.cfg.Log.Warn("no streams can be taken up any more", "error", err)
			}
			return
		}
		l.mu.Lock()
		full := len(l.conns) >= maxConns
		if !full {
			l.conns[conn] = struct{}{}
		}
		l.mu.Unlock()
		if full {
			l.cfg.Log.Warn("refused a connection: too many are open", "remote", conn.RemoteAddr(), "limit", maxConns)
			conn.Close()
			continue
		}
		l.work.Go(func() {
			defer func() {
				conn.Close()
				l.mu.Lock()
				defer l.mu.Unlock()
				delete(l.conns, conn)
			}()
			if err := l.serve(conn); err != nil {
				l.cfg.Log.Debug("a connection ended", "remote", conn.RemoteAddr(), "error", err)
			}
		})
	}
}

// serve carries a stream over one connection, from hello to end.
func (l *Listener) serve(conn net.Conn) error {
	if err := conn.SetDeadline(time.Now().Add(handshakeTimeout)); err != nil {
		return err
	}
	r := bufio.NewReaderSize(conn, connBuffer)
	h, err := readHello(r)
	if err != nil {
		return err
	}
	s, fresh, verdict := l.seat(h.session, conn)
	if s == nil {
		_, err := conn.Write(answer{verdict: verdict, session: h.session}.append(nil))
		return err
	}
	k := &carrier{Conn: conn, r: r, silence: maxSilence}
	received := s.adopt(k)
	_, err = conn.Write(answer{goOn, s.session, received, s.window, l.cfg.Patience}.append(nil))
	if err == nil {
		err = conn.SetDeadline(time.Time{})
	}
	if err == nil && fresh {
		select {
		case l.accepted <- s.Conn:
			fresh = false
		case <-l.closing.Done():
			err = errStopped
		}
	}
	if err == nil {
		err = s.carry(k, h.received)
	}
	s.drop()
	l.leave(s, fresh)
	return err
}

// seat finds the session that a client asks for, or makes one, and counts the connection. Without one it says why.
func (l *Listener) seat(asked id, conn net.Conn) (s *session, fresh bool, v verdict) {
	peer := l.cfg.Peer(conn.RemoteAddr())
	l.mu.Lock()
	defer l.mu.Unlock()
	if asked != (id{}) {
		s := l.sessions[asked]
		if s == nil || s.peer != peer || peer == "" {
			return nil, false, unknownSession
		}
		s.carriers++
		if s.expiry != nil {
			s.expiry.Stop()
		}
		return s, false, goOn
	}
	if l.closing.Err() != nil || peer == "" || len(l.sessions) >= maxSessions && !l.makeRoom() {
		return nil, false, noRoom
	}
	window := max(minWindow, min(maxWindow, l.free/share))
	s = &session{Conn: newConn(conn, newID(), window), peer: peer, carriers: 1}
	if window > minWindow {
		s.reserved = 2 * window
	}
	l.free -= s.reserved
	l.sessions[s.session] = s
	return s, true, goOn
}

func newID() (i id) {
	_, _ = rand.Read(i[:]) // it never fails
	return i
}

// makeRoom forgets the session that has been without a connection for longest.
func (l *Listener) makeRoom() bool {
	var oldest *session
	for _, s := range l.sessions {
		if s.carriers == 0 && (oldest == nil || s.away.Before(oldest.away)) {
			oldest = s
		}
	}
	if oldest == nil {
		l.cfg.Log.Warn("refused a stream: too many are open", "limit", maxSessions)
		return false
	}
	l.forget(oldest, errCrowded)
	return true
}

// leave notes that a connection carries a session no longer. A session that nobody knows of is no use to anyone.
func (l *Listener) leave(s *session, unknown bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s.carriers--
	switch {
	case unknown || s.isOver():
		l.forget(s, errStopped)
	case s.carriers > 0:
	case l.closing.Err() != nil:
		l.forget(s, errStopped)
	default:
		s.away = time.Now()
		s.expiry = time.AfterFunc(l.cfg.Patience, func() {
			l.mu.Lock()
			defer l.mu.Unlock()
			if s.carriers == 0 && time.Since(s.away) >= l.cfg.Patience && l.sessions[s.session] == s {
				l.cfg.Log.Info("gave up a stream: its client did not come back", "remote", s.RemoteAddr(), "after", l.cfg.Patience)
				l.forget(s, errForgotten)
			}
		})
	}
}

// forget ends a session for good.
func (l *Listener) forget(s *session, why error) {
	if l.sessions[s.session] != s {
		return
	}
	if s.expiry != nil {
		s.expiry.Stop()
	}
	delete(l.sessions, s.session)
	l.free += s.reserved
	s.fail(why)
}
