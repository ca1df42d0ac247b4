package screen

// Scrollback is kept as the VT bytes that draw each line, not as cells: an ASCII line costs its length, a snapshot is a copy, and a viewer of
// another width lets its own terminal wrap the lines anew.

const blockSize = 32 << 10 // memory comes and goes in blocks of this size; an idle shell has one at most

type block struct {
	data []byte
	ends []lineEnd // where each line of data ends
	held int       // memory, as counted in scrollback.bytes
}

type lineEnd struct {
	end   uint32
	cols  uint16 // columns the line took
	flags lineFlags
}

type lineFlags uint8

const (
	lineWrapped lineFlags = 1 << iota // the line continues in the next one
	lineColored                       // some of it has a background
	lineTrimmed                       // the last column was left empty, since what came next was wide
	lineWide                          // begins with a wide character
)

func (e lineEnd) is(f lineFlags) bool { return e.flags&f != 0 }

// scrollback is a queue of encoded lines, bounded in lines and bytes.
type scrollback struct {
	blocks   []*block
	spare    *block // the last one dropped, to be filled again
	first    int    // lines of blocks[0] already dropped
	lines    int
	bytes    int // memory held by blocks
	maxLines int
	maxBytes int
	total    uint64 // lines ever pushed
}

// open returns the block whose data the next line is to be appended to, before close.
func (s *scrollback) open() *block {
	if n := len(s.blocks); n > 0 {
		if b := s.blocks[n-1]; len(b.data) < blockSize-1024 {
			return b
		}
	}
	b := s.spare
	s.spare = nil
	if b == nil {
		b = &block{}
		if len(s.blocks) > 0 { // the second block on: the terminal is one that scrolls a lot
			b.data = make([]byte, 0, blockSize)
		}
	}
	s.blocks = append(s.blocks, b)
	return b
}

// close ends the line that was appended to b.
func (s *scrollback) close(b *block, end lineEnd) {
	end.end = uint32(len(b.data))
	b.ends = append(b.ends, end)
	held := cap(b.data) + cap(b.ends)*8
	s.bytes += held - b.held
	b.held = held
	s.total++
	s.lines++
	for s.lines > s.maxLines || (s.bytes > s.maxBytes && len(s.blocks) > 1) {
		s.drop()
	}
}

// drop forgets the oldest line, or the oldest block if memory is what is short.
func (s *scrollback) drop() {
	b := s.blocks[0]
	if s.lines > s.maxLines {
		s.first++
		s.lines--
	} else {
		s.lines -= len(b.ends) - s.first
		s.first = len(b.ends)
	}
	if s.first >= len(b.ends) && len(s.blocks) > 1 {
		s.bytes -= b.held
		s.blocks[0] = nil
		s.blocks = s.blocks[1:]
		s.first = 0
		if cap(b.data) <= 2*blockSize { // else a very long line made it large
			s.spare = &block{data: b.data[:0], ends: b.ends[:0]}
		}
	}
}

func (s *scrollback) clear() {
	s.blocks, s.spare, s.first, s.lines, s.bytes = nil, nil, 0, 0, 0
}

// each calls f for the last n lines, oldest first.
func (s *scrollback) each(n int, f func(line []byte, end lineEnd)) {
	skip := max(0, s.lines-n) + s.first
	for _, b := range s.blocks {
		if skip >= len(b.ends) {
			skip -= len(b.ends)
			continue
		}
		start := uint32(0)
		if skip > 0 {
			start = b.ends[skip-1].end
		}
		for _, e := range b.ends[skip:] {
			f(b.data[start:e.end], e)
			start = e.end
		}
		skip = 0
	}
}

// pop removes the newest line and returns it. It stays valid until the next push.
func (s *scrollback) pop() (line []byte, end lineEnd, ok bool) {
	if s.lines == 0 {
		return nil, lineEnd{}, false
	}
	b := s.blocks[len(s.blocks)-1]
	last := len(b.ends) - 1
	start := uint32(0)
	if last > 0 {
		start = b.ends[last-1].end
	}
	line, end = b.data[start:], b.ends[last]
	b.data, b.ends = b.data[:start], b.ends[:last]
	s.lines--
	if last == 0 || (len(s.blocks) == 1 && last == s.first) {
		s.bytes -= b.held
		s.blocks = s.blocks[:len(s.blocks)-1]
		if len(s.blocks) == 0 {
			s.first = 0
		}
	}
	return line, end, true
}

// lastWrapped reports whether the newest line continues on the screen.
func (s *scrollback) lastWrapped() bool {
	if s.lines == 0 {
		return false
	}
	b := s.blocks[len(s.blocks)-1]
	return b.ends[len(b.ends)-1].is(lineWrapped)
}

// endLine notes that the newest line does not continue after all.
func (s *scrollback) endLine() {
	if s.lastWrapped() {
		b := s.blocks[len(s.blocks)-1]
		b.ends[len(b.ends)-1].flags &^= lineWrapped | lineTrimmed
	}
}
