package conformance

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/crypto/ssh"
)

// dutyID makes the ids of the manifests below.
func dutyID(n int) []byte { return uuidBytes(fmt.Sprintf("5f3759df-0000-4000-8000-%012d", n)) }

// states are the lifecycle states that were reported, in order.
func (s *stockServer) states() []string {
	var all []string
	for _, r := range s.called("UpdateLifecycle") {
		all = append(all, enum("agent.Lifecycle.State", num(sub(r, "lifecycle"), "state")))
	}
	return all
}

func inState(state string) func(m) bool {
	return func(r m) bool { return enum("agent.Lifecycle.State", num(sub(r, "lifecycle"), "state")) == state }
}

// TestDuties is what berthd does under a server of 2.10: everything that rpc-agent.md §5 and
// agent-runtime.md ask of an agent.
func TestDuties(t *testing.T) {
	s := newStock(t, 10)
	motd := filepath.Join(t.TempDir(), "motd")
	if err := os.WriteFile(motd, []byte("line one\nline two\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.manifest["motd_path"] = motd
	s.manifest["vs_code_port_proxy_uri"] = "https://{{port}}--main--engine--ada.example.com"
	s.manifest["secrets"] = []m{{"env_name": "A_SECRET", "value": []byte("raw $HOME")}, {"file_path": "~/deep/secret-file", "value": []byte("in a file")}}
	s.manifest["scripts"] = []m{
		{"log_source_id": dutyID(2), "script": "echo begun; echo trouble >&2; printf 'no newline'", "run_on_start": true, "timeout": time.Minute, "id": dutyID(3)},
		{"log_source_id": dutyID(12), "script": "#!/bin/sh\necho by $0", "run_on_start": true, "id": dutyID(13)},
		{"log_source_id": dutyID(22), "script": "echo stopping", "run_on_stop": true, "id": dutyID(23)},
		{"log_source_id": dutyID(32), "script": "echo by the clock", "cron": "* * * * * *", "id": dutyID(33)},
	}
	s.manifest["metadata"] = []m{
		{"key": "fails", "script": "echo partly; exit 3", "interval": time.Duration(1)},
		{"key": "long", "script": "head -c 20000 /dev/zero | tr '\\0' x", "interval": time.Duration(1)},
		{"key": "slow", "script": "echo slow; sleep 30", "interval": time.Duration(3), "timeout": time.Duration(1)},
	}
	d := s.berthd(t)
	s.awaits(t, "UpdateLifecycle", inState("READY"))

	check(t, "berthd: order of a session", "manifest, startup, starting", func(t *testing.T) {
		s.mu.Lock()
		defer s.mu.Unlock()
		at := map[string]int{}
		for i, c := range s.calls {
			if _, ok := at[c.method]; !ok {
				at[c.method] = i
			}
			if strings.HasPrefix(c.method, "broken") {
				t.Error(c.method)
			}
		}
		if at["GetManifest"] > at["UpdateStartup"] || at["UpdateStartup"] > at["UpdateLifecycle"] {
			t.Errorf("the order is %v", at)
		}
	})
	check(t, "berthd: order of a session", "what startup says", func(t *testing.T) {
		v := sub(s.called("UpdateStartup")[0], "startup")
		if !semver.MatchString(text(v, "version")) || text(v, "expanded_directory") != "" || len(list(v, "subsystems")) != 0 {
			t.Errorf("%v", v)
		}
	})
	check(t, "berthd: lifecycle", "starting, ready, each once and with its time", func(t *testing.T) {
		if got := s.states(); fmt.Sprint(got) != "[STARTING READY]" {
			t.Errorf("the states are %v", got)
		}
		for _, r := range s.called("UpdateLifecycle") {
			if at := instant(sub(sub(r, "lifecycle"), "changed_at")); time.Since(at) > time.Hour || time.Since(at) < -time.Hour {
				t.Errorf("changed_at is %v", at)
			}
		}
	})
	check(t, "berthd: scripts and logs", "lines with their levels, under their source", func(t *testing.T) {
		want := []string{"INFO begun", "ERROR trouble", "INFO no newline"}
		eventually(t, "the lines of the start script", func() bool {
			var got []string
			for _, r := range s.called("BatchCreateLogs") {
				if bytes.Equal(blob(r, "log_source_id"), dutyID(2)) {
					for _, x := range list(r, "logs") {
						got = append(got, enum("agent.Log.Level", num(x.(m), "level"))+" "+text(x.(m), "output"))
					}
				}
			}
			slices.Sort(got)
			sorted := slices.Sorted(slices.Values(want))
			return slices.Equal(got, sorted)
		})
	})
	check(t, "berthd: scripts and logs", "a shebang chooses the interpreter", func(t *testing.T) {
		s.awaits(t, "BatchCreateLogs", func(r m) bool {
			return bytes.Equal(blob(r, "log_source_id"), dutyID(12)) && len(list(r, "logs")) > 0 && strings.HasPrefix(text(list(r, "logs")[0].(m), "output"), "by ")
		})
	})
	check(t, "berthd: scripts and logs", "timings of start and cron", func(t *testing.T) {
		for id, stage := range map[int]string{3: "START", 33: "CRON"} {
			r := sub(s.awaits(t, "ScriptCompleted", func(r m) bool { return bytes.Equal(blob(sub(r, "timing"), "script_id"), dutyID(id)) }), "timing")
			if enum("agent.Timing.Stage", num(r, "stage")) != stage || num(r, "status") != 0 || num(r, "exit_code") != 0 || instant(sub(r, "end")).Before(instant(sub(r, "start"))) || num(sub(r, "start"), "seconds") == 0 {
				t.Errorf("the timing is %v", r)
			}
		}
	})
	check(t, "berthd: stats", "first without, then with stats, at the server's interval", func(t *testing.T) {
		eventually(t, "three reports", func() bool { return len(s.called("UpdateStats")) >= 4 })
		for i, r := range s.called("UpdateStats") {
			if has(r, "stats") != (i > 0) {
				t.Errorf("report %d has stats: %v", i, has(r, "stats"))
			}
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		var last time.Time
		for _, c := range s.calls {
			if c.method == "UpdateStats" {
				if gap := c.at.Sub(last); !last.IsZero() && gap < time.Second {
					t.Errorf("reports are %v apart, the server wants 2 s", gap)
				}
				last = c.at
			}
		}
	})
	check(t, "berthd: stats", "latency is -0.001 ms while nobody answers", func(t *testing.T) {
		for _, r := range s.called("UpdateStats")[1:2] {
			if ms, _ := sub(r, "stats")["connection_median_latency_ms"].(float64); ms != -0.001 {
				t.Errorf("it is %v", ms)
			}
		}
	})
	check(t, "berthd: metadata", "failures, limits and timeouts are told in words", func(t *testing.T) {
		result := func(key string, holds func(m) bool) {
			t.Helper()
			var seen []m
			defer func() {
				if t.Failed() {
					t.Logf("%s: %.300v", key, seen)
				}
			}()
			eventually(t, "metadata "+key, func() bool {
				for _, r := range s.called("BatchUpdateMetadata") {
					for _, x := range list(r, "metadata") {
						if v := sub(x.(m), "result"); text(x.(m), "key") == key {
							if seen = append(seen, v); holds(v) {
								return true
							}
						}
					}
				}
				return false
			})
		}
		result("fails", func(v m) bool {
			return strings.TrimSpace(text(v, "value")) == "partly" && strings.Contains(text(v, "error"), "run cmd: exit status 3") && has(v, "collected_at")
		})
		result("long", func(v m) bool {
			return len(text(v, "value")) <= 10240 && strings.Contains(text(v, "error"), "output truncated from 20000 to 10240 bytes")
		})
		result("slow", func(v m) bool { return text(v, "error") != "" })
	})
	check(t, "berthd: app health", "what changed, and not what has no check", func(t *testing.T) {
		r := s.awaits(t, "BatchUpdateAppHealths", nil)
		all := list(r, "updates")
		if len(all) != 1 || !bytes.Equal(blob(all[0].(m), "id"), dutyID(4)) || num(all[0].(m), "health") != 3 {
			t.Errorf("the updates are %v", all)
		}
	})
	check(t, "berthd: resources", "whole windows, memory and volumes", func(t *testing.T) {
		points := list(s.awaits(t, "PushResourcesMonitoringUsage", nil), "datapoints")
		if len(points) != 2 {
			t.Fatalf("%d points, not the window of 2", len(points))
		}
		for _, x := range points {
			p := x.(m)
			vs := list(p, "volumes")
			if num(sub(p, "memory"), "total") == 0 || num(sub(p, "memory"), "used") > num(sub(p, "memory"), "total") || len(vs) != 1 || text(vs[0].(m), "volume") != "/" || num(vs[0].(m), "total") == 0 {
				t.Errorf("a point is %v", p)
			}
		}
		if instant(sub(points[1].(m), "collected_at")).Before(instant(sub(points[0].(m), "collected_at"))) {
			t.Error("the newest comes first")
		}
	})
	check(t, "berthd: reinit", "asked from the start, with wait and the token", func(t *testing.T) {
		eventually(t, "reinit is asked", func() bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			for _, r := range s.requests {
				if strings.HasSuffix(r.URL.Path, "/me/reinit") {
					return r.URL.Query().Get("wait") == "true" && r.Header.Get("Coder-Session-Token") == s.agent.token
				}
			}
			return false
		})
	})

	c := s.world().connect(t, s.agent)
	report := func(t *testing.T, kind, action string, known []byte) m {
		t.Helper()
		return sub(s.awaits(t, "ReportConnection", func(r m) bool {
			v := sub(r, "connection")
			return enum("agent.Connection.Type", num(v, "type")) == kind && enum("agent.Connection.Action", num(v, "action")) == action && (known == nil || bytes.Equal(known, blob(v, "id")))
		}), "connection")
	}
	for kind, session := range map[string]string{"SSH": "", "VSCODE": "VSCode"} {
		check(t, "berthd: connection reports", "of a session of "+kind, func(t *testing.T) {
			one, err := c.ssh(1).NewSession()
			if err != nil {
				t.Fatal(err)
			}
			if session != "" {
				one.Setenv("CODER_SSH_SESSION_TYPE", session)
			}
			one.Run("exit 5")
			begin := report(t, kind, "CONNECT", nil)
			if len(blob(begin, "id")) != 16 || text(begin, "ip") != c.node.addresses[0].String() || !has(begin, "timestamp") {
				t.Errorf("the connect is %v", begin)
			}
			if end := report(t, kind, "DISCONNECT", blob(begin, "id")); num(end, "status_code") != 5 {
				t.Errorf("the disconnect is %v", end)
			}
		})
	}
	check(t, "berthd: connection reports", "of a terminal", func(t *testing.T) {
		conn := c.pty(fmt.Sprintf(`{"ID":%q,"Height":24,"Width":80,"Command":"echo shown; sleep 60"}`, uuid.NewString()))
		readUntil(t, conn, "shown")
		begin := report(t, "RECONNECTING_PTY", "CONNECT", nil)
		conn.Close()
		report(t, "RECONNECTING_PTY", "DISCONNECT", blob(begin, "id"))
	})
	check(t, "berthd: banners", "banners and the message of the day, in shells with a terminal only", func(t *testing.T) {
		one, err := c.ssh(1).NewSession()
		if err != nil {
			t.Fatal(err)
		}
		out, _ := one.StdoutPipe()
		if err := one.RequestPty("xterm", 24, 80, ssh.TerminalModes{}); err != nil {
			t.Fatal(err)
		}
		if err := one.Shell(); err != nil {
			t.Fatal(err)
		}
		readWords(t, out, "first banner\r\n\r\n", "second banner\r\n\r\n", "line one\r\n", "line two\r\n")
		one.Close()
		two, err := c.ssh(1).NewSession()
		if err != nil {
			t.Fatal(err)
		}
		if b, err := two.CombinedOutput("true"); err != nil || len(b) != 0 {
			t.Errorf("a command prints %q, %v", b, err)
		}
	})
	check(t, "berthd: environment", "template, secrets, the server's address", func(t *testing.T) {
		one, err := c.ssh(1).NewSession()
		if err != nil {
			t.Fatal(err)
		}
		out, err := one.Output(`echo "$FROM_TEMPLATE|$A_SECRET|$CODER_AGENT_URL|$CODER_AGENT_TOKEN|$VSCODE_PROXY_URI|$CODER_WORKSPACE_NAME|$CODER_WORKSPACE_OWNER_NAME|$CODER_WORKSPACE_ID|$(cat ~/deep/secret-file)|$(stat -c %a ~/deep ~/deep/secret-file)"`)
		want := strings.Join([]string{"yes:root", "raw $HOME", s.http.URL, s.agent.token, "https://{{port}}--main--engine--ada.example.com", "engine", "ada", uuidText(dutyID(1)), "in a file", "700\n600\n"}, "|")
		got := strings.Replace(string(out), s.http.URL+"/|", s.http.URL+"|", 1) // a slash at the end is the same address
		if err != nil || got != want {
			t.Errorf("%q is not %q (%v)", got, want, err)
		}
	})
	check(t, "berthd: redial", "a session that survives, and no state twice", func(t *testing.T) {
		one, err := c.ssh(1).NewSession()
		if err != nil {
			t.Fatal(err)
		}
		in, _ := one.StdinPipe()
		out, _ := one.StdoutPipe()
		if err := one.Start("cat"); err != nil {
			t.Fatal(err)
		}
		io.WriteString(in, "before\n")
		readWords(t, out, "before\n")
		manifests := len(s.called("GetManifest"))
		s.drop()
		eventually(t, "berthd is back", func() bool { return len(s.called("GetManifest")) > manifests && len(s.called("UpdateStartup")) > 1 })
		io.WriteString(in, "after\n")
		readWords(t, out, "after\n")
		if got := s.states(); fmt.Sprint(got) != "[STARTING READY]" {
			t.Errorf("the states are %v", got)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, r := range s.dials {
			if r.URL.Query().Get("version") != "2.10" {
				t.Errorf("berthd dialed with %s", r.URL.Query().Get("version"))
			}
		}
	})
	check(t, "berthd: shutdown", "shutting down, stop scripts, off; clients are told; exit 0", func(t *testing.T) {
		eventually(t, "the coordination is up again", func() bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			p := s.peers[s.agent.id]
			return p != nil && p.node != nil
		})
		if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		select {
		case <-d.done:
		case <-time.After(patience):
			t.Fatal("it does not end")
		}
		if code := d.cmd.ProcessState.ExitCode(); code != 0 {
			t.Errorf("it exits with %d", code)
		}
		if got := s.states(); fmt.Sprint(got) != "[STARTING READY SHUTTING_DOWN OFF]" {
			t.Errorf("the states are %v", got)
		}
		stopped, told := false, false
		for _, r := range s.called("ScriptCompleted") {
			stopped = stopped || bytes.Equal(blob(sub(r, "timing"), "script_id"), dutyID(23)) && num(sub(r, "timing"), "stage") == 1
		}
		for _, r := range s.called("Coordinate") {
			told = told || has(r, "disconnect")
		}
		if !stopped || !told {
			t.Errorf("the stop script is reported: %v, the disconnect is sent: %v", stopped, told)
		}
		logged := false
		for _, r := range s.called("BatchCreateLogs") {
			logged = logged || bytes.Equal(blob(r, "log_source_id"), dutyID(22))
		}
		if !logged {
			t.Error("the stop script's line did not arrive")
		}
	})
}

// TestLifecycleErrors is how start and stop scripts that fail or hang show in the lifecycle.
func TestLifecycleErrors(t *testing.T) {
	for state, script := range map[string]m{
		"START_ERROR":   {"script": "exit 3", "run_on_start": true},
		"START_TIMEOUT": {"script": "sleep 100", "run_on_start": true, "timeout": time.Second},
	} {
		check(t, "berthd: lifecycle", state, func(t *testing.T) {
			t.Parallel()
			s := newStock(t, 10)
			script["id"], script["log_source_id"] = dutyID(3), dutyID(2)
			s.manifest["scripts"] = []m{script}
			s.berthd(t)
			s.awaits(t, "UpdateLifecycle", inState(state))
			r := sub(s.awaits(t, "ScriptCompleted", nil), "timing")
			status := enum("agent.Timing.Status", num(r, "status"))
			if state == "START_ERROR" && (status != "EXIT_FAILURE" || num(r, "exit_code") != 3) || state == "START_TIMEOUT" && status != "TIMED_OUT" {
				t.Errorf("the timing is %s, exit code %d", status, num(r, "exit_code"))
			}
		})
	}
	check(t, "berthd: lifecycle", "SHUTDOWN_ERROR", func(t *testing.T) {
		t.Parallel()
		s := newStock(t, 10)
		s.manifest["scripts"] = []m{{"id": dutyID(3), "log_source_id": dutyID(2), "script": "exit 4", "run_on_stop": true}}
		d := s.berthd(t)
		s.awaits(t, "UpdateLifecycle", inState("READY"))
		d.cmd.Process.Signal(syscall.SIGTERM)
		<-d.done
		if got := s.states(); fmt.Sprint(got) != "[STARTING READY SHUTTING_DOWN SHUTDOWN_ERROR]" {
			t.Errorf("the states are %v", got)
		}
	})
	check(t, "berthd: reinit", "a claimed workspace starts its agent anew", func(t *testing.T) {
		t.Parallel()
		s := newStock(t, 10)
		claim := make(chan struct{})
		s.reinit = func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/event-stream")
			w.WriteHeader(200)
			io.WriteString(w, "event: ping\n\n")
			w.(http.Flusher).Flush()
			select {
			case <-claim:
			case <-r.Context().Done():
				return
			}
			fmt.Fprintf(w, "event: data\ndata: {\"workspace_id\":%q,\"reason\":\"prebuild_claimed\",\"owner_id\":%q}\n\n", uuidText(dutyID(1)), uuidText(dutyID(9))) // the same owner again means nothing
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}
		s.berthd(t)
		s.awaits(t, "UpdateLifecycle", inState("READY"))
		close(claim)
		eventually(t, "the start scripts ran again", func() bool {
			n := 0
			for _, r := range s.called("ScriptCompleted") {
				if num(sub(r, "timing"), "stage") == 0 {
					n++
				}
			}
			return n == 2 && len(s.called("UpdateStartup")) == 2
		})
		stats := len(s.called("UpdateStats"))
		eventually(t, "it goes on", func() bool { return len(s.called("UpdateStats")) > stats+1 })
		if n := len(s.called("UpdateStartup")); n != 2 {
			t.Errorf("it began %d times", n)
		}
	})
}
