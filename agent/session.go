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
	"github.com/berthd/berth/wire"
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

// run implements session: it does what the server expects of an agent, until the link ends. Beside the
// manifest only coordination and the relay map are worth another link when they fail; the other duties
// bear any answer of the server, and end with ctx alone.
func (d duties) run(ctx context.Context) error {
	a, up := d.agent, d.up
	m, err := a.takeManifest(ctx, up.Agent)
	if err != nil {
		return err
	}
	startupErr := a.reportStartup(ctx, up.Agent)
	a.inForce(ctx, m)
	a.linked(m, up)
	a.online.Store(true)
	defer a.online.Store(false)

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		select {
		case <-up.Done():
			return errLinkClosed
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	if startupErr != nil {
		g.Go(func() error { return a.insistOnStartup(ctx, up.Agent) })
	}
	g.Go(func() error { return a.followNotes(ctx, up.Agent) })
	g.Go(func() error { a.reporter.Deliver(ctx, up.Agent, up.Version); return ended(ctx) })
	g.Go(func() error { return a.coordinate(ctx, up.Tailnet) })
	g.Go(func() error { return a.followRelayMaps(ctx, up.Tailnet) })
	g.Go(func() error { return a.reportStats(ctx, up.Agent) })
	// What follows is about a workspace that is open; the rest goes on until everything is told.
	open, cancel := a.whileOpen(ctx)
	defer cancel()
	duty := func(run func(context.Context) error) {
		g.Go(func() error {
			err := run(open)
			if open.Err() != nil {
				return ended(ctx)
			}
			return err
		})
	}
	duty(func(ctx context.Context) error { return a.refreshBanners(ctx, up.Agent, up.Version) })
	duty(metadataCollector{m.GetMetadata(), a.shell.Command, a.reporter.Metadata, a.log.With("part", "metadata")}.run)
	duty(healthChecker{m.GetApps(), a.reporter.AppHealths, a.log.With("part", "health")}.run)
	if up.Version.AtLeast(4) {
		duty(func(ctx context.Context) error { return a.monitorResources(ctx, up.Agent) })
	}
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
	for _, s := range m.GetSecrets() {
		a.mask.Add(wire.Secret(s.GetValue()))
	}
	a.reporter.For(id)
	a.shell.Update(m, a.token())
	return m, nil
}

// inForce lets everybody know of a manifest, once its secrets are where scripts look for them.
func (a *agent) inForce(ctx context.Context, m *agentpb.Manifest) {
	err := a.shell.Do(func() error {
		writeSecrets(m.GetSecrets(), a.shell.Home(), a.log)
		return nil
	})
	if err != nil {
		a.log.Warn("no secret is written to a file", "error", err)
	}
	if err := saveManifest(a.cfg.State, m); err != nil && a.manifest.Load() == nil {
		a.log.Warn("stop scripts will not run should berthd be restarted and stopped while the server is away", "error", err)
	}
	if a.manifest.Swap(m) == nil {
		a.first.set(m)
	} else {
		a.newRelayMap(ctx, m.GetDerpMap())
	}
}

// newRelayMap gives the node the relay map of a later manifest, should the node be up.
func (a *agent) newRelayMap(ctx context.Context, m *tailnetpb.DERPMap) {
	up, ok := a.mesh.now()
	if !ok {
		return
	}
	_ = up.use(ctx, func(_ context.Context, node *tailnet.Node) error {
		a.setRelayMap(node, m)
		return nil
	})
}

// setRelayMap gives the node a relay map that it can use; otherwise it keeps the one it has.
func (a *agent) setRelayMap(node *tailnet.Node, m *tailnetpb.DERPMap) {
	if err := node.SetDERPMap(m); err != nil {
		a.log.Warn("the server's new relay map cannot be used; keeping the old one", "error", err)
	}
}

// reportStartup tells what runs here.
func (a *agent) reportStartup(ctx context.Context, api agentpb.DRPCAgentClient) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	startup := &agentpb.Startup{Version: a.cfg.Version, ExpandedDirectory: wire.Text(a.shell.Directory()), Subsystems: a.subsystems(), BerthNotes: a.cfg.Life.Notes()}
	_, err := api.UpdateStartup(ctx, &agentpb.UpdateStartupRequest{Startup: startup})
	return err
}

// insistOnStartup is for when that failed: nothing else waits for it.
func (a *agent) insistOnStartup(ctx context.Context, api agentpb.DRPCAgentClient) error {
	a.insist(ctx, "report the startup", func(ctx context.Context) error { return a.reportStartup(ctx, api) })
	return ended(ctx)
}

// followNotes tells the server when there is more to know of this berthd.
func (a *agent) followNotes(ctx context.Context, api agentpb.DRPCAgentClient) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-a.cfg.Life.noted:
			a.insist(ctx, "tell what became of this workspace", func(ctx context.Context) error { return a.reportStartup(ctx, api) })
		}
	}
}

// insist makes a call until it succeeds, with pauses in between. It returns false if the server lacks
// the method or ctx is done.
func (a *agent) insist(ctx context.Context, what string, call func(context.Context) error) bool {
	trouble := &trouble{log: a.log}
	for pace := client.NewPace(); ; {
		callCtx, cancel := context.WithTimeout(ctx, callTimeout)
		err := call(callCtx)
		cancel()
		if ctx.Err() != nil || rpc.Unimplemented(err) {
			return false
		}
		if err == nil {
			trouble.clear()
			return true
		}
		trouble.report(fmt.Sprintf("cannot %s: %v", what, err), "see the server's log; it is tried again")
		if !pause(ctx, pace.Soon()) {
			return false
		}
	}
}

// ended is the end of a duty that has nothing left to do on this link: it waits for the link's.
func ended(ctx context.Context) error {
	<-ctx.Done()
	return ctx.Err()
}

func (a *agent) linked(m *agentpb.Manifest, up *client.Link) {
	id := optionalID(m.GetAgentId()).String()
	a.link.trouble.clear()
	level := slog.LevelInfo
	if a.link.flapping.active() {
		level = slog.LevelDebug // what a person should know has been said
	}
	a.log.Log(context.Background(), level, "linked to the control server", "agent", m.GetAgentName(), "id", id, "api", up.Version)
	if up.Version != wire.CurrentVersion && up.Version != a.spoken {
		a.log.Info("the server speaks an older version of the agent API; it is told what that has room for", "server", up.Version, "berthd", wire.CurrentVersion)
	}
	a.spoken = up.Version
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
			if rpc.Unimplemented(err) {
				return ended(ctx)
			}
			if err != nil {
				return fmt.Errorf("cannot follow the relay map: %w", err)
			}
			a.setRelayMap(node, m)
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
