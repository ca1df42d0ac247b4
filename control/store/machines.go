package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go/jetstream"
)

// Machine is what is remembered of a cloud machine that proved what it is.
type Machine struct {
	Provider string `json:"provider"`
	ID       string `json:"id"`
	// FirstSeen is when it proved itself first, Issued the newest time at which its cloud signed.
	FirstSeen time.Time `json:"first_seen"`
	Issued    time.Time `json:"issued"`
	// Agents are those that it became.
	Agents map[uuid.UUID]Holder `json:"agents"`
}

// Holder is one installation of an agent on a machine.
type Holder struct {
	// ProofKey is the Ed25519 public key by which it is known; empty until it has shown one.
	ProofKey []byte `json:"proof_key,omitempty"`
	// LastSeen, Payload and IP are of its last exchange.
	LastSeen time.Time `json:"last_seen"`
	Payload  string    `json:"payload"`
	IP       string    `json:"ip"`
}

// UpdateMachine changes what is remembered of a machine, and begins it when there is nothing yet.
// change may run more than once; an error from it is returned and nothing is written.
func (s *Store) UpdateMachine(ctx context.Context, provider, id string, change func(*Machine) error) error {
	_, err := update(ctx, s, s.identity, machineKey(provider, id), func(m *Machine) error {
		if m.Agents == nil {
			*m = Machine{Provider: provider, ID: id, FirstSeen: time.Now().UTC(), Agents: map[uuid.UUID]Holder{}}
		}
		return change(m)
	})
	return err
}

// ForgetMachine makes that any installation on the machine of an agent may become it again. That
// nothing is remembered is no error.
func (s *Store) ForgetMachine(ctx context.Context, agent uuid.UUID, instance Instance) error {
	key := machineKey(instance.Provider, instance.ID)
	left, err := update(ctx, s, s.identity, key, func(m *Machine) error {
		if _, ok := m.Agents[agent]; !ok {
			return ErrNotFound
		}
		delete(m.Agents, agent)
		return nil
	})
	switch {
	case errors.Is(err, ErrNotFound):
		return nil
	case err != nil || len(left.Agents) > 0:
		return err
	}
	return purge(ctx, s, s.identity, key)
}

// Use is the use of something that may be used once.
type Use struct {
	Agent    uuid.UUID `json:"agent"`
	ProofKey []byte    `json:"proof_key,omitempty"`
	Payload  string    `json:"payload"`
	At       time.Time `json:"at"`
}

// UseOnce notes that something is used, for a time of at least a second after which it is no use
// anyway. When it was used before it returns [ErrExists] and that use.
func (s *Store) UseOnce(ctx context.Context, what string, use Use, keep time.Duration) (Use, error) {
	value, err := json.Marshal(use)
	if err != nil {
		return Use{}, fmt.Errorf("cannot encode a use: %w", err)
	}
	if err := s.writable(); err != nil {
		return Use{}, err
	}
	key := "used." + hash(what)
	_, err = s.identity.Create(ctx, key, value, jetstream.KeyTTL(max(keep, time.Second).Round(time.Second)))
	if err == nil {
		return use, nil
	}
	if err = s.explain("write "+s.identity.Bucket(), err); !errors.Is(err, ErrExists) {
		return Use{}, err
	}
	before, _, getErr := get[Use](ctx, s, s.identity, key)
	if getErr != nil && !errors.Is(getErr, ErrNotFound) { // it may have gone this moment
		return Use{}, getErr
	}
	return before, err
}

func machineKey(provider, id string) string {
	return "machine." + instanceKey(Instance{Provider: provider, ID: id})
}
