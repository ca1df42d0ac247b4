package store

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
)

// Agent is what the server was told about an agent: by the configuration file or by a person.
type Agent struct {
	ID        uuid.UUID `json:"id"`
	Name      string    `json:"name"`
	CreatedAt time.Time `json:"created_at"`
	UpdatedAt time.Time `json:"updated_at"`
	// FromFile marks an agent that the configuration file declares, and may take away again.
	FromFile bool `json:"from_file,omitempty"`
	Spec
}

// Spec is what an agent is to do.
type Spec struct {
	// OS and Arch are what clients are told the workspace runs on, as Go names them.
	OS          string            `json:"os,omitempty"`
	Arch        string            `json:"arch,omitempty"`
	Directory   string            `json:"directory,omitempty"`
	Environment map[string]string `json:"environment,omitempty"`
	// MOTD is the path of a file in the workspace.
	MOTD     string     `json:"motd,omitempty"`
	Instance *Instance  `json:"instance,omitempty"`
	Apps     []App      `json:"apps,omitempty"`
	Scripts  []Script   `json:"scripts,omitempty"`
	Metadata []Metadata `json:"metadata,omitempty"`
}

// Instance is the cloud machine an agent may come from. Account and Region, when set, must fit too.
type Instance struct {
	Provider string `json:"provider"`
	ID       string `json:"id"`
	Account  string `json:"account,omitempty"`
	Region   string `json:"region,omitempty"`
}

// App is something that an agent's workspace offers.
type App struct {
	ID          uuid.UUID `json:"id"`
	Slug        string    `json:"slug"`
	DisplayName string    `json:"display_name,omitempty"`
	URL         string    `json:"url,omitempty"`
	Command     string    `json:"command,omitempty"`
	Icon        string    `json:"icon,omitempty"`
	External    bool      `json:"external,omitempty"`
	Hidden      bool      `json:"hidden,omitempty"`
	// HealthURL is polled every HealthInterval; more than HealthThreshold failures in a row are a fault.
	HealthURL       string        `json:"health_url,omitempty"`
	HealthInterval  time.Duration `json:"health_interval,omitempty"`
	HealthThreshold int32         `json:"health_threshold,omitempty"`
}

// Script runs in the workspace at start, at stop, or on a schedule.
type Script struct {
	ID               uuid.UUID     `json:"id"`
	LogSourceID      uuid.UUID     `json:"log_source_id"`
	DisplayName      string        `json:"display_name"`
	Script           string        `json:"script"`
	LogPath          string        `json:"log_path,omitempty"`
	Cron             string        `json:"cron,omitempty"`
	RunOnStart       bool          `json:"run_on_start,omitempty"`
	RunOnStop        bool          `json:"run_on_stop,omitempty"`
	StartBlocksLogin bool          `json:"start_blocks_login,omitempty"`
	Timeout          time.Duration `json:"timeout,omitempty"`
}

// Metadata is a value that an agent collects by running a script.
type Metadata struct {
	Key         string        `json:"key"`
	DisplayName string        `json:"display_name"`
	Script      string        `json:"script"`
	Interval    time.Duration `json:"interval"`
	Timeout     time.Duration `json:"timeout"`
}

// CreateAgent stores a new agent, or returns [ErrExists] when its name is taken.
func (s *Store) CreateAgent(ctx context.Context, a Agent) error {
	if err := s.claimName(ctx, a.Name, a.ID); err != nil {
		return err
	}
	if err := create(ctx, s, s.agents, a.ID.String(), a); err != nil {
		return errors.Join(err, purge(ctx, s, s.names, nameKey(a.Name)))
	}
	return s.addInstance(ctx, a)
}

// PutAgent stores an agent, new or changed; [ErrExists] when another one has its name. Tokens that
// were exchanged for an instance end when the agent is to come from another.
func (s *Store) PutAgent(ctx context.Context, a Agent) error {
	old, err := s.Agent(ctx, a.ID)
	switch {
	case errors.Is(err, ErrNotFound):
		return s.CreateAgent(ctx, a)
	case err != nil:
		return err
	}
	if err := s.claimName(ctx, a.Name, a.ID); err != nil {
		return err
	}
	// The new instance is added before the record changes and the old one dropped after it: a reader
	// checks the record too, so an exchange meets either the old state or the new one.
	if err := s.addInstance(ctx, a); err != nil {
		return err
	}
	if err := put(ctx, s, s.agents, a.ID.String(), a); err != nil {
		return err
	}
	if old.Instance != nil && (a.Instance == nil || instanceKey(*old.Instance) != instanceKey(*a.Instance)) {
		if err := purge(ctx, s, s.instances, instanceKey(*old.Instance)+"."+a.ID.String()); err != nil {
			return err
		}
	}
	// What another machine was given is not for it to keep.
	if old.Instance != nil && (a.Instance == nil || *old.Instance != *a.Instance) {
		if err := s.keepExchanged(ctx, a.ID, 0); err != nil {
			return err
		}
	}
	if nameKey(old.Name) != nameKey(a.Name) {
		return purge(ctx, s, s.names, nameKey(old.Name))
	}
	return nil
}

// DeleteAgent forgets an agent and its tokens, state, log and history.
func (s *Store) DeleteAgent(ctx context.Context, id uuid.UUID) error {
	a, err := s.Agent(ctx, id)
	if err != nil {
		return err
	}
	// Tokens first: whatever fails later, nobody enters any more.
	if err := s.RevokeTokens(ctx, id); err != nil {
		return err
	}
	if err := purge(ctx, s, s.agents, id.String()); err != nil {
		return err
	}
	if a.Instance != nil {
		if err := purge(ctx, s, s.instances, instanceKey(*a.Instance)+"."+id.String()); err != nil {
			return err
		}
	}
	if err := purge(ctx, s, s.names, nameKey(a.Name)); err != nil {
		return err
	}
	parts, err := keys(ctx, s, s.state, id.String()+".>")
	if err != nil {
		return err
	}
	for _, key := range parts {
		if err := purge(ctx, s, s.state, key); err != nil {
			return err
		}
	}
	if err := s.deleteHistory(ctx, id); err != nil {
		return err
	}
	return s.deleteLogs(ctx, id)
}

// Agent returns the agent with an id.
func (s *Store) Agent(ctx context.Context, id uuid.UUID) (Agent, error) {
	a, _, err := get[Agent](ctx, s, s.agents, id.String())
	return a, err
}

// AgentByName returns the agent with a name; case does not matter.
func (s *Store) AgentByName(ctx context.Context, name string) (Agent, error) {
	id, _, err := get[uuid.UUID](ctx, s, s.names, nameKey(name))
	if err != nil {
		return Agent{}, err
	}
	return s.Agent(ctx, id)
}

// Agents returns every agent, by name.
func (s *Store) Agents(ctx context.Context) ([]Agent, error) {
	found, err := all[Agent](ctx, s, s.agents, ">")
	if err != nil {
		return nil, err
	}
	return slices.SortedFunc(maps.Values(found), byName), nil
}

func byName(a, b Agent) int { return strings.Compare(a.Name, b.Name) }

// AgentsOfInstance returns the agents that may come from a cloud machine, by name.
func (s *Store) AgentsOfInstance(ctx context.Context, provider, id string) ([]Agent, error) {
	prefix := instanceKey(Instance{Provider: provider, ID: id}) + "."
	found, err := keys(ctx, s, s.instances, prefix+"*")
	if err != nil {
		return nil, err
	}
	var agents []Agent
	for _, key := range found {
		agentID, err := uuid.Parse(strings.TrimPrefix(key, prefix))
		if err != nil {
			return nil, fmt.Errorf("cannot decode key %s: %w", key, err)
		}
		a, err := s.Agent(ctx, agentID)
		if errors.Is(err, ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if a.Instance != nil && a.Instance.Provider == provider && a.Instance.ID == id {
			agents = append(agents, a)
		}
	}
	slices.SortFunc(agents, byName)
	return agents, nil
}

// claimName gives a name to an agent. A name whose agent is gone, after a crash between two
// writes, is free.
func (s *Store) claimName(ctx context.Context, name string, id uuid.UUID) error {
	_, err := update(ctx, s, s.names, nameKey(name), func(owner *uuid.UUID) error {
		if *owner != uuid.Nil && *owner != id {
			switch _, err := s.Agent(ctx, *owner); {
			case err == nil:
				return fmt.Errorf("an agent named %q %w", name, ErrExists)
			case !errors.Is(err, ErrNotFound):
				return err
			}
		}
		*owner = id
		return nil
	})
	return err
}

func (s *Store) addInstance(ctx context.Context, a Agent) error {
	if a.Instance == nil {
		return nil
	}
	return put(ctx, s, s.instances, instanceKey(*a.Instance)+"."+a.ID.String(), struct{}{})
}

func nameKey(name string) string { return hash(strings.ToLower(name)) }

// instanceKey hashes what a cloud says its instance is called: it is not for us to know its alphabet.
func instanceKey(i Instance) string { return i.Provider + "." + hash(i.ID) }

func hash(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:])
}
