package sshd

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/pkg/sftp"
	"golang.org/x/crypto/ssh"

	"github.com/berthd/berth/account"
	"github.com/berthd/berth/ptyhost"
	"github.com/berthd/berth/shell"
)

// dial connects Go's own client, for what OpenSSH's cannot be made to do.
func (f *fixture) dial(t testing.TB) *ssh.Client {
	t.Helper()
	c, err := ssh.Dial("tcp", f.addr.String(), &ssh.ClientConfig{User: "x", HostKeyCallback: ssh.FixedHostKey(f.cfg.HostKey.PublicKey())})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestHostKey(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made")
	var wg sync.WaitGroup
	keys := make([]ssh.Signer, 8)
	for i := range keys {
		wg.Go(func() {
			var err error
			if keys[i], err = HostKey(dir); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	for _, k := range keys {
		if !bytes.Equal(k.PublicKey().Marshal(), keys[0].PublicKey().Marshal()) {
			t.Fatal("makers at the same time got different keys")
		}
	}
	if got := keys[0].PublicKey().Type(); got != ssh.KeyAlgoED25519 {
		t.Errorf("type %s", got)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Fatalf("%v in the folder, %v; want the key alone", entries, err)
	}
	path := filepath.Join(dir, hostKeyFile)
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := HostKey(dir); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v; want 0600 restored", info.Mode(), err)
	}
	for name, text := range map[string]string{"broken": "no key", "empty": ""} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := HostKey(dir); err == nil {
			t.Errorf("a %s key was accepted", name)
		}
	}
}

func TestNewRefusesAnIncompleteConfig(t *testing.T) {
	key, err := HostKey(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	command := func(string, []string) (shell.Spec, error) { return shell.Spec{}, nil }
	for _, cfg := range []Config{
		{Terminals: ptyhost.Dial(""), Command: command}, {HostKey: key, Command: command}, {HostKey: key, Terminals: ptyhost.Dial("")},
		{HostKey: key, Terminals: ptyhost.Dial(""), Command: command, User: &account.User{UID: 54321}},
	} {
		if _, err := New(cfg); err == nil {
			t.Errorf("%+v was accepted", cfg)
		}
	}
}

// Clients that stop in their handshake are dropped, and keep nobody else out.
func TestSlowHandshake(t *testing.T) {
	f := serve(t, nil, func(l *limits) { l.handshake = 300 * time.Millisecond })
	conns := make([]net.Conn, 200)
	for i := range conns {
		var err error
		if conns[i], err = net.Dial("tcp", f.addr.String()); err != nil {
			t.Fatal(err)
		}
		defer conns[i].Close()
		if i%2 == 0 {
			io.WriteString(conns[i], "SSH-2.0-slow\r\n")
		}
	}
	if got := f.ssh(t, "", "ws", "echo in"); got.Stdout != "in\n" {
		t.Errorf("%+v", got)
	}
	for _, c := range conns {
		c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal("a client without a handshake was kept")
		}
	}
}

func TestConnectionCap(t *testing.T) {
	f := serve(t, nil, func(l *limits) { l.connections = 1 })
	first := f.dial(t)
	second, err := net.Dial("tcp", f.addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if n, err := io.Copy(io.Discard, second); n != 0 || err != nil {
		t.Errorf("the connection over the cap was served: %d bytes, %v", n, err)
	}
	if _, _, err := first.SendRequest("keepalive@openssh.com", true, nil); err != nil {
		t.Errorf("the first connection suffered: %v", err)
	}
}

func TestRequests(t *testing.T) {
	f := serve(t, nil)
	c := f.dial(t)
	if ok, _, err := c.SendRequest("keepalive@openssh.com", true, nil); ok || err != nil {
		t.Errorf("global keepalive: %v, %v; want a refusal", ok, err)
	}
	if _, _, err := c.OpenChannel("x11", nil); err == nil {
		t.Error("an unknown channel type was accepted")
	}
	ch, reqs, err := c.OpenChannel("session", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer ch.Close()
	go ssh.DiscardRequests(reqs)
	type pair struct{ Name, Value string }
	for _, tt := range []struct {
		name    string
		payload []byte
		want    bool
	}{
		{"keepalive@openssh.com", nil, true},
		{"break", nil, false},
		{"env", ssh.Marshal(pair{"A", "b"}), true},
		{"env", ssh.Marshal(pair{"LD_PRELOAD", "b"}), false},
		{"env", []byte("garbage"), false},
		{"window-change", ssh.Marshal(struct{ A, B, C, D uint32 }{1, 2, 3, 4}), false}, // no terminal
		{"subsystem", ssh.Marshal(struct{ N string }{"netconf"}), false},
		{"exec", ssh.Marshal(struct{ L string }{"a\x00b"}), false},
		{"exec", ssh.Marshal(struct{ L string }{"cat"}), true},
		{"exec", ssh.Marshal(struct{ L string }{"cat"}), false},   // one only
		{"env", ssh.Marshal(pair{"A", "b"}), false},               // too late
		{"pty-req", ssh.Marshal(struct{ T string }{"xt"}), false}, // too late, and short
		{"signal", ssh.Marshal(struct{ N string }{"TERM"}), true}, // ends the cat
	} {
		if ok, err := ch.SendRequest(tt.name, true, tt.payload); ok != tt.want || err != nil {
			t.Errorf("%s %q: %v, %v; want %v", tt.name, tt.payload, ok, err, tt.want)
		}
	}
	if _, err := io.ReadAll(ch); err != nil { // the end of cat
		t.Error(err)
	}
}

// The order at the end: output, exit status, EOF, close.
func TestOrderAtTheEnd(t *testing.T) {
	f := serve(t, nil)
	ch, reqs, err := f.dial(t).OpenChannel("session", nil)
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := ch.SendRequest("exec", true, ssh.Marshal(struct{ L string }{"echo out; echo err >&2; exit 9"})); !ok || err != nil {
		t.Fatal(ok, err)
	}
	req := <-reqs
	if want := []byte{0, 0, 0, 9}; req == nil || req.Type != "exit-status" || !bytes.Equal(req.Payload, want) {
		t.Fatalf("first request %+v, want exit-status 9", req)
	}
	// Both streams came whole before: they are readable though nothing more is sent.
	out, _ := io.ReadAll(ch)
	errs, _ := io.ReadAll(ch.Stderr())
	if string(out) != "out\n" || string(errs) != "err\n" {
		t.Errorf("got %q and %q", out, errs)
	}
	if req, open := <-reqs; open {
		t.Errorf("a request after the exit status: %+v", req)
	}
}

func TestSignal(t *testing.T) {
	f := serve(t, nil)
	s, err := f.dial(t).NewSession()
	if err != nil {
		t.Fatal(err)
	}
	out, err := s.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(`trap "echo caught; exit 5" USR1; echo ready; while :; do sleep 0.01; done`); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, len("ready\n"))); err != nil {
		t.Fatal(err)
	}
	if err := s.Signal(ssh.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	rest, _ := io.ReadAll(out)
	exit, _ := errors.AsType[*ssh.ExitError](s.Wait())
	if string(rest) != "caught\n" || exit == nil || exit.ExitStatus() != 5 {
		t.Errorf("got %q, %v", rest, exit)
	}
}

// A server that is told to stop hangs up on commands, and their clients still hear how they ended.
func TestShutdown(t *testing.T) {
	f := serve(t, nil)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- f.Serve(ctx, l) }()
	f.addr = l.Addr().(*net.TCPAddr)
	s, err := f.dial(t).NewSession()
	if err != nil {
		t.Fatal(err)
	}
	out, err := s.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(`trap "echo bye; exit 6" HUP; echo ready; while :; do sleep 0.01; done`); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, len("ready\n"))); err != nil {
		t.Fatal(err)
	}
	cancel()
	rest, _ := io.ReadAll(out)
	exit, _ := errors.AsType[*ssh.ExitError](s.Wait())
	if string(rest) != "bye\n" || exit == nil || exit.ExitStatus() != 6 {
		t.Errorf("got %q, %v", rest, exit)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
}

func TestReports(t *testing.T) {
	type end struct {
		Type   SessionType
		Exit   int
		Reason string
	}
	ends := make(chan end, 1)
	f := serve(t, func(c *Config) {
		c.Report = func(c Connection) func(int, string) {
			if c.Type == SessionOther {
				panic("a report that breaks")
			}
			return func(exit int, reason string) { ends <- end{c.Type, exit, reason} }
		}
	})
	for _, tt := range []struct {
		kind, line string
		want       end
	}{
		{"", "true", end{SessionSSH, 0, "graceful"}},
		{"VSCode", "exit 3", end{SessionVSCode, 3, "process exited with error status: 3"}},
	} {
		f.ssh(t, "", "-o", "SetEnv=CODER_SSH_SESSION_TYPE="+tt.kind, "ws", tt.line)
		if diff := cmp.Diff(tt.want, <-ends); diff != "" {
			t.Error(diff)
		}
	}
	if got := f.ssh(t, "", "-o", "SetEnv=BERTH_SSH_SESSION_TYPE=emacs", "ws", "exit 4"); got.Code != 4 {
		t.Errorf("a report that panics broke its session: %+v", got)
	}
}

func TestCounts(t *testing.T) {
	f := serve(t, withTerminals(t))
	c := f.dial(t)
	for i, kind := range []string{"ssh", "ssh", "vscode", "vscode", "jetbrains"} {
		s, err := c.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			if err := s.RequestPty("xterm", 24, 80, nil); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Setenv("CODER_SSH_SESSION_TYPE", kind); err != nil {
			t.Fatal(err)
		}
		in, err := s.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		out, err := s.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Start("echo; cat"); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(out, make([]byte, 1)); err != nil { // it runs
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(Counts{SSH: 2, VSCode: 2, Commands: 1, Connections: 1}, f.Counts()); diff != "" {
		t.Error(diff)
	}
}

// A connection to a JetBrains program of this machine counts and is reported for as long as it lasts.
func TestJetBrainsConnections(t *testing.T) {
	ide, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ide.Close()
	other, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	type end struct {
		Type   SessionType
		Exit   int
		Reason string
	}
	begun, ends := make(chan SessionType, 10), make(chan end, 10)
	f := serve(t, func(c *Config) {
		c.JetBrains = func(port uint16) bool { return int(port) == ide.Addr().(*net.TCPAddr).Port }
		c.Report = func(c Connection) func(int, string) {
			begun <- c.Type
			return func(exit int, reason string) { ends <- end{c.Type, exit, reason} }
		}
	})
	c := f.dial(t)
	forward := func(l net.Listener) (near, far net.Conn) {
		t.Helper()
		near, err := c.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if far, err = l.Accept(); err != nil {
			t.Fatal(err)
		}
		return near, far
	}
	plain, plainFar := forward(other)
	first, firstFar := forward(ide)
	second, secondFar := forward(ide)
	defer plainFar.Close()
	defer firstFar.Close()
	defer secondFar.Close()
	if diff := cmp.Diff(Counts{JetBrains: 2, Connections: 1}, f.Counts()); diff != "" {
		t.Error(diff)
	}
	for _, conn := range []net.Conn{plain, first, second} {
		conn.Close()
	}
	firstFar.Close()
	secondFar.Close()
	for range 2 {
		if kind := <-begun; kind != SessionJetBrains {
			t.Errorf("began as %s", kind)
		}
		if diff := cmp.Diff(end{SessionJetBrains, 0, "normal close"}, <-ends); diff != "" {
			t.Error(diff)
		}
	}
	if diff := cmp.Diff(Counts{Connections: 1}, f.Counts()); diff != "" || len(begun) != 0 {
		t.Errorf("%d other reports; counts:\n%s", len(begun), diff)
	}
}

// Channels in excess are refused, and those there are go on.
func TestChannelFlood(t *testing.T) {
	f := serve(t, nil)
	c := f.dial(t)
	first, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	refused := 0
	for range maxChannels + 10 {
		_, reqs, err := c.OpenChannel("session", nil)
		if err != nil {
			refused++
			continue
		}
		go ssh.DiscardRequests(reqs)
	}
	if refused != 11 { // 10 over the limit, and the first takes one place
		t.Errorf("%d channels were refused, want 11", refused)
	}
	if out, err := first.Output("echo ok"); string(out) != "ok\n" {
		t.Errorf("got %q, %v", out, err)
	}
}

// TestAgentRequestBehindTheStart: its answer is as ever, and it touches nothing that the command is being started from.
func TestAgentRequestBehindTheStart(t *testing.T) {
	f := serve(t, nil)
	ch, reqs, err := f.dial(t).OpenChannel("session", nil)
	if err != nil {
		t.Fatal(err)
	}
	go ssh.DiscardRequests(reqs)
	for _, req := range []struct {
		name    string
		payload []byte
	}{
		{"exec", ssh.Marshal(struct{ Line string }{`echo "[$SSH_AUTH_SOCK]"`})},
		{"auth-agent-req@openssh.com", nil},
	} {
		if ok, err := ch.SendRequest(req.name, true, req.payload); err != nil || !ok {
			t.Fatalf("%s: %v, %v", req.name, ok, err)
		}
	}
	out, err := io.ReadAll(ch)
	if err != nil || string(out) != "["+os.Getenv("SSH_AUTH_SOCK")+"]\n" {
		t.Errorf("the command said %q, %v", out, err)
	}
}

// TestSFTPOfAFIFO: a file that cannot be opened does not hold up the end of its session.
func TestSFTPOfAFIFO(t *testing.T) {
	f := serve(t, nil)
	fifo := filepath.Join(f.dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	conn := f.dial(t)
	c, err := sftp.NewClient(conn)
	if err != nil {
		t.Fatal(err)
	}
	opened := make(chan error, 1)
	go func() {
		_, err := c.Open(fifo)
		opened <- err
	}()
	if _, err := c.Stat("."); err != nil { // the request before it has been taken in
		t.Fatal(err)
	}
	conn.Close()
	if err := <-opened; err == nil {
		t.Error("a FIFO without a writer was opened")
	}
	eventually(t, "the session has ended", func() bool { return f.Counts() == Counts{} })
	// Whoever still waits in open is let go, or would be found as a leak.
	w, err := os.OpenFile(fifo, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
}
