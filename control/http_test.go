package control

import (
	"bufio"
	"errors"
	"log/slog"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
	"storj.io/drpc/drpcmux"

	"github.com/berthd/berth/tailnet/relay"
	"github.com/berthd/berth/wire/rpc"
)

// A caller that promises a body and never sends it gets his answer and is let go of, whether the
// body was wanted or not; nobody has to prove anything to be such a caller.
func TestBodyThatNeverComes(t *testing.T) {
	for _, c := range []struct {
		name, request string
		status        int
	}{
		{"nowhere", "POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n", http.StatusNotFound},
		{"cut short", "POST /api/v2/workspaceagents/aws-instance-identity HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{", http.StatusBadRequest},
		{"no JSON", "POST /api/v2/workspaceagents/aws-instance-identity HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx", http.StatusBadRequest},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &Server{log: slog.New(slog.DiscardHandler), relay: relay.New(nil, nil), checks: newGate(maxChecks)}
				defer s.relay.Close()
				handler, err := s.routes()
				if err != nil {
					t.Fatal(err)
				}
				l := newPipeListener()
				web := &http.Server{Handler: handler, ReadHeaderTimeout: headerTimeout}
				served := make(chan error, 1)
				go func() { served <- web.Serve(l) }()
				conn, err := l.dial(t.Context(), "", "")
				if err != nil {
					t.Fatal(err)
				}
				if _, err := conn.Write([]byte(c.request)); err != nil {
					t.Fatal(err)
				}
				if err := conn.SetReadDeadline(time.Now().Add(bodyTimeout + time.Second)); err != nil {
					t.Fatal(err)
				}
				answer := bufio.NewReader(conn)
				resp, err := http.ReadResponse(answer, nil)
				if err != nil {
					t.Fatal(err)
				}
				if resp.StatusCode != c.status {
					t.Errorf("the answer is %s, want %d", resp.Status, c.status)
				}
				resp.Body.Close()
				conn.Close()
				web.Close()
				if err := <-served; err != http.ErrServerClosed {
					t.Error(err)
				}
			})
		})
	}
}

// A caller that opens a link and never reads is given up: his connection is closed in bounded time, and
// what served it ends.
func TestLinkThatNeverReads(t *testing.T) {
	t.Parallel() // a WebSocket waits some seconds for its other side to close it, too
	s := &Server{log: slog.New(slog.DiscardHandler), stopping: t.Context()}
	l := newPipeListener()
	ended := make(chan error, 1)
	web := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn := s.accept(w, r)
		if conn == nil {
			return
		}
		defer conn.CloseNow()
		ended <- rpc.Serve(r.Context(), s.byteStream(conn), drpcmux.New(), rpc.ServeOptions{
			PingInterval: time.Millisecond, PingTimeout: 100 * time.Millisecond,
		})
	})}
	served := make(chan error, 1)
	go func() { served <- web.Serve(l) }()
	// A pipe holds nothing: what is not read is not sent.
	conn, _, err := websocket.Dial(t.Context(), "http://x/", &websocket.DialOptions{HTTPClient: &http.Client{Transport: &http.Transport{DialContext: l.dial}}})
	if err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if !errors.Is(err, rpc.ErrDead) {
			t.Errorf("ended with %v, want ErrDead", err)
		}
	case <-time.After(time.Minute):
		t.Error("never ended")
	}
	conn.CloseNow()
	web.Close()
	if err := <-served; err != http.ErrServerClosed {
		t.Error(err)
	}
}
