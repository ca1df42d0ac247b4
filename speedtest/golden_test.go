package speedtest

import (
	"bytes"
	"io"
	"net"
	"testing"
	"time"

	"github.com/berthd/berth/internal/golden"
)

// A client writes the recorded requests and takes the recorded answer.
func TestGoldenClient(t *testing.T) {
	for name, tt := range map[string]struct {
		direction Direction
		d         time.Duration
	}{
		"speedtest-request":    {Download, 5 * time.Second},
		"speedtest-request-up": {Upload, time.Second},
	} {
		near, far := net.Pipe()
		done := make(chan error, 1)
		go func() { _, err := Run(t.Context(), near, tt.direction, tt.d); done <- err }()
		want := golden.Bytes(t, name)
		got := make([]byte, len(want))
		if _, err := io.ReadFull(far, got); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: we write %q, %v; want %q", name, got, err, want)
		}
		if _, err := far.Write(golden.Bytes(t, "speedtest-answer")); err != nil {
			t.Fatal(err)
		}
		if tt.direction == Upload {
			// Data is what comes next, so the answer was taken.
			if _, err := io.ReadFull(far, make([]byte, 1<<10)); err != nil {
				t.Error(err)
			}
		}
		far.Close()
		if err := <-done; tt.direction == Download && err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// An agent takes the recorded requests and writes the recorded answer.
func TestGoldenAgent(t *testing.T) {
	addr := serve(t)
	for _, name := range []string{"speedtest-request", "speedtest-request-up"} {
		conn := dial(t, addr)
		if _, err := conn.Write(golden.Bytes(t, name)); err != nil {
			t.Fatal(err)
		}
		want := golden.Bytes(t, "speedtest-answer")
		got := make([]byte, len(want))
		if _, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: we answer %q, %v; want %q", name, got, err, want)
		}
		conn.Close()
	}
}
