package control

import (
	"fmt"
	"net/http"
	"strings"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/identity/attest"
	"github.com/berthd/berth/wire"
)

// maxIdentityBody bounds a body that anybody may send; documents and signatures are a few KiB.
const maxIdentityBody = 64 << 10

func (s *Server) postAWSInstanceIdentity(w http.ResponseWriter, r *http.Request) {
	var req wire.AWSInstanceIdentity
	if !readJSON(w, r, maxIdentityBody, &req) {
		return
	}
	if e := required("signature", req.Signature, "document", req.Document); e != nil {
		writeError(w, e)
		return
	}
	instance, err := s.config.AWS.Verify(req.Signature, req.Document)
	if err != nil {
		writeError(w, &wire.Error{StatusCode: http.StatusUnauthorized, Message: "Invalid AWS identity.", Detail: err.Error()})
		return
	}
	s.exchange(w, r, instance, strings.TrimSpace(req.AgentName))
}

// exchange gives a machine that proved what it is a fresh token for its agent. A machine whose
// account or region is not the declared one is as unknown as one that nobody declared.
func (s *Server) exchange(w http.ResponseWriter, r *http.Request, instance attest.Instance, name string) {
	agents, err := s.store.AgentsOfInstance(r.Context(), instance.Provider, instance.ID)
	if err != nil {
		writeError(w, &wire.Error{StatusCode: http.StatusInternalServerError, Message: "Internal error fetching workspace agent.", Detail: err.Error()})
		return
	}
	agent, e := choose(agents, instance, name)
	if e != nil {
		s.log.Info("refused a machine", "provider", instance.Provider, "instance", instance.ID,
			"account", instance.Account, "region", instance.Region, "name", name, "answer", e.Message)
		writeError(w, e)
		return
	}
	token, err := s.store.MintToken(r.Context(), agent.ID, true)
	if err != nil {
		writeError(w, &wire.Error{StatusCode: http.StatusInternalServerError, Message: "Internal error fetching workspace agent.", Detail: err.Error()})
		return
	}
	s.log.Info("gave a machine a token", "agent", agent.Name, "provider", instance.Provider, "instance", instance.ID)
	writeJSON(w, http.StatusOK, wire.SessionToken{SessionToken: token.Reveal()})
}

// choose finds the agent of a machine, or the words that say why there is none.
func choose(agents []store.Agent, instance attest.Instance, name string) (store.Agent, *wire.Error) {
	var fit []store.Agent
	var names []string
	for _, a := range agents {
		declared := a.Instance
		if declared.Account != "" && declared.Account != instance.Account || declared.Region != "" && declared.Region != instance.Region {
			continue
		}
		names = append(names, a.Name)
		if name == "" || a.Name == name {
			fit = append(fit, a)
		}
	}
	switch {
	case len(names) == 0:
		return store.Agent{}, &wire.Error{StatusCode: http.StatusNotFound, Message: fmt.Sprintf("Instance with id %q not found.", instance.ID)}
	case len(fit) == 0:
		return store.Agent{}, &wire.Error{StatusCode: http.StatusNotFound, Message: fmt.Sprintf("No agent found with instance ID %q and name %q.", instance.ID, name)}
	case len(fit) > 1:
		return store.Agent{}, &wire.Error{StatusCode: http.StatusConflict,
			Message: fmt.Sprintf("Multiple agents found with instance ID %q. Set CODER_AGENT_NAME to one of: %s", instance.ID, strings.Join(names, ", "))}
	}
	return fit[0], nil
}
