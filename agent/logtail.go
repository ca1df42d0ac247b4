package agent

import (
	"io"
	"sync"
	"time"
)

// logTailSize is how much of its own log an agent keeps in memory for /debug/logs: some hours of a
// quiet day.
const logTailSize = 256 << 10

// LogTail keeps the newest part of what is written to it. Give its io.Writer side to the logger and
// the whole to [Config]; the zero value is ready.
type LogTail struct {
	mu    sync.Mutex
	lines []logLine
	size  int
}

type logLine struct {
	at   time.Time
	text []byte
}

// Write implements io.Writer. It keeps whole writes, which are log lines, and never fails.
func (t *LogTail) Write(p []byte) (int, error) {
	if len(p) > logTailSize {
		return len(p), nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lines = append(t.lines, logLine{time.Now(), append([]byte(nil), p...)})
	t.size += len(p)
	for t.size > logTailSize {
		t.size -= len(t.lines[0].text)
		t.lines[0] = logLine{}
		t.lines = t.lines[1:]
	}
	return len(p), nil
}

// WriteSince writes what was kept from after on, oldest first; all of it for the zero time.
func (t *LogTail) WriteSince(w io.Writer, after time.Time) error {
	t.mu.Lock()
	kept := append([]logLine(nil), t.lines...)
	t.mu.Unlock()
	for _, line := range kept {
		if line.at.Before(after) {
			continue
		}
		if _, err := w.Write(line.text); err != nil {
			return err
		}
	}
	return nil
}
