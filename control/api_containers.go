package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/coder/websocket"
	"github.com/google/uuid"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
)

// parseLabels reads the label parameters of a query, or returns what is wrong with them.
func parseLabels(query url.Values) (map[string]string, *wire.Error) {
	labels := make(map[string]string)
	for _, label := range query["label"] {
		parts := strings.Split(label, "=")
		if len(parts) != 2 {
			return nil, &wire.Error{StatusCode: http.StatusBadRequest, Message: "Invalid label format", Detail: "Labels must be in the format key=value"}
		}
		labels[parts[0]] = parts[1]
	}
	return labels, nil
}

func (s *Server) getContainers(w http.ResponseWriter, r *http.Request, a store.Agent) {
	labels, e := parseLabels(r.URL.Query())
	if e != nil {
		writeError(w, e)
		return
	}
	if !s.mustBeConnected(w, r, a) {
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), askTimeout)
	defer cancel()
	var found wire.Containers
	if err := s.ask(ctx, a.ID, http.MethodGet, wire.PathAgentContainers, http.StatusOK, &found); err != nil {
		if ctx.Err() != nil && !errors.As(err, new(unreachable)) {
			writeError(w, &wire.Error{StatusCode: http.StatusRequestTimeout, Message: "Failed to fetch containers from agent.", Detail: "Request timed out."})
			return
		}
		writeError(w, agentFailure(err, "Internal error fetching containers."))
		return
	}
	found.Containers = slices.DeleteFunc(found.Containers, func(c wire.Container) bool {
		for key, value := range labels {
			if got, ok := c.Labels[key]; !ok || got != value {
				return true
			}
		}
		return false
	})
	if found.Containers == nil {
		found.Containers = []wire.Container{}
	}
	writeJSON(w, http.StatusOK, found)
}

// getContainersWatch passes on what the agent says of its containers whenever they change.
func (s *Server) getContainersWatch(w http.ResponseWriter, r *http.Request, a store.Agent) {
	if !s.mustBeConnected(w, r, a) {
		return
	}
	agent, err := s.watchContainers(r.Context(), a.ID)
	if err != nil {
		writeError(w, serverFailure(err, "Internal error watching agent's containers."))
		return
	}
	defer agent.CloseNow()
	s.sendMessages(w, r, func(ctx context.Context, send func(any) error) error {
		ctx, end := context.WithCancel(ctx)
		defer end()
		s.active.Go(func() { keepAlive(ctx, agent) })
		for {
			_, message, err := agent.Read(ctx)
			if ctx.Err() != nil {
				return nil
			}
			if err != nil {
				return fmt.Errorf("lost the agent: %w", err)
			}
			var found wire.Containers
			if err := json.Unmarshal(message, &found); err != nil {
				return fmt.Errorf("cannot decode what the agent says: %w", err)
			}
			if send(found) != nil {
				return nil
			}
		}
	})
}

// watchContainers opens an agent's own watch.
func (s *Server) watchContainers(ctx context.Context, agent uuid.UUID) (*websocket.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	conn, resp, err := websocket.Dial(ctx, agentURL("ws", agent, wire.PathAgentContainers+"/watch"), &websocket.DialOptions{
		HTTPClient: s.peers.client(agent),
		// The only socket on which compression is spoken: lists of containers are long and repeat themselves.
		CompressionMode: websocket.CompressionNoContextTakeover,
	})
	switch {
	case err == nil:
		conn.SetReadLimit(wire.MaxContainersMessage)
		return conn, nil
	case resp == nil || resp.StatusCode == http.StatusSwitchingProtocols:
		return nil, plain(err)
	}
	body, _ := io.ReadAll(resp.Body) // the library kept its beginning
	return nil, agentError(resp.StatusCode, body)
}

func (s *Server) postRecreateDevcontainer(w http.ResponseWriter, r *http.Request, a store.Agent) {
	var answer wire.Error
	if s.changeDevcontainer(w, r, a, "/recreate", http.StatusAccepted, &answer, "Internal error recreating devcontainer.") {
		writeJSON(w, http.StatusAccepted, answer)
	}
}

func (s *Server) deleteDevcontainer(w http.ResponseWriter, r *http.Request, a store.Agent) {
	if s.changeDevcontainer(w, r, a, "", http.StatusNoContent, nil, "Internal error deleting devcontainer.") {
		w.WriteHeader(http.StatusNoContent)
	}
}

// changeDevcontainer has an agent do what the request asks of a development container, or answers the
// request with why not and returns false.
func (s *Server) changeDevcontainer(w http.ResponseWriter, r *http.Request, a store.Agent, what string, status int, answer any, failure string) bool {
	id, ok := pathUUID(w, r, "dc")
	if !ok || !s.mustBeConnected(w, r, a) {
		return false
	}
	ctx, cancel := context.WithTimeout(r.Context(), askTimeout)
	defer cancel()
	err := s.ask(ctx, a.ID, r.Method, wire.PathAgentContainers+"/devcontainers/"+id.String()+what, status, answer)
	if err != nil {
		writeError(w, agentFailure(err, failure))
	}
	return err == nil
}
