package control

import (
	"net/http"

	"github.com/berthd/berth/control/store"
)

func (s *Server) getAgent(w http.ResponseWriter, r *http.Request, a store.Agent) {
	view, err := s.viewAgent(r.Context(), a)
	if err == nil {
		view.Latency, err = s.latency(s.coordinator.Node(a.ID))
	}
	if err != nil {
		writeError(w, internalError(err))
		return
	}
	writeJSON(w, http.StatusOK, view)
}
