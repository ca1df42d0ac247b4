package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/berthd/berth/wire"
)

// Token is what is known of a session token. The token itself is not: only its SHA-256 is stored,
// which is enough for 122 random bits.
type Token struct {
	AgentID   uuid.UUID `json:"agent_id"`
	CreatedAt time.Time `json:"created_at"`
	// Exchanged marks a token that a machine got for its identity, rather than a person for an agent.
	Exchanged bool `json:"exchanged,omitempty"`
	// ExpiresAt is when an exchanged token ends unless it is renewed. Others last until they are revoked.
	ExpiresAt time.Time `json:"expires_at,omitzero"`
}

// maxExchanged is how many exchanged tokens of one agent stay good: agents mint one at each
// reconnect, and several processes of one machine may hold theirs at the same time.
const maxExchanged = 8

// MintToken makes a fresh token for an agent and returns it; it can never be read again. Of
// exchanged tokens the oldest end when there are too many.
func (s *Store) MintToken(ctx context.Context, agent uuid.UUID, exchanged bool) (wire.Secret, error) {
	id, err := uuid.NewRandom()
	if err != nil {
		return "", fmt.Errorf("cannot make a token: %w", err)
	}
	token := wire.Secret(id.String())
	t := Token{AgentID: agent, CreatedAt: time.Now().UTC(), Exchanged: exchanged}
	if exchanged {
		t.ExpiresAt = t.CreatedAt.Add(s.opts.TokenLife)
	}
	// The index comes first, so that every good token can be revoked.
	if err := put(ctx, s, s.tokens, agentTokenKey(agent, TokenHash(token)), t); err != nil {
		return "", err
	}
	if err := put(ctx, s, s.tokens, tokenKey(TokenHash(token)), t); err != nil {
		return "", err
	}
	if !exchanged {
		return token, nil
	}
	if err := s.keepExchanged(ctx, agent, maxExchanged); err != nil {
		return "", err
	}
	return token, nil
}

// keepExchanged ends all but the newest n exchanged tokens of an agent.
func (s *Store) keepExchanged(ctx context.Context, agent uuid.UUID, n int) error {
	held, err := all[Token](ctx, s, s.tokens, agentTokenKey(agent, "*"))
	if err != nil {
		return err
	}
	maps.DeleteFunc(held, func(_ string, t Token) bool { return !t.Exchanged })
	oldest := slices.SortedFunc(maps.Keys(held), func(a, b string) int {
		return cmp.Or(held[a].CreatedAt.Compare(held[b].CreatedAt), cmp.Compare(a, b))
	})
	for _, key := range oldest[:max(0, len(oldest)-n)] {
		if err := s.revoke(ctx, agent, key); err != nil {
			return err
		}
	}
	return nil
}

// Token returns what is known of a token, or [ErrNotFound].
func (s *Store) Token(ctx context.Context, token wire.Secret) (Token, error) {
	return s.TokenByHash(ctx, TokenHash(token))
}

// TokenByHash does the same for one whose hash is all that is held.
func (s *Store) TokenByHash(ctx context.Context, hash string) (Token, error) {
	t, _, err := get[Token](ctx, s, s.tokens, tokenKey(hash))
	if err != nil {
		return Token{}, err
	}
	if !t.ExpiresAt.IsZero() && !time.Now().Before(t.ExpiresAt) {
		// What is open with it ends as when it is revoked.
		if err := s.revoke(ctx, t.AgentID, agentTokenKey(t.AgentID, hash)); err != nil {
			return Token{}, err
		}
		return Token{}, ErrNotFound
	}
	return t, nil
}

// RenewToken returns what is known of a token that is in use, as [Store.TokenByHash], and lets it last
// its whole life from now when a part of that has passed.
func (s *Store) RenewToken(ctx context.Context, hash string) (Token, error) {
	t, err := s.TokenByHash(ctx, hash)
	if err != nil || t.ExpiresAt.IsZero() || time.Until(t.ExpiresAt) > s.opts.TokenLife-s.opts.TokenLife/renewals {
		return t, err
	}
	return update(ctx, s, s.tokens, tokenKey(hash), func(t *Token) error {
		if t.AgentID == uuid.Nil {
			return ErrNotFound // it was revoked this moment
		}
		t.ExpiresAt = time.Now().UTC().Add(s.opts.TokenLife)
		return nil
	})
}

// renewals is how often in its life a token in use is renewed: each is a write.
const renewals = 24

// RevokeTokens ends every token of an agent, and of its sub-agents: whoever had the one could ask for
// the others.
func (s *Store) RevokeTokens(ctx context.Context, agent uuid.UUID) error {
	if err := s.revokeSubAgents(ctx, agent); err != nil {
		return err
	}
	held, err := keys(ctx, s, s.tokens, agentTokenKey(agent, "*"))
	if err != nil {
		return err
	}
	for _, key := range held {
		if err := s.revoke(ctx, agent, key); err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) revoke(ctx context.Context, agent uuid.UUID, indexKey string) error {
	hash := strings.TrimPrefix(indexKey, agentTokenKey(agent, ""))
	if err := purge(ctx, s, s.tokens, tokenKey(hash)); err != nil {
		return err
	}
	return purge(ctx, s, s.tokens, indexKey)
}

// WatchRevoked calls revoked with the hash of each token that ends, until ctx is done. When the
// watch itself breaks it returns the error; tokens may then have ended unseen.
func (s *Store) WatchRevoked(ctx context.Context, revoked func(hash string)) error {
	watcher, err := s.tokens.Watch(ctx, tokenKey("*"), jetstream.UpdatesOnly(), jetstream.MetaOnly())
	if err != nil {
		return s.explain("watch tokens", err)
	}
	defer watcher.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case entry, ok := <-watcher.Updates():
			if !ok {
				if ctx.Err() != nil {
					return nil
				}
				return errors.New("cannot watch tokens: the store closed")
			}
			if entry != nil && entry.Operation() != jetstream.KeyValuePut {
				revoked(strings.TrimPrefix(entry.Key(), tokenKey("")))
			}
		}
	}
}

// TokenHash is what stands for a token wherever it is kept.
func TokenHash(token wire.Secret) string { return hash(token.Reveal()) }

func tokenKey(hash string) string { return "hash." + hash }
func agentTokenKey(agent uuid.UUID, hash string) string {
	return "agent." + agent.String() + "." + hash
}

// Key is what is known of a person's API key, "<id>-<secret>".
type Key struct {
	Name      string    `json:"name"`
	CreatedAt time.Time `json:"created_at"`
	// Hash is the SHA-256 of the whole key.
	Hash string `json:"hash"`
}

// CreateKey stores a person's key under its id.
func (s *Store) CreateKey(ctx context.Context, id string, k Key) error {
	return create(ctx, s, s.server, "key."+id, k)
}

// Key returns the key with an id, which must be a valid key name for the store.
func (s *Store) Key(ctx context.Context, id string) (Key, error) {
	k, _, err := get[Key](ctx, s, s.server, "key."+id)
	return k, err
}

// HasKeys tells whether any person's key exists.
func (s *Store) HasKeys(ctx context.Context) (bool, error) {
	found, err := keys(ctx, s, s.server, "key.*")
	return len(found) > 0, err
}

// Once returns the value kept under name, which the first server of a deployment makes.
func (s *Store) Once(ctx context.Context, name string, value func() ([]byte, error)) ([]byte, error) {
	for range maxConflicts {
		kept, _, err := get[[]byte](ctx, s, s.server, name)
		if err == nil || !errors.Is(err, ErrNotFound) {
			return kept, err
		}
		fresh, err := value()
		if err != nil {
			return nil, err
		}
		switch err := create(ctx, s, s.server, name, fresh); {
		case err == nil:
			return fresh, nil
		case !errors.Is(err, ErrExists):
			return nil, err
		}
	}
	return nil, fmt.Errorf("cannot keep %s: other servers came first", name)
}
