package ptyhost

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os/exec"
)

// HostConfig configures a [Host]. The zero value works.
type HostConfig struct {
	Log *slog.Logger // nil discards
}

// Host owns sessions and serves them to viewers.
type Host struct {
	cfg HostConfig
}

// NewHost returns a host without sessions.
func NewHost(cfg HostConfig) *Host { return &Host{cfg: cfg} }

// Serve serves viewers on l until ctx is done or [Client.Shutdown] is called; it then ends every session and returns nil.
func (h *Host) Serve(ctx context.Context, l net.Listener) error { return errors.New("not built yet") }

// Listen listens on the Unix socket at path so that exactly one host serves it: readable by this user only, a stale socket is replaced,
// and a second host gets an error.
func Listen(path string) (net.Listener, error) { return nil, errors.New("not built yet") }

// RunProcess is the whole life of a host process (`berthd ptyhost`): it listens on socket and serves until ctx is done or it is told to shut down.
func RunProcess(ctx context.Context, socket string, log *slog.Logger) error {
	return errors.New("not built yet")
}

// StartDetached starts cmd in a session of its own, its output appended to the file at logPath, so that it outlives this process and its
// terminal. It is what the start function given to [Ensure] calls.
func StartDetached(cmd *exec.Cmd, logPath string) error { return errors.New("not built yet") }
