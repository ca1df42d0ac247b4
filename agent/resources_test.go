package agent

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/berthd/berth/usage"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

func monitoring(points, seconds int32, memory bool, volumes ...string) *agentpb.GetResourcesMonitoringConfigurationResponse {
	c := &agentpb.GetResourcesMonitoringConfigurationResponse{
		Config: &agentpb.GetResourcesMonitoringConfigurationResponse_Config{NumDatapoints: points, CollectionIntervalSeconds: seconds},
		Memory: &agentpb.GetResourcesMonitoringConfigurationResponse_Memory{Enabled: memory},
	}
	for _, path := range volumes {
		c.Volumes = append(c.Volumes, &agentpb.GetResourcesMonitoringConfigurationResponse_Volume{Enabled: true, Path: path})
	}
	return c
}

// TestResourcesArePushedAsAFullWindow: nothing before it is full, and the newest window at every tick
// from then on. A volume that is not there costs nothing else.
func TestResourcesArePushedAsAFullWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		r := newResourceMonitor(monitoring(3, 10, true, "/", "/nowhere"), slog.New(slog.NewTextHandler(&log, nil)))
		var windows [][]*datapoint
		r.report = func(w []*datapoint) { windows = append(windows, w) }
		ctx, cancel := context.WithTimeout(t.Context(), 51*time.Second)
		defer cancel()
		began := time.Now()
		_ = r.run(ctx)
		if len(windows) != 3 {
			t.Fatalf("%d windows in 50 s, want one each at 30, 40 and 50 s", len(windows))
		}
		for i, w := range windows {
			if len(w) != 3 {
				t.Fatalf("window %d has %d points", i, len(w))
			}
			for j, p := range w {
				if at := p.GetCollectedAt().AsTime().Sub(began); at.Round(time.Second) != time.Duration(10*(i+j+1))*time.Second {
					t.Errorf("point %d of window %d is of %v", j, i, at)
				}
				if p.GetMemory().GetTotal() == 0 || len(p.GetVolumes()) != 1 || p.GetVolumes()[0].GetVolume() != "/" || p.GetVolumes()[0].GetUsed() == 0 {
					t.Errorf("point %v", p)
				}
			}
		}
		if n := strings.Count(log.String(), "/nowhere"); n != 1 {
			t.Errorf("%d warnings:\n%s", n, log.String())
		}
	})
}

func TestNothingToMeasure(t *testing.T) {
	many := make([]string, maxWindow/pointSize/20)
	for name, config := range map[string]*agentpb.GetResourcesMonitoringConfigurationResponse{
		"nil":             nil,
		"no config":       {Memory: &agentpb.GetResourcesMonitoringConfigurationResponse_Memory{Enabled: true}},
		"nothing enabled": monitoring(20, 10, false),
		"no points":       monitoring(0, 10, true),
		"no interval":     monitoring(20, 0, true),
		"negative":        monitoring(-1, -1, true),
		"too many points": monitoring(1<<30, 1, true),
		"too many disks":  monitoring(20, 10, true, many...),
	} {
		if newResourceMonitor(config, slog.New(slog.DiscardHandler)) != nil {
			t.Errorf("%s: there is a monitor", name)
		}
	}
}

// TestLargestWindowFitsAMessage: what is just taken can be sent.
func TestLargestWindowFitsAMessage(t *testing.T) {
	r := newResourceMonitor(monitoring(maxWindow/(3*pointSize+1), 1, true, "/"), slog.New(slog.DiscardHandler))
	if r == nil {
		t.Fatal("there is no monitor")
	}
	window := make([]*datapoint, r.points)
	for i := range window {
		window[i] = r.measure(t.Context())
	}
	if size := proto.Size(&agentpb.PushResourcesMonitoringUsageRequest{Datapoints: window}); size > wire.MaxMessage {
		t.Errorf("%d bytes", size)
	}
}

// TestVolumeThatDoesNotAnswer is a network file system whose server is away.
func TestVolumeThatDoesNotAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		answer := make(chan usage.Amount)
		asked := 0
		g := &gauge{what: "/mnt", trouble: trouble{log: slog.New(slog.DiscardHandler)}, read: func() (usage.Amount, error) {
			asked++
			return <-answer, nil
		}}
		for range 3 {
			began := time.Now()
			if _, ok := g.measure(t.Context()); ok || time.Since(began) != gaugeTimeout {
				t.Errorf("answered %v after %v", ok, time.Since(began))
			}
		}
		answer <- usage.Amount{Used: 1, Total: 2}
		if got, ok := g.measure(t.Context()); !ok || got.Used != 1 || asked != 1 {
			t.Errorf("measured %v %v, asked %d times", got, ok, asked)
		}
	})
}
