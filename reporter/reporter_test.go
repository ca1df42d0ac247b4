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
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"storj.io/drpc/drpcerr"

	"github.com/berthd/berth/mask"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

// deliver runs one Deliver over one link until stop is called. It fails the test if Deliver ends before.
func deliver(t *testing.T, r *Reporter, s *server, version wire.Version) (stop func()) {
	t.Helper()
	client, err := dial(s.addr)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		r.Deliver(ctx, agentpb.NewDRPCAgentClient(client), version)
	}()
	return sync.OnceFunc(func() {
		select {
		case <-ended:
			t.Error("an answer of the server ended the delivery")
		default:
		}
		cancel()
		<-ended
		client.Close()
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
	stop()
	r.Lifecycle(agentpb.Lifecycle_OFF)
	stop = deliver(t, r, s, wire.CurrentVersion)
	flush(t, r)
	stop()
	want := []agentpb.Lifecycle_State{
		agentpb.Lifecycle_STARTING, agentpb.Lifecycle_READY, agentpb.Lifecycle_SHUTTING_DOWN, agentpb.Lifecycle_OFF,
	}
	if diff := cmp.Diff(want, s.lifecycle); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestWhatMustArriveIsSentAgain: no answer of the server ends the link, or costs what must arrive.
func TestWhatMustArriveIsSentAgain(t *testing.T) {
	var log bytes.Buffer
	s := newServer(t)
	away := errors.New("database is away")
	s.lifecycleErr, s.metadataErr = away, away
	logsRefused := 0
	s.beforeLogs = func() error {
		if s.lifecycleErr != nil {
			logsRefused++
		}
		return s.lifecycleErr
	}
	r := open(t, Config{Log: slog.New(slog.NewTextHandler(&log, nil))})
	r.Lifecycle(agentpb.Lifecycle_STARTING)
	r.Lifecycle(agentpb.Lifecycle_READY)
	r.Metadata("k", &agentpb.WorkspaceAgentMetadata_Result{Value: "old"})
	write(t, r, sourceA, "one", "two")
	stop := deliver(t, r, s, wire.CurrentVersion)
	s.await(func() bool { return s.lifecycleRefused > 1 && s.metadataRefused > 1 && logsRefused > 1 })
	r.Metadata("k", &agentpb.WorkspaceAgentMetadata_Result{Value: "new"})
	if err := s.locked(func() error { s.lifecycleErr, s.metadataErr = nil, nil; return nil }); err != nil {
		t.Fatal(err)
	}
	flush(t, r)
	stop()
	if diff := cmp.Diff([]agentpb.Lifecycle_State{agentpb.Lifecycle_STARTING, agentpb.Lifecycle_READY}, s.lifecycle); diff != "" {
		t.Error(diff)
	}
	if len(s.metadata) != 1 || s.metadata[0].GetResult().GetValue() != "new" {
		t.Errorf("metadata %v, want the newest alone", s.metadata)
	}
	wantLines(t, s, sourceA, []string{"one", "two"})
	if n := strings.Count(log.String(), "database is away"); n != 3 {
		t.Errorf("%d warnings, want one of each kind of report:\n%s", n, log.String())
	}
}

func TestNewestWins(t *testing.T) {
	s := newServer(t)
	r := open(t, Config{})
	health := func(states ...agentpb.AppHealth) (all []*agentpb.BatchUpdateAppHealthRequest_HealthUpdate) {
		for _, h := range states {
			all = append(all, &agentpb.BatchUpdateAppHealthRequest_HealthUpdate{Health: h})
		}
		return all
	}
	for i := range 5 {
		r.AppStatus(&agentpb.UpdateAppStatusRequest{Slug: "a", Message: fmt.Sprint(i)})
		r.AppStatus(&agentpb.UpdateAppStatusRequest{Slug: "b", Message: fmt.Sprint(i)})
		r.Metadata("cpu", &agentpb.WorkspaceAgentMetadata_Result{Value: fmt.Sprint(i)})
		r.AppHealths(health(agentpb.AppHealth_UNHEALTHY, agentpb.AppHealth_INITIALIZING))
		r.Resources(make([]*agentpb.PushResourcesMonitoringUsageRequest_Datapoint, i))
	}
	r.AppHealths(health(agentpb.AppHealth_HEALTHY, agentpb.AppHealth_INITIALIZING))
	link1(t, r, s, wire.CurrentVersion)
	flush(t, r)
	if diff := cmp.Diff([]string{"a:4", "b:4"}, s.statuses); diff != "" {
		t.Error(diff)
	}
	if len(s.metadata) != 1 || s.metadata[0].GetResult().GetValue() != "4" {
		t.Errorf("metadata: %v", s.metadata)
	}
	if diff := cmp.Diff([][]agentpb.AppHealth{{agentpb.AppHealth_HEALTHY, agentpb.AppHealth_INITIALIZING}}, s.health); diff != "" {
		t.Error(diff)
	}
	if len(s.windows) != 1 || len(s.windows[0]) != 4 {
		t.Errorf("windows %v, want the newest alone", s.windows)
	}
}

func TestMetadataBatchesFitTheServer(t *testing.T) {
	key := strings.Repeat("k", wire.MaxMetadataKeys/2-4)
	for name, tt := range map[string]struct {
		key         string
		keys, value int // how many, and how long
	}{
		"long keys":   {key, 3, 0},
		"long values": {"k", 1000, 10240},
	} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t)
			r := open(t, Config{})
			value := strings.Repeat("v", tt.value)
			for i := range tt.keys {
				r.Metadata(fmt.Sprint(i, tt.key), &agentpb.WorkspaceAgentMetadata_Result{Value: value})
			}
			var keys int
			var batch []*agentpb.Metadata
			first, _ := r.metadata.peek()
			for _, m := range first {
				keys += len(m.value.GetKey())
				batch = append(batch, m.value)
			}
			size := proto.Size(&agentpb.BatchUpdateMetadataRequest{Metadata: batch})
			if keys > wire.MaxMetadataKeys || size > wire.MaxMessage || len(batch) < 2 {
				t.Errorf("a batch of %d keys of %d bytes, %d bytes in all", len(batch), keys, size)
			}
			link1(t, r, s, wire.CurrentVersion)
			flush(t, r)
			if len(s.metadata) != tt.keys {
				t.Errorf("%d of %d keys arrived", len(s.metadata), tt.keys)
			}
		})
	}
}

func TestOlderServersGetWhatTheyKnow(t *testing.T) {
	status := &agentpb.UpdateAppStatusRequest{Slug: "a", Message: "m"}
	for _, c := range []struct {
		minor                       int
		statuses, patched           int
		timings, connections, lines int
		windows                     int
	}{
		{minor: 0, patched: 1, lines: 1},
		{minor: 2, patched: 1, lines: 1},
		{minor: 3, patched: 1, timings: 1, lines: 1},
		{minor: 4, patched: 1, timings: 1, connections: 1, lines: 1, windows: 1},
		{minor: 7, patched: 1, timings: 1, connections: 1, lines: 1, windows: 1},
		{minor: 8, statuses: 1, timings: 1, connections: 1, lines: 1, windows: 1},
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
			r.Resources(make([]*agentpb.PushResourcesMonitoringUsageRequest_Datapoint, 1))
			write(t, r, sourceA, "line")
			stop := deliver(t, r, s, wire.Version{Major: 2, Minor: c.minor})
			flush(t, r)
			stop()
			got := []int{len(s.statuses), patched, s.timings, s.connections, len(s.lines[sourceA]), len(s.windows)}
			if diff := cmp.Diff([]int{c.statuses, c.patched, c.timings, c.connections, c.lines, c.windows}, got); diff != "" {
				t.Errorf("statuses, patched, timings, connections, lines, windows (-want +got):\n%s", diff)
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
	stop()
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
	stop()
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
	for range 2 { // on the next link it is not asked again
		stop := deliver(t, r, s, wire.CurrentVersion)
		for i := range 5 {
			write(t, r, sourceA, fmt.Sprint(i))
			flush(t, r)
		}
		stop()
	}
	if s.batches != 2 {
		t.Errorf("%d batches, want one stored and one refused", s.batches)
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
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		r.Deliver(t.Context(), agentpb.NewDRPCAgentClient(client), wire.CurrentVersion)
	}()
	write(t, r, sourceA, "line")
	s.await(func() bool { return len(s.lines[sourceA]) == 1 })
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	<-ended
	r.Deliver(t.Context(), nil, wire.CurrentVersion) // returns, and does not touch the link
}

func TestTooManyReportsDropTheOldest(t *testing.T) {
	r := open(t, Config{})
	for i := range maxConnections + 7 {
		r.Connection(&agentpb.Connection{StatusCode: int32(i)})
	}
	if got := r.connections.backlog(); got != maxConnections {
		t.Errorf("%d are kept, want %d", got, maxConnections)
	}
	if kept, _ := r.connections.peek(); kept[0].value.GetStatusCode() != 7 {
		t.Errorf("the oldest kept is number %d, want 7", kept[0].value.GetStatusCode())
	}
}

// TestAppStatusGoesByHTTPWhereThereIsNoRPC: whatever version such a server says it has.
func TestAppStatusGoesByHTTPWhereThereIsNoRPC(t *testing.T) {
	s := newServer(t)
	s.statusErr = drpcerr.WithCode(errors.New("Unimplemented"), wire.CodeUnimplemented)
	answers := []error{errors.New("connection refused"), nil, &wire.Error{StatusCode: 400, Message: "Failed to get workspace app."}, nil}
	var patched []string
	r := open(t, Config{PatchAppStatus: func(_ context.Context, got *agentpb.UpdateAppStatusRequest) error {
		patched = append(patched, got.GetSlug())
		answer := answers[0]
		answers = answers[1:]
		return answer
	}})
	stop := deliver(t, r, s, wire.CurrentVersion)
	for _, slug := range []string{"a", "unknown", "b"} {
		r.AppStatus(&agentpb.UpdateAppStatusRequest{Slug: slug})
		flush(t, r)
	}
	stop()
	if diff := cmp.Diff([]string{"a", "a", "unknown", "b"}, patched); diff != "" {
		t.Errorf("patched (-want +got):\n%s", diff)
	}
}

// TestSecretsAreHidden: also those that become known after the report.
func TestSecretsAreHidden(t *testing.T) {
	s := newServer(t)
	m := mask.New("known-before")
	dir := t.TempDir()
	r := open(t, Config{Dir: dir, Mask: m})
	r.AppStatus(&agentpb.UpdateAppStatusRequest{Slug: "a", Message: "with s3cret-value", Uri: "https://x/known-before"})
	kept := newShelf(dir, "app-status", "", slog.New(slog.DiscardHandler), nil).read().Reports
	if len(kept) != 1 || bytes.Contains(kept[0].Body, []byte("known-before")) || !bytes.Contains(kept[0].Body, []byte("https://x/[hidden]")) {
		t.Errorf("on the disk is %q", kept)
	}
	r.Metadata("k", &agentpb.WorkspaceAgentMetadata_Result{Value: "s3cret-value", Error: "no s3cret-value"})
	m.Add("s3cret-value")
	write(t, r, sourceA, "password: s3cret-value")
	link1(t, r, s, wire.CurrentVersion)
	flush(t, r)
	wantLines(t, s, sourceA, []string{"password: [hidden]"})
	if diff := cmp.Diff([]string{"a:with [hidden]"}, s.statuses); diff != "" {
		t.Error(diff)
	}
	if got := s.metadata[0].GetResult(); got.GetValue() != "[hidden]" || got.GetError() != "no [hidden]" {
		t.Errorf("metadata %v", got)
	}
}

func TestMetadataTellsItsAge(t *testing.T) {
	s := newServer(t)
	r := open(t, Config{})
	r.Metadata("k", &agentpb.WorkspaceAgentMetadata_Result{CollectedAt: timestamppb.New(time.Now().Add(-90 * time.Second))})
	link1(t, r, s, wire.CurrentVersion)
	flush(t, r)
	if age := s.metadata[0].GetResult().GetAge(); age < 90 || age > 120 {
		t.Errorf("age %d s, want about 90", age)
	}
}
