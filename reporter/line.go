package reporter

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
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
	// maxPending is how much is handed to the spool at once, so that one huge Write neither needs as
	// much memory again nor overfills a segment.
	maxPending = 256 << 10
	// maxHeld is how much of a line that has no end yet is wanted again after a crash: more than is shown
	// of a line, and less than whoever keeps a stream has room for.
	maxHeld = 64 << 10
)

// cutter cuts a byte stream into lines. It holds at most one line, and of that at most maxLine bytes.
type cutter struct {
	mask    *mask.Masker
	line    []byte
	dropped int  // bytes of the line beyond maxLine
	cr      bool // a carriage return came last
	begun   bool // the line has begun, though it may hold nothing

	fed  uint64 // bytes of the stream up to now
	held int    // of them the last, which make up the line
}

// feed passes each line that p completes, cleaned, to emit, which must not keep it.
func (c *cutter) feed(p []byte, emit func([]byte)) {
	for len(p) > 0 {
		line, rest, ended := bytes.Cut(p, []byte("\n"))
		c.fed += uint64(len(p) - len(rest))
		for more := true; more; {
			var text []byte
			text, line, more = bytes.Cut(line, []byte("\r"))
			if len(text) > 0 {
				c.add(text)
			}
			if more {
				c.cr, c.begun = true, true
				c.held++
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
	c.held += len(text)
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

func (c *cutter) reset() { c.line, c.dropped, c.cr, c.begun, c.held = c.line[:0], 0, false, false, 0 }

// settled is how much of the stream is not wanted again: all before the line that is held.
func (c *cutter) settled() uint64 {
	if c.held > maxHeld {
		return c.fed
	}
	return c.fed - uint64(c.held)
}

// goOn begins at an offset of the stream. missed are the bytes before it that nobody has taken: of a line
// that was too long to be wanted again.
func (c *cutter) goOn(offset, missed uint64) {
	c.fed = offset
	if missed > 0 {
		c.dropped, c.begun = int(min(missed, math.MaxInt32)), true
	}
}

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

// Stream takes what one stream of a log source prints, and knows how far it is taken.
type Stream struct {
	spool  *spool
	source uuid.UUID
	level  agentpb.Log_Level
	id     uuid.UUID // by which it is found again; nil: by nobody

	mu      sync.Mutex
	cutter  cutter
	batches batches
	closed  bool
	err     error // of handing over
}

var _ io.WriteCloser = (*Stream)(nil)

// Write implements [io.Writer]. What it took survives the process from then on, but for a last line
// that has no end yet.
func (w *Stream) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return 0, os.ErrClosed
	}
	w.cutter.feed(p, w.add)
	if err := w.hand(); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Settled returns how many bytes of the stream, from its beginning on, need not be kept for [Reporter.Stream] any more:
// their lines are in the spool. It is never far behind what was written.
func (w *Stream) Settled() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.cutter.settled()
}

// Close hands over the last line if it has no end. A second Close is an [os.ErrClosed].
func (w *Stream) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return os.ErrClosed
	}
	w.closed = true
	w.cutter.end(w.add)
	return w.hand()
}

func (w *Stream) add(line []byte) {
	w.batches.add(line, w.cutter.fed)
	if w.batches.size() >= maxPending {
		w.err = errors.Join(w.err, w.append())
	}
}

// hand appends the complete lines to the spool.
func (w *Stream) hand() error {
	err := errors.Join(w.err, w.append())
	w.err = nil
	return err
}

func (w *Stream) append() error {
	if w.batches.size() == 0 {
		return nil
	}
	err := w.spool.append(w.source, w.level, time.Now(), w.id, &w.batches)
	w.batches.reset()
	return err
}
