package store

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strconv"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

// The log of an agent is a chain of messages on
//
//	berth.log.<agent>.<spool>.<source>
//
// each a BatchCreateLogsRequest of up to maxChunkLines lines with these headers:
//
//	Berth-Bytes   bytes of output in this and all earlier messages of the agent
//	Berth-Last    sequence of its last line within (spool, source)
//	Berth-Open    set when its last line goes on in the next message
//
// The last message of an agent thus knows the length of its log, and the last one of a subject which
// lines of a spool are stored; both survive whatever happens to the server. A message is published
// only if the agent's last one is still the one that was read, so two servers cannot store the same
// lines, nor count wrongly.
const (
	logSubjects = "berth.log.>"
	headerBytes = "Berth-Bytes"
	headerLast  = "Berth-Last"
	headerOpen  = "Berth-Open"

	// stockSpool stands for agents that do not number their lines; nothing is dropped for them.
	stockSpool = "stock"

	// A line's id is its message's sequence with its index in the low lineBits, so ids grow within an
	// agent, stay below 2^53 (JavaScript) for 2^45 messages, and lead straight to the message.
	lineBits      = 8
	maxChunkLines = 1 << lineBits
	// maxChunkBytes keeps a message below the 1 MiB that NATS takes by default, and small enough to
	// be read in one go.
	maxChunkBytes = 256 << 10

	// wakeSubject tells readers that follow a log that it has grown; the payload is the sequence.
	wakeSubject = "berth.wake.log."
)

// LogBatch is lines of one source.
type LogBatch struct {
	Source uuid.UUID
	// Spool and First number the lines: Lines[0] is number First (from 1) of Source in Spool. A nil
	// Spool means that they are not numbered.
	Spool uuid.UUID
	First uint64
	Lines []LogLine
}

// LogLine is one line. Output must be valid UTF-8.
type LogLine struct {
	Output string
	Level  agentpb.Log_Level
}

// AppendLogs stores those lines of a batch that are not stored yet and stamps them with the present
// time. It returns [ErrLogLimit], and stores nothing, when they would cross [LogLimits.Total].
func (s *Store) AppendLogs(ctx context.Context, agent uuid.UUID, b LogBatch) error {
	spool := stockSpool
	if b.Spool != uuid.Nil {
		spool = b.Spool.String()
	}
	subject := logSubject(agent) + "." + spool + "." + b.Source.String()
	lock := &s.appending[agent[15]%byte(len(s.appending))]
	lock.Lock()
	defer lock.Unlock()
	for range maxConflicts {
		err := s.appendLogs(ctx, agent, subject, b)
		if !conflict(err) {
			return err
		}
	}
	return errors.New("cannot store logs: other writers came first")
}

func (s *Store) appendLogs(ctx context.Context, agent uuid.UUID, subject string, b LogBatch) error {
	if err := s.writable(); err != nil {
		return err
	}
	tail, err := s.logTail(ctx, logSubject(agent)+".>")
	if err != nil {
		return err
	}
	lines, next := b.Lines, b.First
	if b.Spool != uuid.Nil {
		stored, err := s.logTail(ctx, subject)
		if err != nil {
			return err
		}
		if stored.last >= next {
			lines = lines[min(uint64(len(lines)), stored.last-next+1):]
			next = stored.last + 1
		}
	}
	if limit := s.opts.Logs.Total; limit > 0 {
		total := tail.bytes
		for _, l := range lines {
			total += int64(len(l.Output))
		}
		if total > limit {
			return ErrLogLimit
		}
	}
	now := timestamppb.Now()
	for chunk := range chunks(lines) {
		for _, l := range chunk.logs {
			l.CreatedAt = now
			tail.bytes += int64(len(l.GetOutput()))
		}
		next += uint64(chunk.whole)
		data, err := proto.Marshal(&agentpb.BatchCreateLogsRequest{LogSourceId: b.Source[:], Logs: chunk.logs})
		if err != nil {
			return fmt.Errorf("cannot encode logs: %w", err)
		}
		msg := &nats.Msg{Subject: subject, Data: data, Header: nats.Header{
			headerBytes: {strconv.FormatInt(tail.bytes, 10)},
		}}
		if b.Spool != uuid.Nil {
			msg.Header.Set(headerLast, strconv.FormatUint(next-1, 10))
		}
		if chunk.open {
			msg.Header.Set(headerOpen, "1")
		}
		ack, err := s.js.PublishMsg(ctx, msg, jetstream.WithExpectLastSequenceForSubject(tail.seq, logSubject(agent)+".>"))
		if err != nil {
			if conflict(err) {
				return err
			}
			return s.explain("store logs", err)
		}
		tail.seq = ack.Sequence
	}
	if tail.seq == 0 {
		return nil
	}
	// The line is stored; that a reader hears of it a little later is no reason to fail.
	_ = s.nc.Publish(wakeSubject+agent.String(), strconv.AppendUint(nil, tail.seq, 10))
	return s.trimLogs(ctx, agent, tail)
}

// logChunk is what one message carries.
type logChunk struct {
	logs []*agentpb.Log
	// whole is how many lines end in it; open says that its last one does not.
	whole int
	open  bool
}

// chunks cuts lines into messages. A line longer than a message is cut into several, each of which ends
// with its part of the line.
func chunks(lines []LogLine) iter.Seq[logChunk] {
	return func(yield func(logChunk) bool) {
		var c logChunk
		size := 0
		flush := func() bool {
			full := c
			c, size = logChunk{}, 0
			return len(full.logs) == 0 || yield(full)
		}
		for _, l := range lines {
			rest := l.Output
			for {
				piece := CutText(rest, maxChunkBytes)
				rest = rest[len(piece):]
				if len(c.logs) == maxChunkLines || size+len(piece) > maxChunkBytes {
					if !flush() {
						return
					}
				}
				c.logs = append(c.logs, &agentpb.Log{Output: piece, Level: l.Level})
				size += len(piece)
				if rest == "" {
					break
				}
				c.open = true
				if !flush() {
					return
				}
			}
			c.whole++
		}
		flush()
	}
}

// CutText returns the longest beginning of text that is at most limit bytes and ends between
// characters. Text of another encoding is cut at limit.
func CutText(text string, limit int) string {
	if len(text) <= limit {
		return text
	}
	for i := limit; i > limit-utf8.UTFMax; i-- {
		if utf8.RuneStart(text[i]) {
			return text[:i]
		}
	}
	return text[:limit]
}

// logEnd is what a log message says of everything up to it.
type logEnd struct {
	seq   uint64
	bytes int64
	last  uint64
}

// logTail reads the last message on a subject; the zero value if there is none.
func (s *Store) logTail(ctx context.Context, subject string) (logEnd, error) {
	msg, err := s.logs.GetLastMsgForSubject(ctx, subject)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return logEnd{}, nil
	}
	if err != nil {
		return logEnd{}, s.explain("read logs", err)
	}
	return decodeLogEnd(msg)
}

func decodeLogEnd(msg *jetstream.RawStreamMsg) (end logEnd, err error) {
	end.seq = msg.Sequence
	if end.bytes, err = strconv.ParseInt(msg.Header.Get(headerBytes), 10, 64); err != nil {
		return logEnd{}, fmt.Errorf("cannot decode log message %d: %w", msg.Sequence, err)
	}
	if last := msg.Header.Get(headerLast); last != "" {
		if end.last, err = strconv.ParseUint(last, 10, 64); err != nil {
			return logEnd{}, fmt.Errorf("cannot decode log message %d: %w", msg.Sequence, err)
		}
	}
	return end, nil
}

// trimLogs drops an agent's oldest messages when more than [LogLimits.Keep] bytes are kept. It looks
// only at each eighth of that, because looking costs as much as storing.
func (s *Store) trimLogs(ctx context.Context, agent uuid.UUID, tail logEnd) error {
	keep := s.opts.Logs.Keep
	filter := jetstream.WithGetMsgSubject(logSubject(agent) + ".>")
	if tail.bytes <= keep {
		return nil
	}
	first, err := s.logs.GetMsg(ctx, 1, filter)
	if err != nil {
		return s.explain("read logs", err)
	}
	end, err := decodeLogEnd(first)
	if err != nil {
		return err
	}
	if tail.bytes-end.bytes < keep+keep/8 {
		return nil
	}
	// The sum grows along the chain, so the first message to keep is found by halving.
	low, high := end.seq, tail.seq
	for low < high {
		msg, err := s.logs.GetMsg(ctx, low+(high-low)/2, filter)
		if err != nil {
			return s.explain("read logs", err)
		}
		if end, err = decodeLogEnd(msg); err != nil {
			return err
		}
		switch {
		case tail.bytes-end.bytes > keep:
			low = end.seq + 1
		case high == end.seq:
			high = low + (high-low)/2
		default:
			high = end.seq
		}
	}
	err = s.logs.Purge(ctx, jetstream.WithPurgeSubject(logSubject(agent)+".>"), jetstream.WithPurgeSequence(low))
	return s.explain("trim logs", err)
}

// LogsLength returns how many bytes an agent has logged since its oldest line that is kept was its
// first, and more: what was trimmed is counted too.
func (s *Store) LogsLength(ctx context.Context, agent uuid.UUID) (int64, error) {
	tail, err := s.logTail(ctx, logSubject(agent)+".>")
	return tail.bytes, err
}

// Logs yields an agent's lines with ids above after, up to the end as it is now, about a stored message
// at a time. A line that was cut into several messages comes whole, under the id of its last part.
func (s *Store) Logs(ctx context.Context, agent uuid.UUID, after int64) iter.Seq2[[]wire.LogEntry, error] {
	return func(yield func([]wire.LogEntry, error) bool) {
		tail, err := s.logTail(ctx, logSubject(agent)+".>")
		if err != nil {
			yield(nil, err)
			return
		}
		var begun []wire.LogEntry // the beginning of a line, if there is one
		for after < endOf(tail.seq) {
			part, err := s.nextLogs(ctx, agent, after)
			if errors.Is(err, ErrNotFound) || err == nil && part.seq > tail.seq {
				break
			}
			if err != nil {
				yield(nil, err)
				return
			}
			entries := join(begun, part.entries)
			begun = nil
			if part.open && len(entries) > 0 {
				last := len(entries) - 1
				entries, begun = entries[:last], entries[last:]
			}
			if len(entries) > 0 && !yield(entries, nil) {
				return
			}
			if part.seq == tail.seq {
				break
			}
			after = endOf(part.seq)
		}
		if len(begun) > 0 {
			yield(begun, nil)
		}
	}
}

// join puts the beginning of a line before what goes on with it.
func join(begun, entries []wire.LogEntry) []wire.LogEntry {
	switch {
	case len(begun) == 0:
		return entries
	case len(entries) == 0 || entries[0].SourceID != begun[0].SourceID: // it never went on
		return append(begun, entries...)
	}
	entries[0].Output = begun[0].Output + entries[0].Output
	return entries
}

// recheck is how often a follower looks for lines that nobody announced.
const recheck = time.Minute

// FollowLogs yields an agent's lines with ids above after and goes on with new ones until ctx is
// done. It yields an empty slice first when there are none yet. Unlike with [Store.Logs], the parts of a
// long line come one by one, as they are stored.
func (s *Store) FollowLogs(ctx context.Context, agent uuid.UUID, after int64) iter.Seq2[[]wire.LogEntry, error] {
	return func(yield func([]wire.LogEntry, error) bool) {
		// A full channel loses announcements, which is why the last one counts and not each.
		wake := make(chan *nats.Msg, 64)
		sub, err := s.nc.ChanSubscribe(wakeSubject+agent.String(), wake)
		if err != nil {
			yield(nil, s.explain("follow logs", err))
			return
		}
		defer sub.Unsubscribe()
		started := false
		var announced uint64
		for {
			part, err := s.nextLogs(ctx, agent, after)
			switch {
			case err == nil:
				if len(part.entries) > 0 {
					started = true
					if !yield(part.entries, nil) {
						return
					}
				}
				after = endOf(part.seq)
				continue
			case ctx.Err() != nil:
				return
			case !errors.Is(err, ErrNotFound):
				yield(nil, err)
				return
			}
			if !started {
				started = true
				if !yield([]wire.LogEntry{}, nil) {
					return
				}
			}
			wait := recheck
			if announced > uint64(after)>>lineBits {
				wait = 20 * time.Millisecond // another replica has it already
			}
			timer := time.NewTimer(wait)
			select {
			case <-ctx.Done():
				timer.Stop()
				return
			case msg := <-wake:
				if seq, err := strconv.ParseUint(string(msg.Data), 10, 64); err == nil {
					announced = max(announced, seq)
				}
			case <-timer.C:
				if wait != recheck {
					announced = 0 // a message that stays away was trimmed
				}
			}
			timer.Stop()
		}
	}
}

// endOf is the highest id that a message's lines can have.
func endOf(seq uint64) int64 { return int64(seq<<lineBits | (maxChunkLines - 1)) }

// logPart is what a stored message holds. open says that its last line goes on in the next one.
type logPart struct {
	entries []wire.LogEntry
	seq     uint64
	open    bool
}

// nextLogs reads the next message with lines above after.
func (s *Store) nextLogs(ctx context.Context, agent uuid.UUID, after int64) (logPart, error) {
	from := uint64(after) >> lineBits
	if uint64(after)&(maxChunkLines-1) == maxChunkLines-1 {
		from++
	}
	msg, err := s.logs.GetMsg(ctx, max(from, 1), jetstream.WithGetMsgSubject(logSubject(agent)+".>"))
	if err != nil {
		return logPart{}, s.explain("read logs", err)
	}
	var batch agentpb.BatchCreateLogsRequest
	if err := proto.Unmarshal(msg.Data, &batch); err != nil {
		return logPart{}, fmt.Errorf("cannot decode log message %d: %w", msg.Sequence, err)
	}
	source, err := uuid.FromBytes(batch.GetLogSourceId())
	if err != nil {
		return logPart{}, fmt.Errorf("cannot decode log message %d: %w", msg.Sequence, err)
	}
	entries := make([]wire.LogEntry, 0, len(batch.GetLogs()))
	for i, l := range batch.GetLogs() {
		id := int64(msg.Sequence<<lineBits | uint64(i))
		if id > after {
			entries = append(entries, wire.LogEntry{
				ID: id, CreatedAt: l.GetCreatedAt().AsTime(), Output: l.GetOutput(), Level: levelName(l.GetLevel()), SourceID: source,
			})
		}
	}
	return logPart{entries, msg.Sequence, msg.Header.Get(headerOpen) != ""}, nil
}

func levelName(l agentpb.Log_Level) string {
	switch l {
	case agentpb.Log_TRACE:
		return "trace"
	case agentpb.Log_DEBUG:
		return "debug"
	case agentpb.Log_WARN:
		return "warn"
	case agentpb.Log_ERROR:
		return "error"
	}
	return "info"
}

func logSubject(agent uuid.UUID) string { return "berth.log." + agent.String() }

func (s *Store) deleteLogs(ctx context.Context, agent uuid.UUID) error {
	return s.explain("delete logs", s.logs.Purge(ctx, jetstream.WithPurgeSubject(logSubject(agent)+".>")))
}
