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

	log      *natsLogger
	stop     chan struct{}
	reviving sync.WaitGroup
}

// readyTimeout bounds how long JetStream may take to read its files at start; a log of some GiB
// with a lost index needs a while.
const readyTimeout = 60 * time.Second

func startEmbedded(dir string, log *slog.Logger) (_ *embedded, err error) {
	e := &embedded{log: &natsLogger{log: log}, stop: make(chan struct{})}
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
	e.server, err = server.NewServer(&server.Options{
		ServerName: "berth",
		DontListen: true,
		NoSigs:     true,
		NoLog:      true,
		JetStream:  true,
		StoreDir:   dir,
		// The streams bound themselves and disk.check keeps space free; a second, guessed limit would
		// only refuse to start on small disks.
		JetStreamMaxStore:      maxStore,
		JetStreamMaxMemory:     maxMemory,
		SyncInterval:           syncInterval,
		DisableJetStreamBanner: true,
	})
	if err != nil {
		return nil, fmt.Errorf("cannot start the store: %w", err)
	}
	e.server.SetLoggerV2(e.log, false, false, false)
	e.server.Start()
	if !e.server.ReadyForConnections(readyTimeout) || !e.server.JetStreamEnabled() {
		if cause := e.log.cause(); cause != "" {
			return nil, fmt.Errorf("cannot start the store in %s: %s", dir, cause)
		}
		return nil, fmt.Errorf("cannot start the store in %s: it was not ready after %s", dir, readyTimeout)
	}
	e.reviving.Go(e.revive)
	return e, nil
}

const (
	maxStore  = 1 << 50
	maxMemory = 1 << 40
	// syncInterval bounds what a power cut may lose. kill -9 loses nothing: every write reaches the
	// kernel before it is acknowledged.
	syncInterval = time.Second
	// reviveEvery is how often JetStream is looked after.
	reviveEvery = time.Second
)

// writable says whether anything can be stored now.
func (e *embedded) writable() error {
	if err := e.disk.check(); err != nil {
		return err
	}
	if e.log.full.Load() {
		return fmt.Errorf("cannot write to the data directory %s: its disk was full a moment ago: %w", e.disk.dir, ErrDiskFull)
	}
	return nil
}

// revive opens JetStream's files again after a write found no space: it does not by itself, even when
// there is space again. The checks before each write cannot quite keep another program from taking
// the last of it.
func (e *embedded) revive() {
	ticker := time.NewTicker(reviveEvery)
	defer ticker.Stop()
	for {
		select {
		case <-e.stop:
			return
		case <-ticker.C:
		}
		if !e.log.full.Load() && e.server.JetStreamEnabled() || e.disk.check() != nil {
			continue
		}
		err := e.server.ShutdownJetStream()
		if err == nil {
			e.log.full.Store(false)
			err = e.server.EnableJetStream(&server.JetStreamConfig{
				StoreDir: e.disk.dir, MaxStore: maxStore, MaxMemory: maxMemory, SyncInterval: syncInterval, Strict: true, CompressOK: true,
			})
		}
		if err != nil {
			e.log.full.Store(true)
			e.log.log.Warn("cannot use the data directory again yet", "dir", e.disk.dir, "err", err)
			continue
		}
		e.log.log.Info("the data directory can be used again", "dir", e.disk.dir)
	}
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
	close(e.stop)
	e.reviving.Wait()
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

// minFree is how much space is left alone: JetStream turns itself off when a write finds no space, so
// writes end before that and go on as soon as there is space again.
const minFree = 32 << 20

// disk watches the space under a directory.
type disk struct {
	dir    string
	memory bool
	free   func(dir string) (uint64, error)
}

// check says whether there is space to write. It asks each time: the answer costs a microsecond, and
// a fast writer fills minFree in a few milliseconds.
func (d *disk) check() error {
	if d.memory {
		return nil
	}
	free, err := d.free(d.dir)
	if err != nil {
		return dirError(d.dir, err)
	}
	if free < minFree {
		return fmt.Errorf("cannot write to the data directory %s: its disk has %d MiB left and berth keeps %d MiB free; free some space: %w",
			d.dir, free>>20, minFree>>20, ErrDiskFull)
	}
	return nil
}

func freeBytes(dir string) (uint64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, err
	}
	return st.Bavail * uint64(st.Bsize), nil
}

// natsLogger gives the server's words to our log, and keeps what the server tells in no other way: why
// it cannot start, and that a write found no space. It never ends the process.
type natsLogger struct {
	log   *slog.Logger
	fatal atomic.Pointer[string]
	full  atomic.Bool
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

func (l *natsLogger) Errorf(format string, v ...any) {
	for _, arg := range v {
		if err, ok := arg.(error); ok && (errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)) {
			l.full.Store(true)
		}
	}
	l.say(slog.LevelError, format, v)
}

func (l *natsLogger) Warnf(format string, v ...any) { l.say(slog.LevelWarn, format, v) }

// What the server says in passing is for those who debug it.
func (l *natsLogger) Noticef(format string, v ...any) { l.say(slog.LevelDebug, format, v) }
func (l *natsLogger) Debugf(format string, v ...any)  { l.say(slog.LevelDebug, format, v) }
func (l *natsLogger) Tracef(format string, v ...any)  { l.say(slog.LevelDebug, format, v) }

func (l *natsLogger) say(level slog.Level, format string, v []any) {
	if l.log.Enabled(context.Background(), level) {
		l.log.Log(context.Background(), level, "store: "+fmt.Sprintf(format, v...))
	}
}
