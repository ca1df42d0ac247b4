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

// startTerminals starts the process that owns the terminals, as user: so are the terminals' devices and
// programs, by nobody's doing. It outlives this one.
func startTerminals(self []string, socket string, user *account.User, logFile string, log *slog.Logger) error {
	exe, err := os.Executable()
	if err != nil {
		return fmt.Errorf("cannot start the terminal host: %w", err)
	}
	beside := filepath.Join(filepath.Dir(exe), hostProgram)
	err = trusted(beside)
	if err == nil {
		err = ptyhost.StartDetached(&exec.Cmd{Path: beside, Args: []string{hostProgram, "--socket", socket}}, user, logFile)
	}
	if err == nil {
		return nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		log.Warn("the program that lies beside berthd for the terminals is not used; berthd does its work, with more memory", "program", beside, "error", err)
	}
	argv := append(append([]string{}, self...), "ptyhost", "--socket", socket)
	return ptyhost.StartDetached(&exec.Cmd{Path: exe, Args: argv}, user, logFile)
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
