package agent

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/berthd/berth/tailnet"
	"github.com/berthd/berth/wire/agentpb"
	"github.com/berthd/berth/wire/rpc"
)

const (
	// defaultStatsInterval holds where the server names none.
	defaultStatsInterval = 5 * time.Minute
	// minStatsInterval keeps a server's mistake from making a tight loop.
	minStatsInterval = time.Second
	// pingTimeout bounds asking one peer for its latency, maxPings how many are asked at a time.
	pingTimeout = 5 * time.Second
	maxPings    = 16
	// unknownLatency is what the protocol says in place of a median nobody could measure, in milliseconds.
	unknownLatency = -0.001
)

// reportStats asks for the interval and then reports every interval.
func (a *agent) reportStats(ctx context.Context, api agentpb.DRPCAgentClient) error {
	up, ok := a.serving.wait(ctx)
	if !ok {
		return ctx.Err()
	}
	return up.use(ctx, func(ctx context.Context, node *tailnet.Node) error {
		var interval time.Duration
		if !a.insist(ctx, "ask when to report statistics", func(ctx context.Context) (err error) {
			interval, err = sendStats(ctx, api, nil)
			return err
		}) {
			return ended(ctx)
		}
		trouble := &trouble{log: a.log}
		for pause(ctx, interval) {
			next, err := sendStats(ctx, api, a.stats(ctx, node))
			switch {
			case rpc.Unimplemented(err):
				return ended(ctx)
			case err == nil:
				trouble.clear()
				interval = next
			case ctx.Err() == nil:
				trouble.report(fmt.Sprintf("cannot report statistics: %v", err), "")
			}
		}
		return ctx.Err()
	})
}

// sendStats sends one report, nil for none, and returns when the next is due.
func sendStats(ctx context.Context, api agentpb.DRPCAgentClient, stats *agentpb.Stats) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	resp, err := api.UpdateStats(ctx, &agentpb.UpdateStatsRequest{Stats: stats})
	if err != nil {
		return 0, err
	}
	interval := resp.GetReportInterval().AsDuration()
	if interval <= 0 {
		interval = defaultStatsInterval
	}
	return max(interval, minStatsInterval), nil
}

// stats collects what happened since the last report.
func (a *agent) stats(ctx context.Context, node *tailnet.Node) *agentpb.Stats {
	traffic, ssh := node.Stats(), a.ssh.Counts()
	var flows int64
	for _, n := range traffic.Flows {
		flows += n
	}
	latency, direct, relayed := pingPeers(ctx, node)
	return &agentpb.Stats{
		ConnectionsByProto:          traffic.Flows,
		ConnectionCount:             flows,
		ConnectionMedianLatencyMs:   latency,
		RxPackets:                   traffic.RxPackets,
		RxBytes:                     traffic.RxBytes,
		TxPackets:                   traffic.TxPackets,
		TxBytes:                     traffic.TxBytes,
		SessionCountVscode:          ssh.VSCode,
		SessionCountJetbrains:       ssh.JetBrains,
		SessionCountReconnectingPty: a.pty.sessions(),
		SessionCountSsh:             ssh.SSH,
		Metrics: []*agentpb.Stats_Metric{
			reachablePeers("derp", relayed),
			reachablePeers("p2p", direct),
		},
	}
}

func reachablePeers(kind string, n int) *agentpb.Stats_Metric {
	return &agentpb.Stats_Metric{
		Name:   "coderd_agentstats_currently_reachable_peers",
		Type:   agentpb.Stats_Metric_GAUGE,
		Value:  float64(n),
		Labels: []*agentpb.Stats_Metric_Label{{Name: "connection_type", Value: kind}},
	}
}

// pingPeers returns the median latency to the peers that answer, in milliseconds, and how many of
// them are met directly and by relay.
func pingPeers(ctx context.Context, node *tailnet.Node) (median float64, direct, relayed int) {
	ctx, cancel := context.WithTimeout(ctx, pingTimeout)
	defer cancel()
	var (
		mu        sync.Mutex
		latencies []float64
		wg        sync.WaitGroup
		slots     = make(chan struct{}, maxPings)
	)
	for _, peer := range node.Peers() {
		if len(peer.Addrs) == 0 || peer.Lost {
			continue
		}
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			ping, err := node.Ping(ctx, peer.Addrs[0])
			if err != nil {
				return
			}
			mu.Lock()
			defer mu.Unlock()
			latencies = append(latencies, float64(ping.Latency)/float64(time.Millisecond))
			if ping.Direct.IsValid() {
				direct++
			} else {
				relayed++
			}
		})
	}
	wg.Wait()
	return medianOf(latencies), direct, relayed
}

func medianOf(values []float64) float64 {
	if len(values) == 0 {
		return unknownLatency
	}
	slices.Sort(values)
	middle := len(values) / 2
	if len(values)%2 == 1 {
		return values[middle]
	}
	return (values[middle-1] + values[middle]) / 2
}
