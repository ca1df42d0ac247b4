package reporter

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"

	"github.com/berthd/berth/mask"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

const (
	// maxLine bounds one line, in bytes after cleaning. Stock readers of followed logs refuse messages
	// over 32 KiB, and JSON doubles some characters.
	maxLine = 16 << 10
	// maxMark is room for the mark behind a line that was cut.
	maxMark = 64
	// maxPending bounds what one Write hands to the spool at once, so that one huge Write neither
	// needs as much memory again nor overfills a segment.
	maxPending = 256 << 10
)

// cutter cuts a byte stream into lines. It holds at most one line, and of that at most maxLine bytes.
type cutter struct {
	mask    *mask.Masker
	line    []byte
	dropped int  // bytes of the line beyond maxLine
	cr      bool // a carriage return came last
	begun   bool // the line has begun, though it may hold nothing
}

// feed passes each line that p completes, cleaned, to emit, which must not keep it.
func (c *cutter) feed(p []byte, emit func([]byte)) {
	for len(p) > 0 {
		line, rest, ended := bytes.Cut(p, []byte("\n"))
		for more := true; more; {
			var text []byte
			text, line, more = bytes.Cut(line, []byte("\r"))
			if len(text) > 0 {
				c.add(text)
			}
			if more {
				c.cr, c.begun = true, true
			}
		}
		if ended {
			c.begun = true
			c.end(emit)
		}
		p = rest
	}
}

// add appends text without line ends. Text behind a carriage return overwrites the line, as on a
// terminal: of a progress bar only the last state is kept.
func (c *cutter) add(text []byte) {
	if c.cr {
		c.reset()
	}
	c.begun = true
	room := maxLine - len(c.line)
	c.line = append(c.line, text[:min(room, len(text))]...)
	c.dropped += max(len(text)-room, 0)
}

// end passes the line that is being held, if one has begun.
func (c *cutter) end(emit func([]byte)) {
	if c.begun {
		emit(c.clean())
	}
	c.reset()
}

func (c *cutter) reset() { c.line, c.dropped, c.cr, c.begun = c.line[:0], 0, false, false }

// clean returns the line as valid text of at most maxLine bytes without NUL and secrets, with a mark when
// bytes were cut off.
func (c *cutter) clean() []byte {
	line, dropped := c.mask.Bytes(c.line), c.dropped
	if dropped > 0 {
		kept := trimPartialRune(line[:len(line)-c.mask.Begun(line)])
		dropped += len(line) - len(kept)
		line = kept
	}
	if !utf8.Valid(line) {
		line = bytes.ToValidUTF8(line, []byte(wire.Unreadable))
	}
	if bytes.IndexByte(line, 0) >= 0 {
		line = bytes.ReplaceAll(line, []byte{0}, []byte(wire.Unreadable))
	}
	if len(line) > maxLine {
		kept := trimPartialRune(line[:maxLine])
		dropped += len(line) - len(kept)
		line = kept
	}
	if dropped > 0 {
		line = fmt.Appendf(line[:len(line):len(line)], "… [berth: %d more bytes]", dropped)
	}
	return line
}

// trimPartialRune drops the beginning of a character whose end is not in b.
func trimPartialRune(b []byte) []byte {
	for i := 1; i < utf8.UTFMax && i <= len(b); i++ {
		if tail := b[len(b)-i:]; utf8.RuneStart(tail[0]) {
			if !utf8.FullRune(tail) {
				return b[:len(b)-i]
			}
			break
		}
	}
	return b
}

// writer is one stream of a log source.
type writer struct {
	spool  *spool
	source uuid.UUID
	level  agentpb.Log_Level

	mu      sync.Mutex
	cutter  cutter
	lines   []byte // complete lines, one after the other
	ends    []int  // where each ends
	pending [][]byte
	closed  bool
}

var _ io.WriteCloser = (*writer)(nil)

// Write implements [io.Writer]. What it took survives the process from then on, but for a last line
// that has no end yet.
func (w *writer) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return 0, os.ErrClosed
	}
	var written int
	for written < len(p) {
		part := p[written:min(written+maxPending, len(p))]
		w.cutter.feed(part, w.add)
		if err := w.hand(); err != nil {
			return written, err
		}
		written += len(part)
	}
	return written, nil
}

// Close hands over the last line if it has no end. A second Close is an [os.ErrClosed].
func (w *writer) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return os.ErrClosed
	}
	w.closed = true
	w.cutter.end(w.add)
	return w.hand()
}

func (w *writer) add(line []byte) {
	w.lines = append(w.lines, line...)
	w.ends = append(w.ends, len(w.lines))
}

// hand appends the complete lines to the spool.
func (w *writer) hand() error {
	if len(w.ends) == 0 {
		return nil
	}
	w.pending = w.pending[:0]
	start := 0
	for _, end := range w.ends {
		w.pending = append(w.pending, w.lines[start:end])
		start = end
	}
	err := w.spool.append(w.source, w.level, time.Now(), w.pending)
	w.lines, w.ends = w.lines[:0], w.ends[:0]
	return err
}
