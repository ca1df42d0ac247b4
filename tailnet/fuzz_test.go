package tailnet

import (
	"io"
	"log/slog"
	"net/url"
	"testing"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/tailnetpb"
)

func marshal(f *testing.F, m proto.Message) []byte {
	f.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		f.Fatal(err)
	}
	return b
}

// FuzzRelayMap takes in whatever a server might send as its relay map. What is accepted has relays that
// can be asked for.
func FuzzRelayMap(f *testing.F) {
	relay := &tailnetpb.DERPMap_Region_Node{Name: "1a", HostName: "relay.example.com", StunPort: 3478}
	for _, r := range []*tailnetpb.DERPMap_Region{
		{RegionId: 1, Nodes: []*tailnetpb.DERPMap_Region_Node{relay}},
		{RegionId: 1, EmbeddedRelay: true, Nodes: []*tailnetpb.DERPMap_Region_Node{{ForceHttp: true}}},
		{RegionId: 1, Nodes: []*tailnetpb.DERPMap_Region_Node{{StunOnly: true, HostName: "stun.example.com"}}},
		{RegionId: 1, Nodes: []*tailnetpb.DERPMap_Region_Node{{HostName: "x", CertName: "sha256-raw:zz", Ipv4: "none", Ipv6: "::1", DerpPort: -1}}},
	} {
		f.Add(marshal(f, &tailnetpb.DERPMap{
			HomeParams: &tailnetpb.DERPMap_HomeParams{RegionScore: map[int64]float64{1: -1}},
			Regions:    map[int64]*tailnetpb.DERPMap_Region{1: r, -1: r, 1 << 40: r},
		}))
	}
	access, err := url.Parse("https://berth.example.com:8443/prefix")
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, message []byte) {
		m := new(tailnetpb.DERPMap)
		if proto.Unmarshal(message, m) != nil {
			return
		}
		read, err := readRelayMap(m, access)
		if err != nil {
			return
		}
		c := &Config{}
		for id, r := range read.regions {
			if id <= 0 || id != r.id || len(r.nodes) == 0 || !(r.score > 0) {
				t.Errorf("region %d is %+v", id, r)
			}
			for _, n := range r.nodes {
				if n.scheme != "http" && n.scheme != "https" {
					t.Errorf("a relay by %q", n.scheme)
				}
				_ = n.url("/derp").String()
				c.transport(n).CloseIdleConnections()
			}
		}
	})
}

// FuzzPeerUpdates takes in whatever a coordinator might send. The node stays the owner of its own
// address and key, and knows peers by their addresses only.
func FuzzPeerUpdates(f *testing.F) {
	id := uuid.MustParse("6b1a3b5c-0d2e-4f60-8a7b-9c8d7e6f5a4b")
	n, err := New(Config{Prefixes: wire.AgentPrefixes(id), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { n.Close() })
	peer := uuid.New()
	node := func(id uuid.UUID, addr string) *tailnetpb.CoordinateResponse_PeerUpdate {
		return &tailnetpb.CoordinateResponse_PeerUpdate{Id: id[:], Kind: kindNode, Node: &tailnetpb.Node{
			Key: append([]byte(wire.NodeKeyPrefix), make([]byte, 32)...), Disco: "discokey:" + "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff",
			PreferredDerp: 1, Addresses: []string{addr}, AllowedIps: []string{addr, "::/0"}, Endpoints: []string{"192.0.2.1:7", "x"},
		}}
	}
	for _, updates := range [][]*tailnetpb.CoordinateResponse_PeerUpdate{
		{node(peer, "fd7a:115c:a1e0::1/128")},
		{node(peer, wire.AgentPrefixes(id)[0].String())},
		{node(peer, "fd7a:115c:a1e0::/48")},
		{node(peer, "fd7a:115c:a1e0::1/128"), {Id: peer[:], Kind: kindLost}, {Id: peer[:], Kind: kindGone}},
		{{Id: peer[:], Kind: kindReady}, {Id: []byte("short"), Kind: kindNode}, {Id: peer[:], Kind: 99}, {Id: peer[:], Kind: kindNode}},
	} {
		f.Add(marshal(f, &tailnetpb.CoordinateResponse{PeerUpdates: updates}))
	}
	f.Fuzz(func(t *testing.T, message []byte) {
		resp := new(tailnetpb.CoordinateResponse)
		if proto.Unmarshal(message, resp) != nil {
			return
		}
		s := &onlyResponse{resp: resp}
		c := &coordination{node: n, stream: s, acks: true, seen: map[uuid.UUID]struct{}{}}
		if err := c.receive(); err != io.EOF {
			t.Fatal(err)
		}
		if len(s.acked) > len(resp.GetPeerUpdates()) {
			t.Errorf("%d acknowledgements of %d updates", len(s.acked), len(resp.GetPeerUpdates()))
		}
		index := n.peers.index.Load()
		for _, p := range wire.AgentPrefixes(id) {
			if _, ok := index.byIP[p.Addr()]; ok {
				t.Errorf("a peer has our address %v", p)
			}
		}
		if _, ok := index.byKey[n.key.Public()]; ok {
			t.Error("a peer has our key")
		}
		for _, u := range resp.GetPeerUpdates() { // the next input starts anew
			if peer, err := uuid.FromBytes(u.GetId()); err == nil {
				n.peers.remove(peer)
			}
		}
	})
}

// onlyResponse is a stream of one response.
type onlyResponse struct {
	resp  *tailnetpb.CoordinateResponse
	acked []*tailnetpb.CoordinateRequest_ReadyForHandshake
}

func (s *onlyResponse) Send(r *tailnetpb.CoordinateRequest) error {
	s.acked = append(s.acked, r.GetReadyForHandshake()...)
	return nil
}

func (s *onlyResponse) Recv() (*tailnetpb.CoordinateResponse, error) {
	resp := s.resp
	s.resp = nil
	if resp == nil {
		return nil, io.EOF
	}
	return resp, nil
}

func (s *onlyResponse) CloseSend() error { return nil }
func (s *onlyResponse) Close() error     { return nil }
