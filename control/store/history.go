package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
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

	// historyDepth is how many events of one app or script are kept: enough for a page to show, bounded
	// because programs report statuses in loops.
	historyDepth = 100
	historyAge   = 90 * 24 * time.Hour

	// newestStatuses are kept in a record of their own beside: every view of an agent shows them, and of
	// a stream the newest cannot be read alone.
	newestStatuses = 10
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

// AddAppStatus records what an app said of itself.
func (s *Store) AddAppStatus(ctx context.Context, status wire.AppStatus) error {
	_, err := update(ctx, s, s.state, newestKey(status.AgentID, status.AppID), func(newest *[]wire.AppStatus) error {
		*newest = append([]wire.AppStatus{status}, (*newest)[:min(len(*newest), newestStatuses-1)]...)
		return nil
	})
	if err != nil {
		return err
	}
	return s.record(ctx, status.AgentID, kindStatus, status.AppID.String(), status)
}

func newestKey(agent, app uuid.UUID) string { return agent.String() + partStatuses + app.String() }

// NewestStatuses returns the newest statuses of one app, newest first.
func (s *Store) NewestStatuses(ctx context.Context, agent, app uuid.UUID) ([]wire.AppStatus, error) {
	newest, _, err := get[[]wire.AppStatus](ctx, s, s.state, newestKey(agent, app))
	if errors.Is(err, ErrNotFound) {
		return []wire.AppStatus{}, nil
	}
	return newest, err
}

// AppStatuses returns all statuses of one app that are kept, newest first.
func (s *Store) AppStatuses(ctx context.Context, agent, app uuid.UUID) ([]wire.AppStatus, error) {
	return recorded[wire.AppStatus](ctx, s, agent, kindStatus, app.String())
}

// AddScriptRun records a run of a script.
func (s *Store) AddScriptRun(ctx context.Context, agent uuid.UUID, run ScriptRun) error {
	return s.record(ctx, agent, kindScript, run.ScriptID.String(), run)
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

// recorded returns the events of a subject, newest first. There is no way to read one backwards, so all of it
// is read: at most historyDepth.
func recorded[T any](ctx context.Context, s *Store, agent uuid.UUID, kind, id string) ([]T, error) {
	found := []T{}
	for seq := uint64(1); ; {
		msg, err := s.history.GetMsg(ctx, seq, jetstream.WithGetMsgSubject(historySubject(agent, kind, id)))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			slices.Reverse(found)
			return found, nil
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
}

func (s *Store) deleteHistory(ctx context.Context, agent uuid.UUID) error {
	return s.explain("delete history", s.history.Purge(ctx, jetstream.WithPurgeSubject("berth.history."+agent.String()+".>")))
}
