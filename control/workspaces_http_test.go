package control

import (
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/coder/websocket"
	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/tailnetpb"
)

// TestStockClient asks what a stock command line asks on its way to an agent, and reads of the answers
// what it reads.
func TestStockClient(t *testing.T) {
	x := configured(t, Config{})
	id, token := x.declared("demo")
	child := store.Agent{ID: uuid.New(), Name: "api", ParentID: id}
	if err := x.store.CreateSubAgent(t.Context(), child); err != nil {
		t.Fatal(err)
	}
	x.connect(token)
	eventually(t, "the agent is connected", func() bool {
		var a wire.Agent
		x.get("/api/v2/workspaceagents/"+id.String(), &a)
		return a.Status == wire.AgentConnected
	})
	var me wire.User
	x.get("/api/v2/users/me", &me)
	if me.ID == uuid.Nil || me.Username != "admin" || me.Status != "active" || len(me.OrganizationIDs) != 1 {
		t.Errorf("user %+v", me)
	}
	var byID wire.User
	x.get("/api/v2/users/"+me.ID.String(), &byID)
	if diff := cmp.Diff(me, byID); diff != "" {
		t.Error(diff)
	}

	var w wire.Workspace
	x.get("/api/v2/users/me/workspace/demo", &w)
	type seen struct {
		ID, OwnerID                              uuid.UUID
		Name, Owner, Transition, Status, Job     string
		Resources                                int
		Agents                                   []string
		Parent                                   uuid.UUID
		FirstStatus                              wire.AgentStatus
		Outdated, Healthy, Completed, HasVersion bool
	}
	r := w.LatestBuild.Resources[0]
	got := seen{w.ID, w.OwnerID, w.Name, w.OwnerName, w.LatestBuild.Transition, w.LatestBuild.Status, w.LatestBuild.Job.Status,
		len(w.LatestBuild.Resources), []string{r.Agents[0].Name, r.Agents[1].Name}, r.Agents[1].ParentID.UUID, r.Agents[0].Status,
		w.Outdated, w.Health.Healthy, !w.LatestBuild.Job.CompletedAt.IsZero(), w.LatestBuild.TemplateVersionID != uuid.Nil}
	want := seen{id, me.ID, "demo", "admin", "start", "running", "succeeded", 1, []string{"demo", "api"}, id, wire.AgentConnected, false, false, true, true}
	if diff := cmp.Diff(want, got); diff != "" { // the sub-agent never came, so it is not healthy
		t.Error(diff)
	}
	if diff := cmp.Diff([]uuid.UUID{child.ID}, w.Health.FailingAgents); diff != "" {
		t.Error(diff)
	}
	var again wire.Workspace
	x.get("/api/v2/workspaces/"+w.ID.String(), &again)
	if diff := cmp.Diff(w.LatestBuild.ID, again.LatestBuild.ID); diff != "" {
		t.Error(diff)
	}
	var v wire.TemplateVersion
	x.get("/api/v2/templateversions/"+w.LatestBuild.TemplateVersionID.String(), &v)
	if v.ID != w.LatestBuild.TemplateVersionID || v.TemplateID != w.TemplateID || v.Job.Status != "succeeded" {
		t.Errorf("version %+v", v)
	}

	for _, tt := range []struct {
		method, path, body string
		status             int
		want               string // with a trailing …, how it begins
	}{
		{"GET", "appearance", "", 200, `{"application_name":"berth","logo_url":"","docs_url":"","announcement_banners":[],"support_links":[]}`},
		{"GET", "applications/host", "", 200, `{"host":""}`},
		{"GET", "users/first", "", 200, `{"message":"The initial user has already been created!"}`},
		{"GET", "users/me/gitsshkey", "", 200, `{"user_id":"` + me.ID.String() + `","public_key":"ssh-ed25519 …`},
		{"GET", "users/nobody", "", 404, `{"message":"Resource not found or you do not have access to this resource"}`},
		{"GET", "users/nobody/workspace/demo", "", 404, `{"message":"Resource not found or you do not have access to this resource"}`},
		{"GET", "users/me/workspace/nothing", "", 404, `{"message":"Resource not found or you do not have access to this resource"}`},
		{"GET", "users/me/workspace/api", "", 404, `{"message":"Resource not found or you do not have access to this resource"}`},
		{"GET", "workspaces/x", "", 400, `{"message":"Invalid UUID \"x\".",…`},
		{"GET", "workspaces/" + uuid.NewString(), "", 404, `{"message":"Resource not found or you do not have access to this resource"}`},
		{"GET", "workspaces/" + child.ID.String(), "", 404, `{"message":"Resource not found or you do not have access to this resource"}`},
		{"GET", "templateversions/" + uuid.NewString(), "", 404, `{"message":"Resource not found or you do not have access to this resource"}`},
		{"POST", "workspaces/" + id.String() + "/usage", `{"agent_id":"` + id.String() + `","app_name":"ssh"}`, 204, ""},
		{"POST", "workspaces/" + id.String() + "/usage", `{"agent_id":"` + child.ID.String() + `","app_name":"vscode"}`, 204, ""},
		{"POST", "workspaces/" + id.String() + "/usage", "", 204, ""},
		{"POST", "workspaces/" + id.String() + "/usage", "{", 400, `{"message":"Request body must be valid JSON.",…`},
		{"POST", "workspaces/" + id.String() + "/usage", `{"agent_id":"` + uuid.NewString() + `","app_name":"mail"}`, 400, `{"message":"Validation failed.","validations":[{"field":"app_name","detail":"Must be one of ssh, vscode, jetbrains, reconnecting-pty, not \"mail\""},{"field":"agent_id",…`},
		{"GET", "workspaces?q=colour:red&limit=-1", "", 400, `{"message":"Invalid workspace search query.","validations":[{"field":"q",…`},
		{"GET", "init-script/plan9/mips", "", 400, `{"message":"Unknown os/arch: plan9/mips"}`},
		{"GET", "init-script/linux/amd64", "", 404, `{"message":"This control server starts no agents of Coder.",…`},
	} {
		status, body := x.call(tt.method, "/api/v2/"+tt.path, tt.body, x.asUser()...)
		begin, partial := strings.CutSuffix(tt.want, "…")
		if status != tt.status || partial && !strings.HasPrefix(body, begin) || !partial && strings.TrimSuffix(body, "\n") != tt.want {
			t.Errorf("%s %s: %d %s", tt.method, tt.path, status, body)
		}
	}
	x.get("/api/v2/workspaces/"+w.ID.String(), &again)
	if !again.LastUsedAt.After(w.LastUsedAt) {
		t.Errorf("used at %v, then %v", w.LastUsedAt, again.LastUsedAt)
	}
}

// TestSpoiledLatency: an agent that tells nonsense of relays hides itself, as the protocol has it, and
// nobody else.
func TestSpoiledLatency(t *testing.T) {
	x := serve(t, Config{})
	id, token := x.create("demo")
	stream, err := x.connect(token).tailnet.Coordinate(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	node := &tailnetpb.Node{PreferredDerp: 999, Addresses: []string{wire.AgentPrefixes(id)[0].String()}, DerpLatency: map[string]float64{"near": 0.1}}
	if err := stream.Send(&tailnetpb.CoordinateRequest{UpdateSelf: &tailnetpb.CoordinateRequest_UpdateSelf{Node: node}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the agent's page fails", func() bool {
		status, body := x.call("GET", "/api/v2/workspaceagents/"+id.String(), "", x.asUser()...)
		return status == 500 && strings.Contains(body, `key \"near\" does not begin with a region`)
	})
	var list wire.Workspaces
	x.get("/api/v2/workspaces", &list)
	if len(list.Workspaces) != 1 {
		t.Errorf("%d workspaces", len(list.Workspaces))
	}
}

func TestWorkspaceList(t *testing.T) {
	x := serve(t, Config{})
	for _, name := range []string{"alpha", "beta", "gamma"} {
		x.create(name)
	}
	for query, want := range map[string]string{
		"":                              "3 alpha beta gamma",
		"q=owner:me":                    "3 alpha beta gamma",
		"q=owner:somebody":              "0",
		"q=owner%3Aadmin+name%3Abet":    "1 beta",
		"q=admin%2FGAM":                 "1 gamma",
		"q=mm":                          "1 gamma",
		"q=status:running&limit=1":      "3 alpha",
		"limit=2&offset=1":              "3 beta gamma",
		"offset=9&q=name%3A%22alpha%22": "1",
	} {
		var list wire.Workspaces
		x.get("/api/v2/workspaces?"+query, &list)
		got := []string{string(rune('0' + list.Count))}
		for _, w := range list.Workspaces {
			got = append(got, w.Name)
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%q: %q, want %q", query, got, want)
		}
	}
}

// TestWatchWorkspace: a session ends by the word that its workspace is gone.
func TestWatchWorkspace(t *testing.T) {
	x := serve(t, Config{})
	id, _ := x.create("demo")
	path := "/api/v2/workspaces/" + id.String() + "/watch"
	stream := x.events(path, x.asUser()...)
	ws, _, err := websocket.Dial(t.Context(), x.url+path+"-ws", &websocket.DialOptions{HTTPClient: x.http, HTTPHeader: http.Header{wire.HeaderSessionToken: {x.key.Reveal()}}})
	if err != nil {
		t.Fatal(err)
	}
	defer ws.CloseNow()
	for _, want := range []string{"start running", "delete deleted"} {
		_, data := stream.next()
		_, message, err := ws.Read(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var event struct {
			Type string
			Data wire.Workspace
		}
		var w wire.Workspace
		if err := json.Unmarshal(message, &event); err != nil || event.Type != "data" {
			t.Fatalf("%s: %v", message, err)
		}
		if err := json.Unmarshal([]byte(data), &w); err != nil {
			t.Fatal(err)
		}
		for _, got := range []wire.Workspace{w, event.Data} {
			if got.ID != id || got.LatestBuild.Transition+" "+got.LatestBuild.Status != want {
				t.Errorf("%s %s, want %s", got.LatestBuild.Transition, got.LatestBuild.Status, want)
			}
		}
		if want == "start running" {
			if err := x.store.DeleteAgent(t.Context(), id); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := io.ReadAll(stream.body); err != nil {
		t.Errorf("the stream ended with %v", err)
	}
	if _, _, err := ws.Read(t.Context()); websocket.CloseStatus(err) != websocket.StatusNormalClosure {
		t.Errorf("the socket ended with %v", err)
	}
}

func FuzzWorkspaceQuery(f *testing.F) {
	f.Add("q=owner:me+name:x+a/b&limit=5&offset=1")
	f.Add(`q="x":y&limit=-1`)
	f.Add("limit=99999999999")
	f.Fuzz(func(t *testing.T, text string) {
		query, _ := url.ParseQuery(text)
		s, e := parseSearch(query)
		if e == nil && (s.limit < 1 || s.limit > maxWorkspaces || s.offset < 0) || e != nil && len(e.Validations) == 0 {
			t.Errorf("%q: %+v, %+v", text, s, e)
		}
	})
}
