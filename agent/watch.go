package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"

	"github.com/berthd/berth/wire"
)

const (
	// goodbye is what a message on its way to a peer gets to arrive once the agent stops, and how long a watcher may then take to answer that its watch is
	// closed; a stop waits for it.
	goodbye = time.Second
	// maxWatchers bounds the watches of one kind at one time; each gets the list for itself.
	maxWatchers = 32
)

// watch answers with a WebSocket, on which each body that source hands to send is a text message,
// unless it is the same as the one before. source returns when its context is done: then the other
// side has left or does not answer pings, or the agent stops. watchers counts those of one kind.
func (a *api) watch(w http.ResponseWriter, r *http.Request, watchers *atomic.Int64, source func(ctx context.Context, send func(body any) error) error) {
	a.work.Add(1)
	defer a.work.Done()
	defer watchers.Add(-1)
	if watchers.Add(1) > maxWatchers {
		writeError(w, http.StatusServiceUnavailable, "Too many watch this already.", nil)
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
	writing, done := lingering(r.Context(), goodbye)
	defer done()
	a.work.Go(func() { probe(ctx, conn, cancel) })

	var last []byte
	err = source(ctx, func(body any) error {
		message, err := json.Marshal(body)
		if err != nil {
			return err
		}
		if message = append(message, '\n'); bytes.Equal(message, last) {
			return nil
		}
		last = message
		return write(writing, conn, message)
	})
	if why := context.Cause(ctx); errors.Is(why, errNoAnswer) || errors.Is(why, errStopping) {
		impatient := time.AfterFunc(goodbye, cut) // the library itself waits for 5 s
		conn.Close(websocket.StatusGoingAway, why.Error())
		impatient.Stop()
	} else if err != nil {
		a.log.Debug("a watch ended", "path", r.URL.Path, "error", err)
	}
}

// lingering returns a context that ends a while after ctx.
func lingering(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	later, cancel := context.WithCancel(context.WithoutCancel(ctx))
	unhook := context.AfterFunc(ctx, func() { time.AfterFunc(d, cancel) })
	return later, func() { unhook(); cancel() }
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
