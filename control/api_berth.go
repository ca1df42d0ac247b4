package control

import (
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"time"

	"github.com/google/uuid"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
)

// namePattern is what agents and apps may be called: it fits host names, and nothing in it needs
// quoting anywhere.
var namePattern = regexp.MustCompile(`^[A-Za-z0-9](-?[A-Za-z0-9])*$`)

// maxName is the longest label of a host name.
const maxName = 63

func validName(name string) bool { return len(name) <= maxName && namePattern.MatchString(name) }

func (s *Server) getBerthAgents(w http.ResponseWriter, r *http.Request) {
	agents, err := s.store.Agents(r.Context())
	if err != nil {
		writeError(w, internalError(err))
		return
	}
	states, err := s.store.States(r.Context())
	if err != nil {
		writeError(w, internalError(err))
		return
	}
	names := make(map[uuid.UUID]string, len(agents))
	for _, a := range agents {
		names[a.ID] = a.Name
	}
	now := time.Now()
	rows := make([]wire.AgentSummary, 0, len(agents))
	for _, a := range agents {
		st := s.links.seen(a.ID, states[a.ID])
		row := wire.AgentSummary{
			ID: a.ID, Name: a.Name, Status: status(a, st, now), LifecycleState: lifecycle(st),
			Version: st.Version, CreatedAt: a.CreatedAt, LastSeenAt: st.LastConnectedAt,
		}
		if a.IsSubAgent() {
			row.Name = names[a.ParentID] + "." + a.Name
		}
		if a.Instance != nil {
			row.InstanceID = a.Instance.ID
		}
		rows = append(rows, row)
	}
	writeJSON(w, http.StatusOK, rows)
}

func (s *Server) postBerthAgent(w http.ResponseWriter, r *http.Request) {
	var req wire.CreateAgent
	if !readJSON(w, r, wire.MaxJSONBody, &req) {
		return
	}
	if e := required("name", req.Name); e != nil {
		writeError(w, e)
		return
	}
	if !validName(req.Name) {
		writeError(w, &wire.Error{StatusCode: http.StatusBadRequest, Message: "Validation failed.", Validations: []wire.Validation{{
			Field: "name", Detail: fmt.Sprintf("An agent is named by letters and digits with single dashes between, at most %d.", maxName)}}})
		return
	}
	now := time.Now().UTC()
	agent := store.Agent{ID: uuid.New(), Name: req.Name, CreatedAt: now, UpdatedAt: now}
	switch err := s.store.CreateAgent(r.Context(), agent); {
	case errors.Is(err, store.ErrExists):
		writeError(w, &wire.Error{StatusCode: http.StatusConflict, Message: fmt.Sprintf("An agent named %q already exists.", req.Name)})
		return
	case err != nil:
		writeError(w, internalError(err))
		return
	}
	s.answerToken(w, r, agent, http.StatusCreated)
}

// postBerthToken makes another token for an agent, for one that the configuration file declares.
func (s *Server) postBerthToken(w http.ResponseWriter, r *http.Request, a store.Agent) {
	s.answerToken(w, r, a, http.StatusCreated)
}

func (s *Server) answerToken(w http.ResponseWriter, r *http.Request, a store.Agent, status int) {
	token, err := s.store.MintToken(r.Context(), a.ID, false)
	if err != nil {
		writeError(w, internalError(err))
		return
	}
	writeJSON(w, status, wire.CreatedAgent{ID: a.ID, Name: a.Name, Token: token.Reveal()})
}

// postBerthRevoke ends every token of an agent, and with them its link, on whichever server it is.
func (s *Server) postBerthRevoke(w http.ResponseWriter, r *http.Request, a store.Agent) {
	if err := s.store.RevokeTokens(r.Context(), a.ID); err != nil {
		writeError(w, internalError(err))
		return
	}
	s.log.Info("revoked the tokens of an agent", "agent", a.Name)
	w.WriteHeader(http.StatusNoContent)
}

func (s *Server) deleteBerthAgent(w http.ResponseWriter, r *http.Request, a store.Agent) {
	if a.FromFile {
		writeError(w, &wire.Error{StatusCode: http.StatusConflict, Message: fmt.Sprintf("Agent %q is declared in the configuration file; remove it there.", a.Name)})
		return
	}
	if err := s.store.DeleteAgent(r.Context(), a.ID); err != nil && !errors.Is(err, store.ErrNotFound) {
		writeError(w, internalError(err))
		return
	}
	s.log.Info("deleted an agent", "agent", a.Name)
	w.WriteHeader(http.StatusNoContent)
}
