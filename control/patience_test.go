package control

import (
	"bufio"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
)

// pipePeer connects to a handler through a pipe: what one side does not read the other cannot write, and
// time passes by itself when both wait.
func pipePeer(t *testing.T, s *Server, handler http.HandlerFunc) (conn net.Conn, ended <-chan time.Duration) {
	t.Helper()
	s.stopping, s.stop = context.WithCancel(context.Background())
	l := newPipeListener()
	done := make(chan time.Duration, 1)
	start := time.Now()
	web := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		handler(w, r)
		done <- time.Since(start)
	})}
	served := make(chan error, 1)
	go func() { served <- web.Serve(l) }()
	conn, err := l.dial(t.Context(), "", "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		web.Close()
		<-served
		s.stop()
		s.active.Wait()
	})
	return conn, done
}

// bigWatch changes at each look, and is long.
func bigWatch() watch[int] {
	n := 0
	return watch[int]{
		pace: time.Second,
		read: func(context.Context) (int, error) { n++; return n, nil },
		show: func(n int) any { return strings.Repeat("x", 64<<10) },
	}
}

const upgradeRequest = "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"

// TestReaderThatDoesNotRead: one that asked for a stream and takes nothing of it is given up.
func TestReaderThatDoesNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &Server{log: slog.New(slog.DiscardHandler)}
		conn, ended := pipePeer(t, s, func(w http.ResponseWriter, r *http.Request) { sendWatch(s, w, r, bigWatch()) })
		if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if after := <-ended; after > pingWait+time.Second {
			t.Errorf("a stream of events was held for %v", after)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		s := &Server{log: slog.New(slog.DiscardHandler)}
		conn, ended := pipePeer(t, s, func(w http.ResponseWriter, r *http.Request) { sendWatchSocket(s, w, r, bigWatch()) })
		if _, err := io.WriteString(conn, upgradeRequest); err != nil {
			t.Fatal(err)
		}
		if _, err := http.ReadResponse(bufio.NewReaderSize(conn, 16), nil); err != nil {
			t.Fatal(err)
		}
		if after := <-ended; after > messageWrite+10*time.Second {
			t.Errorf("a socket was held for %v", after)
		}
	})
}

// TestPeerThatDoesNotAnswer: one that reads, but does not answer a ping, is told and given up.
func TestPeerThatDoesNotAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &Server{log: slog.New(slog.DiscardHandler)}
		conn, ended := pipePeer(t, s, func(w http.ResponseWriter, r *http.Request) {
			s.sendMessages(w, r, func(ctx context.Context, send func(any) error) error {
				<-ctx.Done()
				return nil
			})
		})
		if _, err := io.WriteString(conn, upgradeRequest); err != nil {
			t.Fatal(err)
		}
		in := bufio.NewReader(conn)
		if _, err := http.ReadResponse(in, nil); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		frame := func() (opcode byte, payload []byte) {
			head := make([]byte, 2)
			if _, err := io.ReadFull(in, head); err != nil {
				t.Fatal(err)
			}
			payload = make([]byte, head[1])
			if _, err := io.ReadFull(in, payload); err != nil {
				t.Fatal(err)
			}
			return head[0] & 0xf, payload
		}
		if opcode, _ := frame(); opcode != 9 || time.Since(start) != pingEvery {
			t.Errorf("frame %d after %v", opcode, time.Since(start))
		}
		opcode, payload := frame()
		if opcode != 8 || len(payload) < 2 || websocket.StatusCode(payload[0])<<8|websocket.StatusCode(payload[1]) != websocket.StatusGoingAway || string(payload[2:]) != "liveness probe failed" {
			t.Errorf("frame %d %q", opcode, payload)
		}
		if after := <-ended; after > pingEvery+pingWait+15*time.Second {
			t.Errorf("it was held for %v", after)
		}
	})
}
