package ptyhost

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/account"
	"github.com/berthd/berth/oom"
)

// maxSocketPath is sun_path less its final zero.
const maxSocketPath = 107

// maxLog is the size at which the log of a host about to start is begun anew.
const maxLog = 1 << 20

// ErrHostRunning is returned (wrapped) by [Listen] when another host serves the socket.
var ErrHostRunning = errors.New("another terminal host is running")

// listener holds the lock beside a socket for as long as the socket is served.
type listener struct {
	net.Listener
	lock *os.File
}

func (l *listener) Close() error {
	return errors.Join(l.Listener.Close(), l.lock.Close())
}

// Listen listens on the Unix socket at path so that exactly one host serves it: readable by this user only, a stale socket is replaced,
// and a second host gets an error wrapping [ErrHostRunning]. The lock is a file beside the socket, which stays.
func Listen(path string) (net.Listener, error) {
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("cannot listen: the socket's path %s is longer than the %d bytes the system allows", path, maxSocketPath)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the socket's directory: %w", err)
	}
	lock, err := os.OpenFile(path+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot open the socket's lock: %w", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("cannot listen on %s: %w", path, ErrHostRunning)
		}
		return nil, fmt.Errorf("cannot lock the socket: %w", err)
	}
	l, err := listenLocked(path)
	if err != nil {
		lock.Close()
		return nil, err
	}
	return &listener{l, lock}, nil
}

// listenLocked replaces a socket whose host died. Whatever else is at path stays.
func listenLocked(path string) (net.Listener, error) {
	switch info, err := os.Lstat(path); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("cannot look at the socket: %w", err)
	case info.Mode().Type() != fs.ModeSocket:
		return nil, fmt.Errorf("cannot listen on %s: there is something else than a socket", path)
	default:
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("cannot remove a stale socket: %w", err)
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("cannot listen: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil { // until here, the check of every peer's user keeps others out
		l.Close()
		return nil, fmt.Errorf("cannot close the socket to others: %w", err)
	}
	return l, nil
}

// RunProcess is the whole life of a host process (`berthd ptyhost`): it listens on socket and serves until ctx is done, it is told to shut down or
// gets SIGTERM or SIGINT. If another host serves the socket already, it returns an error wrapping [ErrHostRunning].
func RunProcess(ctx context.Context, socket string, log *slog.Logger) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	// A hang-up is for terminals, not for their owner. And a signal that was ignored when we were started (nohup, a shell's background) would stay
	// ignored in every program we start, and no terminal could be interrupted or hung up: catching it makes it a default again for them.
	caught := make(chan os.Signal, 1)
	signal.Notify(caught, syscall.SIGHUP, syscall.SIGQUIT)
	defer signal.Stop(caught)

	l, err := Listen(socket)
	if err != nil {
		return err
	}
	if err := oom.Protect(); err != nil { // as of every user but root, mostly
		log.Debug("the owner of the terminals is as likely a victim as they are", "error", err)
	}
	return NewHost(HostConfig{Log: log}).Serve(ctx, l)
}

// StartDetached starts cmd in a session of its own, its output appended to the file at logPath (or lost, where the disk is full), so that it outlives this process and its
// terminal. It runs as user, who may be nil. It is what the start function given to [Client.Ensure] calls. It does not wait; should cmd end before this process, it is reaped.
func StartDetached(cmd *exec.Cmd, user *account.User, logPath string) error {
	if err := os.MkdirAll(filepath.Dir(logPath), 0o700); err != nil {
		return fmt.Errorf("cannot make the log's directory: %w", err)
	}
	flags := os.O_CREATE | os.O_WRONLY | os.O_APPEND
	if info, err := os.Stat(logPath); err == nil && info.Size() > maxLog {
		flags |= os.O_TRUNC
	}
	cmd.Stdin = nil
	switch log, err := os.OpenFile(logPath, flags, 0o600); {
	case err == nil:
		defer log.Close()
		cmd.Stdout, cmd.Stderr = log, log
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		// Terminals are worth more than their log, and may be what it takes to make room.
	default:
		return fmt.Errorf("cannot open the terminal host's log: %w", err)
	}
	if cmd.Dir == "" {
		cmd.Dir = "/" // keep no file system busy
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Credential: user.Credential()}
	if err := oom.Start(cmd); err != nil {
		return fmt.Errorf("cannot start the terminal host: %w", err)
	}
	go cmd.Wait() // ends with cmd, or with this process
	return nil
}
