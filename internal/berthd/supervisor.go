package berthd

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/berthd/berth/agent"
	"github.com/berthd/berth/wire"
)

// What systemd says in the environment.
const (
	envNotify      = "NOTIFY_SOCKET"
	envWatchdog    = "WATCHDOG_USEC"
	envWatchdogPID = "WATCHDOG_PID"
)

// supervisor tells systemd how berthd is (sd_notify(3)): that it is ready, in one line what it does or
// what holds it back, that it is alive, that it stops. Without systemd it tells nobody.
type supervisor struct {
	conn *net.UnixConn // nil: nobody listens
	log  *slog.Logger

	watchdog time.Duration // within which systemd wants a sign of life; 0: it wants none

	mu      sync.Mutex
	deaf    bool // that nobody takes what is told was said
	serving bool // people reach the workspace, or would if the server were there
	settled bool // the start scripts have ended
	name    string
	path    string // "direct" or "relayed"
}

// openSupervisor reads what systemd left in the environment.
func openSupervisor(env environment, log *slog.Logger) *supervisor {
	s := &supervisor{log: log}
	address := env[envNotify]
	if address == "" {
		return s
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: address, Net: "unixgram"}) // Go reads a leading @ as systemd means it
	if err != nil {
		log.Warn("cannot tell systemd how berthd is", "error", err)
		return s
	}
	s.conn = conn
	// The watchdog is another's when a script that systemd runs starts berthd.
	if pid := env[envWatchdogPID]; pid == "" || pid == strconv.Itoa(os.Getpid()) {
		if usec, err := strconv.ParseInt(env[envWatchdog], 10, 64); err == nil && usec > 0 {
			s.watchdog = time.Duration(usec) * time.Microsecond
		}
	}
	return s
}

// heartbeat is what the agent is to do to be known alive. Three beats fit into the time that systemd gives, so that a busy machine may delay one.
func (s *supervisor) heartbeat() agent.Heartbeat {
	if s.watchdog == 0 {
		return agent.Heartbeat{}
	}
	return agent.Heartbeat{Every: s.watchdog / 3, Beat: func() { s.notify("WATCHDOG=1") }}
}

// tell is an agent's Event callback. berthd is ready when people can reach it, or when it knows why they cannot yet: a server that is away
// must not keep a machine from booting, and what it is that holds berthd back is in the status.
func (s *supervisor) tell(e agent.Event) {
	if e.Step == agent.StepStopped {
		return
	}
	status, ready := s.status(e)
	state := "STATUS=" + wire.Line(status[:min(len(status), maxStatus)]) // a new line would begin another assignment
	if ready {
		state = "READY=1\n" + state
	}
	s.notify(state)
}

// status puts into words where an event leaves berthd, and says whether it makes it ready.
func (s *supervisor) status(e agent.Event) (status string, ready bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch e.Step {
	case agent.StepIdentity:
		return "trading this machine's identity for a token", false
	case agent.StepExchange:
		return "linking to the control server", false
	case agent.StepTrouble:
		status = strings.TrimSuffix(e.Cause, ".")
		if e.Fix != "" {
			status += "; to mend it: " + strings.TrimSuffix(e.Fix, ".")
		}
		return status, true
	case agent.StepLost:
		return "linking anew: " + e.Detail, false
	case agent.StepLinked:
		s.name = e.AgentName
	case agent.StepTailnet:
		s.path, s.serving, ready = e.Path, true, true
	case agent.StepReady: // before the mesh, if there are no scripts to run
		s.settled = true
	}
	switch {
	case s.serving && s.settled:
		return fmt.Sprintf("serving as %s (%s)", s.name, s.path), ready
	case e.Step == agent.StepTailnet:
		return "running start scripts as " + s.name, ready
	}
	return "joining the mesh as " + s.name, ready
}

// stopMargin is more than what all but the stop scripts may take to stop.
const stopMargin = time.Minute

// stopping tells that berthd stops, what for, and how long that may take.
func (s *supervisor) stopping(cause error, scripts time.Duration) {
	status := "running stop scripts"
	switch {
	case errors.Is(cause, errInPlace): // the process stays
		s.notify("STATUS=another berthd takes the place of this one; terminals live on")
		return
	case errors.Is(cause, agent.ErrRestart):
		status = "leaving, to be started again; terminals live on"
	}
	s.notify(fmt.Sprintf("STOPPING=1\nEXTEND_TIMEOUT_USEC=%d\nSTATUS=%s", (scripts + stopMargin).Microseconds(), status))
}

// maxStatus is more than fits on a line of `systemctl status`, and less than a datagram holds.
const maxStatus = 1 << 10

func (s *supervisor) notify(state string) {
	if s.conn == nil {
		return
	}
	_, err := s.conn.Write([]byte(state))
	s.mu.Lock()
	said := s.deaf
	s.deaf = err != nil
	s.mu.Unlock()
	if err != nil && !said {
		s.log.Warn("cannot tell systemd how berthd is", "error", err)
	}
}

func (s *supervisor) close() {
	if s.conn != nil {
		s.conn.Close()
	}
}
