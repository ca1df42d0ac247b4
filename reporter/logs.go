package reporter

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/berthd/berth/wire/agentpb"
	"github.com/berthd/berth/wire/rpc"
)

const (
	// chunkSize is how much of the spool is sent at once: little enough for a slow link within [callTimeout],
	// and enough that what a message costs by itself is little. The protocol's limit is 1 MiB.
	chunkSize = 512 << 10
	// lineCost is what the protocol counts for a line beside its text.
	lineCost = 21
	// batchPause lets lines gather while a source is busy; a line after a quiet time goes at once.
	batchPause = 50 * time.Millisecond
)

// run is one batch: entries of one source with numbers that follow each other.
type run struct {
	source uuid.UUID
	first  uint64
	logs   []*agentpb.Log
}

func (r run) next() uint64 { return r.first + uint64(len(r.logs)) }

// plan turns a chunk into batches in the order of their beginnings, and tells the last number of each
// source in it. Where numbers are missing, one entry under the first of them says how many.
func (c chunk) plan(expected func(stream) (uint64, bool)) (runs []run, done map[uuid.UUID]uint64) {
	done = map[uuid.UUID]uint64{}
	latest := map[uuid.UUID]int{} // index of a source's last run
	emit := func(source uuid.UUID, sequence uint64, entry *agentpb.Log) {
		i, ok := latest[source]
		if !ok || runs[i].next() != sequence {
			i = len(runs)
			latest[source] = i
			runs = append(runs, run{source: source, first: sequence})
		}
		runs[i].logs = append(runs[i].logs, entry)
	}
	var count uint64
	for _, r := range c.records {
		if r.kind != kindGap {
			count += r.count
		}
	}
	all := make([]agentpb.Log, 0, count) // one allocation for all of them
	var at *timestamppb.Timestamp        // lines that were written at once share theirs
	for i, r := range c.records {
		want := r.sequence
		if last, ok := done[r.source]; ok {
			want = last + 1
		} else if next, ok := expected(stream{c.spool, r.source}); ok {
			want = next
		}
		missing, cause := r.sequence-1, "the spool was damaged"
		if r.kind == kindGap {
			missing, cause = r.last(), "the server was away for longer than there was room to keep them"
		}
		if i == 0 || !r.time.Equal(c.records[i-1].time) {
			at = timestamppb.New(r.time)
		}
		if missing >= want {
			emit(r.source, want, &agentpb.Log{
				CreatedAt: at, Level: agentpb.Log_WARN,
				Output: fmt.Sprintf("[berth: %d lines are missing here: %s]", missing-want+1, cause),
			})
		}
		for sequence, text := range lineTexts(r, string(r.text)) {
			if sequence < want {
				continue
			}
			all = all[:len(all)+1]
			line := &all[len(all)-1]
			line.CreatedAt, line.Level, line.Output = at, r.level, text
			emit(r.source, sequence, line)
		}
		done[r.source] = max(want-1, r.last())
	}
	return runs, done
}

// deliverLogs sends the spool until ctx ends. A batch that the server fails to store is sent again, so
// that no line is lost and their order holds.
func (r *Reporter) deliverLogs(ctx context.Context, on link) {
	buf := make([]byte, chunkSize)
	refused := r.full.Load()
	var retry retry
	for ctx.Err() == nil {
		c, ok := r.spool.read(buf)
		if !ok {
			select {
			case <-ctx.Done():
			case <-r.spool.wake:
			}
			continue
		}
		runs, done := c.plan(r.spool.expected)
		for len(runs) > 0 && !refused {
			var err error
			refused, err = r.sendLogs(ctx, on, c.spool, runs[0])
			switch {
			case ctx.Err() != nil:
				return
			case err == nil:
				runs, retry = runs[1:], 0
			default:
				if !retry.wait(ctx) {
					return
				}
				level := slog.LevelDebug
				if retry.first() {
					level = slog.LevelWarn
				}
				r.log.Log(ctx, level, "the server did not take log lines; sending them again", "err", err)
			}
		}
		r.spool.acknowledge(c, done)
		r.progress.announce()
		if !c.full && !sleep(ctx, batchPause) {
			return
		}
	}
}

// sendLogs sends one batch. It tells whether the server takes no more on this link, or ever: that of
// [Reporter.full].
func (r *Reporter) sendLogs(ctx context.Context, on link, spool uuid.UUID, batch run) (refused bool, err error) {
	var response *agentpb.BatchCreateLogsResponse
	err = bounded(ctx, func(ctx context.Context) (err error) {
		response, err = on.BatchCreateLogs(ctx, &agentpb.BatchCreateLogsRequest{
			LogSourceId:        batch.source[:],
			Logs:               batch.logs,
			BerthSpoolId:       spool[:],
			BerthFirstSequence: batch.first,
		})
		return err
	})
	switch {
	case rpc.Unimplemented(err):
		r.noteRefusal("the server does not take logs; those of this workspace stay in its own log files")
		return true, nil
	case err != nil:
		return false, err
	case response.GetLogLimitExceeded():
		r.full.Store(true)
		r.noteRefusal("the server keeps no more logs of this workspace; the rest stays in the workspace's own log files")
		return true, nil
	}
	return false, nil
}

// noteRefusal says once that logs go nowhere: it is the server's choice and no failure.
func (r *Reporter) noteRefusal(text string) {
	r.refusal.Do(func() { r.log.Warn(text) })
}
