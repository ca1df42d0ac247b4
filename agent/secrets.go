package agent

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/google/uuid"

	"github.com/berthd/berth/wire/agentpb"
)

// writeSecrets writes the manifest's secrets that have a file. What fails is told by path alone.
func writeSecrets(secrets []*agentpb.WorkspaceSecret, home string, log *slog.Logger) {
	for _, s := range secrets {
		if s.GetFilePath() == "" {
			continue
		}
		path := secretPath(s.GetFilePath(), home)
		if err := writeSecret(path, s.GetValue()); err != nil {
			log.Warn("cannot write a secret to its file", "path", path, "error", err)
		}
	}
}

// secretPath makes a secret's path absolute: a leading ~/ is the home directory, and so is what a
// relative path starts from.
func secretPath(path, home string) string {
	if rest, ok := strings.CutPrefix(path, "~/"); ok || !filepath.IsAbs(path) {
		if !ok {
			rest = path
		}
		return filepath.Join(home, rest)
	}
	return filepath.Clean(path)
}

// writeSecret replaces a file in one step. A new file is for its owner alone, an existing one keeps its
// permissions, and a symbolic link in its place is replaced, not followed. The directories above may be
// links, but not one that another user could have laid or could turn.
func writeSecret(path string, value []byte) error {
	dir, name := filepath.Split(path)
	dir, err := ownDirectory(dir)
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	mode := fs.FileMode(0o600)
	switch info, err := root.Lstat(name); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	case info.IsDir():
		return errors.New("it is a directory")
	case info.Mode().IsRegular():
		mode = info.Mode().Perm()
		if old, err := root.ReadFile(name); err == nil && bytes.Equal(old, value) {
			return nil // who watches the file is not woken for nothing
		}
	}
	next := "." + name + "." + uuid.NewString()
	if err := writeNew(root, next, value, mode); err != nil {
		return errors.Join(err, remove(root, next))
	}
	if err := root.Rename(next, name); err != nil {
		return errors.Join(err, remove(root, next))
	}
	return nil
}

// writeNew makes a file with exactly these permissions.
func writeNew(root *os.Root, name string, value []byte, mode fs.FileMode) error {
	f, err := root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(value)
	return errors.Join(err, f.Chmod(mode), f.Close())
}

func remove(root *os.Root, name string) error {
	if err := root.Remove(name); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// maxLinks bounds the symbolic links in one path; the kernel's figure.
const maxLinks = 40

// ownDirectory resolves a directory's symbolic links, and makes what is missing. It fails if another user
// could send us elsewhere: by a link of theirs, or in a directory that is theirs or that everybody may
// change.
func ownDirectory(dir string) (string, error) {
	at := "/"
	rest := strings.Split(filepath.Clean(dir), "/")
	for links := 0; len(rest) > 0; {
		name := rest[0]
		rest = rest[1:]
		if name == "" {
			continue
		}
		next := filepath.Join(at, name)
		info, err := os.Lstat(next)
		if errors.Is(err, fs.ErrNotExist) {
			if err = os.Mkdir(next, 0o700); err == nil {
				info, err = os.Lstat(next)
			}
		}
		if err != nil {
			return "", err
		}
		owner, ok := info.Sys().(*syscall.Stat_t)
		if !ok || owner.Uid != 0 && int(owner.Uid) != os.Geteuid() {
			return "", fmt.Errorf("%s belongs to another user", next)
		}
		switch {
		case info.Mode()&fs.ModeSymlink != 0:
			if links++; links > maxLinks {
				return "", fmt.Errorf("%s: too many symbolic links", dir)
			}
			target, err := os.Readlink(next)
			if err != nil {
				return "", err
			}
			if filepath.IsAbs(target) {
				at = "/"
			}
			rest = append(strings.Split(target, "/"), rest...)
		case !info.IsDir():
			return "", fmt.Errorf("%s is no directory", next)
		case info.Mode().Perm()&0o002 != 0 && info.Mode()&fs.ModeSticky == 0:
			return "", fmt.Errorf("everybody may change %s", next)
		default:
			at = next
		}
	}
	return at, nil
}
