package scripts

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// maxHolders is how many processes a warning names.
const maxHolders = 5

// pipeHolders names other processes that have one of the pipes open, as far as /proc shows them.
func pipeHolders(pipes ...*os.File) []string {
	wanted := map[string]bool{}
	for _, p := range pipes {
		info, err := p.Stat()
		if err != nil {
			continue // closed: nobody holds it any more
		}
		if stat, ok := info.Sys().(*syscall.Stat_t); ok {
			wanted[fmt.Sprintf("pipe:[%d]", stat.Ino)] = true
		}
	}
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil
	}
	var names []string
	for _, dir := range dirs {
		pid := filepath.Base(dir)
		if pid == strconv.Itoa(os.Getpid()) || !holds(dir, wanted) {
			continue
		}
		command, err := os.ReadFile(filepath.Join(dir, "comm"))
		if err != nil {
			continue // it has ended meanwhile
		}
		names = append(names, fmt.Sprintf("%s (pid %s)", strings.TrimSpace(string(command)), pid))
		if len(names) == maxHolders {
			break
		}
	}
	return names
}

// holds tells whether the process has a descriptor of one of the wanted files.
func holds(process string, wanted map[string]bool) bool {
	fds, err := os.ReadDir(filepath.Join(process, "fd"))
	if err != nil {
		return false // another user's
	}
	return slices.ContainsFunc(fds, func(fd os.DirEntry) bool {
		target, err := os.Readlink(filepath.Join(process, "fd", fd.Name()))
		return err == nil && wanted[target]
	})
}
