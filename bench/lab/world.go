// Package lab is what measurements of the whole share: a control server, an agent and OpenSSH's sshd as processes of their own on
// loopback ([Start]), and what was measured, beside its peer's ([Series], [Row]).
package lab

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"
)

// World is what is measured.
type World struct {
	Ctx      context.Context
	Bin, Dir string   // the folders of our programs, and of everything else; both are the caller's
	Env      []string // of every process; it has berth reach the server
	SSHPort  string   // of OpenSSH's sshd, on 127.0.0.1; it takes the key in Dir/user
	Agent    *exec.Cmd
	SSHD     *exec.Cmd

	stops []func()
	logs  bytes.Buffer // of all processes; read when they have ended
}

// Start starts a control server, the agent "bench" and OpenSSH's sshd. What else the server's configuration is to say of the agent is
// declared, in YAML that is indented for its place.
func Start(ctx context.Context, bin, dir string, declared ...string) (*World, error) {
	w := &World{Ctx: ctx, Bin: bin, Dir: dir}
	w.Env = []string{
		"PATH=" + bin + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + dir, "XDG_CONFIG_HOME=" + dir, "XDG_STATE_HOME=" + dir,
		"SHELL=/bin/sh", "USER=root", "LANG=C.UTF-8", "TERM=xterm-256color",
	}
	config := "agents:\n  - name: bench\n" + strings.Join(declared, "")
	if err := os.WriteFile(filepath.Join(dir, "agents.yaml"), []byte(config), 0o600); err != nil {
		return nil, err
	}
	for _, f := range []func() error{w.startBerth, w.startSSH} {
		if err := f(); err != nil {
			return nil, fmt.Errorf("%w\n%s", err, w.Log())
		}
	}
	return w, nil
}

// Stop ends everything, the last first.
func (w *World) Stop() {
	for i := len(w.stops) - 1; i >= 0; i-- {
		w.stops[i]()
	}
	w.stops = nil
}

// OnStop has Stop call f before it ends what was started earlier.
func (w *World) OnStop(f func()) { w.stops = append(w.stops, f) }

// Log returns what the processes said; it ends them first.
func (w *World) Log() string {
	w.Stop()
	return w.logs.String()
}

// Run starts a process that lives until Stop.
func (w *World) Run(program string, env []string, args ...string) (*exec.Cmd, error) {
	cmd := exec.Command(program, args...)
	cmd.Env = append(w.Env, env...)
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	w.OnStop(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		kill := time.AfterFunc(10*time.Second, func() { cmd.Process.Kill() })
		cmd.Wait()
		kill.Stop()
		w.logs.Write(log.Bytes())
	})
	return cmd, nil
}

// Poll tries until f succeeds, 20 s at most.
func (w *World) Poll(what string, f func() error) error {
	var err error
	for range 200 {
		if err = f(); err == nil {
			return nil
		}
		if err := Pause(w.Ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
	return fmt.Errorf("%s does not start in 20 s: %w", what, err)
}

// FreeAddr is a loopback address that was free a moment ago.
func FreeAddr() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

var tokenPattern = regexp.MustCompile(`[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}`)

func (w *World) startBerth() error {
	addr, err := FreeAddr()
	if err != nil {
		return err
	}
	data := filepath.Join(w.Dir, "data")
	if _, err := w.Run(filepath.Join(w.Bin, "berth"), nil, "serve", "--listen", addr, "--data-dir", data, "--config", filepath.Join(w.Dir, "agents.yaml")); err != nil {
		return err
	}
	var token string
	err = w.Poll("the server", func() error {
		key, err := os.ReadFile(filepath.Join(data, "admin-key"))
		if err != nil {
			return err
		}
		cmd := exec.CommandContext(w.Ctx, filepath.Join(w.Bin, "berth"), "agent", "token", "bench")
		cmd.Env = append(w.Env, "BERTH_URL=http://"+addr, "BERTH_TOKEN="+strings.TrimSpace(string(key)))
		out, err := cmd.CombinedOutput()
		if token = tokenPattern.FindString(string(out)); token == "" {
			return fmt.Errorf("no token in %q: %v", out, err)
		}
		w.Env = cmd.Env
		return nil
	})
	if err != nil {
		return err
	}
	w.Agent, err = w.Run(filepath.Join(w.Bin, "berthd"), []string{"BERTH_TOKEN=" + token}, "run", "--state-dir", filepath.Join(w.Dir, "s"))
	return err
}

func (w *World) startSSH() error {
	const program = "/usr/sbin/sshd"
	addr, err := FreeAddr()
	if err != nil {
		return err
	}
	_, w.SSHPort, _ = net.SplitHostPort(addr)
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil { // where sshd drops its rights to
		return err
	}
	for _, name := range []string{"host", "user"} {
		if out, err := exec.CommandContext(w.Ctx, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(w.Dir, name)).CombinedOutput(); err != nil {
			return fmt.Errorf("cannot make a key: %w\n%s", err, out)
		}
	}
	// By default it drops some of more than ten logins that come at once. The home is that of all other processes here: what a person's
	// .bashrc does would be measured too, as bash reads it for commands of sshd's.
	config := fmt.Sprintf("HostKey %[1]s/host\nAuthorizedKeysFile %[1]s/user.pub\nPidFile none\nUsePAM no\nStrictModes no\nPermitRootLogin yes\nAcceptEnv LANG\n"+
		"MaxStartups 1000\nSubsystem sftp internal-sftp\nSetEnv HOME=%[1]s\n", w.Dir)
	if err := os.WriteFile(filepath.Join(w.Dir, "sshd"), []byte(config), 0o600); err != nil {
		return err
	}
	w.SSHD, err = w.Run(program, nil, "-D", "-e", "-f", filepath.Join(w.Dir, "sshd"), "-o", "ListenAddress=127.0.0.1:"+w.SSHPort)
	if err != nil {
		return err
	}
	return w.Poll("sshd", func() error {
		conn, err := net.Dial("tcp", "127.0.0.1:"+w.SSHPort)
		if err == nil {
			conn.Close()
		}
		return err
	})
}

// Build makes our programs as a release would. It wants to be run in the repository's root.
func Build(ctx context.Context, dir string) error {
	tags, err := os.ReadFile("cmd/berthd/tags.txt")
	if err != nil {
		return fmt.Errorf("run this from the repository's root: %w", err)
	}
	for program, tags := range map[string]string{"berthd": strings.TrimSpace(string(tags)), "berthd-ptyhost": "", "berth": ""} {
		if _, err := os.Stat("cmd/" + program); err != nil {
			continue
		}
		cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-tags", tags, "-o", filepath.Join(dir, program), "./cmd/"+program)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("cannot build %s: %w\n%s", program, err, out)
		}
	}
	return nil
}

// Pause waits for d, or for the end of ctx, which is its error.
func Pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
