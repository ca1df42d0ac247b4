package control

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire/tailnetpb"
)

// workspaces are all that there are, and their agents: what a client with a link to all of them is told.
type workspaces struct {
	mu sync.Mutex
	// agents is nil until all that are there have been read. It is replaced, never changed in place.
	agents map[uuid.UUID]member
	// changed is closed when agents is replaced, and is then another.
	changed chan struct{}
}

// member is an agent by what clients are told of it.
type member struct {
	name      string
	workspace uuid.UUID
}

func newWorkspaces() *workspaces { return &workspaces{changed: make(chan struct{})} }

// now returns the agents as they are, and a channel that is closed when they are others.
func (w *workspaces) now() (map[uuid.UUID]member, <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.agents, w.changed
}

func (w *workspaces) replace(agents map[uuid.UUID]member) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.agents = agents
	close(w.changed)
	w.changed = make(chan struct{})
}

// watchWorkspaces keeps them true until ctx is done.
func (s *Server) watchWorkspaces(ctx context.Context) error {
	for {
		err := s.store.WatchAgents(ctx, func(all map[uuid.UUID]store.Agent) {
			agents := make(map[uuid.UUID]member, len(all))
			for id, a := range all {
				agents[id] = member{a.Name, a.WorkspaceID()}
			}
			if known, _ := s.workspaces.now(); known == nil || !maps.Equal(known, agents) {
				s.workspaces.replace(agents)
			}
		})
		if ctx.Err() != nil {
			return nil
		}
		s.log.Warn("lost the watch for agents", "err", err)
		timer := time.NewTimer(time.Second)
		select {
		case <-ctx.Done():
		case <-timer.C:
		}
		timer.Stop()
	}
}

// lookupBudget bounds the search for an agent that a client wants to reach.
const lookupBudget = 2 * time.Second

// reachable tells whether there is an agent for a person to open a tunnel to. Every person may reach
// every agent.
func (s *Server) reachable(agent uuid.UUID) bool {
	known, _ := s.workspaces.now()
	if _, ok := known[agent]; ok {
		return true
	}
	// One that was just made may not have been heard of yet.
	ctx, cancel := context.WithTimeout(s.stopping, lookupBudget)
	defer cancel()
	_, err := s.store.Agent(ctx, agent)
	return err == nil
}

// WorkspaceUpdates sends all workspaces of a user and their agents, then what becomes of them. All belong
// to the one owner that there is; to another, none ever will.
func (t *tailnetService) WorkspaceUpdates(req *tailnetpb.WorkspaceUpdatesRequest, stream tailnetpb.DRPCTailnet_WorkspaceUpdatesStream) error {
	if !t.client {
		return t.DRPCTailnetUnimplementedServer.WorkspaceUpdates(req, stream)
	}
	user, err := uuid.FromBytes(req.GetWorkspaceOwnerId())
	if err != nil {
		return fmt.Errorf("cannot read workspace owner id: %w", err)
	}
	var told map[uuid.UUID]member
	for {
		agents, changed := t.workspaces.now()
		if agents != nil {
			if user != t.ownerID() {
				agents = map[uuid.UUID]member{}
			}
			for _, update := range workspaceUpdates(told, agents) {
				if err := stream.Send(update); err != nil {
					return err
				}
			}
			told = agents
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return nil
		}
	}
}

// workspaceUpdates says how to get from one state to another; from nil, which is before the first, by
// one message that tells all. What a receiver knows by name already it is not told again: an agent
// under another name goes and comes.
func workspaceUpdates(from, to map[uuid.UUID]member) []*tailnetpb.WorkspaceUpdate {
	gone, come := &tailnetpb.WorkspaceUpdate{}, &tailnetpb.WorkspaceUpdate{}
	for id, m := range from {
		if to[id] == m {
			continue
		}
		gone.DeletedAgents = append(gone.DeletedAgents, agentProto(id, m))
		if _, still := to[id]; !still && id == m.workspace {
			gone.DeletedWorkspaces = append(gone.DeletedWorkspaces, workspaceProto(id, m, tailnetpb.Workspace_DELETED))
		}
	}
	for id, m := range to {
		if from[id] == m {
			continue
		}
		come.UpsertedAgents = append(come.UpsertedAgents, agentProto(id, m))
		if id == m.workspace {
			// There is no building of workspaces here: one that is there runs.
			come.UpsertedWorkspaces = append(come.UpsertedWorkspaces, workspaceProto(id, m, tailnetpb.Workspace_RUNNING))
		}
	}
	var updates []*tailnetpb.WorkspaceUpdate
	for _, u := range []*tailnetpb.WorkspaceUpdate{gone, come} {
		slices.SortFunc(u.DeletedAgents, compareID[*tailnetpb.Agent])
		slices.SortFunc(u.UpsertedAgents, compareID[*tailnetpb.Agent])
		slices.SortFunc(u.DeletedWorkspaces, compareID[*tailnetpb.Workspace])
		slices.SortFunc(u.UpsertedWorkspaces, compareID[*tailnetpb.Workspace])
	}
	if len(gone.DeletedAgents) > 0 {
		updates = append(updates, gone)
	}
	if from == nil || len(come.UpsertedAgents) > 0 {
		updates = append(updates, come)
	}
	return updates
}

func compareID[T interface{ GetId() []byte }](a, b T) int { return bytes.Compare(a.GetId(), b.GetId()) }

func agentProto(id uuid.UUID, m member) *tailnetpb.Agent {
	return &tailnetpb.Agent{Id: id[:], Name: m.name, WorkspaceId: m.workspace[:]}
}

func workspaceProto(id uuid.UUID, m member, status tailnetpb.Workspace_Status) *tailnetpb.Workspace {
	return &tailnetpb.Workspace{Id: id[:], Name: m.name, Status: status}
}
