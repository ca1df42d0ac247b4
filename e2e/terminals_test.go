package e2e

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// long runs the variants that take minutes.
var long = os.Getenv("BERTH_LONG") != ""

// mesh is a client's way to the agent, which outlives berthd and the control server.
type mesh struct {
	r         *road
	pty, http string // addresses here of the agent's ports 2 and 4
}

func (r *road) mesh() *mesh {
	r.t.Helper()
	m := &mesh{r: r, pty: freeAddr(r.t), http: freeAddr(r.t)}
	_, pty, _ := net.SplitHostPort(m.pty)
	_, api, _ := net.SplitHostPort(m.http)
	cmd := r.client("forward", "box", pty+":2", api+":4")
	cmd.Stderr = r.t.Output()
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	eventually(r.t, 20*time.Second, "the agent's API answers", func() bool {
		_, err := m.list()
		return err == nil
	})
	return m
}

// terminalInfo is what the agent tells of a terminal.
type terminalInfo struct {
	Name, Running string
	PID, Viewers  int
	Exited        *struct{}
}

// list asks the agent for its terminals, by name.
func (m *mesh) list() (map[string]terminalInfo, error) {
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + m.http + "/api/v0/terminals")
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var body struct{ Terminals []terminalInfo }
	if err := json.NewDecoder(resp.Body).Decode(&body); err != nil || resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s %v", resp.Status, err)
	}
	all := map[string]terminalInfo{}
	for _, t := range body.Terminals {
		all[t.Name] = t
	}
	return all, nil
}

// terminalID makes an id of a name, as clients do.
func terminalID(name string) string {
	return fmt.Sprintf("7e571d00-0000-4000-8000-%12x", fmt.Sprintf("%6.6s", name))
}

// attach attaches to the terminal of a name, or opens it if there is a command.
func (m *mesh) attach(name, command string) (net.Conn, error) {
	return m.attachAs(stream{}, stream{}, name, command)
}

// stream is one connection to a terminal, by the name that its client gave it, and how many bytes of it came.
type stream struct {
	view string
	got  uint64
}

// attachAs is attach as a stream of its own that continues another.
func (m *mesh) attachAs(as, after stream, name, command string) (net.Conn, error) {
	conn, err := net.DialTimeout("tcp", m.pty, 5*time.Second)
	if err != nil {
		return nil, err
	}
	init, err := json.Marshal(map[string]any{"ID": terminalID(name), "Name": name, "Height": 24, "Width": 80, "Command": command,
		"Existing": command == "", "Ending": true, "View": as.view, "After": after.view, "Got": after.got})
	if err == nil {
		_, err = conn.Write(append(binary.LittleEndian.AppendUint16(nil, uint16(len(init))), init...))
	}
	if err != nil {
		conn.Close()
	}
	return conn, err
}

// see attaches until what is shown satisfies ok, and leaves.
func (m *mesh) see(name, command, input string, ok func(seen string) bool) {
	m.r.t.Helper()
	var seen string
	eventually(m.r.t, 30*time.Second, "terminal "+name+" shows what it should", func() bool {
		conn, err := m.attach(name, command)
		if err != nil {
			return false
		}
		defer conn.Close()
		data, err := json.Marshal(map[string]string{"data": input})
		if err != nil {
			m.r.t.Fatal(err)
		}
		seen = ""
		conn.SetDeadline(time.Now().Add(5 * time.Second))
		buf := make([]byte, 32<<10)
		for typed := false; ; {
			n, err := conn.Read(buf)
			seen += string(buf[:n])
			if ok(seen) {
				return true
			}
			if err != nil {
				m.r.t.Logf("terminal %s: %v after %q", name, err, seen)
				return false
			}
			if !typed && input != "" {
				conn.Write(data)
				typed = true
			}
		}
	})
}

// counted finds the numbers that the counters print.
var counted = regexp.MustCompile(`<(\d+)>`)

// maxTwice is how many numbers a connection may show again: those on the screen, and as many of a piece that arrived in part.
const maxTwice = 2 * 24

// counterViewer watches a counter and attaches again whenever the connection breaks, as what continues there. Each connection shows what
// scrolled off since, the screen and then what comes: every number once, in order, none missing since the connection before, and
// of what came before it no more than the screen.
type counterViewer struct {
	m    *mesh
	name string
	quit chan struct{}
	done chan struct{}

	before stream // the last connection that showed anything; only watch uses it

	mu       sync.Mutex
	conn     net.Conn
	last     int // the highest number seen
	attached int // how often
	wrong    []string
}

func (m *mesh) watchCounter(name string) *counterViewer {
	v := &counterViewer{m: m, name: name, quit: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(v.done)
		for {
			v.watch()
			select {
			case <-v.quit:
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	}()
	m.r.t.Cleanup(v.stop)
	return v
}

func (v *counterViewer) stop() {
	select {
	case <-v.quit:
	default:
		close(v.quit)
	}
	v.cut()
	<-v.done
}

// cut breaks the connection there is, as a client does that finds its agent gone.
func (v *counterViewer) cut() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.conn != nil {
		v.conn.Close()
	}
}

// watch follows one connection to its end.
func (v *counterViewer) watch() {
	is := stream{view: rand.Text()}
	conn, err := v.m.attachAs(is, v.before, v.name, "")
	if err != nil {
		return
	}
	defer conn.Close()
	defer func() {
		if is.got > 0 {
			v.before = is
		}
	}()
	v.mu.Lock()
	select {
	case <-v.quit:
		v.mu.Unlock()
		return
	default:
	}
	v.conn = conn
	v.mu.Unlock()
	var rest string
	buf := make([]byte, 32<<10)
	previous := 0
	for {
		// The counter never pauses that long; nothing at all means that the agent was not there yet.
		patience := 3 * time.Second
		if previous == 0 {
			patience = 1500 * time.Millisecond
		}
		conn.SetReadDeadline(time.Now().Add(patience))
		n, err := conn.Read(buf)
		is.got += uint64(n)
		rest += string(buf[:n])
		for {
			at := counted.FindStringSubmatchIndex(rest)
			if at == nil {
				break
			}
			number, _ := strconv.Atoi(rest[at[2]:at[3]])
			rest = rest[at[1]:]
			v.saw(number, previous)
			previous = number
		}
		if strings.Contains(rest, "berth-ending") {
			v.mu.Lock()
			v.wrong = append(v.wrong, fmt.Sprintf("%s was ended: %q", v.name, rest))
			v.mu.Unlock()
		}
		if err != nil {
			return
		}
	}
}

func (v *counterViewer) saw(number, previous int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	switch {
	case previous == 0:
		v.attached++
		if number > v.last+1 || number <= v.last-maxTwice {
			v.wrong = append(v.wrong, fmt.Sprintf("%s: attached again, the first number is %d after %d", v.name, number, v.last))
		}
	case number != previous+1:
		v.wrong = append(v.wrong, fmt.Sprintf("%s: %d follows %d in one connection", v.name, number, previous))
	}
	v.last = max(v.last, number)
}

func (v *counterViewer) state() (last, attached int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.last, v.attached
}

// follows waits until the viewer has seen new numbers on a connection newer than before.
func (v *counterViewer) follows(limit time.Duration, attached int) {
	v.m.r.t.Helper()
	from, _ := v.state()
	eventually(v.m.r.t, limit, v.name+" is followed again", func() bool {
		last, n := v.state()
		return n >= attached && last > from+5
	})
}

// build makes berthd say another version, as an upgrade does.
func (m *machine) build(version, to string) {
	m.t.Helper()
	cmd := exec.Command("go", "build", "-ldflags", "-X github.com/berthd/berth/internal/berthd.version="+version, "-o", to, "../cmd/berthd")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		m.t.Fatalf("cannot build: %v\n%s", err, out)
	}
}

// install copies programs into a folder of the machine, where they can be replaced.
func (m *machine) install(names ...string) (dir string) {
	m.t.Helper()
	dir = filepath.Join(m.home, "install")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		m.t.Fatal(err)
	}
	for _, name := range names {
		m.must("cp", filepath.Join(bin, name), dir)
	}
	return dir
}

// runFrom runs the berthd that was installed.
func (r *road) runFrom(dir string) {
	r.agent = r.start(filepath.Join(dir, "berthd"), []string{"BERTH_URL=" + r.url(), "BERTH_TOKEN=" + r.token}, "run", "--state-dir", filepath.Join(r.home, "state"))
}

// host finds the process that owns the terminals.
func (r *road) host() (pid int, cmdline string) {
	r.t.Helper()
	eventually(r.t, 20*time.Second, "there is a process that owns the terminals", func() bool {
		for _, p := range r.processes() {
			if strings.Contains(p, "--socket "+r.home) {
				id, rest, _ := strings.Cut(p, " ")
				pid, _ = strconv.Atoi(id)
				cmdline = rest
				return true
			}
		}
		return false
	})
	return pid, cmdline
}

// TestTerminalsSurvive is the restart test: twenty terminals with editors, a build, top and counters go on while berthd is
// killed again and again, is upgraded, and loses its server; who watches a counter sees every number once.
func TestTerminalsSurvive(t *testing.T) {
	kills := 2
	if long {
		kills = 50
	}
	r := newRoad(t, "agents:\n  - name: box\n")
	dir := r.install("berthd", "berthd-ptyhost")
	next := filepath.Join(dir, "next")
	r.build("v9.8.7-next", next)
	r.runFrom(dir)
	r.waitConnected(20 * time.Second)
	m := r.mesh()

	const counter = `n=0; while :; do n=$((n+1)); echo "<$n>"; sleep 0.02; done`
	const build = `n=0; while :; do n=$((n+1)); echo "int f(int x) { return x * $n; }" | gcc -c -x c -o built.o - && echo "<$n>"; sleep 0.1; done`
	commands := map[string]string{"build": build}
	for i := range 5 {
		commands[fmt.Sprintf("count%d", i)] = counter
		commands[fmt.Sprintf("vim%d", i)] = "exec vim -u NONE -n"
		commands[fmt.Sprintf("top%d", i)] = "exec top -d 1"
	}
	for i := range 4 {
		commands[fmt.Sprintf("shell%d", i)] = "exec bash --norc"
	}
	for name, command := range commands {
		input, want := "", ""
		switch name[:3] {
		case "cou", "bui":
			want = "<1>"
		case "vim":
			input, want = "itext of "+name, "text of "+name
		case "top":
			want = "load average"
		case "she":
			input, want = "mark=of-"+name+"; echo is-$mark\r", "is-of-"+name
		}
		m.see(name, command, input, func(seen string) bool { return strings.Contains(seen, want) })
	}
	before, err := m.list()
	if err != nil || len(before) != 20 {
		t.Fatalf("%d terminals: %v", len(before), err)
	}
	hostPID, _ := r.host()
	var viewers []*counterViewer
	for i := range 5 {
		viewers = append(viewers, m.watchCounter(fmt.Sprintf("count%d", i)))
	}
	viewers = append(viewers, m.watchCounter("build"))
	for _, v := range viewers {
		v.follows(30*time.Second, 1)
	}
	restart := func(round int, what string, end func()) {
		t.Helper()
		end()
		<-r.agent.done
		attached := make([]int, len(viewers))
		for i, v := range viewers {
			_, attached[i] = v.state()
			v.cut()
		}
		r.runFrom(dir)
		start := time.Now()
		for i, v := range viewers {
			v.follows(30*time.Second, attached[i]+1)
		}
		t.Logf("%s %d: all viewers follow after %v", what, round, time.Since(start).Round(time.Millisecond))
	}
	for i := range kills / 2 {
		restart(i, "kill", r.agent.kill)
	}

	if err := os.Rename(next, filepath.Join(dir, "berthd")); err != nil {
		t.Fatal(err)
	}
	restart(0, "upgrade", func() {
		if code := r.agent.stop(syscall.SIGHUP, 20*time.Second); code != 75 {
			t.Errorf("SIGHUP: exit code %d", code)
		}
	})
	r.agent.wait("v9.8.7-next", 20*time.Second)

	r.server.kill()
	for _, v := range viewers {
		v.follows(30*time.Second, 1)
	}
	r.serve()
	r.waitConnected(30 * time.Second)
	for i := range kills - kills/2 {
		restart(kills/2+i, "kill", r.agent.kill)
	}

	after, err := m.list()
	if err != nil {
		t.Fatal(err)
	}
	for name, was := range before {
		if is := after[name]; is.PID != was.PID || is.Exited != nil || syscall.Kill(is.PID, 0) != nil {
			t.Errorf("%s was %+v and is %+v", name, was, is)
		}
		switch name[:3] {
		case "vim":
			m.see(name, "", "\x1b:set ft?\r", func(seen string) bool {
				return strings.Contains(seen, "text of "+name) && strings.Contains(seen, "filetype=")
			})
		case "top":
			m.see(name, "", "", func(seen string) bool { return strings.Count(seen, "load average") > 1 })
		case "she":
			m.see(name, "", "echo still-$mark\r", func(seen string) bool { return strings.Contains(seen, "still-of-"+name) })
		}
	}
	if pid, _ := r.host(); pid != hostPID {
		t.Errorf("the terminals' process was %d and is %d", hostPID, pid)
	}
	for _, v := range viewers {
		v.stop()
		last, attached := v.state()
		t.Logf("%s: %d numbers over %d connections", v.name, last, attached)
		for _, wrong := range v.wrong {
			t.Error(wrong)
		}
	}
	if code := r.agent.stop(syscall.SIGTERM, 20*time.Second); code != 0 {
		t.Errorf("SIGTERM: exit code %d", code)
	}
	eventually(t, 5*time.Second, "the terminals ended with it", func() bool {
		return !slices.ContainsFunc(r.processes(), func(p string) bool { return strings.Contains(p, "ptyhost") || strings.Contains(p, "vim") })
	})
}

// resident is a process's memory in bytes.
func resident(t *testing.T, pid int) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if fields := strings.Fields(line); fields[0] == "VmRSS:" {
			kib, _ := strconv.Atoi(fields[1])
			return kib << 10
		}
	}
	t.Fatalf("no VmRSS: %s", status)
	return 0
}

// TestTerminalHost: the program beside berthd owns twenty idle terminals in less than 15 MB; without it berthd itself does the
// same, in more. A stop runs the stop scripts while terminals still live. Killed, it is replaced, and who was there is told.
func TestTerminalHost(t *testing.T) {
	for name, programs := range map[string][]string{"split": {"berthd", "berthd-ptyhost"}, "alone": {"berthd"}} {
		t.Run(name, func(t *testing.T) {
			r := newRoad(t, `
agents:
  - name: box
    scripts:
      - display_name: farewell
        run_on_stop: true
        script: if kill -0 $(cat $HOME/terminal); then echo alive; else echo dead; fi >$HOME/farewell
`)
			dir := r.install(programs...)
			r.runFrom(dir)
			r.waitConnected(20 * time.Second)
			m := r.mesh()
			for i := range 20 {
				m.see(fmt.Sprintf("idle%d", i), "exec bash --norc", "echo $$ >$HOME/terminal; echo up-$((40+2))\r", func(seen string) bool { return strings.Contains(seen, "up-42") })
			}
			pid, cmdline := r.host()
			if strings.Contains(cmdline, "berthd-ptyhost") != (name == "split") {
				t.Errorf("the terminals' process is %q", cmdline)
			}
			eventually(t, 10*time.Second, "nobody is attached", func() bool {
				all, err := m.list()
				if err != nil || len(all) != 20 {
					return false
				}
				for _, info := range all {
					if info.Viewers != 0 || info.Running != "bash --norc" {
						return false
					}
				}
				return true
			})
			size := resident(t, pid)
			t.Logf("%s: %.1f MB resident with 20 idle terminals", cmdline, float64(size)/1e6)
			if name == "split" && size > 15e6 {
				t.Errorf("%d bytes are resident, want less than 15 MB", size)
			}

			conn, err := m.attach("idle0", "")
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.SetReadDeadline(time.Now().Add(20 * time.Second))
			if _, err := conn.Read(make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			if seen, err := io.ReadAll(conn); err != nil || !strings.Contains(string(seen), "the process that owns the terminals was killed") {
				t.Errorf("who was there saw %q, %v", seen, err)
			}
			r.agent.wait("the process that owns the terminals was killed", 10*time.Second)
			m.see("again", "exec bash --norc", "echo $$ >$HOME/terminal; echo up-$((40+2))\r", func(seen string) bool { return strings.Contains(seen, "up-42") })
			if code := r.agent.stop(syscall.SIGTERM, 20*time.Second); code != 0 {
				t.Errorf("SIGTERM: exit code %d", code)
			}
			if got := read(t, filepath.Join(r.home, "farewell")); got != "alive\n" {
				t.Errorf("when the stop script ran, the terminal was %q", got)
			}
			eventually(t, 5*time.Second, "nothing is left", func() bool {
				return !slices.ContainsFunc(r.processes(), func(p string) bool { return strings.Contains(p, "bash --norc") || strings.Contains(p, "ptyhost") })
			})
		})
	}
}
