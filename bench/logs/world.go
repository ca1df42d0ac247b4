package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/berthd/berth/bench/lab"
)

// patience bounds each wait for lines that are still to come.
const patience = 10 * time.Minute

// world is an agent whose start script runs what it is asked to, and its server.
type world struct {
	*lab.World
	ask, done string // named pipes to and from the script
	ours      []int  // berthd, and what holds the script
}

func start(ctx context.Context, bin, dir string) (*world, error) {
	w := &world{ask: filepath.Join(dir, "ask"), done: filepath.Join(dir, "done")}
	for _, path := range []string{w.ask, w.done} {
		if err := syscall.Mkfifo(path, 0o600); err != nil {
			return nil, err
		}
	}
	var err error
	w.World, err = lab.Start(ctx, bin, dir, fmt.Sprintf(`    scripts:
      - display_name: writer
        run_on_start: true
        log_path: %s/raw
        script: while read -r line <%s; do eval "$line"; :>%s; done
`, dir, w.ask, w.done))
	return w, err
}

// spent is what some lines took.
type spent struct {
	written, delivered time.Duration // until the program had printed all of them, and until they had arrived
	processor          time.Duration
	peak               float64 // memory in MB
}

// deliver has the script run a command that prints so many bytes beside its line ends, and waits until they are on the server. Each
// is there once when their sum is right.
func (w *world) deliver(command string, size int64) (spent, error) {
	before, err := w.processor()
	for _, pid := range w.ours {
		err = errors.Join(err, lab.ForgetPeak(pid))
	}
	var had int64
	if err == nil {
		had, err = w.length()
	}
	if err != nil {
		return spent{}, err
	}
	begun := time.Now()
	if err := os.WriteFile(w.ask, []byte(command+"\n"), 0); err != nil {
		return spent{}, err
	}
	if _, err := os.ReadFile(w.done); err != nil {
		return spent{}, err
	}
	s := spent{written: time.Since(begun)}
	for has := had; has < had+size; {
		if time.Since(begun) > patience {
			return s, fmt.Errorf("%d of %d bytes arrived in %v", has-had, size, patience)
		}
		if err := lab.Pause(w.Ctx, 20*time.Millisecond); err != nil {
			return s, err
		}
		if has, err = w.length(); err != nil {
			return s, err
		}
		if has > had+size {
			return s, fmt.Errorf("%d bytes arrived, the script printed %d", has-had, size)
		}
	}
	s.delivered = time.Since(begun)
	after, err := w.processor()
	for _, pid := range w.ours {
		peak, peakErr := lab.Peak(pid)
		s.peak, err = s.peak+peak, errors.Join(err, peakErr)
	}
	s.processor = after - before
	return s, err
}

// processor is the time that our processes have taken.
func (w *world) processor() (total time.Duration, err error) {
	for _, pid := range w.ours {
		one, oneErr := lab.Processor(pid)
		total, err = total+one, errors.Join(err, oneErr)
	}
	return total, err
}

// find finds our processes: berthd, and its child that holds the script.
func (w *world) find() error {
	w.ours = []int{w.Agent.Process.Pid}
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", w.Agent.Process.Pid))
	if err != nil {
		return err
	}
	for _, list := range lists {
		children, err := os.ReadFile(list)
		if err != nil {
			continue // a thread that has ended
		}
		for _, child := range strings.Fields(string(children)) {
			cmdline, err := os.ReadFile(filepath.Join("/proc", child, "cmdline"))
			if err != nil || !strings.Contains(string(cmdline), "\x00--script\x00") && !strings.Contains(string(cmdline), "\x00hold-script\x00") {
				continue
			}
			pid, err := strconv.Atoi(child)
			if err != nil {
				return err
			}
			w.ours = append(w.ours, pid)
		}
	}
	if len(w.ours) != 2 {
		return fmt.Errorf("%d processes hold the script, want one", len(w.ours)-1)
	}
	return nil
}

// variable returns a variable of the environment in which berth reaches the server.
func (w *world) variable(name string) string {
	for _, v := range w.Env {
		if value, ok := strings.CutPrefix(v, name+"="); ok {
			return value
		}
	}
	return ""
}

func (w *world) get(path string, into any) error {
	req, err := http.NewRequestWithContext(w.Ctx, http.MethodGet, w.variable("BERTH_URL")+path, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Coder-Session-Token", w.variable("BERTH_TOKEN"))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", path, resp.Status)
	}
	return json.NewDecoder(resp.Body).Decode(into)
}

// length is how many bytes the agent has logged.
func (w *world) length() (int64, error) {
	var agents []struct {
		ID string `json:"id"`
	}
	if err := w.get("/api/v2/berth/agents", &agents); err != nil {
		return 0, err
	}
	var agent struct {
		Length int64 `json:"logs_length"`
	}
	err := w.get("/api/v2/workspaceagents/"+agents[0].ID, &agent)
	return agent.Length, err
}

// inOrder checks that what the server keeps of the last round is in order and whole.
func (w *world) inOrder(lines int) error {
	cmd := exec.CommandContext(w.Ctx, filepath.Join(w.Bin, "berth"), "logs", "bench", "--output", "json")
	cmd.Env = w.Env
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	last := -1
	for lines := json.NewDecoder(bufio.NewReader(out)); ; {
		var line struct {
			Output string `json:"output"`
		}
		if err := lines.Decode(&line); err == io.EOF {
			break
		} else if err != nil {
			return err
		}
		var n int
		if _, err := fmt.Sscan(line.Output, &n); err != nil || last >= 0 && n != 0 && n != last+1 {
			return fmt.Errorf("%q stands behind line %d", line.Output, last)
		}
		last = n
	}
	if err := cmd.Wait(); err != nil {
		return err
	}
	if last != lines-1 {
		return fmt.Errorf("the last line is %d of %d", last, lines)
	}
	return nil
}

// rsyslog follows files and passes their lines on over TCP, with a queue that goes to disk where it must.
type rsyslog struct {
	*world
	process *exec.Cmd
	arrived atomic.Int64 // lines
}

func (w *world) startRsyslog() (*rsyslog, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	r := &rsyslog{world: w}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go r.count(conn)
		}
	}()
	w.OnStop(func() { l.Close() })
	dir := filepath.Join(w.Dir, "rsyslog")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	config := fmt.Sprintf(`
global(workDirectory="%[1]s" maxMessageSize="32k")
module(load="imfile")
template(name="raw" type="string" string="%%msg%%\n")
ruleset(name="pass" queue.type="LinkedList" queue.filename="queue" queue.maxDiskSpace="64m" queue.saveOnShutdown="on") {
  action(type="omfwd" target="127.0.0.1" port="%[2]d" protocol="tcp" template="raw")
}
input(type="imfile" file="%[1]s/in-*" tag="bench" ruleset="pass")
`, dir, l.Addr().(*net.TCPAddr).Port)
	path := filepath.Join(dir, "config")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		return nil, err
	}
	r.process, err = w.Run("/usr/sbin/rsyslogd", nil, "-n", "-f", path, "-i", filepath.Join(dir, "pid"))
	return r, err
}

func (r *rsyslog) count(conn net.Conn) {
	defer conn.Close()
	buf := make([]byte, 256<<10)
	for {
		n, err := conn.Read(buf)
		r.arrived.Add(int64(strings.Count(string(buf[:n]), "\n")))
		if err != nil {
			return
		}
	}
}

// deliver has rsyslog find a file, and waits until its lines have arrived.
func (r *rsyslog) deliver(path string, round int, lines int64) (s spent, err error) {
	// It takes a second link to a file for the same file.
	text, err := os.ReadFile(path)
	if err != nil {
		return s, err
	}
	dir := filepath.Join(r.Dir, "rsyslog")
	if err := os.WriteFile(filepath.Join(dir, "next"), text, 0o600); err != nil {
		return s, err
	}
	before, err := lab.Processor(r.process.Process.Pid)
	if err != nil {
		return s, err
	}
	had := r.arrived.Load()
	begun := time.Now()
	if err := os.Rename(filepath.Join(dir, "next"), filepath.Join(dir, fmt.Sprint("in-", round))); err != nil {
		return s, err
	}
	for r.arrived.Load() < had+lines {
		if time.Since(begun) > patience {
			return s, fmt.Errorf("rsyslog: %d of %d lines arrived in %v", r.arrived.Load()-had, lines, patience)
		}
		if err := lab.Pause(r.Ctx, 20*time.Millisecond); err != nil {
			return s, err
		}
	}
	s.delivered = time.Since(begun)
	after, err := lab.Processor(r.process.Process.Pid)
	s.processor = after - before
	return s, err
}
