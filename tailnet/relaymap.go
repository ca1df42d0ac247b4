package tailnet

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"tailscale.com/net/tlsdial"
	"tailscale.com/tailcfg"

	"github.com/berthd/berth/wire/tailnetpb"
)

// maxRegions bounds a relay map; the largest public one has some thirty regions.
const maxRegions = 1024

// resolveTimeout bounds the look at the names of STUN servers, which a new relay
// map waits for.
const resolveTimeout = time.Second

// region is one relay region as this node reaches it.
type region struct {
	id    int
	name  string
	score float64 // scales the measured latency
	avoid bool
	nodes []relayNode
}

// relayNode is one relay server. It is comparable, so that a changed map shows.
type relayNode struct {
	scheme, host, name string // name is for TLS, and the Host of requests
	port               int
	certName           string
	insecure           bool
}

func (r relayNode) url(path string) *url.URL {
	host := r.host
	if !(r.scheme == "https" && r.port == 443) && !(r.scheme == "http" && r.port == 80) {
		host = net.JoinHostPort(host, strconv.Itoa(r.port))
	} else if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	return &url.URL{Scheme: r.scheme, Host: host, Path: path}
}

// relayMap is a relay map taken apart: relays to go through, and STUN servers.
type relayMap struct {
	source  *tailnetpb.DERPMap
	regions map[int]*region
	stun    []*tailcfg.DERPNode
}

// readRelayMap checks a relay map and applies the access URL to embedded relays.
func readRelayMap(m *tailnetpb.DERPMap, access *url.URL) (*relayMap, error) {
	if len(m.GetRegions()) > maxRegions {
		return nil, fmt.Errorf("cannot use a relay map of %d regions: the limit is %d", len(m.GetRegions()), maxRegions)
	}
	rm := &relayMap{regions: make(map[int]*region)}
	for id, r := range m.GetRegions() {
		if id <= 0 || int64(int32(id)) != id {
			continue // zero means none, and peers are told an int32
		}
		reg := &region{id: int(id), name: cmp.Or(r.GetRegionName(), r.GetRegionCode(), strconv.FormatInt(id, 10)), avoid: r.GetAvoid(), score: 1}
		if s := m.GetHomeParams().GetRegionScore()[id]; s > 0 {
			reg.score = s
		}
		for _, n := range r.GetNodes() {
			if n.GetStunPort() >= 0 {
				rm.stun = append(rm.stun, stunNode(n))
			}
			if !n.GetStunOnly() {
				node, err := readRelayNode(n, r.GetEmbeddedRelay(), access)
				if err != nil {
					return nil, err
				}
				reg.nodes = append(reg.nodes, node)
				if node.host == n.GetIpv4() && net.ParseIP(n.GetIpv6()) != nil {
					// For machines that have no IPv4, the same relay again.
					node.host = n.GetIpv6()
					reg.nodes = append(reg.nodes, node)
				}
			}
		}
		if len(reg.nodes) > 0 {
			rm.regions[reg.id] = reg
		}
	}
	if len(rm.regions) == 0 {
		return nil, fmt.Errorf("cannot use the relay map: none of its %d regions has a relay (nodes that only do STUN are none); check the server's relay settings", len(m.GetRegions()))
	}
	slices.SortFunc(rm.stun, func(a, b *tailcfg.DERPNode) int { return cmp.Compare(a.HostName, b.HostName) })
	return rm, nil
}

func readRelayNode(n *tailnetpb.DERPMap_Region_Node, embedded bool, access *url.URL) (relayNode, error) {
	node := relayNode{scheme: "https", name: n.GetHostName(), certName: n.GetCertName(), insecure: n.GetInsecureForTests(), port: int(n.GetDerpPort())}
	if n.GetForceHttp() {
		node.scheme = "http"
	}
	node.host = literal(n.GetIpv4(), literal(n.GetIpv6(), n.GetHostName()))
	if embedded {
		if access == nil {
			return node, errors.New("cannot use the server's embedded relay without an access URL")
		}
		node = relayNode{scheme: access.Scheme, host: access.Hostname(), name: access.Hostname(), certName: n.GetCertName(), insecure: n.GetInsecureForTests()}
		node.port, _ = strconv.Atoi(access.Port())
	}
	if node.port == 0 {
		node.port = map[string]int{"http": 80, "https": 443}[node.scheme]
	}
	return node, nil
}

// literal is an address of the map, or another way if there is none.
func literal(addr, otherwise string) string {
	if net.ParseIP(addr) != nil {
		return addr
	}
	return otherwise
}

func stunNode(n *tailnetpb.DERPMap_Region_Node) *tailcfg.DERPNode {
	return &tailcfg.DERPNode{
		HostName: n.GetHostName(), IPv4: n.GetIpv4(), IPv6: n.GetIpv6(),
		STUNPort: int(n.GetStunPort()), STUNOnly: true, STUNTestIP: n.GetStunTestIp(),
	}
}

// noAddress in a relay map says that a node has no address of a family.
const noAddress = "none"

// settleFamilies notes which STUN servers have no address of one family. The
// library would wait three seconds for an answer from there, and tell the
// node's endpoints only then. A name that does not resolve now stays as it is.
func (m *relayMap) settleFamilies(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	var wg sync.WaitGroup
	for _, n := range m.stun {
		wg.Go(func() {
			ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", n.HostName)
			if err != nil {
				return
			}
			is4 := func(a netip.Addr) bool { return a.Unmap().Is4() }
			is6 := func(a netip.Addr) bool { return a.Unmap().Is6() }
			if n.IPv4 == "" && !slices.ContainsFunc(ips, is4) {
				n.IPv4 = noAddress
			}
			if n.IPv6 == "" && !slices.ContainsFunc(ips, is6) {
				n.IPv6 = noAddress
			}
		})
	}
	wg.Wait()
}

// transport reaches one relay over HTTP/1.1, each time on a connection of its own.
func (c *Config) transport(r relayNode) *http.Transport {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.TLS != nil {
		conf = c.TLS.Clone()
	}
	// HTTP/2 has no upgrade to anything but WebSocket.
	conf.NextProtos = []string{"http/1.1"}
	conf.ServerName = r.name
	switch pin, pinned := strings.CutPrefix(r.certName, "sha256-raw:"); {
	case pinned:
		tlsdial.SetConfigExpectedCertHash(conf, pin)
	case r.certName != "":
		conf.ServerName = r.certName
	}
	if r.insecure {
		conf.InsecureSkipVerify = true
	}
	proxy := c.Proxy
	if proxy == nil {
		proxy = http.ProxyFromEnvironment
	}
	return &http.Transport{
		Proxy:                  proxy,
		DialContext:            c.DialRelay,
		TLSClientConfig:        conf,
		TLSHandshakeTimeout:    relayDialTimeout,
		DisableKeepAlives:      true,
		DisableCompression:     true,
		MaxResponseHeaderBytes: 64 << 10,
		ReadBufferSize:         spliceBuffer,
		WriteBufferSize:        spliceBuffer,
	}
}

// header is what goes along with each request to a relay.
func (c *Config) header() http.Header {
	if c.Header == nil {
		return make(http.Header)
	}
	h := c.Header().Clone()
	if h == nil {
		h = make(http.Header)
	}
	return h
}

// libraryMap is the map as the library sees it: each region is one relay, the
// front on loopback. The STUN servers all stand in the home region, so that
// no region but home ever gets a latency from them: a region that
// only does STUN can never become home, and home stays where this package put it.
func (m *relayMap) libraryMap(front *relayFront, home int, stun []*tailcfg.DERPNode) *tailcfg.DERPMap {
	dm := &tailcfg.DERPMap{OmitDefaultRegions: true, Regions: make(map[int]*tailcfg.DERPRegion)}
	for id, r := range m.regions {
		lr := &tailcfg.DERPRegion{RegionID: id, RegionCode: r.name, RegionName: r.name, NoMeasureNoHome: true}
		if id == home {
			for i, s := range stun {
				s := *s
				s.Name, s.RegionID = fmt.Sprintf("%d-stun%d", id, i), id
				lr.Nodes = append(lr.Nodes, &s)
			}
			// Without STUN there is nothing to measure, and waiting for it
			// would hold back the node's endpoints for three seconds.
			lr.NoMeasureNoHome = len(stun) == 0
		}
		lr.Nodes = append(lr.Nodes, front.node(id))
		dm.Regions[id] = lr
	}
	return dm
}
