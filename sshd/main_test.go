package sshd

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/berthd/berth/internal/testhome"
	"github.com/berthd/berth/ptyhost"
	"github.com/berthd/berth/shell"
	"github.com/berthd/berth/wire/agentpb"
)

func TestMain(m *testing.M) { testhome.Main(m) }

// fixture is a server on loopback, and what OpenSSH's programs need to reach it.
type fixture struct {
	*Server
	addr *net.TCPAddr
	dir  string // the workspace's directory
	conf string // an ssh_config with the host "ws"
}

// serve starts a server that ends with the test. change may be nil.
func serve(t testing.TB, change func(*Config), tune ...func(*limits)) *fixture {
	t.Helper()
	f := &fixture{dir: t.TempDir()}
	// Sockets have short paths.
	run, err := os.MkdirTemp("", "sshd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(run) })

	key, err := HostKey(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	ws := shell.New(shell.Config{})
	ws.Update(&agentpb.Manifest{Directory: f.dir}, "")
	// Who asks for a terminal brings a host; see terminals.
	cfg := Config{HostKey: key, Terminals: ptyhost.Dial(filepath.Join(run, "nobody")), Command: ws.Command}
	if change != nil {
		change(&cfg)
	}
	if f.Server, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	for _, tune := range tune {
		tune(&f.limits)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f.addr = l.Addr().(*net.TCPAddr)
	background(t, func(ctx context.Context) error { return f.Serve(ctx, l) })

	f.conf = filepath.Join(run, "config")
	known := "Host ws\nHostName 127.0.0.1\nPort " + port(f.addr) + "\nUser whoever\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n" +
		"LogLevel ERROR\nBatchMode yes\nControlPath " + filepath.Join(run, "mux") + "\n"
	if err := os.WriteFile(f.conf, []byte(known), 0o600); err != nil {
		t.Fatal(err)
	}
	return f
}

func port(a *net.TCPAddr) string { return strings.TrimPrefix(a.String(), a.IP.String()+":") }

// terminals runs a real terminal host until the test ends.
func terminals(t testing.TB) *ptyhost.Client {
	t.Helper()
	dir, err := os.MkdirTemp("", "pty")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "s")
	l, err := ptyhost.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	background(t, func(ctx context.Context) error { return ptyhost.NewHost(ptyhost.HostConfig{}).Serve(ctx, l) })
	return ptyhost.Dial(socket)
}

// background runs f until the test ends, and then waits for it.
func background(t testing.TB, f func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// command is one of OpenSSH's programs, set up to reach the server.
func (f *fixture) command(t testing.TB, program string, args ...string) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, program, append([]string{"-F", f.conf}, args...)...)
	cmd.WaitDelay = time.Second
	return cmd
}

type result struct {
	Stdout, Stderr string
	Code           int
}

// ssh runs OpenSSH's client to its end.
func (f *fixture) ssh(t *testing.T, stdin string, args ...string) result {
	t.Helper()
	return run(t, f.command(t, "ssh", args...), stdin)
}

func run(t *testing.T, cmd *exec.Cmd, stdin string) result {
	t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
	err := cmd.Run()
	if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited {
		t.Fatalf("cannot run %v (openssh-client must be installed): %v", cmd.Args, err)
	}
	return result{out.String(), errs.String(), cmd.ProcessState.ExitCode()}
}
