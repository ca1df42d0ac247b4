package berthd

import (
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/berthd/berth/agent"
)

// systemd is the socket that systemd listens on.
func systemd(t *testing.T) (address string, next func() string) {
	t.Helper()
	address = filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: address, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return address, func() string {
		t.Helper()
		buf := make([]byte, 64<<10)
		conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		n, err := conn.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		return string(buf[:n])
	}
}

func TestSupervisorIsToldTheStage(t *testing.T) {
	address, next := systemd(t)
	s := openSupervisor(environment{envNotify: address}, slog.New(slog.DiscardHandler))
	defer s.close()
	for _, step := range []struct {
		event agent.Event
		want  string
	}{
		{agent.Event{Step: agent.StepIdentity}, "STATUS=trading this machine's identity for a token"},
		{agent.Event{Step: agent.StepExchange}, "STATUS=linking to the control server"},
		{agent.Event{Step: agent.StepTrouble, Cause: "the server is away:\nREADY=1\x1b[31m.", Fix: "start it."}, "READY=1\nSTATUS=the server is away: READY=1 [31m; to mend it: start it"},
		{agent.Event{Step: agent.StepLinked, AgentName: "box"}, "STATUS=joining the mesh as box"},
		{agent.Event{Step: agent.StepTailnet, Path: "direct"}, "READY=1\nSTATUS=running start scripts as box"},
		{agent.Event{Step: agent.StepReady, Detail: "ready"}, "STATUS=serving as box (direct)"},
		{agent.Event{Step: agent.StepLost, Detail: "EOF"}, "STATUS=linking anew: EOF"},
		{agent.Event{Step: agent.StepLinked, AgentName: "box"}, "STATUS=serving as box (direct)"},
		{agent.Event{Step: agent.StepTrouble, Cause: strings.Repeat("é", maxStatus)}, "READY=1\nSTATUS=" + strings.Repeat("é", maxStatus/2)},
	} {
		s.tell(step.event)
		if diff := cmp.Diff(step.want, next()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", step.event.Step, diff)
		}
	}
	again := &supervisor{conn: s.conn, log: s.log} // whose start scripts ran before
	again.tell(agent.Event{Step: agent.StepLinked, AgentName: "box"})
	again.tell(agent.Event{Step: agent.StepReady})
	again.tell(agent.Event{Step: agent.StepTailnet, Path: "relayed"})
	got := []string{next(), next(), next()}
	if diff := cmp.Diff([]string{"STATUS=joining the mesh as box", "STATUS=joining the mesh as box", "READY=1\nSTATUS=serving as box (relayed)"}, got); diff != "" {
		t.Errorf("without scripts (-want +got):\n%s", diff)
	}
	s.tell(agent.Event{Step: agent.StepStopped}) // says nothing
	s.stopping(nil, time.Minute)
	if got, want := next(), "STOPPING=1\nEXTEND_TIMEOUT_USEC=120000000\nSTATUS=running stop scripts"; got != want {
		t.Errorf("stopping: got %q, want %q", got, want)
	}
	s.stopping(agent.ErrRestart, time.Minute)
	if got, want := next(), "STOPPING=1\nEXTEND_TIMEOUT_USEC=120000000\nSTATUS=leaving, to be started again; terminals live on"; got != want {
		t.Errorf("restarting: got %q, want %q", got, want)
	}
	s.stopping(errInPlace, time.Minute)
	if got, want := next(), "STATUS=another berthd takes the place of this one; terminals live on"; got != want {
		t.Errorf("changing: got %q, want %q", got, want)
	}
}

func TestSupervisorWatchdog(t *testing.T) {
	address, next := systemd(t)
	for name, tc := range map[string]struct {
		env  environment
		want time.Duration
	}{
		"asked":             {environment{envNotify: address, envWatchdog: "60000000"}, 20 * time.Second},
		"asked by our pid":  {environment{envNotify: address, envWatchdog: "3000000", envWatchdogPID: fmt.Sprint(os.Getpid())}, time.Second},
		"asked of another":  {environment{envNotify: address, envWatchdog: "3000000", envWatchdogPID: "1"}, 0},
		"not asked":         {environment{envNotify: address}, 0},
		"nonsense":          {environment{envNotify: address, envWatchdog: "soon"}, 0},
		"without a systemd": {environment{envWatchdog: "3000000"}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			s := openSupervisor(tc.env, slog.New(slog.DiscardHandler))
			defer s.close()
			beat := s.heartbeat()
			if beat.Every != tc.want || (beat.Beat != nil) != (tc.want > 0) {
				t.Fatalf("a beat every %v, want %v", beat.Every, tc.want)
			}
			if beat.Beat == nil {
				return
			}
			beat.Beat()
			if got := next(); got != "WATCHDOG=1" {
				t.Errorf("told %q", got)
			}
		})
	}
}

func TestSupervisorThatIsGone(t *testing.T) {
	var log strings.Builder
	s := openSupervisor(environment{envNotify: filepath.Join(t.TempDir(), "none")}, slog.New(slog.NewTextHandler(&log, nil)))
	s.tell(agent.Event{Step: agent.StepExchange})
	s.close()
	if !strings.Contains(log.String(), "cannot tell systemd how berthd is") {
		t.Errorf("it was not said that systemd cannot be told: %s", log.String())
	}
}
