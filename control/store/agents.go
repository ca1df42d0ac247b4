package store

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go/jetstream"
)

// Agent is what the server was told about an agent: by the configuration file or by a person.
type Agent struct {
	ID        uuid.UUID `json:"id"`
	Name      string    `json:"name"`
	CreatedAt time.Time `json:"created_at"`
	UpdatedAt time.Time `json:"updated_at"`
	// ParentID is the agent that made this one, a sub-agent, for a container in its workspace.
	ParentID uuid.UUID `json:"parent_id,omitzero"`
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
	MOTD string `json:"motd,omitempty"`
	// Prebuilt marks a workspace that runs before it has a user, and is claimed by one later.
	Prebuilt bool       `json:"prebuilt,omitempty"`
	Instance *Instance  `json:"instance,omitempty"`
	Apps     []App      `json:"apps,omitempty"`
	Scripts  []Script   `json:"scripts,omitempty"`
	Metadata []Metadata `json:"metadata,omitempty"`

	Devcontainers []Devcontainer `json:"devcontainers,omitempty"`
	Secrets       []Secret       `json:"secrets,omitempty"`
	// Resources says what the agent measures of its machine; nil for nothing.
	Resources *Resources `json:"resources,omitempty"`
	// MaxShare bounds with whom apps of sub-agents are shared; empty means no bound.
	MaxShare Share `json:"max_share,omitempty"`
	// VSCodePortProxy is where editors reach a port of the workspace; {{port}} stands for it.
	VSCodePortProxy string `json:"vscode_port_proxy,omitempty"`
	// DisplayApps are the built-in apps that the maker of a sub-agent wants to be shown.
	DisplayApps []string `json:"display_apps,omitempty"`
}

// IsSubAgent tells whether another agent made this one.
func (a Agent) IsSubAgent() bool { return a.ParentID != uuid.Nil }

// WorkspaceID is the workspace an agent belongs to: the one of its parent, or its own.
func (a Agent) WorkspaceID() uuid.UUID {
	if a.IsSubAgent() {
		return a.ParentID
	}
	return a.ID
}

// Devcontainer is a development container that an agent starts.
type Devcontainer struct {
	ID              uuid.UUID `json:"id"`
	LogSourceID     uuid.UUID `json:"log_source_id"`
	Name            string    `json:"name"`
	WorkspaceFolder string    `json:"workspace_folder"`
	ConfigPath      string    `json:"config_path,omitempty"`
}

// Secret is a credential that an agent sets as a variable of its environment, writes to a file, or both.
type Secret struct {
	Env   string `json:"env,omitempty"`
	File  string `json:"file,omitempty"`
	Value Sealed `json:"value"`
}

// Sealed is a credential that is kept. It is stored as it is, and does not print.
type Sealed string

// String implements [fmt.Stringer].
func (Sealed) String() string { return "[redacted]" }

// GoString implements [fmt.GoStringer], for %#v.
func (Sealed) GoString() string { return "[redacted]" }

// Resources says what an agent measures: its memory, and volumes by their mount points.
type Resources struct {
	Memory  bool     `json:"memory,omitempty"`
	Volumes []string `json:"volumes,omitempty"`
}

// Share says who may open an app. The zero value is the owner alone.
type Share string

// Who may open an app, the narrowest first.
const (
	ShareOwner         Share = "owner"
	ShareOrganization  Share = "organization"
	ShareAuthenticated Share = "authenticated"
	SharePublic        Share = "public"
)

var shareWidth = map[Share]int{ShareOrganization: 1, ShareAuthenticated: 2, SharePublic: 3}

// Within returns the narrower of two; an empty bound allows everything.
func (s Share) Within(bound Share) Share {
	if bound != "" && shareWidth[s] > shareWidth[bound] {
		return bound
	}
	return s
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
	Subdomain   bool      `json:"subdomain,omitempty"`
	// Share, OpenIn (a tab or, when empty, a slim window), Group and Order are for pages that show apps.
	Share  Share  `json:"share,omitempty"`
	OpenIn string `json:"open_in,omitempty"`
	Group  string `json:"group,omitempty"`
	Order  int32  `json:"order,omitempty"`
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
	if err := s.claimName(ctx, a); err != nil {
		return err
	}
	if err := create(ctx, s, s.agents, a.ID.String(), a); err != nil {
		return errors.Join(err, purge(ctx, s, s.names, a.nameKey()))
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
	if err := s.claimName(ctx, a); err != nil {
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
		if err := s.ForgetMachine(ctx, a.ID, *old.Instance); err != nil {
			return err
		}
		if err := s.revokeSubAgents(ctx, a.ID); err != nil {
			return err
		}
	}
	if old.nameKey() != a.nameKey() {
		return purge(ctx, s, s.names, old.nameKey())
	}
	return nil
}

// DeleteAgent forgets an agent and its sub-agents, and their tokens, states, logs and histories.
func (s *Store) DeleteAgent(ctx context.Context, id uuid.UUID) error {
	a, err := s.Agent(ctx, id)
	if err != nil {
		return err
	}
	// Tokens first: whatever fails later, nobody enters any more.
	if err := s.RevokeTokens(ctx, id); err != nil {
		return err
	}
	// Sub-agents while their parent is there, so that a failure can be tried again, and after it for one
	// that was being made.
	if err := s.deleteSubAgents(ctx, id); err != nil {
		return err
	}
	if err := purge(ctx, s, s.agents, id.String()); err != nil {
		return err
	}
	if err := s.deleteSubAgents(ctx, id); err != nil {
		return err
	}
	if err := purge(ctx, s, s.tokens, heldKey(id)); err != nil {
		return err
	}
	if a.Instance != nil {
		if err := purge(ctx, s, s.instances, instanceKey(*a.Instance)+"."+id.String()); err != nil {
			return err
		}
		if err := s.ForgetMachine(ctx, id, *a.Instance); err != nil {
			return err
		}
	}
	if err := purge(ctx, s, s.names, a.nameKey()); err != nil {
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

// WatchAgents calls seen with all agents, and again with all whenever they change, until ctx is done.
// seen must not keep the map. When the watch itself breaks it returns the error.
func (s *Store) WatchAgents(ctx context.Context, seen func(map[uuid.UUID]Agent)) error {
	watcher, err := s.agents.WatchAll(ctx)
	if err != nil {
		return s.explain("watch agents", err)
	}
	defer watcher.Stop()
	agents := make(map[uuid.UUID]Agent)
	complete := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case entry, ok := <-watcher.Updates():
			if !ok && ctx.Err() != nil { // which ends the watcher too
				return nil
			}
			if !ok {
				return errors.New("cannot watch agents: the store closed")
			}
			if entry == nil { // everything that was there has been seen
				complete = true
			} else if err := follow(agents, entry); err != nil {
				return err
			}
		}
		if complete {
			seen(agents)
		}
	}
}

// follow makes a change to the agents that a watch tells of.
func follow(agents map[uuid.UUID]Agent, entry jetstream.KeyValueEntry) error {
	id, err := uuid.Parse(entry.Key())
	if err != nil {
		return fmt.Errorf("cannot decode key %s: %w", entry.Key(), err)
	}
	if entry.Operation() != jetstream.KeyValuePut {
		delete(agents, id)
		return nil
	}
	var a Agent
	if err := json.Unmarshal(entry.Value(), &a); err != nil {
		return fmt.Errorf("cannot decode %s in %s: %w", entry.Key(), entry.Bucket(), err)
	}
	agents[id] = a
	return nil
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
		if !a.IsSubAgent() && a.Instance != nil && a.Instance.Provider == provider && a.Instance.ID == id {
			agents = append(agents, a)
		}
	}
	slices.SortFunc(agents, byName)
	return agents, nil
}

// claimName gives a name to an agent. A name whose agent is gone, after a crash between two
// writes, is free.
func (s *Store) claimName(ctx context.Context, a Agent) error {
	_, err := update(ctx, s, s.names, a.nameKey(), func(owner *uuid.UUID) error {
		if *owner != uuid.Nil && *owner != a.ID {
			switch _, err := s.Agent(ctx, *owner); {
			case err == nil:
				return fmt.Errorf("an agent named %q %w", a.Name, ErrExists)
			case !errors.Is(err, ErrNotFound):
				return err
			}
		}
		*owner = a.ID
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

// nameKey is what an agent is found under by name: sub-agents have their names from their workspace.
func (a Agent) nameKey() string {
	if a.IsSubAgent() {
		return subAgentKey(a.ParentID, nameKey(a.Name))
	}
	return nameKey(a.Name)
}

// instanceKey hashes what a cloud says its instance is called: it is not for us to know its alphabet.
func instanceKey(i Instance) string { return i.Provider + "." + hash(i.ID) }

func hash(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:])
}
