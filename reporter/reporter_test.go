package reporter

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"storj.io/drpc/drpcerr"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

// deliver runs one Deliver over one link until stop is called, which returns its error.
func deliver(t *testing.T, r *Reporter, s *server, version wire.Version) (stop func() error) {
	t.Helper()
	client, err := dial(s.addr)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- r.Deliver(ctx, agentpb.NewDRPCAgentClient(client), version)
	}()
	return sync.OnceValue(func() error {
		cancel()
		defer client.Close()
		return <-ended
	})
}

func TestLifecycleGoesForwardsOnce(t *testing.T) {
	s := newServer(t)
	r := open(t, Config{})
	for _, state := range []agentpb.Lifecycle_State{
		agentpb.Lifecycle_CREATED, agentpb.Lifecycle_STARTING, agentpb.Lifecycle_STARTING,
		agentpb.Lifecycle_READY, agentpb.Lifecycle_START_ERROR, agentpb.Lifecycle_SHUTTING_DOWN,
	} {
		r.Lifecycle(state)
	}
	stop := deliver(t, r, s, wire.CurrentVersion)
	flush(t, r)
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	r.Lifecycle(agentpb.Lifecycle_OFF)
	stop = deliver(t, r, s, wire.CurrentVersion)
	flush(t, r)
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	want := []agentpb.Lifecycle_State{
		agentpb.Lifecycle_STARTING, agentpb.Lifecycle_READY, agentpb.Lifecycle_SHUTTING_DOWN, agentpb.Lifecycle_OFF,
	}
	if diff := cmp.Diff(want, s.lifecycle); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestFatalErrorEndsTheLinkAndKeepsTheReport(t *testing.T) {
	s := newServer(t)
	s.lifecycleErr = errors.New("database is away")
	r := open(t, Config{})
	r.Lifecycle(agentpb.Lifecycle_READY)
	client, err := dial(s.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	err = r.Deliver(t.Context(), agentpb.NewDRPCAgentClient(client), wire.CurrentVersion)
	if err == nil || !strings.Contains(err.Error(), "cannot report lifecycle states: database is away") {
		t.Errorf("got %v", err)
	}
	if err := s.locked(func() error { s.lifecycleErr = nil; return nil }); err != nil {
		t.Fatal(err)
	}
	link1(t, r, s, wire.CurrentVersion)
	flush(t, r)
	if diff := cmp.Diff([]agentpb.Lifecycle_State{agentpb.Lifecycle_READY}, s.lifecycle); diff != "" {
		t.Error(diff)
	}
}

func TestNewestWins(t *testing.T) {
	s := newServer(t)
	r := open(t, Config{})
	app := uuid.New()
	for i := range 5 {
		r.AppStatus(&agentpb.UpdateAppStatusRequest{Slug: "a", Message: fmt.Sprint(i)})
		r.AppStatus(&agentpb.UpdateAppStatusRequest{Slug: "b", Message: fmt.Sprint(i)})
		r.Metadata("cpu", &agentpb.WorkspaceAgentMetadata_Result{Value: fmt.Sprint(i)})
		r.AppHealth(app, agentpb.AppHealth_UNHEALTHY)
	}
	r.AppHealth(app, agentpb.AppHealth_HEALTHY)
	link1(t, r, s, wire.CurrentVersion)
	flush(t, r)
	if diff := cmp.Diff([]string{"a:4", "b:4"}, s.statuses); diff != "" {
		t.Error(diff)
	}
	if len(s.metadata) != 1 || s.metadata[0].GetResult().GetValue() != "4" {
		t.Errorf("metadata: %v", s.metadata)
	}
	if diff := cmp.Diff([]agentpb.AppHealth{agentpb.AppHealth_HEALTHY}, s.health); diff != "" {
		t.Error(diff)
	}
}

func TestMetadataBatchesFitTheServer(t *testing.T) {
	s := newServer(t)
	r := open(t, Config{})
	key := strings.Repeat("k", wire.MaxMetadataKeys/2-1)
	for i := range 3 {
		r.Metadata(fmt.Sprint(i, key), &agentpb.WorkspaceAgentMetadata_Result{})
	}
	if got := len(r.metadata.peek()); got != 2 {
		t.Errorf("%d keys in one batch, want 2", got)
	}
	link1(t, r, s, wire.CurrentVersion)
	flush(t, r)
	if len(s.metadata) != 3 {
		t.Errorf("%d of 3 keys arrived", len(s.metadata))
	}
}

func TestOlderServersGetWhatTheyKnow(t *testing.T) {
	status := &agentpb.UpdateAppStatusRequest{Slug: "a", Message: "m"}
	for _, c := range []struct {
		minor                       int
		statuses, patched           int
		timings, connections, lines int
	}{
		{minor: 2, patched: 1, lines: 1},
		{minor: 3, patched: 1, timings: 1, lines: 1},
		{minor: 7, patched: 1, timings: 1, connections: 1, lines: 1},
		{minor: 8, statuses: 1, timings: 1, connections: 1, lines: 1},
	} {
		t.Run(fmt.Sprint(c.minor), func(t *testing.T) {
			s := newServer(t)
			patched := 0
			r := open(t, Config{PatchAppStatus: func(_ context.Context, got *agentpb.UpdateAppStatusRequest) error {
				if got != status {
					t.Errorf("patched with %v", got)
				}
				patched++
				return nil
			}})
			r.AppStatus(status)
			r.ScriptCompleted(&agentpb.Timing{})
			r.Connection(&agentpb.Connection{})
			write(t, r, sourceA, "line")
			stop := deliver(t, r, s, wire.Version{Major: 2, Minor: c.minor})
			flush(t, r)
			if err := stop(); err != nil {
				t.Fatal(err)
			}
			got := []int{len(s.statuses), patched, s.timings, s.connections, len(s.lines[sourceA])}
			if diff := cmp.Diff([]int{c.statuses, c.patched, c.timings, c.connections, c.lines}, got); diff != "" {
				t.Errorf("statuses, patched, timings, connections, lines (-want +got):\n%s", diff)
			}
		})
	}
}

func TestUnimplementedIsRemembered(t *testing.T) {
	s := newServer(t)
	calls := 0
	unimplemented := drpcerr.WithCode(errors.New("Unimplemented"), wire.CodeUnimplemented)
	s.statusErr = unimplemented
	s.connectionErr = unimplemented
	s.beforeLogs = func() error { calls++; return unimplemented }
	r := open(t, Config{})
	stop := deliver(t, r, s, wire.CurrentVersion)
	for range 3 {
		r.Connection(&agentpb.Connection{})
		r.AppStatus(&agentpb.UpdateAppStatusRequest{Slug: "a"})
		write(t, r, sourceA, "line")
		flush(t, r)
	}
	if err := stop(); err != nil {
		t.Errorf("the link ended: %v", err)
	}
	if s.connections != 1 || calls != 1 {
		t.Errorf("%d connection calls and %d log calls, want one each", s.connections, calls)
	}
}

func TestRefusedReportIsDroppedAndTheLinkLivesOn(t *testing.T) {
	var log bytes.Buffer
	s := newServer(t)
	s.connectionErr = errors.New("no such type")
	r := open(t, Config{Log: slog.New(slog.NewTextHandler(&log, nil))})
	stop := deliver(t, r, s, wire.CurrentVersion)
	r.Connection(&agentpb.Connection{})
	flush(t, r)
	write(t, r, sourceA, "line")
	flush(t, r)
	if err := stop(); err != nil {
		t.Errorf("the link ended: %v", err)
	}
	if s.connections != 1 || !strings.Contains(log.String(), "no such type") {
		t.Errorf("%d calls; log:\n%s", s.connections, log.String())
	}
	wantLines(t, s, sourceA, []string{"line"})
}

func TestFullServerIsASuccessWithOneNote(t *testing.T) {
	var log bytes.Buffer
	s := newServer(t)
	s.limit = 1
	r := open(t, Config{Dir: t.TempDir(), Log: slog.New(slog.NewTextHandler(&log, nil))})
	for range 2 { // on the next link it is asked once more
		stop := deliver(t, r, s, wire.CurrentVersion)
		for i := range 5 {
			write(t, r, sourceA, fmt.Sprint(i))
			flush(t, r)
		}
		if err := stop(); err != nil {
			t.Fatal(err)
		}
	}
	if s.batches != 3 {
		t.Errorf("%d batches, want one stored and one refused on each link", s.batches)
	}
	if n := strings.Count(log.String(), "keeps no more logs"); n != 1 {
		t.Errorf("%d notes, want one:\n%s", n, log.String())
	}
}

func TestFlushTellsWhatIsLeft(t *testing.T) {
	r := open(t, Config{})
	r.Lifecycle(agentpb.Lifecycle_READY)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := r.Flush(ctx)
	if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "1 lifecycle states") {
		t.Errorf("got %v", err)
	}
}

func TestCloseEndsDeliver(t *testing.T) {
	s := newServer(t)
	r, err := Open(Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	client, err := dial(s.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ended := make(chan error)
	go func() { ended <- r.Deliver(t.Context(), agentpb.NewDRPCAgentClient(client), wire.CurrentVersion) }()
	write(t, r, sourceA, "line")
	s.await(func() bool { return len(s.lines[sourceA]) == 1 })
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if err := r.Deliver(t.Context(), nil, wire.CurrentVersion); err != nil {
		t.Errorf("deliver after close: %v", err)
	}
}

func TestTooManyReportsDropTheOldest(t *testing.T) {
	r := open(t, Config{})
	for i := range maxConnections + 7 {
		r.Connection(&agentpb.Connection{StatusCode: int32(i)})
	}
	if got := r.connections.backlog(); got != maxConnections {
		t.Errorf("%d are kept, want %d", got, maxConnections)
	}
	if first := r.connections.peek()[0].value.GetStatusCode(); first != 7 {
		t.Errorf("the oldest kept is number %d, want 7", first)
	}
}
