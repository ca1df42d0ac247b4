package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

// State is what an agent last said of itself, and what the server saw of it.
type State struct {
	FirstConnectedAt *time.Time `json:"first_connected_at,omitempty"`
	LastConnectedAt  *time.Time `json:"last_connected_at,omitempty"`
	DisconnectedAt   *time.Time `json:"disconnected_at,omitempty"`
	// Link is the id of the connection that wrote the times above; an older one may not end it.
	Link       uuid.UUID `json:"link"`
	APIVersion string    `json:"api_version,omitempty"`

	Version           string   `json:"version,omitempty"`
	ExpandedDirectory string   `json:"expanded_directory,omitempty"`
	Subsystems        []string `json:"subsystems,omitempty"`
	Notes             []string `json:"notes,omitempty"`

	Lifecycle          string     `json:"lifecycle,omitempty"`
	LifecycleChangedAt *time.Time `json:"lifecycle_changed_at,omitempty"`
	StartedAt          *time.Time `json:"started_at,omitempty"`
	ReadyAt            *time.Time `json:"ready_at,omitempty"`

	LogsOverflowed bool `json:"logs_overflowed,omitempty"`
	// LastUsedAt is when somebody was last known to use the workspace.
	LastUsedAt *time.Time `json:"last_used_at,omitempty"`
	// ClaimedAt is when a prebuilt workspace got its user; ClaimTold whether its agent has heard.
	ClaimedAt *time.Time `json:"claimed_at,omitempty"`
	ClaimTold bool       `json:"claim_told,omitempty"`
	// AppHealth is keyed by app id, Scripts by script id.
	AppHealth map[uuid.UUID]string       `json:"app_health,omitempty"`
	Scripts   map[uuid.UUID]ScriptResult `json:"scripts,omitempty"`
}

// ScriptResult is the outcome of a script's newest run.
type ScriptResult struct {
	ExitCode int32     `json:"exit_code"`
	Status   string    `json:"status"`
	End      time.Time `json:"end"`
}

// MetadataValue is the newest value of one key.
type MetadataValue struct {
	CollectedAt time.Time `json:"collected_at"`
	Value       string    `json:"value"`
	Error       string    `json:"error"`
}

// Parts of an agent's state, each a record of its own because each has its own pace.
const (
	partState     = ".state"
	partMetadata  = ".metadata"
	partStats     = ".stats"
	partResources = ".resources"
	partContext   = ".context"
	partSessions  = ".sessions"
	partSource    = ".source."   // one for each
	partStatuses  = ".statuses." // one for each app
)

// State returns an agent's state; the zero value if it never said anything.
func (s *Store) State(ctx context.Context, agent uuid.UUID) (State, error) {
	st, _, err := get[State](ctx, s, s.state, agent.String()+partState)
	if errors.Is(err, ErrNotFound) {
		return State{}, nil
	}
	return st, err
}

// States returns the state of every agent that has one.
func (s *Store) States(ctx context.Context) (map[uuid.UUID]State, error) {
	found, err := all[State](ctx, s, s.state, "*"+partState)
	if err != nil {
		return nil, err
	}
	states := make(map[uuid.UUID]State, len(found))
	for key, st := range found {
		id, err := uuid.Parse(strings.TrimSuffix(key, partState))
		if err != nil {
			return nil, fmt.Errorf("cannot decode key %s: %w", key, err)
		}
		states[id] = st
	}
	return states, nil
}

// UpdateState changes an agent's state. change may run more than once.
func (s *Store) UpdateState(ctx context.Context, agent uuid.UUID, change func(*State) error) error {
	_, err := update(ctx, s, s.state, agent.String()+partState, change)
	return err
}

// Metadata returns the newest values by key.
func (s *Store) Metadata(ctx context.Context, agent uuid.UUID) (map[string]MetadataValue, error) {
	values, _, err := get[map[string]MetadataValue](ctx, s, s.state, agent.String()+partMetadata)
	if errors.Is(err, ErrNotFound) {
		return nil, nil
	}
	return values, err
}

// PutMetadata stores new values; keys it does not name keep theirs.
func (s *Store) PutMetadata(ctx context.Context, agent uuid.UUID, values map[string]MetadataValue) error {
	_, err := update(ctx, s, s.state, agent.String()+partMetadata, func(kept *map[string]MetadataValue) error {
		if *kept == nil {
			*kept = make(map[string]MetadataValue, len(values))
		}
		for key, v := range values {
			(*kept)[key] = v
		}
		return nil
	})
	return err
}

// ContextState is what is kept of an agent's newest snapshot of its workspace's context.
type ContextState struct {
	Version   uint64 `json:"version"`
	Hash      []byte `json:"hash,omitempty"`
	Resources int    `json:"resources"`
}

// UpdateContext changes it. change may run more than once.
func (s *Store) UpdateContext(ctx context.Context, agent uuid.UUID, change func(*ContextState) error) error {
	_, err := update(ctx, s, s.state, agent.String()+partContext, change)
	return err
}

// PutStats stores an agent's newest report of traffic and sessions.
func (s *Store) PutStats(ctx context.Context, agent uuid.UUID, stats *agentpb.Stats) error {
	return s.putProto(ctx, agent.String()+partStats, stats)
}

// Stats returns it, and when it came; nil if there is none.
func (s *Store) Stats(ctx context.Context, agent uuid.UUID) (*agentpb.Stats, time.Time, error) {
	return getProto[agentpb.Stats](ctx, s, agent.String()+partStats)
}

// PutResources stores an agent's newest window of memory and disk usage.
func (s *Store) PutResources(ctx context.Context, agent uuid.UUID, usage *agentpb.PushResourcesMonitoringUsageRequest) error {
	return s.putProto(ctx, agent.String()+partResources, usage)
}

// Resources returns it; nil if there is none.
func (s *Store) Resources(ctx context.Context, agent uuid.UUID) (*agentpb.PushResourcesMonitoringUsageRequest, error) {
	usage, _, err := getProto[agentpb.PushResourcesMonitoringUsageRequest](ctx, s, agent.String()+partResources)
	return usage, err
}

func (s *Store) putProto(ctx context.Context, key string, m proto.Message) error {
	value, err := protojson.Marshal(m)
	if err != nil {
		return fmt.Errorf("cannot encode %s: %w", key, err)
	}
	return put(ctx, s, s.state, key, json.RawMessage(value))
}

// getProto returns the message of a key, and when it was written; nil if there is none.
func getProto[M any, P interface {
	*M
	proto.Message
}](ctx context.Context, s *Store, key string) (P, time.Time, error) {
	entry, err := s.state.Get(ctx, key)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return nil, time.Time{}, nil
	}
	if err != nil {
		return nil, time.Time{}, s.explain("read "+s.state.Bucket(), err)
	}
	m := P(new(M))
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(entry.Value(), m); err != nil {
		return nil, time.Time{}, fmt.Errorf("cannot decode %s: %w", key, err)
	}
	return m, entry.Created(), nil
}

// maxSessions is how many sessions of an agent are kept: enough to see who was there lately.
const maxSessions = 100

// UpdateSession changes one session of an agent, or adds it. change may run more than once.
func (s *Store) UpdateSession(ctx context.Context, agent, id uuid.UUID, change func(*wire.Session)) error {
	_, err := update(ctx, s, s.state, agent.String()+partSessions, func(newest *[]wire.Session) error {
		i := slices.IndexFunc(*newest, func(known wire.Session) bool { return known.ID == id })
		if i < 0 {
			i = 0
			*newest = append([]wire.Session{{ID: id}}, (*newest)[:min(len(*newest), maxSessions-1)]...)
		}
		change(&(*newest)[i])
		return nil
	})
	return err
}

// Sessions returns the newest sessions of an agent, the newest first.
func (s *Store) Sessions(ctx context.Context, agent uuid.UUID) ([]wire.Session, error) {
	newest, _, err := get[[]wire.Session](ctx, s, s.state, agent.String()+partSessions)
	if errors.Is(err, ErrNotFound) {
		return []wire.Session{}, nil
	}
	return newest, err
}

// CreateLogSource stores a source of log lines; one that exists stays as it is.
func (s *Store) CreateLogSource(ctx context.Context, source wire.LogSource) error {
	err := create(ctx, s, s.state, source.WorkspaceAgentID.String()+partSource+source.ID.String(), source)
	if errors.Is(err, ErrExists) {
		return nil
	}
	return err
}

// LogSources returns an agent's sources of log lines by id.
func (s *Store) LogSources(ctx context.Context, agent uuid.UUID) (map[uuid.UUID]wire.LogSource, error) {
	found, err := all[wire.LogSource](ctx, s, s.state, agent.String()+partSource+"*")
	if err != nil {
		return nil, err
	}
	sources := make(map[uuid.UUID]wire.LogSource, len(found))
	for _, source := range found {
		sources[source.ID] = source
	}
	return sources, nil
}
