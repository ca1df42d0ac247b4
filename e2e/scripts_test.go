package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestScriptOutlivesBerthd: a start script prints on both streams while berthd is killed and started again. Each line is read once and in order, the script
// ends as if nothing had happened, and the workspace is ready then.
func TestScriptOutlivesBerthd(t *testing.T) {
	const parts, lines = 5, 20_000 // of each part
	m := newMachine(t)
	log := filepath.Join(m.tmp, "log")
	r := newRoadOn(m, fmt.Sprintf(`agents:
  - name: box
    scripts:
      - display_name: long
        run_on_start: true
        log_path: %[1]s
        script: |
          cd %[2]s
          for part in 1 2 3 4 5; do
            until [ -e go-$part ]; do sleep 0.02; done
            seq -f "out %%g which is a line of some length" $(((part - 1) * %[3]d + 1)) $((part * %[3]d)) &
            seq -f "err %%g which is another line" $(((part - 1) * %[3]d + 1)) $((part * %[3]d)) >&2
            wait
          done
          echo $? >ended
      - {display_name: short, run_on_start: true, script: "exit 0"}
`, log, m.tmp, lines))
	run := func() {
		r.agent = r.start("berthd", []string{"BERTH_URL=" + r.url(), "BERTH_TOKEN=" + r.token}, "run", "--state-dir", filepath.Join(r.home, "state"))
	}
	run()
	r.waitConnected(20 * time.Second)
	size := func() int64 {
		info, err := os.Stat(log)
		if err != nil {
			return 0
		}
		return info.Size()
	}
	for part := 1; part <= parts; part++ {
		before := size()
		if err := os.WriteFile(filepath.Join(m.tmp, fmt.Sprintf("go-%d", part)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if part == parts {
			break
		}
		eventually(t, 20*time.Second, "the script prints", func() bool { return size() > before+int64(part)*100_000 })
		if part == 3 {
			if code := r.agent.stop(syscall.SIGHUP, 20*time.Second); code != 75 {
				t.Errorf("SIGHUP: exit code %d", code)
			}
		} else {
			r.agent.kill()
		}
		run()
	}
	eventually(t, 60*time.Second, "the workspace is ready", func() bool { return strings.Contains(r.status(), "ready since") })
	if code, err := os.ReadFile(filepath.Join(m.tmp, "ended")); err != nil || string(code) != "0\n" {
		t.Errorf("the script ended with %q, %v", code, err)
	}
	next := map[string]int{"info": 1, "error": 1}
	prefix := map[string]string{"info": "out", "error": "err"}
	eventually(t, 30*time.Second, "all lines have come", func() bool { return strings.Contains(r.berth("logs", "box"), fmt.Sprintf("err %d ", parts*lines)) })
	for all := json.NewDecoder(strings.NewReader(r.berth("logs", "box", "--output", "json"))); all.More(); {
		var line struct{ Level, Output string }
		if err := all.Decode(&line); err != nil {
			t.Fatal(err)
		}
		if want := fmt.Sprintf("%s %d which", prefix[line.Level], next[line.Level]); !strings.HasPrefix(line.Output, want) {
			t.Fatalf("%s line %q, want %q", line.Level, line.Output, want)
		}
		next[line.Level]++
	}
	if next["info"] != parts*lines+1 || next["error"] != parts*lines+1 {
		t.Errorf("the last lines are before %v", next)
	}
	if said := r.agent.output(); !strings.Contains(said, "state=ready") {
		t.Errorf("berthd does not say that it is ready:\n%s", said)
	}
}
