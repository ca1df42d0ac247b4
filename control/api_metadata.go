package control

import (
	"context"
	"net/http"
	"time"

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

func (s *Server) watchMetadata(agent uuid.UUID) watch[[]wire.AgentMetadata] {
	return watch[[]wire.AgentMetadata]{
		pace: metadataPace, repeat: metadataRepeat,
		read: func(ctx context.Context) ([]wire.AgentMetadata, error) { return s.metadata(ctx, agent) },
		show: func(m []wire.AgentMetadata) any { return aged(m, time.Now()) },
	}
}

func (s *Server) getWatchMetadata(w http.ResponseWriter, r *http.Request, a store.Agent) {
	sendWatch(s, w, r, s.watchMetadata(a.ID))
}

func (s *Server) getWatchMetadataSocket(w http.ResponseWriter, r *http.Request, a store.Agent) {
	sendWatchSocket(s, w, r, s.watchMetadata(a.ID))
}
