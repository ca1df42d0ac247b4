package ptyhost

import (
	"cmp"
	"maps"
	"slices"
	"sort"
)

const (
	// maxMarks bounds what is remembered of one attachment: more pieces than are under way to a viewer whose connection breaks.
	maxMarks = 512
	// maxLeft is how many attachments that ended a session remembers.
	maxLeft = 16
	// maxView bounds the name of an attachment in bytes; a UUID has 36.
	maxView = 64
)

// progress is what one attachment was sent, piece by piece. A viewer that comes back after its connection broke says how much arrived, and
// is given the lines that scrolled since rather than all.
type progress struct {
	sent  uint64 // bytes
	marks []mark // ascending
	order uint64 // in which attachments left
}

// mark says that with the first sent bytes a viewer was shown all that scrolled until then.
type mark struct{ sent, lines uint64 }

// note records a piece, after which lines lines had scrolled.
func (p *progress) note(n int, lines uint64) {
	p.sent += uint64(n)
	if len(p.marks) == maxMarks {
		p.marks = append(p.marks[:0], p.marks[maxMarks/2:]...)
	}
	p.marks = append(p.marks, mark{p.sent, lines})
}

// lines returns how many lines had scrolled when the last whole piece among the first got bytes was sent. It reports false if that is not known.
func (p *progress) lines(got uint64) (uint64, bool) {
	i := sort.Search(len(p.marks), func(i int) bool { return p.marks[i].sent > got })
	if i == 0 {
		return 0, false
	}
	return p.marks[i-1].lines, true
}

// continues makes v go on where the attachment that req continues broke off, and returns how many lines of scrollback its snapshot has, as
// [screen.View] counts them: all, if it continues none that is known. The session's lock is held. The attachment that is continued is
// closed: its connection is dead, whatever this side knows of it.
func (s *session) continues(v *viewer, req AttachRequest) int {
	if req.After == "" {
		return 0
	}
	before := s.left[req.After]
	for other := range s.viewers {
		if other.name == req.After {
			before = &other.progress
			other.conn.Close()
			if s.active == other { // or the one that comes back saw a part of the old window first
				s.active = nil
				v.typed = other.typed
			}
		}
	}
	if before == nil {
		return 0
	}
	lines, ok := before.lines(req.Got)
	if !ok {
		return 0
	}
	v.progress.note(0, lines) // should not even the snapshot arrive
	if n := int(s.screen.lines() - lines); n > 0 {
		return n
	}
	return -1
}

// showed reports whether an attachment of this name was to the session.
func (s *session) showed(view string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for v := range s.viewers {
		if v.name == view {
			return true
		}
	}
	return s.left[view] != nil
}

// remember keeps the progress of a viewer that leaves. The session's lock is held.
func (s *session) remember(v *viewer) {
	if v.name == "" || s.exit != nil {
		return
	}
	if s.left == nil {
		s.left = make(map[string]*progress)
	}
	if len(s.left) == maxLeft {
		// Not any: who is cut off tries again and again, and each try that gets nowhere leaves too.
		delete(s.left, slices.MinFunc(slices.Collect(maps.Keys(s.left)), func(a, b string) int { return cmp.Compare(s.left[a].order, s.left[b].order) }))
	}
	s.leaves++
	v.progress.order = s.leaves
	p := v.progress
	s.left[v.name] = &p
}
