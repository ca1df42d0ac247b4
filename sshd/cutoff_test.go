package sshd

import (
	"context"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/berthd/berth/ptyhost"
)

// keeping is a server that keeps the terminals of clients that were cut off, and its terminal host.
func keeping(t *testing.T) (*fixture, *ptyhost.Client) {
	host := terminals(t)
	return serve(t, func(c *Config) { c.Terminals, c.Keep = host, time.Minute }), host
}

// relay is a path to the server that can be broken as networks break.
func (f *fixture) relay(t *testing.T) (port string, reset func()) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	broken, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		here, err := l.Accept()
		if err != nil {
			return
		}
		defer here.Close()
		there, err := net.DialTCP("tcp", nil, f.addr)
		if err != nil {
			t.Error(err)
			return
		}
		defer there.Close()
		go func() {
			io.Copy(there, here)
			there.CloseWrite()
		}()
		go io.Copy(here, there)
		<-broken
		there.SetLinger(0)
	}()
	return strings.TrimPrefix(l.Addr().String(), "127.0.0.1:"), func() { close(broken); <-done }
}

// What a person does on purpose ends the program in the terminal, and what happens to a connection does not.
func TestCutOff(t *testing.T) {
	for name, tt := range map[string]struct {
		act  func(ssh *os.Process, reset, stop func())
		kept bool
	}{
		"closed window":  {func(ssh *os.Process, _, _ func()) { ssh.Signal(syscall.SIGHUP) }, false},
		"terminated":     {func(ssh *os.Process, _, _ func()) { ssh.Signal(syscall.SIGTERM) }, false},
		"killed":         {func(ssh *os.Process, _, _ func()) { ssh.Kill() }, false}, // its system still ends the stream
		"reset":          {func(_ *os.Process, reset, _ func()) { reset() }, true},
		"server stopped": {func(_ *os.Process, _, stop func()) { stop() }, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			host := terminals(t)
			ctx, stop := context.WithCancel(context.Background())
			defer stop()
			f := serve(t, func(c *Config) { c.Terminals, c.Keep = host, time.Minute })
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			f.addr = l.Addr().(*net.TCPAddr)
			background(t, func(context.Context) error { return f.Serve(ctx, l) })
			port, reset := f.relay(t)
			cmd := f.command(t, "ssh", "-tt", "-p", port, "ws", "echo up $SSH_TTY; read line; echo $line; exec sleep 1000")
			stdin, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			defer stdin.Close()
			startUp(t, cmd)
			tt.act(cmd.Process, reset, stop)
			if name != "reset" {
				defer reset()
			}
			var got []ptyhost.SessionInfo
			eventually(t, "the server noticed", func() bool {
				got, err = host.List(t.Context())
				return err == nil && (len(got) == 0 || got[0].Viewers == 0)
			})
			if !tt.kept {
				if len(got) != 0 {
					t.Fatalf("the program goes on: %+v", got)
				}
				return
			}
			if len(got) != 1 || got[0].Kind != KindSSH || got[0].Exited != nil || time.Since(got[0].LeftAt) > time.Minute || time.Until(got[0].EndsAt) > time.Minute {
				t.Fatalf("got %+v, want what was cut off", got)
			}
			// Its name finds it again, with what it showed.
			att, err := host.Attach(t.Context(), ptyhost.AttachRequest{ID: got[0].Name})
			if err != nil {
				t.Fatal(err)
			}
			defer att.Close()
			screen := make([]byte, 4096)
			for shown := ""; !strings.Contains(shown, "up /dev/pts/"); {
				n, err := att.Read(screen)
				if err != nil {
					t.Fatalf("after %q: %v", shown, err)
				}
				shown += string(screen[:n])
			}
			if _, err := io.WriteString(att, "again\n"); err != nil {
				t.Fatal(err)
			}
			for shown := ""; strings.Count(shown, "again") < 2; { // echoed by the terminal and by the program
				n, err := att.Read(screen)
				if err != nil {
					t.Fatalf("after %q: %v", shown, err)
				}
				shown += string(screen[:n])
			}
		})
	}
}

// startUp starts a client whose command says "up", and returns what follows. It is killed at the test's end.
func startUp(t *testing.T, cmd *exec.Cmd) (stdout io.Reader) {
	t.Helper()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	up := make([]byte, 2)
	if _, err := io.ReadFull(stdout, up); err != nil || string(up) != "up" {
		t.Fatalf("got %q, %v", up, err)
	}
	return stdout
}

// A client that does not answer is told apart from one that does, and gives its terminal to whoever takes it up.
func TestSilentClient(t *testing.T) {
	f, host := keeping(t)
	cmd := f.command(t, "ssh", "-tt", "ws", "echo up; exec yes")
	stdout := startUp(t, cmd)
	all, err := host.List(t.Context())
	if err != nil || len(all) != 1 {
		t.Fatalf("got %+v, %v", all, err)
	}
	id := all[0].ID
	f.TakeUp(t.Context(), id)
	if diff := cmp.Diff(map[string]time.Time{id: {}}, f.Held(t.Context())); diff != "" {
		t.Fatalf("held by a client that is there (-want +got):\n%s", diff)
	}
	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is silent", func() bool { return !f.Held(t.Context())[id].IsZero() })
	if since := time.Since(f.Held(t.Context())[id]); since < probeTimeout || since > time.Minute {
		t.Errorf("silent for %v", since)
	}
	att, err := host.Attach(t.Context(), ptyhost.AttachRequest{ID: all[0].Name, Raw: true})
	if err != nil {
		t.Fatal(err)
	}
	defer att.Close()
	f.TakeUp(t.Context(), id)
	// The window of the silent client is full: the program goes on only since it does not hold the terminal any more.
	if _, err := io.CopyN(io.Discard, att, 8<<20); err != nil {
		t.Error(err)
	}
	cmd.Process.Signal(syscall.SIGCONT)
	go io.Copy(io.Discard, stdout)
	if cmd.Wait(); cmd.ProcessState.ExitCode() != exitInternal && cmd.ProcessState.ExitCode() != exitSignal {
		t.Errorf("the client ended with %v", cmd.ProcessState)
	}
	if all, err := host.List(t.Context()); err != nil || len(all) != 1 || all[0].Exited != nil {
		t.Errorf("got %+v, %v; want the terminal to go on", all, err)
	}
}

// A client that stays silent for long loses its connection, not its terminal.
func TestKeepAlive(t *testing.T) {
	host := terminals(t)
	f := serve(t, func(c *Config) { c.Terminals, c.Keep, c.KeepAlive = host, time.Minute, 50*time.Millisecond })
	cmd := f.command(t, "ssh", "-tt", "ws", "echo up; exec sleep 1000")
	startUp(t, cmd)
	for range 10 { // it is asked each time, and answers
		if held := f.Held(t.Context()); len(held) != 1 {
			t.Fatalf("got %v", held)
		}
		time.Sleep(f.cfg.KeepAlive)
	}
	if f.Counts().Connections != 1 {
		t.Fatal("a client that answers was closed")
	}
	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the connection is closed", func() bool { return f.Counts().Connections == 0 })
	if all, err := host.List(t.Context()); err != nil || len(all) != 1 || all[0].Viewers != 0 || all[0].Exited != nil {
		t.Errorf("got %+v, %v; want the terminal to wait", all, err)
	}
}
