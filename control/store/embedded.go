package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"golang.org/x/sys/unix"
)

// embedded is a NATS server with JetStream inside this process. It opens no port.
type embedded struct {
	server *server.Server
	lock   *os.File
	disk   *disk
	temp   string // removed at close, when state lives in memory
}

// readyTimeout bounds how long JetStream may take to read its files at start; a log of some GiB
// with a lost index needs a while.
const readyTimeout = 60 * time.Second

func startEmbedded(dir string, log *slog.Logger) (_ *embedded, err error) {
	e := &embedded{}
	defer func() {
		if err != nil {
			e.close()
		}
	}()
	if dir == "" {
		// JetStream wants a directory even when nothing is stored in it.
		if e.temp, err = os.MkdirTemp("", "berth-store-"); err != nil {
			return nil, fmt.Errorf("cannot start the store: %w", err)
		}
		dir = e.temp
	} else {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, dirError(dir, err)
		}
		if e.lock, err = lockDir(dir); err != nil {
			return nil, err
		}
	}
	e.disk = &disk{dir: dir, free: freeBytes, memory: e.temp != ""}
	if err := e.disk.check(); err != nil {
		return nil, err
	}
	if err := probeWrite(dir); err != nil {
		return nil, dirError(dir, err)
	}
	natsLog := &natsLogger{log: log}
	e.server, err = server.NewServer(&server.Options{
		ServerName: "berth",
		DontListen: true,
		NoSigs:     true,
		NoLog:      true,
		JetStream:  true,
		StoreDir:   filepath.Join(dir, "jetstream"),
		// The streams bound themselves and disk.check keeps space free; a second, guessed limit would
		// only refuse to start on small disks.
		JetStreamMaxStore:  1 << 50,
		JetStreamMaxMemory: 1 << 40,
		// Every write reaches the kernel before it is acknowledged, so kill -9 loses nothing; this
		// bounds what a power cut may lose.
		SyncInterval:           time.Second,
		DisableJetStreamBanner: true,
	})
	if err != nil {
		return nil, fmt.Errorf("cannot start the store: %w", err)
	}
	e.server.SetLoggerV2(natsLog, false, false, false)
	e.server.Start()
	if !e.server.ReadyForConnections(readyTimeout) || !e.server.JetStreamEnabled() {
		if cause := natsLog.cause(); cause != "" {
			return nil, fmt.Errorf("cannot start the store in %s: %s", dir, cause)
		}
		return nil, fmt.Errorf("cannot start the store in %s: it was not ready after %s", dir, readyTimeout)
	}
	return e, nil
}

func (e *embedded) connect(log *slog.Logger) (*nats.Conn, error) {
	nc, err := nats.Connect("", nats.InProcessServer(e.server), nats.Name("berth"),
		nats.MaxReconnects(-1), nats.ErrorHandler(natsErrors(log)))
	if err != nil {
		return nil, fmt.Errorf("cannot reach the embedded store: %w", err)
	}
	return nc, nil
}

func (e *embedded) close() error {
	if e.server != nil {
		e.server.Shutdown()
		e.server.WaitForShutdown()
	}
	var err error
	if e.lock != nil {
		err = e.lock.Close()
	}
	if e.temp != "" {
		err = errors.Join(err, os.RemoveAll(e.temp))
	}
	return err
}

// lockDir takes the directory for this process; the kernel lets go of it however the process ends.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, dirError(dir, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("cannot use the data directory %s: another berth server uses it; stop that one or choose another directory: %w", dir, ErrLocked)
		}
		return nil, dirError(dir, err)
	}
	return f, nil
}

// probeWrite stores and removes one small file: a read-only or broken disk shows here, with its
// own words, rather than somewhere inside JetStream.
func probeWrite(dir string) error {
	f, err := os.CreateTemp(dir, "probe-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(make([]byte, 4096))
	return errors.Join(err, f.Sync(), f.Close())
}

// dirError words why a data directory is of no use, with what helps.
func dirError(dir string, err error) error {
	fix := "check that the directory exists on a healthy disk"
	switch {
	case errors.Is(err, fs.ErrPermission):
		fix = "run berth as the owner of the directory or choose another"
	case errors.Is(err, unix.EROFS):
		fix = "the file system is read-only; choose another directory"
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("cannot use the data directory %s: %w; free some space or choose a directory on another disk: %w", dir, err, ErrDiskFull)
	}
	return fmt.Errorf("cannot use the data directory %s: %w; %s", dir, err, fix)
}

// minFree is how much space is left alone: JetStream switches itself off for good when a write finds
// no space, so writes end before that and can go on as soon as there is space again.
const minFree = 32 << 20

// disk watches the space under a directory.
type disk struct {
	dir    string
	memory bool
	free   func(dir string) (uint64, error)

	mu      sync.Mutex
	checked time.Time
	last    error
}

// check says whether there is space to write; the answer is at most a second old.
func (d *disk) check() error {
	if d.memory {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if now := time.Now(); now.Sub(d.checked) >= time.Second {
		d.checked = now
		d.last = nil
		switch free, err := d.free(d.dir); {
		case err != nil:
			d.last = dirError(d.dir, err)
		case free < minFree:
			d.last = fmt.Errorf("cannot write to the data directory %s: its disk has %d MiB left and berth keeps %d MiB free; free some space: %w",
				d.dir, free>>20, minFree>>20, ErrDiskFull)
		}
	}
	return d.last
}

func freeBytes(dir string) (uint64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, err
	}
	return st.Bavail * uint64(st.Bsize), nil
}

// natsLogger gives the server's words to our log, and keeps the last fatal ones: the server reports
// why it cannot start in no other way. It never ends the process.
type natsLogger struct {
	log   *slog.Logger
	fatal atomic.Pointer[string]
}

func (l *natsLogger) cause() string {
	if p := l.fatal.Load(); p != nil {
		return *p
	}
	return ""
}

func (l *natsLogger) Fatalf(format string, v ...any) {
	text := fmt.Sprintf(format, v...)
	l.fatal.Store(&text)
	l.log.Error("store: " + text)
}

func (l *natsLogger) Errorf(format string, v ...any) { l.say(slog.LevelError, format, v) }
func (l *natsLogger) Warnf(format string, v ...any)  { l.say(slog.LevelWarn, format, v) }

// What the server says in passing is for those who debug it.
func (l *natsLogger) Noticef(format string, v ...any) { l.say(slog.LevelDebug, format, v) }
func (l *natsLogger) Debugf(format string, v ...any)  { l.say(slog.LevelDebug, format, v) }
func (l *natsLogger) Tracef(format string, v ...any)  { l.say(slog.LevelDebug, format, v) }

func (l *natsLogger) say(level slog.Level, format string, v []any) {
	if l.log.Enabled(context.Background(), level) {
		l.log.Log(context.Background(), level, "store: "+fmt.Sprintf(format, v...))
	}
}
