package control

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
	"github.com/berthd/berth/wire/tailnetpb"
)

type (
	subApp      = agentpb.CreateSubAgentRequest_App
	subAppCheck = agentpb.CreateSubAgentRequest_App_Healthcheck
)

// created makes a sub-agent over the link of its parent.
func (l *agentLink) created(t *testing.T, req *agentpb.CreateSubAgentRequest) (*agentpb.CreateSubAgentResponse, uuid.UUID, wire.Secret) {
	t.Helper()
	resp, err := l.agent.CreateSubAgent(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	id, err1 := uuid.FromBytes(resp.GetAgent().GetId())
	token, err2 := uuid.FromBytes(resp.GetAgent().GetAuthToken())
	if err1 != nil || err2 != nil {
		t.Fatalf("agent %v: %v, %v", resp.GetAgent(), err1, err2)
	}
	return resp, id, wire.Secret(token.String())
}

// TestSubAgents walks the life of a sub-agent.
func TestSubAgents(t *testing.T) {
	x := configured(t, Config{})
	parentID, parentToken := x.declared("demo")
	parent := x.connect(parentToken)
	if subs, err := parent.agent.ListSubAgents(t.Context(), &agentpb.ListSubAgentsRequest{}); err != nil || len(subs.GetAgents()) != 0 {
		t.Fatalf("sub-agents from nowhere: %v, %v", subs, err)
	}
	share, tab := agentpb.CreateSubAgentRequest_App_PUBLIC, agentpb.CreateSubAgentRequest_App_TAB
	unknownShare := agentpb.CreateSubAgentRequest_App_SharingLevel(99)
	resp, id, token := parent.created(t, &agentpb.CreateSubAgentRequest{
		Name: "dev", Directory: "/workspaces/dev", Architecture: "arm64", OperatingSystem: "linux",
		DisplayApps: []agentpb.CreateSubAgentRequest_DisplayApp{agentpb.CreateSubAgentRequest_VSCODE, agentpb.CreateSubAgentRequest_WEB_TERMINAL},
		Apps: []*subApp{
			{Slug: "web", Url: proto.String("http://localhost:3000"), DisplayName: proto.String("Web"), Group: proto.String("g"), Share: &share, OpenIn: &tab, Subdomain: proto.Bool(true),
				Healthcheck: &subAppCheck{Url: "http://localhost:3000/ok", Interval: 7, Threshold: 2}},
			{Slug: ""},
			{Slug: "Web"},
			{Slug: "web"},
			{Slug: "plain"},
			{Slug: "far", Share: &unknownShare},
			{Slug: "evil", External: proto.Bool(true), Url: proto.String("javascript:alert(1)")},
		},
	})
	type failure struct {
		index int32
		field string
	}
	var failed []failure
	for _, f := range resp.GetAppCreationErrors() {
		failed = append(failed, failure{f.GetIndex(), f.GetField()})
		if f.GetError() == "" {
			t.Errorf("app %d failed without a word", f.GetIndex())
		}
	}
	want := []failure{{1, "slug"}, {2, "slug"}, {3, "slug"}, {5, "share"}, {6, "url"}}
	if diff := cmp.Diff(want, failed, cmp.AllowUnexported(failure{})); diff != "" {
		t.Errorf("apps that failed (-want +got):\n%s", diff)
	}

	// Its token opens a link of its own.
	child := x.connect(token)
	m, err := child.agent.GetManifest(t.Context(), &agentpb.GetManifestRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if got, _ := uuid.FromBytes(m.GetAgentId()); got != id || m.GetAgentName() != "dev" || m.GetDirectory() != "/workspaces/dev" {
		t.Errorf("manifest of %v %q in %q", got, m.GetAgentName(), m.GetDirectory())
	}
	if got, _ := uuid.FromBytes(m.GetParentId()); got != parentID || string(m.GetWorkspaceId()) != string(parentID[:]) || m.GetWorkspaceName() != "demo" {
		t.Errorf("parent %v, workspace %x %q", got, m.GetWorkspaceId(), m.GetWorkspaceName())
	}
	if pm, err := parent.agent.GetManifest(t.Context(), &agentpb.GetManifestRequest{}); err != nil || pm.ParentId != nil {
		t.Errorf("the parent has a parent %x, %v", pm.GetParentId(), err)
	}
	for _, app := range m.GetApps() {
		if len(app.GetId()) != 16 || app.GetHealthcheck() == nil || app.GetHealth() == 0 || app.GetSharingLevel() == 0 {
			t.Errorf("app %v would crash a stock agent", app)
		}
	}
	_, err = child.agent.UpdateStartup(t.Context(), &agentpb.UpdateStartupRequest{Startup: &agentpb.Startup{Version: "v2.0.0"}})
	if err != nil {
		t.Error(err)
	}
	stream, err := child.tailnet.Coordinate(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&tailnetpb.CoordinateRequest{UpdateSelf: &tailnetpb.CoordinateRequest_UpdateSelf{Node: &tailnetpb.Node{
		PreferredDerp: 999, Addresses: []string{wire.AgentPrefixes(id)[0].String()}}}}); err != nil {
		t.Fatal(err)
	}

	var view wire.Agent
	x.get("/api/v2/workspaceagents/"+id.String(), &view)
	if !view.ParentID.Valid || view.ParentID.UUID != parentID || view.ResourceID != parentID || view.InstanceID != "" ||
		view.Architecture != "arm64" || view.Status != wire.AgentConnected || view.Version != "v2.0.0" {
		t.Errorf("view %+v", view)
	}
	if diff := cmp.Diff([]string{"vscode", "web_terminal"}, view.DisplayApps); diff != "" {
		t.Error(diff)
	}
	var apps []string
	for _, app := range view.Apps {
		apps = append(apps, fmt.Sprint(app.Slug, " ", app.Health, " ", app.SharingLevel, " ", app.OpenIn, " ", app.Group, " ", app.Healthcheck.Interval, " ", app.Subdomain))
	}
	// The slugs are from sha256("dev/web") and sha256("dev/plain"), worked out by other means.
	wantApps := []string{slugOfWeb + "-web initializing public tab g 7 true", slugOfPlain + "-plain disabled owner slim-window  0 false"}
	if diff := cmp.Diff(wantApps, apps); diff != "" {
		t.Errorf("apps (-want +got):\n%s", diff)
	}
	var parentView wire.Agent
	x.get("/api/v2/workspaceagents/"+parentID.String(), &parentView)
	if parentView.ParentID.Valid {
		t.Errorf("the parent has a parent: %v", parentView.ParentID)
	}
	var rows []wire.AgentSummary
	x.get("/api/v2/berth/agents", &rows)
	if !slices.ContainsFunc(rows, func(r wire.AgentSummary) bool { return r.ID == id && r.Name == "demo.dev" }) {
		t.Errorf("the list has no demo.dev: %v", rows)
	}

	// The parent asks again, and takes up what is there.
	subs, err := parent.agent.ListSubAgents(t.Context(), &agentpb.ListSubAgentsRequest{})
	if err != nil || len(subs.GetAgents()) != 1 || !proto.Equal(subs.GetAgents()[0], resp.GetAgent()) {
		t.Errorf("list %v, %v; want %v", subs.GetAgents(), err, resp.GetAgent())
	}
	again, err := parent.agent.CreateSubAgent(t.Context(), &agentpb.CreateSubAgentRequest{Id: id[:], Name: "!", Directory: "/elsewhere",
		Apps: []*subApp{{}}, DisplayApps: []agentpb.CreateSubAgentRequest_DisplayApp{agentpb.CreateSubAgentRequest_SSH_HELPER}})
	if err != nil || !proto.Equal(again.GetAgent(), resp.GetAgent()) || len(again.GetAppCreationErrors()) != 0 {
		t.Errorf("by id: %v, %v", again, err)
	}
	x.get("/api/v2/workspaceagents/"+id.String(), &view)
	if view.Directory != "/elsewhere" || !slices.Equal(view.DisplayApps, []string{"ssh_helper"}) || len(view.Apps) != 2 {
		t.Errorf("after an update: %q %v, %d apps", view.Directory, view.DisplayApps, len(view.Apps))
	}
	if _, err := parent.agent.CreateSubAgent(t.Context(), &agentpb.CreateSubAgentRequest{Id: id[:]}); err != nil {
		t.Error(err)
	}
	x.get("/api/v2/workspaceagents/"+id.String(), &view)
	if view.Directory != "/elsewhere" || len(view.DisplayApps) != 0 {
		t.Errorf("after an update without a directory: %q %v", view.Directory, view.DisplayApps)
	}

	// It goes with its link and its token.
	child = x.connect(token)
	if _, err := parent.agent.DeleteSubAgent(t.Context(), &agentpb.DeleteSubAgentRequest{Id: id[:]}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-child.Closed():
	case <-time.After(wire.PingInterval + 5*time.Second):
		t.Error("its link is still open")
	}
	if status, _ := x.call("GET", "/api/v2/workspaceagents/me/rpc?version=2.10", "", as(token)...); status != http.StatusUnauthorized {
		t.Errorf("its token: %d", status)
	}
	if status, _ := x.call("GET", "/api/v2/workspaceagents/"+id.String(), "", x.asUser()...); status != http.StatusNotFound {
		t.Errorf("itself: %d", status)
	}
	if _, id2, _ := parent.created(t, &agentpb.CreateSubAgentRequest{Name: "dev"}); id2 == id {
		t.Error("another of the same name has the same id")
	}
	if strings.Contains(x.log.String(), token.Reveal()) {
		t.Error("the log holds its token")
	}
}

// First eight characters of base32hex(sha256("dev/web")) and of base32hex(sha256("dev/plain")):
// python3 -c 'import base64,hashlib,sys; print(base64.b32hexencode(hashlib.sha256(b"dev/web").digest())[:8].lower())'
const (
	slugOfWeb   = "76l3q1id"
	slugOfPlain = "i4p1ipfp"
)

// TestSubAgentRefusals sends what the protocol forbids.
func TestSubAgentRefusals(t *testing.T) {
	x := serve(t, Config{})
	_, token := x.create("demo")
	_, otherToken := x.create("other")
	parent, other := x.connect(token), x.connect(otherToken)
	_, id, childToken := parent.created(t, &agentpb.CreateSubAgentRequest{Name: "Taken"})
	child := x.connect(childToken)
	// The same name in another workspace is another name.
	_, foreign, _ := other.created(t, &agentpb.CreateSubAgentRequest{Name: "taken"})
	nobody := uuid.New()
	const notYours = "subagent does not belong to this parent agent"
	for name, tt := range map[string]struct {
		link *agentLink
		req  *agentpb.CreateSubAgentRequest
		want string
	}{
		"no name":        {parent, &agentpb.CreateSubAgentRequest{}, "cannot be empty"},
		"dots":           {parent, &agentpb.CreateSubAgentRequest{Name: "a.b"}, "does not match"},
		"two dashes":     {parent, &agentpb.CreateSubAgentRequest{Name: "a--b"}, "does not match"},
		"ends in a dash": {parent, &agentpb.CreateSubAgentRequest{Name: "a-"}, "does not match"},
		"line break":     {parent, &agentpb.CreateSubAgentRequest{Name: "a\n"}, "does not match"},
		"long name":      {parent, &agentpb.CreateSubAgentRequest{Name: strings.Repeat("a", 4000)}, "longer than"},
		"taken":          {parent, &agentpb.CreateSubAgentRequest{Name: "taken"}, "workspace agent name"},
		"parent's name":  {parent, &agentpb.CreateSubAgentRequest{Name: "DEMO"}, "workspace agent name"},
		"display app":    {parent, &agentpb.CreateSubAgentRequest{Name: "a", DisplayApps: []agentpb.CreateSubAgentRequest_DisplayApp{9}}, "display app"},
		"long directory": {parent, &agentpb.CreateSubAgentRequest{Name: "a", Directory: strings.Repeat("a", 4097)}, "directory is longer"},
		"many apps":      {parent, &agentpb.CreateSubAgentRequest{Name: "a", Apps: slices.Repeat([]*subApp{{Slug: "a"}}, 101)}, "101 apps"},
		"short id":       {parent, &agentpb.CreateSubAgentRequest{Id: []byte{1}}, "cannot read sub-agent id"},
		"empty id":       {parent, &agentpb.CreateSubAgentRequest{Id: []byte{}}, "cannot read sub-agent id"},
		"nobody's id":    {parent, &agentpb.CreateSubAgentRequest{Id: nobody[:]}, notYours},
		"another's id":   {parent, &agentpb.CreateSubAgentRequest{Id: foreign[:]}, notYours},
		"own id":         {child, &agentpb.CreateSubAgentRequest{Id: id[:]}, notYours},
		"grandchild":     {child, &agentpb.CreateSubAgentRequest{Name: "a"}, "cannot have sub-agents"},
	} {
		if _, err := tt.link.agent.CreateSubAgent(t.Context(), tt.req); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
	for name, tt := range map[string]struct {
		id   []byte
		want string
	}{
		"short id": {[]byte{1}, "cannot read sub-agent id"}, "no id": {nil, "cannot read sub-agent id"},
		"nobody's": {nobody[:], notYours}, "another's": {foreign[:], notYours},
	} {
		if _, err := parent.agent.DeleteSubAgent(t.Context(), &agentpb.DeleteSubAgentRequest{Id: tt.id}); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("delete %s: %v, want %q", name, err, tt.want)
		}
	}
	subs, err := parent.agent.ListSubAgents(t.Context(), &agentpb.ListSubAgentsRequest{})
	if err != nil || len(subs.GetAgents()) != 1 {
		t.Errorf("list %v, %v", subs, err)
	}
}

// What binds a parent binds its sub-agents: how far apps are shared, and when tokens end.
func TestParentBindsSubAgents(t *testing.T) {
	x := configured(t, Config{})
	writeConfig(t, x.config.ConfigFile, "agents:\n  - {name: bound, max_share: organization}\n")
	if err := x.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	parentID, parentToken := x.declared("bound")
	parent := x.connect(parentToken)
	var apps []*subApp
	for level := range shareLevels {
		apps = append(apps, &subApp{Slug: "app-" + strings.ToLower(level.String()), Share: level.Enum()})
	}
	_, id, token := parent.created(t, &agentpb.CreateSubAgentRequest{Name: "sub", Apps: apps})
	var view wire.Agent
	x.get("/api/v2/workspaceagents/"+id.String(), &view)
	got := map[string]string{}
	for _, app := range view.Apps {
		_, slug, _ := strings.Cut(app.Slug, "-app-")
		got[slug] = app.SharingLevel
	}
	if diff := cmp.Diff(map[string]string{"owner": "owner", "organization": "organization", "authenticated": "organization", "public": "organization"}, got); diff != "" {
		t.Error(diff)
	}
	m, err := x.connect(token).agent.GetManifest(t.Context(), &agentpb.GetManifestRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, app := range m.GetApps() {
		if level := app.GetSharingLevel(); level != agentpb.WorkspaceApp_OWNER && level != agentpb.WorkspaceApp_ORGANIZATION {
			t.Errorf("manifest: app %s is for %v", app.GetSlug(), level)
		}
	}
	// Also what was allowed when they were made.
	writeConfig(t, x.config.ConfigFile, "agents:\n  - {name: bound, max_share: owner}\n")
	if err := x.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	x.get("/api/v2/workspaceagents/"+id.String(), &view)
	for _, app := range view.Apps {
		if app.SharingLevel != "owner" {
			t.Errorf("app %s is for %s", app.Slug, app.SharingLevel)
		}
	}
	refused := func(when string) {
		t.Helper()
		if status, _ := x.call("GET", "/api/v2/workspaceagents/me/reinit?wait=true", "", as(token)...); status != http.StatusUnauthorized {
			t.Errorf("%s: the sub-agent's token answers %d", when, status)
		}
	}
	if status, _ := x.call("POST", "/api/v2/berth/agents/"+parentID.String()+"/revoke", "", x.asUser()...); status != http.StatusNoContent {
		t.Fatalf("revoke: %d", status)
	}
	refused("the parent's tokens are revoked")

	// With a new token of its own the parent gets new ones for its sub-agents.
	_, parentToken = x.declared("bound")
	subs, err := x.connect(parentToken).agent.ListSubAgents(t.Context(), &agentpb.ListSubAgentsRequest{})
	if err != nil || len(subs.GetAgents()) != 1 {
		t.Fatalf("list %v, %v", subs, err)
	}
	fresh, _ := uuid.FromBytes(subs.GetAgents()[0].GetAuthToken())
	if fresh.String() == token.Reveal() {
		t.Error("the token that was revoked is handed out again")
	}
	token = wire.Secret(fresh.String())
	if status, _ := x.call("GET", "/api/v2/workspaceagents/me/reinit?wait=true", "", as(token)...); status != http.StatusConflict {
		t.Errorf("the new token answers %d", status)
	}

	// Without their parent there are none.
	writeConfig(t, x.config.ConfigFile, "agents: []\n")
	if err := x.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	refused("the parent is gone")
	if left, err := x.store.Agents(t.Context()); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// A machine that proves what it is never becomes a sub-agent, whatever its parent is.
func TestSubAgentsHaveNoInstance(t *testing.T) {
	x := configured(t, Config{})
	_, token := x.declared("demo")
	_, id, _ := x.connect(token).created(t, &agentpb.CreateSubAgentRequest{Name: "sub"})
	a, err := x.store.Agent(t.Context(), id)
	if err != nil || a.Instance != nil {
		t.Fatalf("%v, %v", a.Instance, err)
	}
	// Not even if its record said so.
	a.Instance = &store.Instance{Provider: "aws", ID: "i-0123456789abcdef0"}
	if err := x.store.PutAgent(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	found, err := x.store.AgentsOfInstance(t.Context(), "aws", "i-0123456789abcdef0")
	if err != nil || len(found) != 1 || found[0].Name != "demo" {
		t.Errorf("found %v, %v", found, err)
	}
}
