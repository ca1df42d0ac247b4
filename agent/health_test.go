package agent

import (
	"context"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/berthd/berth/wire/agentpb"
)

const (
	disabled     = agentpb.AppHealth_DISABLED
	initializing = agentpb.AppHealth_INITIALIZING
	healthy      = agentpb.AppHealth_HEALTHY
	unhealthy    = agentpb.AppHealth_UNHEALTHY
)

func app(url string, interval time.Duration, threshold int32, health agentpb.AppHealth) *agentpb.WorkspaceApp {
	id := uuid.New()
	return &agentpb.WorkspaceApp{
		Id: id[:], Health: agentpb.WorkspaceApp_Health(health),
		Healthcheck: &agentpb.WorkspaceApp_Healthcheck{Url: url, Interval: durationpb.New(interval), Threshold: threshold},
	}
}

// TestAppHealth asks two real web servers. All apps that have a health are told whenever one changes,
// and those alone.
func TestAppHealth(t *testing.T) {
	var status atomic.Int64
	status.Store(http.StatusNotFound) // below 500: the server itself is well
	var redirected atomic.Bool
	target := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { redirected.Store(true) }))
	defer target.Close()
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet {
			t.Errorf("asked with %s", r.Method)
		}
		w.WriteHeader(int(status.Load()))
	}))
	defer web.Close()
	moved := httptest.NewServer(http.RedirectHandler(target.URL, http.StatusFound))
	defer moved.Close()

	var mu sync.Mutex
	var told [][]agentpb.AppHealth
	last := func() []agentpb.AppHealth {
		mu.Lock()
		defer mu.Unlock()
		if len(told) == 0 {
			return nil
		}
		return told[len(told)-1]
	}
	h := healthChecker{
		apps: []*agentpb.WorkspaceApp{
			app(web.URL, time.Second, 1, initializing),
			app(moved.URL, time.Second, 1, initializing),
			app(web.URL, time.Second, 1, disabled),
			app("", time.Second, 1, initializing),
			app(web.URL, 0, 1, initializing), // never asked
		},
		report: func(all []*agentpb.BatchUpdateAppHealthRequest_HealthUpdate) {
			mu.Lock()
			defer mu.Unlock()
			var now []agentpb.AppHealth
			for _, u := range all {
				now = append(now, u.GetHealth())
			}
			told = append(told, now)
		},
		log: slog.New(slog.DiscardHandler),
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- h.run(ctx) }()
	for _, step := range []struct {
		status int64
		want   []agentpb.AppHealth
	}{
		{http.StatusNotFound, []agentpb.AppHealth{healthy, healthy, initializing}},
		{http.StatusInternalServerError, []agentpb.AppHealth{unhealthy, healthy, initializing}},
		{http.StatusOK, []agentpb.AppHealth{healthy, healthy, initializing}},
	} {
		status.Store(step.status)
		eventually(t, "the health told", func() bool { return cmp.Equal(last(), step.want) })
	}
	cancel()
	<-done
	if redirected.Load() {
		t.Error("a redirect was followed")
	}
}

func TestAppHealthThreshold(t *testing.T) {
	const no, yes = false, true
	tests := map[string]struct {
		threshold int32
		answers   []bool
		want      agentpb.AppHealth
	}{
		"nothing heard":             {3, nil, initializing},
		"as many as the threshold":  {3, []bool{no, no, no}, initializing},
		"more":                      {3, []bool{no, no, no, no}, unhealthy},
		"not in a row":              {1, []bool{no, yes, no}, healthy},
		"one success":               {1, []bool{no, no, no, yes}, healthy},
		"stays healthy for a while": {2, []bool{yes, no, no}, healthy},
	}
	for name, tt := range tests {
		w := &watchedApp{threshold: tt.threshold, health: initializing}
		for _, answer := range tt.answers {
			w.take(answer)
		}
		if w.health != tt.want {
			t.Errorf("%s: %v, want %v", name, w.health, tt.want)
		}
	}
}

func TestWatchedApps(t *testing.T) {
	type row struct {
		interval time.Duration
		health   agentpb.AppHealth
	}
	noID := app("u", time.Second, 1, initializing)
	noID.Id = nil
	tests := map[string]struct {
		app  *agentpb.WorkspaceApp
		want []row
	}{
		"nil":             {nil, nil},
		"empty":           {&agentpb.WorkspaceApp{}, nil},
		"disabled":        {app("u", time.Second, 1, disabled), nil},
		"no id":           {noID, nil},
		"no threshold":    {app("u", time.Second, 0, initializing), []row{{0, initializing}}},
		"negative":        {app("u", -time.Second, -1, initializing), []row{{0, initializing}}},
		"absurdly often":  {app("u", time.Nanosecond, 1, healthy), []row{{time.Second, healthy}}},
		"unspecified":     {app("u", time.Minute, 1, 0), []row{{time.Minute, initializing}}},
		"unknown":         {app("u", time.Minute, 1, 77), []row{{time.Minute, initializing}}},
		"absurdly seldom": {app("u", 1<<62, 1, unhealthy), []row{{1 << 62, unhealthy}}},
	}
	for name, tt := range tests {
		var got []row
		for _, w := range (healthChecker{apps: []*agentpb.WorkspaceApp{tt.app}, log: slog.New(slog.DiscardHandler)}).watched() {
			got = append(got, row{w.interval, w.health})
		}
		if diff := cmp.Diff(tt.want, got, cmp.AllowUnexported(row{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}
