package store

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/google/uuid"

	"github.com/berthd/berth/wire"
)

// CreateSubAgent stores a new agent that another one made. [ErrExists] when its workspace has an agent
// of that name, [ErrNotFound] when the parent is gone.
func (s *Store) CreateSubAgent(ctx context.Context, a Agent) error {
	if err := s.CreateAgent(ctx, a); err != nil {
		return err
	}
	// A parent that is deleted meanwhile has either seen this one, or is seen to be gone.
	if _, err := s.Agent(ctx, a.ParentID); err != nil {
		return errors.Join(err, s.DeleteAgent(ctx, a.ID))
	}
	return nil
}

// SubAgents returns the agents that another one made, by name.
func (s *Store) SubAgents(ctx context.Context, parent uuid.UUID) ([]Agent, error) {
	// They are named within their workspace, so their names are the list of them.
	found, err := all[uuid.UUID](ctx, s, s.names, subAgentKey(parent, "*"))
	if err != nil {
		return nil, err
	}
	var agents []Agent
	for key, id := range found {
		a, err := s.Agent(ctx, id)
		switch {
		case err == nil && a.nameKey() == key:
			agents = append(agents, a)
		case err != nil && !errors.Is(err, ErrNotFound):
			return nil, err
		}
	}
	slices.SortFunc(agents, byName)
	return agents, nil
}

func (s *Store) deleteSubAgents(ctx context.Context, parent uuid.UUID) error {
	agents, err := s.SubAgents(ctx, parent)
	if err != nil {
		return err
	}
	for _, a := range agents {
		if err := s.DeleteAgent(ctx, a.ID); err != nil && !errors.Is(err, ErrNotFound) {
			return fmt.Errorf("cannot delete sub-agent %q: %w", a.Name, err)
		}
	}
	return nil
}

func (s *Store) revokeSubAgents(ctx context.Context, parent uuid.UUID) error {
	agents, err := s.SubAgents(ctx, parent)
	if err != nil {
		return err
	}
	for _, a := range agents {
		if err := s.RevokeTokens(ctx, a.ID); err != nil {
			return err
		}
	}
	return nil
}

// HeldToken returns the token of a sub-agent, and makes one if there is none that is still good. It is
// the one kind of token that is kept as it is rather than as a hash: the parent starts the sub-agent
// with it, and may ask for it again whenever it starts itself.
func (s *Store) HeldToken(ctx context.Context, agent uuid.UUID) (wire.Secret, error) {
	held, _, err := get[Sealed](ctx, s, s.tokens, heldKey(agent))
	if err == nil {
		_, err = s.Token(ctx, wire.Secret(held))
	}
	if err == nil || !errors.Is(err, ErrNotFound) {
		return wire.Secret(held), err
	}
	token, err := s.MintToken(ctx, agent, false)
	if err != nil {
		return "", err
	}
	return token, put(ctx, s, s.tokens, heldKey(agent), Sealed(token.Reveal()))
}

func heldKey(agent uuid.UUID) string { return "held." + agent.String() }

func subAgentKey(parent uuid.UUID, name string) string { return parent.String() + "." + name }
