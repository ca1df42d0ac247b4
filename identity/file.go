package identity

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync/atomic"
	"syscall"

	"github.com/berthd/berth/wire"
)

// maxTokenFile in bytes. A session token has 36; a projected Kubernetes token is a JWT of about 1 KiB.
const maxTokenFile = 16 << 10

// TokenFile reads the token from a file at each call, so that a rotated one is used at the next
// connection. warn, which may be nil, is told once when others than the owner can read the file.
func TokenFile(path string, warn func(string)) Source {
	return &tokenFile{path: path, warn: warn}
}

type tokenFile struct {
	path   string
	warn   func(string)
	warned atomic.Bool
}

func (f *tokenFile) String() string { return "token file " + f.path }

func (f *tokenFile) Token(context.Context) (wire.Secret, error) {
	text, mode, err := f.read()
	if err != nil {
		return "", fmt.Errorf("cannot read the token file: %w", err)
	}
	if mode&0o077 != 0 && f.warn != nil && !f.warned.Swap(true) {
		f.warn(fmt.Sprintf("token file %s can be read by others than its owner (mode %04o): chmod 600 %s", f.path, mode, f.path))
	}
	token, err := clean(text)
	if err != nil {
		return "", fmt.Errorf("cannot use token file %s: %w", f.path, err)
	}
	return token, nil
}

func (f *tokenFile) read() (text string, mode fs.FileMode, err error) {
	// Opening a FIFO would wait for its writer; it could be read only once anyway.
	file, err := os.OpenFile(f.path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrPermission) {
		return "", 0, fmt.Errorf("%w: it must be readable by user %d", err, os.Getuid())
	}
	if err != nil {
		return "", 0, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return "", 0, err
	}
	if !info.Mode().IsRegular() {
		return "", 0, fmt.Errorf("%s is not a regular file", f.path)
	}
	content, err := io.ReadAll(io.LimitReader(file, maxTokenFile+1))
	if err != nil {
		return "", 0, err
	}
	if len(content) > maxTokenFile {
		return "", 0, fmt.Errorf("%s holds more than %d bytes; is it a token file?", f.path, maxTokenFile)
	}
	return string(content), info.Mode().Perm(), nil
}
