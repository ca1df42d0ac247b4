package coordinator

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/proto"
	"storj.io/drpc/drpcmux"

	"github.com/berthd/berth/wire/rpc"
	"github.com/berthd/berth/wire/tailnetpb"
)

// mesh carries frames between replicas in place of NATS, all at once and in order.
type mesh struct {
	t        *testing.T
	replicas []*Coordinator
	seq      map[string]uint64
	lose     func(frame) bool // nil loses none
}

func newMesh(t *testing.T, names ...string) *mesh {
	m := &mesh{t: t, seq: map[string]uint64{}}
	for _, name := range names {
		c := alone(name)
		c.hub.announce()
		m.replicas = append(m.replicas, c)
	}
	m.settle()
	return m
}

// settle carries frames until there are no more.
func (m *mesh) settle() {
	m.t.Helper()
	synctest.Wait()
	for moved := 1; moved > 0; {
		moved = 0
		for _, c := range m.replicas {
			asking, events := c.hub.outgoing()
			var frames []frame
			for _, to := range asking {
				frames = append(frames, frame{Hello: true, To: to})
			}
			if len(events) > 0 {
				packed, err := pack(events)
				if err != nil {
					m.t.Fatal(err)
				}
				frames = append(frames, packed...)
			}
			for _, f := range frames {
				m.publish(c, f)
				moved++
			}
		}
	}
	synctest.Wait()
}

func (m *mesh) publish(from *Coordinator, f frame) {
	m.t.Helper()
	m.seq[from.hub.self]++
	f.From, f.Seq = from.hub.self, m.seq[from.hub.self]
	if m.lose != nil && m.lose(f) {
		return
	}
	text, err := json.Marshal(f)
	if err != nil {
		m.t.Fatal(err)
	}
	for _, c := range m.replicas {
		f, events, err := unpack(text)
		if err != nil {
			m.t.Fatal(err)
		}
		c.hub.receive(f, events, time.Now())
	}
}

// heartbeats are what Run sends when nothing happens.
func (m *mesh) heartbeats() {
	m.t.Helper()
	for _, c := range m.replicas {
		m.publish(c, frame{})
		c.hub.tick(time.Now(), true)
	}
	m.settle()
}

// converged fails the test unless all replicas know the same.
func (m *mesh) converged() {
	m.t.Helper()
	describe := func(h *hub) string {
		all := map[string]string{}
		for id, p := range h.peers {
			all[id.String()] = fmt.Sprint(p.epoch, p.agent, p.node.GetId(), len(p.tunnels), len(h.sources[id]), p.addrs)
		}
		text, _ := json.Marshal(all)
		return string(text)
	}
	want := describe(m.replicas[0].hub)
	for _, c := range m.replicas[1:] {
		if got := describe(c.hub); got != want {
			m.t.Errorf("replica %s knows\n%s\nreplica %s\n%s", m.replicas[0].hub.self, want, c.hub.self, got)
		}
	}
}

func TestReplicasExchange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t, "r1", "r2", "r3")
		r1, r2, r3 := m.replicas[0], m.replicas[1], m.replicas[2]
		a := dial(t.Context(), r1, agent1, AgentAuth(agent1))
		b := dial(t.Context(), r2, client1, ClientAuth(agent1))
		a.send(t, update1(agentNode(agent1, 1)))
		b.send(t, update1(clientNode(client1, 10)), add(agent1))
		m.settle()
		a.expect(t, "NODE client1#10 (add tunnel)")
		b.expect(t, "NODE agent1#1 (node update)")
		a.send(t, ready(client1))
		m.settle()
		b.expect(t, "READY_FOR_HANDSHAKE agent1")
		m.converged()
		for _, c := range m.replicas {
			if c.Node(agent1).GetId() != 1 {
				t.Errorf("replica %s does not know the agent's node", c.hub.self)
			}
		}

		// The agent comes back at another replica before its old stream is found dead.
		again := dial(t.Context(), r3, agent1, AgentAuth(agent1))
		again.expect(t, "NODE client1#10 (init)")
		m.settle()
		a.expect(t, "error: peer ID overwritten by new connection", "end")
		b.expect(t)
		again.send(t, update1(agentNode(agent1, 2)))
		m.settle()
		b.expect(t, "NODE agent1#2 (node update)")
		m.converged()

		b.send(t, disconnect)
		m.settle()
		again.expect(t, "DISCONNECTED client1 (graceful disconnect)")

		// A thief elsewhere is refused for what is claimed here.
		thief := dial(t.Context(), r1, client2, ClientAuth(agent1))
		thief.send(t, update1(clientNode(agent1, 20)))
		if got := thief.take(); len(got) != 2 {
			t.Errorf("thief got %q", got)
		}
		m.settle()
		m.converged()
	})
}

func TestReplicaCatchesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t, "r1", "r2")
		r1, r2 := m.replicas[0], m.replicas[1]
		a := dial(t.Context(), r1, agent1, AgentAuth(agent1))
		a.send(t, update1(agentNode(agent1, 1)))
		b := dial(t.Context(), r2, client1, AllowAll())
		b.send(t, update1(clientNode(client1, 10)), add(agent1), add(agent2))
		c := dial(t.Context(), r2, client2, ClientAuth(agent1))
		c.send(t, update1(clientNode(client2, 20)), add(agent1))
		m.settle()
		a.take()
		b.take()
		c.take()

		// None of this arrives: a tunnel shut, a peer gone, a new node, a peer that came.
		m.lose = func(frame) bool { return true }
		b.send(t, del(agent1))
		c.Close()
		a.send(t, update1(agentNode(agent1, 2)))
		late := dial(t.Context(), r1, agent2, AgentAuth(agent2))
		late.send(t, update1(agentNode(agent2, 5)))
		m.settle()
		a.expect(t)

		// The next frames show the gap.
		m.lose = nil
		m.heartbeats()
		got := map[string]bool{}
		for _, line := range a.take() {
			got[line] = true
		}
		if len(got) != 2 || !got["DISCONNECTED client1 (remove tunnel)"] || !got["LOST client2 (lost)"] {
			t.Errorf("agent1 got %v", got)
		}
		b.take()
		m.converged()
		late.expect(t, "NODE client1#10 (init)")

		// A restatement of which a part is missing drops nothing.
		r2.hub.announce()
		m.lose = func(f frame) bool { return f.From == "r2" && len(f.Events) > 0 }
		m.settle()
		late.expect(t)
		m.lose = nil
		m.heartbeats()
		m.heartbeats()
		late.expect(t)
		m.converged()
		for _, c := range m.replicas {
			for name, r := range c.hub.replicas {
				if r.behind || r.syncing {
					t.Errorf("%s is behind on %s: %+v", c.hub.self, name, r)
				}
			}
		}
	})
}

func TestReplicaDies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t, "r1", "r2")
		r1, r2 := m.replicas[0], m.replicas[1]
		a := dial(t.Context(), r1, agent1, AgentAuth(agent1))
		b := dial(t.Context(), r2, client1, ClientAuth(agent1))
		a.send(t, update1(agentNode(agent1, 1)))
		b.send(t, update1(clientNode(client1, 10)), add(agent1))
		m.settle()
		a.take()
		b.take()

		later := time.Now().Add(replicaTimeout + 1)
		r2.hub.tick(later, false) // cut off itself: it cannot know
		r2.hub.tick(later.Add(replicaTimeout), true)
		b.expect(t)
		r2.hub.tick(later.Add(replicaTimeout+1), true)
		b.expect(t, "LOST agent1 (lost)")
		if r2.Node(agent1) != nil {
			t.Error("r2 still knows the agent's node")
		}
		// It was only cut off.
		m.heartbeats()
		b.expect(t, "NODE agent1#1 (node update)")
		m.converged()

		m.publish(r1, frame{Bye: true})
		b.expect(t, "LOST agent1 (lost)")
	})
}

// Two replicas admit one address before they hear of each other's claim: the older stream keeps it,
// and of two equally old ones that of the lesser replica.
func TestReplicasRaceForAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t, "r1", "r2")
		a := dial(t.Context(), m.replicas[0], agent1, AgentAuth(agent1))
		older := dial(t.Context(), m.replicas[0], client1, ClientAuth(agent1))
		newer := dial(t.Context(), m.replicas[1], client2, ClientAuth(agent1))
		newer.send(t, update1(clientNode(client1, 20)), add(agent1))
		older.send(t, update1(clientNode(client1, 10)), add(agent1))
		m.settle()
		older.expect(t)
		newer.expect(t, "error: authorization: address fd7a:115c:a1e0:4000:8000::c1 is another peer's", "end")
		a.expect(t, "NODE client1#10 (add tunnel)")
		m.converged()
	})
}

func TestPendingEventsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t, "r1", "r2")
		s := dial(t.Context(), m.replicas[0], client1, AllowAll())
		for range maxPending / 2 {
			m.replicas[0].hub.handle(m.replicas[0].hub.peers[client1], add(agent2))
			m.replicas[0].hub.handle(m.replicas[0].hub.peers[client1], del(agent2))
		}
		s.send(t, add(agent1))
		if n := len(m.replicas[0].hub.pending); n > maxPending {
			t.Errorf("%d events wait", n)
		}
		if !m.replicas[0].hub.restate {
			t.Error("nothing makes up for the dropped events")
		}
		m.settle()
		m.converged()
	})
}

func startNATS(t *testing.T) (connect func() *nats.Conn) {
	t.Helper()
	srv, err := server.NewServer(&server.Options{DontListen: true, NoSigs: true, NoLog: true})
	if err != nil {
		t.Fatal(err)
	}
	srv.Start()
	t.Cleanup(func() { srv.Shutdown(); srv.WaitForShutdown() })
	if !srv.ReadyForConnections(10 * time.Second) {
		t.Fatal("the NATS server is not ready")
	}
	return func() *nats.Conn {
		t.Helper()
		nc, err := nats.Connect("", nats.InProcessServer(srv))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		return nc
	}
}

// await reads responses until one says want.
func await(t *testing.T, s *ClientStream, want string) {
	t.Helper()
	var got []string
	for {
		resp, err := s.Recv()
		if err != nil {
			t.Fatalf("the stream ended without %q, after %q", want, got)
		}
		for _, line := range describe(resp) {
			if line == want {
				return
			}
			got = append(got, line)
		}
	}
}

func TestReplicasOverNATS(t *testing.T) {
	connect := startNATS(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	run := func() (*Coordinator, *nats.Conn, func() error) {
		nc := connect()
		c, err := New(nc, Options{})
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(ctx)
		done := make(chan error, 1)
		go func() { done <- c.Run(ctx) }()
		t.Cleanup(stop)
		return c, nc, func() error { stop(); return <-done }
	}
	r1, _, stop1 := run()
	send := func(s *ClientStream, reqs ...*tailnetpb.CoordinateRequest) {
		t.Helper()
		for _, req := range reqs {
			if err := s.Send(req); err != nil {
				t.Fatal(err)
			}
		}
	}
	a := r1.Connect(ctx, Peer{agent1, AgentAuth(agent1)})
	send(a, update1(agentNode(agent1, 1)))
	// The second replica comes later, and learns what was before it.
	r2, _, stop2 := run()
	b := r2.Connect(ctx, Peer{client1, ClientAuth(agent1)})
	send(b, update1(clientNode(client1, 10)), add(agent1))
	await(t, b, "NODE agent1#1 (node update)")
	await(t, a, "NODE client1#10 (add tunnel)")
	send(a, ready(client1))
	await(t, b, "READY_FOR_HANDSHAKE agent1")
	b.Close()
	await(t, a, "LOST client1 (lost)")

	// One replica stops: its peers hear so, and those of the other lose them.
	b = r2.Connect(ctx, Peer{client1, ClientAuth(agent1)})
	send(b, update1(clientNode(client1, 11)), add(agent1))
	await(t, b, "NODE agent1#1 (add tunnel)")
	stopped := make(chan error)
	go func() { stopped <- stop1() }()
	await(t, a, "error: coordinator closed")
	await(t, b, "LOST agent1 (lost)")
	if err := <-stopped; err != nil {
		t.Errorf("Run: %v", err)
	}
	// One dies without a word.
	r3, nc3, stop3 := run()
	a = r3.Connect(ctx, Peer{agent1, AgentAuth(agent1)})
	send(a, update1(agentNode(agent1, 2)))
	await(t, b, "NODE agent1#2 (node update)")
	nc3.Close()
	await(t, a, "error: coordinator closed")
	if err := stop3(); err == nil {
		t.Error("Run without a NATS connection returned nil")
	}
	r2.hub.tick(time.Now().Add(replicaTimeout+time.Minute), true)
	await(t, b, "LOST agent1 (lost)")
	if err := stop2(); err != nil {
		t.Errorf("Run: %v", err)
	}
}

func TestNewRefuses(t *testing.T) {
	if _, err := New(nil, Options{}); err == nil {
		t.Error("New without NATS returned no error")
	}
}

// rpcServer serves the coordination stream as the control server does.
type rpcServer struct {
	tailnetpb.DRPCTailnetUnimplementedServer
	c *Coordinator
}

func (s *rpcServer) Coordinate(stream tailnetpb.DRPCTailnet_CoordinateStream) error {
	return s.c.Serve(stream.Context(), Peer{agent1, AgentAuth(agent1)}, stream)
}

// Over the real transport the last words arrive before the stream ends.
func TestServeOverRPC(t *testing.T) {
	c := alone("r1")
	mux := drpcmux.New()
	if err := tailnetpb.DRPCRegisterTailnet(mux, &rpcServer{c: c}); err != nil {
		t.Fatal(err)
	}
	near, far := net.Pipe()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	served := make(chan error)
	go func() { served <- rpc.Serve(ctx, far, mux, rpc.ServeOptions{}) }()
	conn, err := rpc.NewClient(near)
	if err != nil {
		t.Fatal(err)
	}
	client := tailnetpb.NewDRPCTailnetClient(conn)
	for want, last := range map[string]*tailnetpb.CoordinateRequest{
		"[error: authorization: agents cannot open tunnels]": add(agent2),
		"[]": disconnect,
	} {
		stream, err := client.Coordinate(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, req := range []*tailnetpb.CoordinateRequest{update1(agentNode(agent1, 1)), last} {
			if err := stream.Send(req); err != nil {
				t.Fatal(err)
			}
		}
		got := []string{}
		for {
			resp, err := stream.Recv()
			if err != nil {
				if ctx.Err() != nil {
					t.Errorf("the stream did not end: %v", err)
				}
				break
			}
			got = append(got, describe(resp)...)
		}
		if fmt.Sprint(got) != want {
			t.Errorf("got %v, want %s", got, want)
		}
	}
	conn.Close()
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// Whatever a peer sends, it gets bounded responses, and only itself is harmed.
func FuzzRequest(f *testing.F) {
	for _, req := range []*tailnetpb.CoordinateRequest{
		update1(agentNode(agent1, 1)), update1(clientNode(client1, 10)), update1(clientNode(agent1, 1)), update1(nil),
		add(agent1), add(agent2), del(agent1), ready(client1, agent2), ready(uuid.Nil), disconnect, {},
	} {
		text, err := proto.Marshal(req)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text, text)
	}
	f.Fuzz(func(t *testing.T, first, second []byte) {
		for _, auth := range []Auth{AgentAuth(agent1), ClientAuth(agent1), AllowAll()} {
			h := alone("r1").hub
			victim, err := h.join(Peer{agent2, AgentAuth(agent2)})
			if err != nil {
				t.Fatal(err)
			}
			h.handle(victim, update1(agentNode(agent2, 2)))
			id := client1
			if auth.isAgent() {
				id = agent1
			}
			p, err := h.join(Peer{id, auth})
			if err != nil {
				t.Fatal(err)
			}
			for _, text := range [][]byte{first, second} {
				var req tailnetpb.CoordinateRequest
				if proto.Unmarshal(text, &req) != nil {
					continue
				}
				more := h.handle(p, &req)
				if more == p.link.over {
					t.Errorf("handle said %t of a stream that is over: %t", more, p.link.over)
				}
			}
			if h.peers[agent2] != victim || victim.link.over {
				t.Error("another peer was removed")
			}
			for addr, owner := range h.owners {
				if owner != victim && (addr == victim.addrs[0] || addr == victim.addrs[1]) {
					t.Errorf("address %s of the victim went to %s", addr, owner.id)
				}
			}
		}
	})
}

// Frames come from other control servers; a damaged one must not end this one.
func FuzzFrame(f *testing.F) {
	for _, ev := range []event{
		{Op: opJoin, Peer: agent1, Epoch: epoch{1, "r2"}, Agent: true},
		{Op: opNode, Peer: client1, Epoch: epoch{1, "r2"}, Node: node{clientNode(agent1, 3)}},
		{Op: opTunnel, Peer: client1, Epoch: epoch{1, "r2"}, To: client1},
		{Op: opLeave, Peer: client1, Epoch: epoch{1, "r2"}, Kind: kindLost},
		{Op: opSynced},
	} {
		frames, err := pack([]event{{Op: opSync}, {Op: opJoin, Peer: client1, Epoch: epoch{1, "r2"}}, ev})
		if err != nil {
			f.Fatal(err)
		}
		frames[0].From, frames[0].Seq = "r2", 1
		text, err := json.Marshal(frames[0])
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Add([]byte(`{"from":"r2","bye":true}`))
	f.Add([]byte(`{"from":"r2","events":[{"op":"node","node":null}]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		h := alone("r1").hub
		own, err := h.join(Peer{agent1, AgentAuth(agent1)})
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if f, events, err := unpack(text); err == nil {
				h.receive(f, events, time.Now())
			}
		}
		if h.peers[agent1] == own && own.link.over {
			t.Error("a peer of this replica is over and still there")
		}
		h.outgoing()
	})
}
