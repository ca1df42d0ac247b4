package reporter

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/berthd/berth/mask"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

// API is what delivery needs of the agent service. agentpb.DRPCAgentClient satisfies it.
type API interface {
	BatchCreateLogs(context.Context, *agentpb.BatchCreateLogsRequest) (*agentpb.BatchCreateLogsResponse, error)
	BatchUpdateAppHealths(context.Context, *agentpb.BatchUpdateAppHealthRequest) (*agentpb.BatchUpdateAppHealthResponse, error)
	BatchUpdateMetadata(context.Context, *agentpb.BatchUpdateMetadataRequest) (*agentpb.BatchUpdateMetadataResponse, error)
	PushResourcesMonitoringUsage(context.Context, *agentpb.PushResourcesMonitoringUsageRequest) (*agentpb.PushResourcesMonitoringUsageResponse, error)
	ReportConnection(context.Context, *agentpb.ReportConnectionRequest) (*emptypb.Empty, error)
	ScriptCompleted(context.Context, *agentpb.WorkspaceAgentScriptCompletedRequest) (*agentpb.WorkspaceAgentScriptCompletedResponse, error)
	UpdateAppStatus(context.Context, *agentpb.UpdateAppStatusRequest) (*agentpb.UpdateAppStatusResponse, error)
	UpdateLifecycle(context.Context, *agentpb.UpdateLifecycleRequest) (*agentpb.Lifecycle, error)
}

// DefaultLimit bounds the spool on disk: with lines of 100 bytes, some 400,000 of them.
const DefaultLimit = 64 << 20

const (
	// maxConnections is how many connection reports wait for a server; the protocol's figure.
	maxConnections = 2048
	// maxKept bounds the other kinds of report; a workspace has far fewer scripts, apps or keys.
	maxKept = 1024
	// cutOffStatus is the exit code of a session that was cut off, as SSH clients have it.
	cutOffStatus = 255
	// metadataPause is the least time between two metadata calls.
	metadataPause = time.Second
	// statusPace is the least time between two statuses of one app: a person reads no more of them, and a
	// program that reports in a loop would push all others out of the app's history.
	statusPace = time.Second
)

// Config says where a reporter keeps what it has not delivered.
type Config struct {
	// Dir holds the log spool and reports that wait, and nothing else; it is made if need be. Empty keeps
	// them in memory.
	Dir string
	// Limit bounds the logs in Dir, in bytes; zero means DefaultLimit, and less than 1 MiB counts as 1 MiB.
	Limit int64
	// PatchAppStatus delivers an app status to a server that has no RPC for it. Its error is a
	// [*wire.Error] if the server refused the status, and another if the server was not reached.
	// Without it such a server gets none.
	PatchAppStatus func(context.Context, *agentpb.UpdateAppStatusRequest) error
	// Mask hides secrets in log lines, app statuses and metadata; nil hides none.
	Mask *mask.Masker
	// Log gets what went wrong; nil discards it.
	Log *slog.Logger
}

// Reporter takes reports at any time and delivers them while there is a link. Its methods may be
// called at the same time.
type Reporter struct {
	log     *slog.Logger
	spool   *spool
	mask    *mask.Masker
	refusal sync.Once
	full    atomic.Bool // the server keeps no more logs of this workspace, ever

	lifecycle   *lane[*agentpb.Lifecycle]
	appStatus   *lane[*agentpb.UpdateAppStatusRequest]
	appHealth   *lane[*agentpb.BatchUpdateAppHealthRequest]
	metadata    *lane[*agentpb.Metadata]
	timings     *lane[*agentpb.Timing]
	connections *lane[*agentpb.Connection]
	present     *lane[*agentpb.Connection] // connections that have not ended; sent by nobody
	resources   *lane[*agentpb.PushResourcesMonitoringUsageRequest]

	progress broadcast
	flushing atomic.Int32    // how many wait in Flush
	unsynced chan struct{}   // holds a token when reports on disk want an fsync
	open     context.Context // ended by shut
	shut     context.CancelFunc
	syncing  sync.WaitGroup

	delivering sync.Mutex // held by the one Deliver that runs

	mu    sync.Mutex
	state agentpb.Lifecycle_State // the furthest yet
}

// Open opens the spool in cfg.Dir, or makes it. It fails with [ErrInUse] if another process has it
// open; a directory that cannot be used is logged and replaced by memory.
func Open(cfg Config) (*Reporter, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Limit == 0 {
		cfg.Limit = DefaultLimit
	}
	spool, err := openSpool(cfg.Dir, max(cfg.Limit, 1<<20), cfg.Log)
	if err != nil {
		return nil, err
	}
	r := &Reporter{log: cfg.Log, spool: spool, mask: cfg.Mask, state: agentpb.Lifecycle_CREATED, unsynced: make(chan struct{}, 1)}
	r.open, r.shut = context.WithCancel(context.Background())
	r.makeLanes(spool.dir, cfg)
	r.syncing.Go(func() { onSchedule(r.open.Done(), spool.dirty, spool.sync) })
	r.syncing.Go(func() { onSchedule(r.open.Done(), r.unsynced, r.syncReports) })
	return r, nil
}

// makeLanes makes the lanes. What cannot be observed again outlives the process in dir: the rest is as old as
// the process when it is gone, and comes anew with the next.
func (r *Reporter) makeLanes(dir string, cfg Config) {
	r.lifecycle = newLane(r, dir, kind[*agentpb.Lifecycle]{
		name: "lifecycle states", file: "lifecycle", bound: maxKept, must: true,
		call: func(ctx context.Context, on link, batch []*agentpb.Lifecycle) error {
			_, err := on.UpdateLifecycle(ctx, &agentpb.UpdateLifecycleRequest{Lifecycle: batch[0]})
			return err
		},
	})
	r.appStatus = newLane(r, dir, kind[*agentpb.UpdateAppStatusRequest]{
		name: "app statuses", file: "app-status", bound: maxKept, pace: statusPace,
		call: func(ctx context.Context, on link, batch []*agentpb.UpdateAppStatusRequest) error {
			status := r.masked(batch[0]) // again: a secret may have become known since
			err := errAbsent
			if on.version.AtLeast(8) {
				_, err = on.UpdateAppStatus(ctx, status)
			}
			if lacks(err) && cfg.PatchAppStatus != nil {
				err = overHTTP(cfg.PatchAppStatus(ctx, status))
			}
			return err
		},
	})
	r.appHealth = newLane(r, dir, kind[*agentpb.BatchUpdateAppHealthRequest]{
		name: "app health", bound: 1, must: true,
		call: func(ctx context.Context, on link, batch []*agentpb.BatchUpdateAppHealthRequest) error {
			_, err := on.BatchUpdateAppHealths(ctx, batch[0])
			return err
		},
	})
	r.metadata = newLane(r, dir, kind[*agentpb.Metadata]{
		name: "metadata", bound: maxKept, must: true, pause: metadataPause,
		// A call has room for so many bytes of keys, and for 3 MiB of values and errors in a message of 4.
		cost: func(m *agentpb.Metadata) int {
			return len(m.GetKey()) + (len(m.GetResult().GetValue())+len(m.GetResult().GetError()))/(3<<20/wire.MaxMetadataKeys)
		},
		room: wire.MaxMetadataKeys,
		call: func(ctx context.Context, on link, batch []*agentpb.Metadata) error {
			for _, m := range batch {
				m.Result.Value, m.Result.Error = r.mask.String(m.GetResult().GetValue()), r.mask.String(m.GetResult().GetError())
				m.Result.Age = int64(time.Since(m.Result.GetCollectedAt().AsTime()) / time.Second)
			}
			_, err := on.BatchUpdateMetadata(ctx, &agentpb.BatchUpdateMetadataRequest{Metadata: batch})
			return err
		},
	})
	r.timings = newLane(r, dir, kind[*agentpb.Timing]{
		name: "script timings", file: "timings", since: 3, bound: maxKept,
		call: func(ctx context.Context, on link, batch []*agentpb.Timing) error {
			_, err := on.ScriptCompleted(ctx, &agentpb.WorkspaceAgentScriptCompletedRequest{Timing: batch[0]})
			return err
		},
	})
	r.connections = newLane(r, dir, kind[*agentpb.Connection]{
		name: "connections", file: "connections", since: 4, bound: maxConnections,
		call: func(ctx context.Context, on link, batch []*agentpb.Connection) error {
			_, err := on.ReportConnection(ctx, &agentpb.ReportConnectionRequest{Connection: batch[0]})
			return err
		},
	})
	r.present = newLane(r, dir, kind[*agentpb.Connection]{name: "open connections", file: "present", bound: maxConnections})
	r.connections.follow(r.present, cutOff)
	r.resources = newLane(r, dir, kind[*agentpb.PushResourcesMonitoringUsageRequest]{
		name: "resource usage", since: 4, bound: 1,
		call: func(ctx context.Context, on link, batch []*agentpb.PushResourcesMonitoringUsageRequest) error {
			_, err := on.PushResourcesMonitoringUsage(ctx, batch[0])
			return err
		},
	})
}

// overHTTP marks an error of an HTTP call that is no answer of the server.
func overHTTP(err error) error {
	if _, answered := errors.AsType[*wire.Error](err); err == nil || answered {
		return err
	}
	return fmt.Errorf("%w: %w", errNoAnswer, err)
}

// Backlog returns how many bytes of log lines the server does not have yet.
func (r *Reporter) Backlog() int64 { return r.spool.backlog() }

// For says which agent it is that reports. Call it before Deliver: what another agent left in Dir is
// dropped.
func (r *Reporter) For(agent uuid.UUID) {
	r.spool.belongTo(agent)
	for _, l := range append(r.lanes(), r.present) {
		l.belongTo(agent)
	}
}

// Writer returns a stream of the log source, whose lines get level. Writing never waits for the
// server: see the package's documentation for what becomes of a line. A line that has no end yet is
// handed over by Close.
func (r *Reporter) Writer(source uuid.UUID, level agentpb.Log_Level) io.WriteCloser {
	return r.writer(source, level)
}

func (r *Reporter) writer(source uuid.UUID, level agentpb.Log_Level) *Stream {
	return &Stream{spool: r.spool, source: source, level: level, cutter: cutter{mask: r.mask}}
}

// Stream is [Reporter.Writer] for one that somebody else keeps until it is taken: it is found again by its id when this process
// was killed, and no byte of it is taken twice. kept is the first byte that is still there. Writing begins at the byte
// that [Stream.Settled] of the new stream tells.
func (r *Reporter) Stream(source uuid.UUID, level agentpb.Log_Level, id uuid.UUID, kept uint64) *Stream {
	w := r.writer(source, level)
	w.id = id
	taken, known := r.spool.follow(id)
	var missed uint64
	if known && kept > taken {
		missed = kept - taken
	}
	w.cutter.goOn(max(kept, taken), missed)
	return w
}

// Forget ends the account of a stream that nobody will ask for again.
func (r *Reporter) Forget(id uuid.UUID) { r.spool.forget(id) }

// Lifecycle reports that the workspace entered a state. States are delivered in order, each once;
// one that does not lie ahead of the last is ignored.
func (r *Reporter) Lifecycle(state agentpb.Lifecycle_State) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if state <= r.state {
		return
	}
	r.state = state
	if last, ok := r.lifecycle.newest(); ok && last.GetState() == state {
		return // left by a berthd before us
	}
	r.lifecycle.put("", &agentpb.Lifecycle{State: state, ChangedAt: timestamppb.Now()})
}

// AppStatus reports what an app is doing. Of each app only the newest is kept, and one a second is sent.
func (r *Reporter) AppStatus(status *agentpb.UpdateAppStatusRequest) {
	r.appStatus.put(status.GetSlug(), r.masked(status)) // it may wait on the disk
}

// masked hides the secrets in a status.
func (r *Reporter) masked(status *agentpb.UpdateAppStatusRequest) *agentpb.UpdateAppStatusRequest {
	status.Message, status.Uri = r.mask.String(status.GetMessage()), r.mask.String(status.GetUri())
	return status
}

// AppHealths reports the health of all apps that are watched. Only the newest report is kept.
func (r *Reporter) AppHealths(all []*agentpb.BatchUpdateAppHealthRequest_HealthUpdate) {
	r.appHealth.put(newest, &agentpb.BatchUpdateAppHealthRequest{Updates: all})
}

// Resources reports a window of what the workspace used, oldest first. Only the newest window is kept.
func (r *Reporter) Resources(window []*agentpb.PushResourcesMonitoringUsageRequest_Datapoint) {
	r.resources.put(newest, &agentpb.PushResourcesMonitoringUsageRequest{Datapoints: window})
}

// newest is the key of reports of which one replaces the one before.
const newest = "newest"

// Metadata reports a collected value, which must not be changed any more. Of each key only the newest
// is kept.
func (r *Reporter) Metadata(key string, result *agentpb.WorkspaceAgentMetadata_Result) {
	r.metadata.put(key, &agentpb.Metadata{Key: key, Result: result})
}

// ScriptCompleted reports one run of a script.
func (r *Reporter) ScriptCompleted(timing *agentpb.Timing) { r.timings.put("", timing) }

// Connection reports that a session was opened or has ended. The end of those that this process leaves open
// is reported by the next one.
func (r *Reporter) Connection(connection *agentpb.Connection) {
	r.connections.put("", connection)
	key := hex.EncodeToString(connection.GetId())
	if connection.GetAction() == agentpb.Connection_CONNECT {
		r.present.put(key, connection)
	} else {
		r.present.drop(key)
	}
}

// cutOff is the end of a connection that an earlier process had.
func cutOff(began *agentpb.Connection) *agentpb.Connection {
	reason := "berthd was killed"
	return &agentpb.Connection{
		Id: began.GetId(), Action: agentpb.Connection_DISCONNECT, Type: began.GetType(), Ip: began.GetIp(),
		Timestamp: timestamppb.Now(), StatusCode: cutOffStatus, Reason: &reason,
	}
}

// channel is one kind of report on its way.
type channel interface {
	fmt.Stringer
	deliver(context.Context, link)
	backlog() int64
}

func (r *Reporter) channels() []channel {
	all := []channel{logChannel{r}}
	for _, l := range r.lanes() {
		all = append(all, l)
	}
	return all
}

// reports is a lane of any kind.
type reports interface {
	channel
	belongTo(agent uuid.UUID)
	hasten()
	sync()
}

func (r *Reporter) lanes() []reports {
	return []reports{r.lifecycle, r.appStatus, r.appHealth, r.metadata, r.timings, r.connections, r.resources}
}

func (r *Reporter) syncReports() {
	for _, l := range append(r.lanes(), r.present) {
		l.sync()
	}
}

// logChannel is the spool as a channel.
type logChannel struct{ *Reporter }

func (logChannel) String() string                         { return "log bytes" }
func (l logChannel) backlog() int64                       { return l.spool.backlog() }
func (l logChannel) deliver(ctx context.Context, on link) { l.deliverLogs(ctx, on) }

// Deliver sends what waits and what comes over one link, whose server has the given version, until
// ctx ends or the reporter is closed. No answer of the server ends it: what must arrive is sent again,
// and other reports that the server refuses are dropped. What the link did not carry is kept for the
// next Deliver. The caller ends ctx when the link dies.
func (r *Reporter) Deliver(ctx context.Context, api API, version wire.Version) {
	r.delivering.Lock()
	defer r.delivering.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(r.open, cancel)()
	var all sync.WaitGroup
	for _, c := range r.channels() {
		all.Go(func() { c.deliver(ctx, link{api, version}) })
	}
	all.Wait()
}

// Flush waits until the server has everything that was reported before the call. It needs a
// Deliver that runs meanwhile. Its error tells what is left.
func (r *Reporter) Flush(ctx context.Context) error {
	r.flushing.Add(1)
	defer r.flushing.Add(-1)
	for _, l := range r.lanes() {
		l.hasten()
	}
	for {
		progress := r.progress.wait()
		var left []string
		for _, c := range r.channels() {
			if n := c.backlog(); n > 0 {
				left = append(left, fmt.Sprintf("%d %s", n, c))
			}
		}
		if len(left) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("cannot deliver %s: %w", strings.Join(left, ", "), ctx.Err())
		case <-progress:
		}
	}
}

// Close ends a running Deliver and fsyncs what is on disk. What was not delivered stays there for the
// next Open. Writers fail from then on.
func (r *Reporter) Close() error {
	r.shut()
	r.delivering.Lock()
	defer r.delivering.Unlock()
	r.syncing.Wait()
	r.syncReports()
	if err := r.spool.close(); err != nil {
		return fmt.Errorf("cannot close the log spool: %w", err)
	}
	return nil
}

// broadcast wakes everyone who waits. The zero value works.
type broadcast struct {
	mu sync.Mutex
	c  chan struct{}
}

// wait returns a channel that the next announce closes.
func (b *broadcast) wait() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.c == nil {
		b.c = make(chan struct{})
	}
	return b.c
}

func (b *broadcast) announce() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.c != nil {
		close(b.c)
		b.c = nil
	}
}
