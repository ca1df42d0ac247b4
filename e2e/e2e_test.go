// Package e2e drives the built binaries from outside, as a person and a machine would: over real
// processes, sockets, terminals and OpenSSH. It imports none of berth's packages.
package e2e

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// bin is the folder with the built programs.
var bin string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "berth-e2e-bin-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	bin = dir
	build := exec.Command("go", "build", "-o", dir, "../cmd/berth", "../cmd/berthd", "../cmd/berthd-ptyhost")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "cannot build: %v\n%s", err, out)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// machine is a home and a temporary folder of its own, so that what a program leaves behind shows.
type machine struct {
	t         *testing.T
	home, tmp string
	// mark is in the environment of every process started here, and of their children.
	mark string
	// space is the network namespace that everything runs in; empty means the test's own.
	space string
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	// Socket paths are limited to 108 bytes, which t.TempDir with a long test name may exceed.
	root, err := os.MkdirTemp("", "be2e-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	m := &machine{t: t, home: filepath.Join(root, "home"), tmp: filepath.Join(root, "tmp"), mark: "BERTH_E2E_MARK=" + filepath.Base(root)}
	for _, dir := range []string{m.home, m.tmp} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(m.reap)
	return m
}

// env is what a fresh login has: no variable of ours, none that leads outside.
func (m *machine) env(extra ...string) []string {
	return append([]string{
		"PATH=" + bin + ":" + os.Getenv("PATH"), "HOME=" + m.home, "TMPDIR=" + m.tmp,
		"XDG_CONFIG_HOME=" + filepath.Join(m.home, ".config"), "XDG_STATE_HOME=" + filepath.Join(m.home, ".local/state"),
		"USER=root", "SHELL=/bin/bash", "LANG=C.UTF-8", "TERM=xterm-256color", m.mark,
	}, extra...)
}

func (m *machine) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	if !strings.Contains(name, "/") {
		if p := filepath.Join(bin, name); exists(p) {
			cmd = exec.Command(p, args...)
		}
	}
	if m.space != "" { // ip becomes the program
		cmd = exec.Command("ip", append([]string{"netns", "exec", m.space}, cmd.Args...)...)
	}
	cmd.Env = m.env()
	cmd.Dir = m.home
	return cmd
}

// isolate has what is started from now on run in a network namespace of its own, in which nothing but
// the test listens.
func (m *machine) isolate() {
	m.t.Helper()
	space := filepath.Base(filepath.Dir(m.home))
	m.must("ip", "netns", "add", space)
	m.t.Cleanup(func() { exec.Command("ip", "netns", "delete", space).Run() })
	m.space = space
	m.must("ip", "link", "set", "lo", "up")
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// run runs a command to its end, at most a minute, and returns what it printed and its exit code.
func (m *machine) run(stdin io.Reader, name string, args ...string) (stdout, stderr string, code int) {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(m.t.Context(), time.Minute)
	defer cancel()
	cmd := m.command(name, args...)
	var out, errOut bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &out, &errOut
	if err := cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	stop := context.AfterFunc(ctx, func() { cmd.Process.Kill() })
	err := cmd.Wait()
	if !stop() {
		m.t.Errorf("%s %q did not end in a minute; it said:\n%s%s", name, args, &out, &errOut)
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		m.t.Fatalf("%s %q: %v", name, args, err)
	}
	return out.String(), errOut.String(), cmd.ProcessState.ExitCode()
}

// must runs a command that has to succeed and returns what it printed.
func (m *machine) must(name string, args ...string) string {
	m.t.Helper()
	out, errOut, code := m.run(nil, name, args...)
	if code != 0 {
		m.t.Fatalf("%s %q exited %d:\n%s%s", name, args, code, out, errOut)
	}
	return out
}

// processes lists what is alive of what was started here, as "pid command line".
func (m *machine) processes() []string {
	var found []string
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		environ, err := os.ReadFile(dir + "/environ")
		if err != nil || !bytes.Contains(environ, []byte(m.mark)) {
			continue
		}
		cmdline, _ := os.ReadFile(dir + "/cmdline")
		if len(cmdline) == 0 {
			continue // it is dead and waits for its parent
		}
		found = append(found, filepath.Base(dir)+" "+strings.ReplaceAll(string(cmdline), "\x00", " "))
	}
	return found
}

// reap kills what a failed test left running.
func (m *machine) reap() {
	for _, p := range m.processes() {
		var pid int
		if _, err := fmt.Sscan(p, &pid); err == nil {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}

// daemon is a program that keeps running; its output is kept.
type daemon struct {
	t    *testing.T
	cmd  *exec.Cmd
	name string

	mu   sync.Mutex
	text strings.Builder
	more chan struct{} // closed and replaced at each line
	done chan struct{} // closed when it has exited
}

func (m *machine) start(name string, env []string, args ...string) *daemon {
	m.t.Helper()
	cmd := m.command(name, args...)
	cmd.Env = m.env(env...)
	return m.startCommand(cmd, name)
}

func (m *machine) startCommand(cmd *exec.Cmd, name string) *daemon {
	m.t.Helper()
	d := &daemon{t: m.t, cmd: cmd, name: name, more: make(chan struct{}), done: make(chan struct{})}
	r, w, err := os.Pipe()
	if err != nil {
		m.t.Fatal(err)
	}
	d.cmd.Stdout, d.cmd.Stderr = w, w
	if err := d.cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	w.Close()
	go func() {
		defer r.Close()
		lines := bufio.NewScanner(r)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			d.mu.Lock()
			d.text.WriteString(lines.Text() + "\n")
			close(d.more)
			d.more = make(chan struct{})
			d.mu.Unlock()
		}
	}()
	go func() {
		d.cmd.Wait()
		close(d.done)
	}()
	m.t.Cleanup(func() {
		d.cmd.Process.Kill()
		<-d.done
		if m.t.Failed() {
			m.t.Logf("%q said:\n%s", cmd.Args, d.output())
		}
	})
	return d
}

func (d *daemon) output() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.text.String()
}

// wait waits until the output holds the words.
func (d *daemon) wait(words string, limit time.Duration) {
	d.t.Helper()
	timeout := time.After(limit)
	for {
		d.mu.Lock()
		found, more := strings.Contains(d.text.String(), words), d.more
		d.mu.Unlock()
		if found {
			return
		}
		select {
		case <-more:
		case <-d.done:
			if !strings.Contains(d.output(), words) {
				d.t.Fatalf("%s ended (%v) without saying %q:\n%s", d.name, d.cmd.ProcessState, words, d.output())
			}
		case <-timeout:
			d.t.Fatalf("%s did not say %q within %v:\n%s", d.name, words, limit, d.output())
		}
	}
}

// stop sends a signal and returns the exit code.
func (d *daemon) stop(sig os.Signal, limit time.Duration) int {
	d.t.Helper()
	if err := d.cmd.Process.Signal(sig); err != nil {
		d.t.Fatal(err)
	}
	select {
	case <-d.done:
	case <-time.After(limit):
		d.t.Fatalf("%s did not end within %v of %v:\n%s", d.name, limit, sig, d.output())
	}
	return d.cmd.ProcessState.ExitCode()
}

// eventually polls a condition of another process, of which nothing tells when it holds.
func eventually(t *testing.T, limit time.Duration, what string, holds func() bool) {
	t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(limit)
	for !holds() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

// freeAddr is a loopback address that was free a moment ago, for a server that is to come back there.
func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// files lists everything below a folder, relative to it.
func files(t *testing.T, dir string) []string {
	t.Helper()
	var found []string
	err := filepath.WalkDir(dir, func(p string, _ os.DirEntry, err error) error {
		if err == nil && p != dir {
			rel, _ := filepath.Rel(dir, p)
			found = append(found, rel)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}
