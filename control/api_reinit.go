package control

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/google/uuid"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
)

// errNothingToWaitFor is why an agent is not kept waiting for its workspace to be claimed.
var errNothingToWaitFor = errors.New("there is no claim to wait for")

// getReinit is where agents of prebuilt workspaces wait to be claimed. An agent that takes no for an
// answer (wait=true) gets it when there is nothing to wait for, and hears of a claim that was made
// while it was away. An older one starts anew at each event, so it hears of a claim only when it is made.
func (s *Server) getReinit(w http.ResponseWriter, r *http.Request, agent caller) {
	durable := r.URL.Query().Get("wait") == "true"
	claims, unsubscribe, err := s.store.SubscribeClaims(agent.ID) // before the state is read
	if err != nil {
		writeError(w, internalError(err))
		return
	}
	defer unsubscribe()
	if durable {
		switch _, err := s.untoldClaim(r.Context(), agent.Agent); {
		case errors.Is(err, errNothingToWaitFor):
			writeError(w, &wire.Error{StatusCode: http.StatusConflict, Message: "Workspace is not a prebuilt workspace waiting to be claimed."})
			return
		case err != nil:
			writeError(w, internalError(err))
			return
		}
	}
	ctx, done := s.lasting(r)
	defer done()
	// What ends a link, such as the end of its token, ends this, too.
	ctx, end := context.WithCancel(ctx)
	defer end()
	k := &link{id: uuid.New(), agent: agent.ID, token: agent.tokenHash, end: end}
	s.links.add(k)
	defer s.links.remove(k)
	stream := sendEvents(w)
	tell := func() error {
		if err := stream.send(eventData, s.reinitialization(agent.Agent)); err != nil {
			return err
		}
		return s.store.UpdateState(ctx, agent.ID, func(st *store.State) error {
			st.ClaimTold = true
			return nil
		})
	}
	ticker := time.NewTicker(pingEvery)
	defer ticker.Stop()
	for {
		if durable {
			// Also at each ping: an announcement may be lost, a claim may not.
			claimed, err := s.untoldClaim(ctx, agent.Agent)
			if claimed {
				err = tell()
			}
			if claimed || err != nil {
				return // told, here or by another stream; or it comes back and asks again
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-claims:
			if !durable && tell() != nil {
				return
			}
		case <-ticker.C:
			s.alive(ctx, k, false)
			if stream.ping() != nil {
				return
			}
		}
	}
}

func (s *Server) reinitialization(a store.Agent) wire.Reinitialization {
	return wire.Reinitialization{WorkspaceID: a.WorkspaceID(), Reason: wire.ReasonPrebuildClaimed, OwnerID: s.ownerID()}
}

// untoldClaim tells whether a workspace was claimed and its agent has not heard of it, or returns
// errNothingToWaitFor when that cannot come any more.
func (s *Server) untoldClaim(ctx context.Context, a store.Agent) (bool, error) {
	if !a.Prebuilt {
		return false, errNothingToWaitFor
	}
	st, err := s.store.State(ctx, a.ID)
	switch {
	case err != nil:
		return false, err
	case st.ClaimTold:
		return false, errNothingToWaitFor
	}
	return st.ClaimedAt != nil, nil
}

// postBerthClaim gives a prebuilt workspace to its user: the agent starts anew.
func (s *Server) postBerthClaim(w http.ResponseWriter, r *http.Request, a store.Agent) {
	if !a.Prebuilt {
		writeError(w, &wire.Error{StatusCode: http.StatusConflict, Message: fmt.Sprintf("Agent %q is not prebuilt.", a.Name)})
		return
	}
	switch err := s.store.Claim(r.Context(), a.ID); {
	case errors.Is(err, store.ErrExists):
		writeError(w, &wire.Error{StatusCode: http.StatusConflict, Message: fmt.Sprintf("Agent %q is claimed already.", a.Name)})
	case err != nil:
		writeError(w, internalError(err))
	default:
		s.log.Info("a prebuilt workspace was claimed", "agent", a.Name)
		w.WriteHeader(http.StatusNoContent)
	}
}
