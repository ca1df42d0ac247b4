package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/url"
	"strconv"

	"github.com/coder/websocket"
	"github.com/google/uuid"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
)

// ptySize is how many rows and columns a terminal has whose viewer does not say.
const ptySize = 80

// parsePTY reads which terminal a query asks for, or returns all that is wrong with it.
func parsePTY(query url.Values) (wire.PTYInit, *wire.Error) {
	invalid := &wire.Error{StatusCode: http.StatusBadRequest, Message: "Invalid query parameters."}
	reject := func(field, detail string) {
		invalid.Validations = append(invalid.Validations, wire.Validation{Field: field, Detail: detail})
	}
	size := func(field string) uint16 {
		text := query.Get(field)
		if text == "" {
			return ptySize
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
		return wire.PTYInit{}, invalid
	}
	return init, nil
}

// getPTY splices a terminal of an agent to a WebSocket: what the person's side sends is what the
// agent's port takes, after one frame that says which terminal.
func (s *Server) getPTY(w http.ResponseWriter, r *http.Request, a store.Agent) {
	init, e := parsePTY(r.URL.Query())
	if e != nil {
		writeError(w, e)
		return
	}
	ctx, done := s.lasting(r)
	defer done()
	conn := s.accept(w, r)
	if conn == nil {
		return
	}
	defer conn.CloseNow()
	term, err := s.dialPTY(ctx, a)
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

// dialPTY connects to the terminals of an agent. One that is not connected is not waited for.
func (s *Server) dialPTY(ctx context.Context, a store.Agent) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	now, err := s.status(ctx, a)
	if err == nil && now != wire.AgentConnected {
		err = errors.New(notConnected(now))
	}
	if err != nil {
		return nil, err
	}
	return s.peers.dial(ctx, a.ID, wire.PortPTY)
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
