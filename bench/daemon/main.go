// Command daemon measures berthd as it is shipped: size, time from exec to ready, resident memory
// and CPU when idle, each beside OpenSSH's sshd, and both during a transfer at full speed. It starts a control server of its own on loopback and prints a table.
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
	size := func(program string) float64 {
		if !filepath.IsAbs(program) {
			program = filepath.Join(dir, program)
		}
		info, err := os.Stat(program)
		if err != nil {
			return 0
		}
		return float64(info.Size()) / 1e6
	}
	server, err := serve(ctx, dir)
	if err != nil {
		return err
	}
	defer server.stop()

	ready, err := rounded(rounds, func() (*daemon, error) { return start(ctx, dir, server) })
	if err != nil {
		return err
	}
	peerReady, err := rounded(rounds, func() (*daemon, error) { return startSSHD(ctx, dir) })
	if err != nil {
		return err
	}

	d, err := start(ctx, dir, server)
	if err != nil {
		return err
	}
	defer d.stop()
	peer, err := startSSHD(ctx, dir)
	if err != nil {
		return err
	}
	defer peer.stop()
	if err := lab.Pause(ctx, idle); err != nil {
		return err
	}
	host, err := d.ptyhost()
	if err != nil {
		return err
	}
	const window = 30 * time.Second
	processes := []int{d.cmd.Process.Pid, host, peer.cmd.Process.Pid}
	var idling [3]idler
	for i, pid := range processes {
		if idling[i], err = look(pid); err != nil {
			return err
		}
	}
	if err := lab.Pause(ctx, window); err != nil {
		return err
	}
	for i, pid := range processes {
		after, err := lab.Processor(pid)
		if err != nil {
			return err
		}
		idling[i].used = after - idling[i].used
	}

	speed, err := server.berth(ctx, dir, "speedtest", server.agent)
	if err != nil {
		return err
	}
	peak, err := lab.Peak(d.cmd.Process.Pid)
	if err != nil {
		return err
	}

	fmt.Println("| what | berthd | berthd-ptyhost, no terminal | sshd |")
	fmt.Println("|---|---|---|---|")
	fmt.Printf("| program, stripped | %.1f MB | %.1f MB | %.1f MB, and its libraries |\n", size("berthd"), size("berthd-ptyhost"), size(sshd))
	fmt.Printf("| exec to ready, %d rounds | %v | | %v |\n", rounds, ready, peerReady)
	fmt.Printf("| resident %v after ready | %v | %v | %v |\n", idle, idling[0], idling[1], idling[2])
	fmt.Printf("| CPU in %v of idling | %v | %v | %v |\n", window, idling[0].used, idling[1].used, idling[2].used)
	fmt.Println("\n| berthd | figure |")
	fmt.Println("|---|---|")
	fmt.Printf("| peak resident, `berthd run`, after `berth speedtest` both ways | %.1f MB |\n", peak)
	for _, line := range strings.Split(strings.TrimSpace(speed), "\n") {
		fmt.Printf("| `berth speedtest` | %s |\n", strings.Join(strings.Fields(line), " "))
	}
	return nil
}

// idler is a process that does nothing.
type idler struct {
	resident, anonymous float64 // MB
	used                time.Duration
}

func (i idler) String() string {
	return fmt.Sprintf("%.1f MB (%.1f MB anonymous)", i.resident, i.anonymous)
}

func look(pid int) (i idler, err error) {
	if i.resident, err = lab.Resident(pid); err != nil {
		return i, err
	}
	if i.anonymous, err = lab.Anonymous(pid); err != nil {
		return i, err
	}
	i.used, err = lab.Processor(pid)
	return i, err
}

// times are how long something took, sorted.
type times []time.Duration

func (t times) String() string {
	return fmt.Sprintf("median %v (%v-%v)", ms(t[len(t)/2]), ms(t[0]), ms(t[len(t)-1]))
}

// rounded starts a daemon again and again, and tells how long each took to be ready.
func rounded(rounds int, start func() (*daemon, error)) (times, error) {
	var all times
	for range rounds {
		d, err := start()
		if err != nil {
			return nil, err
		}
		all = append(all, d.ready)
		if err := d.stop(); err != nil {
			return nil, err
		}
	}
	slices.Sort(all)
	return all, nil
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
	if err := d.cmd.Wait(); err != nil && d.state != "" { // sshd's exit code for that is 255
		return err
	}
	return nil
}

// ptyhost finds the process of the terminals, which belongs to this daemon's state directory.
func (d *daemon) ptyhost() (pid int, err error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		cmdline, err := os.ReadFile(dir + "/cmdline")
		if err == nil && bytes.Contains(cmdline, []byte("\x00--socket\x00")) && bytes.Contains(cmdline, []byte(d.state)) {
			return strconv.Atoi(filepath.Base(dir))
		}
	}
	return 0, errors.Join(err, errors.New("berthd has started no owner of terminals"))
}

// sshd is the peer.
const sshd = "/usr/sbin/sshd"

// startSSHD runs OpenSSH's sshd, with a key that is there, until it greets.
func startSSHD(ctx context.Context, dir string) (*daemon, error) {
	key := filepath.Join(dir, "sshd_key")
	if _, err := os.Stat(key); err != nil {
		if out, err := exec.CommandContext(ctx, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("cannot make a key (install openssh-client): %w: %s", err, out)
		}
	}
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil { // where sshd drops its rights to
		return nil, err
	}
	addr, err := lab.FreeAddr()
	if err != nil {
		return nil, err
	}
	d := &daemon{cmd: exec.Command(sshd, "-D", "-e", "-f", "/dev/null", "-h", key, "-o", "ListenAddress="+addr, "-o", "PidFile=none")}
	begun := time.Now()
	if err := d.cmd.Start(); err != nil {
		return nil, fmt.Errorf("cannot start sshd (install openssh-server): %w", err)
	}
	for ctx.Err() == nil && time.Since(begun) < 10*time.Second {
		if conn, err := net.Dial("tcp", addr); err == nil {
			_, err = bufio.NewReader(conn).ReadString('\n')
			conn.Close()
			if err == nil {
				d.ready = time.Since(begun)
				return d, nil
			}
		}
		if err := lab.Pause(ctx, time.Millisecond); err != nil {
			break
		}
	}
	return nil, errors.Join(errors.New("sshd did not greet in 10 s"), ctx.Err(), d.stop())
}
