package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/coder/websocket"
	"github.com/google/uuid"

	"github.com/berthd/berth/wire"
)

const (
	// goodbyeTimeout is what a message on its way to a peer gets to arrive once the agent stops.
	goodbyeTimeout = time.Second
	// maxWatchers bounds the watches at one time; each gets the list for itself.
	maxWatchers = 32
	// goodbye is how long a watcher may take to answer that its watch is closed; a stop waits for it.
	goodbye = time.Second
)

// routeContainers adds what is known of containers. Switched off, only the list itself says so: the
// rest is not there.
func (a *api) routeContainers(mux *http.ServeMux) {
	if refusal := a.containers.refusal; refusal != "" {
		mux.HandleFunc("GET "+wire.PathAgentContainers, func(w http.ResponseWriter, _ *http.Request) {
			writeError(w, http.StatusForbidden, refusal, nil)
		})
		return
	}
	mux.HandleFunc("GET "+wire.PathAgentContainers, a.listContainers)
	mux.HandleFunc("GET "+wire.PathAgentContainers+"/watch", a.watchContainers)
	mux.HandleFunc("POST "+wire.PathAgentContainers+"/devcontainers/{id}/recreate", a.recreateDevcontainer)
	mux.HandleFunc("DELETE "+wire.PathAgentContainers+"/devcontainers/{id}", a.deleteDevcontainer)
}

// firstContainers lists the containers, or answers why that cannot be done.
func (a *api) firstContainers(w http.ResponseWriter, r *http.Request) (wire.Containers, bool) {
	list, err := a.containers.get(r.Context())
	if err != nil {
		a.log.Warn("cannot list containers", "error", err)
		writeError(w, http.StatusInternalServerError, "Could not get containers", err)
		return wire.Containers{}, false
	}
	return list, true
}

func (a *api) listContainers(w http.ResponseWriter, r *http.Request) {
	if list, ok := a.firstContainers(w, r); ok {
		writeJSON(w, http.StatusOK, list)
	}
}

// lingering returns a context that ends a while after ctx.
func lingering(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	later, cancel := context.WithCancel(context.WithoutCancel(ctx))
	unhook := context.AfterFunc(ctx, func() { time.AfterFunc(d, cancel) })
	return later, func() { unhook(); cancel() }
}

// watchContainers sends the list at once and whenever it has changed, each as a text message.
func (a *api) watchContainers(w http.ResponseWriter, r *http.Request) {
	a.work.Add(1)
	defer a.work.Done()
	defer a.watchers.Add(-1)
	if a.watchers.Add(1) > maxWatchers {
		writeError(w, http.StatusServiceUnavailable, "Too many watch the containers already.", nil)
		return
	}
	changed, stop := a.containers.watch()
	defer stop()
	ours := a.containers.changes()
	list, ok := a.firstContainers(w, r)
	if !ok {
		return
	}
	conn, err := websocket.Accept(w, r, &websocket.AcceptOptions{CompressionMode: websocket.CompressionNoContextTakeover})
	if err != nil {
		return // it has been answered
	}
	defer conn.CloseNow()
	// A stop must not cut the connection before it was said goodbye on.
	reading, cut := context.WithCancel(context.WithoutCancel(r.Context()))
	defer cut()
	ctx, cancel := context.WithCancelCause(conn.CloseRead(reading))
	defer cancel(nil)
	defer context.AfterFunc(r.Context(), func() { cancel(errStopping) })()
	// Nor in the middle of a message.
	writing, done := lingering(r.Context(), goodbyeTimeout)
	defer done()
	a.work.Go(func() { probe(ctx, conn, cancel) })

	var last []byte
	for {
		message, err := watchMessage(list)
		if err != nil {
			a.log.Error("cannot encode the containers", "error", err)
			return
		}
		if !bytes.Equal(message, last) {
			if err := write(writing, conn, message); err != nil {
				return
			}
			last = message
		}
		select {
		case <-ctx.Done():
			if why := context.Cause(ctx); errors.Is(why, errNoAnswer) || errors.Is(why, errStopping) {
				impatient := time.AfterFunc(goodbye, cut) // the library itself waits for 5 s
				conn.Close(websocket.StatusGoingAway, why.Error())
				impatient.Stop()
			}
			return
		case <-changed:
		case <-ours:
			ours = a.containers.changes()
		}
		if next, err := a.containers.get(ctx); err == nil {
			list = next
		}
	}
}

// watchMessage encodes a list for those who watch. What does not fit into a message that they take is left out, and said.
func watchMessage(list wire.Containers) ([]byte, error) {
	all, warnings := len(list.Containers), list.Warnings
	for {
		message, err := json.Marshal(list)
		if err != nil {
			return nil, err
		}
		if message = append(message, '\n'); len(message) <= wire.MaxContainersMessage || len(list.Containers) == 0 {
			return message, nil
		}
		// They are about of one size; a little less than what would fit then does.
		fit := len(list.Containers) * (wire.MaxContainersMessage / 16) / (len(message) / 15)
		list.Containers = list.Containers[:min(fit, len(list.Containers)-1)]
		list.Warnings = append(slices.Clip(warnings), fmt.Sprintf("%d of %d containers are left out: a watch has no room for more", all-len(list.Containers), all))
	}
}

// Why a WebSocket is ended from this side.
var (
	errNoAnswer = errors.New("liveness probe failed")
	errStopping = errors.New("the agent stops")
)

// probe pings the other side, and ends the connection when it does not answer.
func probe(ctx context.Context, conn *websocket.Conn, end context.CancelCauseFunc) {
	tick := time.NewTicker(wire.PingInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		pingCtx, cancel := context.WithTimeout(ctx, wire.PingInterval)
		err := conn.Ping(pingCtx)
		cancel()
		if err != nil {
			end(errNoAnswer)
			return
		}
	}
}

// write sends one message to a peer that may have stopped reading.
func write(ctx context.Context, conn *websocket.Conn, message []byte) error {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	return conn.Write(ctx, websocket.MessageText, message)
}

// findDevcontainer returns the dev container that a path names, or answers that there is none.
func (a *api) findDevcontainer(w http.ResponseWriter, r *http.Request) (wire.Devcontainer, bool) {
	list, ok := a.firstContainers(w, r)
	if !ok {
		return wire.Devcontainer{}, false
	}
	if id, err := uuid.Parse(r.PathValue("id")); err == nil {
		for _, d := range list.Devcontainers {
			if d.ID == id {
				return d, true
			}
		}
	}
	writeError(w, http.StatusNotFound, "Devcontainer not found.", nil)
	return wire.Devcontainer{}, false
}

func (a *api) recreateDevcontainer(w http.ResponseWriter, r *http.Request) {
	d, ok := a.findDevcontainer(w, r)
	if !ok {
		return
	}
	switch err := a.containers.recreate(d); {
	case errors.Is(err, errTransitioning):
		writeError(w, http.StatusConflict, "Unable to recreate transitioning devcontainer", nil)
	case err != nil:
		a.log.Warn("cannot recreate a dev container", "name", d.Name, "error", err)
		writeError(w, http.StatusInternalServerError, "Unable to recreate devcontainer", err)
	default:
		writeJSON(w, http.StatusAccepted, wire.Error{
			Message: "Devcontainer recreation initiated",
			Detail:  `Recreation process for devcontainer "` + d.Name + `" has started.`,
		})
	}
}

// deleteDevcontainer refuses: berthd asks container engines for lists only. An API that asks nobody
// for a credential is no place to remove containers from.
func (a *api) deleteDevcontainer(w http.ResponseWriter, r *http.Request) {
	d, ok := a.findDevcontainer(w, r)
	switch {
	case !ok:
	case d.Status == devcontainerStarting:
		writeError(w, http.StatusConflict, "Unable to delete transitioning devcontainer", nil)
	default:
		writeError(w, http.StatusInternalServerError, "Unable to delete devcontainer",
			errors.New("berthd lists containers and removes none: remove it with the engine's own command, in the workspace"))
	}
}
