package ptyhost

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"go.uber.org/goleak"
)

// The test binary is also the host process and its parent, as berthd's verbs `ptyhost` and `run` are.
const (
	envHost   = "PTYHOST_TEST_HOST"   // serve this socket
	envParent = "PTYHOST_TEST_PARENT" // start a host on this socket, detached, say so, and wait to be killed
)

func TestMain(m *testing.M) {
	if socket := os.Getenv(envHost); socket != "" {
		os.Exit(hostMain(socket))
	}
	if socket := os.Getenv(envParent); socket != "" {
		os.Exit(parentMain(socket))
	}
	goleak.VerifyTestMain(m)
}

func hostMain(socket string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := RunProcess(ctx, socket, slog.New(slog.NewTextHandler(os.Stderr, nil))); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func parentMain(socket string) int {
	if err := Dial(socket).Ensure(context.Background(), func() error { return startHost(socket) }); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println("ready")
	select {}
}

// within bounds a wait for something that should come at once; it only ever elapses in a failing test.
const within = 20 * time.Second

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	t.Cleanup(cancel)
	return ctx
}

// startTestHost serves a host in this process and returns a client of it.
func startTestHost(t testing.TB) *Client {
	t.Helper()
	dir, err := os.MkdirTemp("", "ptyhost") // t.TempDir's names are too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "s")
	l, err := Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() {
		served <- NewHost(HostConfig{Log: slog.New(slog.NewTextHandler(t.Output(), nil))}).Serve(ctx, l)
	}()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-served:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(within):
			t.Error("Serve does not end")
		}
	})
	return Dial(socket)
}

var testEnv = []string{"PATH=/usr/local/bin:/usr/bin:/bin", "TERM=xterm-256color", "LC_ALL=C.UTF-8", "HOME=/", "PS1=$ "}

func shell(script string) *CreateRequest {
	return &CreateRequest{Argv: []string{"/bin/sh", "-c", script}, Env: testEnv}
}

func attach(t testing.TB, c *Client, req AttachRequest) *Attachment {
	t.Helper()
	if req.ID == "" {
		req.ID = uuid.NewString()
	}
	if req.Size == (Size{}) {
		req.Size = Size{Rows: 24, Cols: 80}
	}
	a, err := c.Attach(testContext(t), req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	return a
}

// watcher reads an attachment all the time and lets a test wait for what it shows.
type watcher struct {
	*Attachment
	mu   sync.Mutex
	all  []byte
	more chan struct{}
	err  error
}

func watch(t testing.TB, a *Attachment) *watcher {
	w := &watcher{Attachment: a, more: make(chan struct{}, 1)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 32<<10)
		for {
			n, err := a.Read(buf)
			w.mu.Lock()
			w.all = append(w.all, buf[:n]...)
			w.err = err
			w.mu.Unlock()
			select {
			case w.more <- struct{}{}:
			default:
			}
			if err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() {
		a.Close()
		<-done
	})
	return w
}

func (w *watcher) output() ([]byte, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return bytes.Clone(w.all), w.err
}

// until waits until ok holds for all that was read.
func (w *watcher) until(t testing.TB, what string, ok func([]byte) bool) {
	t.Helper()
	deadline := time.After(within)
	for {
		out, err := w.output()
		if ok(out) {
			return
		}
		if err != nil {
			t.Fatalf("no %s before the end (%v): %q", what, err, tail(out))
		}
		select {
		case <-w.more:
		case <-deadline:
			t.Fatalf("no %s: %q", what, tail(out))
		}
	}
}

func (w *watcher) expect(t testing.TB, text string) {
	t.Helper()
	w.until(t, fmt.Sprintf("%q", text), func(out []byte) bool { return bytes.Contains(out, []byte(text)) })
}

func tail(b []byte) []byte { return b[max(0, len(b)-600):] }

// eventually waits for a condition that nothing announces.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(within)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("it never came to this: %s", what)
		}
	}
}

// readAll reads an attachment to its end.
func readAll(t testing.TB, a *Attachment) string {
	t.Helper()
	stop := time.AfterFunc(within, func() { a.Close() })
	defer stop.Stop()
	out, err := io.ReadAll(a)
	if err != nil {
		t.Fatalf("after %q: %v", tail(out), err)
	}
	return string(out)
}

func wantExit(t testing.TB, a *Attachment, want ExitStatus) {
	t.Helper()
	got, err := a.Wait()
	if err != nil || got != want {
		t.Errorf("ended with %+v, %v; want %+v", got, err, want)
	}
}

func isClosed(err error) bool { return errors.Is(err, net.ErrClosed) }
