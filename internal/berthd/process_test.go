package berthd

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/berthd/berth/agent"
	"github.com/berthd/berth/ptyhost"
	"github.com/berthd/berth/wire"
)

// secretToken is given to every berthd under test and must show up nowhere.
const secretToken = "0d1e2f3a-planted-secret"

// daemon is a berthd in a process of its own.
type daemon struct {
	t     *testing.T
	cmd   *exec.Cmd
	lines chan string
	mu    sync.Mutex
	said  strings.Builder
	state string
}

// start runs berthd with a state directory of its own.
func start(t *testing.T, env []string, args ...string) *daemon {
	t.Helper()
	return launch(t, exec.Command(os.Args[0], args...), env)
}

// launch starts a command that becomes berthd.
func launch(t *testing.T, cmd *exec.Cmd, env []string) *daemon {
	t.Helper()
	d := &daemon{t: t, cmd: cmd, lines: make(chan string, 1000), state: shortTempDir(t)}
	d.cmd.Env = append([]string{
		envSelf + "=1", "PATH=" + os.Getenv("PATH"), "HOME=" + d.state, "BERTH_STATE_DIR=" + filepath.Join(d.state, "s"),
		"BERTH_TOKEN=" + secretToken,
	}, env...)
	out, err := d.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(d.lines)
		scan := bufio.NewScanner(out)
		for scan.Scan() {
			d.mu.Lock()
			fmt.Fprintln(&d.said, scan.Text())
			d.mu.Unlock()
			d.lines <- scan.Text()
		}
	}()
	t.Cleanup(func() {
		// Told to stop it takes its terminals along; killed it would leave them.
		d.cmd.Process.Signal(syscall.SIGTERM)
		killer := time.AfterFunc(20*time.Second, func() { d.cmd.Process.Kill() })
		d.wait()
		killer.Stop()
		// A test that ended it in another way leaves its terminals running; mostly nobody is there.
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_ = ptyhost.Dial(filepath.Join(d.state, "s", "ptyhost.sock")).Shutdown(ctx)
		if all := d.all(); strings.Contains(all, secretToken) || strings.Contains(all, "goroutine ") {
			t.Errorf("a secret or a stack trace was said:\n%s", all)
		}
	})
	return d
}

// shortTempDir is short enough for sockets in it.
func shortTempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "bd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func (d *daemon) all() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.said.String()
}

// says waits for a line that holds all of parts.
func (d *daemon) says(parts ...string) string {
	d.t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		select {
		case line, ok := <-d.lines:
			if !ok {
				d.t.Fatalf("ended without a line with %q:\n%s", parts, d.all())
			}
			missing := false
			for _, part := range parts {
				missing = missing || !strings.Contains(line, part)
			}
			if !missing {
				return line
			}
		case <-deadline:
			d.t.Fatalf("no line with %q:\n%s", parts, d.all())
		}
	}
}

// wait waits for the end and returns the exit code.
func (d *daemon) wait() int {
	for range d.lines {
	}
	d.cmd.Wait()
	return d.cmd.ProcessState.ExitCode()
}

// stop sends a signal and returns the exit code.
func (d *daemon) stop(sig syscall.Signal) int {
	d.t.Helper()
	if err := d.cmd.Process.Signal(sig); err != nil {
		d.t.Fatal(err)
	}
	return d.wait()
}

// answer is an API answer as control servers give it.
func answer(status int, message string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		json.NewEncoder(w).Encode(wire.Error{Message: message})
	}
}

// TestBadInput points berthd at real listeners that misbehave. Each must be told in one plain
// sentence with a fix, without a tight loop, and leave berthd running until it is told to stop.
func TestBadInput(t *testing.T) {
	var plainHits, tlsHits atomic.Int64
	count := func(hits *atomic.Int64, h http.HandlerFunc) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			hits.Add(1)
			h(w, r)
		})
	}
	plain := func(h http.HandlerFunc) string {
		srv := httptest.NewServer(count(&plainHits, h))
		t.Cleanup(srv.Close)
		return srv.URL
	}
	tlsServer := httptest.NewUnstartedServer(count(&tlsHits, answer(200, "ok")))
	tlsServer.Config.ErrorLog = nil
	tlsServer.StartTLS()
	t.Cleanup(tlsServer.Close)
	closed := func() string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		return "http://" + l.Addr().String()
	}()

	tests := map[string]struct {
		url  string
		want []string
	}{
		"https expected":  {strings.Replace(plain(answer(200, "ok")), "http:", "https:", 1), []string{"speaks plain http", "fix="}},
		"http to https":   {strings.Replace(tlsServer.URL, "https:", "http:", 1), []string{"speaks https", "fix="}},
		"unknown CA":      {tlsServer.URL, []string{"does not trust", "BERTH_CA_FILE"}},
		"html page":       {plain(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "<!DOCTYPE html><html>login</html>") }), []string{"HTML page", "fix="}},
		"redirect":        {plain(http.RedirectHandler("https://sso.example.com/login", http.StatusFound).ServeHTTP), []string{"redirects to https://sso.example.com", "fix="}},
		"refused port":    {closed, []string{"refused", "fix="}},
		"refused token":   {plain(answer(401, "Agent token is invalid.")), []string{"Agent token is invalid", "fix="}},
		"unknown agent":   {plain(answer(404, `Instance with id "i-1" not found.`)), []string{"not found", "fix="}},
		"ambiguous agent": {plain(answer(409, "Multiple agents found.")), []string{"Multiple agents", "BERTH_AGENT_NAME"}},
		"broken server":   {plain(answer(500, "Internal error.")), []string{"Internal error", "fix="}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := start(t, []string{"BERTH_URL=" + tt.url})
			d.says(append([]string{"level=WARN"}, tt.want...)...)
			if code := d.stop(syscall.SIGTERM); code != ExitOK {
				t.Errorf("exit code %d after SIGTERM, want 0:\n%s", code, d.all())
			}
			if n := strings.Count(d.all(), tt.want[0]); n != 1 {
				t.Errorf("said %d times within a moment, want once:\n%s", n, d.all())
			}
		})
	}
}

func TestExitOnRefused(t *testing.T) {
	srv := httptest.NewServer(answer(401, "Agent token is invalid."))
	defer srv.Close()
	d := start(t, []string{"BERTH_URL=" + srv.URL}, "--exit-on-refused")
	line := d.says("berthd:", "refused")
	if code := d.wait(); code != ExitRefused {
		t.Errorf("exit code %d, want %d", code, ExitRefused)
	}
	if !strings.Contains(line, "Agent token is invalid") {
		t.Errorf("said %q, want the server's reason", line)
	}
}

// TestHangupOfStockAgent: nothing starts an agent again that a stock start script started, so it stops.
func TestHangupOfStockAgent(t *testing.T) {
	srv := httptest.NewServer(answer(503, "Wait."))
	defer srv.Close()
	d := start(t, []string{"CODER_AGENT_URL=" + srv.URL}, "agent")
	d.says("level=WARN", "Wait")
	if code := d.stop(syscall.SIGHUP); code != ExitOK {
		t.Errorf("exit code %d after SIGHUP, want %d", code, ExitOK)
	}
}

// TestInPlace: another berthd takes the place of one in the same process, and waits for the children that it left.
func TestInPlace(t *testing.T) {
	srv := httptest.NewServer(answer(503, "Wait."))
	defer srv.Close()
	d := start(t, []string{"BERTH_URL=" + srv.URL})
	d.says("level=WARN", "Wait")
	pid := d.cmd.Process.Pid
	ask := func() (about agent.About) {
		t.Helper()
		eventually(t, "berthd tells about itself", func() bool { // its socket is made beside the first dial
			var err error
			about, err = agent.AskAbout(t.Context(), filepath.Join(d.state, "s", agent.LocalSocket))
			return err == nil
		})
		return about
	}
	if about := ask(); about.PID != pid || about.Version != version || about.Server != srv.URL || about.Reachable {
		t.Errorf("%+v, want process %d", about, pid)
	}
	for range 2 {
		if err := d.cmd.Process.Signal(syscall.SIGUSR2); err != nil {
			t.Fatal(err)
		}
		d.says("another berthd takes the place")
		d.says("level=WARN", "Wait")
	}
	if about := ask(); about.PID != pid {
		t.Errorf("process %d, want %d", about.PID, pid)
	}
	children, err := os.ReadFile(fmt.Sprintf("/proc/%[1]d/task/%[1]d/children", pid))
	if err != nil {
		t.Fatal(err)
	}
	hosts := strings.Fields(string(children))
	if len(hosts) != 1 {
		t.Fatalf("children %q, want the terminals' owner alone", children)
	}
	host, err := strconv.Atoi(hosts[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(host, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the dead child is gone", func() bool {
		_, err := os.Stat(fmt.Sprintf("/proc/%d", host))
		return errors.Is(err, fs.ErrNotExist)
	})
	environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil || strings.Count(string(environ), envInPlace) != 1 {
		t.Errorf("%v, %q", err, environ)
	}
}

func TestSecondBerthd(t *testing.T) {
	srv := httptest.NewServer(answer(503, "Wait."))
	defer srv.Close()
	first := start(t, []string{"BERTH_URL=" + srv.URL})
	first.says("level=WARN", "Wait") // the state is taken before the first dial
	second := start(t, []string{"BERTH_URL=" + srv.URL}, "--state-dir", filepath.Join(first.state, "s"))
	second.says("another berthd runs", fmt.Sprint(first.cmd.Process.Pid))
	if code := second.wait(); code != ExitBusy {
		t.Errorf("exit code %d, want %d", code, ExitBusy)
	}
	if code := first.stop(syscall.SIGHUP); code != ExitRestart {
		t.Errorf("exit code %d after SIGHUP, want %d", code, ExitRestart)
	}
}

func TestStateDirThatCannotBeMade(t *testing.T) {
	d := start(t, []string{"BERTH_URL=http://127.0.0.1:1"}, "--state-dir", "/dev/null/state")
	d.says("berthd:", "/dev/null")
	if code := d.wait(); code != ExitState {
		t.Errorf("exit code %d, want %d", code, ExitState)
	}
}

func TestStatusJSON(t *testing.T) {
	srv := httptest.NewServer(answer(409, "Multiple agents found."))
	defer srv.Close()
	file := filepath.Join(t.TempDir(), "status")
	d := start(t, []string{"BERTH_URL=" + srv.URL}, "--status-json", file)
	d.says("level=WARN", "Multiple")
	d.stop(syscall.SIGINT)
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var events []agent.Event
	for line := range strings.Lines(string(data)) {
		var e agent.Event
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("%v in %q", err, line)
		}
		events = append(events, e)
	}
	if len(events) < 2 || events[0].Step != agent.StepTrouble || events[0].Fix == "" || events[0].Time.IsZero() || events[len(events)-1].Step != agent.StepStopped {
		t.Errorf("events %+v", events)
	}
}

func TestReportWithoutBerthd(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), os.Args[0], "report", "--app", "x", "--message", "m")
	cmd.Env = []string{envSelf + "=1", "HOME=" + t.TempDir(), "BERTH_SOCKET=" + filepath.Join(t.TempDir(), "s")}
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState.ExitCode() != ExitNoAgent || !strings.Contains(string(out), "no berthd answers") {
		t.Errorf("%v: %s", err, out)
	}
}

// TestReport reports through the socket of a running berthd, as a program in the workspace would.
func TestReport(t *testing.T) {
	d := start(t, []string{"BERTH_URL=http://127.0.0.1:1"})
	d.says("level=WARN", "refused")
	socket := filepath.Join(d.state, "s", agent.LocalSocket)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for args, want := range map[string]int{
		"--state working": ExitOK,
		"--state asleep":  ExitUsage,
	} {
		cmd := exec.CommandContext(ctx, os.Args[0], append([]string{"report", "--app", "x", "--socket", socket}, strings.Fields(args)...)...)
		cmd.Env = []string{envSelf + "=1", "HOME=" + d.state}
		out, _ := cmd.CombinedOutput()
		if got := cmd.ProcessState.ExitCode(); got != want {
			t.Errorf("%s: exit code %d, want %d: %s", args, got, want, out)
		}
	}
}
