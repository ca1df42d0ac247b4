package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime/debug"
	"strings"

	"github.com/google/uuid"
	"storj.io/drpc"
	"storj.io/drpc/drpcmux"

	"github.com/berthd/berth/control/coordinator"
	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
	"github.com/berthd/berth/wire/rpc"
	"github.com/berthd/berth/wire/tailnetpb"
)

// requestedVersion reads the API version a caller asks for, or answers the request and returns false.
func requestedVersion(w http.ResponseWriter, r *http.Request, absent string) (wire.Version, bool) {
	text := r.URL.Query().Get("version")
	if text == "" {
		text = absent
	}
	v, err := wire.ParseVersion(text)
	if err == nil {
		err = v.Accept()
	}
	if err != nil {
		writeError(w, &wire.Error{StatusCode: http.StatusBadRequest, Message: "Unknown or unsupported API version",
			Validations: []wire.Validation{{Field: "version", Detail: err.Error()}}})
		return wire.Version{}, false
	}
	return v, true
}

// getRPC is an agent's link: both services over one WebSocket, until either side ends it, the agent
// stops answering probes, or its token ends.
func (s *Server) getRPC(w http.ResponseWriter, r *http.Request, agent caller) {
	version, ok := requestedVersion(w, r, wire.OldestVersion.String())
	if !ok {
		return
	}
	role := r.URL.Query().Get("role")
	monitored := role == "" || role == "agent"

	ctx, done := s.lasting(r)
	defer done()
	begun, err := s.gate.enter(ctx)
	if err != nil {
		writeBusy(w)
		return
	}
	defer begun()
	conn := s.accept(w, r)
	if conn == nil {
		return
	}
	defer conn.CloseNow()

	ctx, end := context.WithCancel(ctx)
	defer end()
	k := &link{id: uuid.New(), agent: agent.ID, token: agent.tokenHash, end: end, calls: true}
	log := s.log.With("agent", agent.Name, "link", k.id)
	if s.links.add(k) {
		log.Warn("an agent has too many links; its oldest was ended", "most", maxLinks)
	}
	defer s.links.remove(k)
	if monitored {
		if err := s.connected(ctx, k, version); err != nil {
			log.Warn("cannot record that an agent connected", "err", err)
			s.failSocket(conn, err.Error())
			return
		}
		defer s.disconnected(k)
	}
	begun()
	log.Info("agent connected", "version", version)

	handler, err := services(log, version,
		&agentService{Server: s, id: agent.ID, workspace: agent.WorkspaceID(), version: version},
		&tailnetService{Server: s, peer: coordinator.Peer{ID: agent.ID, Auth: coordinator.AgentAuth(agent.ID)}})
	if err != nil {
		s.failSocket(conn, err.Error())
		return
	}
	err = rpc.Serve(ctx, s.byteStream(conn), handler, rpc.ServeOptions{
		PingInterval: wire.PingInterval,
		PingTimeout:  wire.PingTimeout,
		Alive:        func() { s.alive(ctx, k, monitored) },
	})
	if err != nil {
		log.Info("agent lost", "err", err)
		return
	}
	log.Info("agent disconnected")
}

// services makes the handler of a session. Every method of both services is registered, so that what
// is not served answers "unimplemented" rather than with a protocol error that stock peers misread.
func services(log *slog.Logger, version wire.Version, agent agentpb.DRPCAgentServer, tailnet tailnetpb.DRPCTailnetServer) (drpc.Handler, error) {
	mux := drpcmux.New()
	if err := agentpb.DRPCRegisterAgent(mux, agent); err != nil {
		return nil, fmt.Errorf("cannot register the agent service: %w", err)
	}
	if err := tailnetpb.DRPCRegisterTailnet(mux, tailnet); err != nil {
		return nil, fmt.Errorf("cannot register the tailnet service: %w", err)
	}
	return &guard{mux, version, log}, nil
}

// guard answers what the version of a session lacks, and keeps a call that panics from taking the
// server with it.
type guard struct {
	next    drpc.Handler
	version wire.Version
	log     *slog.Logger
}

// HandleRPC implements [drpc.Handler].
func (g *guard) HandleRPC(stream drpc.Stream, name string) (err error) {
	defer func() {
		if p := recover(); p != nil {
			g.log.Error("a call failed badly", "rpc", name, "panic", p, "stack", string(debug.Stack()))
			err = errors.New("internal server error; the server's log has more")
		}
	}()
	// Also for a method that only later versions have: stock peers do not understand how the mux refuses
	// it, and give up the link. What is of another service is for the mux.
	ours := strings.HasPrefix(name, wire.AgentService) || strings.HasPrefix(name, wire.TailnetService)
	if ours && !g.version.HasMethod(name) {
		return rpc.ErrUnimplemented
	}
	err = g.next.HandleRPC(stream, name)
	if err != nil {
		g.log.Debug("a call failed", "rpc", name, "err", err)
	}
	return err
}

// getCoordinate is a client's link to one agent: the tailnet service, with which it may reach that one.
func (s *Server) getCoordinate(w http.ResponseWriter, r *http.Request, agent store.Agent) {
	if err := s.store.Ping(r.Context()); err != nil {
		writeError(w, &wire.Error{StatusCode: http.StatusInternalServerError, Message: "database not reachable", Detail: err.Error()})
		return
	}
	s.clientLink(w, r, "1.0", agent.ID, coordinator.ClientAuth(agent.ID))
}

// getTailnet is a client's link to all agents that its user may reach, which here is all there are.
func (s *Server) getTailnet(w http.ResponseWriter, r *http.Request) {
	s.clientLink(w, r, wire.OldestVersion.String(), s.id, coordinator.UserAuth(s.reachable))
}

// clientLink serves the tailnet service to a client until either side ends it. absent is the version of
// a caller that names none, audience what its resume tokens are for.
func (s *Server) clientLink(w http.ResponseWriter, r *http.Request, absent string, audience uuid.UUID, auth coordinator.Auth) {
	version, ok := requestedVersion(w, r, absent)
	if !ok {
		return
	}
	peer, err := s.resume(r.URL.Query().Get("resume_token"), audience)
	if err != nil {
		s.log.Debug("refused a resume token", "err", err)
		const invalid = "Invalid resume token"
		writeError(w, &wire.Error{StatusCode: http.StatusUnauthorized, Message: invalid,
			Validations: []wire.Validation{{Field: "resume_token", Detail: invalid}}})
		return
	}
	ctx, done := s.lasting(r)
	defer done()
	conn := s.accept(w, r)
	if conn == nil {
		return
	}
	defer conn.CloseNow()
	log := s.log.With("client", peer, "for", audience)
	handler, err := services(log, version, &agentpb.DRPCAgentUnimplementedServer{}, &tailnetService{
		Server: s,
		peer:   coordinator.Peer{ID: peer, Auth: auth},
		client: true,
		token:  func() (*tailnetpb.RefreshResumeTokenResponse, error) { return s.resumeToken(peer, audience) },
	})
	if err != nil {
		s.failSocket(conn, err.Error())
		return
	}
	err = rpc.Serve(ctx, s.byteStream(conn), handler, rpc.ServeOptions{
		PingInterval: wire.PingInterval,
		PingTimeout:  wire.PingTimeout,
	})
	log.Debug("client disconnected", "err", err)
}
