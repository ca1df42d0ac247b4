package coordinator

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"go.uber.org/goleak"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/tailnetpb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Peers of the tests: two agents, three clients. The first bytes tell them apart in failures.
var (
	agent1  = uuid.MustParse("a1000000-0000-4000-8000-0000000000a1")
	agent2  = uuid.MustParse("a2000000-0000-4000-8000-0000000000a2")
	client1 = uuid.MustParse("c1000000-0000-4000-8000-0000000000c1")
	client2 = uuid.MustParse("c2000000-0000-4000-8000-0000000000c2")
	names   = map[uuid.UUID]string{agent1: "agent1", agent2: "agent2", client1: "client1", client2: "client2"}
)

func alone(name string) *Coordinator {
	return &Coordinator{hub: newHub(name, slog.New(slog.DiscardHandler))}
}

// stream is a peer whose responses are collected as text.
type stream struct {
	*ClientStream
	id   uuid.UUID
	mu   sync.Mutex
	got  []string
	done chan struct{}
}

func dial(ctx context.Context, c *Coordinator, id uuid.UUID, auth Auth) *stream {
	s := &stream{ClientStream: c.Connect(ctx, Peer{ID: id, Auth: auth}), id: id, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		for {
			resp, err := s.Recv()
			s.mu.Lock()
			if err != nil {
				s.got = append(s.got, "end")
				s.mu.Unlock()
				return
			}
			s.got = append(s.got, describe(resp)...)
			s.mu.Unlock()
		}
	}()
	synctest.Wait()
	return s
}

func describe(resp *tailnetpb.CoordinateResponse) []string {
	var out []string
	for _, u := range resp.GetPeerUpdates() {
		id, _ := uuid.FromBytes(u.GetId())
		line := u.GetKind().String() + " " + cmp.Or(names[id], id.String())
		if u.GetNode() != nil {
			line += fmt.Sprintf("#%d", u.GetNode().GetId())
		}
		if u.GetReason() != "" {
			line += " (" + u.GetReason() + ")"
		}
		out = append(out, line)
	}
	if resp.GetError() != "" {
		out = append(out, "error: "+resp.GetError())
	}
	return out
}

// take returns what arrived since the last call, once nothing more can arrive.
func (s *stream) take() []string {
	synctest.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	got := s.got
	s.got = nil
	return got
}

func (s *stream) expect(t *testing.T, want ...string) {
	t.Helper()
	if diff := gocmp.Diff(want, s.take()); diff != "" {
		t.Errorf("%s got other responses (-want +got):\n%s", names[s.id], diff)
	}
}

func (s *stream) send(t *testing.T, reqs ...*tailnetpb.CoordinateRequest) {
	t.Helper()
	for _, req := range reqs {
		if err := s.Send(req); err != nil {
			t.Fatalf("%s cannot send: %v", names[s.id], err)
		}
	}
	synctest.Wait()
}

func update1(n *tailnetpb.Node) *tailnetpb.CoordinateRequest {
	return &tailnetpb.CoordinateRequest{UpdateSelf: &tailnetpb.CoordinateRequest_UpdateSelf{Node: n}}
}

func add(id uuid.UUID) *tailnetpb.CoordinateRequest {
	return &tailnetpb.CoordinateRequest{AddTunnel: &tailnetpb.CoordinateRequest_Tunnel{Id: id[:]}}
}

func del(id uuid.UUID) *tailnetpb.CoordinateRequest {
	return &tailnetpb.CoordinateRequest{RemoveTunnel: &tailnetpb.CoordinateRequest_Tunnel{Id: id[:]}}
}

func ready(ids ...uuid.UUID) *tailnetpb.CoordinateRequest {
	req := &tailnetpb.CoordinateRequest{}
	for _, id := range ids {
		req.ReadyForHandshake = append(req.ReadyForHandshake, &tailnetpb.CoordinateRequest_ReadyForHandshake{Id: id[:]})
	}
	return req
}

var disconnect = &tailnetpb.CoordinateRequest{Disconnect: &tailnetpb.CoordinateRequest_Disconnect{}}

// agentNode is what an agent publishes; key and id are the number.
func agentNode(id uuid.UUID, number int64) *tailnetpb.Node {
	var prefixes []string
	for _, p := range wire.AgentPrefixes(id) {
		prefixes = append(prefixes, p.String())
	}
	return withAddresses(number, prefixes...)
}

// clientNode has an address derived from the client's id, which is as good as a random one.
func clientNode(id uuid.UUID, number int64) *tailnetpb.Node {
	return withAddresses(number, netip.PrefixFrom(wire.AgentAddr(id), 128).String())
}

func withAddresses(number int64, prefixes ...string) *tailnetpb.Node {
	return &tailnetpb.Node{
		Id: number, Key: fmt.Appendf(nil, "np%032d", number), PreferredDerp: 999, Addresses: prefixes, AllowedIps: prefixes,
	}
}

func TestExchange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := alone("r1")
		a := dial(t.Context(), c, agent1, AgentAuth(agent1))
		b := dial(t.Context(), c, client1, ClientAuth(agent1))
		a.send(t, update1(agentNode(agent1, 1)))
		a.expect(t)
		b.send(t, add(agent1))
		b.expect(t, "NODE agent1#1 (add tunnel)")
		a.expect(t) // the client has no node yet
		b.send(t, update1(clientNode(client1, 10)))
		a.expect(t, "NODE client1#10 (node update)")
		a.send(t, ready(client1))
		b.expect(t, "READY_FOR_HANDSHAKE agent1")

		// Equal to the last: skipped.
		a.send(t, update1(agentNode(agent1, 1)))
		b.send(t, add(agent1))
		b.expect(t)
		a.send(t, update1(agentNode(agent1, 2)))
		b.expect(t, "NODE agent1#2 (node update)")
		if got := c.Node(agent1).GetId(); got != 2 {
			t.Errorf("Node has id %d, want 2", got)
		}
		if got := c.Node(agent2); got != nil {
			t.Errorf("Node of a stranger is %v", got)
		}

		b.send(t, del(agent1))
		b.expect(t, "DISCONNECTED agent1 (remove tunnel)")
		a.expect(t, "DISCONNECTED client1 (remove tunnel)")
		a.send(t, update1(agentNode(agent1, 3)))
		b.expect(t)
		b.send(t, del(agent1), add(agent1), disconnect)
		b.expect(t, "NODE agent1#3 (add tunnel)", "end")
		a.expect(t, "NODE client1#10 (add tunnel)", "DISCONNECTED client1 (graceful disconnect)")
		// Its tunnel went with it.
		b = dial(t.Context(), c, client1, ClientAuth(agent1))
		b.expect(t)
		if len(c.hub.sources) != 0 {
			t.Errorf("tunnels left behind: %v", c.hub.sources)
		}
	})
}

func TestDestinationComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := alone("r1")
		b := dial(t.Context(), c, client1, ClientAuth(agent1))
		b.send(t, add(agent1), update1(clientNode(client1, 10)))
		b.expect(t)
		a := dial(t.Context(), c, agent1, AgentAuth(agent1))
		a.expect(t, "NODE client1#10 (init)")
		a.send(t, update1(agentNode(agent1, 1)))
		b.expect(t, "NODE agent1#1 (node update)")
		a.Close()
		b.expect(t, "LOST agent1 (lost)")
		a = dial(t.Context(), c, agent1, AgentAuth(agent1))
		a.expect(t, "NODE client1#10 (init)")
		a.send(t, update1(agentNode(agent1, 2)))
		b.expect(t, "NODE agent1#2 (node update)")
		b.CloseSend()
		b.expect(t, "end")
		a.expect(t, "LOST client1 (lost)")
		// LOST goes only to those who had a node.
		b = dial(t.Context(), c, client1, ClientAuth(agent1))
		b.send(t, add(agent1))
		b.expect(t, "NODE agent1#2 (add tunnel)")
		b.Close()
		a.expect(t)
	})
}

// A key is known while a peer has it, however often its streams overlap and whatever it changes to.
func TestHasKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := alone("r1")
		key := func(number int64) [32]byte { return [32]byte(fmt.Appendf(nil, "%032d", number)) }
		expect := func(when string, known ...bool) {
			t.Helper()
			for i, want := range known {
				if got := c.HasKey(key(int64(i + 1))); got != want {
					t.Errorf("%s: key %d is known: %v", when, i+1, got)
				}
			}
		}
		a := dial(t.Context(), c, agent1, AgentAuth(agent1))
		expect("before", false, false)
		a.send(t, update1(agentNode(agent1, 1)))
		a.send(t, update1(agentNode(agent1, 1)))
		expect("published twice", true, false)
		a.send(t, update1(agentNode(agent1, 2)))
		expect("changed", false, true)
		again := dial(t.Context(), c, agent1, AgentAuth(agent1))
		expect("overwritten", false, false)
		again.send(t, update1(agentNode(agent1, 1)))
		expect("back", true, false)
		// One node under two ids, as when a client comes back before its old stream is found dead.
		b := dial(t.Context(), c, client1, ClientAuth(agent1))
		b.send(t, update1(clientNode(client1, 1)))
		again.Close()
		synctest.Wait()
		expect("one of two left", true, false)
		b.Close()
		synctest.Wait()
		expect("both left", false, false)
		if n := len(c.hub.keys); n != 0 {
			t.Errorf("%d keys are kept of nobody", n)
		}
	})
}

func TestOverwrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := alone("r1")
		a := dial(t.Context(), c, agent1, AgentAuth(agent1))
		b := dial(t.Context(), c, client1, ClientAuth(agent1))
		a.send(t, update1(agentNode(agent1, 1)))
		b.send(t, update1(clientNode(client1, 10)), add(agent1))
		a.take()
		b.take()
		again := dial(t.Context(), c, agent1, AgentAuth(agent1))
		a.expect(t, "error: peer ID overwritten by new connection", "end")
		again.expect(t, "NODE client1#10 (init)")
		b.expect(t) // nothing is lost
		again.send(t, update1(agentNode(agent1, 2)))
		b.expect(t, "NODE agent1#2 (node update)")
		if err := a.Send(ready()); !errors.Is(err, io.EOF) {
			t.Errorf("send on the old stream: %v", err)
		}
		// The new stream of a client that may do less loses the tunnel of the old one.
		less := dial(t.Context(), c, client1, ClientAuth(agent2))
		b.expect(t, "error: peer ID overwritten by new connection", "end")
		less.expect(t) // and does not learn where it led
		again.expect(t, "DISCONNECTED client1 (remove tunnel)")
		// And no client can take an agent's place.
		thief := dial(t.Context(), c, agent1, AllowAll())
		thief.expect(t, "error: cannot coordinate: id "+agent1.String()+" is in use by a peer of another kind", "end")
		again.expect(t)
	})
}

func TestAuthorization(t *testing.T) {
	other := netip.PrefixFrom(wire.AgentAddr(agent2), 128).String()
	own := netip.PrefixFrom(wire.AgentAddr(agent1), 128).String()
	tests := []struct {
		name string
		auth Auth
		req  *tailnetpb.CoordinateRequest
		want string // the error behind "authorization: "; empty means accepted
	}{
		{"agent's own addresses", AgentAuth(agent1), update1(agentNode(agent1, 1)), ""},
		{"agent's legacy address", AgentAuth(agent1), update1(withAddresses(1, wire.LegacyAgentAddr.String()+"/128")), ""},
		{"agent opens a tunnel", AgentAuth(agent1), add(agent2), "agents cannot open tunnels"},
		{"agent takes another's address", AgentAuth(agent1), update1(withAddresses(1, other)), "Addresses: invalid node address, got " + other},
		{"agent routes another's address", AgentAuth(agent1), update1(&tailnetpb.Node{Addresses: []string{own}, AllowedIps: []string{own, other}}), "AllowedIps: invalid node address, got " + other},
		{"agent routes a network", AgentAuth(agent1), update1(&tailnetpb.Node{AllowedIps: []string{"fd7a:115c:a1e0::/48"}}), "AllowedIps: invalid address bits, expected 128, got 48"},
		{"agent's address is no prefix", AgentAuth(agent1), update1(withAddresses(1, "::1")), `Addresses: invalid node address: netip.ParsePrefix("::1"): no '/'`},
		{"client opens its tunnel", ClientAuth(agent1), add(agent1), ""},
		{"client opens another", ClientAuth(agent1), add(agent2), fmt.Sprintf("invalid agent id, expected %s, got %s", agent1, agent2)},
		{"client acknowledges", ClientAuth(agent1), ready(agent1), "clients may not send ready_for_handshake"},
		{"client takes a network", ClientAuth(agent1), update1(withAddresses(1, "fd7a:115c:a1e0::/64")), "invalid address bits, expected 128, got 64"},
		{"client routes everything", ClientAuth(agent1), update1(&tailnetpb.Node{AllowedIps: []string{"::/0"}}), "invalid address bits, expected 128, got 0"},
		{"client in the newer range", ClientAuth(agent1), update1(withAddresses(1, wire.AgentPrefixes(client1)[1].String())), ""},
		{"client routes the legacy address", ClientAuth(agent1), update1(&tailnetpb.Node{AllowedIps: []string{wire.LegacyAgentAddr.String() + "/128"}}), "invalid node address, got " + wire.LegacyAgentAddr.String() + "/128"},
		{"client takes an IPv4 address", ClientAuth(agent1), update1(withAddresses(1, "100.64.0.1/32")), "invalid address bits, expected 128, got 32"},
		{"client outside the range", ClientAuth(agent1), update1(withAddresses(1, "fd00::1/128")), "invalid node address, got fd00::1/128"},
		{"client takes the legacy address", ClientAuth(agent1), update1(withAddresses(1, wire.LegacyAgentAddr.String()+"/128")), "invalid node address, got " + wire.LegacyAgentAddr.String() + "/128"},
		{"user with permission", UserAuth(func(id uuid.UUID) bool { return id == agent1 }), add(agent1), ""},
		{"user without", UserAuth(func(id uuid.UUID) bool { return id == agent1 }), add(agent2), "workspace agent not found or you do not have permission"},
		{"server opens any", AllowAll(), add(agent2), ""},
		{"nobody", Auth{}, add(agent2), "this peer may do nothing"},
		{"user acknowledges", UserAuth(func(uuid.UUID) bool { return true }), ready(agent1), "clients may not send ready_for_handshake"},
		{"short id in an acknowledgement", AgentAuth(agent1), &tailnetpb.CoordinateRequest{ReadyForHandshake: []*tailnetpb.CoordinateRequest_ReadyForHandshake{{Id: []byte("x")}}}, "invalid peer id: invalid UUID (got 1 bytes)"},
		{"short id", AllowAll(), &tailnetpb.CoordinateRequest{AddTunnel: &tailnetpb.CoordinateRequest_Tunnel{Id: []byte("x")}}, "invalid peer id: invalid UUID (got 1 bytes)"},
		{"no id", AllowAll(), &tailnetpb.CoordinateRequest{RemoveTunnel: &tailnetpb.CoordinateRequest_Tunnel{Id: make([]byte, 16)}}, "invalid peer id: it is all zeros"},
		{"no node", AllowAll(), update1(nil), "node of 0 bytes (limit 65536) with 0 addresses (limit 32)"},
		{"large node", AllowAll(), update1(&tailnetpb.Node{Disco: strings.Repeat("x", 70000)}), "node of 70004 bytes (limit 65536) with 0 addresses (limit 32)"},
		{"many addresses", AllowAll(), update1(withAddresses(1, slices.Repeat([]string{own}, 17)...)), "with 34 addresses (limit 32)"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := alone("r1")
				id := client1
				if test.auth.isAgent() {
					id = agent1
				}
				s := dial(t.Context(), c, id, test.auth)
				s.send(t, test.req)
				got := s.take()
				if test.want == "" {
					if len(got) != 0 {
						t.Errorf("got %q", got)
					}
					return
				}
				if len(got) != 2 || !strings.HasPrefix(got[0], "error: authorization: ") || !strings.HasSuffix(got[0], test.want) || got[1] != "end" {
					t.Errorf("got %q, want %q", got, test.want)
				}
				if len(c.hub.peers) != 0 {
					t.Error("the peer is still there")
				}
			})
		})
	}
}

// A client must not become the place where another peer's traffic goes.
func TestHijack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := alone("r1")
		a := dial(t.Context(), c, agent1, AgentAuth(agent1))
		b := dial(t.Context(), c, client1, ClientAuth(agent1))
		b.send(t, update1(clientNode(client1, 10)), add(agent1))
		a.expect(t, "NODE client1#10 (add tunnel)")
		refused := func(id uuid.UUID) string {
			return "error: authorization: address " + wire.AgentAddr(id).String() + " is another peer's"
		}
		for _, victim := range []uuid.UUID{agent1, client1} {
			thief := dial(t.Context(), c, client2, ClientAuth(agent1))
			thief.send(t, add(agent1))
			thief.send(t, update1(clientNode(victim, 20)))
			thief.expect(t, refused(victim), "end")
			thief = dial(t.Context(), c, client2, ClientAuth(agent1))
			sneaky := clientNode(client2, 20)
			sneaky.AllowedIps = clientNode(victim, 0).AllowedIps
			thief.send(t, update1(sneaky))
			thief.expect(t, refused(victim), "end")
		}
		// Neither the other address of an agent.
		for _, addr := range wire.AgentPrefixes(agent1) {
			thief := dial(t.Context(), c, client2, ClientAuth(agent1))
			thief.send(t, update1(withAddresses(20, addr.String())))
			thief.expect(t, "error: authorization: address "+addr.Addr().String()+" is another peer's", "end")
		}
		a.expect(t)

		// Whoever waits on the address of an agent that is away is thrown out when it comes.
		squatter := dial(t.Context(), c, client2, ClientAuth(agent1))
		squatter.send(t, update1(clientNode(agent2, 20)), add(agent1))
		squatter.expect(t)
		a.expect(t, "NODE client2#20 (add tunnel)")
		dial(t.Context(), c, agent2, AgentAuth(agent2)).expect(t)
		squatter.expect(t, refused(agent2), "end")
		a.expect(t, "LOST client2 (lost)")

		// The same node under a new id, whose old stream nobody has found dead yet, is no thief.
		back := dial(t.Context(), c, client2, ClientAuth(agent1))
		back.send(t, update1(clientNode(client1, 10)), add(agent1))
		a.expect(t, "NODE client2#10 (add tunnel)")
		b.Close()
		a.expect(t, "LOST client1 (lost)")
		thief := dial(t.Context(), c, client1, ClientAuth(agent1))
		thief.send(t, update1(clientNode(client1, 30)))
		thief.expect(t, refused(client1), "end") // still owned by back
		// An address that is given up is free.
		back.send(t, update1(clientNode(client2, 11)))
		a.expect(t, "NODE client2#11 (node update)")
		heir := dial(t.Context(), c, client1, ClientAuth(agent1))
		heir.send(t, update1(clientNode(client1, 30)))
		heir.expect(t)
	})
}

func TestReadyWithoutTunnel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := alone("r1")
		a := dial(t.Context(), c, agent1, AgentAuth(agent1))
		b := dial(t.Context(), c, client1, ClientAuth(agent1))
		a.send(t, ready(client1, client2))
		a.expect(t,
			fmt.Sprintf("error: ready for handshake error: you do not share a tunnel with %q", client1),
			fmt.Sprintf("error: ready for handshake error: you do not share a tunnel with %q", client2))
		b.expect(t)
		// Not fatal; a tunnel of a client that is away counts, and is no reason to fail.
		b.send(t, add(agent1))
		a.send(t, ready(client1))
		a.expect(t)
		b.expect(t, "READY_FOR_HANDSHAKE agent1")
	})
}

// A user that comes back keeps the tunnels that it may still have, and loses the others.
func TestUserComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := alone("r1")
		a := dial(t.Context(), c, agent1, AgentAuth(agent1))
		b := dial(t.Context(), c, agent2, AgentAuth(agent2))
		a.send(t, update1(agentNode(agent1, 1)))
		b.send(t, update1(agentNode(agent2, 2)))
		allowed := map[uuid.UUID]bool{agent1: true, agent2: true}
		may := UserAuth(func(id uuid.UUID) bool { return allowed[id] })
		u := dial(t.Context(), c, client1, may)
		u.send(t, update1(clientNode(client1, 10)), add(agent1), add(agent2))
		u.expect(t, "NODE agent1#1 (add tunnel)", "NODE agent2#2 (add tunnel)")
		a.take()
		b.take()
		delete(allowed, agent2)
		again := dial(t.Context(), c, client1, may)
		u.expect(t, "error: peer ID overwritten by new connection", "end")
		again.expect(t, "NODE agent1#1 (init)")
		a.expect(t)
		b.expect(t, "DISCONNECTED client1 (remove tunnel)")
		again.send(t, add(agent2))
		again.expect(t, "error: authorization: workspace agent not found or you do not have permission", "end")
		a.expect(t, "LOST client1 (lost)")
	})
}

// One request cannot fill the queue of the peer that it is about.
func TestAcknowledgedOverAndOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := alone("r1")
		a := dial(t.Context(), c, agent1, AgentAuth(agent1))
		b := dial(t.Context(), c, client1, ClientAuth(agent1))
		b.send(t, add(agent1))
		a.send(t, ready(slices.Repeat([]uuid.UUID{client1}, 2*wire.MaxPeerQueue)...))
		b.expect(t, "READY_FOR_HANDSHAKE agent1")
		a.expect(t)
	})
}

// All fields of one request are handled in the documented order.
func TestOrderInRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := alone("r1")
		a := dial(t.Context(), c, agent1, AgentAuth(agent1))
		b := dial(t.Context(), c, client1, ClientAuth(agent1))
		req := update1(clientNode(client1, 10))
		req.AddTunnel = add(agent1).AddTunnel
		req.RemoveTunnel = del(agent1).RemoveTunnel
		req.Disconnect = disconnect.Disconnect
		b.send(t, req)
		a.expect(t, "NODE client1#10 (add tunnel)", "DISCONNECTED client1 (remove tunnel)")
		b.expect(t, "end")
	})
}

// deaf is a peer that sends but never reads.
type deaf struct {
	requests chan *tailnetpb.CoordinateRequest
	closed   chan struct{}
}

func (d deaf) Send(*tailnetpb.CoordinateResponse) error { <-d.closed; return io.ErrClosedPipe }
func (d deaf) Close() error                             { return nil }
func (d deaf) Recv() (*tailnetpb.CoordinateRequest, error) {
	select {
	case req := <-d.requests:
		return req, nil
	case <-d.closed:
		return nil, io.EOF
	}
}

func TestSlowPeerIsRemoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := alone("r1")
		a := dial(t.Context(), c, agent1, AgentAuth(agent1))
		d := deaf{make(chan *tailnetpb.CoordinateRequest), make(chan struct{})}
		served := make(chan error)
		go func() { served <- c.Serve(t.Context(), Peer{client1, ClientAuth(agent1)}, d) }()
		d.requests <- update1(clientNode(client1, 10))
		d.requests <- add(agent1)
		synctest.Wait()
		a.expect(t, "NODE client1#10 (add tunnel)")
		// One response is being sent, wire.MaxPeerQueue wait, the next is one too many.
		for i := range wire.MaxPeerQueue + 1 {
			a.send(t, update1(agentNode(agent1, int64(i+1))))
		}
		a.expect(t)
		a.send(t, update1(agentNode(agent1, 9999)))
		a.expect(t, "DISCONNECTED client1 (response queue full)")
		close(d.closed)
		if err := <-served; !errors.Is(err, ErrSlow) {
			t.Errorf("Serve: %v, want ErrSlow", err)
		}
	})
}

func TestInitInChunks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := alone("r1")
		const clients = 2500
		for i := range clients {
			id := uuid.NewSHA1(uuid.NameSpaceOID, fmt.Append(nil, i))
			dial(t.Context(), c, id, ClientAuth(agent1)).send(t, update1(clientNode(id, int64(i+1))), add(agent1))
		}
		s := c.Connect(t.Context(), Peer{agent1, AgentAuth(agent1)})
		var sizes []int
		for sum := 0; sum < clients; {
			resp, err := s.Recv()
			if err != nil {
				t.Fatal(err)
			}
			sizes = append(sizes, len(resp.PeerUpdates))
			sum += len(resp.PeerUpdates)
		}
		if diff := gocmp.Diff([]int{1024, 1024, 452}, sizes); diff != "" {
			t.Errorf("chunks (-want +got):\n%s", diff)
		}
	})
}

func TestServeEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := alone("r1")
		a := dial(t.Context(), c, agent1, AgentAuth(agent1))
		ctx, cancel := context.WithCancel(t.Context())
		b := dial(ctx, c, client1, ClientAuth(agent1))
		b.send(t, update1(clientNode(client1, 10)), add(agent1))
		a.take()
		cancel()
		a.expect(t, "LOST client1 (lost)")
		b = dial(t.Context(), c, client1, ClientAuth(agent1))
		b.send(t, update1(clientNode(client1, 10)), add(agent1))
		a.take()
		c.hub.close()
		a.expect(t, "LOST client1 (coordinator closed)", "error: coordinator closed", "end")
		b.expect(t, "error: coordinator closed", "end")
		dial(t.Context(), c, client1, ClientAuth(agent1)).expect(t, "error: coordinator closed", "end")
		for _, p := range []Peer{{}, {ID: agent2, Auth: AgentAuth(agent1)}} {
			dial(t.Context(), alone("r2"), p.ID, p.Auth).expect(t, fmt.Sprintf("error: cannot coordinate: peer %s does not fit its authorisation", p.ID), "end")
		}
	})
}

// BenchmarkNodeUpdate measures one node of an agent going out to all its clients.
func BenchmarkNodeUpdate(b *testing.B) {
	for _, clients := range []int{1, 1000} {
		b.Run(fmt.Sprintf("clients=%d", clients), func(b *testing.B) {
			h := alone("r1").hub
			var links []*link
			for i := range clients {
				id := uuid.NewSHA1(uuid.NameSpaceOID, fmt.Append(nil, i))
				p, err := h.join(Peer{id, ClientAuth(agent1)})
				if err != nil {
					b.Fatal(err)
				}
				h.handle(p, add(agent1))
				links = append(links, p.link)
			}
			agent, err := h.join(Peer{agent1, AgentAuth(agent1)})
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for i := int64(1); b.Loop(); i++ {
				h.handle(agent, update1(agentNode(agent1, i)))
				h.outgoing()
				for _, l := range links {
					<-l.queue
				}
			}
		})
	}
}
