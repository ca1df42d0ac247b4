package sshd

import (
	"bufio"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/berthd/berth/ptyhost"
)

func withTerminals(t *testing.T) func(*Config) {
	return func(c *Config) { c.Terminals = terminals(t) }
}

func TestTerminal(t *testing.T) {
	f := serve(t, withTerminals(t))
	for name, tt := range map[string]struct {
		line  string
		stdin string
		want  string // what the output must contain
		code  int
	}{
		"exit code":  {line: "exit 7", code: 7},
		"killed":     {line: "kill -9 $$", code: 255},
		"terminal":   {line: "test -t 0 && test -t 1 && test -t 2 && tty", want: "/dev/pts/"},
		"device":     {line: "test $SSH_TTY = $(tty) && echo same", want: "same"},
		"type":       {line: "echo type $TERM", want: "type vt220"},
		"input":      {line: "read x; echo got $x", stdin: "words\n", want: "got words"},
		"newlines":   {line: "echo a; echo b", want: "a\r\nb\r\n"},
		"login":      {stdin: "echo $((6*7)) in $PWD; exit 3\n", want: "42 in " + f.dir, code: 3},
		"no program": {line: "no-such-command", want: "not found", code: 127},
		"big output": {line: "head -c 3000000 /dev/zero | tr '\\0' x; echo end", want: strings.Repeat("x", 3000000) + "end\r\n"},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := f.command(t, "ssh", "-tt", "ws", tt.line)
			if tt.line == "" {
				cmd = f.command(t, "ssh", "-tt", "ws")
			}
			cmd.Env = append(os.Environ(), "TERM=vt220")
			got := run(t, cmd, tt.stdin)
			if !strings.Contains(got.Stdout, tt.want) || got.Code != tt.code {
				t.Errorf("got status %d and %d bytes %.300q, want %d and %.300q", got.Code, len(got.Stdout), got.Stdout, tt.code, tt.want)
			}
		})
	}
}

func TestBanner(t *testing.T) {
	f := serve(t, func(c *Config) {
		withTerminals(t)(c)
		c.Banner = func(w io.Writer) { io.WriteString(w, "Welcome.\r\n") }
	})
	for name, tt := range map[string]struct {
		args   []string
		banner bool
	}{
		"login shell in a terminal": {[]string{"-tt", "ws"}, true},
		"command in a terminal":     {[]string{"-tt", "ws", "true"}, false},
		"login shell without":       {[]string{"-T", "ws"}, false},
	} {
		if got := f.ssh(t, "exit\n", tt.args...); strings.HasPrefix(got.Stdout, "Welcome.\r\n") != tt.banner {
			t.Errorf("%s: %q", name, got.Stdout)
		}
	}
}

// terminal opens a session with a terminal of 80x24 by Go's client.
func (f *fixture) terminal(t *testing.T, line string, modes ssh.TerminalModes) (*ssh.Session, *bufio.Reader) {
	t.Helper()
	s, err := f.dial(t).NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.RequestPty("xterm", 24, 80, modes); err != nil {
		t.Fatal(err)
	}
	out, err := s.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(line); err != nil {
		t.Fatal(err)
	}
	return s, bufio.NewReader(out)
}

func wantLine(t *testing.T, r *bufio.Reader, want string) {
	t.Helper()
	if got, err := r.ReadString('\n'); strings.TrimRight(got, "\r\n") != want {
		t.Fatalf("got %q, %v; want %q", got, err, want)
	}
}

func TestWindowSize(t *testing.T) {
	f := serve(t, withTerminals(t))
	s, out := f.terminal(t, `trap 'stty size; exit' WINCH; sleep 1000 & stty size; wait`, nil)
	wantLine(t, out, "24 80")
	if err := s.WindowChange(50, 132); err != nil {
		t.Fatal(err)
	}
	wantLine(t, out, "50 132")
	if err := s.Wait(); err != nil {
		t.Error(err)
	}
}

func TestModes(t *testing.T) {
	f := serve(t, withTerminals(t))
	_, out := f.terminal(t, "stty -a", ssh.TerminalModes{ssh.ECHO: 0, ssh.VINTR: 7})
	text, err := io.ReadAll(out)
	if err != nil || !strings.Contains(string(text), " -echo ") || !strings.Contains(string(text), "intr = ^G") {
		t.Errorf("got %s, %v; want no echo, and ^G to interrupt", text, err)
	}
}

func TestTerminalSignal(t *testing.T) {
	f := serve(t, withTerminals(t))
	s, out := f.terminal(t, `trap 'echo caught; exit 5' USR1; sleep 1000 & echo ready; wait`, nil)
	wantLine(t, out, "ready")
	if err := s.Signal(ssh.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	wantLine(t, out, "caught")
	if exit, _ := errors.AsType[*ssh.ExitError](s.Wait()); exit == nil || exit.ExitStatus() != 5 {
		t.Errorf("got %v", exit)
	}
}

// A program in a terminal ends with its session.
func TestTerminalEndsWithItsClient(t *testing.T) {
	f := serve(t, withTerminals(t))
	fifo := filepath.Join(f.dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	// The program holds the fifo until it ends.
	s, out := f.terminal(t, "exec 3<>"+fifo+"; echo $$; exec sleep 1000", nil)
	line, err := out.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	r, err := os.Open(fifo)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if n, err := r.Read(make([]byte, 1)); n != 0 || err != io.EOF { // the writer has gone
		t.Errorf("process %d goes on: %d, %v", pid, n, err)
	}
}

func TestNoTerminalHost(t *testing.T) {
	f := serve(t, nil)
	got := f.ssh(t, "", "-tt", "ws", "true")
	if got.Code != exitInternal || !strings.Contains(got.Stdout+got.Stderr, "cannot open a terminal") {
		t.Errorf("got %+v, want status 229 and why", got)
	}
}

// A client that does not read holds up its own program and nobody else.
func TestSlowTerminal(t *testing.T) {
	f := serve(t, withTerminals(t))
	_, out := f.terminal(t, "echo start; exec yes", nil)
	wantLine(t, out, "start")
	if got := f.ssh(t, "", "-tt", "ws", "echo quick"); got.Stdout != "quick\r\n" {
		t.Errorf("got %+v", got)
	}
}

// OpenSSH's own interactive client in a terminal of its own: tmux plays the person.
func TestEscape(t *testing.T) {
	f, host := keeping(t)
	dir, err := os.MkdirTemp("", "tmux")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	l, err := net.Listen("unix", filepath.Join(dir, "told"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	tmux := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("tmux", append([]string{"-S", filepath.Join(dir, "s"), "-f", "/dev/null"}, args...)...).CombinedOutput(); err != nil {
			t.Fatalf("tmux %v (tmux must be installed): %v: %s", args, err, out)
		}
	}
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	tmux("new-session", "-d", "-x", "90", "-y", "30", "ssh -F "+f.conf+" ws; echo status $? >"+fifo)
	// The server ends by itself with its last window, so it may be gone by then.
	defer exec.Command("tmux", "-S", filepath.Join(dir, "s"), "kill-server").Run()
	tmux("send-keys", "stty size >"+fifo, "Enter")
	size, err := os.ReadFile(fifo)
	if err != nil || (string(size) != "30 90\n" && string(size) != "29 90\n") { // tmux takes a line for its own
		t.Errorf("size %q, %v", size, err)
	}
	tmux("send-keys", "Enter", "~", ".")
	if status, err := os.ReadFile(fifo); err != nil || string(status) != "status 255\n" {
		t.Errorf("after ~.: %q, %v", status, err)
	}
	eventually(t, "the shell is ended", func() bool {
		all, err := host.List(t.Context())
		return err == nil && len(all) == 0
	})
}

var _ Terminals = (*ptyhost.Client)(nil)
