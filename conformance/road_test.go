package conformance

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/google/uuid"
)

// TestRoadSecondAgent is the road with an agent of our own making: the server takes it, and the people's
// command line reaches it.
func TestRoadSecondAgent(t *testing.T) {
	w := stage(t)
	a := w.agent(t, "second")
	g := w.runAgent(t, a)
	if got := uuidText(g.id); got != a.id {
		t.Fatalf("the agent is %s here and %s there", got, a.id)
	}
	eventually(t, "the server calls the agent connected", func() bool {
		v := request(t, "GET", w.url+"/api/v2/workspaceagents/"+a.id, w.key, nil).json(t)
		return v["status"] == "connected" && v["lifecycle_state"] == "ready" && v["version"] == "v9.8.7+second"
	})
	out, err := w.berth(t, "", "ssh", "second", "echo over $((40+2))")
	if err != nil || strings.TrimSpace(out) != "over 42" {
		t.Errorf("berth ssh printed %q, %v", out, err)
	}
	if _, err := w.berth(t, "", "ssh", "second", "exit 7"); err == nil || !strings.Contains(err.Error(), "exit status 7") {
		t.Errorf("berth ssh with a command that exits 7: %v", err)
	}
	out, err = w.berth(t, "", "ports", "second")
	if err != nil || !strings.Contains(out, "4321") {
		t.Errorf("berth ports printed %q, %v", out, err)
	}
	out, err = w.berth(t, "", "ping", "second")
	if err != nil {
		t.Errorf("berth ping printed %q, %v", out, err)
	}
	out, err = w.berth(t, "", "status", "second")
	if err != nil || !strings.Contains(out, "9.8.7") {
		t.Errorf("berth status printed %q, %v", out, err)
	}
	cmd := w.command([]string{"BERTH_URL=" + w.url, "BERTH_TOKEN=" + w.key}, "berth", "shell", "second")
	terminal, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 24, Cols: 80})
	if err != nil {
		t.Fatal(err)
	}
	defer terminal.Close()
	stop := time.AfterFunc(patience, func() { cmd.Process.Kill() })
	defer stop.Stop()
	if _, err := io.WriteString(terminal, "echo $((6*7))-shell\r"); err != nil {
		t.Fatal(err)
	}
	readWords(t, terminal, "42-shell")
	io.WriteString(terminal, "exit\r")
	go io.Copy(io.Discard, terminal)
	if err := cmd.Wait(); err != nil {
		t.Errorf("berth shell: %v", err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	local := l.Addr().String()
	l.Close()
	_, remote, _ := net.SplitHostPort(echoServer(t, "tcp", "127.0.0.1:0"))
	_, port, _ := net.SplitHostPort(local)
	w.machine.startFor(t, []string{"BERTH_URL=" + w.url, "BERTH_TOKEN=" + w.key}, "berth", "forward", "second", port+":"+remote)
	var conn net.Conn
	eventually(t, "berth forward listens", func() bool {
		conn, err = net.Dial("tcp", local)
		return err == nil
	})
	conn.SetDeadline(time.Now().Add(patience))
	wantEcho(t, conn)
}

// TestRoadSecondClient is the road with a client of our own making, to berthd under berth serve.
func TestRoadSecondClient(t *testing.T) {
	w := stage(t)
	a := w.berthd(t)
	c := w.connect(t, a)
	session, err := c.ssh(1).NewSession()
	if err != nil {
		t.Fatal(err)
	}
	out, err := session.Output("echo $((6*7)) $CODER_WORKSPACE_AGENT_NAME $EDITOR")
	if err != nil || string(out) != "42 full vim\n" {
		t.Errorf("a command over SSH printed %q, %v", out, err)
	}
	conn := c.pty(fmt.Sprintf(`{"ID":%q,"Height":24,"Width":80,"Command":"/bin/sh"}`, uuid.NewString()))
	say(t, conn, map[string]any{"data": "echo $((6*7))-typed\r"})
	readUntil(t, conn, "42-typed")
	conn.Close()

	client, base := c.http()
	resp, err := client.Get(base + "/api/v0/listening-ports")
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	if resp.StatusCode != 200 || !bytes.Contains(body, []byte(`"ports":`)) {
		t.Errorf("listening ports: %d %s", resp.StatusCode, body)
	}
}

// berthd runs the built agent on the shared stage as the agent "full", once for all tests that need one.
func (w *world) berthd(t *testing.T) identity {
	t.Helper()
	shared.Lock()
	defer shared.Unlock()
	if sharedAgent.id != "" {
		return sharedAgent
	}
	a := w.agent(t, "full")
	w.machine.start([]string{"BERTH_URL=" + w.url, "BERTH_TOKEN=" + a.token, "BERTH_LOG_LEVEL=debug"}, "berthd", "run", "--state-dir", filepath.Join(w.home, "state"))
	eventually(t, "berthd is ready", func() bool {
		v := request(t, "GET", w.url+"/api/v2/workspaceagents/"+a.id, w.key, nil).json(t)
		return v["status"] == "connected" && v["lifecycle_state"] == "ready"
	})
	sharedAgent = a
	return a
}

var sharedAgent identity

// readUntil reads until the words have come.
func readUntil(t testing.TB, conn net.Conn, words string) string {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(patience))
	defer conn.SetReadDeadline(time.Time{})
	var seen []byte
	b := make([]byte, 1) // not a byte more than the words, so that the next call goes on from there
	for !bytes.HasSuffix(seen, []byte(words)) {
		if _, err := conn.Read(b); err != nil {
			t.Fatalf("read %q, then %v, and no %q", seen, err, words)
		}
		seen = append(seen, b[0])
	}
	return string(seen)
}

// TestRoadStock is the road of berthd under a small control server of an exact version, with a client of
// our own making: nothing of it is berth serve's.
func TestRoadStock(t *testing.T) {
	for _, minor := range []int{0, 6, 10} {
		t.Run(fmt.Sprintf("2.%d", minor), func(t *testing.T) {
			s := newStock(t, minor)
			s.berthd(t)
			startup := sub(s.awaits(t, "UpdateStartup", nil), "startup")
			if !semver.MatchString(text(startup, "version")) {
				t.Errorf("the version is %q, not vX.Y.Z", text(startup, "version"))
			}
			s.awaits(t, "UpdateLifecycle", func(r m) bool { return num(sub(r, "lifecycle"), "state") == 5 })
			c := s.world().connect(t, s.agent)
			session, err := c.ssh(1).NewSession()
			if err != nil {
				t.Fatal(err)
			}
			out, err := session.Output("echo $FROM_TEMPLATE")
			if err != nil || string(out) != "yes:root\n" {
				t.Errorf("a command over SSH printed %q, %v", out, err)
			}
			conn := c.pty(fmt.Sprintf(`{"ID":%q,"Height":24,"Width":80,"Command":"echo in a terminal; sleep 60"}`, uuid.NewString()))
			readUntil(t, conn, "in a terminal")
			conn.Close()

			// The duties that a server of this version knows are done, and none that it does not know.
			duties := []string{"BatchCreateLogs", "UpdateStats", "BatchUpdateMetadata", "BatchUpdateAppHealths", "StreamDERPMaps", "GetServiceBanner"}
			if minor > 0 {
				duties = append(duties, "GetAnnouncementBanners", "ScriptCompleted", "ReportConnection", "GetResourcesMonitoringConfiguration", "PushResourcesMonitoringUsage")
				duties = deleteString(duties, "GetServiceBanner")
			}
			var missing []string
			defer func() {
				if t.Failed() {
					t.Logf("berthd called %v, not %v", s.methods(), missing)
				}
			}()
			eventually(t, "all duties are done", func() bool {
				missing = nil
				for _, duty := range duties {
					if len(s.called(duty)) == 0 {
						missing = append(missing, duty)
					}
				}
				return missing == nil
			})
			for _, name := range s.methods() {
				if since[name] > minor {
					t.Errorf("berthd calls %s, which a server of 2.%d does not have", name, minor)
				}
				if strings.HasPrefix(name, "broken") || name == "RefreshResumeToken" || name == "WorkspaceUpdates" {
					t.Errorf("berthd calls %s", name)
				}
			}
			// The first dial asks for 2.10 and is told better; what was told is remembered.
			startups := len(s.called("UpdateStartup"))
			s.drop()
			eventually(t, "berthd is back", func() bool { return len(s.called("UpdateStartup")) > startups })
			s.mu.Lock()
			var asked []string
			for _, d := range s.dials {
				asked = append(asked, d.URL.Query().Get("version"))
				if minor == 10 && d.URL.Query().Get("role") != "agent" {
					t.Errorf("the dial's role is %q", d.URL.Query().Get("role"))
				}
			}
			s.mu.Unlock()
			version := fmt.Sprintf("2.%d", minor)
			want := []string{"2.10", version}
			if minor < 10 {
				want = append(want, version)
			}
			if fmt.Sprint(asked) != fmt.Sprint(want) {
				t.Errorf("berthd dialed with %v, not %v", asked, want)
			}
		})
	}
}

func deleteString(all []string, s string) []string {
	var rest []string
	for _, x := range all {
		if x != s {
			rest = append(rest, x)
		}
	}
	return rest
}
