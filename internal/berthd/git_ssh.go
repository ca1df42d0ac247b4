package berthd

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/berthd/berth/client"
	"github.com/berthd/berth/wire"
)

const gitSSHHelp = `berthd git-ssh: ssh for git, with the key that the control server keeps for this workspace's owner.

  berthd git-ssh -- SSH-ARGUMENTS

Sessions have it as GIT_SSH_COMMAND. Keys of this machine's user are offered first. Where the server
has no key, or is away, ssh runs with those alone. The exit code is that of ssh.
`

// exitStatus ends berthd with the code of a program that it ran, which has said why itself.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// sshFailed is the exit code that ssh has for failures of its own, a refused key among them.
const sshFailed = exitStatus(255)

// gitSSH is the verb that git calls in place of ssh.
func (p process) gitSSH(ctx context.Context) error {
	args := p.args
	if len(args) == 1 && (args[0] == "--help" || args[0] == "-h") {
		fmt.Fprint(p.stdout, gitSSHHelp)
		return nil
	}
	if len(args) > 0 && args[0] == "--" {
		args = args[1:]
	}
	if len(args) == 0 {
		return usagef("git-ssh needs the arguments of ssh: see berthd git-ssh --help")
	}
	// With -G git just asks whether this is an OpenSSH.
	if slices.Contains(args, "-G") {
		return p.ssh(args)
	}
	key, err := p.gitKey(ctx)
	if err != nil {
		fmt.Fprintf(p.stderr, "berthd: going on without the workspace's own key: %v\n", err)
		return p.ssh(args)
	}
	path, release, err := holdKey([]byte(strings.TrimRight(key.PrivateKey, "\n") + "\n"))
	if err != nil {
		fmt.Fprintf(p.stderr, "berthd: going on without the workspace's own key: %v\n", err)
		return p.ssh(args)
	}
	defer release()
	var with []string
	for _, identity := range append(p.identities(ctx, args), path) {
		with = append(with, "-i", identity)
	}
	err = p.ssh(append(with, args...))
	if errors.Is(err, sshFailed) {
		fmt.Fprintf(p.stderr, "berthd: if the other side refused the key, add this workspace's public key to your account there:\n\n  %s\n\n", wire.Line(key.PublicKey))
	}
	return err
}

// gitKey fetches the key pair.
func (p process) gitKey(ctx context.Context) (wire.GitSSHKey, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	server, err := p.server(ctx)
	if err != nil {
		return wire.GitSSHKey{}, err
	}
	key, err := server.GitSSHKey(ctx)
	switch {
	case err != nil:
		return wire.GitSSHKey{}, client.Explain(err)
	case strings.TrimSpace(key.PrivateKey) == "":
		return wire.GitSSHKey{}, errors.New("the server has none")
	}
	p.hide(ctx, key.PrivateKey)
	return key, nil
}

// identities returns the key files that ssh would use without us and that exist: naming one file
// with -i makes ssh forget the others.
func (p process) identities(ctx context.Context, args []string) []string {
	home := p.env["HOME"]
	var found []string
	add := func(path string) {
		if rest, ok := strings.CutPrefix(path, "~"); ok {
			path = filepath.Join(home, rest)
		}
		path = strings.ReplaceAll(path, "%d", home)
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
			found = append(found, path)
		}
	}
	cmd := exec.CommandContext(ctx, "ssh", append([]string{"-G"}, args...)...)
	cmd.Env = p.env.list()
	out, err := cmd.Output()
	if err != nil { // an ssh without -G, which is older than 2015
		for _, name := range []string{"id_rsa", "id_ecdsa", "id_ecdsa_sk", "id_ed25519", "id_ed25519_sk"} {
			add("~/.ssh/" + name)
		}
		return found
	}
	for lines := bufio.NewScanner(bytes.NewReader(out)); lines.Scan(); {
		if path, ok := strings.CutPrefix(lines.Text(), "identityfile "); ok {
			add(path)
		}
	}
	return found
}

// ssh runs ssh in the place of this process: its streams, its signals, its exit code.
func (p process) ssh(args []string) error {
	cmd := exec.Command("ssh", args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr, cmd.Env = p.stdin, p.stdout, p.stderr, p.env.list()
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	defer signal.Stop(signals)
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("cannot run ssh: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		select {
		case sig := <-signals:
			// One that ended meanwhile needs none.
			_ = cmd.Process.Signal(sig)
		case err := <-ended:
			var exit *exec.ExitError
			if errors.As(err, &exit) {
				if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
					return exitStatus(128 + int(status.Signal()))
				}
				return exitStatus(exit.ExitCode())
			}
			return err
		}
	}
}

// tempKey keeps a key in a file of this user alone, where there is no way without one.
func tempKey(dir string, pem []byte) (path string, release func(), err error) {
	f, err := os.CreateTemp(dir, "berthd-git-key-") // with mode 0600
	if err != nil {
		return "", nil, fmt.Errorf("cannot hold the key: %w", err)
	}
	release = func() { os.Remove(f.Name()) }
	if _, err = f.Write(pem); err == nil {
		err = f.Close()
	}
	if err != nil {
		release()
		return "", nil, fmt.Errorf("cannot hold the key: %w", err)
	}
	return f.Name(), release, nil
}
