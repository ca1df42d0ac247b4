package tailnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"tailscale.com/net/stun"
	"tailscale.com/tailcfg"

	"github.com/berthd/berth/wire/tailnetpb"
)

const (
	// surveyed bounds how many relay regions and how many STUN servers are asked.
	surveyed = 8
	// stunRetry is after how long a STUN request is sent anew: one may be lost.
	stunRetry = 400 * time.Millisecond
	// defaultSTUNPort is that of a server whose port is not given.
	defaultSTUNPort = 3478
)

// Survey is what was found on the ways that a node would use.
type Survey struct {
	Relays []RelayAnswer
	STUN   []STUNAnswer
}

// RelayAnswer is how a relay region answered.
type RelayAnswer struct {
	Region  string
	Latency time.Duration
	Err     error
}

// STUNAnswer is how a STUN server answered: it saw this machine at an address.
type STUNAnswer struct {
	Server string
	Seen   netip.AddrPort
	Err    error
}

// Look asks relays and STUN servers of a map, the first few of each, as a node with this configuration would, and makes no
// node. It takes as long as ctx lets it where one does not answer.
func Look(ctx context.Context, cfg Config, m *tailnetpb.DERPMap) (Survey, error) {
	rm, err := readRelayMap(m, cfg.AccessURL)
	if err != nil {
		return Survey{}, err
	}
	ids := make([]int, 0, len(rm.regions))
	for id := range rm.regions {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	s := Survey{Relays: make([]RelayAnswer, min(len(ids), surveyed)), STUN: make([]STUNAnswer, min(len(rm.stun), surveyed))}
	var wg sync.WaitGroup
	for i := range s.Relays {
		wg.Go(func() {
			region := rm.regions[ids[i]]
			m, err := cfg.measureRegion(ctx, region)
			s.Relays[i] = RelayAnswer{Region: region.name, Latency: m.rtt, Err: err}
		})
	}
	for i := range s.STUN {
		wg.Go(func() { s.STUN[i] = askSTUN(ctx, rm.stun[i]) })
	}
	wg.Wait()
	return s, nil
}

// errNoSTUN is what silence means.
var errNoSTUN = errors.New("no answer over UDP")

func askSTUN(ctx context.Context, server *tailcfg.DERPNode) STUNAnswer {
	host := literal(server.IPv4, literal(server.IPv6, server.HostName))
	port := server.STUNPort
	if port == 0 {
		port = defaultSTUNPort
	}
	a := STUNAnswer{Server: net.JoinHostPort(host, strconv.Itoa(port))}
	conn, err := new(net.Dialer).DialContext(ctx, "udp", a.Server)
	if err != nil {
		a.Err = err
		return a
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	id := stun.NewTxID()
	buf := make([]byte, 1500) // no answer is longer than a packet
	for ctx.Err() == nil {
		if _, err := conn.Write(stun.Request(id)); err != nil && ctx.Err() == nil {
			a.Err = err
			return a
		}
		_ = conn.SetReadDeadline(time.Now().Add(stunRetry))
		for {
			n, err := conn.Read(buf)
			if err != nil {
				if !isTimeout(err) && ctx.Err() == nil {
					a.Err = fmt.Errorf("%w: %w", errNoSTUN, err)
					return a
				}
				break
			}
			if tx, seen, err := stun.ParseResponse(buf[:n]); err == nil && tx == id {
				a.Seen = netip.AddrPortFrom(seen.Addr().Unmap(), seen.Port())
				return a
			}
		}
	}
	a.Err = errNoSTUN
	return a
}

func isTimeout(err error) bool {
	var late net.Error
	return errors.As(err, &late) && late.Timeout()
}
