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

// TestLastStatusArrives: twenty programs report a hundred statuses a second, by curl and by berthd report. The
// server is gone from a third of the time on, and berthd is killed in the middle of that and when all have said
// their last. What each was last told to be accepted arrives.
func TestLastStatusArrives(t *testing.T) {
	const programs = 20
	lasting := 3 * time.Second
	if os.Getenv("BERTH_LONG") != "" {
		lasting = time.Minute
	}
	var config strings.Builder
	config.WriteString("agents:\n  - name: box\n    apps:\n")
	for i := range programs {
		fmt.Fprintf(&config, "      - {slug: app-%d, url: \"http://127.0.0.1:1\"}\n", i)
	}
	r := newRoad(t, config.String())
	r.run()
	r.waitConnected(20 * time.Second)
	watch := r.pipe("status", "box", "--watch", "--output", "json")
	waitFor(t, watch, `"name":"app-0"`)
	socket := filepath.Join(r.home, "state", "berthd.sock")

	// A program notes what was accepted, behind each report. Its last word is another state.
	program := r.home + "/program"
	if err := os.WriteFile(program, []byte(`
report() {
	if [ $((app % 10)) = 9 ]; then
		berthd report --app app-$app --state $1 --message $2 2>/dev/null
	else
		[ "$(curl -s -m 10 -o /dev/null -w '%{http_code}' --unix-socket $BERTH_SOCKET http://berthd/v1/app-status \
			-d "{\"app_slug\":\"app-$app\",\"state\":\"$1\",\"message\":\"$2\"}")" = 202 ]
	fi
}
app=$1 n=0
while [ $SECONDS -lt $2 ]; do
	n=$((n + 1))
	report working $n && echo "working $n" >>accepted-$app
	sleep 0.2
done
until report complete $n; do sleep 0.1; done
echo "complete $n" >>accepted-$app
`), 0o600); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	var running []*daemon
	for i := range programs {
		running = append(running, r.start("bash", []string{"BERTH_SOCKET=" + socket}, program, fmt.Sprint(i), fmt.Sprint(int(lasting.Seconds()))))
	}
	after := func(part time.Duration) { time.Sleep(time.Until(began.Add(lasting * part / 3))) }
	after(1)
	r.server.stop(syscall.SIGKILL, 20*time.Second)
	after(2)
	again := func() {
		r.agent.stop(syscall.SIGKILL, 20*time.Second)
		r.run()
	}
	again()
	for _, p := range running {
		select {
		case <-p.done:
		case <-time.After(lasting + time.Minute):
			t.Fatalf("a program goes on and on:\n%s", p.output())
		}
	}
	took := time.Since(began)
	again()
	r.serve()

	want, reports := map[string]string{}, 0
	for i := range programs {
		text, err := os.ReadFile(filepath.Join(r.home, fmt.Sprintf("accepted-%d", i)))
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		reports += len(lines)
		want[fmt.Sprintf("app-%d", i)] = lines[len(lines)-1]
	}
	t.Logf("%d reports were accepted in %v", reports, took.Round(time.Millisecond))
	var late map[string]string
	eventually(t, 60*time.Second, "the last status of each program arrives", func() bool {
		var status struct {
			Apps []struct {
				Slug     string
				Statuses []struct{ State, Message string }
			}
		}
		if out, err := r.client("status", "box", "--output", "json").Output(); err != nil || json.Unmarshal(out, &status) != nil {
			return false
		}
		late = map[string]string{}
		for _, app := range status.Apps {
			got := "nothing"
			if len(app.Statuses) > 0 {
				got = app.Statuses[0].State + " " + app.Statuses[0].Message
			}
			if got != want[app.Slug] {
				late[app.Slug] = got + ", want " + want[app.Slug]
			}
		}
		return len(status.Apps) == programs && len(late) == 0
	})
	// Who watches saw it too, though the server went away.
	waitFor(t, watch, `"name":"app-0","state":"complete"`)
	if history := r.berth("status", "box", "--app", "app-0"); !strings.Contains(history, "working") || !strings.Contains(history, "complete") {
		t.Errorf("the history of an app:\n%s", history)
	}
}
