package scripts

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/berthd/berth/scripts/hold"
)

// maxHolders is how many processes a warning names.
const maxHolders = 5

// pipeHolders names the processes that have a script's output open, as far as /proc shows them, with the verb that fits.
func pipeHolders(of hold.State) string {
	wanted := map[string]bool{}
	for _, inode := range of.Pipes {
		wanted[fmt.Sprintf("pipe:[%d]", inode)] = true
	}
	switch names := namesOf(wanted, of.Pid); len(names) {
	case 0:
		return "some process holds"
	case 1:
		return names[0] + " holds"
	default:
		return strings.Join(names, ", ") + " hold"
	}
}

// namesOf names processes that have one of the files open, but for one.
func namesOf(wanted map[string]bool, except int) []string {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil
	}
	var names []string
	for _, dir := range dirs {
		pid := filepath.Base(dir)
		if pid == strconv.Itoa(except) || !holds(dir, wanted) {
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
