package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"github.com/berthd/berth/ptyhost"
	"github.com/berthd/berth/shell"
	"github.com/berthd/berth/wire"
)

// typed records what is fed to a terminal, in order.
// typed notes what reaches a terminal: input in order, and sizes, which do not wait for input.
type typed struct{ got, sizes []string }

func (t *typed) Write(p []byte) (int, error) {
	t.got = append(t.got, string(p))
	return len(p), nil
}

func (t *typed) Resize(s ptyhost.Size) error {
	t.sizes = append(t.sizes, s.String())
	return nil
}

func (t *typed) Close() error { return nil }

func TestFeed(t *testing.T) {
	tests := map[string]struct {
		in   string
		want typed
		fail bool
	}{
		"data and size": {`{"data":"ls\r","height":30,"width":100}`, typed{[]string{"ls\r"}, []string{"100x30"}}, false},
		"half a size":   {`{"height":30}{"width":100}`, typed{}, false},
		"run together":  {`{"data":"a"}{"data":"b"}`, typed{got: []string{"a", "b"}}, false},
		"not json":      {`{"data":"a"}nonsense`, typed{got: []string{"a"}}, true},
		"cut off":       {`{"data":"a"}{"da`, typed{got: []string{"a"}}, true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			var got typed
			err := feed(&got, strings.NewReader(tt.in))
			if (err != nil) != tt.fail {
				t.Errorf("feed = %v, want failure %v", err, tt.fail)
			}
			if diff := cmp.Diff(tt.want, got, cmp.AllowUnexported(typed{})); diff != "" {
				t.Errorf("fed (-want +got):\n%s", diff)
			}
		})
	}
}

// stuck is the terminal of a program that does not read.
type stuck struct {
	typed
	closed chan struct{}
}

func (s *stuck) Write([]byte) (int, error) {
	<-s.closed
	return 0, net.ErrClosed
}

func (s *stuck) Close() error {
	close(s.closed)
	return nil
}

// TestFeedStuck wants sizes and leaving to be noticed while a program does not read what was typed.
func TestFeedStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &stuck{closed: make(chan struct{})}
		begun := time.Now()
		if err := feed(s, strings.NewReader(`{"data":"a"}{"data":"b"}{"height":30,"width":100}`)); err != nil || time.Since(begun) != lastWords {
			t.Errorf("feed = %v after %v", err, time.Since(begun))
		}
		if diff := cmp.Diff([]string{"100x30"}, s.sizes); diff != "" {
			t.Errorf("sizes (-want +got):\n%s", diff)
		}
	})
}

// TestSilentClient tells a client that is gone without a word from one that only says nothing.
func TestSilentClient(t *testing.T) {
	for ending, want := range map[bool]time.Duration{true: time.Minute + maxSilence, false: time.Hour} {
		synctest.Test(t, func(t *testing.T) {
			ours, theirs := net.Pipe()
			defer theirs.Close()
			begun := time.Now()
			go func() {
				for range 30 { // a minute in which it asks, and then its machine sleeps
					io.WriteString(theirs, "{}")
					time.Sleep(2 * time.Second)
				}
			}()
			time.AfterFunc(time.Hour, func() { ours.Close() })
			err := feed(&typed{}, fromClient(ours, wire.PTYInit{Ending: ending}))
			if took := time.Since(begun) - want; err == nil || took < -2*time.Second || took > 0 {
				t.Errorf("with ending %v it was let go after %v: %v", ending, time.Since(begun), err)
			}
		})
	}
}

func FuzzFeed(f *testing.F) {
	f.Add([]byte(`{"data":"ls\r","height":30,"width":100}`))
	f.Add([]byte(`{"height":65536}`))
	f.Fuzz(func(t *testing.T, in []byte) {
		var got typed
		if err := feed(&got, bytes.NewReader(in)); err == nil && len(in) > 0 && len(got.got)+len(got.sizes) > len(in) {
			t.Errorf("%d bytes made %d actions", len(in), len(got.got))
		}
	})
}

// TestTerminalEnv: it is the environment that the program gets that tells the locale.
func TestTerminalEnv(t *testing.T) {
	const term, ctype = "TERM=xterm-256color", "LC_CTYPE=C.UTF-8"
	tests := map[string]struct{ env, want []string }{
		"none":          {nil, []string{term, ctype}},
		"utf-8 by lang": {[]string{"LANG=de_DE.UTF-8"}, []string{"LANG=de_DE.UTF-8", term}},
		"spelt utf8":    {[]string{"LANG=de_DE.utf8"}, []string{"LANG=de_DE.utf8", term}},
		"ctype wins":    {[]string{"LANG=de_DE.UTF-8", "LC_CTYPE=C"}, []string{"LANG=de_DE.UTF-8", "LC_CTYPE=C", term, ctype}},
		"all is kept":   {[]string{"LC_ALL=C"}, []string{"LC_ALL=C", term}},
		"empty all":     {[]string{"LANG=C", "LC_ALL="}, []string{"LANG=C", "LC_ALL=", term, ctype}},
		"a template's":  {[]string{"TERM=dumb", "LANG=C.UTF-8"}, []string{"TERM=dumb", "LANG=C.UTF-8", term}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, terminalEnv(tt.env)); diff != "" {
				t.Errorf("environment (-want +got):\n%s", diff)
			}
		})
	}
}

// ptyTest is a server with a real terminal host behind it, a process of its own, over loopback.
type ptyTest struct {
	addr    string
	reports <-chan string // what is reported of connections
	host    *terminalHost
	server  *ptyServer
	log     *lockedBuffer
	stop    func() // ends the server
	kept    atomic.Bool
}

func servePTY(t *testing.T) *ptyTest {
	t.Helper()
	dir := shortDir(t)
	told := make(chan string, 100)
	p := &ptyTest{reports: told, log: &lockedBuffer{}}
	log := slog.New(slog.NewTextHandler(p.log, nil))
	start := func(socket string) error {
		cmd := &exec.Cmd{Path: "/proc/self/exe", Args: []string{"ptyhost"}, Env: append(os.Environ(), envHost+"="+socket)}
		return ptyhost.StartDetached(cmd, nil, socket+".log")
	}
	p.host = &terminalHost{socket: filepath.Join(dir, "s"), start: start, idle: idleTimes{unnamed: time.Minute}, log: log}
	off := &containerShells{refusal: "off"}
	p.server = &ptyServer{
		terminals: p.host,
		container: off.spec,
		command: func(line string, env []string) (shell.Spec, error) {
			if line == "fail" {
				return shell.Spec{}, errors.New("no manifest yet")
			}
			return shell.Spec{Argv: []string{"/bin/sh", "-c", line}, Dir: dir, Env: append(env, "PATH=/bin:/usr/bin")}, nil
		},
		connected: func(ip string) func(int, string) {
			told <- "connect " + ip
			return func(exit int, reason string) { told <- fmt.Sprintf("disconnect %d %s", exit, reason) }
		},
		keeps: p.kept.Load,
		log:   log,
	}
	l := listenLoopback(t)
	p.addr = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := p.server.serve(ctx, l); err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	watching, unwatch := context.WithCancel(context.Background())
	if err := p.host.ensure(ctx); err != nil {
		t.Fatal(err)
	}
	running.Go(func() { p.host.watch(watching) })
	p.stop = sync.OnceFunc(cancel)
	t.Cleanup(func() {
		p.stop()
		unwatch()
		running.Wait()
		if err := p.host.end(context.Background()); err != nil {
			t.Errorf("cannot end the terminals: %v", err)
		}
	})
	return p
}

// open asks for a terminal.
func (p *ptyTest) open(t *testing.T, init wire.PTYInit) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", p.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if err := wire.WritePTYInit(conn, init); err != nil {
		t.Fatal(err)
	}
	return conn
}

// readUntil reads until it has seen want.
func readUntil(t *testing.T, r io.Reader, want string) string {
	t.Helper()
	var seen strings.Builder
	buf := make([]byte, 4096)
	for !strings.Contains(seen.String(), want) {
		n, err := r.Read(buf)
		seen.Write(buf[:n])
		if err != nil {
			t.Fatalf("%v before %q was seen in %q", err, want, &seen)
		}
	}
	return seen.String()
}

func TestTerminalIsLeftAndTakenUpAgain(t *testing.T) {
	p := servePTY(t)
	init := wire.PTYInit{
		ID: uuid.New(), Height: 30, Width: 100, BackendType: "who knows",
		Command: `stty size; echo "TERM is $TERM"; while read line; do echo "got <$line>"; [ "$line" = end ] && exit; done`,
	}
	first := p.open(t, init)
	readUntil(t, first, "TERM is xterm-256color")
	io.WriteString(first, `{"data":"one\r"}`)
	readUntil(t, first, "got <one>")
	first.Close()

	// How the program would be started cannot be told now, as with a container whose engine is away. It runs, so that is of no matter.
	again := init
	again.Command = "fail"
	second := p.open(t, again)
	screen := readUntil(t, second, "got <one>")
	if !strings.Contains(screen, "30 100") {
		t.Errorf("the screen lacks what was there before: %q", screen)
	}
	io.WriteString(second, `{"data":"end\r","height":40,"width":120}`)
	readUntil(t, second, "got <end>")
	if _, err := io.Copy(io.Discard, second); err != nil {
		t.Errorf("after the program's end: %v, want the connection closed", err)
	}
	var got []string
	for range 4 {
		got = append(got, <-p.reports)
	}
	slices.Sort(got)
	if diff := cmp.Diff([]string{"connect 127.0.0.1", "connect 127.0.0.1", "disconnect 0 graceful", "disconnect 0 graceful"}, got); diff != "" {
		t.Errorf("reports (-want +got):\n%s", diff)
	}
}

func TestTerminalThatCannotBeOpened(t *testing.T) {
	p := servePTY(t)
	for name, tt := range map[string]struct {
		init wire.PTYInit
		said string
		why  string
	}{
		"no command yet": {wire.PTYInit{ID: uuid.New(), Height: 24, Width: 80, Command: "fail"}, "no manifest yet\r\n", "no manifest yet"},
		"in a container": {wire.PTYInit{ID: uuid.New(), Height: 24, Width: 80, Container: "web"}, "containers are switched off here (--devcontainers=false)\r\n", "cannot run in container"},
		"no id":          {wire.PTYInit{Height: 24, Width: 80}, "", "id"},
	} {
		t.Run(name, func(t *testing.T) {
			said, err := io.ReadAll(p.open(t, tt.init))
			if err != nil || !strings.Contains(string(said), tt.said) {
				t.Errorf("said %q, %v; want %q and the connection closed", said, err, tt.said)
			}
			if c, d := <-p.reports, <-p.reports; c != "connect 127.0.0.1" || !strings.HasPrefix(d, "disconnect 1 ") || !strings.Contains(d, tt.why) {
				t.Errorf("reported %q, %q", c, d)
			}
		})
	}
}

// TestTooManyClients: the one that is refused is told, and so does not try for ever.
func TestTooManyClients(t *testing.T) {
	p := servePTY(t)
	p.server.conns.Add(maxPTYConns)
	defer p.server.conns.Add(-maxPTYConns)
	said, err := io.ReadAll(p.open(t, wire.PTYInit{ID: uuid.New(), Height: 24, Width: 80, Ending: true}))
	text, ending, ok := wire.CutPTYEnding(said)
	if err != nil || !ok || ending.Code != noExitCode || !strings.Contains(string(text), "256 clients are connected") {
		t.Errorf("said %q, %v", said, err)
	}
}

// TestTerminalsInANetworkThatBreaks: the reasons are those that the protocol has words for.
func TestTerminalsInANetworkThatBreaks(t *testing.T) {
	p := servePTY(t)
	conn := p.open(t, wire.PTYInit{ID: uuid.New(), Height: 24, Width: 80, Command: "echo up; read x"})
	readUntil(t, conn, "up")
	if err := conn.(*net.TCPConn).SetLinger(0); err != nil { // closing resets
		t.Fatal(err)
	}
	conn.Close()
	half, err := net.Dial("tcp", p.addr)
	if err != nil {
		t.Fatal(err)
	}
	half.Write([]byte{200, 0, '{'})
	half.Close()
	var got []string
	for range 4 {
		got = append(got, <-p.reports)
	}
	slices.Sort(got)
	if diff := cmp.Diff([]string{"connect 127.0.0.1", "connect 127.0.0.1", "disconnect 1 network_error", "disconnect 1 network_error"}, got); diff != "" {
		t.Errorf("reports (-want +got):\n%s", diff)
	}
}
