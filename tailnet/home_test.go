package tailnet

import (
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/berthd/berth/wire/tailnetpb"
)

func TestChooser(t *testing.T) {
	ms := time.Millisecond
	type round struct {
		rtt  map[int]time.Duration
		want int
	}
	plain := func(ids ...int) map[int]*region {
		m := make(map[int]*region)
		for _, id := range ids {
			m[id] = &region{id: id, score: 1}
		}
		return m
	}
	avoid := plain(1, 2)
	avoid[1].avoid = true
	scored := plain(1, 2)
	scored[1].score = 10
	tests := map[string]struct {
		regions map[int]*region
		rounds  []round
	}{
		"nothing answers":       {plain(1), []round{{nil, 0}}},
		"the fastest":           {plain(1, 2, 3), []round{{map[int]time.Duration{1: 30 * ms, 2: 10 * ms, 3: 20 * ms}, 2}}},
		"equals: the lowest id": {plain(1, 2), []round{{map[int]time.Duration{2: ms, 1: ms}, 1}}},
		"a little better is not enough": {plain(1, 2), []round{
			{map[int]time.Duration{1: 50 * ms, 2: 60 * ms}, 1},
			{map[int]time.Duration{1: 50 * ms, 2: 40 * ms}, 1}}},
		"much better is": {plain(1, 2), []round{
			{map[int]time.Duration{1: 90 * ms, 2: 95 * ms}, 1},
			{map[int]time.Duration{1: 90 * ms, 2: 20 * ms}, 2}}},
		"fast regions stay put": {plain(1, 2), []round{
			{map[int]time.Duration{1: 9 * ms}, 1},
			{map[int]time.Duration{1: 9 * ms, 2: ms}, 1}}},
		"one slow answer does not move home": {plain(1, 2), []round{
			{map[int]time.Duration{1: 20 * ms, 2: 60 * ms}, 1},
			{map[int]time.Duration{1: 900 * ms, 2: 60 * ms}, 1}}},
		"home that is silent is left": {plain(1, 2), []round{
			{map[int]time.Duration{1: 20 * ms, 2: 60 * ms}, 1},
			{map[int]time.Duration{2: 60 * ms}, 2}}},
		"silence all round changes nothing": {plain(1, 2), []round{
			{map[int]time.Duration{1: 20 * ms}, 1}, {nil, 1}}},
		"avoid": {avoid, []round{
			{map[int]time.Duration{1: ms}, 1},
			{map[int]time.Duration{1: ms, 2: 2 * ms}, 2}}},
		"score": {scored, []round{{map[int]time.Duration{1: 10 * ms, 2: 50 * ms}, 2}}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			var c chooser
			now, home := time.Unix(0, 0), 0
			for i, r := range tt.rounds {
				m := make(map[int]measurement)
				for id, rtt := range r.rtt {
					m[id] = measurement{at: now, rtt: rtt}
				}
				if home = c.add(now, tt.regions, m, home); home != r.want {
					t.Errorf("round %d: home %d, want %d", i, home, r.want)
				}
				now = now.Add(measureEvery)
			}
		})
	}
}

func TestChooserForgets(t *testing.T) {
	var c chooser
	regions := map[int]*region{1: {id: 1, score: 1}}
	now := time.Unix(0, 0)
	for range 1000 {
		c.add(now, regions, map[int]measurement{1: {at: now, rtt: 1}}, 1)
		now = now.Add(measureEvery)
	}
	if n, most := len(c.history[1]), int(latencyMemory/measureEvery)+1; n > most {
		t.Errorf("%d measurements are kept, want at most %d", n, most)
	}
	c.add(now, map[int]*region{2: {id: 2, score: 1}}, nil, 1)
	if len(c.history) != 0 {
		t.Error("a region that left the map is remembered")
	}
}

func TestReadRelayMap(t *testing.T) {
	access := func(s string) *url.URL {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	type nodes = []*tailnetpb.DERPMap_Region_Node
	tests := map[string]struct {
		node     *tailnetpb.DERPMap_Region_Node
		embedded bool
		access   *url.URL
		want     string
	}{
		"defaults":            {&tailnetpb.DERPMap_Region_Node{HostName: "a.example"}, false, nil, "https://a.example/derp"},
		"port":                {&tailnetpb.DERPMap_Region_Node{HostName: "a.example", DerpPort: 8443}, false, nil, "https://a.example:8443/derp"},
		"http":                {&tailnetpb.DERPMap_Region_Node{HostName: "a.example", ForceHttp: true}, false, nil, "http://a.example/derp"},
		"IPv4":                {&tailnetpb.DERPMap_Region_Node{HostName: "a.example", Ipv4: "192.0.2.1"}, false, nil, "https://192.0.2.1/derp"},
		"IPv6 only":           {&tailnetpb.DERPMap_Region_Node{HostName: "a.example", Ipv4: "none", Ipv6: "2001:db8::1"}, false, nil, "https://[2001:db8::1]/derp"},
		"embedded":            {&tailnetpb.DERPMap_Region_Node{HostName: "a.example", DerpPort: 1, Ipv4: "192.0.2.1"}, true, access("https://b.example/x/y"), "https://b.example/derp"},
		"embedded, http":      {&tailnetpb.DERPMap_Region_Node{HostName: "a.example"}, true, access("http://b.example:3000"), "http://b.example:3000/derp"},
		"embedded, port 80":   {&tailnetpb.DERPMap_Region_Node{HostName: "a.example"}, true, access("http://b.example"), "http://b.example/derp"},
		"embedded, IPv6 host": {&tailnetpb.DERPMap_Region_Node{HostName: "a.example"}, true, access("http://[::1]:3000"), "http://[::1]:3000/derp"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			m := mapOf(&tailnetpb.DERPMap_Region{RegionId: 1, EmbeddedRelay: tt.embedded, Nodes: nodes{tt.node}})
			rm, err := readRelayMap(m, tt.access)
			if err != nil {
				t.Fatal(err)
			}
			if got := rm.regions[1].nodes[0].url("/derp").String(); got != tt.want {
				t.Errorf("relay at %s, want %s", got, tt.want)
			}
		})
	}
	both := &tailnetpb.DERPMap_Region_Node{HostName: "a.example", Ipv4: "192.0.2.1", Ipv6: "2001:db8::1"}
	rm, err := readRelayMap(mapOf(&tailnetpb.DERPMap_Region{RegionId: 1, Nodes: nodes{both}}), nil)
	if err != nil {
		t.Fatal(err)
	}
	if n := rm.regions[1].nodes; len(n) != 2 || n[0].host != both.Ipv4 || n[1].host != both.Ipv6 || n[1].name != both.HostName {
		t.Errorf("a relay with an address of each family is reached at %+v", n)
	}
	big := mapOf()
	for id := range int64(maxRegions + 1) {
		big.Regions[id+1] = &tailnetpb.DERPMap_Region{RegionId: id + 1}
	}
	if _, err := readRelayMap(big, nil); err == nil || !strings.Contains(err.Error(), "limit") {
		t.Errorf("a map of %d regions: %v", len(big.Regions), err)
	}
}
