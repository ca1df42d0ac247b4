package control

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// A thousand at once: few at a time, all in the end.
func TestGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(maxBeginning)
		var inside, most, done atomic.Int64
		var all sync.WaitGroup
		for range 1000 {
			all.Go(func() {
				leave, err := g.enter(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				if n := inside.Add(1); n > most.Load() {
					most.Store(n)
				}
				time.Sleep(100 * time.Millisecond) // what beginning takes
				inside.Add(-1)
				leave()
				leave() // does nothing
				done.Add(1)
			})
		}
		begun := time.Now()
		all.Wait()
		if most.Load() > maxBeginning || done.Load() != 1000 {
			t.Errorf("%d were inside at once, %d of 1000 came through", most.Load(), done.Load())
		}
		if took := time.Since(begun); took > 4*time.Second { // 1000/32 * 0.1 s
			t.Errorf("it took %v", took)
		}
		if g.waiting.Load() != 0 || len(g.slots) != 0 {
			t.Errorf("%d wait and %d are inside, of nobody", g.waiting.Load(), len(g.slots))
		}
	})
}

// When those inside do not come on, the others are turned away in time and told when to come again; and
// one who leaves gives up his place.
func TestGateStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(maxBeginning)
		for range maxBeginning {
			if _, err := g.enter(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		gone := make(chan error, 1)
		go func() { _, err := g.enter(ctx); gone <- err }()
		synctest.Wait()
		cancel()
		if err := <-gone; !errors.Is(err, context.Canceled) {
			t.Errorf("who left got %v", err)
		}
		begun := time.Now()
		if _, err := g.enter(t.Context()); !errors.Is(err, errBusy) || time.Since(begun) != turnTimeout {
			t.Errorf("after %v: %v", time.Since(begun), err)
		}
		var turnedAway atomic.Int64
		var all sync.WaitGroup
		begun = time.Now()
		for range maxWaiting + 10 {
			all.Go(func() {
				if _, err := g.enter(t.Context()); errors.Is(err, errBusy) && time.Since(begun) == 0 {
					turnedAway.Add(1)
				}
			})
		}
		all.Wait()
		if turnedAway.Load() != 10 {
			t.Errorf("%d were turned away at once, want 10", turnedAway.Load())
		}
	})
	w := httptest.NewRecorder()
	writeBusy(w)
	if w.Code != http.StatusServiceUnavailable || w.Header().Get("Retry-After") != "10" {
		t.Errorf("%d, Retry-After %q", w.Code, w.Header().Get("Retry-After"))
	}
}

// A link holds its turn no longer than it takes to begin, however it ends.
func TestLinksLeaveTheGate(t *testing.T) {
	x := serve(t, Config{})
	_, token := x.create("demo")
	for range 2 * maxBeginning {
		x.connect(token)
	}
	// A plain request is refused after the turn was taken.
	for range 2 * maxBeginning {
		if status, body := x.call("GET", "/api/v2/workspaceagents/me/rpc", "", as(token)...); status != http.StatusBadRequest {
			t.Fatal(status, body)
		}
	}
	eventually(t, "every turn ends", func() bool { return len(x.gate.slots) == 0 })
}
