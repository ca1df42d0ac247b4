package store

import (
	"context"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go"
)

// claimSubject tells streams that wait for it that a workspace was claimed.
const claimSubject = "berth.claim."

// Claim records that a prebuilt workspace has its user now and tells who subscribed to it; [ErrExists]
// when it was claimed before.
func (s *Store) Claim(ctx context.Context, agent uuid.UUID) error {
	err := s.UpdateState(ctx, agent, func(st *State) error {
		if st.ClaimedAt != nil {
			return ErrExists
		}
		now := time.Now().UTC()
		st.ClaimedAt = &now
		return nil
	})
	if err != nil {
		return err
	}
	// The claim is stored; whoever waits for it looks there too.
	_ = s.nc.Publish(claimSubject+agent.String(), nil)
	return nil
}

// SubscribeClaims returns a channel that says when an agent's workspace is claimed from now on, until
// unsubscribe is called. While the store is out of reach an announcement may be lost.
func (s *Store) SubscribeClaims(agent uuid.UUID) (_ <-chan struct{}, unsubscribe func(), _ error) {
	claims := make(chan struct{}, 1)
	sub, err := s.nc.Subscribe(claimSubject+agent.String(), func(*nats.Msg) {
		select {
		case claims <- struct{}{}:
		default:
		}
	})
	if err != nil {
		return nil, nil, s.explain("wait for a claim", err)
	}
	return claims, func() { _ = sub.Unsubscribe() }, nil // of a connection that is closed there is none left
}
