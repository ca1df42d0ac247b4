package control

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
)

// links are the open links of agents on this server, and what else of theirs ends with a token, so that
// they can be ended from outside.
type links struct {
	mu     sync.Mutex
	open   map[*link]struct{}
	opened uint64 // so far
}

// maxLinks is how many links one agent may have on a server. One is what it needs, and a program beside it
// may have its own; older ones are those that a network swallowed. Each may hold some 50 MiB here (see
// wire/rpc), so they are few.
const maxLinks = 4

// link is one open link of an agent.
type link struct {
	id    uuid.UUID
	agent uuid.UUID
	token string // hash
	end   context.CancelFunc
	// calls tells a link, over which calls come, from a stream that waits for news.
	calls bool
	// number orders links by age. It belongs to the lock of links.
	number uint64
	// answered is when a monitored link last answered a probe. It belongs to the lock of links.
	answered time.Time
}

// add takes a link in. When its agent has too many, the oldest ends, and add says so.
func (l *links) add(k *link) (ended bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open == nil {
		l.open = make(map[*link]struct{})
	}
	var oldest *link
	n := 0
	for other := range l.open {
		if other.agent != k.agent || !other.calls {
			continue
		}
		n++
		if oldest == nil || other.number < oldest.number {
			oldest = other
		}
	}
	if ended = k.calls && n >= maxLinks; ended {
		oldest.end()
		delete(l.open, oldest) // it goes on its own, but counts no more
	}
	l.opened++
	k.number = l.opened
	l.open[k] = struct{}{}
	return ended
}

func (l *links) remove(k *link) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.open, k)
}

// note keeps that a link answered a probe.
func (l *links) note(k *link) {
	l.mu.Lock()
	defer l.mu.Unlock()
	k.answered = time.Now().UTC()
}

// seen makes a state say what this server sees for itself: a link that answers is up, also while that
// cannot be written down because the disk is full.
func (l *links) seen(agent uuid.UUID, st store.State) store.State {
	if st.LastConnectedAt == nil || time.Since(*st.LastConnectedAt) <= inactive {
		return st // nothing to add, as a rule
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for k := range l.open {
		if k.agent == agent && k.answered.After(*st.LastConnectedAt) {
			at := k.answered
			st.LastConnectedAt = &at
		}
	}
	return st
}

// endWhere ends the links that match.
func (l *links) endWhere(match func(*link) bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for k := range l.open {
		if match(k) {
			k.end()
		}
	}
}

// watchRevoked ends a link as soon as its token does. Should the watch break, what it missed is
// found by the check at each probe of a link.
func (s *Server) watchRevoked(ctx context.Context) error {
	for {
		err := s.store.WatchRevoked(ctx, func(hash string) {
			s.links.endWhere(func(k *link) bool { return k.token == hash })
		})
		if ctx.Err() != nil {
			return nil
		}
		s.log.Warn("lost the watch for revoked tokens", "err", err)
		timer := time.NewTimer(time.Second)
		select {
		case <-ctx.Done():
		case <-timer.C:
		}
		timer.Stop()
	}
}

// noteBudget bounds what is written about a link when it begins, answers a probe, or ends.
const noteBudget = 5 * time.Second

// connected records that an agent's link is up. The newest link is the one that counts.
func (s *Server) connected(ctx context.Context, k *link, version wire.Version) error {
	ctx, cancel := context.WithTimeout(ctx, noteBudget)
	defer cancel()
	return s.store.UpdateState(ctx, k.agent, func(st *store.State) error {
		now := time.Now().UTC()
		if st.FirstConnectedAt == nil {
			st.FirstConnectedAt = &now
		}
		st.LastConnectedAt, st.DisconnectedAt = &now, nil
		st.Link, st.APIVersion = k.id, version.String()
		return nil
	})
}

// alive records that an agent answered a probe, lets the token of its link last, and ends a link whose
// token has ended.
func (s *Server) alive(ctx context.Context, k *link, monitored bool) {
	ctx, cancel := context.WithTimeout(ctx, noteBudget)
	defer cancel()
	t, err := s.store.RenewToken(ctx, k.token)
	if errors.Is(err, store.ErrNotFound) || err == nil && t.AgentID != k.agent {
		k.end()
		return
	}
	if !monitored {
		return
	}
	s.links.note(k)
	err = s.store.UpdateState(ctx, k.agent, func(st *store.State) error {
		if st.Link != k.id {
			return errStale
		}
		now := time.Now().UTC()
		st.LastConnectedAt = &now
		return nil
	})
	if err != nil && !errors.Is(err, errStale) {
		s.log.Warn("cannot record that an agent is alive", "agent", k.agent, "err", err)
	}
}

// disconnected records that an agent's link is down, on a context of its own: the link's has ended.
func (s *Server) disconnected(k *link) {
	// Many leave at once when a network fails; the time for writing begins when it is this one's turn.
	if leave, err := s.gate.enter(context.Background()); err == nil {
		defer leave()
	}
	ctx, cancel := context.WithTimeout(context.Background(), noteBudget)
	defer cancel()
	err := s.store.UpdateState(ctx, k.agent, func(st *store.State) error {
		if st.Link != k.id {
			return errStale
		}
		now := time.Now().UTC()
		st.DisconnectedAt = &now
		return nil
	})
	if err != nil && !errors.Is(err, errStale) {
		s.log.Warn("cannot record that an agent left", "agent", k.agent, "err", err)
	}
}

// errStale stops a link from writing over what a newer one wrote.
var errStale = errors.New("a newer link took over")
