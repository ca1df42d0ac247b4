package agent

import (
	"io"
	"sync"
)

// logTailSize is how much of its own log an agent keeps in memory for /debug/logs: some hours of a
// quiet day.
const logTailSize = 256 << 10

// LogTail keeps the newest part of what is written to it. Give its io.Writer side to the logger and
// the whole to [Config]; the zero value is ready.
type LogTail struct {
	mu  sync.Mutex
	buf []byte
}

// Write implements io.Writer. It keeps whole writes, which are log lines, and never fails.
func (t *LogTail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(p) > logTailSize {
		return len(p), nil
	}
	// Trimming when the buffer has grown to twice its size moves each byte once at most.
	if len(t.buf)+len(p) > 2*logTailSize {
		keep := t.buf[len(t.buf)-logTailSize:]
		for i, b := range keep {
			if b == '\n' {
				keep = keep[i+1:]
				break
			}
		}
		t.buf = append(make([]byte, 0, 2*logTailSize), keep...)
	}
	t.buf = append(t.buf, p...)
	return len(p), nil
}

// WriteTo implements io.WriterTo: what is kept, oldest first.
func (t *LogTail) WriteTo(w io.Writer) (int64, error) {
	t.mu.Lock()
	kept := append([]byte(nil), t.buf...)
	t.mu.Unlock()
	n, err := w.Write(kept)
	return int64(n), err
}
