package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/coder/websocket"
	"github.com/google/uuid"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
)

// askTimeout bounds a question to an agent, finding the way to it included.
const askTimeout = 30 * time.Second

// ask puts a question to the HTTP API of an agent. The answer's body is read; v is filled from a 200.
// An answer of any other status is returned as the error that the agent sent.
func (s *Server) ask(ctx context.Context, agent uuid.UUID, path string, v any) error {
	host := netip.AddrPortFrom(wire.AgentAddr(agent), wire.PortHTTP).String()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+host+path, nil)
	if err != nil {
		return fmt.Errorf("cannot ask the agent: %w", err)
	}
	resp, err := s.peers.client(agent).Do(req)
	if err != nil {
		// The URL says nothing that a person here can use.
		if u := new(url.Error); errors.As(err, &u) {
			err = u.Err
		}
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, wire.MaxJSONAnswer+1))
	if err != nil {
		return fmt.Errorf("cannot read the agent's answer: %w", err)
	}
	if len(body) > wire.MaxJSONAnswer {
		return fmt.Errorf("the agent's answer is longer than %d bytes", wire.MaxJSONAnswer)
	}
	switch {
	case resp.StatusCode >= 400 && resp.StatusCode < 600:
		e := &wire.Error{}
		if json.Unmarshal(body, e) != nil || e.Message == "" {
			e = &wire.Error{Message: "The agent answered with an error.", Detail: short(string(body))}
		}
		e.StatusCode = resp.StatusCode
		return e
	case resp.StatusCode != http.StatusOK:
		return fmt.Errorf("the agent answered %d", resp.StatusCode)
	}
	if err := json.Unmarshal(body, v); err != nil {
		return fmt.Errorf("cannot decode the agent's answer: %w", err)
	}
	return nil
}

// mustBeConnected answers the request and returns false when there is no agent to ask.
func (s *Server) mustBeConnected(w http.ResponseWriter, r *http.Request, a store.Agent) bool {
	st, err := s.store.State(r.Context(), a.ID)
	if err != nil {
		writeError(w, internalError(err))
		return false
	}
	if now := status(a, s.links.seen(a.ID, st), time.Now()); now != wire.AgentConnected {
		writeError(w, &wire.Error{StatusCode: http.StatusBadRequest,
			Message: fmt.Sprintf("Agent state is %q, it must be in the %q state.", now, wire.AgentConnected)})
		return false
	}
	return true
}

// hiddenPorts are those of well-known services: what people look for are the programs they started.
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
	if err := s.ask(ctx, a.ID, "/api/v0/listening-ports", &found); err != nil {
		message := "Internal error fetching listening ports."
		if e := new(wire.Error); !errors.As(err, &e) {
			message = "Internal error dialing workspace agent."
		}
		writeError(w, &wire.Error{StatusCode: http.StatusInternalServerError, Message: message, Detail: err.Error()})
		return
	}
	apps := appPorts(a)
	shown := wire.ListeningPorts{Ports: []wire.ListeningPort{}}
	for _, p := range found.Ports {
		if p.Port >= wire.FirstUserPort && !slices.Contains(hiddenPorts, p.Port) && !apps[p.Port] {
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

func (s *Server) getContainers(w http.ResponseWriter, r *http.Request, a store.Agent) {
	labels := make(map[string]string)
	for _, label := range r.URL.Query()["label"] {
		parts := strings.Split(label, "=")
		if len(parts) != 2 {
			writeError(w, &wire.Error{StatusCode: http.StatusBadRequest, Message: "Invalid label format", Detail: "Labels must be in the format key=value"})
			return
		}
		labels[parts[0]] = parts[1]
	}
	if !s.mustBeConnected(w, r, a) {
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), askTimeout)
	defer cancel()
	var found wire.Containers
	if err := s.ask(ctx, a.ID, "/api/v0/containers", &found); err != nil {
		e := new(wire.Error)
		switch {
		case errors.As(err, &e):
			writeError(w, e)
		case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
			writeError(w, &wire.Error{StatusCode: http.StatusRequestTimeout, Message: "Failed to fetch containers from agent.", Detail: "Request timed out."})
		default:
			writeError(w, &wire.Error{StatusCode: http.StatusInternalServerError, Message: "Internal error fetching containers.", Detail: err.Error()})
		}
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

// getPTY splices a terminal of an agent to a WebSocket: what the person's side sends is what the
// agent's port takes, after one frame that says which terminal.
func (s *Server) getPTY(w http.ResponseWriter, r *http.Request, a store.Agent) {
	query := r.URL.Query()
	invalid := &wire.Error{StatusCode: http.StatusBadRequest, Message: "Invalid query parameters."}
	reject := func(field, detail string) {
		invalid.Validations = append(invalid.Validations, wire.Validation{Field: field, Detail: detail})
	}
	size := func(field string) uint16 {
		text := query.Get(field)
		if text == "" {
			return 80
		}
		n, err := strconv.ParseUint(text, 10, 16)
		if err != nil {
			reject(field, fmt.Sprintf("Query param %q must be a number from 0 to %d", field, math.MaxUint16))
		}
		return uint16(n)
	}
	init := wire.PTYInit{
		Height: size("height"), Width: size("width"), Command: query.Get("command"),
		Container: query.Get("container"), ContainerUser: query.Get("container_user"), BackendType: query.Get("backend_type"),
	}
	var err error
	if init.ID, err = uuid.Parse(query.Get("reconnect")); err != nil || init.ID == uuid.Nil {
		reject("reconnect", `Query param "reconnect" must be a valid uuid`)
	}
	switch init.BackendType {
	case "", "screen", "buffered":
	default:
		reject("backend_type", `Query param "backend_type" must be "screen" or "buffered"`)
	}
	if len(invalid.Validations) > 0 {
		writeError(w, invalid)
		return
	}
	if !s.mustBeConnected(w, r, a) {
		return
	}
	ctx, done := s.lasting(r)
	defer done()
	conn := s.accept(w, r)
	if conn == nil {
		return
	}
	defer conn.CloseNow()
	dial, cancel := context.WithTimeout(ctx, askTimeout)
	term, err := s.peers.dial(dial, a.ID, wire.PortPTY)
	cancel()
	if err != nil {
		s.failSocket(conn, "dial workspace agent: "+err.Error())
		return
	}
	defer term.Close()
	if err := wire.WritePTYInit(term, init); err != nil {
		s.failSocket(conn, "dial: "+err.Error())
		return
	}
	s.splice(ctx, conn, term)
}

// splice copies both ways until either side or ctx ends, and closes both.
func (s *Server) splice(ctx context.Context, conn *websocket.Conn, peer net.Conn) {
	ctx, end := context.WithCancel(ctx)
	defer end()
	web := s.byteStream(conn)
	s.active.Go(func() { keepAlive(ctx, conn) })
	ended := make(chan struct{}, 2)
	for _, way := range []struct{ to, from net.Conn }{{peer, web}, {web, peer}} {
		s.active.Go(func() {
			_, _ = io.Copy(way.to, way.from) // however it ended, the terminal lives on
			ended <- struct{}{}
		})
	}
	select {
	case <-ended:
	case <-ctx.Done():
	}
	peer.Close()
	_ = web.Close() // the other side may be gone already
}
