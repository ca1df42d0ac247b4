package tailnet

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"tailscale.com/types/key"

	"github.com/berthd/berth/wire/tailnetpb"
)

func goodNode() *tailnetpb.Node {
	return &tailnetpb.Node{
		Id: 1, Key: key.NewNode().Public().AppendTo([]byte("np")), Disco: key.NewDisco().Public().String(), PreferredDerp: 3,
		AllowedIps: []string{"fd7a:115c:a1e0::1/128", "fd60:627a:a42b::1/128"},
		Endpoints:  []string{"192.0.2.1:1", "[2001:db8::1]:2"},
	}
}

func TestDecodeNode(t *testing.T) {
	tests := map[string]struct {
		change func(*tailnetpb.Node)
		err    string
	}{
		"good":             {func(*tailnetpb.Node) {}, ""},
		"no home":          {func(n *tailnetpb.Node) { n.PreferredDerp = 0 }, errNoHome.Error()},
		"negative home":    {func(n *tailnetpb.Node) { n.PreferredDerp = -1 }, errNoHome.Error()},
		"short key":        {func(n *tailnetpb.Node) { n.Key = n.Key[:33] }, "node key of 33 bytes"},
		"long key":         {func(n *tailnetpb.Node) { n.Key = append(n.Key, 0) }, "node key of 35 bytes"},
		"key of zeros":     {func(n *tailnetpb.Node) { clear(n.Key[2:]) }, "zeros"},
		"wrong prefix":     {func(n *tailnetpb.Node) { n.Key[0] = 'x' }, "node key"},
		"no disco":         {func(n *tailnetpb.Node) { n.Disco = "" }, "disco key"},
		"untyped disco":    {func(n *tailnetpb.Node) { n.Disco = strings.TrimPrefix(n.Disco, "discokey:") }, "disco key"},
		"no address":       {func(n *tailnetpb.Node) { n.AllowedIps = nil }, "without an address"},
		"only a network":   {func(n *tailnetpb.Node) { n.AllowedIps = []string{"fd7a:115c:a1e0::/48", "::/0"} }, "without an address"},
		"only IPv4":        {func(n *tailnetpb.Node) { n.AllowedIps = []string{"100.64.0.1/32"} }, "without an address"},
		"no endpoints":     {func(n *tailnetpb.Node) { n.Endpoints = nil }, ""},
		"broken endpoints": {func(n *tailnetpb.Node) { n.Endpoints = []string{"x", "192.0.2.1", "192.0.2.1:0"} }, ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			n := goodNode()
			tt.change(n)
			d, err := decodeNode(n)
			if tt.err == "" && err != nil || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
				t.Fatalf("error %v, want %q", err, tt.err)
			}
			if err == nil && len(d.route) != 2 {
				t.Errorf("route %v", d.route)
			}
		})
	}
	d, err := decodeNode(goodNode())
	if err != nil {
		t.Fatal(err)
	}
	want := []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:1"), netip.MustParseAddrPort("[2001:db8::1]:2")}
	if diff := cmp.Diff(want, d.endpoints, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
	if _, err := decodeNode(nil); !errors.Is(err, errNoHome) {
		t.Errorf("no node at all: %v", err)
	}
}

func FuzzDecodeNode(f *testing.F) {
	good, err := proto.Marshal(goodNode())
	if err != nil {
		f.Fatal(err)
	}
	many := goodNode()
	for range 1000 {
		many.Endpoints = append(many.Endpoints, "192.0.2.1:9")
		many.AllowedIps = append(many.AllowedIps, "fd7a:115c:a1e0::1/128")
	}
	tooMany, err := proto.Marshal(many)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(tooMany)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		n := new(tailnetpb.Node)
		if proto.Unmarshal(b, n) != nil {
			return
		}
		d, err := decodeNode(n)
		if err != nil {
			return
		}
		if d.key.IsZero() || d.disco.IsZero() || d.home <= 0 || len(d.route) == 0 || len(d.route) > maxAddresses || len(d.endpoints) > maxEndpoints {
			t.Errorf("accepted %+v", d)
		}
		for _, p := range d.route {
			if !p.IsSingleIP() || !p.Addr().Is6() {
				t.Errorf("accepted route %v", p)
			}
		}
		d.view(2)
	})
}
