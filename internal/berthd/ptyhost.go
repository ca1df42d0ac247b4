package berthd

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

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
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	// A hang-up is for terminals, not for their owner. Caught, not ignored: children would inherit that.
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	defer signal.Stop(hangups)
	return ptyhost.RunProcess(ctx, socket, slog.New(slog.NewTextHandler(p.stderr, nil)))
}

// selfCommand returns how this process is called up to its berthd arguments, which are args: the
// berth binary holds berthd behind a word of its own.
func selfCommand(args []string) []string {
	return os.Args[:max(1, len(os.Args)-len(args))]
}

// startTerminals starts the process that owns the terminals. It outlives this one.
func startTerminals(self []string, socket, logFile string) error {
	exe, err := os.Executable()
	if err != nil {
		return fmt.Errorf("cannot start the terminal host: %w", err)
	}
	argv := append(append([]string{}, self...), "ptyhost", "--socket", socket)
	return ptyhost.StartDetached(&exec.Cmd{Path: exe, Args: argv}, logFile)
}
