package control

import (
	"bufio"
	"log/slog"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/berthd/berth/tailnet/relay"
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
				s := &Server{log: slog.New(slog.DiscardHandler), relay: relay.New(nil, nil)}
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
