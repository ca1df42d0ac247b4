package agent

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/berthd/berth/wire/agentpb"
)

// TestShutdownStates: how the stop scripts did is what the workspace ends as, and it is told.
func TestShutdownStates(t *testing.T) {
	for name, tt := range map[string]struct {
		script  string
		timeout time.Duration // the script's own
		whole   time.Duration // for the shutdown
		want    string
		said    string
	}{
		"fine":                {script: "echo bye", want: "off", said: "bye"},
		"failed":              {script: "echo bye; exit 3", want: "shutdown_error", said: "bye"},
		"its own time":        {script: "exec sleep 1000", timeout: 100 * time.Millisecond, want: "shutdown_timeout", said: "ran for longer than 100ms"},
		"the shutdown's time": {script: "exec sleep 1000", whole: 2 * time.Second, want: "shutdown_timeout", said: "--shutdown-timeout"},
		"a child is left":     {script: "sleep 1000 & echo bye", want: "off", said: "bye"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := shortDir(t)
			m := workspace(dir)
			m.Scripts[1].Script, m.Scripts[1].Timeout = tt.script, durationpb.New(tt.timeout)
			s := newServer(t, m)
			r := runWith(t, s, filepath.Join(dir, "s"), Services{ShutdownTimeout: tt.whole})
			r.await(StepReady)
			r.end()
			s.use(func() {
				if diff := cmp.Diff([]string{"starting", "ready", "shutting_down", tt.want}, s.states); diff != "" {
					t.Errorf("lifecycle (-want +got):\n%s", diff)
				}
				if !slices.ContainsFunc(s.logs, func(line string) bool { return strings.Contains(line, tt.said) }) {
					t.Errorf("no %q in the log %q", tt.said, s.logs)
				}
				if s.calls["ScriptCompleted"] != 2 {
					t.Errorf("%d timings, want those of the start and of the stop script", s.calls["ScriptCompleted"])
				}
			})
		})
	}
}

// TestStopWhileStartScriptsRun: they are ended, the stop scripts run, and the next start is one from the beginning.
func TestStopWhileStartScriptsRun(t *testing.T) {
	dir := shortDir(t)
	m := workspace(dir)
	m.Scripts[0].Script += "; exec sleep 1000"
	s := newServer(t, m)
	r := run(t, s, filepath.Join(dir, "s"))
	eventually(t, "the start script runs", func() bool { return lines(filepath.Join(dir, "starts")) == 1 })
	r.end()
	s.use(func() {
		if diff := cmp.Diff([]string{"starting", "shutting_down", "off"}, s.states); diff != "" {
			t.Errorf("lifecycle (-want +got):\n%s", diff)
		}
	})
	again := run(t, s, filepath.Join(dir, "s"))
	eventually(t, "the start script runs again", func() bool { return lines(filepath.Join(dir, "starts")) == 2 })
	again.end()
	if n := lines(filepath.Join(dir, "stops")); n != 2 {
		t.Errorf("the stop script ran %d times, want twice", n)
	}
}

// TestStopWithTheServerGone: stop scripts run as always, nobody waits for a link, and what they said arrives after the next start.
func TestStopWithTheServerGone(t *testing.T) {
	dir := shortDir(t)
	m := workspace(dir)
	s := newServer(t, m)
	r := run(t, s, filepath.Join(dir, "s"))
	r.await(StepReady)
	s.await(t, "the log of the start", func() bool { return len(s.logs) > 0 })
	s.use(func() { s.drop() })
	s.http.Close()
	r.await(StepTrouble)
	r.end()
	if n := lines(filepath.Join(dir, "stops")); n != 1 {
		t.Errorf("the stop script ran %d times, want once", n)
	}
	if said := r.log.String(); !strings.Contains(said, "what is left is sent after the next start") {
		t.Errorf("it is not said that reports are left:\n%s", said)
	}

	back := newServer(t, m)
	again := run(t, back, filepath.Join(dir, "s"))
	back.await(t, "what the stop script said", func() bool { return slices.Contains(back.logs, "stopped") })
	again.end()
}

// TestStopOfOneThatNeverMetItsServer: a berthd that was restarted, and then told to stop while the server was away, runs the stop scripts all the same.
func TestStopOfOneThatNeverMetItsServer(t *testing.T) {
	if bootID() == "" {
		t.Skip("this system does not tell one boot from another")
	}
	dir := shortDir(t)
	m := workspace(dir)
	m.EnvironmentVariables = map[string]string{"PLANET": "earth"}
	m.Secrets = []*agentpb.WorkspaceSecret{{EnvName: "KEY", Value: []byte("planted-secret")}}
	m.Scripts[1].Script += "; echo stopped on $PLANET with $CODER_AGENT_TOKEN"
	s := newServer(t, m)
	first := run(t, s, filepath.Join(dir, "s"))
	first.await(StepReady)
	s.await(t, "the log of the start", func() bool { return len(s.logs) > 0 })
	first.restart()
	s.http.Close()
	second := run(t, s, filepath.Join(dir, "s"))
	second.await(StepTrouble)
	noted, err := os.ReadFile(second.state.Path(manifestFile))
	if err != nil || bytes.Contains(noted, []byte("planted-secret")) {
		t.Errorf("the noted manifest has a secret, %v", err)
	}
	second.end()
	if n := lines(filepath.Join(dir, "stops")); n != 1 {
		t.Errorf("the stop script ran %d times, want once", n)
	}

	back := newServer(t, m)
	third := run(t, back, filepath.Join(dir, "s"))
	third.await(StepReady)
	back.await(t, "what the stop script said", func() bool { return slices.Contains(back.logs, "stopped on earth with token") })
	third.end()
	if n := lines(filepath.Join(dir, "starts")); n != 2 {
		t.Errorf("start scripts ran %d times, want again after a stop", n)
	}
}

// TestStopOfOneThatWasNeverStarted: where no start script has run in this boot there is nothing to stop.
func TestStopOfOneThatWasNeverStarted(t *testing.T) {
	dir := shortDir(t)
	m := workspace(dir)
	s := newServer(t, m)
	s.http.Close()
	r := run(t, s, filepath.Join(dir, "s"))
	if err := saveManifest(r.state, m); err != nil {
		t.Fatal(err)
	}
	r.await(StepTrouble)
	r.end()
	if n := lines(filepath.Join(dir, "stops")); n != 0 {
		t.Errorf("the stop script ran %d times", n)
	}
}
