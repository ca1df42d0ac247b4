package control

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/coder/websocket"
	"github.com/google/uuid"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
)

// writeTimeout is how long a caller may take to take an answer, or each part of a long one. It counts
// from the request, so it is longer than any answer may take to come (askTimeout). Connections that
// are taken over, such as WebSockets, have limits of their own.
const writeTimeout = 90 * time.Second

// extendWrite gives a caller time to take what is written next.
func extendWrite(w http.ResponseWriter) {
	// Only net/http's own writer has deadlines; under another there is none to set.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(writeTimeout))
}

// sessionToken takes a request's token from the first place that has one. Tokens in a URL end up in
// logs of proxies, but stock clients that cannot set headers put them there.
func sessionToken(r *http.Request) wire.Secret {
	if c, err := r.Cookie(wire.CookieSessionToken); err == nil && c.Value != "" {
		return wire.Secret(c.Value)
	}
	query := r.URL.Query()
	if t := query.Get(wire.CookieSessionToken); t != "" {
		return wire.Secret(t)
	}
	if t := r.Header.Get(wire.HeaderSessionToken); t != "" {
		return wire.Secret(t)
	}
	if scheme, t, ok := strings.Cut(r.Header.Get("Authorization"), " "); ok && strings.EqualFold(scheme, "bearer") && t != "" {
		return wire.Secret(strings.TrimSpace(t))
	}
	return wire.Secret(query.Get("access_token"))
}

// caller is an agent that has proved itself.
type caller struct {
	store.Agent
	tokenHash string
}

// agentRoute lets agents in.
func (s *Server) agentRoute(next func(http.ResponseWriter, *http.Request, caller)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		token := sessionToken(r)
		if token == "" {
			writeError(w, &wire.Error{StatusCode: http.StatusUnauthorized, Message: fmt.Sprintf("Cookie %q must be provided.", wire.CookieSessionToken)})
			return
		}
		// The hash is of the canonical form, so that a token is one token however it is written.
		id, err := uuid.Parse(token.Reveal())
		if err != nil {
			writeError(w, &wire.Error{StatusCode: http.StatusUnauthorized, Message: "Workspace agent token invalid.",
				Detail: fmt.Sprintf("An agent token must be a valid UUIDv4. (len %d)", len(token.Reveal()))})
			return
		}
		agent, hash, err := s.agentByToken(r.Context(), wire.Secret(id.String()))
		switch {
		case errors.Is(err, store.ErrNotFound):
			writeError(w, notAuthorized())
		case err != nil:
			writeError(w, &wire.Error{StatusCode: http.StatusInternalServerError, Message: "Internal error checking workspace agent authorization.", Detail: err.Error()})
		case !s.open.enter(agent.ID):
			writeError(w, &wire.Error{StatusCode: http.StatusTooManyRequests, Message: "Too many requests of this agent are open.",
				Detail: fmt.Sprintf("At most %d may be at once; end some.", maxOpen)})
		default:
			defer s.open.leave(agent.ID)
			next(w, r, caller{agent, hash})
		}
	}
}

// maxOpen is how many requests of one agent may be open at once, its links and what it waits for
// included. A stock agent has a handful; helpers in its sessions add some.
const maxOpen = 256

// openRequests counts the open requests of each agent, so that one cannot take all that the server has.
type openRequests struct {
	mu sync.Mutex
	of map[uuid.UUID]int
}

// enter counts a request, or returns false when there are too many.
func (o *openRequests) enter(agent uuid.UUID) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.of[agent] >= maxOpen {
		return false
	}
	if o.of == nil {
		o.of = make(map[uuid.UUID]int)
	}
	o.of[agent]++
	return true
}

func (o *openRequests) leave(agent uuid.UUID) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.of[agent]--; o.of[agent] == 0 {
		delete(o.of, agent)
	}
}

func notAuthorized() *wire.Error {
	return &wire.Error{StatusCode: http.StatusUnauthorized, Message: "Workspace agent not authorized.",
		Detail: "The agent cannot authenticate until the workspace provision job has been completed. If the job is no longer running, this agent is invalid."}
}

func (s *Server) agentByToken(ctx context.Context, token wire.Secret) (store.Agent, string, error) {
	t, err := s.store.Token(ctx, token)
	if err != nil {
		return store.Agent{}, "", err
	}
	agent, err := s.store.Agent(ctx, t.AgentID)
	if err == nil && agent.IsSubAgent() {
		_, err = s.store.Agent(ctx, agent.ParentID) // without its parent it is nothing
	}
	return agent, store.TokenHash(token), err
}

// userRoute lets people in.
func (s *Server) userRoute(next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		_, err := s.user(r.Context(), sessionToken(r))
		var why errSignedOut
		switch {
		case errors.As(err, &why):
			writeError(w, signedOut(string(why)))
		case err != nil:
			writeError(w, internalError(err))
		default:
			next(w, r)
		}
	}
}

func signedOut(why string) *wire.Error {
	return &wire.Error{StatusCode: http.StatusUnauthorized,
		Message: "You are signed out or your session has expired. Please sign in again to continue.", Detail: why}
}

// workspaceRoute lets people in and finds the agent that the path names.
func (s *Server) workspaceRoute(next func(http.ResponseWriter, *http.Request, store.Agent)) http.HandlerFunc {
	named := s.userRoute(s.namedAgent(next))
	return func(w http.ResponseWriter, r *http.Request) {
		// "me" is an agent's own; what it has no route for is not taken for an agent of that name.
		if r.PathValue("id") == "me" {
			noRoute(w, r)
			return
		}
		named(w, r)
	}
}

// namedAgent finds the agent that the path names, for who was let in.
func (s *Server) namedAgent(next func(http.ResponseWriter, *http.Request, store.Agent)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		id, ok := pathUUID(w, r, "id")
		if !ok {
			return
		}
		agent, err := s.store.Agent(r.Context(), id)
		switch {
		case errors.Is(err, store.ErrNotFound):
			writeError(w, &wire.Error{StatusCode: http.StatusNotFound, Message: "Agent doesn't exist with that id, or you do not have access to it."})
		case err != nil:
			writeError(w, internalError(err))
		default:
			next(w, r, agent)
		}
	}
}

// pathUUID reads the id that the path has at name, or answers the request and returns false.
func pathUUID(w http.ResponseWriter, r *http.Request, name string) (uuid.UUID, bool) {
	text := r.PathValue(name)
	id, err := uuid.Parse(text)
	if err != nil {
		writeError(w, &wire.Error{StatusCode: http.StatusBadRequest, Message: fmt.Sprintf("Invalid UUID %q.", short(text)), Detail: err.Error()})
	}
	return id, err == nil
}

const jsonType = "application/json; charset=utf-8"

func writeJSON(w http.ResponseWriter, status int, v any) {
	body, err := json.Marshal(v)
	if err != nil {
		status, body = http.StatusInternalServerError, []byte(`{"message":"An internal server error occurred."}`)
	}
	w.Header().Set("Content-Type", jsonType)
	w.WriteHeader(status)
	_, _ = w.Write(append(body, '\n')) // a caller that left misses the rest
}

func writeError(w http.ResponseWriter, e *wire.Error) { writeJSON(w, e.StatusCode, e) }

func internalError(err error) *wire.Error {
	return &wire.Error{StatusCode: http.StatusInternalServerError, Message: "An internal server error occurred.", Detail: err.Error()}
}

// bodyTimeout is how long a caller may take to send a body.
const bodyTimeout = 30 * time.Second

// boundBody gives a caller time to send his body, also one that nobody wants: net/http waits for the
// rest of it before it answers.
func boundBody(w http.ResponseWriter, r *http.Request) {
	if r.Body != nil && r.Body != http.NoBody {
		// Only net/http's own writer has deadlines; under another there is none to set.
		_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyTimeout))
	}
}

// readJSON decodes a body of at most limit bytes into v, or answers the request and returns false.
func readJSON(w http.ResponseWriter, r *http.Request, limit int64, v any) bool {
	err := decodeJSON(w, r, limit, v)
	if tooLarge := new(http.MaxBytesError); errors.As(err, &tooLarge) {
		writeError(w, &wire.Error{StatusCode: http.StatusRequestEntityTooLarge, Message: "Request body is too large.",
			Detail: fmt.Sprintf("At most %d bytes are read.", limit)})
		return false
	}
	if err != nil {
		writeError(w, &wire.Error{StatusCode: http.StatusBadRequest, Message: "Request body must be valid JSON.", Detail: err.Error()})
		return false
	}
	return true
}

// decodeJSON decodes a body of at most limit bytes into v.
func decodeJSON(w http.ResponseWriter, r *http.Request, limit int64, v any) error {
	dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, limit))
	if err := dec.Decode(v); err != nil {
		return err
	}
	switch _, err := dec.Token(); {
	case err == nil:
		return errors.New("unexpected data after the JSON value")
	case err != io.EOF:
		return err
	}
	// The body is all here (see boundBody): what is waited for now is not the caller.
	_ = http.NewResponseController(w).SetReadDeadline(time.Time{})
	return nil
}

// required returns what is wrong with fields that must not be empty; pairs are name, value.
func required(pairs ...string) *wire.Error {
	e := &wire.Error{StatusCode: http.StatusBadRequest, Message: "Validation failed."}
	for i := 0; i+1 < len(pairs); i += 2 {
		if pairs[i+1] == "" {
			e.Validations = append(e.Validations, wire.Validation{Field: pairs[i], Detail: `Validation failed for tag "required" with value: ""`})
		}
	}
	if len(e.Validations) == 0 {
		return nil
	}
	return e
}

// accept upgrades to a WebSocket, or answers the request and returns nil. Browsers of other origins
// are refused: they would come with this origin's cookie.
func (s *Server) accept(w http.ResponseWriter, r *http.Request) *websocket.Conn {
	if err := upgradable(r); err != nil {
		writeError(w, &wire.Error{StatusCode: http.StatusBadRequest, Message: "Failed to accept websocket.", Detail: err.Error()})
		return nil
	}
	if !sameOrigin(r) {
		writeError(w, &wire.Error{StatusCode: http.StatusForbidden, Message: "Forbidden.", Detail: "WebSockets are not for pages of other origins."})
		return nil
	}
	conn, err := websocket.Accept(w, r, &websocket.AcceptOptions{CompressionMode: websocket.CompressionDisabled})
	if err != nil {
		s.log.Debug("refused a websocket", "path", r.URL.Path, "err", err)
		return nil
	}
	return conn
}

// upgradable finds the refusals that websocket.Accept would word itself, in plain text.
func upgradable(r *http.Request) error {
	for _, want := range []struct{ header, token string }{{"Connection", "upgrade"}, {"Upgrade", "websocket"}} {
		found := false
		for _, v := range r.Header.Values(want.header) {
			for part := range strings.SplitSeq(v, ",") {
				found = found || strings.EqualFold(strings.TrimSpace(part), want.token)
			}
		}
		if !found {
			return fmt.Errorf("the request is no WebSocket upgrade: its %s header lacks %q", want.header, want.token)
		}
	}
	if v := r.Header.Get("Sec-WebSocket-Version"); v != "13" {
		return fmt.Errorf("WebSocket version %q is not supported, only 13", short(v))
	}
	if key, err := base64.StdEncoding.DecodeString(strings.TrimSpace(r.Header.Get("Sec-WebSocket-Key"))); err != nil || len(key) != 16 {
		return errors.New("its Sec-WebSocket-Key header is not 16 bytes in base64")
	}
	return nil
}

// sameOrigin tells whether a request comes from a page of this server, or from no page at all.
func sameOrigin(r *http.Request) bool {
	origin := r.Header.Get("Origin")
	if origin == "" {
		return true
	}
	u, err := url.Parse(origin)
	return err == nil && strings.EqualFold(u.Host, r.Host)
}

// Liveness of WebSockets that carry no pings of their own.
const (
	pingEvery = 15 * time.Second
	pingWait  = 10 * time.Second
)

// keepAlive pings until ctx is done or the other side does not answer, and then closes conn. The
// caller must be reading from conn.
func keepAlive(ctx context.Context, conn *websocket.Conn) {
	ticker := time.NewTicker(pingEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		ping, cancel := context.WithTimeout(ctx, pingWait)
		err := conn.Ping(ping)
		cancel()
		if err != nil && ctx.Err() == nil {
			conn.Close(websocket.StatusGoingAway, "liveness probe failed")
			return
		}
	}
}

// messageWrite is how long the other side of a WebSocket may take to take one message.
const messageWrite = 30 * time.Second

// sendMessages serves a WebSocket on which only the server speaks: what produce sends goes out as text
// messages of one line of JSON each. An error of produce is the reason of the close. The context of
// produce ends when the other side is gone.
func (s *Server) sendMessages(w http.ResponseWriter, r *http.Request, produce func(ctx context.Context, send func(any) error) error) {
	ctx, done := s.lasting(r)
	defer done()
	conn := s.accept(w, r)
	if conn == nil {
		return
	}
	defer conn.CloseNow()
	ctx, stop := readNothing(ctx, conn)
	defer stop()
	s.active.Go(func() { keepAlive(ctx, conn) })
	err := produce(ctx, func(v any) error {
		message, err := json.Marshal(v)
		if err != nil {
			return err
		}
		// A write that is cut takes the connection with it, and the word of why it ends: one that is under
		// way when the server stops has a little time.
		write, cancel := context.WithTimeout(context.WithoutCancel(ctx), messageWrite)
		defer cancel()
		defer context.AfterFunc(ctx, func() { time.AfterFunc(shutdownBudget, cancel) })()
		return conn.Write(write, websocket.MessageText, append(message, '\n'))
	})
	if err != nil {
		s.failSocket(conn, err.Error())
		return
	}
	_ = s.closeSocket(conn)
}

// byteStream is a WebSocket as a stream of bytes. Closing it tells the other side whether it should
// come back: a server that stops says so. It has no context: one that ends would cut the connection
// before anything could be said.
func (s *Server) byteStream(conn *websocket.Conn) net.Conn {
	return &byteStream{websocket.NetConn(context.Background(), conn, websocket.MessageBinary), s, conn}
}

type byteStream struct {
	net.Conn
	server *Server
	socket *websocket.Conn
}

// Close ends the WebSocket in order.
func (b *byteStream) Close() error { return b.server.closeSocket(b.socket) }

// Fail ends it because of what came over it.
func (b *byteStream) Fail(reason string) error {
	return b.socket.Close(websocket.StatusInternalError, closeReason(reason))
}

// closeSocket ends a WebSocket in order; it takes at most 10 s with a peer that does not answer.
func (s *Server) closeSocket(conn *websocket.Conn) error {
	if s.stopping.Err() != nil {
		return conn.Close(websocket.StatusGoingAway, "server is shutting down")
	}
	return conn.Close(websocket.StatusNormalClosure, "")
}

// failSocket ends a WebSocket with the reason of a failure, unless the reason is that the server stops.
func (s *Server) failSocket(conn *websocket.Conn, reason string) {
	if s.stopping.Err() != nil {
		_ = s.closeSocket(conn)
		return
	}
	_ = conn.Close(websocket.StatusInternalError, closeReason(reason)) // the other side may be gone
}

// readNothing serves a WebSocket whose other side has nothing to say. The context it returns ends with
// ctx or with the connection, but does not cut the connection when it does.
func readNothing(ctx context.Context, conn *websocket.Conn) (context.Context, context.CancelFunc) {
	closed := conn.CloseRead(context.WithoutCancel(ctx))
	ctx, cancel := context.WithCancel(ctx)
	unhook := context.AfterFunc(closed, cancel)
	return ctx, func() {
		unhook()
		cancel()
	}
}

// closeReason fits a text into a WebSocket close frame.
func closeReason(text string) string {
	const limit = 123
	return store.CutText(strings.ToValidUTF8(text, "?"), limit)
}
