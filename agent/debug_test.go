package agent

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// lockedBuffer is a log that a test reads while it is written.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// freeAddress is one that nothing listens on.
func freeAddress(t *testing.T) string {
	l := listenLoopback(t)
	defer l.Close()
	return l.Addr().String()
}

func TestDebugListeners(t *testing.T) {
	dir := shortDir(t)
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("kept"), 0o600); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "s")
	status, metrics := freeAddress(t), freeAddress(t)
	var logged lockedBuffer
	log := slog.New(slog.NewTextHandler(&logged, nil))
	a := &agent{}
	a.debug = debugServers(Debug{Pprof: "unix:" + socket, Prometheus: metrics, Status: status}, testAPI(), log)
	a.debug = append(a.debug, debugServers(Debug{Pprof: "0.0.0.0:0", Status: "unix:" + file}, testAPI(), log)...)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.runDebug(ctx) }()
	defer func() {
		http.DefaultClient.CloseIdleConnections()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	eventually(t, "all five were tried", func() bool {
		return strings.Count(logged.String(), "serving what") == 3 && strings.Count(logged.String(), "cannot serve") == 2
	})
	for _, want := range []string{"open to others", "no socket"} {
		if !strings.Contains(logged.String(), want) {
			t.Errorf("log %s does not say %q", logged.String(), want)
		}
	}
	if kept, err := os.ReadFile(file); string(kept) != "kept" {
		t.Errorf("the file became %q, %v", kept, err)
	}
	overSocket := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	defer overSocket.CloseIdleConnections()
	for _, tt := range []struct {
		client    *http.Client
		url, host string
		status    int
		contains  string
	}{
		{overSocket, "http://berthd/debug/pprof/goroutine?debug=1", "", 200, "goroutine profile"},
		{http.DefaultClient, "http://" + metrics + "/anything", "", 200, "berthd_ssh_sessions"},
		{http.DefaultClient, "http://" + status + "/debug/manifest", "", 200, `"agent_name":"demo"`},
		{http.DefaultClient, "http://" + status + "/debug/logs", "", 200, "a line"},
		{http.DefaultClient, "http://" + status + "/api/v0/containers", "", 404, "404 not found\n"},
		{http.DefaultClient, "http://" + status + "/debug/manifest", "evil.example.com", 403, "evil.example.com"},
		{http.DefaultClient, "http://" + metrics + "/metrics", "evil.example.com", 403, "evil.example.com"},
	} {
		req, err := http.NewRequestWithContext(t.Context(), "GET", tt.url, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = tt.host
		resp, err := tt.client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != tt.status || !strings.Contains(string(body), tt.contains) || strings.Contains(string(body), planted) {
			t.Errorf("%s as %q: %d %s", tt.url, tt.host, resp.StatusCode, body)
		}
	}
}
