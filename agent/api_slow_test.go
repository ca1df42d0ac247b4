package agent

import (
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"
)

// pipes is a listener of connections in memory, so that time can be faked.
type pipes chan net.Conn

func (p pipes) Accept() (net.Conn, error) {
	if conn, ok := <-p; ok {
		return conn, nil
	}
	return nil, net.ErrClosed
}
func (p pipes) Close() error   { return nil }
func (p pipes) Addr() net.Addr { return &net.TCPAddr{} }

// TestAPIGivesUpOnSlowPeers: one that stops in the middle of a request is cut off after 20 s.
func TestAPIGivesUpOnSlowPeers(t *testing.T) {
	for name, sent := range map[string]string{
		"in the header": "GET /debug/manifest HTTP/1.1\r\nHost: 127.0",
		"in the body":   "POST /api/v0/list-directory HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{",
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := make(pipes)
				srv := newHTTPServer(t.Context(), testAPI().handler(), testAPI().log)
				served := make(chan error, 1)
				go func() { served <- srv.Serve(l) }()
				peer, conn := net.Pipe()
				l <- conn
				began := time.Now()
				if _, err := io.WriteString(peer, sent); err != nil {
					t.Fatal(err)
				}
				io.Copy(io.Discard, peer) // what it may answer, to the end of the connection
				if took := time.Since(began); took != 20*time.Second {
					t.Errorf("cut off after %v, want 20 s", took)
				}
				close(l)
				<-served
				srv.Close()
			})
		})
	}
}
