package berthd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/berthd/berth/account"
	"github.com/berthd/berth/sshd"
)

// findUser returns whom the workspace belongs to, nil for the user that berthd runs as.
func (s *settings) findUser() (*account.User, error) {
	if s.user == "" {
		return nil, nil
	}
	u, err := account.Find(s.user)
	if err != nil {
		return nil, usagef("cannot use --user (BERTH_USER): %w", err)
	}
	return u, nil
}

// userCheckTimeout is a hundred times what the check takes; berthd is not to hang before it says anything.
const userCheckTimeout = 30 * time.Second

// checkUser starts berthd as the user once, before anybody relies on it: it finds out whether the rights
// of root are really gone there, and whether the user can enter their home and our directory for them. No
// workspace is served by half.
func checkUser(ctx context.Context, self []string, user *account.User, dir string) error {
	if user == nil {
		return nil
	}
	program, err := os.Executable()
	if err != nil {
		return fmt.Errorf("cannot find berthd's own program: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, userCheckTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, program)
	cmd.Args = append(append([]string{}, self...), "user-check", user.Name, user.Home, dir)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: user.Credential()}
	var said bytes.Buffer // a line
	cmd.Stderr = &said
	var exit *exec.ExitError
	switch err := cmd.Run(); {
	case err == nil:
		return nil
	case errors.As(err, &exit) && exit.Exited():
		return usagef("cannot run as %s: %s", user, strings.TrimPrefix(strings.TrimSpace(said.String()), "berthd: "))
	case errors.Is(err, fs.ErrPermission):
		return usagef("cannot start a program as %s: %w: berthd needs the capabilities CAP_SETUID and CAP_SETGID, and %s and the directories above it must be open to them", user, err, program)
	default: // nothing that a setting could mend
		return fmt.Errorf("cannot check that berthd can run as %s: %w", user, err)
	}
}

// userCheck is the internal verb behind checkUser: a user's name, and directories that they must be able
// to enter.
func (p process) userCheck() error {
	if len(p.args) == 0 {
		return usagef("user-check needs a user: berthd starts this verb by itself")
	}
	user, err := account.Named(p.args[0])
	if err != nil {
		return err
	}
	if err := user.Verify(); err != nil {
		return err
	}
	for _, dir := range p.args[1:] {
		if err := os.Chdir(dir); err != nil {
			return fmt.Errorf("%s cannot enter %s: open it and the directories above it to them: %w", user, dir, err)
		}
	}
	return nil
}

// sftpServer is the internal verb that serves SFTP on the standard streams, with the rights of whoever
// started it.
func (p process) sftpServer() error {
	if len(p.args) > 0 {
		return usagef("sftp-server takes no arguments: berthd starts this verb by itself")
	}
	return sshd.ServeSFTP(os.Stdin, os.Stdout)
}
