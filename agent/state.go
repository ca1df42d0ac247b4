package agent

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/berthd/berth/account"
)

// ErrStateBusy is returned (wrapped) by [OpenState] when another berthd holds the directory.
var ErrStateBusy = errors.New("another berthd runs with it")

// State is the directory that an agent keeps things in over restarts. One process at a time holds
// it: two agents on one spool would send each other's logs.
type State struct {
	dir  string
	own  string // the part of it that belongs to the workspace's user
	user *account.User
	lock *os.File
}

// OpenState makes the directory if it is missing, for its owner alone, and takes hold of it.
func OpenState(dir string) (*State, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("cannot use state directory %s: %w", dir, err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make state directory: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot write to state directory: %w", err)
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		holder, _ := os.ReadFile(lock.Name())
		lock.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("cannot use state directory %s: %w (process %s)", dir, ErrStateBusy, strings.TrimSpace(string(holder)))
		}
		return nil, fmt.Errorf("cannot lock state directory %s: %w", dir, err)
	}
	s := &State{dir: dir, own: dir, lock: lock}
	if err := s.writeHolder(); err != nil {
		s.Close()
		return nil, fmt.Errorf("cannot write to state directory: %w", err)
	}
	return s, nil
}

// writeHolder notes our process id in the lock file, for the message a second berthd gives.
func (s *State) writeHolder() error {
	if err := s.lock.Truncate(0); err != nil {
		return err
	}
	_, err := s.lock.WriteAt([]byte(fmt.Sprintln(os.Getpid())), 0)
	// A full disk is no reason not to run: the agent works from memory then, and only a message is poorer.
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return nil
	}
	return err
}

// Path returns the path of a file in the directory.
func (s *State) Path(name string) string { return filepath.Join(s.dir, name) }

// replace gives a file of the directory another content in one step: a crash leaves the old or the new one.
func (s *State) replace(name string, data []byte) error {
	next := s.Path(name + ".new")
	if err := os.WriteFile(next, data, 0o600); err != nil {
		return err
	}
	return os.Rename(next, s.Path(name))
}

// OwnDir is the part of a state directory that belongs to a user, which is all of it for nil. Another user finds no traces
// of this one there.
func OwnDir(dir string, user *account.User) string {
	if user == nil {
		return dir
	}
	return filepath.Join(dir, fmt.Sprintf("user-%d", user.UID))
}

// Lend makes a directory in the state directory that belongs to the workspace's user, where that is
// another than ours, and lets everybody pass through to it. What lies beside it is for our eyes only, as
// before. A nil user is ours, whose part is all of it.
func (s *State) Lend(user *account.User) error {
	if user == nil {
		return nil
	}
	own := OwnDir(s.dir, user)
	if err := os.Mkdir(own, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("cannot make a directory for %s: %w", user, err)
	}
	if err := os.Lchown(own, int(user.UID), int(user.GID)); err != nil {
		return fmt.Errorf("cannot give %s to %s: %w", own, user, err)
	}
	if err := os.Chmod(s.dir, 0o711); err != nil {
		return fmt.Errorf("cannot let %s into the state directory: %w", user, err)
	}
	s.own, s.user = own, user
	return nil
}

// OwnPath returns the path of a file that belongs to the workspace's user.
func (s *State) OwnPath(name string) string { return filepath.Join(s.own, name) }

// SocketPath returns where a Unix socket of the workspace's user lies; see [SocketPath].
func (s *State) SocketPath(name string) (path string, err error) {
	err = s.user.Do(func() error {
		path, err = SocketPath(s.own, name)
		return err
	})
	return path, err
}

// Close lets go of the directory.
func (s *State) Close() error { return s.lock.Close() }

// maxSocketPath is the longest path of a Unix socket that every system takes: 104 bytes on
// BSD-derived ones, with the closing zero.
const maxSocketPath = 103

// SocketPath returns where a Unix socket of the agent with this state directory lies: in that
// directory, or, where its path is too long for a socket, in a private directory under the system's
// temporary one. It makes no directory but that latter one.
func SocketPath(stateDir, name string) (string, error) {
	stateDir, err := filepath.Abs(stateDir)
	if err != nil {
		return "", fmt.Errorf("cannot place socket %s: %w", name, err)
	}
	if path := filepath.Join(stateDir, name); len(path) <= maxSocketPath {
		return path, nil
	}
	sum := sha256.Sum256([]byte(stateDir))
	dir := filepath.Join(os.TempDir(), fmt.Sprintf("berthd-%d-%s", os.Geteuid(), hex.EncodeToString(sum[:6])))
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", fmt.Errorf("cannot place socket %s: %w", name, err)
	}
	if err := private(dir); err != nil {
		return "", fmt.Errorf("cannot place socket %s: %w", name, err)
	}
	return filepath.Join(dir, name), nil
}

// private checks that a directory under a shared one is ours alone: another user may have made it first.
func private(dir string) error {
	info, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	owner, ok := info.Sys().(*syscall.Stat_t)
	if !ok || !info.IsDir() || info.Mode().Perm()&0o077 != 0 || int(owner.Uid) != os.Geteuid() {
		return fmt.Errorf("%s is not a directory of this user alone: remove it, or choose a state directory with a shorter path", dir)
	}
	return nil
}
