package berthd

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/berthd/berth/account"
	"github.com/berthd/berth/ptyhost"
)

// ptyhost is the internal verb that owns the terminals, until run tells it to end.
func (p process) ptyhost(ctx context.Context) error {
	var socket string
	fs := flag.NewFlagSet("berthd ptyhost", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringVar(&socket, "socket", "", "")
	if err := fs.Parse(p.args); err != nil {
		return usagef("%w: berthd starts this verb by itself", err)
	}
	if socket == "" {
		return usagef("--socket is missing: berthd starts this verb by itself")
	}
	return ptyhost.RunProcess(ctx, socket, slog.New(slog.NewTextHandler(p.stderr, nil)))
}

// selfCommand returns how this process is called up to its berthd arguments, which are args: the
// berth binary holds berthd behind a word of its own.
func selfCommand(args []string) []string {
	return os.Args[:max(1, len(os.Args)-len(args))]
}

// hostProgram owns the terminals where it lies beside berthd; elsewhere berthd does so itself.
const hostProgram = "berthd-ptyhost"

// hostCommands are the ways to start a process that outlives this one: the program beside berthd, if there is one to trust, and berthd itself.
// beside and ours are the arguments of either.
func hostCommands(self, beside, ours []string, log *slog.Logger) ([]*exec.Cmd, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("cannot find berthd's own program: %w", err)
	}
	commands := []*exec.Cmd{{Path: exe, Args: slices.Concat(self, ours)}}
	program := filepath.Join(filepath.Dir(exe), hostProgram)
	switch err := trusted(program); {
	case err == nil:
		small := &exec.Cmd{Path: program, Args: append([]string{hostProgram}, beside...)}
		commands = slices.Insert(commands, 0, small)
	case !errors.Is(err, fs.ErrNotExist):
		log.Warn("the program that lies beside berthd is not used; berthd does its work, with more memory", "program", program, "error", err)
	}
	return commands, nil
}

// startTerminals starts the process that owns the terminals, as user: so are the terminals' devices and
// programs, by nobody's doing. It outlives this one.
func startTerminals(self []string, socket string, user *account.User, logFile string, log *slog.Logger) error {
	commands, err := hostCommands(self, []string{"--socket", socket}, []string{"ptyhost", "--socket", socket}, log)
	if err != nil {
		return err
	}
	for _, cmd := range commands {
		if err = ptyhost.StartDetached(cmd, user, logFile); err == nil {
			return nil
		}
	}
	return err
}

// scriptHolders are the ways to start what holds a script (hold.RunProcess).
func scriptHolders(self []string, log *slog.Logger) []*exec.Cmd {
	commands, err := hostCommands(self, []string{"--script"}, []string{"hold-script"}, log)
	if err != nil {
		log.Warn("no script can be started", "error", err)
	}
	return commands
}

// trusted reports what speaks against running a program with this user's rights: others may have put it there.
func trusted(program string) error {
	info, err := os.Lstat(program)
	if err != nil {
		return err
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case !info.Mode().IsRegular():
		return errors.New("it is no regular file")
	case !ok || stat.Uid != 0 && int(stat.Uid) != os.Getuid():
		return errors.New("it belongs to another user")
	case info.Mode().Perm()&0o022 != 0:
		return errors.New("others than its owner may write to it")
	}
	return nil
}
