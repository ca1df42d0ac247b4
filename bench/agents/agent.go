package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/berthd/berth/client"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
	"github.com/berthd/berth/wire/tailnetpb"
)

// agent is one simulated agent. Its load is that of a workspace where somebody works.
type agent struct {
	settings
	id     uuid.UUID
	api    *client.Client
	record *record
	source uuid.UUID
	spool  uuid.UUID
	// acknowledged is how many lines the server has said to have; unsent is the batch it has not.
	acknowledged uint64
	unsent       []*agentpb.Log
}

func newAgent(s settings, server *server, who wire.CreatedAgent, r *record) (*agent, error) {
	token := wire.Secret(who.Token)
	api, err := client.New(client.Config{URL: server.url, Token: func() wire.Secret { return token }})
	if err != nil {
		return nil, err
	}
	return &agent{settings: s, id: who.ID, api: api, record: r, source: uuid.New(), spool: uuid.New()}, nil
}

// Pace of linking, as package agent has it.
const (
	dialTimeout = time.Minute
	callTimeout = 30 * time.Second
	lasted      = 30 * time.Second
)

// run links and links anew until ctx is done. The first dial waits a moment of its own, so that the
// start of the measurement is no herd.
func (a *agent) run(ctx context.Context, first time.Duration) {
	pace := client.NewPace()
	for wait := first; ; {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		since := time.Now()
		linked, err := a.attempt(ctx)
		if ctx.Err() != nil {
			return
		}
		a.record.lost(linked, err)
		if time.Since(since) >= lasted {
			pace.Reset()
		}
		wait = pace.After(client.Explain(err))
		if a.stock {
			wait = 10 * time.Second // where a stock agent's delay is after hours, and it never goes back
		}
	}
}

// attempt links once and stays with it; linked tells whether the link came up.
func (a *agent) attempt(ctx context.Context) (linked bool, err error) {
	a.record.dialled()
	dialCtx, cancel := context.WithTimeout(ctx, dialTimeout)
	begun := time.Now()
	up, err := a.api.ConnectAgent(dialCtx)
	cancel()
	if err != nil {
		return false, err
	}
	a.record.took("link", time.Since(begun))
	defer up.Close()
	ctx, cancel = context.WithCancel(ctx)
	defer cancel()

	m, err := call(ctx, a, "GetManifest", up.Agent.GetManifest, &agentpb.GetManifestRequest{})
	if err != nil {
		return false, err
	}
	if id, err := uuid.FromBytes(m.GetAgentId()); err != nil || id != a.id || len(m.GetMetadata()) != len(metadataKeys) {
		return false, fmt.Errorf("the manifest is of %v with %d metadata: %w", id, len(m.GetMetadata()), err)
	}
	startup := &agentpb.Startup{Version: "v1.2.3", ExpandedDirectory: "/home/somebody"}
	if _, err := call(ctx, a, "UpdateStartup", up.Agent.UpdateStartup, &agentpb.UpdateStartupRequest{Startup: startup}); err != nil {
		return false, err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		select {
		case <-up.Done():
			return errors.New("the connection was closed")
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	ready := make(chan struct{})
	group.Go(func() error { return a.coordinate(ctx, up, func() { close(ready) }) })
	group.Go(func() error { return a.followRelayMaps(ctx, up) })
	select {
	case <-ready:
		linked = true
		a.record.arrived(a.id)
	case <-ctx.Done():
	}
	group.Go(func() error { return a.settle(ctx, up) })
	group.Go(func() error { return a.sendStats(ctx, up) })
	group.Go(func() error { return a.every(ctx, a.metadata, func() error { return a.sendMetadata(ctx, up) }) })
	group.Go(func() error { return a.every(ctx, a.logs, func() error { return a.sendLogs(ctx, up) }) })
	return linked, group.Wait()
}

// call makes a unary call and keeps how long it took.
func call[In, Out any](ctx context.Context, a *agent, name string, method func(context.Context, In) (Out, error), in In) (Out, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	begun := time.Now()
	out, err := method(ctx, in)
	if err != nil {
		return out, fmt.Errorf("%s: %w", name, err)
	}
	a.record.took(name, time.Since(begun))
	return out, nil
}

// every does something again and again, first at a moment of its own: agents do not march in step.
func (a *agent) every(ctx context.Context, interval time.Duration, do func() error) error {
	for wait := rand.N(interval); ; wait = interval {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
		if err := do(); err != nil {
			return err
		}
	}
}

// coordinate publishes a node and stays. ready is called when the server has taken it.
func (a *agent) coordinate(ctx context.Context, up *client.Link, ready func()) error {
	stream, err := up.Tailnet.Coordinate(ctx)
	if err != nil {
		return fmt.Errorf("cannot coordinate: %w", err)
	}
	defer stream.Close()
	var addresses []string
	for _, p := range wire.AgentPrefixes(a.id) {
		addresses = append(addresses, p.String())
	}
	node := &tailnetpb.Node{
		Id: rand.Int64(), AsOf: timestamppb.Now(), Key: append([]byte(wire.NodeKeyPrefix), randomBytes(32)...),
		Disco: fmt.Sprintf("discokey:%x", randomBytes(32)), PreferredDerp: 999,
		DerpLatency: map[string]float64{"999-v4": 0.001}, Addresses: addresses, AllowedIps: addresses,
		Endpoints: []string{"192.0.2.1:41641"},
	}
	begun := time.Now()
	if err := stream.Send(&tailnetpb.CoordinateRequest{UpdateSelf: &tailnetpb.CoordinateRequest_UpdateSelf{Node: node}}); err != nil {
		return fmt.Errorf("cannot coordinate: %w", err)
	}
	// An acknowledgement to a stranger is answered, and so tells that the node before it was taken.
	stranger := uuid.New()
	if err := stream.Send(&tailnetpb.CoordinateRequest{ReadyForHandshake: []*tailnetpb.CoordinateRequest_ReadyForHandshake{{Id: stranger[:]}}}); err != nil {
		return fmt.Errorf("cannot coordinate: %w", err)
	}
	for first := true; ; first = false {
		answer, err := stream.Recv()
		if err != nil {
			return fmt.Errorf("cannot coordinate: %w", err)
		}
		if !first || !strings.Contains(answer.GetError(), "do not share a tunnel") {
			return fmt.Errorf("cannot coordinate: unexpected answer %v", answer)
		}
		a.record.took("Coordinate", time.Since(begun))
		ready()
	}
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rand.Uint32())
	}
	return b
}

func (a *agent) followRelayMaps(ctx context.Context, up *client.Link) error {
	begun := time.Now()
	stream, err := up.Tailnet.StreamDERPMaps(ctx, &tailnetpb.StreamDERPMapsRequest{})
	if err != nil {
		return fmt.Errorf("StreamDERPMaps: %w", err)
	}
	defer stream.Close()
	for first := true; ; first = false {
		m, err := stream.Recv()
		if err != nil {
			return fmt.Errorf("StreamDERPMaps: %w", err)
		}
		if len(m.GetRegions()) == 0 {
			return errors.New("StreamDERPMaps: an empty map")
		}
		if first {
			a.record.took("StreamDERPMaps", time.Since(begun))
		}
	}
}

// settle is what an agent says and asks once a link, and then the banners every two minutes.
func (a *agent) settle(ctx context.Context, up *client.Link) error {
	for _, state := range []agentpb.Lifecycle_State{agentpb.Lifecycle_STARTING, agentpb.Lifecycle_READY} {
		l := &agentpb.Lifecycle{State: state, ChangedAt: timestamppb.Now()}
		if _, err := call(ctx, a, "UpdateLifecycle", up.Agent.UpdateLifecycle, &agentpb.UpdateLifecycleRequest{Lifecycle: l}); err != nil {
			return err
		}
	}
	if _, err := call(ctx, a, "GetResourcesMonitoringConfiguration", up.Agent.GetResourcesMonitoringConfiguration, &agentpb.GetResourcesMonitoringConfigurationRequest{}); err != nil {
		return err
	}
	return a.every(ctx, 2*time.Minute, func() error {
		_, err := call(ctx, a, "GetAnnouncementBanners", up.Agent.GetAnnouncementBanners, &agentpb.GetAnnouncementBannersRequest{})
		return err
	})
}

func (a *agent) sendStats(ctx context.Context, up *client.Link) error {
	resp, err := call(ctx, a, "UpdateStats", up.Agent.UpdateStats, &agentpb.UpdateStatsRequest{})
	if err != nil {
		return err
	}
	interval := resp.GetReportInterval().AsDuration()
	if interval <= 0 {
		return fmt.Errorf("UpdateStats: an interval of %v", interval)
	}
	return a.every(ctx, interval, func() error {
		_, err := call(ctx, a, "UpdateStats", up.Agent.UpdateStats, &agentpb.UpdateStatsRequest{Stats: &agentpb.Stats{
			ConnectionsByProto: map[string]int64{"TCP": rand.Int64N(10)}, ConnectionCount: rand.Int64N(10),
			ConnectionMedianLatencyMs: rand.Float64() * 50, RxPackets: rand.Int64N(1e5), RxBytes: rand.Int64N(1e8),
			TxPackets: rand.Int64N(1e5), TxBytes: rand.Int64N(1e8), SessionCountSsh: rand.Int64N(3),
			Metrics: []*agentpb.Stats_Metric{{
				Name: "coderd_agentstats_currently_reachable_peers", Type: agentpb.Stats_Metric_GAUGE, Value: 1,
				Labels: []*agentpb.Stats_Metric_Label{{Name: "connection_type", Value: "p2p"}},
			}},
		}})
		return err
	})
}

func (a *agent) sendMetadata(ctx context.Context, up *client.Link) error {
	req := &agentpb.BatchUpdateMetadataRequest{}
	for _, key := range metadataKeys {
		req.Metadata = append(req.Metadata, &agentpb.Metadata{Key: key, Result: &agentpb.WorkspaceAgentMetadata_Result{
			CollectedAt: timestamppb.Now(), Value: fmt.Sprintf("%d%%", rand.IntN(100)),
		}})
	}
	_, err := call(ctx, a, "BatchUpdateMetadata", up.Agent.BatchUpdateMetadata, req)
	return err
}

// sendLogs sends the batch that was not answered, or else new lines. Each line is its number, so that
// what the server stored can be checked.
func (a *agent) sendLogs(ctx context.Context, up *client.Link) error {
	if len(a.unsent) == 0 {
		for range 1 + rand.IntN(3) {
			n := a.acknowledged + uint64(len(a.unsent)) + 1
			a.unsent = append(a.unsent, &agentpb.Log{
				CreatedAt: timestamppb.Now(), Level: agentpb.Log_INFO,
				Output: fmt.Sprintf("%08d compiling something of the usual length, with a path and a number", n),
			})
		}
	}
	_, err := call(ctx, a, "BatchCreateLogs", up.Agent.BatchCreateLogs, &agentpb.BatchCreateLogsRequest{
		LogSourceId: a.source[:], Logs: a.unsent, BerthSpoolId: a.spool[:], BerthFirstSequence: a.acknowledged + 1,
	})
	if err == nil {
		a.acknowledged += uint64(len(a.unsent))
		a.unsent = nil
	}
	return err
}

// checkLogs reads the agent's log and compares it with what was acknowledged: each line once, in order.
// A last batch may have been stored without its answer having come.
func (a *agent) checkLogs(ctx context.Context, admin *client.Client) error {
	var next uint64 = 1
	for entry, err := range admin.FollowLogs(ctx, a.id, 0, false) {
		if err != nil {
			return err
		}
		if want := fmt.Sprintf("%08d ", next); !strings.HasPrefix(entry.Output, want) {
			return fmt.Errorf("agent %s: line %d is %q", a.id, next, entry.Output)
		}
		next++
	}
	if stored := next - 1; stored < a.acknowledged || stored > a.acknowledged+uint64(len(a.unsent)) {
		return fmt.Errorf("agent %s: %d lines are stored and %d were acknowledged", a.id, stored, a.acknowledged)
	}
	return nil
}
