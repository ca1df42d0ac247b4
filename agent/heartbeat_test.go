package agent

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/berthd/berth/reporter"
)

// TestHeartbeat shows the pace; that a berthd which does not run has no beat is for TestSystemd.
func TestHeartbeat(t *testing.T) {
	r, err := reporter.Open(reporter.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	synctest.Test(t, func(t *testing.T) {
		beats := 0
		a := &agent{parts: parts{reporter: r}, cfg: Config{Heartbeat: Heartbeat{Every: time.Second, Beat: func() { beats++ }}}}
		a.mesh = newLater[*mesh]()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- a.runHeartbeat(ctx) }()
		time.Sleep(10500 * time.Millisecond)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if beats != 11 {
			t.Errorf("%d beats in 10.5 s, want 11", beats)
		}
	})
}
