package control

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"sync"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

// PushContextState takes what an agent found in its workspace for programs that assist people. Nothing
// here makes use of it, so of an accepted snapshot only what the next is held against is kept.
func (a *agentService) PushContextState(ctx context.Context, req *agentpb.PushContextStateRequest) (*agentpb.PushContextStateResponse, error) {
	if err := checkContext(req); err != nil {
		return nil, err
	}
	err := a.store.UpdateContext(ctx, a.id, func(kept *store.ContextState) error {
		if !req.GetInitial() && req.GetVersion() <= kept.Version {
			return errUnchanged
		}
		*kept = store.ContextState{Version: req.GetVersion(), Hash: req.GetAggregateHash(), Resources: len(req.GetResources())}
		return nil
	})
	if errors.Is(err, errUnchanged) {
		return &agentpb.PushContextStateResponse{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot keep the context: %w", err)
	}
	return &agentpb.PushContextStateResponse{Accepted: true}, nil
}

// checkContext holds a snapshot to the limits of the protocol.
func checkContext(req *agentpb.PushContextStateRequest) error {
	if n := len(req.GetResources()); n > wire.MaxContextResources {
		return fmt.Errorf("%d resources exceed %d", n, wire.MaxContextResources)
	}
	if n := len(req.GetAggregateHash()); n > wire.MaxContextHash {
		return fmt.Errorf("aggregate_hash of %d bytes exceeds %d bytes", n, wire.MaxContextHash)
	}
	seen := make(map[string]bool, len(req.GetResources()))
	total := 0
	for i, r := range req.GetResources() {
		size, ok := contextBody(r)
		total += size
		wrong := ""
		switch {
		case r.GetSource() == "":
			wrong = "source is required"
		case len(r.GetSource()) > wire.MaxContextSource:
			wrong = fmt.Sprintf("source of %d bytes exceeds %d bytes", len(r.GetSource()), wire.MaxContextSource)
		case seen[r.GetSource()]:
			wrong = fmt.Sprintf("source %q is there twice", short(r.GetSource()))
		case len(r.GetError()) > wire.MaxContextError:
			wrong = fmt.Sprintf("error of %d bytes exceeds %d bytes", len(r.GetError()), wire.MaxContextError)
		case len(r.GetContentHash()) > wire.MaxContextHash:
			wrong = fmt.Sprintf("content_hash of %d bytes exceeds %d bytes", len(r.GetContentHash()), wire.MaxContextHash)
		case r.GetStatus() == agentpb.ContextResource_STATUS_UNSPECIFIED:
			wrong = "status is required"
		case !ok:
			wrong = "body is required"
		case size > wire.MaxContextBody:
			wrong = fmt.Sprintf("body of %d bytes exceeds %d bytes", size, wire.MaxContextBody)
		case total > wire.MaxContextBodies:
			wrong = fmt.Sprintf("bodies so far of %d bytes exceed %d bytes", total, wire.MaxContextBodies)
		}
		if wrong != "" {
			return fmt.Errorf("resource %d: %s", i, wrong)
		}
		seen[r.GetSource()] = true
	}
	return nil
}

// contextBody returns how long the body of a resource is, and whether it has one.
func contextBody(r *agentpb.ContextResource) (size int, ok bool) {
	switch body := r.GetBody().(type) {
	case *agentpb.ContextResource_InstructionFile:
		return len(body.InstructionFile.GetContent()), true
	case *agentpb.ContextResource_Skill:
		return len(body.Skill.GetMeta()), true
	case *agentpb.ContextResource_McpConfig:
		return 0, true
	case *agentpb.ContextResource_McpServer:
		return proto.Size(body.McpServer), true
	}
	return 0, false
}

// boundary bounds what one agent may have written to the server's log: [wire.MaxBoundaryLogs] lines each
// boundaryPause. Its zero value is ready for use.
type boundary struct {
	mu    sync.Mutex
	begun time.Time
	lines int
}

// boundaryPause lets a confined program that is busy be seen, and none fill the disk.
const boundaryPause = 10 * time.Second

// take returns how many of n lines may be written now.
func (b *boundary) take(n int, now time.Time) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	if now.Sub(b.begun) >= boundaryPause {
		b.begun, b.lines = now, 0
	}
	n = min(n, wire.MaxBoundaryLogs-b.lines)
	b.lines += n
	return n
}

// ReportBoundaryLogs writes to the server's log what confined programs asked for. A URL is written
// without what may be a credential: its user, query and fragment.
func (a *agentService) ReportBoundaryLogs(_ context.Context, req *agentpb.ReportBoundaryLogsRequest) (*agentpb.ReportBoundaryLogsResponse, error) {
	if n := len(req.GetLogs()); n > wire.MaxBoundaryLogs {
		return nil, fmt.Errorf("%d boundary logs exceed %d", n, wire.MaxBoundaryLogs)
	}
	log := a.log.With("agent", a.id)
	if session, err := uuid.Parse(req.GetSessionId()); err == nil {
		log = log.With("session", session)
	}
	if name := req.GetConfinedProcessName(); name != "" {
		log = log.With("process", logText(short(name)))
	}
	entries := req.GetLogs()
	if n := a.boundary.take(len(entries), time.Now()); n < len(entries) {
		log.Warn("left out requests of confined programs: there are too many", "requests", len(entries)-n)
		entries = entries[:n]
	}
	for _, entry := range entries {
		request := entry.GetHttpRequest()
		if request == nil {
			continue // of a kind that is not known here
		}
		log.Info("a confined program made a request", "allowed", entry.GetAllowed(), "at", entry.GetTime().AsTime(),
			"sequence", entry.GetSequenceNumber(), "method", logText(short(request.GetMethod())), "url", plainURL(request.GetUrl()),
			"rule", logText(short(request.GetMatchedRule())))
	}
	return &agentpb.ReportBoundaryLogsResponse{}, nil
}

// plainURL is a URL without what may be a credential.
func plainURL(text string) string {
	u, err := url.Parse(text)
	if err != nil || u.Opaque != "" {
		return "unreadable"
	}
	u.User, u.RawQuery, u.ForceQuery, u.Fragment, u.RawFragment = nil, "", false, "", ""
	return logText(short(u.String()))
}
