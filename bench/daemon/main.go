// Command daemon measures berthd as it is shipped: size, time from exec to ready, resident memory
// and CPU when idle, and both during a transfer at full speed. It starts a control server of its own on loopback and prints a table.
//
//	go run ./bench/daemon [-idle 60s] [-rounds 7]
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/berthd/berth/bench/lab"
)

func main() {
	idle := flag.Duration("idle", time.Minute, "how long after ready memory is read; CPU is counted over the next 30 s")
	rounds := flag.Int("rounds", 7, "how often exec to ready is measured")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := measure(ctx, *idle, *rounds); err != nil {
		fmt.Fprintln(os.Stderr, "bench/daemon:", err)
		os.Exit(1)
	}
}

func measure(ctx context.Context, idle time.Duration, rounds int) error {
	dir, err := os.MkdirTemp("", "berth-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := lab.Build(ctx, dir); err != nil {
		return err
	}
	size, err := os.Stat(filepath.Join(dir, "berthd"))
	if err != nil {
		return err
	}
	server, err := serve(ctx, dir)
	if err != nil {
		return err
	}
	defer server.stop()

	var ready []time.Duration
	for range rounds {
		d, err := start(ctx, dir, server)
		if err != nil {
			return err
		}
		ready = append(ready, d.ready)
		if err := d.stop(); err != nil {
			return err
		}
	}
	slices.Sort(ready)

	d, err := start(ctx, dir, server)
	if err != nil {
		return err
	}
	defer d.stop()
	if err := lab.Pause(ctx, idle); err != nil {
		return err
	}
	resident, err := lab.Resident(d.cmd.Process.Pid)
	if err != nil {
		return err
	}
	anonymous, err := lab.Anonymous(d.cmd.Process.Pid)
	if err != nil {
		return err
	}
	host, err := lab.Resident(d.ptyhost())
	if err != nil {
		return err
	}
	before, err := lab.Processor(d.cmd.Process.Pid)
	if err != nil {
		return err
	}
	const window = 30 * time.Second
	if err := lab.Pause(ctx, window); err != nil {
		return err
	}
	after, err := lab.Processor(d.cmd.Process.Pid)
	if err != nil {
		return err
	}

	speed, err := server.berth(ctx, dir, "speedtest", server.agent)
	if err != nil {
		return err
	}
	peak, err := lab.Peak(d.cmd.Process.Pid)
	if err != nil {
		return err
	}

	fmt.Println("| what | figure |")
	fmt.Println("|---|---|")
	fmt.Printf("| berthd, stripped | %.1f MB |\n", float64(size.Size())/1e6)
	fmt.Printf("| exec to ready, %d rounds | median %v (%v-%v) |\n", rounds, ms(ready[len(ready)/2]), ms(ready[0]), ms(ready[len(ready)-1]))
	fmt.Printf("| resident %v after ready, `berthd run` | %.1f MB (%.1f MB anonymous) |\n", idle, resident, anonymous)
	fmt.Printf("| resident %v after ready, `berthd-ptyhost` without a terminal | %.1f MB |\n", idle, host)
	fmt.Printf("| idle CPU in %v | %v |\n", window, after-before)
	fmt.Printf("| peak resident, `berthd run`, after `berth speedtest` both ways | %.1f MB |\n", peak)
	for _, line := range strings.Split(strings.TrimSpace(speed), "\n") {
		fmt.Printf("| `berth speedtest` | %s |\n", strings.Join(strings.Fields(line), " "))
	}
	return nil
}

func ms(d time.Duration) time.Duration { return d.Round(time.Millisecond) }

var tokenPattern = regexp.MustCompile(`[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}`)

// server is a control server with one agent declared.
type server struct {
	url, key, agent, token string
	stop                   func()
}

// berth runs the command line as the server's admin.
func (s *server) berth(ctx context.Context, dir string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(dir, "berth"), args...)
	cmd.Env = append(os.Environ(), "BERTH_URL="+s.url, "BERTH_TOKEN="+s.key)
	out, err := cmd.Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		err = fmt.Errorf("berth %q: %w: %s", args, err, exit.Stderr)
	}
	return string(out), err
}

func serve(ctx context.Context, dir string) (*server, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	addr := l.Addr().String()
	l.Close()
	data := filepath.Join(dir, "data")
	process := exec.Command(filepath.Join(dir, "berth"), "serve", "--listen", addr, "--data-dir", data)
	process.Env = append(os.Environ(), "XDG_CONFIG_HOME="+dir)
	var log bytes.Buffer
	process.Stderr = &log
	if err := process.Start(); err != nil {
		return nil, err
	}
	s := &server{url: "http://" + addr, agent: "bench", stop: func() {
		process.Process.Signal(syscall.SIGTERM)
		process.Wait()
	}}
	for range 100 { // 10 s
		if key, err := os.ReadFile(filepath.Join(data, "admin-key")); err == nil {
			s.key = strings.TrimSpace(string(key))
			out, err := s.berth(ctx, dir, "agent", "create", s.agent)
			if s.token = tokenPattern.FindString(out); err == nil && s.token != "" {
				return s, nil
			}
		}
		if err := lab.Pause(ctx, 100*time.Millisecond); err != nil {
			s.stop()
			return nil, err
		}
	}
	s.stop()
	return nil, fmt.Errorf("the server did not start in 10 s:\n%s", &log)
}

type daemon struct {
	cmd   *exec.Cmd
	state string
	ready time.Duration
}

// start runs berthd on a fresh state directory until it says that it is ready.
func start(ctx context.Context, dir string, server *server) (*daemon, error) {
	state, err := os.MkdirTemp(dir, "s")
	if err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	d := &daemon{cmd: exec.Command(filepath.Join(dir, "berthd"), "run", "--state-dir", state, "--status-json", "3"), state: state}
	d.cmd.ExtraFiles = []*os.File{w}
	d.cmd.Env = append(os.Environ(), "BERTH_URL="+server.url, "BERTH_TOKEN="+server.token)
	var log bytes.Buffer
	d.cmd.Stderr = &log
	begun := time.Now()
	if err := d.cmd.Start(); err != nil {
		return nil, err
	}
	w.Close()
	stop := context.AfterFunc(ctx, func() { d.cmd.Process.Kill() })
	defer stop()
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		var event struct{ Step string }
		if json.Unmarshal(lines.Bytes(), &event) == nil && event.Step == "ready" {
			d.ready = time.Since(begun)
			return d, nil
		}
	}
	d.cmd.Process.Kill()
	return nil, fmt.Errorf("berthd ended before it was ready: %w\n%s", d.cmd.Wait(), &log)
}

func (d *daemon) stop() error {
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	return d.cmd.Wait()
}

// ptyhost finds the process of the terminals, which belongs to this daemon's state directory.
func (d *daemon) ptyhost() int {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		cmdline, err := os.ReadFile(dir + "/cmdline")
		if err == nil && bytes.Contains(cmdline, []byte("\x00--socket\x00")) && bytes.Contains(cmdline, []byte(d.state)) {
			pid, _ := strconv.Atoi(filepath.Base(dir))
			return pid
		}
	}
	return 0
}
