package reporter

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/berthd/berth/wire/agentpb"
)

const (
	// SyncInterval is how long a line may wait for its fsync: what a machine may lose with its power.
	SyncInterval = time.Second
	// segmentSize is when a segment is full. Dropping and reclaiming go by segments.
	segmentSize = 4 << 20
	// memorySegmentSize is the same for memory; after each one the disk is tried again.
	memorySegmentSize = 256 << 10
	// memoryLimit bounds what is kept while the disk refuses.
	memoryLimit = 4 << 20
	// segmentsPerLimit is how many segments the limit is cut into at least.
	segmentsPerLimit = 16
	// maxSegmentFile bounds what is read of one file: a segment may overrun its size by one append.
	maxSegmentFile = segmentSize + 2*int64(maxAppend)
	// maxAppend bounds one append to a segment.
	maxAppend = maxPending + 2*maxRecord
)

// ErrInUse is returned by [Open] when another process has the spool open.
var ErrInUse = errors.New("another berthd uses it; stop that one, or give this one a state directory of its own")

// stream is a source's numbering under one spool id.
type stream struct{ spool, source uuid.UUID }

// spool keeps log lines until the server has them.
type spool struct {
	dir   string // empty: memory only
	limit int64  // bytes on disk
	log   *slog.Logger
	boot  string
	lock  *os.File
	wake  chan struct{} // holds a token when there may be something to read
	dirty chan struct{} // holds a token when there is something to fsync

	mu       sync.Mutex
	segments []*segment // oldest first: reading goes on in the first, writing in the last
	offset   int64      // acknowledged bytes of the first
	writable bool       // the last segment takes records
	number   uint64     // of the newest segment
	id       uuid.UUID  // under which new lines are numbered
	agent    uuid.UUID  // whose lines they are; nil if nobody has said
	next     map[uuid.UUID]uint64
	acked    map[stream]uint64
	streams  map[uuid.UUID]uint64 // how many bytes of each are taken
	refused  bool                 // the disk refused, and that was said
	unsaved  bool                 // the state could not be saved, and that was said
	closed   bool
}

// openSpool opens the spool in dir. It fails only if another process has it; a dir that cannot be
// used leaves a spool in memory.
func openSpool(dir string, limit int64, log *slog.Logger) (*spool, error) {
	s := &spool{
		dir: dir, limit: limit, log: log, boot: bootID(),
		wake: make(chan struct{}, 1), dirty: make(chan struct{}, 1),
		acked: map[stream]uint64{}, streams: map[uuid.UUID]uint64{},
	}
	s.renew()
	if dir == "" {
		return s, nil
	}
	if err := s.takeLock(); errors.Is(err, ErrInUse) {
		return nil, fmt.Errorf("cannot open the log spool in %s: %w", dir, err)
	} else if err != nil {
		s.dir = ""
		s.complain(err)
		return s, nil
	}
	s.recover()
	return s, nil
}

func (s *spool) takeLock() error {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	path := filepath.Join(s.dir, "lock")
	lock, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if errors.Is(err, syscall.EROFS) { // what lies on the disk is to be delivered all the same
		lock, err = os.Open(path)
	}
	if err != nil {
		return err
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		if errors.Is(err, syscall.EWOULDBLOCK) {
			err = ErrInUse
		}
		return errors.Join(err, lock.Close())
	}
	s.lock = lock
	return nil
}

// recover reads what an earlier process left. New lines go on under its spool id only if nothing
// can be missing; else a number might be used twice, and the server would take a new line for an old.
func (s *spool) recover() {
	st, err := readState(s.dir)
	clean := err == nil && st.Boot == s.boot && s.boot != ""
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.log.Warn("the log spool's state is damaged; lines that the server has already may be sent again", "dir", s.dir, "err", err)
	}
	s.agent = st.Agent
	for _, a := range st.Acknowledged {
		s.acked[stream{a.Spool, a.Source}] = a.Sequence
	}
	for _, t := range st.Taken[max(0, len(st.Taken)-maxTaken):] {
		s.taken(t.Stream, t.Offset)
	}
	entries, err := os.ReadDir(s.dir) // sorted by name, thus by number
	if err != nil {
		s.log.Warn("cannot list the log spool", "dir", s.dir, "err", err)
		clean = false
	}
	for _, entry := range entries {
		number, _, ok := parseSegmentName(entry.Name())
		if !ok {
			continue
		}
		s.number = max(s.number, number)
		if number < st.Segment {
			s.discard(entry.Name(), "what it holds was delivered")
			continue
		}
		var offset int64
		if number == st.Segment {
			offset = st.Offset
		}
		seg, bad, err := openSegment(s.dir, entry.Name(), offset, s.taken)
		if err != nil {
			clean = false
			s.log.Warn("cannot read a part of the log spool; the lines in it are lost", "file", entry.Name(), "err", err)
			s.discard(entry.Name(), "it cannot be read")
			continue
		}
		if bad > 0 {
			clean = false
			s.log.Warn("a part of the log spool was damaged; the lines there are lost", "file", entry.Name(), "bytes", bad)
		}
		if len(s.segments) == 0 {
			s.offset = min(offset, seg.size)
		}
		s.segments = append(s.segments, seg)
	}
	if clean {
		s.id = st.Spool
		for key, sequence := range s.acked {
			s.advance(key, sequence)
		}
		for _, seg := range s.segments {
			for source, span := range seg.spans {
				s.advance(stream{seg.spool, source}, span.last)
			}
		}
	}
	s.reclaim()
	if len(s.segments) > 0 {
		notify(s.wake)
	}
}

func (s *spool) discard(name, why string) {
	if err := os.Remove(filepath.Join(s.dir, name)); err != nil {
		s.log.Warn("cannot remove a part of the log spool", "file", name, "because", why, "err", err)
	}
}

// advance makes sure that numbers up to last are not used again.
func (s *spool) advance(key stream, last uint64) {
	if key.spool == s.id {
		s.next[key.source] = max(s.next[key.source], last)
	}
}

// renew begins a new numbering.
func (s *spool) renew() {
	s.id = uuid.New()
	s.next = map[uuid.UUID]uint64{}
}

// belongTo says whose lines they are from now on. Those of another agent are dropped: a state directory
// may outlive its workspace's build, or be copied with its machine, and no server should show the lines
// of one agent as another's.
func (s *spool) belongTo(agent uuid.UUID) {
	s.mu.Lock()
	if s.agent == agent || s.closed {
		s.mu.Unlock()
		return
	}
	if s.agent != uuid.Nil {
		var dropped int64
		for _, seg := range s.segments {
			dropped += seg.size
			if err := seg.remove(); err != nil {
				s.log.Warn("cannot remove a part of the log spool", "err", err)
			}
		}
		if dropped -= s.offset; dropped > 0 {
			s.log.Info("log lines of the agent that was here before are dropped", "agent", s.agent, "bytes", dropped)
		}
		s.segments, s.offset, s.writable = nil, 0, false
		s.acked = map[stream]uint64{}
		s.renew()
	}
	s.agent = agent
	s.mu.Unlock()
	s.save()
}

// append numbers lines and adds them. It never waits for room or for the server.
func (s *spool) append(source uuid.UUID, level agentpb.Log_Level, at time.Time, of uuid.UUID, lines *batches) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return os.ErrClosed
	}
	seal := func() span {
		first := s.next[source] + 1
		return span{first, lines.seal(record{level: level, source: source, sequence: first, time: at}, of)}
	}
	seg := s.tail()
	numbers := seal()
	if err := seg.append(lines.encoded); err != nil {
		s.complain(err)
		seg = s.roll(false)
		numbers = seal() // the numbering is another now
		if err := seg.append(lines.encoded); err != nil {
			return err
		}
	}
	s.next[source] = numbers.last
	s.taken(of, lines.offset())
	seg.note(source, numbers)
	s.shrink(seg.inMemory())
	notify(s.wake)
	notify(s.dirty)
	return nil
}

// taken notes how far a stream is taken.
func (s *spool) taken(of uuid.UUID, offset uint64) {
	if of != uuid.Nil {
		s.streams[of] = max(s.streams[of], offset)
	}
}

// follow begins to keep account of a stream, and returns how far it was taken before; false if that is not known.
func (s *spool) follow(of uuid.UUID) (offset uint64, known bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	offset, known = s.streams[of]
	s.taken(of, offset)
	return offset, known
}

// forget ends the account of a stream.
func (s *spool) forget(of uuid.UUID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.streams, of)
}

// tail returns the segment that takes records.
func (s *spool) tail() *segment {
	if s.writable {
		seg := s.segments[len(s.segments)-1]
		if seg.size < s.fullSize(seg.inMemory()) {
			return seg
		}
	}
	return s.roll(true)
}

func (s *spool) fullSize(inMemory bool) int64 {
	if inMemory {
		return memorySegmentSize
	}
	return min(segmentSize, s.limit/segmentsPerLimit)
}

// roll begins a new segment, on disk if it may and can. What is in memory dies with the process, so
// it is numbered by itself: the next process must not use its numbers again.
func (s *spool) roll(disk bool) *segment {
	s.number++
	wasMemory := s.writable && s.segments[len(s.segments)-1].inMemory()
	var seg *segment
	if disk && s.dir != "" {
		id := s.id
		if wasMemory {
			id = uuid.New()
		}
		var err error
		seg, err = createSegment(s.dir, s.number, id)
		if err == nil && wasMemory {
			if err = seg.probe(); err != nil {
				err = errors.Join(err, seg.remove())
			}
		}
		if err != nil {
			s.complain(err)
			seg = nil
		} else if wasMemory {
			s.id, s.next, s.refused = id, map[uuid.UUID]uint64{}, false
			s.log.Info("log lines are kept on disk again", "dir", s.dir)
		}
	}
	if seg == nil {
		if !wasMemory {
			s.renew()
		}
		seg = memorySegment(s.number, s.id)
	}
	s.segments = append(s.segments, seg)
	s.writable = true
	return seg
}

// complain says once that the disk refuses.
func (s *spool) complain(err error) {
	if s.refused {
		return
	}
	s.refused = true
	s.log.Warn("cannot keep log lines on disk; until this is mended they are kept in memory, the newest and oldest few megabytes, and are lost if berthd ends", "err", err)
}

// shrink drops segments from the middle until those on disk, or those in memory, are within bounds.
func (s *spool) shrink(inMemory bool) {
	limit := s.limit
	if inMemory {
		limit = memoryLimit
	}
	for {
		var total, before int64
		victim := -1
		for i, seg := range s.segments {
			if seg.inMemory() != inMemory {
				continue
			}
			// The first is being read, the last written; half of the room is for the oldest lines.
			if victim < 0 && i > 0 && i < len(s.segments)-1 && !seg.grave && before >= limit/2 {
				victim = i
			}
			before += seg.size
			total += seg.size
		}
		if total <= limit || victim < 0 {
			return
		}
		s.bury(victim)
	}
}

// bury replaces a segment by a grave: records that tell which lines were there. Graves in a row
// become one.
func (s *spool) bury(i int) {
	seg := s.segments[i]
	grave := memorySegment(seg.number, seg.spool)
	grave.grave = true
	grave.spans = maps.Clone(seg.spans)
	from := i
	if prev := s.segments[i-1]; i > 1 && prev.grave && prev.spool == seg.spool {
		from = i - 1
		for source, n := range prev.spans {
			grave.note(source, n)
		}
	}
	at := time.Now()
	for source, n := range grave.spans {
		r := record{kind: kindGap, level: agentpb.Log_WARN, source: source, sequence: n.first, count: n.last - n.first + 1, time: at}
		grave.data = r.appendTo(grave.data)
	}
	grave.size = int64(len(grave.data))
	for _, old := range s.segments[from : i+1] {
		if err := old.remove(); err != nil {
			s.log.Warn("cannot remove a part of the log spool", "err", err)
		}
	}
	if !seg.inMemory() {
		grave = s.toDisk(grave)
	}
	s.segments = slices.Replace(s.segments, from, i+1, grave)
}

// toDisk moves a grave to disk. If the disk is too full even for this, it stays in memory: without
// it the next process still sees that numbers are missing.
func (s *spool) toDisk(grave *segment) *segment {
	file, err := createSegment(s.dir, grave.number, grave.spool)
	if err != nil {
		return grave
	}
	if file.append(grave.data) != nil {
		if err := file.remove(); err != nil {
			s.log.Warn("cannot remove a part of the log spool", "err", err)
		}
		return grave
	}
	file.spans, file.grave = grave.spans, true
	return file
}

// chunk is a stretch of one segment.
type chunk struct {
	spool   uuid.UUID
	records []record
	end     int64 // offset behind it
	full    bool  // there was more
}

// read returns the first records that are not acknowledged, as many as fit in buf, which they
// refer to. Without any it returns false. Only one goroutine may read and acknowledge.
func (s *spool) read(buf []byte) (chunk, bool) {
	s.mu.Lock()
	s.reclaim()
	if len(s.segments) == 0 || s.offset >= s.segments[0].size {
		s.mu.Unlock()
		return chunk{}, false
	}
	seg, offset := s.segments[0], s.offset
	size, data := seg.size, seg.data
	more := len(s.segments) > 1
	s.mu.Unlock()

	n, err := seg.readAt(buf, data, offset, size)
	end := offset+int64(n) == size
	if err != nil {
		s.log.Warn("cannot read a part of the log spool; the lines in it are lost", "file", seg.path, "err", err)
		return chunk{spool: seg.spool, end: size, full: more}, true
	}
	c := chunk{spool: seg.spool, full: more || !end}
	cost := 0
	consumed, _ := walk(buf[:n], end, func(r record) bool {
		if r.kind != kindGap {
			cost += len(r.text) + lineCost*int(r.count)
		}
		if len(c.records) > 0 && cost > chunkSize {
			c.full = true
			return false
		}
		c.records = append(c.records, r)
		return true
	})
	c.end = offset + int64(consumed)
	return c, true
}

// expected returns the number that comes next in a stream; false if it cannot be known.
func (s *spool) expected(key stream) (uint64, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	last, ok := s.acked[key]
	return last + 1, ok || key.spool == s.id
}

// acknowledge notes that the server has c, and done of its streams, and frees the room.
func (s *spool) acknowledge(c chunk, done map[uuid.UUID]uint64) {
	s.mu.Lock()
	s.offset = c.end
	for source, last := range done {
		s.acked[stream{c.spool, source}] = last
	}
	s.mu.Unlock()
	s.save()
	s.mu.Lock()
	s.reclaim()
	s.mu.Unlock()
}

// reclaim drops segments that were delivered whole. The state that says so must have been saved.
func (s *spool) reclaim() {
	for len(s.segments) > 0 && s.offset >= s.segments[0].size && !(s.writable && len(s.segments) == 1) {
		if err := s.segments[0].remove(); err != nil {
			s.log.Warn("cannot remove a part of the log spool", "err", err)
		}
		s.segments = s.segments[1:]
		s.offset = 0
	}
}

// save writes the state. Without room for it there must be none: an old one would let numbers be
// used again after a restart.
func (s *spool) save() {
	if s.dir == "" {
		return
	}
	err := writeState(s.dir, s.state())
	if err != nil {
		if left := os.Remove(filepath.Join(s.dir, stateName)); !errors.Is(left, fs.ErrNotExist) {
			err = errors.Join(err, left)
		}
	}
	s.mu.Lock()
	said := s.unsaved
	s.unsaved = err != nil
	s.mu.Unlock()
	if err != nil && !said {
		s.log.Warn("cannot note which log lines the server has; after a restart some are sent once more, which it notices", "err", err)
	}
}

func (s *spool) state() state {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := state{Boot: s.boot, Agent: s.agent, Spool: s.id, Offset: s.offset, Segment: s.number + 1}
	live := map[uuid.UUID]bool{s.id: true}
	if len(s.segments) > 0 {
		st.Segment = s.segments[0].number
	}
	for _, seg := range s.segments {
		live[seg.spool] = true
	}
	for key, sequence := range s.acked {
		if !live[key.spool] {
			delete(s.acked, key)
			continue
		}
		st.Acknowledged = append(st.Acknowledged, acknowledged{key.spool, key.source, sequence})
	}
	for of, offset := range s.streams {
		st.Taken = append(st.Taken, taken{of, offset})
	}
	if len(s.segments) > 0 && s.segments[len(s.segments)-1].inMemory() {
		st.Boot = "" // the numbering in memory ends with the process
	}
	return st
}

// backlog returns how many bytes the server does not have yet.
func (s *spool) backlog() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	total := -s.offset
	for _, seg := range s.segments {
		total += seg.size
	}
	return max(total, 0)
}

// onSchedule calls sync within SyncInterval of each token in dirty, until stop is closed.
func onSchedule(stop, dirty <-chan struct{}, sync func()) {
	for {
		select {
		case <-stop:
			return
		case <-dirty:
		}
		select {
		case <-stop:
			return
		case <-time.After(SyncInterval):
		}
		sync()
	}
}

// sync makes what was appended so far survive a loss of power. Writers go on meanwhile.
func (s *spool) sync() {
	type target struct {
		seg  *segment
		size int64
	}
	var targets []target
	s.mu.Lock()
	for _, seg := range s.segments {
		if !seg.inMemory() && seg.synced < seg.size {
			targets = append(targets, target{seg, seg.size})
		}
	}
	s.mu.Unlock()
	if len(targets) == 0 {
		return
	}
	for _, t := range targets {
		if err := t.seg.file.Sync(); err != nil {
			if !errors.Is(err, os.ErrClosed) { // delivered and removed meanwhile
				s.log.Warn("cannot fsync the log spool", "file", t.seg.path, "err", err)
			}
			continue
		}
		s.mu.Lock()
		t.seg.synced = t.size
		s.mu.Unlock()
	}
	if err := syncDir(s.dir); err != nil {
		s.log.Warn("cannot fsync the log spool's directory", "err", err)
	}
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// close writes everything down. A second close is an [os.ErrClosed].
func (s *spool) close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return os.ErrClosed
	}
	s.closed = true
	s.mu.Unlock()
	s.sync()
	s.save()
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, seg := range s.segments {
		if !seg.inMemory() {
			errs = append(errs, seg.file.Close())
		}
	}
	s.segments, s.writable = nil, false
	if s.lock != nil {
		errs = append(errs, s.lock.Close())
	}
	return errors.Join(errs...)
}

// notify leaves a token for whoever waits on c.
func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
