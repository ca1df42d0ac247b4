package agent

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// record is a list that stages of a test write to.
type record struct {
	mu    sync.Mutex
	lines []string
}

func (r *record) add(line string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lines = append(r.lines, line)
}

func (r *record) all() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.lines)
}

// recorded is a stage that is ready after a while and takes a while to stop.
func recorded(r *record, name string, toReady, toStop time.Duration) stage {
	ready := make(chan struct{})
	return stage{name: name, ready: ready, budget: time.Second, run: func(ctx context.Context) error {
		time.Sleep(toReady)
		r.add(name + " ready")
		close(ready)
		<-ctx.Done()
		time.Sleep(toStop)
		r.add(name + " stopped")
		return nil
	}}
}

func TestStagesStartInOrderAndStopInReverse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r record
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Minute, cancel)
		err := runStages(ctx, slog.New(slog.DiscardHandler), []stage{
			recorded(&r, "a", 3*time.Second, 10*time.Millisecond),
			recorded(&r, "b", 2*time.Second, 20*time.Millisecond),
			recorded(&r, "c", time.Second, 30*time.Millisecond),
		})
		if err != nil {
			t.Errorf("runStages: %v", err)
		}
		want := []string{"a ready", "b ready", "c ready", "c stopped", "b stopped", "a stopped"}
		if diff := cmp.Diff(want, r.all()); diff != "" {
			t.Errorf("order (-want +got):\n%s", diff)
		}
	})
}

func TestStageThatFailsStopsThoseBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r record
		broken := errors.New("broken")
		err := runStages(t.Context(), slog.New(slog.DiscardHandler), []stage{
			recorded(&r, "a", 0, 0),
			{name: "b", ready: make(chan struct{}), budget: time.Second, run: func(context.Context) error { return broken }},
			recorded(&r, "c", 0, 0),
		})
		if !errors.Is(err, broken) {
			t.Errorf("runStages = %v, want %v", err, broken)
		}
		if diff := cmp.Diff([]string{"a ready", "a stopped"}, r.all()); diff != "" {
			t.Errorf("order (-want +got):\n%s", diff)
		}
	})
}

func TestStageThatEndsByItselfIsAnError(t *testing.T) {
	err := runStages(t.Context(), slog.New(slog.DiscardHandler), []stage{
		{name: "a", budget: time.Second, run: func(context.Context) error { return nil }},
	})
	if err == nil {
		t.Error("runStages = nil, want an error: the stage was not told to end")
	}
}

func TestStageOverBudgetHoldsUpNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r record
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Minute, cancel)
		stuck := recorded(&r, "stuck", 0, time.Hour)
		began := time.Now()
		if err := runStages(ctx, slog.New(slog.DiscardHandler), []stage{recorded(&r, "a", 0, 0), stuck}); err != nil {
			t.Errorf("runStages: %v", err)
		}
		if took := time.Since(began); took != time.Minute+stuck.budget {
			t.Errorf("stopped after %v, want a minute and the budget of %v", took, stuck.budget)
		}
		if diff := cmp.Diff([]string{"a ready", "stuck ready", "a stopped"}, r.all()); diff != "" {
			t.Errorf("order (-want +got):\n%s", diff)
		}
		time.Sleep(2 * time.Hour) // let the stuck one end, so that the bubble can
	})
}

func TestStageNotReadyAtStopIsStopped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		stopped := false
		err := runStages(ctx, slog.New(slog.DiscardHandler), []stage{
			{name: "a", ready: make(chan struct{}), budget: time.Second, run: func(ctx context.Context) error {
				<-ctx.Done()
				stopped = true
				return nil
			}},
		})
		if err != nil || !stopped {
			t.Errorf("runStages = %v, stopped %v; want nil and true", err, stopped)
		}
	})
}
