package ports

import (
	"context"
	"reflect"
	"sync"
	"time"

	"github.com/berthd/berth/wire"
)

// interval is the pause between two scans while somebody watches: a change is to be told within a second, with some time to spare for a busy machine.
const interval = 800 * time.Millisecond

// Watch calls changed with the list, and again with each list that differs from the last, until ctx is done or changed fails. It returns what changed
// did, or nil. Lists that come while changed is busy are left out, but for the newest. All who watch at one time share one scanner, and without
// anybody there is none. A scan that fails is tried again; the list before it stands.
func (l *Lister) Watch(ctx context.Context, changed func([]wire.ListeningPort) error) error {
	s := l.join()
	defer l.leave(s)
	var last []wire.ListeningPort
	for first := true; ; {
		list, newer := s.current()
		if list != nil && (first || !same(list, last)) {
			if err := changed(list); err != nil {
				return err
			}
			first, last = false, list
		}
		select {
		case <-ctx.Done():
			return nil
		case <-newer:
		}
	}
}

// same compares two lists. That of a scan that found nothing new is the one before it.
func same(a, b []wire.ListeningPort) bool {
	return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0] || reflect.DeepEqual(a, b))
}

// scanner scans for all who watch.
type scanner struct {
	watchers int // its lister's scanning protects it
	stop     context.CancelFunc
	done     chan struct{}

	mu    sync.Mutex
	list  []wire.ListeningPort // nil before the first scan
	newer chan struct{}        // closed when another list takes the place of this one
}

// join returns the scanner that runs, or a new one.
func (l *Lister) join() *scanner {
	l.scanning.Lock()
	defer l.scanning.Unlock()
	if l.scanner == nil {
		ctx, cancel := context.WithCancel(context.Background())
		s := &scanner{stop: cancel, done: make(chan struct{}), newer: make(chan struct{})}
		l.scanner = s
		go func() {
			defer close(s.done)
			l.scan(ctx, s)
		}()
	}
	l.scanner.watchers++
	return l.scanner
}

// leave ends the scanner of the last who watched, and waits for it.
func (l *Lister) leave(s *scanner) {
	l.scanning.Lock()
	s.watchers--
	last := s.watchers == 0
	if last {
		l.scanner = nil
	}
	l.scanning.Unlock()
	if last {
		s.stop()
		<-s.done
		l.mu.Lock()
		defer l.mu.Unlock()
		if !l.watched() {
			l.spaces.release()
		}
	}
}

// watched reports whether anybody watches.
func (l *Lister) watched() bool {
	l.scanning.Lock()
	defer l.scanning.Unlock()
	return l.scanner != nil
}

// scan publishes the list as it changes.
func (l *Lister) scan(ctx context.Context, s *scanner) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	failed := false
	for {
		list, err := l.look(ctx, false)
		switch {
		case err == nil:
			s.publish(list)
		case !failed && ctx.Err() == nil:
			l.cfg.Log.Warn("cannot watch the listening ports; trying again", "err", err)
		}
		failed = err != nil
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (s *scanner) current() (list []wire.ListeningPort, newer <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.list, s.newer
}

func (s *scanner) publish(list []wire.ListeningPort) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.list != nil && same(list, s.list) {
		return
	}
	s.list = list
	close(s.newer)
	s.newer = make(chan struct{})
}
