package testnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"golang.org/x/net/ipv4"
)

// connKey finds the connection of a request in its context.
type connKey struct{}

// Serve answers with one of the fakes on ln, which it closes, until ctx is done, and then returns nil.
func Serve(ctx context.Context, ln net.Listener, fake http.Handler) error {
	srv := &http.Server{
		Handler:           fake,
		ReadHeaderTimeout: 5 * time.Second,
		ConnContext:       func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) },
	}
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		srv.Close()
	})
	err := srv.Serve(ln)
	if !stop() {
		<-stopped
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("cannot serve a fake: %w", err)
}

// oneHop lets what is sent on the connection of a request from now on travel one hop only, and closes
// the connection after the answer. It works under [Serve] and over IPv4.
func oneHop(w http.ResponseWriter, r *http.Request) error {
	conn, ok := r.Context().Value(connKey{}).(net.Conn)
	if !ok {
		return errors.New("cannot limit the hops of an answer: it is not served by Serve")
	}
	w.Header().Set("Connection", "close")
	return ipv4.NewConn(conn).SetTTL(1)
}
