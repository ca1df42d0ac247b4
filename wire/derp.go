package wire

import "github.com/berthd/berth/wire/tailnetpb"

// DERPMap is the relay map as JSON: /derp-map and /connection send it with Go-cased keys.
type DERPMap struct {
	HomeParams         *DERPHomeParams `json:",omitempty"`
	Regions            map[int64]*DERPRegion
	OmitDefaultRegions bool `json:"omitDefaultRegions,omitempty"`
}

// DERPHomeParams weighs regions when a home is chosen.
type DERPHomeParams struct {
	RegionScore map[int64]float64 `json:",omitempty"`
}

// DERPRegion is a group of relays that are equal to their users.
type DERPRegion struct {
	// EmbeddedRelay marks the control server's own relay: receivers reach it at their access URL.
	EmbeddedRelay bool
	RegionID      int64
	RegionCode    string
	RegionName    string
	Avoid         bool `json:",omitempty"`
	Nodes         []*DERPNode
}

// DERPNode is one relay or STUN server.
type DERPNode struct {
	Name     string
	RegionID int64
	HostName string
	CertName string `json:",omitempty"`
	IPv4     string `json:",omitempty"`
	IPv6     string `json:",omitempty"`
	// STUNPort is 0 for 3478, negative for none.
	STUNPort int32 `json:",omitempty"`
	STUNOnly bool  `json:",omitempty"`
	// DERPPort is 0 for 443.
	DERPPort         int32  `json:",omitempty"`
	InsecureForTests bool   `json:",omitempty"`
	ForceHTTP        bool   `json:",omitempty"`
	STUNTestIP       string `json:",omitempty"`
	CanPort80        bool   `json:",omitempty"`
}

// Proto returns the map as the RPC services send it. Its home parameters are always present:
// stock agents crash without them.
func (m *DERPMap) Proto() *tailnetpb.DERPMap {
	p := &tailnetpb.DERPMap{
		HomeParams: &tailnetpb.DERPMap_HomeParams{},
		Regions:    make(map[int64]*tailnetpb.DERPMap_Region, len(m.Regions)),
	}
	if m.HomeParams != nil {
		p.HomeParams.RegionScore = m.HomeParams.RegionScore
	}
	for id, r := range m.Regions {
		if r == nil {
			continue
		}
		region := &tailnetpb.DERPMap_Region{
			RegionId: r.RegionID, EmbeddedRelay: r.EmbeddedRelay, RegionCode: r.RegionCode,
			RegionName: r.RegionName, Avoid: r.Avoid,
		}
		for _, n := range r.Nodes {
			if n == nil {
				continue
			}
			region.Nodes = append(region.Nodes, &tailnetpb.DERPMap_Region_Node{
				Name: n.Name, RegionId: n.RegionID, HostName: n.HostName, CertName: n.CertName,
				Ipv4: n.IPv4, Ipv6: n.IPv6, StunPort: n.STUNPort, StunOnly: n.STUNOnly,
				DerpPort: n.DERPPort, InsecureForTests: n.InsecureForTests, ForceHttp: n.ForceHTTP,
				StunTestIp: n.STUNTestIP, CanPort_80: n.CanPort80,
			})
		}
		p.Regions[id] = region
	}
	return p
}

// DERPMapFromProto returns the JSON form of a map.
func DERPMapFromProto(p *tailnetpb.DERPMap) *DERPMap {
	m := &DERPMap{Regions: make(map[int64]*DERPRegion, len(p.GetRegions()))}
	if score := p.GetHomeParams().GetRegionScore(); len(score) > 0 {
		m.HomeParams = &DERPHomeParams{RegionScore: score}
	}
	for id, r := range p.GetRegions() {
		region := &DERPRegion{
			EmbeddedRelay: r.GetEmbeddedRelay(), RegionID: r.GetRegionId(), RegionCode: r.GetRegionCode(),
			RegionName: r.GetRegionName(), Avoid: r.GetAvoid(),
		}
		for _, n := range r.GetNodes() {
			region.Nodes = append(region.Nodes, &DERPNode{
				Name: n.GetName(), RegionID: n.GetRegionId(), HostName: n.GetHostName(), CertName: n.GetCertName(),
				IPv4: n.GetIpv4(), IPv6: n.GetIpv6(), STUNPort: n.GetStunPort(), STUNOnly: n.GetStunOnly(),
				DERPPort: n.GetDerpPort(), InsecureForTests: n.GetInsecureForTests(), ForceHTTP: n.GetForceHttp(),
				STUNTestIP: n.GetStunTestIp(), CanPort80: n.GetCanPort_80(),
			})
		}
		m.Regions[id] = region
	}
	return m
}
