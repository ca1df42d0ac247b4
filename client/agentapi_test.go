package client

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"github.com/berthd/berth/wire"
)

// agentAPI returns the API of an agent that answers with h.
func agentAPI(t *testing.T, h http.Handler) *AgentAPI {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	a := NewAgentAPI(uuid.New(), func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", srv.Listener.Addr().String())
	})
	t.Cleanup(a.Close)
	return a
}

func portNumbers(ports []wire.ListeningPort) (numbers []uint16) {
	for _, p := range ports {
		numbers = append(numbers, p.Port)
	}
	return numbers
}

func TestWatchPorts(t *testing.T) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+wire.PathAgentPorts+"/watch", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.RawQuery != "hidden=true&network=all" || r.Header.Get(wire.HeaderSessionToken) != "" {
			t.Errorf("asked with %q and %v", r.URL.RawQuery, r.Header)
		}
		conn, err := websocket.Accept(w, r, nil)
		if err != nil {
			return
		}
		defer conn.CloseNow()
		for _, message := range []string{`{"ports":[{"port":80}]}` + "\n", `{"ports":[]}` + "\n", `{"ports":[{"port":443,"network":"udp"}]}` + "\n"} {
			if conn.Write(r.Context(), websocket.MessageText, []byte(message)) != nil {
				return
			}
		}
		conn.Close(websocket.StatusGoingAway, "the agent stops")
	})
	var seen [][]uint16
	var last error
	for ports, err := range agentAPI(t, mux).WatchPorts(t.Context(), true) {
		if last = err; err == nil {
			seen = append(seen, portNumbers(ports.Ports))
		}
	}
	if diff := cmp.Diff([][]uint16{{80}, nil, {443}}, seen); diff != "" || last == nil || !strings.Contains(last.Error(), "the agent stops") {
		t.Errorf("%s, then %v", diff, last)
	}
}

// A stock agent has a list and no watch.
func TestWatchOfStockAgent(t *testing.T) {
	var asked atomic.Int32
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+wire.PathAgentPorts, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		n := asked.Add(1)
		if n == 2 { // nothing new
			n = 1
		}
		json.NewEncoder(w).Encode(wire.ListeningPorts{Ports: []wire.ListeningPort{{Port: uint16(n)}}})
	})
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	var seen [][]uint16
	for ports, err := range agentAPI(t, mux).WatchPorts(ctx, false) {
		if err != nil {
			t.Fatal(err)
		}
		if seen = append(seen, portNumbers(ports.Ports)); len(seen) == 2 {
			break
		}
	}
	if diff := cmp.Diff([][]uint16{{1}, {3}}, seen); diff != "" {
		t.Error(diff)
	}
}

func TestWatchThatCannotBe(t *testing.T) {
	refuse := func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusForbidden)
		w.Write([]byte(`{"message":"Dev Container feature not enabled."}`))
	}
	say := func(message string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			conn, err := websocket.Accept(w, r, nil)
			if err != nil {
				return
			}
			defer conn.CloseNow()
			conn.Write(r.Context(), websocket.MessageText, []byte(message))
			conn.Read(r.Context())
		}
	}
	for _, tt := range []struct {
		name, path string
		h          http.HandlerFunc
		want       string
	}{
		{"switched off", "", refuse, "not enabled"},
		{"no JSON", "/watch", say("<html>"), "cannot read what the agent says"},
		{"two lists", "/watch", say(`{} {}`), "something follows"},
		{"far too long", "/watch", say(`{"warnings":["` + strings.Repeat("x", wire.MaxJSONAnswer) + `"]}`), "limit"},
		{"sent elsewhere", "/watch", http.RedirectHandler("http://192.0.2.1/", http.StatusFound).ServeHTTP, "redirect"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			mux := http.NewServeMux()
			mux.HandleFunc("GET "+wire.PathAgentContainers+tt.path, tt.h)
			var errs []error
			for _, err := range agentAPI(t, mux).WatchContainers(t.Context()) {
				errs = append(errs, err)
			}
			if len(errs) != 1 || errs[0] == nil || !strings.Contains(errs[0].Error(), tt.want) {
				t.Errorf("got %v, want one error with %q", errs, tt.want)
			}
		})
	}
}

func TestWatchEndsWithItsContext(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	a := NewAgentAPI(uuid.New(), func(ctx context.Context) (net.Conn, error) { stop(); <-ctx.Done(); return nil, ctx.Err() })
	defer a.Close()
	for _, err := range a.WatchPorts(ctx, false) {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	}
}

// FuzzWatchMessage decodes what an agent might send in the place of a list.
func FuzzWatchMessage(f *testing.F) {
	f.Add([]byte(`{"ports":[{"process_name":"sshd","network":"tcp","port":22,"addresses":["::"],"pid":1,"started_at":"2024-01-01T00:00:00Z"}]}` + "\n"))
	f.Add([]byte(`{"devcontainers":[],"containers":[{"id":"0123","created_at":"2024-01-01T00:00:00Z","labels":{"a":"b"},"ports":[{"port":1,"host_port":2}]}],"warnings":["w"]}`))
	f.Add([]byte(`{"ports":[{"port":65536}]}`))
	f.Add([]byte(`{"ports":null}{}`))
	f.Add([]byte(`[[[[`))
	f.Fuzz(func(t *testing.T, data []byte) {
		ports, err := decodeList[wire.ListeningPorts](data)
		if err != nil && ports.Ports != nil {
			t.Errorf("an error and %v", ports)
		}
		if err == nil && !json.Valid(data) {
			t.Errorf("%q is taken for a list", data)
		}
		if containers, err := decodeList[wire.Containers](data); err != nil && containers.Containers != nil {
			t.Errorf("an error and %v", containers)
		}
	})
}
