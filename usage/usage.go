// Package usage tells how much memory, disk and processor time a workspace uses, and how much it has.
//
// [Memory] and [CPU] count against the limit of the container that this process is in, if there is one, and
// against the machine's otherwise; [Volume] tells about one mounted file system. [OOMKills] counts whom the kernel's
// OOM killer ended for want of memory.
package usage

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// Amount is how much of something is used, and how much there is; in bytes.
type Amount struct{ Used, Total int64 }

// Memory returns the memory in use. Page cache that the kernel can take back at once does not count.
func Memory() (Amount, error) { return machine("/").memory() }

// HostMemory returns the memory in use on the whole machine.
func HostMemory() (Amount, error) {
	host, err := machine("/").hostMemory()
	if err != nil {
		return Amount{}, fmt.Errorf("cannot tell how much memory is in use: %w", err)
	}
	return host, nil
}

// Volume returns how full the file system is that path is on.
func Volume(path string) (Amount, error) {
	var fs syscall.Statfs_t
	if err := syscall.Statfs(path, &fs); err != nil {
		return Amount{}, fmt.Errorf("cannot tell how full %s is: %w", path, err)
	}
	return Amount{Used: int64(fs.Blocks-fs.Bfree) * int64(fs.Bsize), Total: int64(fs.Blocks) * int64(fs.Bsize)}, nil
}

// machine is the root of a file system with the kernel's /proc and /sys.
type machine string

func (m machine) memory() (Amount, error) {
	host, err := m.hostMemory()
	if err != nil {
		return Amount{}, fmt.Errorf("cannot tell how much memory is in use: %w", err)
	}
	if limited, ok := m.limitedMemory(); ok && limited.Total < host.Total {
		return limited, nil
	}
	return host, nil
}

// hostMemory reads /proc/meminfo, whose figures are in KiB.
func (m machine) hostMemory() (Amount, error) {
	file, err := os.ReadFile(filepath.Join(string(m), "proc/meminfo"))
	if err != nil {
		return Amount{}, err
	}
	total, ok := figure(file, "MemTotal:")
	available, ok2 := figure(file, "MemAvailable:")
	if !ok || !ok2 {
		return Amount{}, errors.New("/proc/meminfo does not say")
	}
	return Amount{Used: (total - available) << 10, Total: total << 10}, nil
}

// hierarchy is where one version of control groups keeps its figures.
type hierarchy struct{ mount, limit, current, cache, events string }

var unified = hierarchy{"sys/fs/cgroup", "memory.max", "memory.current", "inactive_file", "memory.events"}

func legacy(controller string) hierarchy {
	return hierarchy{"sys/fs/cgroup/" + controller, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "memory.oom_control"}
}

// limitedMemory returns what counts against the tightest limit of the control groups around this
// process; false if there is none.
func (m machine) limitedMemory() (Amount, bool) {
	h, group, ok := m.group("memory")
	if !ok {
		return Amount{}, false
	}
	mount := filepath.Join(string(m), h.mount)
	tightest, found := Amount{Total: math.MaxInt64}, false
	// A container may see its own groups at the mount, under a path that only the host knows.
	for dir := filepath.Join(mount, group); ; dir = filepath.Dir(dir) {
		if a, ok := h.read(dir); ok && a.Total < tightest.Total {
			tightest, found = a, true
		}
		if len(dir) <= len(mount) {
			return tightest, found
		}
	}
}

// group returns the control group of this process that a controller acts on.
func (m machine) group(controller string) (hierarchy, string, bool) {
	file, err := os.ReadFile(filepath.Join(string(m), "proc/self/cgroup"))
	if err != nil {
		return hierarchy{}, "", false
	}
	path, both := "", false
	for line := range strings.Lines(string(file)) {
		field := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		switch {
		case len(field) != 3:
		case strings.Contains(","+field[1]+",", ","+controller+","):
			return legacy(controller), filepath.Clean("/" + field[2]), true
		case field[0] == "0" && field[1] == "":
			path, both = filepath.Clean("/"+field[2]), true
		}
	}
	return unified, path, both
}

// read returns a group's memory; false if it has no limit.
func (h hierarchy) read(dir string) (Amount, bool) {
	limit, ok := number(filepath.Join(dir, h.limit))
	current, ok2 := number(filepath.Join(dir, h.current))
	if !ok || !ok2 {
		return Amount{}, false
	}
	if stat, err := os.ReadFile(filepath.Join(dir, "memory.stat")); err == nil {
		if cache, ok := figure(stat, h.cache); ok {
			current = max(current-cache, 0)
		}
	}
	return Amount{Used: current, Total: limit}, true
}

// number reads a file that holds one number.
func number(path string) (int64, bool) {
	file, err := os.ReadFile(path)
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseInt(string(bytes.TrimSpace(file)), 10, 64) // "max" is none
	return n, err == nil
}

// figure reads the number behind a name at the start of a line.
func figure(file []byte, name string) (int64, bool) {
	for lines := bufio.NewScanner(bytes.NewReader(file)); lines.Scan(); {
		if field := strings.Fields(lines.Text()); len(field) >= 2 && field[0] == name {
			n, err := strconv.ParseInt(field[1], 10, 64)
			return n, err == nil
		}
	}
	return 0, false
}
