package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/creack/pty"
	"github.com/google/uuid"

	"github.com/berthd/berth/bench/lab"
	"github.com/berthd/berth/ptyhost"
)

// What the ways are called in the table.
const (
	nameBare  = "bare PTY loop"
	nameHost  = "ptyhost"
	nameRaw   = "ptyhost, every byte"
	nameSSH   = "ssh -tt, OpenSSH"
	nameBerth = "berth shell"
	nameTmux  = "tmux"
)

// window is the size of every terminal.
var window = ptyhost.Size{Rows: 30, Cols: 100}

// world is what is measured: a control server, an agent with its terminals, OpenSSH's sshd, and a terminal host alone.
type world struct {
	*lab.World
	ptys *hosted
}

// hosted is a process of the terminal host.
type hosted struct {
	client *ptyhost.Client
	pid    int
	env    []string
}

func (h *hosted) rss() (float64, error) { return lab.Resident(h.pid) }

func (h *hosted) create(script string) *ptyhost.CreateRequest {
	if script == "" {
		return nil
	}
	return &ptyhost.CreateRequest{Argv: []string{"/bin/sh", "-c", script}, Dir: "/", Env: h.env}
}

func start(ctx context.Context, bin, dir string) (*world, error) {
	base, err := lab.Start(ctx, bin, dir)
	if err != nil {
		return nil, err
	}
	w := &world{World: base}
	if err := w.startHost(); err != nil {
		return nil, fmt.Errorf("%w\n%s", err, w.Log())
	}
	return w, nil
}

func (w *world) startHost() error {
	host, stop, err := w.freshHost(w.Ctx)
	if err != nil {
		return err
	}
	w.ptys = host
	w.OnStop(stop)
	return nil
}

// freshHost starts a terminal host as `berthd run` does.
func (w *world) freshHost(ctx context.Context) (*hosted, func(), error) {
	socket := filepath.Join(w.Dir, "host-"+uuid.NewString()[:8])
	args := []string{"--socket", socket}
	program := filepath.Join(w.Bin, "berthd-ptyhost")
	if _, err := os.Stat(program); err != nil {
		program, args = filepath.Join(w.Bin, "berthd"), append([]string{"ptyhost"}, args...)
	}
	cmd := exec.Command(program, args...)
	cmd.Env = w.Env
	if err := cmd.Start(); err != nil {
		return nil, nil, err
	}
	h := &hosted{client: ptyhost.Dial(socket), pid: cmd.Process.Pid, env: w.Env}
	stop := func() {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
	}
	err := w.Poll("the terminal host", func() error {
		_, err := h.client.List(ctx)
		return err
	})
	if err != nil {
		stop()
		return nil, nil, err
	}
	return h, stop, nil
}

// freshTmux starts a tmux server with as much history as our sessions have.
func (w *world) freshTmux(ctx context.Context) (*tmux, error) {
	t := &tmux{ctx: ctx, env: w.Env, socket: filepath.Join(w.Dir, "tmux-"+uuid.NewString()[:8])}
	_, err := t.run("start-server", ";", "set-option", "-g", "exit-empty", "off", ";", "set-option", "-g", "history-limit", "10000", ";", "set-option", "-g", "status", "off")
	if err != nil {
		return nil, err
	}
	pid, err := t.run("display-message", "-p", "#{pid}")
	if err == nil {
		t.pid, err = strconv.Atoi(strings.TrimSpace(pid))
	}
	if err != nil {
		t.stop()
		return nil, err
	}
	return t, nil
}

// tmux is a tmux server of its own.
type tmux struct {
	ctx    context.Context
	env    []string
	socket string
	pid    int
}

func (t *tmux) command(args ...string) *exec.Cmd {
	cmd := exec.CommandContext(t.ctx, "tmux", append([]string{"-f", "/dev/null", "-S", t.socket}, args...)...)
	cmd.Env = t.env
	return cmd
}

func (t *tmux) run(args ...string) (string, error) {
	out, err := t.command(args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("tmux %s: %w: %s", args[0], err, bytes.TrimSpace(out))
	}
	return string(out), nil
}

// open starts a session that nobody is attached to.
func (t *tmux) open(session, script string) error {
	_, err := t.run("new-session", "-d", "-s", session, "-x", strconv.Itoa(int(window.Cols)), "-y", strconv.Itoa(int(window.Rows)), "/bin/sh", "-c", script)
	return err
}

// await waits until a session shows a text.
func (t *tmux) await(w *world, session, text string) error {
	return w.Poll("tmux's "+session, func() error {
		out, err := t.run("capture-pane", "-p", "-t", session)
		if err == nil && !strings.Contains(out, text) {
			err = fmt.Errorf("no %q in %q", text, out)
		}
		return err
	})
}

func (t *tmux) stop() {
	if _, err := t.run("kill-server"); err != nil {
		fmt.Fprintln(os.Stderr, "bench/terminal:", err)
	}
}

// all opens a script through every way, the bare loop first, and waits until each is ready.
func (w *world) all(ctx context.Context, session, script string, every bool) ([]*terminal, error) {
	open := []func(string, string) (*terminal, error){w.bare, w.hostWatched, w.ssh, w.berthShell}
	if every {
		open = append(open, w.hostRaw)
	}
	var ways []*terminal
	for _, f := range open {
		t, err := f(session, script)
		if err == nil {
			t.again = f
			ways = append(ways, t)
		}
		if err != nil {
			closeAll(ways)
			return nil, err
		}
	}
	return ways, nil
}

// local runs a command on a PTY of ours and reads it in a bare loop.
func (w *world) local(name string, cmd *exec.Cmd) (*terminal, error) {
	cmd.Env = w.Env
	master, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: window.Rows, Cols: window.Cols})
	if err != nil {
		return nil, err
	}
	t := watch(name, master, func() {
		cmd.Process.Signal(syscall.SIGHUP)
		kill := time.AfterFunc(5*time.Second, func() { cmd.Process.Kill() })
		cmd.Wait()
		kill.Stop()
		master.Close()
	})
	return t, nil
}

// ready waits for a terminal's first output.
func ready(t *terminal, err error) (*terminal, error) {
	if err != nil {
		return nil, err
	}
	if err := t.see("READY"); err != nil {
		t.close()
		return nil, fmt.Errorf("%s: %w", t.name, err)
	}
	return t, nil
}

func (w *world) bare(_, script string) (*terminal, error) {
	return ready(w.local(nameBare, exec.Command("/bin/sh", "-c", script)))
}

func (w *world) ssh(_, script string) (*terminal, error) {
	return ready(w.local(nameSSH, exec.Command("ssh", "-tt", "-F", "none", "-p", w.SSHPort, "-i", filepath.Join(w.Dir, "user"),
		"-o", "UserKnownHostsFile=/dev/null", "-o", "StrictHostKeyChecking=no", "-o", "LogLevel=ERROR", "root@127.0.0.1", script)))
}

// berthShell opens a session, or without a script one that is there already. It ends with the terminal that opened it: left alone it
// would go on, and take its share of the machine from what is measured next.
func (w *world) berthShell(session, script string) (*terminal, error) {
	command := func(args ...string) *exec.Cmd {
		return exec.Command(filepath.Join(w.Bin, "berth"), append([]string{"shell", "bench", session}, args...)...)
	}
	t, err := w.local(nameBerth, command("-c", script))
	if err != nil || script == "" {
		return t, err
	}
	leave := t.end
	t.end = func() {
		closing := command("--close")
		closing.Env = w.Env
		if out, err := closing.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "bench/terminal: cannot end session %s: %v\n%s", session, err, out)
		}
		leave()
	}
	if !strings.Contains(script, "READY") {
		return t, nil
	}
	return ready(t, nil)
}

func (w *world) hostWatched(session, script string) (*terminal, error) {
	return ready(w.host(session, script, false))
}

func (w *world) hostRaw(session, script string) (*terminal, error) {
	return ready(w.host(session+"-raw", script, true))
}

// host attaches to a session of the terminal host, which it makes if there is a script.
func (w *world) host(session, script string, raw bool) (*terminal, error) {
	a, err := w.ptys.client.Attach(w.Ctx, ptyhost.AttachRequest{ID: session, Size: window, Raw: raw, Create: w.ptys.create(script)})
	if err != nil {
		return nil, err
	}
	name := nameHost
	if raw {
		name = nameRaw
	}
	return watch(name, a, func() {
		if script != "" {
			if err := w.ptys.client.Kill(w.Ctx, session, "KILL"); err != nil && !errors.Is(err, ptyhost.ErrNoSession) {
				fmt.Fprintln(os.Stderr, "bench/terminal: cannot end a session:", strconv.Quote(session), err)
			}
		}
		a.Close()
	}), nil
}
