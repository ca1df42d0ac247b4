package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestPower: a machine is switched off with the server gone, loses its power with the server gone, and is switched off with the server there. Stop scripts
// run when it is switched off, and every line arrives once and in order, if need be after the next boot.
func TestPower(t *testing.T) {
	r := newRoad(t, `
agents:
  - name: box
    scripts:
      - display_name: numbers
        run_on_start: true
        script: |
          i=1
          while [ $i -le 200 ]; do
            echo "line $i"
            [ $i != 100 ] || until [ -e /var/tmp/go ]; do sleep 0.05; done
            i=$((i+1))
          done
          echo >/var/tmp/done
      - {display_name: end, run_on_stop: true, script: "echo \"ended with a token of ${#CODER_AGENT_TOKEN} letters\""}
`)
	b := r.boot(nil)
	ended := fmt.Sprintf("ended with a token of %d letters", len(r.token))
	said := func(what string, times int) {
		t.Helper()
		defer func() {
			if t.Failed() {
				t.Logf("the log:\n%s", r.berth("logs", "box"))
			}
		}()
		eventually(t, 30*time.Second, fmt.Sprintf("%q is in the log %d times", what, times), func() bool {
			return strings.Count(r.berth("logs", "box"), what) == times
		})
	}
	b.do("systemctl", "start", "berthd")
	said("line 100\n", 1)
	r.server.kill()
	b.do("systemctl", "poweroff", "--no-block") // the start script still runs
	b.off()

	r.serve()
	b.powerOn()
	b.do("systemctl", "start", "berthd")
	said(ended, 1)
	said("line 100\n", 2)
	r.server.kill()
	b.do("touch", "/var/tmp/go")
	eventually(t, 20*time.Second, "the start script has ended", func() bool { return exists(filepath.Join(b.root, "var/tmp/done")) })
	b.cutPower()
	if err := os.Remove(filepath.Join(b.root, "var/tmp/done")); err != nil {
		t.Fatal(err)
	}

	r.serve()
	b.powerOn()
	b.do("systemctl", "start", "berthd")
	said("line 200\n", 2)
	var got, want []string
	for line := range strings.Lines(r.berth("logs", "box")) {
		if m := numberedLine.FindStringSubmatch(strings.TrimSpace(line)); m != nil {
			got = append(got, m[1])
		}
	}
	for _, last := range []int{100, 200, 200} {
		for i := range last {
			want = append(want, fmt.Sprint(i+1))
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("the lines of three boots are %v", got)
	}

	b.do("systemctl", "poweroff", "--no-block")
	b.off()
	said(ended, 2)
	if got := r.status(); !strings.Contains(got, "off") {
		t.Errorf("the workspace is not off:\n%s", got)
	}
}
