package berthd

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// holdKey makes a key readable for a program of this user by a path, until release is called or this
// process ends, however it ends. The key is in memory only.
func holdKey(pem []byte) (path string, release func(), err error) {
	fd, err := unix.MemfdCreate("berthd-git-key", unix.MFD_CLOEXEC)
	if err != nil {
		return tempKey(os.Getenv("XDG_RUNTIME_DIR"), pem)
	}
	f := os.NewFile(uintptr(fd), "berthd-git-key")
	path = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd)
	// A process that may not be dumped, having capabilities from its file, cannot be looked into.
	dumpable, dumpErr := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	_, statErr := os.Stat(path)
	if dumpErr != nil || dumpable != 1 || statErr != nil {
		f.Close()
		return tempKey(os.Getenv("XDG_RUNTIME_DIR"), pem)
	}
	if err = f.Chmod(0o600); err == nil {
		_, err = f.Write(pem)
	}
	if err != nil {
		f.Close()
		return "", nil, fmt.Errorf("cannot hold the key: %w", err)
	}
	return path, func() { f.Close() }, nil
}
