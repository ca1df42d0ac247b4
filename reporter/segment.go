package reporter

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/uuid"
)

// span is a run of a source's sequence numbers.
type span struct{ first, last uint64 }

// segment is one stretch of the spool: a file, or memory where the disk refuses. All its records
// were numbered under one spool id, which stands in the file's name, out of reach of damage inside.
type segment struct {
	number uint64
	spool  uuid.UUID
	path   string   // empty in memory
	file   *os.File // nil in memory
	data   []byte   // in memory: the records
	size   int64    // of the records that count; what follows in the file is a torn write
	synced int64
	spans  map[uuid.UUID]span // by source
	grave  bool               // holds only the gaps of lines that were dropped
}

const segmentSuffix = ".log"

func segmentName(number uint64, spool uuid.UUID) string {
	return fmt.Sprintf("%016x-%s%s", number, spool, segmentSuffix)
}

// parseSegmentName is the reverse of segmentName.
func parseSegmentName(name string) (number uint64, spool uuid.UUID, ok bool) {
	stem, ok := strings.CutSuffix(name, segmentSuffix)
	if !ok || len(stem) != 16+1+36 {
		return 0, uuid.Nil, false
	}
	if _, err := fmt.Sscanf(stem[:16], "%016x", &number); err != nil {
		return 0, uuid.Nil, false
	}
	spool, err := uuid.Parse(stem[17:])
	return number, spool, err == nil && segmentName(number, spool) == name
}

func createSegment(dir string, number uint64, spool uuid.UUID) (*segment, error) {
	path := filepath.Join(dir, segmentName(number, spool))
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	return &segment{number: number, spool: spool, path: path, file: file, spans: map[uuid.UUID]span{}}, nil
}

func memorySegment(number uint64, spool uuid.UUID) *segment {
	return &segment{number: number, spool: spool, spans: map[uuid.UUID]span{}}
}

// openSegment reads an old segment from offset on, and passes on how far streams are taken with it. It returns how many bytes of it are damaged.
func openSegment(dir, name string, offset int64, taken func(stream uuid.UUID, offset uint64)) (*segment, int, error) {
	number, spool, _ := parseSegmentName(name)
	path := filepath.Join(dir, name)
	file, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	seg := &segment{number: number, spool: spool, path: path, file: file, spans: map[uuid.UUID]span{}, grave: true}
	info, err := file.Stat()
	if err == nil {
		seg.size = min(info.Size(), maxSegmentFile)
		seg.synced = seg.size
	}
	var b []byte
	if err == nil {
		b, err = io.ReadAll(io.NewSectionReader(file, offset, max(seg.size-offset, 0)))
	}
	if err != nil {
		return nil, 0, errors.Join(err, file.Close())
	}
	_, bad := walk(b, true, func(r record) bool {
		seg.note(r.source, span{r.sequence, r.last()})
		taken(r.stream, r.offset)
		seg.grave = seg.grave && r.kind == kindGap
		return true
	})
	return seg, bad, nil
}

func (s *segment) inMemory() bool { return s.file == nil }

// append adds records; either all of b counts afterwards or nothing.
func (s *segment) append(b []byte) error {
	if s.inMemory() {
		s.data = append(s.data, b...)
		s.size += int64(len(b))
		return nil
	}
	if _, err := s.file.WriteAt(b, s.size); err != nil {
		// Best effort: what is left behind the size is overwritten or taken for a torn write.
		_ = s.file.Truncate(s.size)
		return err
	}
	s.size += int64(len(b))
	return nil
}

// probe tells whether the disk takes more than a file's name: a full one does that.
func (s *segment) probe() error {
	_, err := s.file.WriteAt(make([]byte, memorySegmentSize), 0)
	return errors.Join(err, s.file.Truncate(0))
}

// note widens the span of a source.
func (s *segment) note(source uuid.UUID, n span) {
	if have, ok := s.spans[source]; ok {
		n = span{min(have.first, n.first), max(have.last, n.last)}
	}
	s.spans[source] = n
}

// readAt fills buf from offset on, up to size, which the caller took under the spool's lock.
func (s *segment) readAt(buf []byte, data []byte, offset, size int64) (int, error) {
	buf = buf[:min(int64(len(buf)), size-offset)]
	if s.inMemory() {
		return copy(buf, data[offset:size]), nil
	}
	n, err := s.file.ReadAt(buf, offset)
	if n == len(buf) {
		err = nil
	}
	return n, err
}

// remove drops the segment and its file.
func (s *segment) remove() error {
	if s.inMemory() {
		s.data = nil
		return nil
	}
	return errors.Join(os.Remove(s.path), s.file.Close())
}
