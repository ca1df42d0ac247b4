package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/berthd/berth/bench/lab"
	"github.com/berthd/berth/ptyhost"
	"github.com/berthd/berth/shell"
	"github.com/berthd/berth/sshd"
	"github.com/berthd/berth/wire/agentpb"
)

// A way is a host of the SSH configuration.
type way struct{ host, name string }

// ways lists them, the peer first.
var ways = []way{{"peer", "OpenSSH's sshd, loopback"}, {"plain", "berth's server, loopback"}, {"mesh", "berth, over the mesh"}}

// world is what is measured: the lab's, and berth's server without a mesh.
type world struct {
	*lab.World
	plain *exec.Cmd
}

func start(ctx context.Context, bin, dir string) (*world, error) {
	base, err := lab.Start(ctx, bin, dir)
	if err != nil {
		return nil, err
	}
	w := &world{World: base}
	addr, err := lab.FreeAddr()
	var self string
	if err == nil {
		self, err = os.Executable()
	}
	if err == nil {
		w.plain, err = w.Run(self, nil, "serve", addr)
	}
	if err == nil {
		err = w.configure(addr)
	}
	for _, way := range ways {
		if err == nil {
			err = w.Poll(way.name, func() error { return w.finish(w.ssh(way, "true"), nil, nil) })
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%w\n%s", err, w.Log())
	}
	return w, nil
}

func (w *world) configure(plain string) error {
	_, port, err := net.SplitHostPort(plain)
	if err != nil {
		return err
	}
	config := fmt.Sprintf("Host peer\n\tHostName 127.0.0.1\n\tPort %s\n\tUser root\n\tIdentityFile %s\nHost plain\n\tHostName 127.0.0.1\n\tPort %s\nHost mesh\n\tProxyCommand %s ssh --stdio bench\n"+
		"Host *\n\tBatchMode yes\n\tStrictHostKeyChecking no\n\tUserKnownHostsFile /dev/null\n\tLogLevel ERROR\n",
		w.SSHPort, filepath.Join(w.Dir, "user"), port, filepath.Join(w.Bin, "berth"))
	return os.WriteFile(w.config(), []byte(config), 0o600)
}

func (w *world) config() string { return filepath.Join(w.Dir, "ssh_config") }

// command is a program with the environment of all.
func (w *world) command(name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(w.Ctx, name, args...)
	cmd.Env = w.Env
	return cmd
}

func (w *world) ssh(to way, args ...string) *exec.Cmd {
	return w.command("ssh", append([]string{"-F", w.config(), to.host}, args...)...)
}

// finish runs a command that has to succeed.
func (w *world) finish(cmd *exec.Cmd, in io.Reader, out io.Writer) error {
	var errOut bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, out, &errOut
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, bytes.TrimSpace(errOut.Bytes()))
	}
	return nil
}

// serve is berth's SSH server on a loopback address, until the process is told to stop.
func serve(addr string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	dir, err := os.MkdirTemp("", "bssh-plain")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	key, err := sshd.HostKey(dir)
	if err != nil {
		return err
	}
	ws := shell.New(shell.Config{})
	ws.Update(&agentpb.Manifest{}, "")
	// Nothing that is measured asks for a terminal, so nobody has to listen there.
	server, err := sshd.New(sshd.Config{HostKey: key, Terminals: ptyhost.Dial(filepath.Join(dir, "none")), Command: ws.Command})
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	return server.Serve(ctx, l)
}
