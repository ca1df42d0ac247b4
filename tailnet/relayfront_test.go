package tailnet

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/berthd/berth/wire"
)

// TestRelayFrontBoundsRequests: any user of the machine can connect to it, and must not fill its memory.
func TestRelayFrontBoundsRequests(t *testing.T) {
	n := bareNode(t)
	for name, tt := range map[string]struct {
		header int
		want   string
	}{
		"short": {100, "HTTP/1.1 403"},
		"long":  {4 * maxFrontRequest, ""},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := net.Dial("tcp", n.front.listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(20 * time.Second))
			// It may be cut off before all is written.
			io.WriteString(c, "GET /derp HTTP/1.1\r\nHost: x\r\nX: "+strings.Repeat("x", tt.header)+"\r\n\r\n")
			answer := make([]byte, len(tt.want)+1)
			size, _ := io.ReadAtLeast(c, answer, max(len(tt.want), 1))
			if got := string(answer[:min(size, len(tt.want))]); got != tt.want || tt.want == "" && size > 0 {
				t.Errorf("answer %q, want %q", answer[:size], tt.want)
			}
		})
	}
}

// TestRelayRedirectIsNotFollowed: the headers are meant for the relay alone.
func TestRelayRedirectIsNotFollowed(t *testing.T) {
	var strayed atomic.Int64
	elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { strayed.Add(1) }))
	defer elsewhere.Close()
	relay := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, elsewhere.URL+"/derp", http.StatusFound)
	}))
	defer relay.Close()
	n, err := New(Config{
		Prefixes:       wire.AgentPrefixes(uuid.New()),
		ForceWebsocket: true,
		Header:         func() http.Header { return http.Header{"X-Access": {"planted"}} },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	at := relay.Listener.Addr().(*net.TCPAddr)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	_, _, err = n.front.connect(ctx, cancel, &region{id: 1, nodes: []relayNode{{scheme: "http", host: "127.0.0.1", port: at.Port}}})
	if err == nil || strayed.Load() != 0 {
		t.Errorf("%d requests went where the relay sent them; %v", strayed.Load(), err)
	}
}

// TestUnreachableRelayIsToldOnce: the library tries on every few seconds, for as long as a server is away.
func TestUnreachableRelayIsToldOnce(t *testing.T) {
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	var out bytes.Buffer // written to by the requests below, one after the other
	f, err := newRelayFront(&Config{Log: slog.New(slog.NewTextHandler(&out, nil))}, func() {})
	if err != nil {
		t.Fatal(err)
	}
	f.set(map[int]*region{1: {id: 1, nodes: []relayNode{{scheme: "http", host: "127.0.0.1", port: closed.Addr().(*net.TCPAddr).Port}}}})
	for range 3 {
		c, err := net.Dial("tcp", f.listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(c, "GET /derp HTTP/1.1\r\nHost: "+f.node(1).HostName+"\r\n\r\n")
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil || resp.StatusCode != http.StatusBadGateway {
			t.Fatalf("answer %v, %v", resp, err)
		}
		c.Close()
	}
	f.close()
	if n := strings.Count(out.String(), "cannot reach a relay"); n != 1 {
		t.Errorf("told %d times:\n%s", n, &out)
	}
}
