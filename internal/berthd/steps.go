package berthd

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/berthd/berth/agent"
)

const (
	// stepBacklog bounds events not yet read by whoever follows --status-json; more are dropped.
	stepBacklog = 64
	// stepGrace is how long a stop waits for the last of them to be read.
	stepGrace = time.Second
)

// steps writes the agent's events as JSON lines. A reader that does not read costs its events, and
// never holds up the agent.
type steps struct {
	began  time.Time
	out    *os.File
	done   chan struct{}
	mu     sync.Mutex
	events chan agent.Event // nil once closed
}

// openSteps opens the target of --status-json: a descriptor number or a file; "" means none.
func openSteps(target string, log *slog.Logger) (*steps, error) {
	s := &steps{began: time.Now()}
	if target == "" {
		return s, nil
	}
	if fd, err := strconv.Atoi(target); err == nil {
		// Children must not hold it open: whoever reads it waits for its end.
		syscall.CloseOnExec(fd)
		s.out = os.NewFile(uintptr(fd), "status")
		if _, err := s.out.Stat(); err != nil {
			return nil, usagef("--status-json %s: that file descriptor is not open", target)
		}
	} else if s.out, err = os.OpenFile(target, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600); err != nil {
		return nil, usagef("cannot use --status-json: %w", err)
	}
	s.events, s.done = make(chan agent.Event, stepBacklog), make(chan struct{})
	go s.write(s.events, log)
	return s, nil
}

// statusInherited tells whether --status-json names a descriptor, which only the first program of a process has.
func (o outputSettings) statusInherited() bool {
	_, err := strconv.Atoi(o.statusJSON)
	return err == nil
}

// tell is the agent's Event callback.
func (s *steps) tell(e agent.Event) {
	e.Elapsed = time.Since(s.began).Milliseconds()
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case s.events <- e:
	default:
	}
}

func (s *steps) write(events <-chan agent.Event, log *slog.Logger) {
	defer close(s.done)
	enc := json.NewEncoder(s.out)
	broken := false
	for e := range events {
		if broken {
			continue
		}
		if err := enc.Encode(e); err != nil {
			broken = true
			log.Warn("nobody reads the status any more", "error", fmt.Errorf("cannot write status: %w", err))
		}
	}
}

// close writes what is left and closes the target.
func (s *steps) close() {
	s.mu.Lock()
	events := s.events
	s.events = nil
	s.mu.Unlock()
	if events == nil {
		return
	}
	close(events)
	select {
	case <-s.done:
	case <-time.After(stepGrace):
	}
	s.out.Close()
}
