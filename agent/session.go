package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"github.com/berthd/berth/client"
	"github.com/berthd/berth/tailnet"
	"github.com/berthd/berth/wire/agentpb"
	"github.com/berthd/berth/wire/rpc"
	"github.com/berthd/berth/wire/tailnetpb"
)

// callTimeout bounds one call on the link that should take milliseconds.
const callTimeout = 30 * time.Second

// errLinkClosed ends a session whose connection is gone.
var errLinkClosed = errors.New("the connection to the control server was closed")

// duties is the session of an agent.
type duties struct {
	*agent
	up *client.Link
}

// Close implements session.
func (d duties) Close() error { return d.up.Close() }

// run implements session: it does what the server expects of an agent, until the link ends or one
// duty fails.
func (d duties) run(ctx context.Context) error {
	a, up := d.agent, d.up
	m, err := a.takeManifest(ctx, up.Agent)
	if err != nil {
		return err
	}
	a.linked(m, up)

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		select {
		case <-up.Done():
			return errLinkClosed
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	g.Go(func() error { return a.reporter.Deliver(ctx, up.Agent, up.Version) })
	g.Go(func() error { return a.refreshBanners(ctx, up.Agent, up.Version) })
	g.Go(func() error { return a.coordinate(ctx, up.Tailnet) })
	g.Go(func() error { return a.followRelayMaps(ctx, up.Tailnet) })
	g.Go(func() error { return a.reportStats(ctx, up.Agent) })
	err = g.Wait()
	select {
	case <-up.Done():
		// Every call fails when the connection does; which of them noticed first says nothing.
		return errLinkClosed
	default:
		return err
	}
}

// takeManifest asks who we are and puts the answer in force.
func (a *agent) takeManifest(ctx context.Context, api agentpb.DRPCAgentClient) (*agentpb.Manifest, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	m, err := api.GetManifest(ctx, &agentpb.GetManifestRequest{})
	if err != nil {
		return nil, fmt.Errorf("cannot get the manifest: %w", err)
	}
	id, err := uuid.FromBytes(m.GetAgentId())
	if err != nil || id == uuid.Nil {
		return nil, fmt.Errorf("cannot use the manifest: its agent id has %d bytes, not the 16 of an id", len(m.GetAgentId()))
	}
	if before := a.manifest.Load(); before != nil && optionalID(before.GetAgentId()) != id {
		a.changed.Store(true)
		return nil, errAgentChanged
	}
	a.shell.Update(m, a.token())
	startup := &agentpb.Startup{Version: a.cfg.Version, ExpandedDirectory: a.shell.Directory(), Subsystems: a.subsystems()}
	if _, err := api.UpdateStartup(ctx, &agentpb.UpdateStartupRequest{Startup: startup}); err != nil {
		return nil, fmt.Errorf("cannot report the startup: %w", err)
	}
	if a.manifest.Swap(m) == nil {
		a.first.set(m)
	}
	return m, nil
}

func (a *agent) linked(m *agentpb.Manifest, up *client.Link) {
	id := optionalID(m.GetAgentId()).String()
	a.link.trouble.clear()
	level := slog.LevelInfo
	if a.link.flapping.active() {
		level = slog.LevelDebug // what a person should know has been said
	}
	a.log.Log(context.Background(), level, "linked to the control server", "agent", m.GetAgentName(), "id", id, "api", up.Version)
	a.emit(Event{Step: StepLinked, AgentID: id, AgentName: m.GetAgentName()})
}

// coordinate tells the coordinator where we are and learns where our peers are, once everything
// that peers may want is served.
func (a *agent) coordinate(ctx context.Context, api tailnetpb.DRPCTailnetClient) error {
	up, ok := a.serving.wait(ctx)
	if !ok {
		return ctx.Err()
	}
	return up.use(ctx, func(ctx context.Context, node *tailnet.Node) error {
		// The stream has its own context: when ctx ends, the node still says goodbye on it.
		streamCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		defer cancel()
		stream, err := api.Coordinate(streamCtx)
		if err != nil {
			return fmt.Errorf("cannot coordinate: %w", err)
		}
		node.SetRelayOnly(a.relayOnly(a.manifest.Load()))
		if !a.joined.Load() {
			joinCtx, joined := context.WithCancel(ctx)
			done := make(chan struct{})
			go func() { defer close(done); a.announceJoin(joinCtx, node) }()
			defer func() { joined(); <-done }()
		}
		if err := node.CoordinateAgent(ctx, stream); err != nil {
			return fmt.Errorf("cannot coordinate: %w", err)
		}
		return endOf(ctx, "coordination")
	})
}

// followRelayMaps gives the node each relay map as the server changes it.
func (a *agent) followRelayMaps(ctx context.Context, api tailnetpb.DRPCTailnetClient) error {
	up, ok := a.serving.wait(ctx)
	if !ok {
		return ctx.Err()
	}
	return up.use(ctx, func(ctx context.Context, node *tailnet.Node) error {
		stream, err := api.StreamDERPMaps(ctx, &tailnetpb.StreamDERPMapsRequest{})
		if err != nil {
			return fmt.Errorf("cannot follow the relay map: %w", err)
		}
		defer stream.Close()
		for {
			m, err := stream.Recv()
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil {
				return fmt.Errorf("cannot follow the relay map: %w", err)
			}
			if err := node.SetDERPMap(m); err != nil {
				a.log.Warn("the server's new relay map cannot be used; keeping the old one", "error", err)
			}
		}
	})
}

// endOf is the error of a stream that ended without being asked to.
func endOf(ctx context.Context, what string) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return fmt.Errorf("the server ended the %s", what)
}

// optional turns "this server does not know that call" into nil.
func optional(err error) error {
	if rpc.Unimplemented(err) {
		return nil
	}
	return err
}

func (a *agent) subsystems() []agentpb.Startup_Subsystem {
	var list []agentpb.Startup_Subsystem
	for _, name := range a.cfg.Subsystem {
		switch name {
		case "envbox":
			list = append(list, agentpb.Startup_ENVBOX)
		case "envbuilder":
			list = append(list, agentpb.Startup_ENVBUILDER)
		case "exectrace":
			list = append(list, agentpb.Startup_EXECTRACE)
		}
	}
	return list
}
