package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/coder/websocket"
	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"storj.io/drpc/drpcmux"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
	"github.com/berthd/berth/wire/rpc"
)

type agentService struct {
	agentpb.DRPCAgentUnimplementedServer
}

func (*agentService) GetManifest(context.Context, *agentpb.GetManifestRequest) (*agentpb.Manifest, error) {
	return &agentpb.Manifest{AgentName: "demo"}, nil
}

// An old server refuses the newest version; the link steps down to the server's and remembers it.
func TestConnectAgentStepsDown(t *testing.T) {
	mux := drpcmux.New()
	if err := agentpb.DRPCRegisterAgent(mux, &agentService{}); err != nil {
		t.Fatal(err)
	}
	var asked []string
	c := against(t, func(w http.ResponseWriter, r *http.Request) {
		version := r.URL.Query().Get("version")
		asked = append(asked, version)
		if r.Header.Get(wire.HeaderSessionToken) != "token" || r.URL.Query().Get("role") != "agent" {
			t.Errorf("request %v %v", r.URL, r.Header)
		}
		if version != "2.6" {
			w.Header().Set("Content-Type", "application/json; charset=utf-8")
			w.WriteHeader(http.StatusBadRequest)
			fmt.Fprintf(w, `{"message":"Unknown or unsupported API version","validations":[{"field":"version","detail":"server is at version 2.6, behind requested minor version %s"}]}`, version)
			return
		}
		conn, err := websocket.Accept(w, r, nil)
		if err != nil {
			t.Error(err)
			return
		}
		if err := rpc.Serve(r.Context(), websocket.NetConn(r.Context(), conn, websocket.MessageBinary), mux, rpc.ServeOptions{}); err != nil {
			t.Error(err)
		}
	})
	for range 2 {
		link, err := c.ConnectAgent(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if want := (wire.Version{Major: 2, Minor: 6}); link.Version != want {
			t.Errorf("version %v, want %v", link.Version, want)
		}
		if m, err := link.Agent.GetManifest(t.Context(), &agentpb.GetManifestRequest{}); err != nil || m.AgentName != "demo" {
			t.Errorf("GetManifest = %v, %v", m, err)
		}
		link.Close()
		<-link.Done()
	}
	if diff := cmp.Diff([]string{"2.10", "2.6", "2.6"}, asked); diff != "" {
		t.Errorf("versions asked for (-want +got):\n%s", diff)
	}
}

// A resume token travels in the URL; an error about that URL does not show it.
func TestErrorsHideTheResumeToken(t *testing.T) {
	c := against(t, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	_, err := c.Coordinate(t.Context(), uuid.New(), "planted")
	if err == nil || !errors.Is(err, io.EOF) || strings.Contains(err.Error(), "planted") {
		t.Errorf("the error is %v", err)
	}
}

// A list is as long as there are agents.
func TestLongList(t *testing.T) {
	many := make([]wire.AgentSummary, 10_000)
	for i := range many {
		many[i] = wire.AgentSummary{ID: uuid.New(), Name: fmt.Sprintf("agent-%d", i), Status: wire.AgentConnected, LifecycleState: "ready"}
	}
	body, err := json.Marshal(many)
	if err != nil {
		t.Fatal(err)
	}
	if len(body) <= wire.MaxJSONBody {
		t.Fatalf("a list of %d bytes proves nothing", len(body))
	}
	c := against(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		w.Write(body)
	})
	got, err := c.Agents(t.Context())
	if diff := cmp.Diff(many, got); err != nil || diff != "" {
		t.Errorf("%v (-want +got)\n%s", err, diff)
	}
}

// TestConnectAgentGivesUpOnVersions: a server that only ever names others is asked no version twice, and
// after the failed dial it is asked for the newest again.
func TestConnectAgentGivesUpOnVersions(t *testing.T) {
	answers := map[string]string{
		"2.10": "server is at version 2.6, behind requested minor version 2.10",
		"2.6":  "server is at version 2.3, behind requested minor version 2.6",
		"2.3":  "server is at version 2.6, behind requested minor version 2.3",
	}
	var asked []string
	c := against(t, func(w http.ResponseWriter, r *http.Request) {
		version := r.URL.Query().Get("version")
		asked = append(asked, version)
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		w.WriteHeader(http.StatusBadRequest)
		fmt.Fprintf(w, `{"message":"Unknown or unsupported API version","validations":[{"field":"version","detail":%q}]}`, answers[version])
	})
	for range 2 {
		if _, err := c.ConnectAgent(t.Context()); Explain(err).Kind != KindVersion {
			t.Errorf("got %v", err)
		}
	}
	if diff := cmp.Diff([]string{"2.10", "2.6", "2.3", "2.10", "2.6", "2.3"}, asked); diff != "" {
		t.Errorf("versions asked for (-want +got):\n%s", diff)
	}
}
