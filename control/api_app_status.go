package control

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
)

func (s *Server) patchAppStatus(w http.ResponseWriter, r *http.Request, agent caller) {
	var req wire.PatchAppStatus
	if !readJSON(w, r, wire.MaxJSONBody, &req) {
		return
	}
	known := slices.Contains(slices.Collect(maps.Values(appStates)), req.State)
	if e := s.addAppStatus(r.Context(), agent.Agent, req, known); e != nil {
		writeError(w, e)
		return
	}
	writeJSON(w, http.StatusOK, nil)
}

// addAppStatus checks and stores what an app says of itself; over HTTP and RPC alike.
func (s *Server) addAppStatus(ctx context.Context, a store.Agent, req wire.PatchAppStatus, known bool) *wire.Error {
	bad := func(message, detail string, v ...wire.Validation) *wire.Error {
		return &wire.Error{StatusCode: http.StatusBadRequest, Message: message, Detail: detail, Validations: v}
	}
	if !known {
		return bad("Failed to parse request.", "Invalid state: "+short(req.State))
	}
	if len(req.Message) > wire.MaxAppStatusMessage {
		detail := fmt.Sprintf("Message must be less than %d characters.", wire.MaxAppStatusMessage)
		return bad("Message is too long.", detail, wire.Validation{Field: "message", Detail: detail})
	}
	i := slices.IndexFunc(a.Apps, func(app store.App) bool { return app.Slug == req.AppSlug })
	if i < 0 {
		return bad("Failed to get workspace app.", fmt.Sprintf("No app found with slug %q", short(req.AppSlug)))
	}
	err := s.store.AddAppStatus(ctx, wire.AppStatus{
		ID: uuid.New(), CreatedAt: time.Now().UTC(), WorkspaceID: a.WorkspaceID(), AgentID: a.ID, AppID: a.Apps[i].ID,
		State: req.State, Message: statusText(req.Message), URI: statusURI(req.URI),
	})
	if err != nil {
		return &wire.Error{StatusCode: http.StatusInternalServerError, Message: "Failed to insert workspace app status.", Detail: err.Error()}
	}
	return nil
}
