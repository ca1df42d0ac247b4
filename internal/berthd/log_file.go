package berthd

import (
	"fmt"
	"os"
	"sync"
)

// maxLogFile is how large a log file grows, in bytes: weeks of an ordinary workspace, and no burden to any disk.
const maxLogFile = 16 << 20

// logFile is a file that a log is appended to. When it has grown to its limit it is kept as NAME.1, in the place of the one before,
// and begun anew.
type logFile struct {
	path  string
	limit int64

	mu   sync.Mutex
	file *os.File
	size int64 // negative: no ordinary file, which does not grow
}

func openLogFile(path string, limit int64) (*logFile, error) {
	l := &logFile{path: path, limit: limit}
	return l, l.open()
}

func (l *logFile) open() error {
	f, err := os.OpenFile(l.path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return err
	}
	l.file, l.size = f, info.Size()
	if !info.Mode().IsRegular() {
		l.size = -1
	}
	return nil
}

// Write implements io.Writer. A file that cannot be begun anew goes on growing: a log that is too long is better than none.
func (l *logFile) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.size > 0 && l.size+int64(len(p)) > l.limit {
		if err := l.turn(); err != nil {
			fmt.Fprintf(l.file, "cannot begin a new log: %v\n", err)
			l.size = 0 // and it is tried again after as much
		}
	}
	n, err := l.file.Write(p)
	if l.size >= 0 {
		l.size += int64(n)
	}
	return n, err
}

func (l *logFile) turn() error {
	if err := os.Rename(l.path, l.path+".1"); err != nil {
		return err
	}
	full := l.file
	if err := l.open(); err != nil {
		return err
	}
	return full.Close()
}

// Close implements io.Closer.
func (l *logFile) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.file.Close()
}
