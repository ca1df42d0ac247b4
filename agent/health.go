package agent

import (
	"context"
	"log/slog"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/berthd/berth/wire/agentpb"
)

const (
	// healthTick is how often changes are told. No app is asked more often either.
	healthTick = time.Second
	// maxHealthHeader bounds what an app may say to the question; its body is not read.
	maxHealthHeader = 64 << 10
	// unhealthyStatus is the lowest by which a web server says that something is wrong with itself.
	unhealthyStatus = http.StatusInternalServerError
)

// healthChecker asks the apps of a manifest whether they are well.
type healthChecker struct {
	apps   []*agentpb.WorkspaceApp
	report func([]*agentpb.BatchUpdateAppHealthRequest_HealthUpdate)
	log    *slog.Logger
}

// watchedApp is one app whose health the server wants to know.
type watchedApp struct {
	id        uuid.UUID
	url       string
	interval  time.Duration // 0: not asked
	threshold int32

	mu       sync.Mutex
	failures int32 // in a row
	health   agentpb.AppHealth
}

// run asks until ctx is done.
func (h healthChecker) run(ctx context.Context) error {
	watched := h.watched()
	if len(watched) == 0 {
		return ended(ctx)
	}
	transport := &http.Transport{Proxy: http.ProxyFromEnvironment, DisableKeepAlives: true, MaxResponseHeaderBytes: maxHealthHeader}
	var asking sync.WaitGroup
	defer asking.Wait()
	for _, app := range watched {
		if app.interval > 0 {
			asking.Go(func() { app.follow(ctx, transport, h.log) })
		}
	}
	tick := time.NewTicker(healthTick)
	defer tick.Stop()
	told := healths(watched) // what the server told us
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		if now := healths(watched); !slices.EqualFunc(now, told, sameHealth) {
			h.report(now)
			told = now
		}
	}
}

// watched lists the apps to tell about: those for which the server takes a health at all.
func (h healthChecker) watched() []*watchedApp {
	var list []*watchedApp
	for _, app := range h.apps {
		check := app.GetHealthcheck()
		if check.GetUrl() == "" || app.GetHealth() == agentpb.WorkspaceApp_DISABLED {
			continue
		}
		id, err := uuid.FromBytes(app.GetId())
		if err != nil {
			h.log.Warn("an app's health is not checked: its id is no UUID", "app", app.GetSlug())
			continue
		}
		w := &watchedApp{id: id, url: check.GetUrl(), threshold: check.GetThreshold(), health: agentpb.AppHealth(app.GetHealth())}
		if _, known := agentpb.AppHealth_name[int32(w.health)]; !known || w.health == agentpb.AppHealth_APP_HEALTH_UNSPECIFIED {
			w.health = agentpb.AppHealth_INITIALIZING
		}
		if interval := check.GetInterval().AsDuration(); interval > 0 && w.threshold > 0 {
			w.interval = max(interval, healthTick)
		}
		list = append(list, w)
	}
	return list
}

func healths(apps []*watchedApp) []*agentpb.BatchUpdateAppHealthRequest_HealthUpdate {
	list := make([]*agentpb.BatchUpdateAppHealthRequest_HealthUpdate, len(apps))
	for i, app := range apps {
		app.mu.Lock()
		list[i] = &agentpb.BatchUpdateAppHealthRequest_HealthUpdate{Id: app.id[:], Health: app.health}
		app.mu.Unlock()
	}
	return list
}

func sameHealth(a, b *agentpb.BatchUpdateAppHealthRequest_HealthUpdate) bool {
	return a.GetHealth() == b.GetHealth()
}

// follow asks now and then every interval.
func (w *watchedApp) follow(ctx context.Context, transport http.RoundTripper, log *slog.Logger) {
	client := &http.Client{
		Transport: transport,
		// What an app redirects to may be another's trouble.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Timeout:       w.interval - time.Millisecond,
	}
	tick := time.NewTicker(w.interval)
	defer tick.Stop()
	for {
		w.take(w.ask(ctx, client, log))
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// ask tells whether the app answers.
func (w *watchedApp) ask(ctx context.Context, client *http.Client, log *slog.Logger) bool {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, w.url, nil)
	if err == nil {
		var resp *http.Response
		if resp, err = client.Do(req); err == nil {
			resp.Body.Close()
			return resp.StatusCode < unhealthyStatus
		}
	}
	log.Debug("an app does not answer its health check", "id", w.id, "error", err)
	return false
}

// take counts an answer: the first good one makes healthy, more bad ones in a row than the threshold
// make unhealthy.
func (w *watchedApp) take(well bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if well {
		w.failures, w.health = 0, agentpb.AppHealth_HEALTHY
	} else if w.failures++; w.failures > w.threshold {
		w.health = agentpb.AppHealth_UNHEALTHY
	}
}
