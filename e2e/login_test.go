package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestLoginWaits: who wants to work in a workspace waits for start scripts that ask for it, and is told; --now goes in at once.
func TestLoginWaits(t *testing.T) {
	m := newMachine(t)
	gate := filepath.Join(m.home, "gate")
	r := newRoadOn(m, `
agents:
  - name: box
    scripts:
      - {display_name: begin, run_on_start: true, blocks_login: true, script: "until [ -e `+gate+` ]; do sleep 0.05; done; exit 3"}
`)
	r.run()
	r.waitConnected(20 * time.Second)
	eventually(t, 20*time.Second, "start scripts run", func() bool { return strings.Contains(r.status(), "starting") })

	waiting := r.client("ssh", "box", "--", "echo in")
	out := r.startCommand(waiting, "berth ssh")
	out.wait("berth: box runs its start scripts, which the login waits for", 20*time.Second)
	if got := r.berth("ssh", "box", "--now", "--", "echo in"); got != "in\n" {
		t.Errorf("--now: %q", got)
	}
	select {
	case <-out.done:
		t.Fatalf("it did not wait:\n%s", out.output())
	default:
	}
	if err := os.WriteFile(gate, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	out.wait("\nin\n", 20*time.Second)
	<-out.done
	if !strings.Contains(out.output(), "berth: the start scripts of box ended as start_error; see berth logs box\n") {
		t.Errorf("it is not said that a script failed:\n%s", out.output())
	}
	if got := r.pipe("ssh", "box", "--", "cat"); got != nil { // nobody waits any more, and nothing is said
		got.ask("through", "through")
	}
}
