package control

import (
	"context"
	"errors"
	"net/http"
	"reflect"
	"time"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
)

// watch looks at something again and again, and tells of it when it has changed.
type watch[T any] struct {
	// pace is how often it looks, repeat how often it tells what has not changed; 0 means never.
	pace, repeat time.Duration
	// read returns what there is; [store.ErrNotFound] ends the watch in order.
	read func(context.Context) (T, error)
	// show makes of it what the watcher is sent.
	show func(T) any
}

// run tells of it until ctx is done, it is gone, or tell or idle fails, all of which it returns nil for.
// idle is called after each look.
func (w watch[T]) run(ctx context.Context, tell func(any) error, idle func() error) error {
	ticker := time.NewTicker(w.pace)
	defer ticker.Stop()
	var told T
	var at time.Time
	for {
		now, err := w.read(ctx)
		switch {
		case ctx.Err() != nil, errors.Is(err, store.ErrNotFound):
			return nil
		case err != nil:
			return err
		}
		if at.IsZero() || w.repeat > 0 && time.Since(at) >= w.repeat || !reflect.DeepEqual(told, now) {
			told, at = now, time.Now()
			if tell(w.show(now)) != nil {
				return nil
			}
		}
		if idle() != nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// sendWatch answers with a watch as server-sent events.
func sendWatch[T any](s *Server, w http.ResponseWriter, r *http.Request, seen watch[T]) {
	ctx, done := s.lasting(r)
	defer done()
	stream := sendEvents(w)
	err := seen.run(ctx, func(v any) error { return stream.send(eventData, v) }, stream.ping)
	if err != nil {
		_ = stream.send(eventError, internalError(err)) // the last there is to say
	}
}

// sendWatchSocket answers with a watch as messages of a WebSocket.
func sendWatchSocket[T any](s *Server, w http.ResponseWriter, r *http.Request, seen watch[T]) {
	s.sendMessages(w, r, func(ctx context.Context, send func(any) error) error {
		return seen.run(ctx, func(v any) error { return send(wire.ServerEvent{Type: eventData, Data: v}) }, func() error { return nil })
	})
}
