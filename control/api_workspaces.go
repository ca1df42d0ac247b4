package control

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
)

// What stock clients want to know on their way to an agent. Each agent that no other one made is a
// workspace of the one owner, built once from the one template, and runs.

// The names of what there is one of.
const (
	organizationName = "berth"
	templateName     = "agent"
	versionName      = "declared"
)

// derived is the id of something that the deployment has one of, or one for each agent.
func (s *Server) derived(kind string, of uuid.UUID) uuid.UUID {
	return uuid.NewSHA1(s.id, []byte(kind+":"+of.String()))
}

func (s *Server) organizationID() uuid.UUID { return s.derived("organization", s.id) }
func (s *Server) versionID() uuid.UUID      { return s.derived("template version", s.id) }
func (s *Server) templateID() uuid.UUID     { return s.derived("template", s.id) }

func noResource() *wire.Error {
	return &wire.Error{StatusCode: http.StatusNotFound, Message: "Resource not found or you do not have access to this resource"}
}

// job is work that was done when what it is for was declared.
func (s *Server) job(of uuid.UUID, at time.Time) wire.Job {
	return wire.Job{ID: s.derived("job", of), CreatedAt: at, StartedAt: at, CompletedAt: at, Status: "succeeded", Tags: map[string]string{}}
}

// workspace is an agent and its sub-agents as clients know workspaces.
func (s *Server) workspace(ctx context.Context, a store.Agent) (wire.Workspace, error) {
	members, err := s.store.SubAgents(ctx, a.ID)
	if err != nil {
		return wire.Workspace{}, err
	}
	st, err := s.store.State(ctx, a.ID)
	if err != nil {
		return wire.Workspace{}, err
	}
	agents, failing := []wire.Agent{}, []uuid.UUID{}
	for _, member := range append([]store.Agent{a}, members...) {
		view, err := s.viewAgent(ctx, member)
		if err != nil {
			return wire.Workspace{}, err
		}
		agents = append(agents, view)
		if !view.Health.Healthy {
			failing = append(failing, member.ID)
		}
	}
	used := a.CreatedAt
	if st.LastUsedAt != nil {
		used = *st.LastUsedAt
	}
	job := s.job(a.ID, a.CreatedAt)
	return wire.Workspace{
		ID: a.ID, CreatedAt: a.CreatedAt, UpdatedAt: a.UpdatedAt, Name: a.Name, OwnerID: s.ownerID(), OwnerName: owner,
		OrganizationID: s.organizationID(), OrganizationName: organizationName,
		TemplateID: s.templateID(), TemplateName: templateName, TemplateDisplayName: templateName, TemplateActiveVersionID: s.versionID(),
		LastUsedAt: used, Health: wire.WorkspaceHealth{Healthy: len(failing) == 0, FailingAgents: failing}, AutomaticUpdates: "never",
		LatestBuild: wire.WorkspaceBuild{
			ID: s.derived("build", a.ID), CreatedAt: a.CreatedAt, UpdatedAt: a.UpdatedAt,
			WorkspaceID: a.ID, WorkspaceName: a.Name, WorkspaceOwnerID: s.ownerID(), WorkspaceOwnerName: owner,
			TemplateVersionID: s.versionID(), TemplateVersionName: versionName, BuildNumber: 1, Transition: "start",
			InitiatorID: s.ownerID(), InitiatorName: owner, Reason: "initiator", Status: "running", Job: job,
			Resources: []wire.WorkspaceResource{{
				ID: a.WorkspaceID(), CreatedAt: a.CreatedAt, JobID: job.ID, WorkspaceTransition: "start",
				Type: "berth_agent", Name: a.Name, Agents: agents,
			}},
		},
	}, nil
}

// onWorkspace lets people in and finds the workspace that the path names by its id.
func (s *Server) onWorkspace(next func(http.ResponseWriter, *http.Request, store.Agent)) guarded {
	return s.forUser(func(w http.ResponseWriter, r *http.Request) {
		id, ok := pathUUID(w, r, "id")
		if !ok {
			return
		}
		a, err := s.store.Agent(r.Context(), id)
		if err == nil && a.IsSubAgent() {
			err = store.ErrNotFound
		}
		s.found(w, r, a, err, next)
	})
}

// found goes on with a workspace, or says why there is none.
func (s *Server) found(w http.ResponseWriter, r *http.Request, a store.Agent, err error, next func(http.ResponseWriter, *http.Request, store.Agent)) {
	switch {
	case errors.Is(err, store.ErrNotFound):
		writeError(w, noResource())
	case err != nil:
		writeError(w, internalError(err))
	default:
		next(w, r, a)
	}
}

func (s *Server) getWorkspace(w http.ResponseWriter, r *http.Request, a store.Agent) {
	view, err := s.workspace(r.Context(), a)
	if err != nil {
		writeError(w, internalError(err))
		return
	}
	writeJSON(w, http.StatusOK, view)
}

// isOwner tells whether a path or a search means the one owner.
func (s *Server) isOwner(name string) bool {
	return name == "me" || strings.EqualFold(name, owner) || name == s.ownerID().String()
}

func (s *Server) getUserWorkspace(w http.ResponseWriter, r *http.Request) {
	a, err := store.Agent{}, error(store.ErrNotFound)
	if s.isOwner(r.PathValue("user")) {
		a, err = s.store.AgentByName(r.Context(), r.PathValue("name"))
	}
	s.found(w, r, a, err, s.getWorkspace)
}

// search is which workspaces a query of the list asks for.
type search struct {
	owner, contains string
	offset, limit   int
}

// maxWorkspaces is how many a list holds at most: each is looked up by itself.
const maxWorkspaces = 1000

// parseSearch reads a query of the list: q holds words, "key:value" or a part of a name or of owner/name.
func parseSearch(query url.Values) (search, *wire.Error) {
	found := search{limit: maxWorkspaces}
	invalid := &wire.Error{StatusCode: http.StatusBadRequest, Message: "Invalid workspace search query."}
	reject := func(field, detail string) {
		invalid.Validations = append(invalid.Validations, wire.Validation{Field: field, Detail: detail})
	}
	for _, word := range strings.Fields(query.Get("q")) {
		key, value, ok := strings.Cut(word, ":")
		value = strings.Trim(value, `"`)
		switch {
		case !ok:
			found.contains = word
			if user, name, ok := strings.Cut(word, "/"); ok {
				found.owner, found.contains = user, name
			}
		case key == "owner":
			found.owner = value
		case key == "name":
			found.contains = value
		case key == "status" && value == "running":
		default:
			reject("q", fmt.Sprintf("%q is no filter here: owner, name and status:running are", short(word)))
		}
	}
	number := func(field string, into *int) {
		if text := query.Get(field); text != "" {
			n, err := strconv.ParseUint(text, 10, 31)
			if err != nil {
				reject(field, fmt.Sprintf("Query param %q must be a number from 0", field))
			}
			*into = int(n)
		}
	}
	number("offset", &found.offset)
	number("limit", &found.limit)
	if found.limit == 0 || found.limit > maxWorkspaces {
		found.limit = maxWorkspaces
	}
	if len(invalid.Validations) > 0 {
		return search{}, invalid
	}
	return found, nil
}

func (s *Server) getWorkspaces(w http.ResponseWriter, r *http.Request) {
	wanted, e := parseSearch(r.URL.Query())
	if e != nil {
		writeError(w, e)
		return
	}
	all, err := s.store.Agents(r.Context())
	if err != nil {
		writeError(w, internalError(err))
		return
	}
	all = slices.DeleteFunc(all, func(a store.Agent) bool {
		return a.IsSubAgent() || wanted.owner != "" && !s.isOwner(wanted.owner) ||
			!strings.Contains(strings.ToLower(a.Name), strings.ToLower(wanted.contains))
	})
	list := wire.Workspaces{Workspaces: []wire.Workspace{}, Count: len(all)}
	from := min(wanted.offset, len(all))
	for _, a := range all[from:min(from+wanted.limit, len(all))] {
		view, err := s.workspace(r.Context(), a)
		if err != nil {
			writeError(w, internalError(err))
			return
		}
		list.Workspaces = append(list.Workspaces, view)
	}
	writeJSON(w, http.StatusOK, list)
}

// workspacePace is how often a workspace that is watched is looked at.
const workspacePace = 2 * time.Second

// watchWorkspace tells of a workspace, and at last that it is gone: sessions in it end by that.
func (s *Server) watchWorkspace(id uuid.UUID) watch[wire.Workspace] {
	var last *wire.Workspace
	return watch[wire.Workspace]{
		pace: workspacePace,
		show: func(v wire.Workspace) any { return v },
		read: func(ctx context.Context) (wire.Workspace, error) {
			a, err := s.store.Agent(ctx, id)
			if errors.Is(err, store.ErrNotFound) && last != nil {
				gone := *last
				last = nil
				gone.LatestBuild.Transition, gone.LatestBuild.Status = "delete", "deleted"
				return gone, nil
			}
			if err != nil {
				return wire.Workspace{}, err
			}
			view, err := s.workspace(ctx, a)
			if err == nil {
				last = &view
			}
			return view, err
		},
	}
}

func (s *Server) getWatchWorkspace(w http.ResponseWriter, r *http.Request, a store.Agent) {
	sendWatch(s, w, r, s.watchWorkspace(a.ID))
}

func (s *Server) getWatchWorkspaceSocket(w http.ResponseWriter, r *http.Request, a store.Agent) {
	sendWatchSocket(s, w, r, s.watchWorkspace(a.ID))
}

// usedBy are the programs by which people use workspaces.
var usedBy = []string{"ssh", "vscode", "jetbrains", "reconnecting-pty"}

// postWorkspaceUsage notes that somebody uses a workspace. Older clients say so without saying how.
func (s *Server) postWorkspaceUsage(w http.ResponseWriter, r *http.Request, a store.Agent) {
	if r.ContentLength != 0 {
		var req wire.WorkspaceUsage
		if !readJSON(w, r, wire.MaxJSONBody, &req) {
			return
		}
		if e := s.checkUsage(r.Context(), a, req); e != nil {
			writeError(w, e)
			return
		}
	}
	if err := s.noteUse(r.Context(), a.ID); err != nil {
		writeError(w, internalError(err))
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// noteUse notes that a workspace is used now.
func (s *Server) noteUse(ctx context.Context, workspace uuid.UUID) error {
	now := time.Now().UTC()
	return s.store.UpdateState(ctx, workspace, func(st *store.State) error {
		st.LastUsedAt = &now
		return nil
	})
}

func (s *Server) checkUsage(ctx context.Context, a store.Agent, req wire.WorkspaceUsage) *wire.Error {
	if req == (wire.WorkspaceUsage{}) {
		return nil
	}
	invalid := &wire.Error{StatusCode: http.StatusBadRequest, Message: "Validation failed."}
	if !slices.Contains(usedBy, req.AppName) {
		invalid.Validations = append(invalid.Validations, wire.Validation{Field: "app_name", Detail: fmt.Sprintf("Must be one of %s, not %q", strings.Join(usedBy, ", "), short(req.AppName))})
	}
	member, err := s.store.Agent(ctx, req.AgentID)
	switch {
	case err == nil && member.WorkspaceID() == a.ID:
	case err == nil || errors.Is(err, store.ErrNotFound):
		invalid.Validations = append(invalid.Validations, wire.Validation{Field: "agent_id", Detail: "The workspace has no such agent"})
	default:
		return internalError(err)
	}
	if len(invalid.Validations) > 0 {
		return invalid
	}
	return nil
}
