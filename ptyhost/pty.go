package ptyhost

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"github.com/berthd/berth/oom"
)

// terminal is the master side of a PTY whose program runs.
type terminal struct {
	master *os.File // non-blocking, so that Close frees a reader and a writer
	conn   syscall.RawConn
	cmd    *exec.Cmd
}

// start opens a PTY of the given size and starts the program on it. Errors wrap [ErrStart] and are meant to be read by the person at the terminal.
func start(req *CreateRequest, size Size) (*terminal, error) {
	cmd, err := command(req)
	if err != nil {
		return nil, err
	}
	ptmx, tty, err := pty.Open()
	if err != nil {
		return nil, openError(err)
	}
	defer tty.Close()
	defer ptmx.Close()
	if err := prepare(tty, req.Modes, size); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrStart, err)
	}
	t, err := adopt(ptmx)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrStart, err)
	}
	if req.TTYVariable != "" {
		cmd.Env = append(cmd.Env, req.TTYVariable+"="+tty.Name()) // of two of one name the later counts
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := oom.Start(cmd); err != nil {
		t.master.Close()
		return nil, startError(err, cmd.Path)
	}
	t.cmd = cmd
	return t, nil
}

// adopt takes over the master that creack/pty opened. Its descriptor is in blocking mode, in which a read can not be interrupted.
func adopt(ptmx *os.File) (*terminal, error) {
	fd, err := unix.FcntlInt(ptmx.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot duplicate the terminal's descriptor: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("cannot make the terminal non-blocking: %w", err)
	}
	t := &terminal{master: os.NewFile(uintptr(fd), ptmx.Name())}
	if t.conn, err = t.master.SyscallConn(); err != nil {
		t.master.Close()
		return nil, err
	}
	return t, nil
}

// command checks what can be checked before the start, where the reason can still be told apart.
func command(req *CreateRequest) (*exec.Cmd, error) {
	if len(req.Argv) == 0 || req.Argv[0] == "" {
		return nil, fmt.Errorf("%w: no program was named", ErrStart)
	}
	path, err := lookPath(req.Argv[0], req.Env)
	if err != nil {
		return nil, err
	}
	if req.Dir != "" {
		switch info, err := os.Stat(req.Dir); {
		case errors.Is(err, fs.ErrNotExist):
			return nil, fmt.Errorf("%w: the directory %s does not exist", ErrStart, req.Dir)
		case err != nil:
			return nil, fmt.Errorf("%w: cannot enter the directory: %w", ErrStart, err)
		case !info.IsDir():
			return nil, fmt.Errorf("%w: %s is not a directory", ErrStart, req.Dir)
		}
	}
	return &exec.Cmd{Path: path, Args: req.Argv, Dir: req.Dir, Env: append([]string{}, req.Env...)}, nil
}

// lookPath finds a program named without a slash in the PATH of the session's own environment, not of ours.
func lookPath(name string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	var path string
	for _, kv := range env {
		if v, ok := strings.CutPrefix(kv, "PATH="); ok {
			path = v
		}
	}
	for _, dir := range filepath.SplitList(path) {
		file := filepath.Join(dir, name)
		if info, err := os.Stat(file); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 && filepath.IsAbs(file) {
			return file, nil
		}
	}
	return "", fmt.Errorf("%w: %s is not in the session's PATH (%s)", ErrStart, name, path)
}

func openError(err error) error {
	switch {
	case errors.Is(err, syscall.ENOSPC):
		limit, _ := os.ReadFile("/proc/sys/kernel/pty/max") // best effort: without the number the message still tells what to do
		return fmt.Errorf("%w: this machine has no terminals left (kernel.pty.max is %s); close some, or raise the limit with sysctl", ErrStart,
			strings.TrimSpace(string(limit)))
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
		return fmt.Errorf("%w: too many files are open; close some terminals, or raise the limit on open files", ErrStart)
	}
	return fmt.Errorf("%w: cannot open a terminal: %w", ErrStart, err)
}

func startError(err error, path string) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: %s does not exist, or the interpreter it names does not", ErrStart, path)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: %s may not be executed by this user", ErrStart, path)
	case errors.Is(err, syscall.ENOEXEC):
		return fmt.Errorf("%w: %s is not a program this machine can run", ErrStart, path)
	case errors.Is(err, syscall.EAGAIN), errors.Is(err, syscall.ENOMEM):
		return fmt.Errorf("%w: the machine is out of memory or processes: %w", ErrStart, err)
	}
	return fmt.Errorf("%w: %w", ErrStart, err)
}

func (t *terminal) control(f func(fd int) error) error {
	var err error
	if cerr := t.conn.Control(func(fd uintptr) { err = f(int(fd)) }); cerr != nil {
		return cerr
	}
	return err
}

func (t *terminal) resize(size Size) error {
	return t.control(func(fd int) error {
		return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: size.Rows, Col: size.Cols})
	})
}

// foreground returns the process group in the foreground, 0 if there is none.
func (t *terminal) foreground() (pgrp int) {
	err := t.control(func(fd int) (err error) {
		pgrp, err = unix.IoctlGetInt(fd, unix.TIOCGPGRP)
		return err
	})
	if err != nil || pgrp < 0 {
		return 0
	}
	return pgrp
}

// read reads what the program wrote. Before it waits for that, it calls idle.
func (t *terminal) read(p []byte, idle func()) (n int, err error) {
	rerr := t.conn.Read(func(fd uintptr) bool {
		for {
			n, err = unix.Read(int(fd), p)
			switch {
			case errors.Is(err, unix.EINTR):
				continue
			case errors.Is(err, unix.EAGAIN):
				idle()
				return false
			}
			return true
		}
	})
	switch {
	case rerr != nil:
		return 0, rerr
	case err != nil:
		return 0, err
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}

// readable reports whether output is waiting.
func (t *terminal) readable() bool {
	ready := false
	err := t.control(func(fd int) error {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 0)
		ready = n > 0 && fds[0].Revents&unix.POLLIN != 0
		return err
	})
	return err == nil && ready
}
