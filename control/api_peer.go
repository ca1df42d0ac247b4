package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/google/uuid"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
)

// askTimeout bounds a question to an agent, finding the way to it included.
const askTimeout = 30 * time.Second

// unreachable is why no connection to an agent came about.
type unreachable struct{ error }

func (e unreachable) Unwrap() error { return e.error }

// agentURL is where the HTTP API of an agent is, if it is dialled by [peers.client].
func agentURL(scheme string, agent uuid.UUID, path string) string {
	return scheme + "://" + netip.AddrPortFrom(wire.AgentAddr(agent), wire.PortHTTP).String() + path
}

// ask calls the HTTP API of an agent and fills v, unless it is nil, from an answer of the wanted
// status. A failure that the agent reports is returned as the *[wire.Error] that it sent, one of the
// way to it as [unreachable].
func (s *Server) ask(ctx context.Context, agent uuid.UUID, method, path string, status int, v any) error {
	req, err := http.NewRequestWithContext(ctx, method, agentURL("http", agent, path), nil)
	if err != nil {
		return fmt.Errorf("cannot ask the agent: %w", err)
	}
	resp, err := s.peers.client(agent).Do(req)
	if err != nil {
		return plain(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, wire.MaxJSONAnswer+1))
	if err != nil {
		return fmt.Errorf("cannot read the agent's answer: %w", err)
	}
	if len(body) > wire.MaxJSONAnswer {
		return fmt.Errorf("the agent's answer is longer than %d bytes", wire.MaxJSONAnswer)
	}
	if resp.StatusCode != status {
		return agentError(resp.StatusCode, body[:min(len(body), wire.MaxJSONBody)])
	}
	if v == nil {
		return nil
	}
	if err := json.Unmarshal(body, v); err != nil {
		return fmt.Errorf("cannot decode the agent's answer: %w", err)
	}
	return nil
}

// plain drops the URL from an error of an HTTP client: it says nothing that a person here can use.
func plain(err error) error {
	if u := new(url.Error); errors.As(err, &u) {
		return u.Err
	}
	return err
}

// agentError is what an agent answered instead of what it was asked for.
func agentError(status int, body []byte) error {
	if status < 400 || status >= 600 {
		return fmt.Errorf("the agent answered %d", status)
	}
	e := &wire.Error{}
	if json.Unmarshal(body, e) != nil || e.Message == "" {
		e = &wire.Error{Message: "The agent answered with an error.", Detail: short(string(body))}
	}
	e.StatusCode = status
	return e
}

// agentFailure words what came of asking an agent. What the agent itself reports is passed on.
func agentFailure(err error, message string) *wire.Error {
	if e := new(wire.Error); errors.As(err, &e) {
		return e
	}
	return serverFailure(err, message)
}

// serverFailure words what came of asking an agent as a failure of the server.
func serverFailure(err error, message string) *wire.Error {
	if errors.As(err, new(unreachable)) {
		message = "Internal error dialing workspace agent."
	}
	return &wire.Error{StatusCode: http.StatusInternalServerError, Message: message, Detail: err.Error()}
}

// mustBeConnected answers the request and returns false when there is no agent to ask.
func (s *Server) mustBeConnected(w http.ResponseWriter, r *http.Request, a store.Agent) bool {
	now, err := s.status(r.Context(), a)
	switch {
	case err != nil:
		writeError(w, internalError(err))
	case now != wire.AgentConnected:
		writeError(w, &wire.Error{StatusCode: http.StatusBadRequest, Message: notConnected(now)})
	}
	return err == nil && now == wire.AgentConnected
}

func (s *Server) status(ctx context.Context, a store.Agent) (wire.AgentStatus, error) {
	st, err := s.store.State(ctx, a.ID)
	return status(a, s.links.seen(a.ID, st), time.Now()), err
}

func notConnected(now wire.AgentStatus) string {
	return fmt.Sprintf("Agent state is %q, it must be in the %q state.", now, wire.AgentConnected)
}

// hiddenPorts are those of well-known services, which stock clients are not shown: what people look for
// are the programs they started.
var hiddenPorts = []uint16{
	20, 21, 22, 23, 25, 53, 110, 143, 179, 389, 465, 587, 636, 989, 990, 993, 995,
	3306, 3389, 5432, 27017, 27018, 27019, 28017,
}

func (s *Server) getListeningPorts(w http.ResponseWriter, r *http.Request, a store.Agent) {
	if !s.mustBeConnected(w, r, a) {
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), askTimeout)
	defer cancel()
	var found wire.ListeningPorts
	// A stock agent has TCP ports alone, and does not look at the query.
	path := wire.PathAgentPorts + "?" + wire.QueryNetwork + "=" + wire.NetworkAll
	if r.URL.Query().Get(wire.QueryHidden) == "true" {
		path += "&" + wire.QueryHidden + "=true"
	}
	if err := s.ask(ctx, a.ID, http.MethodGet, path, http.StatusOK, &found); err != nil {
		writeError(w, serverFailure(err, "Internal error fetching listening ports."))
		return
	}
	apps, all := appPorts(a), r.URL.Query().Get(wire.QueryNetwork) == wire.NetworkAll
	shown := wire.ListeningPorts{Ports: []wire.ListeningPort{}, Source: found.Source}
	for _, p := range found.Ports {
		switch {
		case p.Port < wire.FirstUserPort && p.Namespace == 0: // the agent's own, on the mesh
		case all, p.Network == "tcp" && p.Namespace == 0 && !slices.Contains(hiddenPorts, p.Port) && !apps[p.Port]:
			shown.Ports = append(shown.Ports, p)
		}
	}
	writeJSON(w, http.StatusOK, shown)
}

// appPorts are the ports of an agent's apps, which are shown as apps.
func appPorts(a store.Agent) map[uint16]bool {
	ports := make(map[uint16]bool)
	for _, app := range a.Apps {
		u, err := url.Parse(app.URL)
		if err != nil {
			continue
		}
		if port, err := strconv.ParseUint(u.Port(), 10, 16); err == nil {
			ports[uint16(port)] = true
		}
	}
	return ports
}
