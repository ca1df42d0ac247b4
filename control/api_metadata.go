package control

import (
	"context"
	"encoding/json"
	"errors"
	"iter"
	"net/http"
	"slices"
	"time"

	"github.com/coder/websocket"
	"github.com/google/uuid"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
)

// How often metadata are sent: when they changed, but not more often than metadataPace; unchanged at
// metadataRepeat, because their age grows.
const (
	metadataPace   = time.Second
	metadataRepeat = 5 * time.Second
)

// metadata is what an agent's metadata are now, in the order in which they are declared.
func (s *Server) metadata(ctx context.Context, agent uuid.UUID) ([]wire.AgentMetadata, error) {
	a, err := s.store.Agent(ctx, agent)
	if err != nil {
		return nil, err
	}
	values, err := s.store.Metadata(ctx, agent)
	if err != nil {
		return nil, err
	}
	found := make([]wire.AgentMetadata, 0, len(a.Metadata))
	for _, d := range a.Metadata {
		v := values[d.Key]
		found = append(found, wire.AgentMetadata{
			Result: wire.MetadataResult{CollectedAt: v.CollectedAt, Value: v.Value, Error: v.Error},
			Description: wire.MetadataDescription{
				DisplayName: d.DisplayName, Key: d.Key, Script: d.Script,
				Interval: int64(d.Interval / time.Second), Timeout: int64(d.Timeout / time.Second),
			},
		})
	}
	return found, nil
}

// watchMetadata yields what read returns at the pace above, until ctx is done or the agent is gone.
// An error is the last that it yields.
func watchMetadata(ctx context.Context, read func(context.Context) ([]wire.AgentMetadata, error)) iter.Seq2[[]wire.AgentMetadata, error] {
	return func(yield func([]wire.AgentMetadata, error) bool) {
		ticker := time.NewTicker(metadataPace)
		defer ticker.Stop()
		var sent []wire.AgentMetadata
		var at time.Time
		for {
			now, err := read(ctx)
			switch {
			case ctx.Err() != nil, errors.Is(err, store.ErrNotFound):
				return
			case err != nil:
				yield(nil, err)
				return
			}
			if at.IsZero() || time.Since(at) >= metadataRepeat || !slices.Equal(sent, now) {
				sent, at = now, time.Now()
				if !yield(aged(now, at), nil) {
					return
				}
			}
			select {
			case <-ctx.Done():
				return
			case <-ticker.C:
			}
		}
	}
}

// aged returns metadata with their ages.
func aged(metadata []wire.AgentMetadata, now time.Time) []wire.AgentMetadata {
	metadata = append([]wire.AgentMetadata{}, metadata...)
	for i, m := range metadata {
		if !m.Result.CollectedAt.IsZero() {
			metadata[i].Result.Age = max(0, int64(now.Sub(m.Result.CollectedAt)/time.Second))
		}
	}
	return metadata
}

func (s *Server) metadataOf(a store.Agent) func(context.Context) ([]wire.AgentMetadata, error) {
	return func(ctx context.Context) ([]wire.AgentMetadata, error) { return s.metadata(ctx, a.ID) }
}

func (s *Server) getWatchMetadata(w http.ResponseWriter, r *http.Request, a store.Agent) {
	ctx, done := s.lasting(r)
	defer done()
	stream := sendEvents(w)
	for metadata, err := range watchMetadata(ctx, s.metadataOf(a)) {
		if err != nil {
			_ = stream.send(eventError, internalError(err))
			return
		}
		if stream.send(eventData, metadata) != nil || stream.ping() != nil {
			return
		}
	}
}

func (s *Server) getWatchMetadataSocket(w http.ResponseWriter, r *http.Request, a store.Agent) {
	s.sendMessages(w, r, func(ctx context.Context, send func(any) error) error {
		for metadata, err := range watchMetadata(ctx, s.metadataOf(a)) {
			if err != nil {
				return err
			}
			if err := send(wire.ServerEvent{Type: eventData, Data: metadata}); err != nil {
				return nil
			}
		}
		return nil
	})
}

// messageWrite is how long the other side of a WebSocket may take to take one message.
const messageWrite = 30 * time.Second

// sendMessages serves a WebSocket on which only the server speaks: what produce sends goes out as text
// messages of one line of JSON each. An error of produce is the reason of the close. The context of
// produce ends when the other side is gone.
func (s *Server) sendMessages(w http.ResponseWriter, r *http.Request, produce func(ctx context.Context, send func(any) error) error) {
	ctx, done := s.lasting(r)
	defer done()
	conn := s.accept(w, r)
	if conn == nil {
		return
	}
	defer conn.CloseNow()
	ctx, stop := readNothing(ctx, conn)
	defer stop()
	s.active.Go(func() { keepAlive(ctx, conn) })
	err := produce(ctx, func(v any) error {
		message, err := json.Marshal(v)
		if err != nil {
			return err
		}
		write, cancel := context.WithTimeout(ctx, messageWrite)
		defer cancel()
		return conn.Write(write, websocket.MessageText, append(message, '\n'))
	})
	if err != nil {
		s.failSocket(conn, err.Error())
		return
	}
	_ = s.closeSocket(conn)
}
