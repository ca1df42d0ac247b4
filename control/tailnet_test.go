package control

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
	"github.com/berthd/berth/wire/tailnetpb"
)

func (x *site) user(path string) *agentLink {
	x.t.Helper()
	return x.link(path, http.Header{wire.HeaderSessionToken: {x.key.Reveal()}})
}

// told is a workspace update as text.
func told(u *tailnetpb.WorkspaceUpdate) []string {
	var lines []string
	for what, list := range map[string][]*tailnetpb.Workspace{"+ws ": u.GetUpsertedWorkspaces(), "-ws ": u.GetDeletedWorkspaces()} {
		for _, w := range list {
			lines = append(lines, what+w.GetName()+" "+w.GetStatus().String())
		}
	}
	for what, list := range map[string][]*tailnetpb.Agent{"+agent ": u.GetUpsertedAgents(), "-agent ": u.GetDeletedAgents()} {
		for _, a := range list {
			lines = append(lines, what+a.GetName())
		}
	}
	slices.Sort(lines)
	return lines
}

// TestWorkspaceUpdates follows what becomes of workspaces.
func TestWorkspaceUpdates(t *testing.T) {
	x := configured(t, Config{})
	l := x.user("/api/v2/tailnet?version=2.3")
	owner := x.ownerID()
	stream, err := l.tailnet.WorkspaceUpdates(t.Context(), &tailnetpb.WorkspaceUpdatesRequest{WorkspaceOwnerId: owner[:]})
	if err != nil {
		t.Fatal(err)
	}
	expect := func(want ...string) *tailnetpb.WorkspaceUpdate {
		t.Helper()
		u, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, told(u)); diff != "" {
			t.Errorf("update (-want +got):\n%s", diff)
		}
		return u
	}
	expect("+agent demo", "+ws demo RUNNING")
	// What changes nothing is not told: connecting, becoming ready.
	_, token := x.declared("demo")
	parent := x.connect(token)
	if _, err := parent.agent.UpdateLifecycle(t.Context(), &agentpb.UpdateLifecycleRequest{Lifecycle: &agentpb.Lifecycle{State: agentpb.Lifecycle_READY}}); err != nil {
		t.Fatal(err)
	}
	_, id, _ := parent.created(t, &agentpb.CreateSubAgentRequest{Name: "dev"})
	u := expect("+agent dev")
	parentID, err := x.store.AgentByName(t.Context(), "demo")
	if err != nil {
		t.Fatal(err)
	}
	if a := u.GetUpsertedAgents()[0]; string(a.GetId()) != string(id[:]) || string(a.GetWorkspaceId()) != string(parentID.ID[:]) {
		t.Errorf("agent %v", a)
	}
	x.create("second")
	expect("+agent second", "+ws second RUNNING")
	// Another name: the workspace is told again, the agent goes and comes.
	writeConfig(t, x.config.ConfigFile, fmt.Sprintf("agents:\n  - {name: renamed, id: %s}\n", parentID.ID))
	if err := x.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	expect("-agent demo")
	expect("+agent renamed", "+ws renamed RUNNING")
	writeConfig(t, x.config.ConfigFile, "agents: []\n")
	if err := x.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	var gone []string // the two agents may go in one message or in two
	for len(gone) < 3 {
		u, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		gone = append(gone, told(u)...)
	}
	slices.Sort(gone)
	if diff := cmp.Diff([]string{"-agent dev", "-agent renamed", "-ws renamed DELETED"}, gone); diff != "" {
		t.Error(diff)
	}
	// A second stream begins with all there is, also over a link to one agent.
	second, err := x.store.AgentByName(t.Context(), "second")
	if err != nil {
		t.Fatal(err)
	}
	l = x.user("/api/v2/workspaceagents/" + second.ID.String() + "/coordinate?version=2.3")
	if stream, err = l.tailnet.WorkspaceUpdates(t.Context(), &tailnetpb.WorkspaceUpdatesRequest{WorkspaceOwnerId: owner[:]}); err != nil {
		t.Fatal(err)
	}
	expect("+agent second", "+ws second RUNNING")
	for _, bad := range [][]byte{nil, {1}, make([]byte, 17)} {
		stream, err := l.tailnet.WorkspaceUpdates(t.Context(), &tailnetpb.WorkspaceUpdatesRequest{WorkspaceOwnerId: bad})
		if err == nil {
			_, err = stream.Recv()
		}
		if err == nil || !strings.Contains(err.Error(), "cannot read workspace owner id") {
			t.Errorf("owner of %d bytes: %v", len(bad), err)
		}
	}
}

// The first message is the whole state, also when there is nothing, or nothing of the user.
func TestWorkspaceUpdatesOfNothing(t *testing.T) {
	empty, full := serve(t, Config{}), configured(t, Config{})
	owner, stranger := empty.ownerID(), uuid.New()
	for _, tt := range []struct {
		*site
		owner []byte
	}{{empty, owner[:]}, {full, stranger[:]}} {
		stream, err := tt.user("/api/v2/tailnet?version=2.10").tailnet.WorkspaceUpdates(t.Context(), &tailnetpb.WorkspaceUpdatesRequest{WorkspaceOwnerId: tt.owner})
		if err != nil {
			t.Fatal(err)
		}
		if u, err := stream.Recv(); err != nil || len(told(u)) != 0 {
			t.Errorf("%v, %v", u, err)
		}
	}
}

func FuzzWorkspaceUpdates(f *testing.F) {
	f.Add([]byte("ab"), []byte("ac"))
	f.Add([]byte{}, []byte("xyz"))
	f.Add([]byte("aAbB"), []byte("AAbC"))
	// Each byte is an agent: its high half the id, its low half the name; those of odd id are sub-agents.
	state := func(text []byte) map[uuid.UUID]member {
		agents := make(map[uuid.UUID]member)
		for _, b := range text {
			id := uuid.UUID{15: b >> 4}
			workspace := id
			workspace[15] &^= 1
			agents[id] = member{fmt.Sprint(b & 15), workspace}
		}
		return agents
	}
	f.Fuzz(func(t *testing.T, a, b []byte) {
		from, to := state(a), state(b)
		known := maps.Clone(from)
		workspaces := map[uuid.UUID]string{}
		for id, m := range from {
			if id == m.workspace {
				workspaces[id] = m.name
			}
		}
		for _, u := range workspaceUpdates(from, to) {
			for _, d := range u.GetDeletedAgents() {
				delete(known, uuid.UUID(d.GetId()))
			}
			for _, d := range u.GetDeletedWorkspaces() {
				delete(workspaces, uuid.UUID(d.GetId()))
			}
			for _, w := range u.GetUpsertedWorkspaces() {
				workspaces[uuid.UUID(w.GetId())] = w.GetName()
			}
			for _, n := range u.GetUpsertedAgents() {
				id := uuid.UUID(n.GetId())
				if _, ok := known[id]; ok {
					t.Errorf("agent %v appears twice", id)
				}
				known[id] = member{n.GetName(), uuid.UUID(n.GetWorkspaceId())}
			}
		}
		want := map[uuid.UUID]string{}
		for id, m := range to {
			if id == m.workspace {
				want[id] = m.name
			}
		}
		if !maps.Equal(known, to) || !maps.Equal(workspaces, want) {
			t.Errorf("came to %v %v, want %v %v", known, workspaces, to, want)
		}
	})
}

func node(key byte, addr string) *tailnetpb.CoordinateRequest {
	return &tailnetpb.CoordinateRequest{UpdateSelf: &tailnetpb.CoordinateRequest_UpdateSelf{Node: &tailnetpb.Node{
		Id: int64(key), Key: []byte(fmt.Sprintf("np%032d", key)), PreferredDerp: 999, Addresses: []string{addr + "/128"}, AllowedIps: []string{addr + "/128"},
	}}}
}

func opens(id uuid.UUID) *tailnetpb.CoordinateRequest {
	return &tailnetpb.CoordinateRequest{AddTunnel: &tailnetpb.CoordinateRequest_Tunnel{Id: id[:]}}
}

// TestUserReachesManyAgents: one link of a person, a tunnel to each of several agents, and the end of
// those that ask for more.
func TestUserReachesManyAgents(t *testing.T) {
	x := serve(t, Config{})
	coordinate := func(l *agentLink) tailnetpb.DRPCTailnet_CoordinateClient {
		t.Helper()
		stream, err := l.tailnet.Coordinate(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return stream
	}
	send := func(s tailnetpb.DRPCTailnet_CoordinateClient, reqs ...*tailnetpb.CoordinateRequest) {
		t.Helper()
		for _, req := range reqs {
			if err := s.Send(req); err != nil {
				t.Fatal(err)
			}
		}
	}
	ids := map[uuid.UUID]bool{}
	var agents []tailnetpb.DRPCTailnet_CoordinateClient
	for i, name := range []string{"one", "two", "three"} {
		id, token := x.create(name)
		ids[id] = true
		s := coordinate(x.connect(token))
		send(s, node(byte(i), wire.AgentAddr(id).String()))
		agents = append(agents, s)
	}
	l := x.user("/api/v2/tailnet")
	s := coordinate(l)
	send(s, node(9, wire.RandomAddr().String()))
	for id := range ids {
		send(s, opens(id))
	}
	for len(ids) > 0 {
		resp, err := s.Recv()
		if err != nil || resp.GetError() != "" {
			t.Fatalf("%v, %v", resp, err)
		}
		for _, u := range resp.GetPeerUpdates() {
			id, err := uuid.FromBytes(u.GetId())
			if err != nil || u.GetKind() != tailnetpb.CoordinateResponse_PeerUpdate_NODE || !ids[id] {
				t.Fatalf("update %v, %v", u, err)
			}
			delete(ids, id)
		}
	}
	for _, a := range agents {
		if resp, err := a.Recv(); err != nil || len(resp.GetPeerUpdates()) != 1 || resp.GetPeerUpdates()[0].GetNode().GetId() != 9 {
			t.Errorf("an agent got %v, %v", resp, err)
		}
	}
	// The newer prefix is a person's, too.
	send(s, node(9, wire.AgentPrefixes(uuid.New())[1].Addr().String()))
	for _, a := range agents {
		if resp, err := a.Recv(); err != nil || len(resp.GetPeerUpdates()) != 1 || resp.GetPeerUpdates()[0].GetKind() != tailnetpb.CoordinateResponse_PeerUpdate_NODE {
			t.Errorf("an agent got %v, %v", resp, err)
		}
	}

	stranger := uuid.New()
	ack := &tailnetpb.CoordinateRequest{ReadyForHandshake: []*tailnetpb.CoordinateRequest_ReadyForHandshake{{Id: stranger[:]}}}
	for want, req := range map[string]*tailnetpb.CoordinateRequest{
		"authorization: workspace agent not found or you do not have permission": opens(stranger),
		"authorization: clients may not send ready_for_handshake":                ack,
	} {
		s := coordinate(x.user("/api/v2/tailnet"))
		send(s, req)
		if resp, err := s.Recv(); err != nil || resp.GetError() != want {
			t.Errorf("%v, %v, want %s", resp, err, want)
		}
		if _, err := s.Recv(); err == nil {
			t.Errorf("after %q the stream goes on", want)
		}
	}
}

// TestUserResumes: a link to all agents comes back as the peer it was; tokens of it and of links to one
// agent are not good for each other.
func TestUserResumes(t *testing.T) {
	x := serve(t, Config{})
	id, _ := x.create("demo")
	one := "/api/v2/workspaceagents/" + id.String() + "/coordinate?version=2.0"
	token := func(path string) string {
		t.Helper()
		fresh, err := x.user(path).tailnet.RefreshResumeToken(t.Context(), &tailnetpb.RefreshResumeTokenRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if fresh.GetRefreshIn().AsDuration() != wire.ResumeRefresh {
			t.Errorf("refresh in %v", fresh.GetRefreshIn().AsDuration())
		}
		return fresh.GetToken()
	}
	all := token("/api/v2/tailnet")
	peer, err := x.resume(all, x.id)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := x.resume(token("/api/v2/tailnet?resume_token="+all), x.id); err != nil || again != peer {
		t.Errorf("came back as %v, want %v (%v)", again, peer, err)
	}
	const want = `{"message":"Invalid resume token","validations":[{"field":"resume_token","detail":"Invalid resume token"}]}` + "\n"
	for path, bad := range map[string]string{one + "&": all, "/api/v2/tailnet?": token(one)} {
		if status, body := x.call("GET", path+"resume_token="+bad, "", x.asUser()...); status != http.StatusUnauthorized || body != want {
			t.Errorf("%s: %d %s", path, status, body)
		}
	}
	if status, _ := x.call("GET", "/api/v2/tailnet", ""); status != http.StatusUnauthorized {
		t.Errorf("nobody: %d", status)
	}
}

// An agent that was made a moment ago can be reached, whether or not it was heard of.
func TestReachable(t *testing.T) {
	x := serve(t, Config{})
	a := store.Agent{ID: uuid.New(), Name: "new"}
	if x.reachable(a.ID) {
		t.Error("one that is not there")
	}
	if err := x.store.CreateAgent(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	if !x.reachable(a.ID) {
		t.Error("one that is there")
	}
	if err := x.store.DeleteAgent(t.Context(), a.ID); err != nil {
		t.Fatal(err)
	}
	eventually(t, "one that is gone", func() bool { return !x.reachable(a.ID) })
}
