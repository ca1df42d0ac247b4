package sshd

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"maps"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/berthd/berth/ptyhost"
	"github.com/berthd/berth/shell"
)

// KindSSH is the [ptyhost.SessionInfo.Kind] of the terminals of SSH sessions.
const KindSSH = "ssh"

const (
	// leaveTimeout bounds the end of a program whose client left: its host kills it after 3 s, and reads its last words.
	leaveTimeout = 5 * time.Second
	// probeTimeout is how long a client may take to answer somebody who asks whether it is there; a relay on the other side of the world takes
	// a third of a second.
	probeTimeout = time.Second
	// A client that was heard this long ago need not be asked.
	probeFresh = time.Second
)

// errTaken ends a session whose terminal somebody else took up.
var errTaken = errors.New("the connection did not answer, and the terminal was taken up from elsewhere")

// hold is a session's hold on its terminal.
type hold struct {
	conn  *connection
	att   *ptyhost.Attachment
	taken atomic.Bool // by somebody else, who closed att
	left  atomic.Bool // its client left, and the program is about to end
}

func (s *Server) setHold(id string, h *hold) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if h == nil {
		delete(s.holds, id)
		return
	}
	s.holds[id] = h
}

// Held returns the terminals that clients are attached to, by id: the zero time for a client that is there, or left and takes its program along, and for
// one that does not answer when it was heard last. It asks those that it did not hear just now, and waits a second for them.
func (s *Server) Held(ctx context.Context) map[string]time.Time {
	s.mu.Lock()
	holds := maps.Clone(s.holds)
	s.mu.Unlock()
	silent := make(map[*connection]*time.Time, len(holds))
	var asking sync.WaitGroup
	for _, h := range holds {
		if silent[h.conn] == nil && !h.left.Load() {
			since := new(time.Time)
			silent[h.conn] = since
			asking.Go(func() { *since = h.conn.silentSince(ctx) })
		}
	}
	asking.Wait()
	held := make(map[string]time.Time, len(holds))
	for id, h := range holds {
		if since := silent[h.conn]; since != nil {
			held[id] = *since
		} else {
			held[id] = time.Time{}
		}
	}
	return held
}

// TakeUp lets go of a terminal that somebody else attached to, if its client does not answer: a client that is gone and not known to be so would hold up
// the program, once its window is full. A client that answers stays, and shares the terminal.
func (s *Server) TakeUp(ctx context.Context, id string) {
	s.mu.Lock()
	h := s.holds[id]
	s.mu.Unlock()
	if h != nil && !h.conn.silentSince(ctx).IsZero() && ctx.Err() == nil {
		h.taken.Store(true)
		h.att.Close()
	}
}

// attach runs spec in a terminal of the terminal host. It returns when the program has ended and all it wrote was sent, or when the session has. A
// client that leaves ends the program; one that is cut off does not.
func (s *session) attach(spec shell.Spec, login bool) (int, error) {
	srv := s.conn.srv
	if login && srv.cfg.Banner != nil {
		srv.shield("banner", func() { srv.cfg.Banner(s.ch) })
	}
	id := uuid.NewString()
	create := &ptyhost.CreateRequest{
		Argv: spec.Argv, Dir: spec.Dir, Env: spec.Env,
		TTYVariable:  "SSH_TTY",
		Modes:        s.terminal.modes,
		KillOnDetach: true,
	}
	if srv.cfg.Keep > 0 {
		// A name that can be typed: 30 random bits. That one is taken when it comes up again is not to be expected.
		create.Name = "ssh-" + strings.ToLower(rand.Text()[:6])
		create.Kind, create.Container = KindSSH, s.env.container.Name
		// The host keeps it unless it is told not to. So it lives on also when this process is killed.
		create.KillOnDetach, create.IdleTimeout = false, srv.cfg.Keep
	}
	att, err := srv.cfg.Terminals.Attach(s.ctx, ptyhost.AttachRequest{ID: id, Create: create, Size: s.terminal.size, Raw: true})
	if err != nil {
		return exitInternal, fmt.Errorf("cannot open a terminal: %w", err)
	}
	defer att.Close()
	held := &hold{conn: s.conn, att: att}
	srv.setHold(id, held)
	defer srv.setHold(id, nil)
	over := make(chan struct{})
	defer close(over)
	stop := context.AfterFunc(s.ctx, func() { s.leave(id, held, over) })
	defer stop()

	// A terminal has no end of input that a client could pass on, so this just stops when the client has no more to type.
	s.conn.run("terminal input", func() { io.Copy(att, s.ch) })
	s.conn.run("terminal control", func() { s.control(att) })
	if _, err := io.Copy(s.ch, att); err != nil && s.ctx.Err() == nil {
		if held.taken.Load() {
			return exitSignal, errTaken
		}
		if errors.Is(err, ptyhost.ErrHostGone) {
			return exitInternal, fmt.Errorf("cannot follow the terminal: %w", err)
		}
		<-s.ctx.Done() // the channel is closed, and we are about to hear of it
	}
	if s.ctx.Err() != nil {
		io.Copy(io.Discard, att) // until leave has had its way
		return exitSignal, nil
	}
	status, err := att.Wait()
	switch {
	case err != nil:
		return exitInternal, fmt.Errorf("cannot tell how the program ended: %w", err)
	case status.Signal != "":
		return exitSignal, nil
	}
	return status.Code, nil
}

// leave ends the program of a client that left, and lets go of that of one that was cut off. The host forgets a session once somebody was told how it
// ended, so the end is waited for, until over is closed.
func (s *session) leave(id string, held *hold, over <-chan struct{}) {
	defer held.att.Close()
	if s.conn.srv.cfg.Keep == 0 || s.conn.cut() {
		return
	}
	held.left.Store(true)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.ctx), leaveTimeout)
	defer cancel()
	if err := s.conn.srv.cfg.Terminals.Kill(ctx, id, ""); err != nil {
		if !errors.Is(err, ptyhost.ErrNoSession) { // it had ended by itself
			s.conn.srv.cfg.Log.Warn("cannot end the terminal of an SSH client that left", "remote", s.conn.remote, "err", err)
		}
		return
	}
	select {
	case <-over:
	case <-ctx.Done():
	}
}

// control passes sizes and signals on to the terminal until the session ends.
func (s *session) control(att *ptyhost.Attachment) {
	for {
		select {
		case size := <-s.sizes:
			att.Resize(size)
		case name := <-s.signals:
			att.Signal(name)
		case <-s.ctx.Done():
			return
		}
	}
}
