package identity

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"

	"github.com/berthd/berth/wire"
)

// maxTokenFile in bytes. A session token has 36; a projected Kubernetes token is a JWT of about 1 KiB.
const maxTokenFile = 16 << 10

// TokenFile reads the token from a file at each call, so that a rotated one is used at the next
// connection. warn, which may be nil, is told once when others than the owner can read the file.
func TokenFile(path string, warn func(string)) Source {
	return &tokenFile{name: "token file " + path, path: path, warn: warn}
}

// EnvCredentials names the variable that holds the directory of a systemd unit's credentials.
const EnvCredentials = "CREDENTIALS_DIRECTORY"

// Credential reads the token from a credential of the systemd unit (LoadCredential=NAME:PATH and
// alike) that is kept in dir. It returns nil if dir is empty or holds none of that name.
func Credential(dir, name string) Source {
	if dir == "" || name == "" || name != filepath.Base(name) {
		return nil
	}
	path := filepath.Join(dir, name)
	if _, err := os.Lstat(path); err != nil {
		return nil
	}
	// systemd grants access by an ACL, whose mask shows as the group's bits: there is nothing to warn of.
	return &tokenFile{name: "systemd credential " + name, path: path}
}

type tokenFile struct {
	name   string // for people
	path   string
	warn   func(string)
	warned atomic.Bool
}

func (f *tokenFile) String() string { return f.name }

func (f *tokenFile) Renews() bool { return false }

func (f *tokenFile) Token(context.Context) (wire.Secret, error) {
	text, mode, err := readTokenFile(f.path)
	if err != nil {
		return "", unreadable(f.name, f.path, err)
	}
	if mode&0o077 != 0 && f.warn != nil && !f.warned.Swap(true) {
		f.warn(fmt.Sprintf("token file %s can be read by others than its owner (mode %04o): chmod 600 %s", f.path, mode, f.path))
	}
	token, problem := clean(text)
	if problem != "" {
		return "", &Failure{Cause: fmt.Sprintf("the %s cannot be used: %s", f.name, problem), Fix: "write the token into it, and nothing else"}
	}
	return token, nil
}

// unreadable says why a file gave no token.
func unreadable(name, path string, err error) *Failure {
	f := &Failure{Cause: fmt.Sprintf("the %s cannot be read: %v", name, err), Fix: "write the token into it", err: err}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		f.Fix = "make it, or correct the path"
	case errors.Is(err, fs.ErrPermission):
		f.Fix = fmt.Sprintf("make %s readable by user %d, as whom this runs", path, os.Getuid())
	}
	return f
}

// readTokenFile returns what a file of sane size holds, and its permissions.
func readTokenFile(path string) (text string, mode fs.FileMode, err error) {
	// Opening a FIFO would wait for its writer; it could be read only once anyway.
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return "", 0, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return "", 0, err
	}
	if !info.Mode().IsRegular() {
		return "", 0, fmt.Errorf("%s is not a regular file", path)
	}
	content, err := io.ReadAll(io.LimitReader(file, maxTokenFile+1))
	if err != nil {
		return "", 0, err
	}
	if len(content) > maxTokenFile {
		return "", 0, fmt.Errorf("%s holds more than %d bytes; is it a token file?", path, maxTokenFile)
	}
	return string(content), info.Mode().Perm(), nil
}
