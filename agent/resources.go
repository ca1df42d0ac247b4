package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/berthd/berth/usage"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

const (
	// maxWindow bounds a window in bytes, so that a message has room for it. A stock server wants 20
	// datapoints, which take some 2 KiB.
	maxWindow = wire.MaxMessage / 2
	// pointSize is more than a datapoint's time, and the figures of one thing, take.
	pointSize = 64
	// gaugeTimeout is how long one measurement is waited for.
	gaugeTimeout = 2 * time.Second
)

// datapoint is one line of a report, with a shorter name.
type datapoint = agentpb.PushResourcesMonitoringUsageRequest_Datapoint

// resourceMonitor measures what the workspace uses, as the server's configuration says.
type resourceMonitor struct {
	points   int // in a window
	interval time.Duration
	memory   *gauge // nil: not wanted
	volumes  []*gauge
	report   func(window []*datapoint)
}

// newResourceMonitor returns nil if the server wants nothing measured, or what nobody can keep.
func newResourceMonitor(config *agentpb.GetResourcesMonitoringConfigurationResponse, log *slog.Logger) *resourceMonitor {
	r := &resourceMonitor{
		points:   int(config.GetConfig().GetNumDatapoints()),
		interval: time.Duration(config.GetConfig().GetCollectionIntervalSeconds()) * time.Second,
	}
	if config.GetMemory().GetEnabled() {
		r.memory = &gauge{read: usage.Memory, trouble: trouble{log: log}}
	}
	for _, v := range config.GetVolumes() {
		if v.GetEnabled() {
			read := func() (usage.Amount, error) { return usage.Volume(v.GetPath()) }
			r.volumes = append(r.volumes, &gauge{what: v.GetPath(), read: read, trouble: trouble{log: log}})
		}
	}
	size := 2 * pointSize
	for _, v := range r.volumes {
		size += pointSize + len(v.what)
	}
	if r.points > maxWindow/size {
		log.Warn("resources are not measured: the server asks for more than fits a message", "datapoints", r.points, "volumes", len(r.volumes))
		return nil
	}
	if r.points <= 0 || r.interval <= 0 || r.memory == nil && len(r.volumes) == 0 {
		return nil
	}
	return r
}

// run measures every interval and, once there is a full window of datapoints, reports the newest
// window each time, until ctx is done.
func (r *resourceMonitor) run(ctx context.Context) error {
	tick := time.NewTicker(r.interval)
	defer tick.Stop()
	var window []*datapoint
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		if window = append(window, r.measure(ctx)); len(window) > r.points {
			window = window[1:]
		}
		if len(window) == r.points {
			r.report(slices.Clone(window))
		}
	}
}

// measure takes one datapoint. What cannot be measured is left out.
func (r *resourceMonitor) measure(ctx context.Context) *datapoint {
	point := &datapoint{CollectedAt: timestamppb.Now()}
	if r.memory != nil {
		if a, ok := r.memory.measure(ctx); ok {
			point.Memory = &agentpb.PushResourcesMonitoringUsageRequest_Datapoint_MemoryUsage{Used: a.Used, Total: a.Total}
		}
	}
	for _, v := range r.volumes {
		if a, ok := v.measure(ctx); ok {
			point.Volumes = append(point.Volumes, &agentpb.PushResourcesMonitoringUsageRequest_Datapoint_VolumeUsage{
				Volume: v.what, Used: a.Used, Total: a.Total,
			})
		}
	}
	return point
}

// gauge measures one thing. A network file system whose server is away does not answer, for hours and
// to no signal: nobody waits for it, and it is asked again only once it has answered.
type gauge struct {
	what    string
	read    func() (usage.Amount, error)
	trouble trouble
	asked   chan measurement // nil unless an answer is due
}

type measurement struct {
	usage.Amount
	err error
}

var errSilent = errors.New("it does not answer")

func (g *gauge) measure(ctx context.Context) (usage.Amount, bool) {
	if g.asked == nil {
		asked := make(chan measurement, 1)
		g.asked = asked
		go func() {
			amount, err := g.read()
			asked <- measurement{amount, err}
		}()
	}
	limit := time.NewTimer(gaugeTimeout)
	defer limit.Stop()
	m := measurement{err: fmt.Errorf("cannot measure %s: %w", g.what, errSilent)}
	select {
	case m = <-g.asked:
		g.asked = nil
	case <-ctx.Done():
		return usage.Amount{}, false
	case <-limit.C:
	}
	if m.err != nil {
		g.trouble.report(m.err.Error(), "")
		return usage.Amount{}, false
	}
	g.trouble.clear()
	return m.Amount, true
}

// monitorResources asks what the server wants measured and does that.
func (a *agent) monitorResources(ctx context.Context, api agentpb.DRPCAgentClient) error {
	var config *agentpb.GetResourcesMonitoringConfigurationResponse
	asked := a.insist(ctx, "learn which resources to measure", func(ctx context.Context) (err error) {
		config, err = api.GetResourcesMonitoringConfiguration(ctx, &agentpb.GetResourcesMonitoringConfigurationRequest{})
		return err
	})
	if !asked {
		return ended(ctx)
	}
	monitor := newResourceMonitor(config, a.log.With("part", "resources"))
	if monitor == nil {
		return ended(ctx)
	}
	monitor.report = a.reporter.Resources
	return monitor.run(ctx)
}
