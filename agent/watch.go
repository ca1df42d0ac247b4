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
	writing, done := lingering(r.Context(), goodbyeTimeout)
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
