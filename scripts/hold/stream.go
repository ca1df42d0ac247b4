package hold

import (
	"fmt"
	"os"
	"syscall"
)

const (
	// window is how much of a stream is kept.
	window = 256 << 10
	// minRead is what there must be room for before more is read.
	minRead = 64 << 10
)

// stream is one that the command prints on. Its holder's lock guards all but the pipe.
type stream struct {
	read  *os.File
	inode uint64

	buf        []byte // made when something comes; what is kept is buf[start:end]
	start, end int
	base       uint64 // offset of buf[start] in the stream
	ended      bool   // nobody has it open any more, or nobody reads it

	sent uint64 // offset up to which the one that is attached has it
	told bool   // that it has ended
}

// openStream makes a stream and returns the end that the command gets.
func openStream() (*stream, *os.File, error) {
	read, write, err := os.Pipe()
	if err != nil {
		return nil, nil, fmt.Errorf("cannot make a pipe for the output: %w", err)
	}
	widen(read)
	s := &stream{read: read}
	if info, err := read.Stat(); err == nil {
		if stat, ok := info.Sys().(*syscall.Stat_t); ok {
			s.inode = stat.Ino
		}
	}
	return s, write, nil
}

// room returns where the next bytes may be read to, nothing while too much is kept. Only who reads calls it: what is kept may move.
func (s *stream) room() []byte {
	kept := s.end - s.start
	switch {
	case s.buf == nil:
		s.buf = make([]byte, window)
	case kept > window-minRead:
		return nil
	case kept == 0 || s.end > window-minRead:
		copy(s.buf, s.buf[s.start:s.end])
		s.start, s.end = 0, kept
	}
	return s.buf[s.end:]
}

// taken drops what is before an offset.
func (s *stream) taken(offset uint64) {
	if offset > s.base {
		n := min(offset-s.base, uint64(s.end-s.start))
		s.start += int(n)
		s.base += n
	}
}

// top is the offset behind what is kept.
func (s *stream) top() uint64 { return s.base + uint64(s.end-s.start) }

// unsent returns what the one that is attached does not have yet, as much as fits a frame.
func (s *stream) unsent() []byte {
	from := s.start + int(max(s.sent, s.base)-s.base)
	return s.buf[from:min(s.end, from+maxData)]
}
