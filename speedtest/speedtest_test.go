package speedtest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve runs Serve on loopback until the test ends and returns its address.
func serve(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return l.Addr().String()
}

func dial(t *testing.T, addr string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func TestRun(t *testing.T) {
	addr := serve(t)
	for _, direction := range []Direction{Download, Upload} {
		t.Run(direction.String(), func(t *testing.T) {
			const d = 100 * time.Millisecond
			r, err := Run(t.Context(), dial(t, addr), direction, d)
			if err != nil {
				t.Fatal(err)
			}
			if r.Bytes < blockSize || r.Elapsed < d/2 {
				t.Errorf("got %+v, want a block or more over about %v", r, d)
			}
		})
	}
}

func TestRunCancelled(t *testing.T) {
	addr := serve(t)
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	conn := dial(t, addr)
	// The test is cancelled by its own first bytes, so it is surely under way.
	counted := &firstRead{Conn: conn, then: func() { cancel(cause) }}
	if _, err := Run(ctx, counted, Download, MaxDuration); !errors.Is(err, cause) {
		t.Errorf("got %v, want %v", err, cause)
	}
}

type firstRead struct {
	net.Conn
	then func()
}

func (f *firstRead) Read(p []byte) (int, error) {
	n, err := f.Conn.Read(p)
	f.then()
	return n, err
}

func TestServeRefuses(t *testing.T) {
	addr := serve(t)
	for _, tt := range []struct{ name, send, want string }{
		{"version", `{"version":1,"time":1000,"direction":0}`, "version 1"},
		{"direction", `{"version":2,"time":1000,"direction":2}`, "direction 2"},
		{"no time", `{"version":2,"direction":0}`, "more than 0"},
		{"too long", `{"version":2,"time":9223372036854775807,"direction":0}`, "at most"},
		{"not JSON", "GET / HTTP/1.1\r\n\r\n", "cannot read the request"},
		{"endless", `{"version":"` + strings.Repeat("x", 2*maxHeader), "exceeds"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			conn := dial(t, addr)
			if _, err := io.WriteString(conn, tt.send); err != nil {
				t.Fatal(err)
			}
			var a answer
			if err := json.NewDecoder(conn).Decode(&a); err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(a.Error, tt.want) {
				t.Errorf("got %q, want it to contain %q", a.Error, tt.want)
			}
		})
	}
}

func TestServeRefusesTooMany(t *testing.T) {
	addr := serve(t)
	for range maxAtOnce {
		conn := dial(t, addr)
		if err := json.NewEncoder(conn).Encode(request{Version: version, Time: MaxDuration, Direction: Upload}); err != nil {
			t.Fatal(err)
		}
		var a answer
		if err := json.NewDecoder(conn).Decode(&a); err != nil || a.Error != "" {
			t.Fatalf("a test within the limit was refused: %v %q", err, a.Error)
		}
	}
	_, err := Run(t.Context(), dial(t, addr), Download, time.Second)
	if err == nil || !strings.Contains(err.Error(), "too many") {
		t.Errorf("got %v, want a refusal", err)
	}
}

func TestRunBadAgent(t *testing.T) {
	for _, tt := range []struct{ name, send, want string }{
		{"refusal", `{"error":"no"}`, "no"},
		{"not JSON", "SSH-2.0-x\r\n", "cannot read the agent's answer"},
		{"silence", "", "cannot read the agent's answer"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			near, far := net.Pipe()
			go func() {
				io.ReadAll(io.LimitReader(far, 1))
				go io.Copy(io.Discard, far)
				io.WriteString(far, tt.send)
				far.Close()
			}()
			_, err := Run(t.Context(), near, Download, time.Second)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want it to contain %q", err, tt.want)
			}
		})
	}
}

func TestBitsPerSecond(t *testing.T) {
	if got := (Result{Bytes: 1000, Elapsed: 2 * time.Second}).BitsPerSecond(); got != 4000 {
		t.Errorf("got %v, want 4000", got)
	}
	if got := (Result{}).BitsPerSecond(); got != 0 {
		t.Errorf("got %v, want 0", got)
	}
}

// FuzzDecode: any bytes give a value or an error, and what follows a value is not lost.
func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"version":2,"time":5000000000,"direction":1}`+"\n"), []byte("data"))
	f.Add([]byte(`{"version":2,"time":-1,"direction":9}`), []byte{0})
	f.Add([]byte(`{"version":1e99}`), []byte(nil))
	f.Add([]byte(`[[[[[[`), []byte("]"))
	f.Fuzz(func(t *testing.T, head, tail []byte) {
		var req request
		rest, err := decode(io.MultiReader(bytes.NewReader(head), bytes.NewReader(tail)), &req)
		if err != nil {
			return
		}
		if req.validate() == nil && (req.Time <= 0 || req.Time > MaxDuration) {
			t.Errorf("valid request of %v", req.Time)
		}
		after, err := io.ReadAll(rest)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.HasSuffix(append(bytes.Clone(head), tail...), after) {
			t.Errorf("%q is no tail of the input", after)
		}
	})
}
