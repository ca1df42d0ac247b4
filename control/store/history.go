package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/berthd/berth/wire"
)

// The history of an agent is one message an event on berth.history.<agent>.<kind>.<id>, where id is
// the app or script it is about.
const (
	historySubjects = "berth.history.>"
	kindStatus      = "status"
	kindScript      = "script"
	kindConnection  = "connection"

	// historyDepth is how many events of one app or script, or connections of one agent, are kept:
	// enough for a page to show, bounded because programs report statuses in loops.
	historyDepth = 100
	historyAge   = 90 * 24 * time.Hour
)

// ScriptRun is one run of a script.
type ScriptRun struct {
	ScriptID uuid.UUID `json:"script_id"`
	Start    time.Time `json:"start"`
	End      time.Time `json:"end"`
	ExitCode int32     `json:"exit_code"`
	Stage    string    `json:"stage"`
	Status   string    `json:"status"`
}

// Connection is one end of a session that somebody had in a workspace.
type Connection struct {
	ID         uuid.UUID `json:"id"`
	Action     string    `json:"action"`
	Type       string    `json:"type"`
	Time       time.Time `json:"time"`
	IP         string    `json:"ip,omitempty"`
	StatusCode int32     `json:"status_code,omitempty"`
	Reason     string    `json:"reason,omitempty"`
}

// AddAppStatus records what an app said of itself.
func (s *Store) AddAppStatus(ctx context.Context, status wire.AppStatus) error {
	return s.record(ctx, status.AgentID, kindStatus, status.AppID.String(), status)
}

// AppStatuses returns the newest statuses of one app, newest first, at most limit.
func (s *Store) AppStatuses(ctx context.Context, agent, app uuid.UUID, limit int) ([]wire.AppStatus, error) {
	return recorded[wire.AppStatus](ctx, s, agent, kindStatus, app.String(), limit)
}

// AddScriptRun records a run of a script.
func (s *Store) AddScriptRun(ctx context.Context, agent uuid.UUID, run ScriptRun) error {
	return s.record(ctx, agent, kindScript, run.ScriptID.String(), run)
}

// AddConnection records the begin or end of a session in a workspace.
func (s *Store) AddConnection(ctx context.Context, agent uuid.UUID, c Connection) error {
	return s.record(ctx, agent, kindConnection, "all", c)
}

// Connections returns the newest connection reports of an agent, newest first, at most limit.
func (s *Store) Connections(ctx context.Context, agent uuid.UUID, limit int) ([]Connection, error) {
	return recorded[Connection](ctx, s, agent, kindConnection, "all", limit)
}

func historySubject(agent uuid.UUID, kind, id string) string {
	return "berth.history." + agent.String() + "." + kind + "." + id
}

func (s *Store) record(ctx context.Context, agent uuid.UUID, kind, id string, v any) error {
	value, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("cannot encode %s: %w", kind, err)
	}
	if err := s.writable(); err != nil {
		return err
	}
	_, err = s.js.PublishMsg(ctx, &nats.Msg{Subject: historySubject(agent, kind, id), Data: value})
	return s.explain("store "+kind, err)
}

func recorded[T any](ctx context.Context, s *Store, agent uuid.UUID, kind, id string, limit int) ([]T, error) {
	// There is no way to read a subject backwards, so all of it is read: at most historyDepth.
	var found []T
	for seq := uint64(1); ; {
		msg, err := s.history.GetMsg(ctx, seq, jetstream.WithGetMsgSubject(historySubject(agent, kind, id)))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			break
		}
		if err != nil {
			return nil, s.explain("read history", err)
		}
		var v T
		if err := json.Unmarshal(msg.Data, &v); err != nil {
			return nil, fmt.Errorf("cannot decode history: %w", err)
		}
		found = append(found, v)
		seq = msg.Sequence + 1
	}
	newest := make([]T, 0, min(limit, len(found)))
	for i := len(found) - 1; i >= 0 && len(newest) < limit; i-- {
		newest = append(newest, found[i])
	}
	return newest, nil
}

func (s *Store) deleteHistory(ctx context.Context, agent uuid.UUID) error {
	return s.explain("delete history", s.history.Purge(ctx, jetstream.WithPurgeSubject("berth.history."+agent.String()+".>")))
}
