package ptyhost

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

const (
	handshakeTimeout = 10 * time.Second // for a client on this machine to say what it wants

	// shutdownGrace is how long sessions are waited for once they were told to end: the time until they are killed, and a little.
	shutdownGrace = hangupGrace + time.Second

	// Ended sessions wait this long, and at most this many of them, for someone to be told how they ended.
	keepEnded = 10 * time.Minute
	maxEnded  = 32

	maxName = 128
)

// HostConfig configures a [Host]. The zero value works.
type HostConfig struct {
	Log *slog.Logger // nil discards
}

// Host owns sessions and serves them to viewers.
type Host struct {
	log  *slog.Logger
	stop chan struct{} // closed by a client's shutdown

	mu       sync.Mutex
	sessions map[string]*session      // by id
	starting map[string]chan struct{} // ids and names of sessions about to be; closed when they are or cannot be
	conns    map[net.Conn]struct{}
	stopped  bool // stop is closed
	closing  bool // no new sessions
	running  sync.WaitGroup
}

// NewHost returns a host without sessions.
func NewHost(cfg HostConfig) *Host {
	log := cfg.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Host{log: log, stop: make(chan struct{}), sessions: make(map[string]*session), starting: make(map[string]chan struct{}), conns: make(map[net.Conn]struct{})}
}

// Serve serves viewers on l, a listener of Unix sockets, until ctx is done or [Client.Shutdown] is called; it then ends every session, closes l and
// returns nil. Connections of other users than our own and root are refused.
func (h *Host) Serve(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	failed := make(chan error, 1)
	var serving sync.WaitGroup
	serving.Go(func() { failed <- h.accept(ctx, l, &serving) })
	var err error
	select {
	case <-ctx.Done():
	case <-h.stop:
	case err = <-failed:
	}
	h.endAll()
	cancel()
	l.Close()
	h.mu.Lock()
	for conn := range h.conns {
		conn.Close()
	}
	h.mu.Unlock()
	serving.Wait()
	h.running.Wait()
	return err
}

// accept serves connections until l is closed. Running out of descriptors is no reason to give up on sessions: it passes.
func (h *Host) accept(ctx context.Context, l net.Listener, serving *sync.WaitGroup) error {
	for {
		conn, err := l.Accept()
		switch {
		case err == nil:
			serving.Go(func() { h.serve(conn) })
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("cannot serve terminals: %w", err)
		default:
			h.log.Warn("cannot accept a connection", "error", err)
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
				return nil
			}
		}
	}
}

// endAll ends every session and waits until they are gone and their viewers told, within a bound.
func (h *Host) endAll() {
	h.mu.Lock()
	h.closing = true
	sessions := slices.Collect(maps.Values(h.sessions))
	h.mu.Unlock()
	for _, s := range sessions {
		s.end("the workspace stopped")
	}
	ctx, cancel := context.WithTimeout(context.Background(), shutdownGrace)
	defer cancel()
	for _, s := range sessions {
		if err := s.drain(ctx); err != nil {
			h.log.Warn("leaving a session whose program or viewers do not end", "session", s.id)
		}
	}
}

func (h *Host) serve(conn net.Conn) {
	h.mu.Lock()
	h.conns[conn] = struct{}{}
	h.mu.Unlock()
	defer func() {
		h.mu.Lock()
		delete(h.conns, conn)
		h.mu.Unlock()
		conn.Close()
	}()
	if err := h.handle(conn); err != nil && !gone(err) && !errors.Is(err, net.ErrClosed) {
		h.log.Warn("ended a connection", "error", err)
	}
}

// handle does the handshake and what the client asks for.
func (h *Host) handle(conn net.Conn) error {
	if err := checkPeer(conn); err != nil {
		return err
	}
	if err := conn.SetDeadline(time.Now().Add(handshakeTimeout)); err != nil {
		return err
	}
	r := bufio.NewReader(conn)
	t, payload, err := readFrame(r, nil)
	if err != nil {
		return err
	}
	var hello helloMessage
	if err := json.Unmarshal(payload, &hello); t != frameHello || err != nil || hello.Version < 1 {
		return fmt.Errorf("%w: the client did not say hello", errFrame)
	}
	reply := appendJSON(nil, frameHello, helloMessage{Version: protocolVersion, PID: os.Getpid()})
	for {
		if t, payload, err = readFrame(r, payload); err != nil {
			if gone(err) { // it only wanted to know whether we live
				_, err = conn.Write(reply)
			}
			return err
		}
		switch t {
		case frameAttach:
			return h.attach(conn, r, reply, payload)
		case frameList:
			_, err := conn.Write(appendJSON(reply, frameSessions, h.list()))
			return err
		case frameKill:
			return h.kill(conn, reply, payload)
		case frameRename:
			return h.rename(conn, reply, payload)
		case frameWatch:
			return h.hold(conn, r, reply, func() {})
		case frameShutdown:
			return h.shutdown(conn, r, reply)
		}
	}
}

// peer returns who is behind the other side of a Unix socket, as the kernel knows it.
func peer(conn net.Conn) (cred *unix.Ucred, err error) {
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, fmt.Errorf("cannot serve %T: terminals are served on Unix sockets only", conn)
	}
	raw, err := unixConn.SyscallConn()
	if err != nil {
		return nil, err
	}
	if cerr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); cerr != nil {
		return nil, cerr
	}
	if err != nil {
		return nil, fmt.Errorf("cannot tell who is at the other end: %w", err)
	}
	return cred, nil
}

// checkPeer refuses other users, should the socket's permissions ever not.
func checkPeer(conn net.Conn) error {
	cred, err := peer(conn)
	if err != nil {
		return err
	}
	if uid := int(cred.Uid); uid != 0 && uid != os.Getuid() {
		return fmt.Errorf("refused user %d: these terminals belong to user %d", uid, os.Getuid())
	}
	return nil
}

func (h *Host) attach(conn net.Conn, r *bufio.Reader, reply, payload []byte) error {
	var req AttachRequest
	if err := json.Unmarshal(payload, &req); err != nil {
		return h.refuse(conn, reply, fmt.Errorf("%w: %v", errFrame, err))
	}
	s, v, created, err := h.enter(conn, req)
	if err != nil {
		return h.refuse(conn, reply, err)
	}
	if _, err := conn.Write(appendJSON(reply, frameAttached, attachedMessage{Info: s.info(), Created: created})); err != nil {
		close(v.gone)
		h.leave(s, v, false)
		return err
	}
	s.confirm()
	conn.SetDeadline(time.Time{}) // fails only on a closed connection, as the next read will
	sent := make(chan error, 1)
	go func() {
		err := v.send()
		sent <- err
		conn.Close() // frees the reader below
	}()
	err = v.receive(r)
	conn.Close()
	close(v.gone)
	sendErr := <-sent
	h.leave(s, v, sendErr == nil)
	if sendErr == nil {
		return nil // the session ended and the viewer knows
	}
	return err
}

func (h *Host) refuse(conn net.Conn, reply []byte, why error) error {
	h.log.Info("refused a request", "error", why)
	_, err := conn.Write(appendError(reply, why))
	return err
}

// leave detaches v and forgets the session if that was all that kept it.
func (h *Host) leave(s *session, v *viewer, told bool) {
	s.detach(v, told)
	if s.over() {
		h.forget(s)
	}
}

func (h *Host) forget(s *session) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.drop(s)
}

// drop is forget for who holds the lock. The timer goes too: it would hold on to the session's screen.
func (h *Host) drop(s *session) {
	if h.sessions[s.id] == s {
		delete(h.sessions, s.id)
	}
	if s.kept != nil {
		s.kept.Stop()
	}
}

// enter attaches to the session a request means, or starts it.
func (h *Host) enter(conn net.Conn, req AttachRequest) (s *session, v *viewer, created bool, err error) {
	for {
		h.mu.Lock()
		if s, err := h.resolve(req); s != nil || err != nil {
			defer h.mu.Unlock()
			if err != nil {
				return nil, nil, false, err
			}
			v, err := s.attach(conn, req)
			return s, v, false, err
		}
		id, create, err := h.plan(req)
		if err != nil {
			h.mu.Unlock()
			return nil, nil, false, err
		}
		started, busy := h.reserve(id, create.Name)
		h.mu.Unlock()
		if !busy {
			s, v, err := h.start(conn, id, create, req)
			h.mu.Lock()
			delete(h.starting, id)
			delete(h.starting, create.Name)
			h.mu.Unlock()
			close(started)
			return s, v, err == nil, err
		}
		select {
		case <-started:
		case <-time.After(handshakeTimeout):
			return nil, nil, false, fmt.Errorf("%w: it is being started already, and its program does not come up", ErrStart)
		}
	}
}

// reserve claims the id and the name of a session about to be started, or returns what tells that whoever has one of them is done. The lock is held.
func (h *Host) reserve(id, name string) (started chan struct{}, busy bool) {
	for _, key := range []string{id, name} {
		if started, busy := h.starting[key]; busy {
			return started, true
		}
	}
	started = make(chan struct{})
	h.starting[id] = started
	if name != "" {
		h.starting[name] = started
	}
	return started, false
}

// start starts a session, without the lock: a directory on a file system that does not answer holds up nobody else.
func (h *Host) start(conn net.Conn, id string, create CreateRequest, req AttachRequest) (*session, *viewer, error) {
	s, err := newSession(id, create, req.Size, h.log)
	if err != nil {
		return nil, nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closing {
		s.abandon()
		return nil, nil, errClosing
	}
	// Its creator is attached before its first output is read, and so gets that output as it is.
	v, err := s.attach(conn, req)
	if err != nil {
		s.abandon()
		return nil, nil, err
	}
	h.sessions[s.id] = s
	h.running.Go(func() {
		s.run()
		h.retire(s)
	})
	return s, v, nil
}

var errClosing = fmt.Errorf("%w: the terminal host is shutting down", ErrStart)

// plan says which session a request starts. The lock is held.
func (h *Host) plan(req AttachRequest) (id string, create CreateRequest, err error) {
	if req.Create == nil {
		return "", create, fmt.Errorf("%w: %q has ended or never was", ErrNoSession, cmp.Or(req.Name, req.ID))
	}
	create = *req.Create
	create.Name = cmp.Or(create.Name, req.Name)
	parsed, err := uuid.Parse(req.ID)
	if err != nil {
		create.Name = cmp.Or(create.Name, req.ID)
	}
	if err != nil || h.find(parsed.String()) != nil { // one that was renamed has the id that clients make of its first name
		parsed = uuid.New()
	}
	switch {
	case h.closing:
		return "", create, errClosing
	case h.find(create.Name) != nil:
		return "", create, fmt.Errorf("%w: a session named %q exists already", ErrStart, create.Name)
	}
	if create.Name != "" {
		if err := checkName(create.Name); err != nil {
			return "", create, fmt.Errorf("%w: %w", ErrStart, err)
		}
	}
	return parsed.String(), create, nil
}

// resolve returns the session that a request means; nil if there is none yet. The lock is held.
func (h *Host) resolve(req AttachRequest) (*session, error) {
	s := h.meant(req)
	if s != nil && req.Container != "" && req.Container != s.req.Container {
		where := "on the machine itself"
		if s.req.Container != "" {
			where = fmt.Sprintf("in container %q", s.req.Container)
		}
		return nil, fmt.Errorf("%w: there is one named %q already, %s", ErrStart, s.name(), where)
	}
	return s, nil
}

// meant goes by the stream that is continued, then by the name, then by the id. Clients make ids of names, so one that knows a
// name means no session that has the id and another name by now.
func (h *Host) meant(req AttachRequest) *session {
	if req.After != "" {
		for _, s := range h.sessions {
			if s.showed(req.After) && !s.over() {
				return s
			}
		}
	}
	if req.Name == "" {
		return h.find(req.ID)
	}
	if s := h.find(req.Name); s != nil {
		return s
	}
	if s := h.find(req.ID); s != nil && s.name() == "" {
		return s
	}
	return nil
}

// retire keeps an ended session for a while if nobody was there to see its end.
func (h *Host) retire(s *session) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.sessions[s.id] != s {
		return // its viewers knew at once
	}
	s.kept = time.AfterFunc(keepEnded, func() { h.forget(s) })
	var ended []SessionInfo
	for _, s := range h.sessions {
		if info := s.info(); info.Exited != nil && info.Viewers == 0 {
			ended = append(ended, info)
		}
	}
	slices.SortFunc(ended, func(a, b SessionInfo) int { return a.LastActive.Compare(b.LastActive) })
	for _, info := range ended[:max(0, len(ended)-maxEnded)] {
		h.drop(h.sessions[info.ID])
	}
}

// find looks a session up by id or name; one that is over is not there any more. The lock is held.
func (h *Host) find(id string) *session {
	if id == "" {
		return nil
	}
	if parsed, err := uuid.Parse(id); err == nil {
		if s := h.sessions[parsed.String()]; s != nil && !s.over() {
			return s
		}
	}
	for _, s := range h.sessions {
		if s.name() == id && !s.over() {
			return s
		}
	}
	return nil
}

func (h *Host) list() []SessionInfo {
	h.mu.Lock()
	sessions := slices.Collect(maps.Values(h.sessions))
	h.mu.Unlock()
	infos := make([]SessionInfo, 0, len(sessions))
	for _, s := range sessions {
		if !s.over() {
			infos = append(infos, s.describe())
		}
	}
	slices.SortFunc(infos, func(a, b SessionInfo) int { return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.ID, b.ID)) })
	return infos
}

func (h *Host) kill(conn net.Conn, reply, payload []byte) error {
	var m killMessage
	if err := json.Unmarshal(payload, &m); err != nil {
		return h.refuse(conn, reply, fmt.Errorf("%w: %v", errFrame, err))
	}
	h.mu.Lock()
	s := h.find(m.ID)
	h.mu.Unlock()
	if s == nil {
		return h.refuse(conn, reply, fmt.Errorf("%w: %q has ended or never was", ErrNoSession, m.ID))
	}
	if m.Signal == "" {
		s.end("closed on request")
	} else if err := s.signal(m.Signal); err != nil {
		return h.refuse(conn, reply, err)
	}
	_, err := conn.Write(appendFrame(reply, frameDone, nil))
	return err
}

// checkName says what is wrong with a name. An id is none: it would hide the session that has it.
func checkName(name string) error {
	_, err := uuid.Parse(name)
	switch {
	case name == "":
		return fmt.Errorf("%w: it is empty", ErrBadName)
	case len(name) > maxName:
		return fmt.Errorf("%w: it is longer than %d bytes", ErrBadName, maxName)
	case strings.ContainsFunc(name, func(r rune) bool { return r == utf8.RuneError || !unicode.IsPrint(r) }):
		return fmt.Errorf("%w: it has characters that cannot be printed", ErrBadName)
	case err == nil:
		return fmt.Errorf("%w: it reads as the id of one", ErrBadName)
	}
	return nil
}

func (h *Host) rename(conn net.Conn, reply, payload []byte) error {
	var m renameMessage
	if err := json.Unmarshal(payload, &m); err != nil {
		return h.refuse(conn, reply, fmt.Errorf("%w: %v", errFrame, err))
	}
	if err := h.giveName(m); err != nil {
		return h.refuse(conn, reply, err)
	}
	_, err := conn.Write(appendFrame(reply, frameDone, nil))
	return err
}

func (h *Host) giveName(m renameMessage) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.find(m.ID)
	if s == nil {
		return fmt.Errorf("%w: %q has ended or never was", ErrNoSession, m.ID)
	}
	if err := checkName(m.Name); err != nil {
		return err
	}
	if other := h.find(m.Name); other != nil && other != s || h.starting[m.Name] != nil {
		return fmt.Errorf("%w: %q", ErrNameTaken, m.Name)
	}
	s.rename(m.Name, m.IdleTimeout)
	return nil
}

// hold answers, calls answered, and keeps the connection until either side ends: so each learns of the other's end.
func (h *Host) hold(conn net.Conn, r *bufio.Reader, reply []byte, answered func()) error {
	if _, err := conn.Write(appendFrame(reply, frameDone, nil)); err != nil {
		return err
	}
	answered()
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return err
	}
	_, err := r.ReadByte()
	return err
}

// shutdown makes Serve return, and holds the connection until it does: its end is how the client knows.
func (h *Host) shutdown(conn net.Conn, r *bufio.Reader, reply []byte) error {
	return h.hold(conn, r, reply, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if !h.stopped {
			h.stopped = true
			close(h.stop)
		}
	})
}
